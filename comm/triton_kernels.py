"""The quantizer on a GPU, in Triton: one launch encodes a whole table, with error feedback or without, one decodes it.

Both legs of a bucket are held to the bytes of `reference.py`. So far they have run in Triton's interpreter only, on CPU
tensors (tests/comm/test_comm_triton.py): no GPU was at hand, and no speed is known.

Notable:
- A program takes one span, as a tile [8 blocks, elements]: what it reads stays in registers. It finds its segment by
  bisection in the table, which goes to the device with every call (a row a tensor).
- Nothing is fused or approximated: `enable_fp_fusion` is off, and divisions are rounded (`div_rn`), so that ranks with
  GPUs, ranks without, and the reference decode alike. Sums of squares are in fp64, as in the reference, but in another
  order.
- Clips over rows or tensors are found by torch before, in launches of their own.

Import it late: Triton need not be there, and is seconds to load.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
import triton  # type: ignore[import-not-found,import-untyped,unused-ignore]
import triton.language as tl  # type: ignore[import-not-found,import-untyped,unused-ignore]
from torch import Tensor

from .reference import (
    HALF,
    HASH_A,
    HASH_B,
    MIN_SCALE,
    ONE_BIT_CENTRE,
    SCALES,
    Limits,
    grid_of,
    level_count,
)

MAX_BLOCK = 8192
"""Larger blocks do not fit a program's registers; the reference takes them."""

_HASH_A, _HASH_B, _HALF = tl.constexpr(HASH_A), tl.constexpr(HASH_B), tl.constexpr(HALF)
_MIN_SCALE, _ONE_BIT_CENTRE = tl.constexpr(MIN_SCALE), tl.constexpr(ONE_BIT_CENTRE)
_COLUMNS = tl.constexpr(9)
"""Of a segment's row: the table's five, two words of the key, and `at` and `rows` of the limits."""


@triton.jit
def _segment_of(segments, count, span_index, steps):  # type: ignore[no-untyped-def]
    """Pointer to the row of the last segment that begins at a span or before."""
    low = 0
    high = count - 1
    for _ in range(steps):
        middle = (low + high + 1) // 2
        before = tl.load(segments + middle * _COLUMNS + 3)
        inside = before <= span_index
        low = tl.where(inside, middle, low)
        high = tl.where(inside, high, middle - 1)
    return segments + low * _COLUMNS


@triton.jit
def _hash(counter, key0, key1):  # type: ignore[no-untyped-def]
    h = counter ^ key0
    h = h ^ (h >> 16)
    h = h * _HASH_A
    h = (h ^ (h >> 15)) ^ key1
    h = h * _HASH_B
    return h ^ (h >> 16)


@triton.jit
def _encode(  # type: ignore[no-untyped-def]
    x,
    residual,
    segments,
    count,
    steps,
    out,
    given,
    limits,
    scales_table,
    mantissas,
    SPAN: tl.constexpr,
    WIDTH: tl.constexpr,
    BITS: tl.constexpr,
    LEVELS: tl.constexpr,
    GRID: tl.constexpr,
    CLIP: tl.constexpr,
    NEAREST: tl.constexpr,
    FEEDBACK: tl.constexpr,
    GIVEN: tl.constexpr,
    LIMITED: tl.constexpr,
):
    span_index = tl.program_id(0).to(tl.int64)
    segment = _segment_of(segments, count, span_index, steps)
    numel = tl.load(segment + 1)
    within = span_index - tl.load(segment + 3)
    begin = tl.load(segment) + within * SPAN
    length = tl.minimum(numel - within * SPAN, SPAN)
    groups = (length + 7) // 8
    at = (tl.load(segment + 2) + within * (SPAN // 8)) * BITS
    if not GIVEN:
        at += span_index * 9

    block = tl.arange(0, 8)
    lane = tl.arange(0, WIDTH)
    offset = block[:, None] * groups + lane[None, :]
    inside = (lane[None, :] < groups) & (offset < length)
    v = tl.load(x + begin + offset, mask=inside, other=0.0).to(tl.float32)
    if FEEDBACK:
        v = tl.load(residual + begin + offset, mask=inside, other=0.0) + v

    if GIVEN:
        exponent = tl.load(given + span_index * 9).to(tl.int32)
        q = tl.load(given + span_index * 9 + 1 + block).to(tl.int32)
        base = (exponent << 23).to(tl.float32, bitcast=True)
    else:
        words = v.to(tl.int32, bitcast=True) & 0x7FFFFFFF
        largest_word = tl.max(words, axis=1)
        finite = largest_word < 0x7F800000
        largest = tl.where(finite, largest_word, 0).to(tl.float32, bitcast=True).to(tl.float64)
        scale = largest
        if BITS == 1 or (CLIP > 0 and not LIMITED):
            wide = tl.where(finite[:, None], v, 0.0).to(tl.float64)
            nonzero = tl.maximum(tl.sum((words != 0).to(tl.int32), axis=1), 1).to(tl.float64)
            if BITS == 1:
                scale = tl.sum(tl.abs(wide), axis=1) / nonzero * _ONE_BIT_CENTRE
            else:
                scale = tl.minimum(largest, CLIP * tl.sqrt(tl.sum(wide * wide, axis=1) / nonzero))
        elif LIMITED:
            element = tl.load(segment + 4) * SPAN + tl.minimum(within * SPAN + block * groups, numel - 1)
            limit = tl.load(limits + tl.load(segment + 7) + element // tl.load(segment + 8))
            limit_word = limit.to(tl.int32, bitcast=True) & 0x7FFFFFFF
            scale = tl.where(limit_word < 0x7F800000, tl.minimum(largest, limit.to(tl.float64)), largest)
        wanted = tl.where(scale < _MIN_SCALE, 0.0, scale).to(tl.float32)
        top = tl.max(wanted, axis=0).to(tl.int32, bitcast=True)
        exponent = tl.minimum((top >> 23) + ((top & 0x7FFFFF) != 0).to(tl.int32), 254)
        base = (exponent << 23).to(tl.float32, bitcast=True)
        relative = tl.div_rn(wanted, tl.where(base > 0, base, 1.0) + tl.zeros([8], tl.float32))
        word = relative.to(tl.int32, bitcast=True)
        eighths = tl.load(mantissas + block)
        above = ((word & 0x7FFFFF)[:, None] <= eighths[None, :]).to(tl.int32)
        q = 8 * (126 - (word >> 23)) + tl.sum(above, axis=1)
        q = tl.where(wanted > 0, tl.minimum(tl.maximum(q, 0), 254), 255)
        dead = tl.min(finite.to(tl.int32), axis=0) == 0
        exponent = tl.where(dead, 255, exponent)
        q = tl.where(dead, 255, q)
        tl.store(out + at, exponent.to(tl.uint8))
        tl.store(out + at + 1 + block, q.to(tl.uint8))
        at += 9

    if BITS > 0:
        scale32 = tl.where(exponent == 255, 0.0, base * tl.load(scales_table + q))
        sendable = scale32 > 0
        high: tl.constexpr = LEVELS * 65536.0
        inverse = tl.div_rn(tl.full([8], high, tl.float32), tl.where(sendable, scale32, 1.0))
        y = tl.where(sendable[:, None], v, 0.0) * inverse[:, None]
        if BITS == 1:
            codes = (y >= 0).to(tl.int32)
            level = 2 * codes - 1
        else:
            first = (tl.load(segment + 4) + within) * (SPAN // 2)
            counter = (first + (block % 4)[:, None] * groups + lane[None, :]).to(tl.uint32)
            if NEAREST:
                random = tl.full([8, WIDTH], _HALF, tl.int32)
            else:
                key0, key1 = tl.load(segment + 5).to(tl.uint32), tl.load(segment + 6).to(tl.uint32)
                bits32 = _hash(counter, key0, key1)
                random = tl.where(block[:, None] < 4, bits32 & 0xFFFF, bits32 >> 16).to(tl.int32)
            y = tl.minimum(tl.maximum(y, -high), high)
            fixed = (y + (high + 0.5 * GRID)).to(tl.int32) & -GRID
            codes = tl.where(sendable[:, None], (fixed + random) >> 16, LEVELS)
            level = codes - LEVELS
        shifts = (block * BITS).to(tl.int64)
        packed = tl.sum(codes.to(tl.int64) << shifts[:, None], axis=0)  # disjoint bits
        for plane in tl.static_range(BITS):
            byte = ((packed >> (8 * plane)) & 0xFF).to(tl.uint8)
            tl.store(out + at + plane * groups + lane, byte, mask=lane < groups)
        if FEEDBACK:
            back = -tl.div_rn(scale32, tl.full([8], LEVELS * 1.0, tl.float32))
            left = v + level.to(tl.float32) * back[:, None]
            left = tl.where(exponent == 255, float("nan"), left)
            tl.store(residual + begin + offset, left, mask=inside)


@triton.jit
def _decode(  # type: ignore[no-untyped-def]
    payload,
    given,
    segments,
    count,
    steps,
    out,
    scales_table,
    factor,
    levels,
    SPAN: tl.constexpr,
    WIDTH: tl.constexpr,
    BITS: tl.constexpr,
    ADD: tl.constexpr,
    GIVEN: tl.constexpr,
):
    span_index = tl.program_id(0).to(tl.int64)
    segment = _segment_of(segments, count, span_index, steps)
    within = span_index - tl.load(segment + 3)
    begin = tl.load(segment) + within * SPAN
    length = tl.minimum(tl.load(segment + 1) - within * SPAN, SPAN)
    groups = (length + 7) // 8
    at = (tl.load(segment + 2) + within * (SPAN // 8)) * BITS
    block = tl.arange(0, 8)
    lane = tl.arange(0, WIDTH)
    if GIVEN:
        heads = given + span_index * 9
    else:
        at += span_index * 9
        heads = payload + at
        at += 9
    exponent = tl.load(heads).to(tl.int32)
    base = tl.where(exponent == 255, float("nan"), (exponent << 23).to(tl.float32, bitcast=True))
    scale = base * tl.load(scales_table + tl.load(heads + 1 + block).to(tl.int32))
    step = tl.div_rn(scale, tl.zeros([8], tl.float32) + levels.to(tl.float32)) * factor

    plane = block * BITS // 8
    shift = (block * BITS) % 8
    straddles = shift + BITS > 8
    bytes_low = at + plane[:, None] * groups + lane[None, :]
    here = (lane[None, :] < groups) & (block[:, None] < 8)
    low = tl.load(payload + bytes_low, mask=here, other=0).to(tl.int32)
    high = tl.load(payload + bytes_low + groups, mask=here & straddles[:, None], other=0).to(tl.int32)
    codes = ((low | (high << 8)) >> shift[:, None]) & ((1 << BITS) - 1)
    level = (2 * codes - 1) if BITS == 1 else codes - levels
    values = level.to(tl.float32) * step[:, None]
    offset = block[:, None] * groups + lane[None, :]
    inside = here & (offset < length)
    if ADD:
        values = tl.load(out + begin + offset, mask=inside, other=0.0) + values
    tl.store(out + begin + offset, values, mask=inside)


@lru_cache
def _tables(device: torch.device) -> tuple[Tensor, Tensor]:
    """What a scale's byte stands for, and the mantissas of eighths of an octave."""
    mantissas = np.append(SCALES[1:8].view(np.int32) & 0x7FFFFF, 0).astype(np.int32)
    return torch.from_numpy(SCALES).to(device), torch.from_numpy(mantissas).to(device)


def _spans(table: np.ndarray, span: int) -> int:
    """Spans of a table that is numbered from 0 on."""
    return int(table[-1, 3] + -(-table[-1, 1] // span)) if len(table) else 0


def _rows(
    table: np.ndarray, keys: np.ndarray | None, limits: Limits | None, device: torch.device
) -> tuple[Tensor, int, int]:
    """What a program needs of each segment, on the device; how many; and the steps of a bisection among them."""
    rows = np.zeros((len(table), _COLUMNS.value), dtype=np.int64)
    rows[:, :5] = table
    if keys is not None:
        rows[:, 5:7] = keys
    if limits is not None:
        rows[:, 7], rows[:, 8] = limits.at, limits.rows
    return torch.from_numpy(rows).to(device), len(table), (len(table) - 1).bit_length()


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
    """`reference.encode_table` in one launch; x may also be fp16 or bf16."""
    spans = _spans(table, span)
    if not spans:
        return
    rows, count, steps = _rows(table, keys, limits, x.device)
    scales_table, mantissas = _tables(x.device)
    largest = scales_table if limits is None else torch.from_numpy(limits.values).to(x.device)
    _encode[(spans,)](
        x,
        x if residual is None else residual,
        rows,
        count,
        steps,
        out,
        out if given is None else given,
        largest,
        scales_table,
        mantissas,
        SPAN=span,
        WIDTH=triton.next_power_of_2(span // 8),
        BITS=bits,
        LEVELS=level_count(max(bits, 1)),
        GRID=grid_of(max(bits, 1)),
        CLIP=clip,
        NEAREST=nearest,
        FEEDBACK=residual is not None,
        GIVEN=given is not None,
        LIMITED=limits is not None,
        enable_fp_fusion=False,
    )


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
    """`reference.decode_table` in one launch."""
    spans = _spans(table, span)
    if not spans:
        return
    rows, count, steps = _rows(table, None, None, out.device)
    _decode[(spans,)](
        payload,
        payload if given is None else given,
        rows,
        count,
        steps,
        out,
        _tables(out.device)[0],
        float(np.float32(factor)),
        levels or level_count(bits),
        SPAN=span,
        WIDTH=triton.next_power_of_2(span // 8),
        BITS=bits,
        ADD=add,
        GIVEN=given is not None,
        enable_fp_fusion=False,
    )
