"""The figures of a line of metrics: sums that stay on the device, and what is made of them when they are read."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .config import TrainConfig


@dataclass
class Sums:
    """This rank's sums since the last line; on the device, so that nobody waits for it."""

    loss: Tensor
    """Summed over target tokens, in nats: [] fp32."""
    nll: Tensor
    """The same without label smoothing."""
    overflows: Tensor
    """Updates that were skipped."""
    norm: Tensor
    """Of the last gradient, before clipping."""
    seconds_before: float
    """Seconds of training at the last line."""
    tokens: int = 0
    """Target tokens, of all ranks."""

    @classmethod
    def begin(cls, device: torch.device, seconds: float) -> Sums:
        """All zero, at so many seconds of training."""
        loss, nll, overflows, norm = (torch.zeros((), device=device) for _ in range(4))
        return cls(loss, nll, overflows, norm, seconds)

    def state(self) -> list[Any]:
        """What a resumed run goes on with."""
        return [self.loss, self.nll, self.overflows, self.tokens, self.seconds_before]

    def take(self, state: list[Any]) -> None:
        """Go on with what `state` gave."""
        self.loss, self.nll, self.overflows = (saved.to(self.loss.device) for saved in state[:3])
        self.tokens, self.seconds_before = state[3:]


def train_line(
    sums: Sums, *, loss: float, nll: float, seconds: float, data: float, exchange: float, all_seconds: float
) -> dict[str, Any]:
    """The part of a line of metrics that is made of sums.

    Args:
        sums: this rank's.
        loss, nll: summed over all ranks.
        seconds: of training so far.
        data, exchange, all_seconds: of updates since the last line, summed over ranks; see shares.py.
    """
    tokens = max(sums.tokens, 1)
    nll /= tokens
    data, exchange = (part / max(all_seconds, 1e-9) for part in (data, exchange))
    return {
        "loss": loss / tokens,
        "nll": nll,
        "ppl": math.exp(min(nll, 100)) if math.isfinite(nll) else math.inf,
        "grad_norm": sums.norm.item(),
        "tokens_per_second": sums.tokens / max(seconds - sums.seconds_before, 1e-9),
        "seconds": seconds,
        # means over ranks
        "share_compute": 1 - data - exchange,
        "share_exchange": exchange,
        "share_data": data,
    }


MANY = 10
"""Skipped updates between two lines, or without a break, after which a training counts as diverged."""


def check_overflows(config: TrainConfig, update: int, overflows: int, scale: float | None, *, row: int) -> None:
    """Hold a training that has skipped updates.

    Args:
        config: of the training.
        update: the last one.
        overflows: skipped since the last line.
        scale: of the loss; None where it is not scaled.
        row: skipped in the last lines that tell of nothing but skipped updates, this one included.

    Raises:
        ValueError: it diverged.
    """
    if scale is not None:
        if scale < config.min_loss_scale:
            raise ValueError(
                f"train.min_loss_scale: the loss scale fell to {scale:g} at update {update}, "
                f"below {config.min_loss_scale:g}: gradients overflow again and again; lower train.lr or use "
                "precision: bf16 or fp32"
            )
    elif max(overflows, row) >= MANY or (overflows and overflows == config.log_interval > 1):
        skipped = max(overflows, row)
        raise ValueError(
            f"train.lr: training diverged, {skipped} of the last {max(config.log_interval, row)} updates to "
            f"{update} had a non-finite gradient; lower train.lr, or set train.clip_norm"
        )
