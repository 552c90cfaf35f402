"""From a loss to new weights: by an optimizer of this rank, a route's, servers of their own, or DeepSpeed.

What is notable: an update whose gradient is not finite is skipped on the device, by the fused optimizer, without
waiting for it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tenko.comm import DedicatedRoute

from . import precision
from .config import TrainConfig

if TYPE_CHECKING:
    from tenko.comm import Route

    from .deepspeed_engine import ZeroEngine

Wrap = Callable[[nn.Module], tuple[nn.Module, "Route | None"]]
"""Puts `ModelWithLoss` into DDP and gives the route it registered; a single process keeps the module, without one."""
EngineOf = Callable[[nn.Module, torch.optim.Optimizer, str], "ZeroEngine"]
"""Puts `ModelWithLoss` and the optimizer into DeepSpeed; it is given the resolved precision as well."""


class Optimization:
    """The optimizer of one training, with what stands between it and the loss.

    Args:
        module: model and loss, on the device.
        parameters: of the model, those that are trained, by name.
        config: the recipe's settings.
        wrap: see `Wrap`.
        engine: takes the place of `wrap`.
    """

    optimizer: torch.optim.Optimizer

    def __init__(
        self,
        module: nn.Module,
        parameters: dict[str, nn.Parameter],
        config: TrainConfig,
        *,
        wrap: Wrap,
        engine: EngineOf | None = None,
    ) -> None:
        self.parameters, self.config = parameters, config
        device = next(iter(parameters.values())).device
        self.precision = precision.resolve(config.precision, device)
        self.scaler = precision.loss_scaler(
            self.precision, device, init_scale=config.init_scale, scale_window=config.scale_window
        )
        self.wrapped, self.route = (module, None) if engine else wrap(module)
        self.dedicated = self.route if isinstance(self.route, DedicatedRoute) else None
        """Where servers of their own make the whole update."""
        settings: dict[str, Any] = {
            "lr": config.lr,
            "betas": config.adam_betas,
            "eps": config.adam_eps,
            "weight_decay": config.weight_decay,
        }
        if self.route is not None:  # a parameter server's owners step their shards
            self.optimizer = self.route.optimizer(parameters.items(), **settings)
        else:
            self.optimizer = torch.optim.AdamW(parameters.values(), fused=True, **settings)
        self.engine = None
        if engine is not None:
            self.engine = engine(module, self.optimizer, self.precision)
            self.wrapped = self.engine.wrapped

    def synchronise_if(self, last: bool) -> contextlib.AbstractContextManager[Any]:
        """Around a micro-batch: gradients are exchanged behind the last one of an update only."""
        no_sync = getattr(self.wrapped, "no_sync", None)
        if last or no_sync is None or self.engine is not None:
            return contextlib.nullcontext()
        return no_sync()

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradients of a micro-batch.

        Args:
            loss: its share of the update's loss: [].
            last: of the update.
        """
        if self.engine is not None:
            self.engine.backward(loss, last=last)
        else:
            self.scaler.scale(loss).backward()

    def step(self) -> tuple[Tensor, Tensor]:
        """One step of the optimizer; gradients are gone after it.

        Returns:
            The gradient's norm before clipping, and 1 where the update was skipped for a gradient that is not finite,
            else 0; both [] fp32 on the device.
        """
        if self.engine is not None:
            return self.engine.step()
        if self.dedicated is not None:
            made = self.dedicated.make_update(self.scaler)
            self.optimizer.zero_grad(set_to_none=True)
            return made
        self.scaler.unscale_(self.optimizer)
        if self.route is not None:
            norm = self.route.total_norm(self.parameters.values())
        else:
            norm = torch.nn.utils.get_total_norm([p.grad for p in self.parameters.values() if p.grad is not None])
        if self.config.clip_norm > 0:
            torch.nn.utils.clip_grads_with_norm_(self.parameters.values(), self.config.clip_norm, norm)
        overflow = (~torch.isfinite(norm)).float()
        if not self.scaler.is_enabled():
            # The fused optimizer leaves weights and moments alone when this is 1: a skipped step without a wait. (A
            # server's optimizer looks at it.)
            self.optimizer.found_inf = overflow  # type: ignore[attr-defined]
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return norm, overflow
