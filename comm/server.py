"""The parameter server, sharded over the workers, and the split, which mixes it with other routes.

Way up: all-reduce's. Down: the owner of a shard holds its full-precision weights and Adam's state (ShardOwner), steps,
and sends weights quantized by LAQ; nobody else holds more than those thin weights. The bytes are all-reduce's, the
optimizer's memory is ZeRO-1's.

    route = register(ddp_model, ParameterServer(bits=3, weight_bits=4))
    optimizer = route.optimizer(ddp_model.named_parameters(), lr=1e-3)

The gradient is taken at the quantized weights, the full-precision ones are updated. After backward, `p.grad` holds the
mean in the elements that this rank owns and zero elsewhere: norms must be taken with `route.total_norm`. A gradient
that is not finite anywhere is NaN somewhere on every rank. Nothing can be added to a mean that nobody has all of: of
several batches for one update, all but the last need DDP's `no_sync`.

Instead of the weights, `weights="delta"` sends what they changed by, quantized as gradients are; the owner knows what
the workers have, so what one message leaves out is in the next: they follow the full-precision weights closely.

Source: Hou, Zhang & Kwok, "Analysis of Quantized Models", ICLR 2019.
"""

# No `from __future__ import annotations`: see route.py.

import math
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle

from .config import CommConfig, SplitRule
from .hook import LaneRoute, _Gradient, quantizers
from .lanes import Lane, PlainLane, Portion, QuantizedLane, scatter
from .link import Exchange, Link
from .rows import RowsLane
from .server_optimizer import ServerOptimizer
from .split import assign, possible, row_sparsity

FLAGS, NORM = 1, 2
"""Tags of the link below those of the exchanges; the optimizer has another."""

UNDECIDED = "first gradient"
"""Lane of the parameters that only the sparsity of their gradient can decide, in the first update: fp32."""


class ServerLane(QuantizedLane):
    """Quantized gradients up; the mean stays with the owner, who steps."""

    def exchange(self, buffer: Tensor, portion: Portion, step: int, tag: int) -> Exchange:
        plan = self.plan(portion)
        yield from plan.up_leg(buffer, step, tag, self.context.residual(portion.bucket))
        for piece, start in zip(portion.pieces, portion.starts, strict=True):
            buffer[start + piece.start : start + piece.start + piece.numel] = 0
        scatter(plan.total, plan.mine, buffer)

    def finite(self, buffer: Tensor, portion: Portion) -> Tensor:
        return torch.isfinite(self.plan(portion).total.sum())


class ServerRoute(LaneRoute):
    """Routes by parameter, some of which may be stepped by the owners of their shards.

    Args:
        rules: who takes which parameter; none: the server takes all.
        config: bits, clip and so on of all lanes; `weight_bits` of the server.
        seed: of the stochastic rounding; must be the same on all ranks.
        timeout: seconds to wait for a rank before giving it up.

    Raises:
        ValueError: from `register`, when a parameter is taken by no rule or by two.
    """

    def __init__(
        self, rules: Sequence[SplitRule], config: CommConfig, *, seed: int = 0, timeout: float = 1800.0
    ) -> None:
        c = config
        up, down = quantizers(c.bits, c.bits_down, c.clip, c.block, c.sigma, c.rounding)
        lanes: dict[str, Lane] = {
            "all_reduce": QuantizedLane(up, down),
            "server": ServerLane(up, down),
            "rows": RowsLane(up, down),
            "fp32": PlainLane(),
            "fp16": PlainLane(torch.float16),
        }
        # Parameters that do not train have fp32, in case DDP put them into a bucket before they were frozen.
        wanted = {"fp32", *(rule.route for rule in rules)} if rules else {"server"}
        lanes = {name: lane for name, lane in lanes.items() if name in wanted}
        if any(rule.measured for rule in rules):
            lanes[UNDECIDED] = PlainLane()
        super().__init__(lanes, seed=seed, error_feedback=c.error_feedback, timeout=timeout)
        self.rules, self.config = tuple(rules), c
        self.finite = True
        """Whether the last gradient was finite, on all ranks."""
        self._sparsity: dict[int, float] = {}
        self._optimizer: ServerOptimizer | None = None
        self._pending: dict[str, Tensor] | None = None
        self._watches: list[RemovableHandle] = []
        self._exchanged: set[int] = set()
        self._added_to: set[int] = set()

    def bind(self, model: DistributedDataParallel) -> None:
        super().bind(model)
        for index, (name, trains) in enumerate(zip(self._names, self._trains, strict=True)):
            if trains and name in model.parameters_to_ignore and self._lane_of[index] in ("server", UNDECIDED):
                raise ValueError(
                    f"model: DDP ignores {name}, which the server would keep as it is; freeze it, or unignore"
                )
        for index, parameter in enumerate(model.parameters()):
            if self.world_size > 1 and self._lane_of[index] == "server" and parameter.requires_grad:
                self._watches.append(parameter.register_hook(partial(self._watch, index, parameter)))

    def _watch(self, index: int, parameter: nn.Parameter, _: Tensor) -> None:
        """Before a gradient is added to what `parameter.grad` holds: is that a mean, of which others have the rest?"""
        if index in self._exchanged:
            if parameter.grad is not None and parameter.grad.any():
                self._added_to.add(index)
            else:  # zero_grad was called
                self._exchanged.discard(index)
                self._added_to.discard(index)

    def begin_update(self) -> None:
        """Means that were exchanged so far have been used, or dropped."""
        self._exchanged.clear()
        self._added_to.clear()

    # Who takes what

    def _assign(self) -> list[str]:
        if not self.rules:
            return ["server"] * len(self._names)
        return self._routes_of(None)

    def _routes_of(self, sparsity: dict[str, float] | None) -> list[str]:
        shapes = {n: s for n, s, trains in zip(self._names, self._rule_shapes, self._trains, strict=True) if trains}
        routes = assign(self.rules, shapes, sparsity)
        return [routes.get(name, "fp32") or UNDECIDED for name in self._names]

    @property
    def routes(self) -> dict[str, str]:
        """The route of every parameter, by name."""
        return dict(zip(self._names, self._lane_of, strict=True))

    def _exchange(self, buffer: Tensor, bucket: dist.GradBucket, step: int) -> torch.futures.Future[Tensor]:
        tensors = {self._index[id(parameter)] for parameter in bucket.parameters()}
        if wrong := tensors & self._added_to:
            raise ValueError(
                f"backward: {self._names[min(wrong)]}.grad holds the mean of an earlier backward, of which a rank has "
                "its shard only; all but the last backward of an update must be under model.no_sync()"
            )
        self._exchanged |= tensors
        if UNDECIDED in self._lane_of:
            at = 0
            for parameter in bucket.parameters():
                tensor, numel = self._index[id(parameter)], parameter.numel()
                if self._lane_of[tensor] == UNDECIDED:
                    self._sparsity[tensor] = row_sparsity(buffer[at : at + numel].view(parameter.shape))
                at += numel
        return super()._exchange(buffer, bucket, step)

    def _whole(self, gradient: _Gradient, last: Tensor) -> Exchange:
        """All ranks learn whether the gradient is finite, and what it decides."""
        finite = torch.stack(gradient.finite).all() if gradient.finite else torch.tensor(True)
        undecided = [t for t, lane in enumerate(self._lane_of) if lane == UNDECIDED]
        news = torch.tensor(
            [float(finite), *(self._sparsity.get(tensor, 0.0) for tensor in undecided)],
            dtype=torch.float64,
            device=last.device,
        )
        everybody = yield from _from_all(self._link, news, FLAGS)
        self.finite = bool((everybody[:, 0] == 1).all())
        if not self.finite:
            last.fill_(math.nan)
            if self._feedback is not None:
                self._feedback.clear()
        if undecided:
            mean = everybody[:, 1:].mean(dim=0).tolist()
            by_name = {self._names[t]: share for t, share in zip(undecided, mean, strict=True)}
            self._lane_of = self._routes_of(by_name)
            self._portions.clear()

    # The optimizer

    def optimizer(
        self,
        parameters: Iterable[tuple[str, nn.Parameter]],
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
    ) -> torch.optim.Optimizer:
        """AdamW, sharded where the server has the parameters. From now on those hold quantized weights.

        Raises:
            ValueError: there is one already, a parameter that the server has and that trains is not among `parameters`,
                or a state was loaded that is not this rank's.
        """
        if "server" not in self.lanes:
            return super().optimizer(parameters, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        if self._optimizer is not None:
            raise ValueError("optimizer: this route has one already")
        self._optimizer = ServerOptimizer(self, [p for _, p in parameters], lr, betas, eps, weight_decay)
        if self._pending is not None:
            self._optimizer.load_shard(self._pending)
            self._pending = None
        return self._optimizer

    def total_norm(self, parameters: Iterable[nn.Parameter]) -> Tensor:
        mine: list[Tensor] = []
        shared: list[Tensor] = []
        for parameter in parameters:
            if parameter.grad is not None:
                index = self._index.get(id(parameter))
                sharded = index is not None and self._lane_of[index] == "server" and self.world_size > 1
                (mine if sharded else shared).append(parameter.grad)
        square = sum_of_squares(mine, self.device)
        if self._link is not None:
            exchange = _from_all(self._link, square.view(1), NORM)
            with self.waits.around(self.device):
                try:
                    while True:
                        next(exchange).wait()
                except StopIteration as done:
                    square = done.value.sum()
        return (square + sum_of_squares(shared, self.device)).sqrt().float()

    def close(self) -> None:
        super().close()
        for watch in self._watches:
            watch.remove()

    # State

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        decided = UNDECIDED not in self._lane_of
        return {
            **state,
            "server": None if self._optimizer is None else self._optimizer.shard_state(),
            "routes": list(self._lane_of) if decided else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        if state.get("routes") is not None:
            if len(state["routes"]) != len(self._names):
                raise ValueError(
                    f"comm.routes: saved for {len(state['routes'])} parameters, there are {len(self._names)}"
                )
            self._lane_of = self._restored(state["routes"])
            self._portions.clear()
        if state.get("server") is not None:
            if self._optimizer is None:
                self._pending = state["server"]
            else:
                self._optimizer.load_shard(state["server"])

    def _restored(self, saved: Sequence[str]) -> list[str]:
        """Saved lanes; ValueError where the rules, of now, do not allow the one that a parameter had."""
        lane_of = self._assign()
        for i, (name, shape, was) in enumerate(zip(self._names, self._rule_shapes, saved, strict=True)):
            allowed = possible(self.rules, name, shape) if self.rules else {"server"}
            if self._trains[i] and was not in allowed:
                raise ValueError(
                    f"comm.routes: {name} went by {was} when this was saved, the rules now say "
                    f"{' or '.join(sorted(allowed))}: go on with the rules of then"
                )
            lane_of[i] = was if self._trains[i] else lane_of[i]
        return lane_of


class ParameterServer(ServerRoute):
    """Quantized gradients up, LAQ-quantized weights down, the owner of a shard steps; sharded over the workers.

    Gradient accumulation needs DDP's `no_sync` (see the module).

    Args:
        bits: of a gradient's element on the way up, 1 to 8.
        weight_bits: of a weight on the way down, 2 to 8 (LAQ), 16 or 32 (unquantized); vectors travel in fp32.
        weights: "laq", as `weight_bits` says; or "delta", what weights changed by, in `bits_down`, with feedback.
        clip, block, error_feedback, seed, timeout: as in QuantizedAllReduce.

    Raises:
        ValueError: a setting is none of these.
    """

    def __init__(
        self,
        bits: int = 3,
        weight_bits: int = 4,
        clip: float = 3.0,
        block: int = 0,
        *,
        weights: Literal["laq", "delta"] = "laq",
        bits_down: int = 4,
        error_feedback: bool = True,
        seed: int = 0,
        timeout: float = 1800.0,
    ) -> None:
        config = CommConfig(
            route="server",
            bits=bits,
            bits_down=bits_down,
            weights=weights,
            weight_bits=weight_bits,
            clip=clip,
            block=block,
            error_feedback=error_feedback,
        )
        super().__init__((), config, seed=seed, timeout=timeout)


def sum_of_squares(gradients: Sequence[Tensor], device: torch.device) -> Tensor:
    """In fp64: float64 [] on `device`, 0 of none."""
    if not gradients:
        return torch.zeros((), dtype=torch.float64, device=device)
    return torch.nn.utils.get_total_norm(list(gradients)).double().square()


def _from_all(link: Link | None, values: Tensor, tag: int) -> Any:
    """An exchange that returns everybody's values [world_size, n] to every rank, in the order of ranks."""
    if link is None:
        return values.view(1, -1)
    others = [rank for rank in range(link.world_size) if rank != link.rank]
    rows = {rank: torch.empty_like(values) for rank in others}
    mine = values.contiguous().view(torch.uint8)
    yield link.start(tag, dict.fromkeys(others, mine), {rank: row.view(torch.uint8) for rank, row in rows.items()})
    return torch.stack([values if rank == link.rank else rows[rank] for rank in range(link.world_size)])
