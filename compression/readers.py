"""Parametrizations that compute what modules read of a weight once, however many sites, micro-batches or steps read it.

The value is thrown away when the weight's version or storage changes, and by `forget`: the version alone is not enough,
since torch's fused AdamW and a parameter server's owners write weights without raising it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn


class Reader(nn.Module, ABC):
    """Parametrization, one instance for all sites of a weight. Subclasses say in `read` what modules get."""

    def __init__(self) -> None:
        super().__init__()
        # A plain attribute, no buffer, which DDP would broadcast and a checkpoint save.
        self._value: Tensor | None = None
        self._key: tuple[object, ...] | None = None

    @abstractmethod
    def read(self, stored: Tensor) -> Tensor:
        """What modules read of the stored weight now; called without gradients."""

    def cached(self, stored: Tensor) -> Tensor:
        """`read`, or what it gave last for the same weight in the same mode."""
        key = (stored.data_ptr(), stored._version, self.training)
        if self._value is None or self._key != key:
            # Autocast would round some sums of a quantizer to 16 bits, and the file would decode to something else.
            with torch.no_grad(), torch.autocast(stored.device.type, enabled=False):
                self._value = self.read(stored)
            self._key = key
        return self._value

    def forget(self) -> None:
        """Compute what modules read anew when it is read next."""
        self._value = self._key = None


class StraightThrough(torch.autograd.Function):
    """`StraightThrough.apply(stored, value)`: the value, with gradients straight to the stored weight.

    Not `stored + (value - stored).detach()`: that sum may miss the value by one ulp, and the baked model would differ
    from the trained one.
    """

    @staticmethod
    def forward(ctx: Any, stored: Tensor, value: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None
