"""The way back, in numba: codes to values, and codes to the integer sums of a shared scale. See `kernels.py`.

Loops over one run at a time: values are read and written front to back. numba vectorises them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit, types
from numba.extending import intrinsic

from .layout import SCALE_BYTES
from .reference import SCALES

_SCALES = SCALES
_SCALE_BYTES = SCALE_BYTES

_f32 = types.Array(types.float32, 1, "C")
_i16 = types.Array(types.int16, 1, "C")
_u8 = types.Array(types.uint8, 1, "C")
_i64_2d = types.Array(types.int64, 2, "C")
_i64, _f64, _bool = types.int64, types.float64, types.boolean


def _shift_right_intrinsic(_context: Any, _value: Any, _count: Any) -> Any:
    """value >> count in 32 bits: numba's own would widen to 64, and halve the lanes."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.ashr(arguments[0], arguments[1])

    return types.int32(types.int32, types.int32), generate


_shift_right: Any = intrinsic(_shift_right_intrinsic)


def _shift_left_intrinsic(_context: Any, _value: Any, _count: Any) -> Any:
    """value << count in 32 bits."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.shl(arguments[0], arguments[1])

    return types.int32(types.int32, types.int32), generate


_shift_left: Any = intrinsic(_shift_left_intrinsic)


# Two loops, not one with a flag, so that neither has a branch inside.
@njit(nogil=True, cache=True)
def _unpack_add(codes, out, bits, k, twice, steps):  # type: ignore[no-untyped-def]
    groups = out.size // 8
    mask = np.int32((1 << bits) - 1)
    for j in range(8):
        plane, shift, step = j * bits // 8, np.int32(j * bits % 8), steps[j]
        beyond = plane + 1 if shift + bits > 8 else plane
        first = codes[plane * groups : (plane + 1) * groups]
        second = codes[beyond * groups : (beyond + 1) * groups]
        run = out[j * groups : (j + 1) * groups]
        for g in range(groups):
            code = _shift_right(np.int32(np.int32(first[g]) | np.int32(np.int32(second[g]) << np.int32(8))), shift)
            run[g] += np.float32(np.int32(np.int32(np.int32(code & mask) * twice) - k)) * step


@njit(nogil=True, cache=True)
def _unpack(codes, out, bits, k, twice, steps):  # type: ignore[no-untyped-def]
    groups = out.size // 8
    mask = np.int32((1 << bits) - 1)
    for j in range(8):
        plane, shift, step = j * bits // 8, np.int32(j * bits % 8), steps[j]
        beyond = plane + 1 if shift + bits > 8 else plane
        first = codes[plane * groups : (plane + 1) * groups]
        second = codes[beyond * groups : (beyond + 1) * groups]
        run = out[j * groups : (j + 1) * groups]
        for g in range(groups):
            code = _shift_right(np.int32(np.int32(first[g]) | np.int32(np.int32(second[g]) << np.int32(8))), shift)
            run[g] = np.float32(np.int32(np.int32(np.int32(code & mask) * twice) - k)) * step


@njit(types.void(_u8, _u8, _i64_2d, _f32, _i64, _i64, _i64, _f64, _bool), nogil=True, cache=True)
def decode_table(payload, given, table, out, span, bits, levels, factor, add):  # type: ignore[no-untyped-def]
    """Writes (or adds, with `add`) the decoded values times `factor` into out [elements], segment by segment.

    given [spans * 9] (empty: none) and levels are those of `reference.decode_table`.
    """
    k = np.int32(levels)
    twice = np.int32(2 if bits == 1 else 1)
    number = np.empty(1, dtype=np.float32)
    word = number.view(np.int32)
    steps = np.empty(8, dtype=np.float32)
    padded = np.empty(span, dtype=np.float32)
    for s in range(table.shape[0]):
        start, numel = table[s, 0], table[s, 1]
        at = table[s, 2] * bits + (0 if given.size > 0 else table[s, 3] * _SCALE_BYTES)
        for b in range((numel + span - 1) // span):
            begin = start + b * span
            length = min(span, start + numel - begin)
            groups = (length + 7) // 8
            if given.size > 0:
                head = given[(table[s, 3] + b) * _SCALE_BYTES : (table[s, 3] + b + 1) * _SCALE_BYTES]
            else:
                head = payload[at : at + _SCALE_BYTES]
                at += _SCALE_BYTES
            word[0] = np.int32(head[0]) << np.int32(23)
            base = np.float32(np.nan) if head[0] == 255 else number[0]
            for j in range(8):
                scale = np.float32(base * _SCALES[head[1 + j]])
                steps[j] = np.float32(np.float32(scale / np.float32(k)) * np.float32(factor))
            codes = payload[at : at + groups * bits]
            if length < groups * 8:
                rest = padded[: groups * 8]
                _unpack(codes, rest, bits, k, twice, steps)
                if add:
                    for i in range(length):
                        out[begin + i] += rest[i]
                else:
                    out[begin : begin + length] = rest[:length]
            elif add:
                _unpack_add(codes, out[begin : begin + length], bits, k, twice, steps)
            else:
                _unpack(codes, out[begin : begin + length], bits, k, twice, steps)
            at += groups * bits


@njit(nogil=True, cache=True)
def _unpack_sums(codes, sums, bits, k, first):  # type: ignore[no-untyped-def]
    groups = sums.size // 8
    mask = np.int32((1 << bits) - 1)
    for j in range(8):
        plane, shift = j * bits // 8, np.int32(j * bits % 8)
        beyond = plane + 1 if shift + bits > 8 else plane
        low = codes[plane * groups : (plane + 1) * groups]
        high = codes[beyond * groups : (beyond + 1) * groups]
        run = sums[j * groups : (j + 1) * groups]
        if first:
            for g in range(groups):
                code = _shift_right(np.int32(np.int32(low[g]) | np.int32(np.int32(high[g]) << np.int32(8))), shift)
                run[g] = np.int16(np.int32(code & mask) - k)
        else:
            for g in range(groups):
                code = _shift_right(np.int32(np.int32(low[g]) | np.int32(np.int32(high[g]) << np.int32(8))), shift)
                run[g] += np.int16(np.int32(code & mask) - k)


@njit(types.void(_u8, _i64_2d, _i16, _i64, _i64, _i64, _bool), nogil=True, cache=True)
def add_codes(payload, table, sums, span, bits, levels, first):  # type: ignore[no-untyped-def]
    """Adds the r of codes without scales to sums [groups * 8], or writes them with `first`; segment by segment."""
    k = np.int32(levels)
    for s in range(table.shape[0]):
        numel, group = table[s, 1], table[s, 2]
        for b in range((numel + span - 1) // span):
            groups = (min(span, numel - b * span) + 7) // 8
            codes = payload[group * bits : (group + groups) * bits]
            _unpack_sums(codes, sums[8 * group : 8 * (group + groups)], bits, k, first)
            group += groups


@njit(types.void(_i16, _i64_2d, _u8, _i64, _i64, _i64), nogil=True, cache=True)
def pack_sums(sums, table, out, span, bits, levels):  # type: ignore[no-untyped-def]
    """Packs sums [groups * 8], each from -levels to levels, into codes of `bits` bits, segment by segment."""
    for s in range(table.shape[0]):
        numel, group = table[s, 1], table[s, 2]
        for b in range((numel + span - 1) // span):
            groups = (min(span, numel - b * span) + 7) // 8
            mine = sums[8 * group : 8 * (group + groups)]
            for plane in range(bits):
                target = out[group * bits + plane * groups : group * bits + (plane + 1) * groups]
                target[:] = 0
                for j in range(8):
                    shift = np.int32(j * bits - 8 * plane)
                    run = mine[j * groups : (j + 1) * groups]
                    if 0 <= shift < 8:
                        for g in range(groups):
                            target[g] |= np.uint8(_shift_left(np.int32(run[g] + levels), shift))
                    elif -bits < shift < 0:
                        for g in range(groups):
                            target[g] |= np.uint8(_shift_right(np.int32(run[g] + levels), np.int32(-shift)))
            group += groups


@njit(types.void(_i16, _u8, _i64_2d, _f32, _i64, _i64), nogil=True, cache=True)
def sums_to_values(sums, given, table, out, span, levels):  # type: ignore[no-untyped-def]
    """Writes what sums [groups * 8] stand for under given scales, `levels` to a scale, into out [elements]."""
    number = np.empty(1, dtype=np.float32)
    word = number.view(np.int32)
    for s in range(table.shape[0]):
        start, numel, group = table[s, 0], table[s, 1], table[s, 2]
        for b in range((numel + span - 1) // span):
            begin = start + b * span
            length = min(span, numel - b * span)
            groups = (length + 7) // 8
            head = given[(table[s, 3] + b) * _SCALE_BYTES : (table[s, 3] + b + 1) * _SCALE_BYTES]
            word[0] = np.int32(head[0]) << np.int32(23)
            base = np.float32(np.nan) if head[0] == 255 else number[0]
            for j in range(8):
                step = np.float32(np.float32(base * _SCALES[head[1 + j]]) / np.float32(levels))
                low, high = j * groups, min((j + 1) * groups, length)
                run = sums[8 * group + low : 8 * group + high] if low < high else sums[:0]
                target = out[begin + low : begin + high] if low < high else out[:0]
                for i in range(run.size):
                    target[i] = np.float32(run[i]) * step
            group += groups
