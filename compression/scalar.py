"""int8 and int4 weights: symmetric codes times one scale an output channel (row) or a tensor.

Two ways to choose the scale. max: scale = max|w| / n, n = 127 or 7, and an element is off by at most scale / 2. mse:
the scale of the least squared error, for which large weights may be clipped; the solver is the one that quantizes a
parameter server's weights (`tenko.comm.laq`). Both keep zeros zero, so a pruned weight stays pruned.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from tenko.comm import laq

from .schemes import decode_binary, dequantize
from .technique import Packed

Granularity = Literal["channel", "tensor"]


class Quantizer(Protocol):
    """A scheme's way from a weight to its codes. Equal weights give equal codes: nothing is random or kept."""

    uses_importance: bool
    """Whether `importance` makes a difference."""

    def quantize(self, weight: Tensor, importance: Tensor | None = None) -> Packed:
        """The parts of a weight [rows, ...], on its device, without waiting for it.

        Args:
            weight: floating point; where it is not finite, so is what its row (or tensor) decodes to.
            importance: how much each element's squared error counts, of the same shape; None: all alike.
        """
        ...


def decode(packed: Packed) -> Tensor:
    """The fp32 weight that the parts of a scalar scheme stand for."""
    if packed.scheme == "binary":
        return decode_binary(packed.parts["codes"], packed.parts["levels"])
    return dequantize(packed.parts["codes"], packed.parts["scale"])


@dataclass(frozen=True)
class Linear:
    """int8 or int4.

    Args:
        bits: 8 or 4.
        granularity: of the scale.
        clip: how the scale is chosen, see above.
    """

    bits: int = 8
    granularity: Granularity = "channel"
    clip: Literal["max", "mse"] = "max"
    uses_importance = False

    def quantize(self, weight: Tensor, importance: Tensor | None = None) -> Packed:
        """Codes int8 [rows, ...] and scale fp32 [rows], or [1] for the tensor.

        A row of zeros has scale 0 and codes 0, and so has one whose scale would be subnormal (|w| < 1.5e-36), where
        division is no longer accurate; with mse one of |w| < 1e-30.
        """
        levels = 2 ** (self.bits - 1) - 1  # -128 and -8 stay unused: symmetric
        if self.clip == "mse":
            codes, scale = least_squares(weight, None, self.bits, self.granularity)
        else:
            rows_rc = as_rows(weight, self.granularity)
            scale = rows_rc.abs().amax(dim=1) / levels
            scale = torch.where(scale < torch.finfo(torch.float32).tiny, 0.0, scale)
            divisor = torch.where(scale == 0, torch.inf, scale).unsqueeze(1)
            codes = (rows_rc / divisor).round_().clamp_(-levels, levels).to(torch.int8).view(weight.shape)
        return Packed(f"int{self.bits}", {"codes": codes, "scale": scale})


def as_rows(weight: Tensor, granularity: Granularity) -> Tensor:
    """The weight in fp32 as [rows, columns], each row with a scale of its own: [1, elements] for `tensor`."""
    return weight.detach().float().reshape(weight.shape[0] if granularity == "channel" else 1, -1)


def least_squares(
    weight: Tensor, importance: Tensor | None, bits: int, granularity: Granularity
) -> tuple[Tensor, Tensor]:
    """Codes int8 in the weight's shape and scale fp32 [rows or 1] of the least sum importance * (scale * code - w)^2.

    Source: Hou & Kwok 2018, by way of `tenko.comm.laq`, which says what is searched.
    """
    rows_rc = as_rows(weight, granularity)
    d_rc = None if importance is None else as_rows(importance, granularity)
    if not weight.is_cuda and bool(torch.isfinite(rows_rc).all()):
        alpha, codes = laq.solve(rows_rc, d_rc, bits, block=rows_rc.shape[1])
    else:  # `solve` waits for the device, and refuses what is not finite: here it decodes to NaN
        alpha = laq.search(rows_rc, torch.ones_like(rows_rc) if d_rc is None else d_rc, bits, tolerance=0.0)
        codes = laq.nearest(rows_rc, alpha, bits).to(torch.int8)
    return codes.view(weight.shape), alpha / (2 ** (bits - 1) - 1)
