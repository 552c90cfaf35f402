"""int8 weights: symmetric, one scale per output channel (row).

scale = max|row| / 127, codes = round(row / scale), so an element is off by at most scale / 2. While attached, modules
read the dequantized weight and the gradient passes straight through to the stored one. The same two functions serve
training, baking and the file, so that all three agree to the bit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .config import QuantizeConfig
from .technique import Packed, Weight, parametrize_weight, select_weights, unparametrize_weight

LEVELS = 127  # -128 stays unused: symmetric


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric int8 codes with one scale a row.

    Args:
        weight: [rows, ...], floating point, finite.

    Returns:
        codes, int8 [rows, ...], in -127 to 127; scale, fp32 [rows]. A row of zeros has scale 0 and codes 0, and so has
        one whose scale would be subnormal (|w| < 1.5e-36), where division is no longer accurate.
    """
    values = weight.detach().float()
    scale = values.reshape(values.shape[0], -1).abs().amax(dim=1) / LEVELS
    scale = torch.where(scale < torch.finfo(torch.float32).tiny, 0.0, scale)
    divisor = _per_row(torch.where(scale == 0, torch.inf, scale), values)
    codes = torch.clamp(torch.round(values / divisor), -LEVELS, LEVELS).to(torch.int8)
    return codes, scale


def dequantize_rows(codes: Tensor, scale: Tensor) -> Tensor:
    """The fp32 tensor [rows, ...] of int8 codes [rows, ...] and fp32 scales [rows]."""
    return codes.float() * _per_row(scale, codes)


class Int8PerChannel:
    """The technique of `QuantizeConfig` with scheme int8.

    Attached and then trained it is quantization-aware training; attached and baked at once, post-training quantization.
    """

    name = "int8"

    def __init__(self, config: QuantizeConfig) -> None:
        self.config = config
        self._attached: list[Weight] = []
        self._packed: dict[str, Packed] = {}

    def attach(self, model: nn.Module) -> None:
        assert not self._attached, "attached already"
        self._attached = select_weights(model, self.config.include, self.config.exclude)
        for weight in self._attached:
            parametrize_weight(weight, FakeInt8())

    def before_update(self, update: int) -> None:
        """Nothing: every forward quantizes all matched weights."""

    def after_update(self, update: int) -> None:
        """Nothing: scales follow the weights."""

    @torch.no_grad()
    def bake(self, model: nn.Module) -> None:
        """Leave dense dequantized weights.

        Raises:
            ValueError: a weight holds an inf or a NaN, which no scale covers; the model stays attached.
        """
        assert self._attached, "bake follows attach"
        for weight in self._attached:
            if not bool(torch.isfinite(weight.tensor).all()):
                raise ValueError(f"{weight.name}: holds inf or NaN and can't be quantized")
            assert weight.tensor.dtype == torch.float32, f"{weight.name} is {weight.tensor.dtype}; bake fp32 weights"
        for weight in self._attached:
            codes, scale = quantize_rows(weight.tensor)
            unparametrize_weight(weight)
            weight.tensor.copy_(dequantize_rows(codes, scale))
            packed = Packed("int8", {"codes": codes, "scale": scale})
            self._packed |= dict.fromkeys(weight.names, packed)
        self._attached = []

    def pack(self, name: str) -> Packed | None:
        assert not self._attached, "pack follows bake"
        return self._packed.get(name)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing: scales follow the weights."""


class FakeInt8(nn.Module):
    """Parametrization: the weight as int8 would give it back, gradients straight through."""

    def forward(self, weight: Tensor) -> Tensor:
        return _StraightThrough.apply(weight)


class _StraightThrough(torch.autograd.Function):
    # Not `w + (q - w).detach()`: that sum may miss q by one ulp, and the baked model would differ from the trained one.
    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        return dequantize_rows(*quantize_rows(weight)).to(weight.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


def _per_row(scale: Tensor, like: Tensor) -> Tensor:
    return scale.reshape(-1, *[1] * (like.dim() - 1))  # [rows, 1, ...]
