"""fairseq's inverse-square-root learning rate, as a function of the updates done."""

from __future__ import annotations

from .config import TrainConfig


def learning_rate(config: TrainConfig, updates_done: int) -> float:
    """Rate for the next update: linear warm-up, then `lr * sqrt(warmup_updates / updates_done)`.

    Source: fairseq's `inverse_sqrt` scheduler, after Vaswani et al. 2017, equation 3.
    """
    warmup = config.warmup_updates
    if updates_done < warmup:
        return config.warmup_init_lr + updates_done * (config.lr - config.warmup_init_lr) / warmup
    return float(config.lr * (max(warmup, 1) / max(updates_done, 1)) ** 0.5)
