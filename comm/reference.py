"""The quantizer's arithmetic in plain torch: what `kernels.py` and `triton_kernels.py` are held to, and what runs where
neither does.

SQ_m, stochastic linear quantization (Hou, Zhang & Kwok, "Analysis of Quantized Models", ICLR 2019; written from
the description, the paper was not at hand): k = 2^(m-1) - 1 levels a side, level r stands for r/k * scale, and
a value between two levels goes to the upper one with the fractional probability (or, where asked for, to the nearest,
from half way up). One scale a block: min(max |x|, c * sigma), the clip of the same paper at c > 0, a plain maximum at
c = 0. One bit (m = 1) is the sign times the block's mean magnitude: it is biased, and needs error feedback.

Choices of our own, beside the paper's:
- Blocks are small, 128 elements: a row of a small model's matrices. Rows of an embedding's gradient differ by orders of
  magnitude (frequent and rare words); under one scale the clip cuts the large ones and the rounding drowns the small
  ones, which Adam then divides by the noise. (The small model's embedding, error of 3/4 bits weighted by Adam's second
  moment: 84 in blocks of 1024, 0.12 in blocks of 128, by `benchmarks/gradients.py`.)
- So a scale must be cheap: 8 blocks are a span, which has one exponent (a byte), and a block's scale is 2^(-q/8) of it,
  q a byte, rounded up by at most 9 %, so that nothing is clipped that c does not clip.
- sigma = sqrt(sum x^2 / number of elements that are not zero), over the block, the row that the block begins in, or
  the tensor: of what of them is at hand in one call. The gradient of an embedding is zero in the rows of words that a
  batch lacks; counting those would shrink sigma. Nor does the mean magnitude count zeros.
- A value is first rounded to a grid of 2^-16 of a level (twice as wide for every bit above 5, so that the error of
  fp32 at the outermost level is below the grid's), then stochastically, in integers, with 16 random bits. So the
  rounding is unbiased to half a grid step, zeros stay exactly zero, and values on a level stay there.
- At 1 bit a zero in a block that is not all zero counts as positive; the scale is rounded to the nearest eighth of an
  octave, not up, as nothing is clipped by it. No clip applies.
- A span that holds an inf or a NaN gets the exponent 255 and decodes to NaN throughout. A block whose scale is
  under 1e-30 is sent as zeros.
- A 32-bit hash of (key, span, position) serves two elements, half a span apart.

A span's bytes: the exponent e (2^(e - 127); 255 is NaN), 8 scales q (255 is zero), then the codes (r + k) in groups
of 8. A span of g groups is read as 8 runs of g elements, its blocks; group i is the i-th element of every run, 8*m
bits, and lies in m planes of g bytes (bits 0-7 of every group, then 8-15, ...). So every step of packing is
elementwise over contiguous runs, which is what vector units want. The last span of a tensor is shorter, and so are
its 8 blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .layout import SCALE_BYTES, Shard

HASH_A = 0x7FEB352D
HASH_B = 0x846CA68B
MIN_SCALE = 1e-30
"""Smaller scales are sent as zero: the inverse would leave fp32."""
HALF = 0x8000
"""What rounding to the nearest adds, in place of 16 random bits."""
MIN_PLAIN, MAX_PLAIN = 1e-15, 1e15
"""Between these magnitudes a block's sum of squares is safe in fp32."""

SCALES = np.append(np.exp2(-np.arange(255) / 8), 0.0).astype(np.float32)
"""What a scale's byte q stands for, relative to the span's exponent."""

_WORD = 0xFFFFFFFF


ONE_BIT_CENTRE = 2 ** (-1 / 16)
"""Rounding up after this factor is rounding to the nearest eighth of an octave."""


def level_count(bits: int) -> int:
    """Levels on one side of zero: 1, 1, 3, 7, 15, 31, 63, 127 for 1 to 8 bits."""
    return max((1 << (bits - 1)) - 1, 1)


def grid_of(bits: int) -> int:
    """Grid that values are rounded to before the stochastic rounding, in 2^-16 of a level."""
    return max((1 << bits) >> 5, 1)


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


@dataclass(frozen=True)
class Limits:
    """Clips taken over rows or whole tensors: the largest scale that a block may have, by the row that it begins in."""

    values: np.ndarray
    """fp32 [rows]: c * sigma; not finite where nothing is to be clipped."""
    at: np.ndarray
    """int64 [segments]: of a segment, the index in `values` of row 0 of its tensor; negative where that is not held."""
    rows: np.ndarray
    """int64 [segments]: elements of a row."""


WHOLE = 1 << 62
"""Elements of a row where a tensor counts as one."""


def scopes(part: Shard, span: int, by_row: bool) -> tuple[np.ndarray, np.ndarray, int]:
    """`at` and `rows` of `Limits`, and how many values they take: a value a tensor, or a value a row at hand."""
    rows = np.where(part.rows > 0, part.rows, WHOLE) if by_row else np.full(len(part.table), WHOLE)
    first = part.table[:, 4] * span // rows
    last = (part.table[:, 4] * span + part.table[:, 1] - 1) // rows
    at = np.zeros(len(rows), dtype=np.int64)
    count = 0
    for tensor in np.unique(part.tensors):
        mine = part.tensors == tensor
        at[mine] = count - first[mine].min()
        count += int(last[mine].max() - first[mine].min()) + 1
    return at, rows.astype(np.int64), count


def limits(x: Tensor, part: Shard, span: int, clip: float, by_row: bool, residual: Tensor | None = None) -> Limits:
    """Clips of the rows or tensors of x [elements, fp32] (plus a residual); infs and NaNs are not counted."""
    at, rows, count = scopes(part, span, by_row)
    squares = torch.zeros(count, dtype=torch.float64, device=x.device)
    counts = torch.zeros(count, dtype=torch.float64, device=x.device)
    for s, (start, numel, _, _, first) in enumerate(part.table.tolist()):
        piece = x[start : start + numel]
        if residual is not None:
            piece = piece + residual[start : start + numel]
        wide = torch.where(piece.isfinite(), piece, torch.zeros_like(piece)).double()
        index = (torch.arange(numel, device=x.device) + first * span) // int(rows[s]) + int(at[s])
        squares.index_add_(0, index, wide.square())
        counts.index_add_(0, index, (wide != 0).double())
    values = float(np.float32(clip)) * (squares / counts.clamp(min=1)).sqrt().float()
    # A row of zeros says nothing about a block that begins in it and goes on into the next.
    values = torch.where(values > 0, values, torch.full_like(values, torch.inf))
    return Limits(values.cpu().numpy(), at, rows)


def scales(x: Tensor, clip: float, limit: Tensor | None = None, *, mean: bool = False) -> Tensor:
    """Scale of every row of x [blocks, elements]: fp32 [blocks], NaN where a row has an inf or a NaN.

    Args:
        x: the blocks.
        clip: c of c * sigma; 0 does not clip.
        limit: c * sigma [blocks, fp32] where sigma is not of the block.
        mean: the mean magnitude (of 1 bit) instead.
    """
    wide = x.double()
    largest = wide.abs().amax(dim=1)
    count = (wide != 0).sum(dim=1).clamp(min=1)
    scale = largest
    if mean:
        scale = wide.abs().sum(dim=1) / count * ONE_BIT_CENTRE
    elif limit is not None:
        scale = torch.where(limit.isfinite(), torch.minimum(largest, limit.double()), largest)
    elif clip > 0:
        scale = torch.minimum(largest, clip * (wide.square().sum(dim=1) / count).sqrt())
    scale = torch.where(scale < MIN_SCALE, torch.zeros_like(scale), scale)
    return torch.where(torch.isfinite(largest), scale, torch.full_like(scale, torch.nan)).float()


def scale_codes(scale: Tensor) -> tuple[Tensor, Tensor]:
    """Exponents [spans] and relative scales [spans, 8], as bytes in int64, of the scales of blocks [spans, 8]."""
    largest = scale.amax(dim=1)  # NaN if one is
    words = largest.view(torch.int32).to(torch.int64)
    exponent = ((words >> 23) + ((words & 0x7FFFFF) != 0)).clamp(max=254)
    base = (exponent << 23).to(torch.int32).view(torch.float32)
    relative = scale / torch.where(base > 0, base, torch.ones_like(base)).unsqueeze(1)
    ascending = torch.from_numpy(SCALES[254::-1].copy()).to(scale.device)
    # The largest q whose scale is not below: rounded up.
    q = 254 - torch.searchsorted(ascending, relative.contiguous(), right=False).clamp(max=254)
    q = torch.where((scale > 0) & ~largest.isnan().unsqueeze(1), q, 255)
    return torch.where(largest.isnan(), 255, exponent), q


def scale_values(exponent: Tensor, q: Tensor) -> Tensor:
    """The scales [spans, 8] that bytes stand for, fp32."""
    base = (exponent.to(torch.int64) << 23).to(torch.int32).view(torch.float32)
    base = torch.where(exponent == 255, torch.full_like(base, torch.nan), base)
    return base.unsqueeze(1) * torch.from_numpy(SCALES).to(q.device)[q.to(torch.int64)]


def _round(
    x: Tensor, scale: Tensor, bits: int, first_span: int, span: int, key: tuple[int, int], nearest: bool
) -> Tensor:
    """Codes r + k of x [spans, padded elements] under given scales of blocks [spans, 8]: int64, same shape."""
    k, grid = level_count(bits), grid_of(bits)
    rows, half = x.shape[0], x.shape[1] // 2
    counter = (torch.arange(first_span, first_span + rows, device=x.device) * (span // 2)).unsqueeze(1)
    hashed = _hash(counter + torch.arange(half, device=x.device), *key)
    random = torch.cat([hashed & 0xFFFF, hashed >> 16], dim=1)
    limit = float(k << 16)
    scale = scale.repeat_interleave(x.shape[1] // 8, dim=1)
    sendable = scale > 0  # False for NaN
    # A tensor by a tensor: torch divides a number by a tensor as number * (1 / tensor), another rounding.
    inverse = torch.full_like(scale, limit) / torch.where(sendable, scale, torch.ones_like(scale))
    y = torch.where(sendable, x, torch.zeros_like(x)) * inverse
    if bits == 1:
        return (y >= 0).to(torch.int64)
    fixed = (y.clamp(-limit, limit) + (limit + 0.5 * grid)).to(torch.int64) & -grid
    return torch.where(sendable, (fixed + (HALF if nearest else random)) >> 16, k)


def _levels(codes: Tensor, bits: int, k: int) -> Tensor:
    """r of codes: fp32."""
    return (codes * 2 - 1 if bits == 1 else codes - k).float()


def pack(codes: Tensor, bits: int) -> Tensor:
    """Packs codes [spans, 8 * groups] into bytes [spans, bits * groups]."""
    rows = codes.shape[0]
    runs = codes.to(torch.int64).view(rows, 8, -1)
    weights = torch.arange(8, device=codes.device).view(1, 8, 1) * bits
    word = (runs << weights).sum(
        dim=1
    )  # [spans, groups]; disjoint bits, so the sum is an or (8 bits: wraps to the sign)
    planes = [(word >> (8 * p)) & 0xFF for p in range(bits)]
    return torch.cat(planes, dim=1).to(torch.uint8)


def unpack(packed: Tensor, bits: int) -> Tensor:
    """Inverse of `pack`: bytes [spans, bits * groups] to codes [spans, 8 * groups], int64."""
    rows = packed.shape[0]
    planes = packed.to(torch.int64).view(rows, bits, -1)
    word = torch.zeros_like(planes[:, 0])
    for p in range(bits):
        word |= planes[:, p] << (8 * p)
    return torch.cat([(word >> (j * bits)) & ((1 << bits) - 1) for j in range(8)], dim=1)


def _parts(numel: int, span: int) -> list[tuple[int, int, int]]:
    """(first span, spans, elements of each) of the whole spans and of the short last one, where there are any."""
    whole, rest = divmod(numel, span)
    return [part for part in ((0, whole, span), (whole, 1, rest)) if part[1] and part[2]]


def encode_table(
    x: Tensor,
    table: np.ndarray,
    keys: np.ndarray,
    out: Tensor,
    span: int,
    bits: int,
    clip: float,
    *,
    nearest: bool = False,
    limits: Limits | None = None,
    residual: Tensor | None = None,
    given: Tensor | None = None,
) -> None:
    """Quantizes x [elements, fp32] into out [bytes], segment by segment of a table as `layout.py` makes it.

    With 0 bits, out gets the scales alone, and residual is only read.

    Args:
        x, table, keys, out, span, bits, clip: as in `Quantizer.encode_shard`.
        nearest: round to the nearest level.
        limits: c * sigma where sigma is not of the block.
        residual: [elements, fp32], added to x before, left holding what the codes miss of the sum.
        given: uint8 [spans * 9], scales to use; then out gets codes alone.
    """
    head = 0 if given is not None else SCALE_BYTES
    for s, ((start, numel, groups_before, spans_before, first), key) in enumerate(
        zip(table.tolist(), keys.tolist(), strict=True)
    ):
        at = groups_before * bits + head * spans_before
        for span0, rows, length in _parts(numel, span):
            groups = -(-length // 8)
            begin = start + span0 * span
            piece = x[begin : begin + rows * length].view(rows, length)
            if residual is not None:
                piece = piece + residual[begin : begin + rows * length].view(rows, length)
            padded = torch.nn.functional.pad(piece, (0, groups * 8 - length))  # zeros, which no scale counts
            if given is not None:
                heads = _heads(given, spans_before + span0, rows)
                exponent, q = heads[:, 0].to(torch.int64), heads[:, 1:].to(torch.int64)
            else:
                limit = None
                if limits is not None:
                    block = torch.arange(rows).unsqueeze(1) * span + torch.arange(8).unsqueeze(0) * groups
                    element = (block + span0 * span).clamp(max=numel - 1).flatten() + first * span
                    row = (element // int(limits.rows[s]) + int(limits.at[s])).numpy()
                    limit = torch.from_numpy(limits.values[row]).to(x.device)
                scale = scales(padded.view(rows * 8, groups), clip, limit, mean=bits == 1)
                exponent, q = scale_codes(scale.view(rows, 8))
            heads = torch.cat([exponent.unsqueeze(1), q], dim=1).to(torch.uint8)
            if bits == 0:
                out[at : at + heads.numel()] = heads.flatten()
                at += heads.numel()
                continue
            scale = scale_values(exponent, q)
            codes = _round(padded, scale, bits, first + span0, span, (key[0], key[1]), nearest)
            rows_of_bytes = pack(codes, bits)
            if given is None:
                rows_of_bytes = torch.cat([heads, rows_of_bytes], dim=1)
            out[at : at + rows_of_bytes.numel()] = rows_of_bytes.flatten()
            at += rows_of_bytes.numel()
            if residual is not None:
                step = -(scale / float(level_count(bits))).repeat_interleave(groups, dim=1)
                left = piece + (_levels(codes, bits, level_count(bits)) * step)[:, :length]
                residual[begin : begin + rows * length] = left.flatten()


def decode_table(
    payload: Tensor,
    table: np.ndarray,
    out: Tensor,
    span: int,
    bits: int,
    factor: float,
    add: bool,
    *,
    given: Tensor | None = None,
    levels: int = 0,
) -> None:
    """Writes (or adds, with `add`) the decoded values times `factor` into out [elements, fp32], segment by segment.

    Args:
        payload, table, out, span, bits, factor, add: as in `Quantizer.decode_shard`.
        given: uint8 [spans * 9], the scales of a payload that has none.
        levels: levels on one side of zero, where they are not those of `bits`.
    """
    k = levels or level_count(bits)
    head = 0 if given is not None else SCALE_BYTES
    for start, numel, groups_before, spans_before, _ in table.tolist():
        at = groups_before * bits + head * spans_before
        for span0, rows, length in _parts(numel, span):
            groups = -(-length // 8)
            size = head + groups * bits
            rows_of_bytes = payload[at : at + rows * size].view(rows, size)
            heads = rows_of_bytes if given is None else _heads(given, spans_before + span0, rows)
            scale = scale_values(heads[:, 0], heads[:, 1:SCALE_BYTES])
            step = ((scale / float(k)) * float(np.float32(factor))).repeat_interleave(groups, dim=1)
            codes = unpack(rows_of_bytes[:, head:].contiguous(), bits)
            values = (_levels(codes, bits, k) * step)[:, :length].flatten()
            begin = start + span0 * span
            target = out[begin : begin + rows * length]
            target.add_(values) if add else target.copy_(values)
            at += rows * size


def _heads(given: Tensor, first: int, rows: int) -> Tensor:
    """Scale bytes of some spans [rows, 9]."""
    return given[first * SCALE_BYTES : (first + rows) * SCALE_BYTES].view(rows, SCALE_BYTES)


def add_codes(payload: Tensor, table: np.ndarray, sums: Tensor, span: int, bits: int, first: bool) -> None:
    """Adds the r of codes without scales to sums (int16 [groups * 8]), or writes them with `first`.

    Sums lie as codes do before packing: 8 runs a span, padded to whole groups.
    """
    for _, numel, group, _, _ in table.tolist():
        for _, rows, length in _parts(numel, span):
            groups = -(-length // 8)
            codes = unpack(payload[group * bits : (group + rows * groups) * bits].view(rows, groups * bits), bits)
            target = sums[8 * group : 8 * (group + rows * groups)]
            levels = (codes - level_count(bits)).flatten().to(torch.int16)
            target.copy_(levels) if first else target.add_(levels)
            group += rows * groups


def pack_sums(sums: Tensor, table: np.ndarray, out: Tensor, span: int, bits: int, levels: int) -> None:
    """Packs sums, each from -levels to levels, into codes of `bits` bits without scales."""
    for _, numel, group, _, _ in table.tolist():
        for _, rows, length in _parts(numel, span):
            groups = -(-length // 8)
            codes = sums[8 * group : 8 * (group + rows * groups)].view(rows, 8 * groups).to(torch.int64) + levels
            out[group * bits : (group + rows * groups) * bits] = pack(codes, bits).flatten()
            group += rows * groups


def sums_to_values(sums: Tensor, given: Tensor, table: np.ndarray, out: Tensor, span: int, levels: int) -> None:
    """Writes what sums stand for under given scales, `levels` to a scale, into out [elements, fp32]."""
    for start, numel, group, spans_before, _ in table.tolist():
        for span0, rows, length in _parts(numel, span):
            groups = -(-length // 8)
            heads = _heads(given, spans_before + span0, rows)
            step = (scale_values(heads[:, 0], heads[:, 1:]) / float(levels)).repeat_interleave(groups, dim=1)
            mine = sums[8 * group : 8 * (group + rows * groups)].view(rows, 8 * groups).float() * step
            out[start + span0 * span : start + span0 * span + rows * length] = mine[:, :length].flatten()
            group += rows * groups
