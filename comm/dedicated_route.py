"""A route whose gradients go to servers of their own, which make the whole update: no DDP, no hook.

The servers average the workers' gradients, clip their norm, step and send thin weights; so there is nothing left for
the training loop to do between backward and the next batch but to call `make_update`. Their state (full-precision
weights, Adam's moments) is fetched by the workers, a server's by one of them, and is part of what each saves: a
checkpoint is whole or not at all, and servers need no file system.
"""

# No `from __future__ import annotations`: see route.py.

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .config import CommConfig
from .dedicated import DedicatedServer
from .mpi_link import Link
from .route import Route

_FOR_EVER = 1e9
"""Seconds."""


class DedicatedRoute(Route):
    """Gradients to dedicated servers, weights back; one a training.

    Every worker's loss must be divided by the same number, such as the mean of the workers' target tokens: the servers
    take the plain mean of the gradients.

    Args:
        config: `servers: dedicated`.
        link: to the servers; they stay for the next training.
        seed: of the stochastic rounding.
        clip_norm: the servers scale the mean gradient down to it; 0 does not.
        worker_timeout: seconds that the other workers wait for one that pushes nothing; 0 for ever.
    """

    def __init__(
        self, config: CommConfig, link: Link, *, seed: int, clip_norm: float, worker_timeout: float = 0.0
    ) -> None:
        super().__init__()
        self._link = link
        self._server: DedicatedServer | None = None
        self._settings: dict[str, Any] = {
            "bits": config.bits,
            "clip": config.clip,
            "block": config.block,
            "error_feedback": config.error_feedback,
            "weight_bits": config.weight_bits,
            "staleness": config.staleness,
            "clip_norm": clip_norm,
            "seed": seed,
            "worker_timeout": worker_timeout or _FOR_EVER,
        }
        self.staleness = config.staleness
        self.rank, self.world_size = link.workers.index(link.rank), len(link.workers)

    def bind(self, model: DistributedDataParallel) -> None:
        raise ValueError("route: dedicated servers take the place of DDP; call optimizer() and make_update()")

    def _exchange(self, buffer: Tensor, bucket: dist.GradBucket, step: int) -> torch.futures.Future[Tensor]:
        raise AssertionError("there is no hook")

    @property
    def _optimizer(self) -> DedicatedServer:
        assert self._server is not None, "optimizer() comes first"
        return self._server

    def optimizer(
        self,
        parameters: Iterable[tuple[str, nn.Parameter]],
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
    ) -> torch.optim.Optimizer:
        """What speaks to the servers; from now on the parameters hold quantized weights. Call `make_update`, not its
        `step`."""
        if self._server is not None:
            raise ValueError("optimizer: this route has one already")
        named = list(parameters)
        self.device = named[0][1].device
        adam = {"betas": tuple(betas), "eps": eps, "weight_decay": weight_decay}
        self._server = _Remote(named, comm=self._link, lr=lr, **adam, **self._settings)
        self.meter = self._server.meter
        return self._server

    def total_norm(self, parameters: Iterable[nn.Parameter]) -> Tensor:
        raise AssertionError("the servers take norms; make_update returns them")

    def make_update(self, scaler: torch.amp.GradScaler) -> tuple[Tensor, Tensor]:
        """Pushes the gradients and waits for the new weights. The scaler is stepped, too.

        Args:
            scaler: of the loss; may be disabled.

        Returns:
            Norm of the mean gradient before clipping, and 1.0 if the update was skipped, else 0.0.

        Raises:
            Silence: a server is not there any more; the message names it.
        """
        optimizer = self._optimizer
        with self.waits.around(self.device):
            if scaler.is_enabled():
                self._share_overflow(
                    [p.grad for g in optimizer.param_groups for p in g["params"] if p.grad is not None]
                )
                scaler.unscale_(optimizer)
            applied = optimizer.step()
        if scaler.is_enabled():
            scaler.update()
        self.step += 1
        norm = optimizer.norm if applied else torch.nan
        return torch.tensor(norm, device=self.device), torch.tensor(float(not applied), device=self.device)

    def _share_overflow(self, gradients: Sequence[Tensor]) -> None:
        """Has every worker's loss scaler see that some worker's gradient is not finite: their scales stay equal."""
        if self.world_size == 1 or self.staleness:
            return
        overflow = (~torch.isfinite(torch.nn.utils.get_total_norm(list(gradients)))).float()
        dist.all_reduce(overflow)
        if overflow.item() and gradients:
            gradients[0].fill_(torch.nan)

    def settle(self) -> None:
        """Gives all workers the same weights after as many updates, where they are not synchronous."""
        if self.staleness and self.world_size > 1:
            dist.barrier()  # all have pushed
            self._optimizer.pull()
            dist.barrier()  # nobody has pushed again

    # State

    def state_dict(self) -> dict[str, Any]:
        """This worker's own, and the states of the servers that it keeps; all workers together."""
        self.settle()
        return {"step": self.step, **self._optimizer.fetch()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where `state_dict` was taken; all workers together."""
        super().load_state_dict(state)
        self._optimizer.put(state)

    def adopt(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Goes on from the states of another number of workers, by as many servers."""
        kept = {index: saved for state in states for index, saved in (state.get("servers") or {}).items()}
        mine = {index: saved for index, saved in kept.items() if int(index) % self.world_size == self.rank}
        self.load_state_dict({**self._own(states), "feedback": None, "servers": mine})

    def close(self) -> None:
        super().close()
        if self._server is not None:
            self._server.close()


class _Remote(DedicatedServer):
    """What a training loop saves of this is what all workers have in common; the rest is the route's."""

    def state_dict(self) -> dict[str, Any]:
        return {"lr": float(self.param_groups[0]["lr"])}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.param_groups[0]["lr"] = float(state_dict["lr"])
