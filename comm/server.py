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

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle

from .config import CommConfig, SplitRule
from .hook import LaneRoute, _Gradient, quantizers
from .lanes import DOWN, Lane, PlainLane, Portion, QuantizedLane, gather, scatter
from .layout import Cut, as_stored
from .link import Exchange, Link
from .owner import ShardOwner, WeightFormat
from .reference import key_words
from .rows import RowsLane
from .split import assign, possible, row_sparsity

FLAGS, NORM, WEIGHTS = 1, 2, 3
"""Tags of the link below those of the exchanges."""

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
        shapes = {n: s for n, s, trains in zip(self._names, self._shapes, self._trains, strict=True) if trains}
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
        """AdamW, sharded where the server has the parameters. From now on those hold quantized weights."""
        if "server" not in self.lanes:
            return super().optimizer(parameters, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        if self._optimizer is not None:
            raise ValueError("optimizer: this route has one already")
        self._optimizer = ServerOptimizer(self, [p for _, p in parameters], lr, betas, eps, weight_decay)
        if self._pending is not None:
            self._optimizer.owner.load_state_dict(self._pending)
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
                self._optimizer.owner.load_state_dict(state["server"])

    def _restored(self, saved: Sequence[str]) -> list[str]:
        """Saved lanes; ValueError where the rules, of now, do not allow the one that a parameter had."""
        lane_of = self._assign()
        for i, (name, shape, was) in enumerate(zip(self._names, self._shapes, saved, strict=True)):
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


class ServerOptimizer(torch.optim.Optimizer):
    """AdamW whose server parameters are stepped by the owners of their shards; made by `route.optimizer`.

    `found_inf`, a tensor that is 1 where the update is to be skipped, may be set before `step`, as with torch's fused
    optimizers. An update whose gradient was not finite on some rank is skipped on all.
    """

    def __init__(
        self,
        route: ServerRoute,
        parameters: Sequence[nn.Parameter],
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
    ) -> None:
        super().__init__(parameters, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self._route = route
        self.found_inf: Tensor | None = None
        lane = {id(p): route._lane_of[i] for i, p in enumerate(_parameters_of(route))}
        others = [p for p in parameters if lane.get(id(p)) != "server"]
        self._inner = None
        if others:
            self._inner = torch.optim.AdamW(others, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=True)
        self._tensors = [p for p in _parameters_of(route) if lane[id(p)] == "server" and p.requires_grad]
        shapes = [p.shape for p in self._tensors]
        numels = [shape.numel() for shape in shapes]
        ends = np.cumsum(numels)
        self._starts = [int(end) - numel for end, numel in zip(ends, numels, strict=True)]
        served = route.lanes["server"]
        assert isinstance(served, ServerLane)
        indices = [route._index[id(p)] for p in self._tensors]
        self._indices = np.array(indices, dtype=np.int64)
        cut = served.cut if route.world_size > 1 else Cut(
            [s.numel() for s in route._shapes], served.up.span, 1
        )  # fmt: skip
        device = self._tensors[0].device
        self._shards = [cut.shard(indices, self._starts, rank) for rank in range(route.world_size)]
        matrices = [np.array([len(shapes[t]) > 1 for t in shard.tensors], dtype=bool) for shard in self._shards]
        bits = route.config.weight_bits
        self._forms = [WeightFormat(s, m, bits) for s, m in zip(self._shards, matrices, strict=True)]
        self._delta = served.down if route.config.weights == "delta" else None
        sizes = [form.size for form in self._forms]
        if self._delta is not None:
            sizes = [shard.size(self._delta.bits) for shard in self._shards]
        self._payloads = [torch.empty(size, dtype=torch.uint8, device=device) for size in sizes]
        self._flat = torch.empty(sum(numels), dtype=torch.float32, device=device)
        for parameter, start in zip(self._tensors, self._starts, strict=True):
            self._flat[start : start + parameter.numel()] = as_stored(parameter.detach(), parameter).reshape(-1)
        self.owner = ShardOwner(
            gather(self._flat, self._shards[route.rank]),
            self._shards[route.rank].compact(),
            matrices=matrices[route.rank],
            weight_bits=bits,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
        )
        if self._delta is None:  # else all have the same weights already
            self._pull()

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update, and everybody's weights; nothing where the gradient was not finite."""
        assert closure is None, "a gradient is exchanged once an update"
        self._route.begin_update()
        skip = self.found_inf is not None and bool(self.found_inf)
        if self._route.world_size == 1:  # no exchange has looked
            sums = [p.grad.sum(dtype=torch.float32) for p in self.param_groups[0]["params"] if p.grad is not None]
            self._route.finite = not sums or bool(torch.isfinite(torch.stack(sums)).all())
        if skip or not self._route.finite:
            return
        lr = self.param_groups[0]["lr"]
        if self._inner is not None:
            self._inner.param_groups[0]["lr"] = lr
            self._inner.step()
        shard = self._shards[self._route.rank]
        touched = np.array([self._tensors[t].grad is not None for t in shard.tensors], dtype=bool)
        if len(touched):
            self.owner.step(self._gradient(), lr, touched)
        self._pull()

    def _gradient(self) -> Tensor:
        """The mean gradient of this rank's shard [its elements], zero where there is none."""
        pieces = []
        shard = self._shards[self._route.rank]
        for (start, numel, *_), tensor in zip(shard.table.tolist(), shard.tensors.tolist(), strict=True):
            parameter, at = self._tensors[tensor], start - self._starts[tensor]
            if parameter.grad is None:
                pieces.append(self._flat.new_zeros(numel))
            else:
                gradient = as_stored(parameter.grad, parameter).reshape(-1)
                pieces.append(gradient[at : at + numel].float())
        return torch.cat(pieces)

    @torch.no_grad()
    def _pull(self) -> None:
        """The owner's weights go out, quantized; everybody's come in, this rank's own included."""
        route = self._route
        own = self._payloads[route.rank]
        if self._delta is None:
            self.owner.encode(own)
        else:  # what the workers have is in the parameters: a checkpoint may just have been loaded into them
            for parameter, start in zip(self._tensors, self._starts, strict=True):
                self._flat[start : start + parameter.numel()] = as_stored(parameter, parameter).reshape(-1)
            shard = self._shards[route.rank]
            missing = self.owner.weights - gather(self._flat, shard)
            keys = key_words((route.seed, route.step, DOWN), self._indices[shard.tensors])
            self._delta.encode_shard(missing, shard.compact(), keys, own)
        if route._link is not None:
            others = [rank for rank in range(route.world_size) if rank != route.rank]
            outgoing = {rank: own for rank in others if own.numel()}
            incoming: dict[int, Tensor | None] = {r: self._payloads[r] for r in others if self._payloads[r].numel()}
            route.meter.add(down=own.numel() * len(outgoing))
            with route.waits.around(route.device):
                route._link.start(WEIGHTS, outgoing, incoming).wait()
        for form, shard, payload in zip(self._forms, self._shards, self._payloads, strict=True):
            if self._delta is None:
                form.decode(payload, self._flat)
            else:
                self._delta.decode_shard(payload, shard, self._flat, add=True)
        for parameter, start in zip(self._tensors, self._starts, strict=True):
            stored = as_stored(parameter, parameter)
            stored.copy_(self._flat[start : start + parameter.numel()].view(stored.shape))

    def state_dict(self) -> dict[str, Any]:
        """What all ranks have in common; shards are in the route's state, which is saved per rank."""
        groups = [{k: v for k, v in group.items() if k != "params"} for group in self.param_groups]
        return {"param_groups": groups, "others": None if self._inner is None else self._inner.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where `state_dict` was taken."""
        for group, saved in zip(self.param_groups, state["param_groups"], strict=True):
            group.update(saved)
        if self._inner is not None:
            self._inner.load_state_dict(state["others"])

    def shard_state(self) -> dict[str, Tensor]:
        """The owner's state, and of each of its segments: the parameter's place in the model, start in it, elements."""
        return {**self.owner.state_dict(), "segments": torch.from_numpy(self._segments())}

    def _segments(self) -> np.ndarray:
        shard = self._shards[self._route.rank]
        starts = shard.table[:, 0] - np.array(self._starts, dtype=np.int64)[shard.tensors]
        return np.stack([self._indices[shard.tensors], starts, shard.table[:, 1]], axis=1)

    def take(self, parameters: Sequence[nn.Parameter], moments: dict[int, dict[str, Tensor]]) -> None:
        """Goes on with the state of a whole model, of which this rank takes its shard (see reshard.py).

        Args:
            parameters: all of the model's, in order.
            moments: by place in the model; `weights` of those that have none here are the parameter's.
        """
        from .reshard import load_adamw

        at = 0
        for segment, (place, start, numel) in enumerate(self._segments().tolist()):
            kept = {"weights": parameters[place].detach(), **moments.get(place, {})}
            here, there = slice(at, at + numel), slice(start, start + numel)
            owned = {"weights": self.owner.weights, "exp_avg": self.owner.mean, "exp_avg_sq": self.owner.square}
            for key, own in owned.items():
                own[here] = as_stored(kept[key], parameters[place]).reshape(-1)[there] if key in kept else 0
            self.owner.steps[segment] = kept.get("step", 0)
            at += numel
        if self._inner is not None:
            place_of = {id(parameter): place for place, parameter in enumerate(parameters)}
            others = [place_of[id(p)] for group in self._inner.param_groups for p in group["params"]]
            load_adamw(self._inner, others, moments)


def _parameters_of(route: ServerRoute) -> list[nn.Parameter]:
    assert isinstance(route._model, DistributedDataParallel)
    return list(route._model.parameters())


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
