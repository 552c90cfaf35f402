"""Fused CPU kernels of the quantizer, in numba: one call for all tensors of a bucket, without the GIL.

Notable:
- A span is read once from memory: the passes that find the scales of its blocks leave it in the first-level
  cache for the pass that rounds and packs it.
- The largest magnitude is found on the bit patterns, as integers: that reduction vectorises without any
  fast-math flag, and a result of 0x7f800000 or more says that the block holds an inf or a NaN. Only the sum of
  squares may be reassociated (it decides nothing about finiteness).
- Two elements, half a span apart, share one 32-bit hash: 16 random bits each.
- The arithmetic, operation by operation, is `reference.py`'s; tests hold the two together bit for bit.

numba's cache looks at this file alone: after a change of the constants in `reference.py`, change this file too
(a test fails otherwise). Importing this module compiles the kernels (about 5 seconds) or loads them from
numba's cache: import it late. A table is what `layout.py` makes: int64 [segments, 5], columns start, numel,
groups before, spans before, first span.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import njit, types
from numba.extending import intrinsic

from .layout import SCALE_BYTES
from .reference import HASH_A, HASH_B, MAX_PLAIN, MIN_PLAIN, MIN_SCALE, SCALES, grid_of, level_count

_A = np.uint32(HASH_A)
_B = np.uint32(HASH_B)
_INF_BITS = np.int32(0x7F800000)
_ABS_BITS = np.int32(0x7FFFFFFF)
_MIN_SCALE = MIN_SCALE
_SCALES = SCALES
_SCALE_BYTES = SCALE_BYTES
_MIN_PLAIN = MIN_PLAIN
_MAX_PLAIN = MAX_PLAIN

_f32 = types.Array(types.float32, 1, "C")
_i32 = types.Array(types.int32, 1, "C")
_u8 = types.Array(types.uint8, 1, "C")
_u32_2d = types.Array(types.uint32, 2, "C")
_i64_2d = types.Array(types.int64, 2, "C")
_i64, _f64, _bool = types.int64, types.float64, types.boolean

_grid_of = njit(grid_of, inline="always")
_level_count = njit(level_count, inline="always")


def _shift_right_intrinsic(_context: Any, _value: Any, _count: Any) -> Any:
    """value >> count in 32 bits: numba's own would widen to 64, and halve the lanes."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.ashr(arguments[0], arguments[1])

    return types.int32(types.int32, types.int32), generate


_shift_right: Any = intrinsic(_shift_right_intrinsic)


@njit(inline="always")
def _hash(counter, key0, key1):  # type: ignore[no-untyped-def]
    """32 random bits from a counter and a 64-bit key; every step back to 32 bits, as numba would widen."""
    h = np.uint32(counter ^ key0)
    h = np.uint32(h ^ (h >> np.uint32(16)))
    h = np.uint32(h * _A)
    h = np.uint32(np.uint32(h ^ (h >> np.uint32(15))) ^ key1)
    h = np.uint32(h * _B)
    return np.uint32(h ^ (h >> np.uint32(16)))


@njit(nogil=True, cache=True, fastmath={"reassoc", "nsz"})
def _find_scales(x, words, clip, scales, number, word):  # type: ignore[no-untyped-def]
    """Writes the scales [8] of a padded span's blocks: min(max |x|, clip * sigma), NaN when one is not finite.

    `words` are the bits of x; `word` and `number` are two views of one number, the cheap way from bits to a float.
    """
    groups = x.size // 8
    for j in range(8):
        run, run_words = x[j * groups : (j + 1) * groups], words[j * groups : (j + 1) * groups]
        largest_bits = np.int32(0)
        zeros = np.int32(0)
        squares = np.float32(0)
        for i in range(groups):
            magnitude = np.int32(run_words[i] & _ABS_BITS)
            largest_bits = max(largest_bits, magnitude)
            zeros = np.int32(zeros + np.int32(magnitude == 0))
            squares += run[i] * run[i]
        word[0] = largest_bits
        scale = number[0]
        if largest_bits >= _INF_BITS:
            scale = np.float32(np.nan)
        elif clip > 0 and largest_bits > 0:
            if _MIN_PLAIN < scale < _MAX_PLAIN:
                sigma = np.float32(math.sqrt(squares / np.float32(groups - zeros)))
            else:  # squares in fp32 have left its range
                total = np.float64(0)
                for i in range(groups):
                    total += np.float64(run[i]) * np.float64(run[i])
                sigma = np.float32(math.sqrt(total / (groups - zeros)))
            scale = min(scale, np.float32(clip) * sigma)
        scales[j] = np.float32(0) if scale < _MIN_SCALE else scale


@njit(nogil=True, cache=True)
def _encode_scales(scales, word, number, q):  # type: ignore[no-untyped-def]
    """Writes the bytes q [8] of the scales of blocks [8], returns the span's exponent, and makes scales what they say.

    `word` and `number` are two views of one number.
    """
    largest = np.float32(0)
    for j in range(8):
        if np.isnan(scales[j]):
            q[:] = 255
            return 255
        largest = max(largest, scales[j])
    number[0] = largest
    exponent = word[0] >> 23
    if word[0] & 0x7FFFFF:
        exponent += 1
    exponent = min(exponent, 254)
    word[0] = exponent << 23
    base = number[0]
    for j in range(8):
        if scales[j] == 0:
            q[j] = 255
            continue
        relative = np.float32(scales[j] / base)
        number[0] = relative
        code = min(max(8 * (126 - (word[0] >> 23)), 0), 254)  # a scale of the octave above, not below
        while code < 254 and _SCALES[code + 1] >= relative:
            code += 1
        q[j] = code
        scales[j] = base * _SCALES[code]
    return exponent


@njit(nogil=True, cache=True)
def _round_span(x, codes, inverses, limit, grid, first, key0, key1):  # type: ignore[no-untyped-def]
    """Stochastically rounded codes, 0..2k, of a padded span. Shifts are constants: those by a variable would widen."""
    groups = x.size // 8
    bottom = -limit
    offset = np.float32(limit + np.float32(grid) * np.float32(0.5))
    mask = np.int32(-grid)
    for j in range(4):
        low, high = x[j * groups : (j + 1) * groups], x[(j + 4) * groups : (j + 5) * groups]
        codes_low, codes_high = codes[j * groups : (j + 1) * groups], codes[(j + 4) * groups : (j + 5) * groups]
        inverse_low, inverse_high = inverses[j], inverses[j + 4]
        counter = np.uint32(first + j * groups)
        for i in range(groups):
            h = _hash(np.uint32(counter + np.uint32(i)), key0, key1)
            y = low[i] * inverse_low
            y = limit if y > limit else y
            y = bottom if y < bottom else y
            fixed = np.int32(np.int32(y + offset) & mask)
            codes_low[i] = np.uint8(np.uint32(fixed + np.int32(h & np.uint32(0xFFFF))) >> np.uint32(16))
            z = high[i] * inverse_high
            z = limit if z > limit else z
            z = bottom if z < bottom else z
            fixed = np.int32(np.int32(z + offset) & mask)
            codes_high[i] = np.uint8(np.uint32(fixed + np.int32(np.uint32(h >> np.uint32(16)))) >> np.uint32(16))


@njit(nogil=True, cache=True)
def _pack(codes, out, bits):  # type: ignore[no-untyped-def]
    """8 runs of codes into `bits` planes of bytes; one loop a plane, so that few pointers need a check for overlap."""
    n = codes.size // 8
    if bits == 8:
        for i in range(codes.size):
            out[i] = codes[i]
    elif bits == 4:
        for p in range(4):
            c0, c1, plane = (
                codes[2 * p * n : (2 * p + 1) * n],
                codes[(2 * p + 1) * n : (2 * p + 2) * n],
                out[p * n : (p + 1) * n],
            )
            for g in range(n):
                plane[g] = np.uint8(c0[g] | np.uint8(c1[g] << 4))
    elif bits == 2:
        for p in range(2):
            at = 4 * p * n
            c0, c1, c2, c3 = (
                codes[at : at + n],
                codes[at + n : at + 2 * n],
                codes[at + 2 * n : at + 3 * n],
                codes[at + 3 * n : at + 4 * n],
            )
            plane = out[p * n : (p + 1) * n]
            for g in range(n):
                plane[g] = np.uint8(c0[g] | np.uint8(c1[g] << 2) | np.uint8(c2[g] << 4) | np.uint8(c3[g] << 6))
    else:
        c0, c1, c2, c3 = codes[:n], codes[n : 2 * n], codes[2 * n : 3 * n], codes[3 * n : 4 * n]
        c4, c5, c6, c7 = codes[4 * n : 5 * n], codes[5 * n : 6 * n], codes[6 * n : 7 * n], codes[7 * n :]
        plane = out[:n]
        for g in range(n):
            plane[g] = np.uint8(c0[g] | np.uint8(c1[g] << 3) | np.uint8(c2[g] << 6))
        plane = out[n : 2 * n]
        for g in range(n):
            plane[g] = np.uint8(
                np.uint8(c2[g] >> 2) | np.uint8(c3[g] << 1) | np.uint8(c4[g] << 4) | np.uint8(c5[g] << 7)
            )
        plane = out[2 * n :]
        for g in range(n):
            plane[g] = np.uint8(np.uint8(c5[g] >> 1) | np.uint8(c6[g] << 2) | np.uint8(c7[g] << 5))


@njit(_i64(_f32, _i64_2d, _u32_2d, _u8, _i64, _i64, _f64), nogil=True, cache=True)
def encode_table(x, table, keys, out, span, bits, clip):  # type: ignore[no-untyped-def]
    """Quantizes x [elements] into out [bytes], segment by segment; returns the number of bytes written last."""
    k = _level_count(bits)
    limit = np.float32(k * 65536)
    grid = np.int32(_grid_of(bits))
    codes = np.empty(span, dtype=np.uint8)
    padded = np.empty(span, dtype=np.float32)
    scales = np.empty(8, dtype=np.float32)
    inverses = np.empty(8, dtype=np.float32)
    number = np.empty(1, dtype=np.float32)
    word = number.view(np.int32)
    end = 0
    for s in range(table.shape[0]):
        start, numel = table[s, 0], table[s, 1]
        end = table[s, 2] * bits + table[s, 3] * _SCALE_BYTES
        key0, key1 = keys[s, 0], keys[s, 1]
        for b in range((numel + span - 1) // span):
            begin = start + b * span
            length = min(span, start + numel - begin)
            groups = (length + 7) // 8
            if length == groups * 8:
                piece = x[begin : begin + length]
            else:
                piece = padded[: groups * 8]
                piece[:length] = x[begin : begin + length]
                piece[length:] = 0
            _find_scales(piece, piece.view(np.int32), clip, scales, number, word)
            out[end] = _encode_scales(scales, word, number, out[end + 1 : end + _SCALE_BYTES])
            mine = codes[: groups * 8]
            if out[end] == 255:
                mine[:] = k
            else:
                for j in range(8):
                    inverses[j] = limit / scales[j] if scales[j] > 0 else np.float32(0)
                first = (table[s, 4] + b) * (span // 2)
                _round_span(piece, mine, inverses, limit, grid, first, key0, key1)
            end += _SCALE_BYTES
            _pack(mine, out[end : end + groups * bits], bits)
            end += groups * bits
    return end


# Two loops, not one with a flag, so that neither has a branch inside.
@njit(nogil=True, cache=True)
def _unpack_add(codes, out, bits, k, steps):  # type: ignore[no-untyped-def]
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
            run[g] += np.float32(np.int32(np.int32(code & mask) - k)) * step


@njit(nogil=True, cache=True)
def _unpack(codes, out, bits, k, steps):  # type: ignore[no-untyped-def]
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
            run[g] = np.float32(np.int32(np.int32(code & mask) - k)) * step


@njit(types.void(_u8, _i64_2d, _f32, _i64, _i64, _f64, _bool), nogil=True, cache=True)
def decode_table(payload, table, out, span, bits, factor, add):  # type: ignore[no-untyped-def]
    """Writes (or adds, with `add`) the decoded values times `factor` into out [elements], segment by segment."""
    k = np.int32(_level_count(bits))
    number = np.empty(1, dtype=np.float32)
    word = number.view(np.int32)
    steps = np.empty(8, dtype=np.float32)
    padded = np.empty(span, dtype=np.float32)
    for s in range(table.shape[0]):
        start, numel = table[s, 0], table[s, 1]
        at = table[s, 2] * bits + table[s, 3] * _SCALE_BYTES
        for b in range((numel + span - 1) // span):
            begin = start + b * span
            length = min(span, start + numel - begin)
            groups = (length + 7) // 8
            word[0] = np.int32(payload[at]) << np.int32(23)
            base = np.float32(np.nan) if payload[at] == 255 else number[0]
            for j in range(8):
                scale = np.float32(base * _SCALES[payload[at + 1 + j]])
                steps[j] = np.float32(np.float32(scale / np.float32(k)) * np.float32(factor))
            at += _SCALE_BYTES
            codes = payload[at : at + groups * bits]
            if length < groups * 8:
                rest = padded[: groups * 8]
                _unpack(codes, rest, bits, k, steps)
                if add:
                    for i in range(length):
                        out[begin + i] += rest[i]
                else:
                    out[begin : begin + length] = rest[:length]
            elif add:
                _unpack_add(codes, out[begin : begin + length], bits, k, steps)
            else:
                _unpack(codes, out[begin : begin + length], bits, k, steps)
            at += groups * bits
