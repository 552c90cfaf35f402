"""What every route has: a DDP communication hook, a wire meter and a state to save. And how one is put on a model."""

# No `from __future__ import annotations`: DDP compares the annotations of a hook with classes, not with their names.

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .meter import WireMeter
from .waits import Waits


class Route(ABC):
    """A way for gradients to become their mean over the ranks, by DDP's hook. `register` puts it on a model."""

    def __init__(self) -> None:
        self.meter = WireMeter()
        self.waits = Waits()
        """How long this rank waits for others: from the last bucket that it hands over until who runs backward says
        `waits.end()`, and in what the optimizer asks of other ranks."""
        self.step = 0
        """Exchanges of a whole gradient so far: part of the key of the stochastic rounding."""
        self.closed = False
        self._model: DistributedDataParallel | None = None
        self._index: dict[int, int] = {}
        self.group: dist.ProcessGroup | None = None
        self.rank = 0
        self.world_size = 1
        self.device = torch.device("cpu")

    def bind(self, model: DistributedDataParallel) -> None:
        """Learns the model's parameters and ranks. Called by `register`, on all ranks together."""
        self._model = model
        self._index = {id(parameter): i for i, (_, parameter) in enumerate(model.named_parameters())}
        self.group = model.process_group
        self.rank = dist.get_rank(self.group)
        self.world_size = dist.get_world_size(self.group)
        self.device = next(model.parameters()).device

    def hook(self, state: object, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        """DDP's hook: a future of the bucket's mean over the ranks. `state` is not used, the route is the state."""
        if self.closed:
            raise ValueError("hook: the route is closed; its model cannot be trained on")
        if self._model is None:
            raise ValueError("hook: the route is on no model yet; call tenko.comm.register(ddp_model, route)")
        step = self.step
        if bucket.is_last():
            self.step += 1
            self.meter.updates += 1
        buffer = bucket.buffer()
        if self.world_size == 1:
            done: torch.futures.Future[Tensor] = (
                torch.futures.Future(devices=[buffer.device]) if buffer.is_cuda else torch.futures.Future()
            )
            done.set_result(buffer)
            return done
        mean = self._exchange(buffer, bucket, step)
        if bucket.is_last():
            self.waits.begin(self.device)
        return mean

    @abstractmethod
    def _exchange(self, buffer: Tensor, bucket: dist.GradBucket, step: int) -> torch.futures.Future[Tensor]:
        """Starts turning `buffer` into its mean, in place."""

    def optimizer(
        self,
        parameters: Iterable[tuple[str, nn.Parameter]],
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
    ) -> torch.optim.Optimizer:
        """The optimizer that goes with the route: fused AdamW on every rank, unless owners of shards step."""
        trained = [parameter for _, parameter in parameters if parameter.requires_grad]
        return torch.optim.AdamW(trained, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=True)

    def total_norm(self, parameters: Iterable[nn.Parameter]) -> Tensor:
        """Norm of the whole gradient, the same on all ranks: fp32 []."""
        return torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])

    def state_dict(self) -> dict[str, Any]:
        """Plain figures; the process group is not in it. A rank's own: save it on every rank."""
        return {"step": self.step, "meter": self.meter.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where `state_dict` was taken. Raises ValueError when something is missing."""
        for key in ("step", "meter"):
            if key not in state:
                raise ValueError(f"comm.{key}: missing in the saved state; it has {', '.join(sorted(state))}")
        self.step = int(state["step"])
        self.meter.load_state_dict(state["meter"])

    def adopt(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Goes on from the states of another number of ranks, but for what was a rank's own: error feedback begins at
        zero, and shards of optimizer state are left to `reshard.adopt`.

        Args:
            states: of all ranks then, in order.
        """
        self.load_state_dict({**self._own(states), "feedback": None, "server": None})

    def _own(self, states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The state that this rank had; a new rank has sent nothing yet."""
        if self.rank < len(states):
            return dict(states[self.rank])
        return {**states[0], "meter": WireMeter().state_dict()}

    def close(self) -> None:
        """Ends what the route started. The model cannot be trained on afterwards."""
        # DDP holds the hook where Python's collector cannot see it: a circle that would keep both for ever.
        self._model = None
        self.closed = True


def register(model: torch.nn.Module, route: Route) -> Route:
    """Puts a route on a DDP model, on all of its ranks together, and returns the route.

    Args:
        model: a torch.nn.parallel.DistributedDataParallel that has no hook yet.
        route: a route that is on no model yet.

    Raises:
        ValueError: the model is not a DDP model, or has parameters that the route does not take; one of the two is
            taken; the route is closed.
    """
    if not isinstance(model, DistributedDataParallel):
        raise ValueError(
            f"model: register wants a torch.nn.parallel.DistributedDataParallel, this is a {type(model).__name__}"
        )
    if route.closed:
        raise ValueError("route: is closed; make a new one")
    if route._model is not None:
        raise ValueError("route: is on a model already; make one route a model")
    if getattr(model, "_comm_hooks", None):
        raise ValueError("model: has a communication hook already; DDP takes one for its lifetime")
    route.bind(model)
    model.register_comm_hook(None, route.hook)
    return route
