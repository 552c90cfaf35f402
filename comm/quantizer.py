"""SQ_m with a clip and a scale a block: the one quantizer of both legs. What it computes is told in
`reference.py`.

CPU tensors go through the numba kernels, on torch.get_num_threads() threads where a call is large enough; CUDA tensors
through Triton's where it is installed; others through torch operations of the same arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from . import cpu, reference
from .config import default_block
from .layout import Shard, single

BITS = (1, 2, 3, 4, 5, 6, 7, 8)
ROUNDINGS = ("stochastic", "nearest")
SIGMAS = ("block", "row", "tensor")


@lru_cache
def arithmetic(device: str, block: int) -> tuple[Callable[..., None], Callable[..., None]]:
    """What encodes and decodes tables on a type of device."""
    if device == "cpu":
        return cpu.encode, cpu.decode
    if device == "cuda" and find_spec("triton") is not None:
        from . import triton_kernels

        if block <= triton_kernels.MAX_BLOCK:
            return triton_kernels.encode_table, triton_kernels.decode_table
    return reference.encode_table, reference.decode_table


@dataclass(frozen=True)
class Quantizer:
    """Turns tensors into `bits`-bit codes and back.

    Args:
        bits: bits an element, 1 to 8. 1 is the sign, scaled by the mean magnitude of its block: biased, so it needs
            error feedback. 2 is ternary.
        clip: magnitudes are clipped to this many standard deviations; 0 does not clip. 1 bit has no clip.
        block: elements that share a scale, a multiple of 8; 0 takes 128, or more at few bits.
        rounding: "stochastic" is unbiased, "nearest" has the smaller error, and a bias that error feedback mends.
        sigma: what the standard deviation is of: "block", "row" (of the tensor, the one that the block begins in;
            a vector counts as one row) or "tensor". Of a row or a tensor, the part that is in the same call counts.

    Raises:
        ValueError: a setting is none of these.

    Source: Hou, Zhang & Kwok, "Analysis of Quantized Models", ICLR 2019.
    """

    bits: int = 3
    clip: float = 3.0
    block: int = 0
    rounding: Literal["stochastic", "nearest"] = "stochastic"
    sigma: Literal["block", "row", "tensor"] = "block"

    def __post_init__(self) -> None:
        if not isinstance(self.bits, int) or self.bits not in BITS:
            raise ValueError(f"bits: must be 1 to 8, is {self.bits}")
        if not 0 <= self.clip < float("inf"):
            raise ValueError(f"clip: must be finite and at least 0 (0: no clip), is {self.clip}")
        if self.block < 0 or self.block % 8:
            raise ValueError(f"block: must be a multiple of 8, or 0 for the default, is {self.block}")
        if self.rounding not in ROUNDINGS:
            raise ValueError(f"rounding: must be one of {', '.join(ROUNDINGS)}, is {self.rounding}")
        if self.sigma not in SIGMAS:
            raise ValueError(f"sigma: must be one of {', '.join(SIGMAS)}, is {self.sigma}")
        if self.block == 0:
            object.__setattr__(self, "block", default_block(self.bits))

    @property
    def span(self) -> int:
        """Elements of 8 blocks, the unit that tensors are cut into; the last one of a tensor is shorter."""
        return 8 * self.block

    @property
    def levels(self) -> int:
        """Levels on one side of zero."""
        return reference.level_count(self.bits)

    def size(self, numel: int) -> int:
        """Bytes of the payload of a tensor of `numel` elements."""
        return single(numel, self.span).size(self.bits)

    def encode(self, x: Tensor, key: Sequence[int] = (0,)) -> Tensor:
        """Quantizes one tensor.

        Args:
            x: [numel] or any shape (read as flat), floating point.
            key: integers that choose the rounding's randomness; the same key and values give the same codes.

        Returns:
            uint8 [size(numel)] on x's device.
        """
        if not key or not x.is_floating_point():
            raise ValueError(f"encode: wants a floating tensor and a key of integers, has {x.dtype} and {key}")
        flat = x.detach().reshape(-1)
        part = single(flat.numel(), self.span)
        out = torch.empty(part.size(self.bits), dtype=torch.uint8, device=x.device)
        keys = np.repeat(reference.key_words(key[:-1], key[-1:]), len(part.table), axis=0)
        self.encode_shard(flat, part, keys, out)
        return out

    def decode(self, payload: Tensor, numel: int) -> Tensor:
        """Values of a payload: fp32 [numel]."""
        out = torch.empty(numel, dtype=torch.float32, device=payload.device)
        self.decode_shard(payload, self._checked(payload, numel), out)
        return out

    def decode_add(self, payload: Tensor, out: Tensor, factor: float = 1.0) -> Tensor:
        """Adds `factor` times a payload's values to out [numel, fp32, contiguous], and returns out."""
        self.decode_shard(payload, self._checked(payload, out.numel()), out.view(-1), factor=factor, add=True)
        return out

    def encode_shard(self, x: Tensor, part: Shard, keys: np.ndarray, out: Tensor) -> None:
        """Quantizes the part's elements of x with a key a segment (uint32 [segments, 2]) into out.

        Args:
            x: flat, floating point; the part's table says where in it the segments are.
            part: whole spans of tensors.
            keys: of `reference.key_words`.
            out: uint8 [part's bytes or more].
        """
        assert out.numel() >= part.size(self.bits), out.shape
        self.encode_bits(self.bits, x, part, keys, out)

    def encode_feedback(self, x: Tensor, residual: Tensor, part: Shard, keys: np.ndarray, out: Tensor) -> None:
        """As `encode_shard`, of v = x + residual; leaves v - decoded(v) in residual, in one pass over memory.

        Args:
            x, part, keys, out: as there; x is only read.
            residual: fp32, laid out as x. Elements that are not of the part keep their values. Where a span of v is not
                finite the residual becomes NaN: the caller clears it.
        """
        assert residual.dtype == torch.float32, residual.dtype
        assert residual.is_contiguous(), residual.stride()
        assert residual.numel() == x.numel(), (residual.shape, x.shape)
        assert out.numel() >= part.size(self.bits), out.shape
        self.encode_bits(self.bits, x, part, keys, out, residual=residual.view(-1))

    def encode_bits(
        self,
        bits: int,
        x: Tensor,
        part: Shard,
        keys: np.ndarray,
        out: Tensor,
        *,
        residual: Tensor | None = None,
        given: Tensor | None = None,
    ) -> None:
        """All encoding: scales alone with 0 bits, codes alone where scales are given (for `shared_scale.py`)."""
        assert x.numel() >= part.numel, x.shape
        assert keys.shape == (len(part.table), 2), keys.shape
        encode, _ = arithmetic(x.device.type, self.block)
        x = x.contiguous().view(-1)
        if encode in (cpu.encode, reference.encode_table):
            x = x.to(torch.float32)
        limits = None
        if self.sigma != "block" and self.clip > 0 and bits != 1 and given is None:
            limits = reference.limits(x.float(), part, self.span, self.clip, self.sigma == "row", residual)
        nearest = self.rounding == "nearest"
        encode(
            x,
            part.table,
            keys,
            out,
            self.span,
            bits,
            self.clip,
            nearest=nearest,
            limits=limits,
            residual=residual,
            given=given,
        )

    def decode_shard(
        self, payload: Tensor, part: Shard, out: Tensor, *, factor: float = 1.0, add: bool = False
    ) -> None:
        """Writes or adds the payload's values times `factor` into out [part's elements, fp32]."""
        assert out.numel() >= part.numel, out.shape
        assert payload.numel() >= part.size(self.bits), payload.shape
        assert out.dtype == torch.float32, out.dtype
        _, decode = arithmetic(out.device.type, self.block)
        decode(payload, part.table, out, self.span, self.bits, factor, add)

    def _checked(self, payload: Tensor, numel: int) -> Shard:
        part = single(numel, self.span)
        if payload.dtype != torch.uint8 or payload.numel() != part.size(self.bits):
            raise ValueError(
                f"payload: {payload.numel()} x {payload.dtype}, but {numel} elements at {self.bits} bits "
                f"make {part.size(self.bits)} x torch.uint8"
            )
        return part
