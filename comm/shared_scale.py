"""Codes that can be added: all ranks round to the same scales, so the owner's sum is one of integers, without an error.

Before a part goes up, the ranks agree on its scales: `scales` of every rank, merged by `merge`. The codes go up without
scales; the owner adds them. On the way down the sums travel as they are where the bits hold them (2 * n * k + 1 values
of n ranks and k levels a side); else the mean is quantized once more, with scales of its own, which it then also
carries.

The largest scale of n ranks clips nothing, and is what ranks take that do not clip (c = 0). It is coarse: gradients
that differ by chance alone have 1.1 to 1.35 times the error of codes under each rank's own scale (n = 2 to 16), those
that differ in magnitude several times. With c > 0 the scale is therefore the fourth root of the ranks' mean fourth
power: 1.02 to 1.04 times (Gaussian blocks of 128, c = 3, 3 and 4 bits). It clips a rank whose magnitudes are above the
others', at c/n^(1/4) of its standard deviations at worst, which error feedback mends. (The mean square would be better
still among equals, and clips more.) Blocks that are all zero on a rank do not count.

Source of the idea: THC (Li et al., NSDI 2024) and TernGrad (Wen et al., NeurIPS 2017); written from their descriptions.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from . import cpu, reference
from .layout import SCALE_BYTES, Shard
from .quantizer import Quantizer, arithmetic


@dataclass(frozen=True)
class SharedScale:
    """Both legs of an exchange under scales that the ranks share.

    Args:
        up: its bits (2 to 8), clip, block, rounding and sigma are those of the codes.
        down: its bits say how sums go down; the rest of it counts where they do not fit.
        world_size: ranks whose codes are added.

    Raises:
        ValueError: a setting is none of these.
    """

    up: Quantizer
    down: Quantizer
    world_size: int

    def __post_init__(self) -> None:
        if self.up.bits < 2:
            raise ValueError(f"bits: must be 2 to 8 with a shared scale, is {self.up.bits}")
        if self.up.block != self.down.block:
            raise ValueError(f"block: must be the same up and down, is {self.up.block} and {self.down.block}")
        if not 1 <= self.world_size * self.up.levels < 1 << 15:
            most = ((1 << 15) - 1) // self.up.levels
            raise ValueError(f"world_size: must be 1 to {most} at {self.up.bits} bits, is {self.world_size}")

    @property
    def levels(self) -> int:
        """Largest magnitude of a sum."""
        return self.world_size * self.up.levels

    @property
    def exact(self) -> bool:
        """Whether sums go down as they are."""
        return 2 * self.levels + 1 <= 1 << self.down.bits

    def scale_size(self, part: Shard) -> int:
        """Bytes of a part's scales."""
        return part.spans * SCALE_BYTES

    def up_size(self, part: Shard) -> int:
        """Bytes of a part's codes on the way up."""
        return part.groups * self.up.bits

    def down_size(self, part: Shard) -> int:
        """Bytes of a part's sums on the way down."""
        return part.groups * self.down.bits if self.exact else part.size(self.down.bits)

    def sums(self, part: Shard, device: torch.device | str = "cpu") -> Tensor:
        """Room for a part's sums: int16 [8 * groups]."""
        return torch.empty(8 * part.groups, dtype=torch.int16, device=device)

    def scales(self, x: Tensor, part: Shard, out: Tensor, residual: Tensor | None = None) -> None:
        """Writes the scales that this rank would take for x (plus residual) into out, uint8 [scale_size(part) or more].

        Args:
            x: flat, floating point; the part says where in it the segments are.
            part: whole spans of tensors.
            out: see above.
            residual: fp32, laid out as x; only read.
        """
        assert out.numel() >= self.scale_size(part), out.shape
        self.up.encode_bits(0, x, part, np.zeros((len(part.table), 2), dtype=np.uint32), out, residual=residual)

    def merge(self, stacked: Tensor) -> Tensor:
        """The ranks' scales uint8 [ranks, spans * 9] as one: uint8 [spans * 9]. Every machine finds the same."""
        return merge_scales(stacked, largest=self.up.clip == 0)

    def encode(
        self, x: Tensor, part: Shard, keys: np.ndarray, scales: Tensor, out: Tensor, residual: Tensor | None = None
    ) -> None:
        """Codes of x (plus residual) under given scales; what is beyond them is clipped.

        Args:
            x, part, residual: as in `scales`; residual is left holding what the codes miss, NaN where a scale is NaN.
            keys: a key a segment, as in `Quantizer.encode_shard`.
            scales: uint8 [scale_size(part)], merged.
            out: uint8 [up_size(part) or more].
        """
        assert scales.numel() == self.scale_size(part), scales.shape
        assert out.numel() >= self.up_size(part), out.shape
        self.up.encode_bits(self.up.bits, x, part, keys, out, residual=residual, given=scales)

    def add(self, payload: Tensor, part: Shard, sums: Tensor, *, first: bool) -> None:
        """Adds a rank's codes to the owner's sums; the first of them overwrites what is there."""
        assert payload.numel() >= self.up_size(part), payload.shape
        assert sums.numel() == 8 * part.groups, sums.shape
        add_codes = cpu.add_codes if sums.device.type == "cpu" else reference.add_codes
        add_codes(payload, part.table, sums, self.up.span, self.up.bits, first)

    def encode_sums(self, sums: Tensor, part: Shard, scales: Tensor, keys: np.ndarray, out: Tensor) -> None:
        """The sums of all ranks' codes, for the way down.

        Args:
            sums, part, scales: as above.
            keys: a key a segment, for the rounding where sums do not fit.
            out: uint8 [down_size(part) or more].
        """
        assert out.numel() >= self.down_size(part), out.shape
        on_cpu = sums.device.type == "cpu"
        if self.exact:
            pack = cpu.pack_sums if on_cpu else reference.pack_sums
            pack(sums, part.table, out, self.up.span, self.down.bits, self.levels)
            return
        values = torch.empty(part.numel, dtype=torch.float32, device=sums.device)
        compact = part.compact()
        convert = cpu.sums_to_values if on_cpu else reference.sums_to_values
        convert(sums, scales, compact.table, values, self.up.span, self.levels)
        self.down.encode_shard(values, compact, keys, out)

    def decode_sums(self, payload: Tensor, part: Shard, scales: Tensor, out: Tensor) -> None:
        """Writes the mean over the ranks into the part's elements of out [fp32, flat]."""
        assert payload.numel() >= self.down_size(part), payload.shape
        if self.exact:
            _, decode = arithmetic(out.device.type, self.up.block)
            table, bits = part.table, self.down.bits
            decode(payload, table, out, self.up.span, bits, 1.0, False, given=scales, levels=self.levels)
        else:
            self.down.decode_shard(payload, part, out)


POWERS = np.floor(2.0 ** (46 - np.arange(256) / 2)).astype(np.int64)
"""Fourth powers of 2^(-d/8), in integers: every machine finds the same mean."""
QUARTER_OCTAVE_DOWN = 861
"""2^(-1/4), in 1024ths."""


def merge_scales(stacked: Tensor, *, largest: bool) -> Tensor:
    """One scale a block for all ranks.

    Args:
        stacked: uint8 [ranks, spans * 9], what `SharedScale.scales` wrote.
        largest: of every block the largest; else the fourth root of the mean fourth power over the ranks whose block is
            not all zero, to the nearest eighth of an octave (the ranks' are rounded up already).

    Returns:
        uint8 [spans * 9]. A span that is not finite on one rank is NaN. Scales below 2^-31.75 of the span's largest are
        rounded up to that.
    """
    heads = stacked.view(stacked.shape[0], -1, SCALE_BYTES).to(torch.int64)
    exponent, q = heads[:, :, :1], heads[:, :, 1:]
    exponents = exponent.amax(dim=0)
    zero = q == 255
    q = torch.where(zero, 1 << 16, q + 8 * (exponents - exponent))
    lowest = q.amin(dim=0)
    merged = lowest
    if not largest:
        powers = torch.from_numpy(POWERS).to(q.device)
        total = torch.where(zero, 0, powers[(q - lowest).clamp(max=255)]).sum(dim=0)
        count = (~zero).sum(dim=0).clamp(min=1)
        mean = total // count * QUARTER_OCTAVE_DOWN >> 10  # rounding up, then, is to the nearest
        merged = lowest + 255 - torch.searchsorted(powers.flip(0), mean)
    merged = torch.where(zero.all(dim=0) | (exponents == 255), 255, merged.clamp(max=254))
    return torch.cat([exponents, merged], dim=1).to(torch.uint8).flatten()
