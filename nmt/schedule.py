"""The learning rate, as a function of the updates done."""

from __future__ import annotations

from .config import TrainConfig


def learning_rate(config: TrainConfig, updates_done: int) -> float:
    """Rate for the next update: linear warm-up to `lr`, then what `lr_schedule` says.

    inverse_sqrt: `lr * sqrt(warmup_updates / updates_done)`. linear: in a straight line to 0 at `max_update`.

    Source: fairseq's `inverse_sqrt` scheduler, after Vaswani et al. 2017, equation 3, and its `polynomial_decay`, of
    power 1.
    """
    warmup = config.warmup_updates
    if updates_done < warmup:
        return config.warmup_init_lr + updates_done * (config.lr - config.warmup_init_lr) / warmup
    if config.lr_schedule == "linear":
        left = max(config.max_update - updates_done, 0)
        return config.lr * left / max(config.max_update - warmup, 1)
    return float(config.lr * (max(warmup, 1) / max(updates_done, 1)) ** 0.5)
