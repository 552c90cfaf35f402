"""The optimizer of a sharded parameter server: a rank steps its shard, and gets thin weights of all others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .lanes import DOWN, QuantizedLane, gather
from .layout import Cut, as_stored
from .owner import ShardOwner, WeightFormat
from .reference import key_words
from .split import plain_name

if TYPE_CHECKING:
    from .server import ServerRoute

WEIGHTS = 3
"""Tag of the link, below those of the exchanges and beside the route's own (see server.py)."""


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
        missing = {id(p) for p in self._tensors} - {id(p) for p in parameters}
        if left := [name for name, p in _named(route) if id(p) in missing]:
            raise ValueError(f"optimizer: must be given all parameters that the server has; {left[0]} is missing")
        shapes = [p.shape for p in self._tensors]
        numels = [shape.numel() for shape in shapes]
        ends = np.cumsum(numels)
        self._starts = [int(end) - numel for end, numel in zip(ends, numels, strict=True)]
        served = route.lanes["server"]
        assert isinstance(served, QuantizedLane)
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
        settings = {key: self.param_groups[0][key] for key in ("lr", "betas", "eps", "weight_decay")}
        if self._inner is not None:
            self._inner.param_groups[0].update(settings)
            self._inner.step()
        lr = settings.pop("lr")
        self.owner.betas, self.owner.eps, self.owner.weight_decay = settings.values()
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

    def load_shard(self, state: dict[str, Tensor]) -> None:
        """Goes on where `shard_state` was taken.

        Raises:
            ValueError: it is the shard of another rank, or of another model or number of ranks.
        """
        mine, saved = torch.from_numpy(self._segments()), state.get("segments")
        if saved is not None and (saved.shape != mine.shape or bool((saved != mine).any())):
            raise ValueError(
                "comm.server: the saved shard is another rank's, or of another model or number of ranks; each rank "
                "loads the state that it has saved"
            )
        self.owner.load_state_dict(state)

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
    return [parameter for _, parameter in _named(route)]


def _named(route: ServerRoute) -> list[tuple[str, nn.Parameter]]:
    assert isinstance(route._model, DistributedDataParallel)
    return [(plain_name(name), parameter) for name, parameter in route._model.named_parameters()]
