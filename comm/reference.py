"""The quantizer's arithmetic in plain torch: what `kernels.py` is held to, and what runs on devices other than a
CPU.

SQ_m, stochastic linear quantization (Hou, Zhang & Kwok, "Analysis of Quantized Models", ICLR 2019; written from
the description, the paper was not at hand): k = 2^(m-1) - 1 levels a side, level r stands for r/k * scale, and
a value between two levels goes to the upper one with the fractional probability. One scale a block: min(max
|x|, c * sigma), the clip of the same paper at c > 0, a plain maximum at c = 0.

Choices of our own, beside the paper's:
- sigma = sqrt(sum x^2 / number of elements that are not zero). The gradient of an embedding is zero in the rows
  of words that a batch lacks; counting those would shrink sigma, and the clip would eat the gradient of the
  rare words.
- A value is first rounded to a grid of 2^-16 of a level (2^-13 at 8 bits, so that the error of fp32 at the
  127th level is below the grid's), then stochastically, in integers, with 16 random bits. So the rounding is
  unbiased to half a grid step, zeros stay exactly zero, and values on a level stay there.
- A block that holds an inf or a NaN gets the scale NaN and decodes to NaN throughout. A block whose scale is
  under 1e-30 is sent as zeros.
- A 32-bit hash of (key, block, position) serves two elements, half a block apart.

A block's bytes: the fp32 scale, then the codes (r + k) in groups of 8. A block of g groups is read as 8 runs of
g elements; group i is the i-th element of every run, 8*m bits, and lies in m planes of g bytes (bits 0-7 of
every group, then 8-15, ...). So every step of packing is elementwise over contiguous runs, which is what vector
units want.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

HASH_A = 0x7FEB352D
HASH_B = 0x846CA68B
MIN_SCALE = 1e-30
"""Smaller scales are sent as zero: the inverse would leave fp32."""
MIN_PLAIN, MAX_PLAIN = 1e-15, 1e15
"""Between these magnitudes a block's sum of squares is safe in fp32."""

_WORD = 0xFFFFFFFF


def level_count(bits: int) -> int:
    """Levels on one side of zero: 1, 3, 7, 127 for 2, 3, 4, 8 bits."""
    return (1 << (bits - 1)) - 1


def grid_of(bits: int) -> int:
    """Grid that values are rounded to before the stochastic rounding, in 2^-16 of a level."""
    return 8 if bits == 8 else 1


def key_words(prefix: Sequence[int], last: Sequence[int] | np.ndarray) -> np.ndarray:
    """Hashes keys (*prefix, l) for every l of `last`: uint32 [len(last), 2] (splitmix64, absorbed part by part)."""
    state = np.full(len(last), 0x9E3779B97F4A7C15, dtype=np.uint64)
    for part in (*([p] for p in prefix), last):
        word = np.array([int(p) & 0xFFFFFFFFFFFFFFFF for p in part], dtype=np.uint64)
        z = (state ^ word) + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state = z ^ (z >> np.uint64(31))
    return np.stack([state & np.uint64(_WORD), state >> np.uint64(32)], axis=1).astype(np.uint32)


def _hash(counter: Tensor, key0: int, key1: int) -> Tensor:
    """32 random bits for every counter, in int64 (a product's low 32 bits survive its overflow)."""
    h = (counter & _WORD) ^ key0
    h = h ^ (h >> 16)
    h = (h * HASH_A) & _WORD
    h = h ^ (h >> 15) ^ key1
    h = (h * HASH_B) & _WORD
    return h ^ (h >> 16)


def scales(x: Tensor, clip: float) -> Tensor:
    """Scale of every row of x [blocks, elements]: fp32 [blocks], NaN where a row has an inf or a NaN."""
    wide = x.double()
    largest = wide.abs().amax(dim=1)
    scale = largest
    if clip > 0:
        count = (wide != 0).sum(dim=1).clamp(min=1)
        scale = torch.minimum(largest, clip * (wide.square().sum(dim=1) / count).sqrt())
    scale = torch.where(scale < MIN_SCALE, torch.zeros_like(scale), scale)
    return torch.where(torch.isfinite(largest), scale, torch.full_like(scale, torch.nan)).float()


def _round(x: Tensor, scale: Tensor, bits: int, first_block: int, block: int, key: tuple[int, int]) -> Tensor:
    """Codes r + k of x [blocks, padded elements] under given scales [blocks]: int64, same shape."""
    k, grid = level_count(bits), grid_of(bits)
    rows, half = x.shape[0], x.shape[1] // 2
    counter = (torch.arange(first_block, first_block + rows, device=x.device) * (block // 2)).unsqueeze(1)
    hashed = _hash(counter + torch.arange(half, device=x.device), *key)
    random = torch.cat([hashed & 0xFFFF, hashed >> 16], dim=1)
    limit = float(k << 16)
    sendable = (scale > 0).unsqueeze(1)  # False for NaN
    inverse = limit / torch.where(scale > 0, scale, torch.ones_like(scale))
    y = torch.where(sendable, x, torch.zeros_like(x)) * inverse.unsqueeze(1)
    fixed = (y.clamp(-limit, limit) + (limit + 0.5 * grid)).to(torch.int64) & -grid
    return torch.where(sendable, (fixed + random) >> 16, k)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Packs codes [blocks, 8 * groups] into bytes [blocks, bits * groups]."""
    rows = codes.shape[0]
    runs = codes.to(torch.int64).view(rows, 8, -1)
    weights = torch.arange(8, device=codes.device).view(1, 8, 1) * bits
    word = (runs << weights).sum(
        dim=1
    )  # [blocks, groups]; disjoint bits, so the sum is an or (8 bits: wraps to the sign)
    planes = [(word >> (8 * p)) & 0xFF for p in range(bits)]
    return torch.cat(planes, dim=1).to(torch.uint8)


def unpack(packed: Tensor, bits: int) -> Tensor:
    """Inverse of `pack`: bytes [blocks, bits * groups] to codes [blocks, 8 * groups], int64."""
    rows = packed.shape[0]
    planes = packed.to(torch.int64).view(rows, bits, -1)
    word = torch.zeros_like(planes[:, 0])
    for p in range(bits):
        word |= planes[:, p] << (8 * p)
    return torch.cat([(word >> (j * bits)) & ((1 << bits) - 1) for j in range(8)], dim=1)


def _parts(numel: int, block: int) -> list[tuple[int, int, int]]:
    """(first block, blocks, elements of each) of the whole blocks and of the short last one, where there are any."""
    whole, rest = divmod(numel, block)
    return [part for part in ((0, whole, block), (whole, 1, rest)) if part[1] and part[2]]


def encode_table(
    x: Tensor, table: np.ndarray, keys: np.ndarray, out: Tensor, block: int, bits: int, clip: float
) -> None:
    """Quantizes x [elements, fp32] into out [bytes], segment by segment of a table as `layout.py` makes it."""
    for (start, numel, groups_before, blocks_before, first), key in zip(table.tolist(), keys.tolist(), strict=True):
        at = groups_before * bits + 4 * blocks_before
        for block0, rows, length in _parts(numel, block):
            groups = -(-length // 8)
            begin = start + block0 * block
            piece = x[begin : begin + rows * length].view(rows, length)
            padded = torch.nn.functional.pad(piece, (0, groups * 8 - length))
            scale = scales(piece, clip)
            packed = pack(_round(padded, scale, bits, first + block0, block, (key[0], key[1])), bits)
            rows_of_bytes = torch.cat([scale.unsqueeze(1).view(torch.uint8), packed], dim=1)
            out[at : at + rows_of_bytes.numel()] = rows_of_bytes.flatten()
            at += rows_of_bytes.numel()


def decode_table(
    payload: Tensor, table: np.ndarray, out: Tensor, block: int, bits: int, factor: float, add: bool
) -> None:
    """Writes (or adds, with `add`) the decoded values times `factor` into out [elements, fp32], segment by segment."""
    k = level_count(bits)
    for start, numel, groups_before, blocks_before, _ in table.tolist():
        at = groups_before * bits + 4 * blocks_before
        for block0, rows, length in _parts(numel, block):
            groups = -(-length // 8)
            size = 4 + groups * bits
            rows_of_bytes = payload[at : at + rows * size].view(rows, size)
            scale = rows_of_bytes[:, :4].reshape(-1).clone().view(torch.float32).unsqueeze(1)
            step = (scale / float(k)) * float(np.float32(factor))
            values = ((unpack(rows_of_bytes[:, 4:].contiguous(), bits) - k).float() * step)[:, :length].flatten()
            begin = start + block0 * block
            target = out[begin : begin + rows * length]
            target.add_(values) if add else target.copy_(values)
            at += rows * size
