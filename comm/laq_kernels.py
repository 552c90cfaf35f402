"""LAQ's CPU kernels in numba; what they compute is told in `laq.py`. They run without the GIL, one thread a call.

Notable:
- A block is scaled to magnitudes of at most 1, weights and importance alike, before anything is summed: no square
  leaves fp32, and the sums (in 16 lanes) only choose alpha. Codes agree with the plain version's for the same alpha.
- The order of those sums is written down (`vectors.py`). Left to numba's fast-math it was another one in code that was
  just compiled than in code from the cache: a run and its resumption then differed in the last bit.
- One pass over a block gives the best alpha for its levels and, by the same two sums, how good those levels are.
- Constants are `laq.py`'s. numba's cache looks at this file alone: after a change of one, change this file too.
- Shifts by a variable amount are written as products, then a constant shift: numba would widen them to 64 bits.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from .laq import EPSILON, LAQ_BYTES, MIN_WEIGHT, SHRINK
from .vectors import FLOAT, LANES, Lanes, add_up, load, pointers, splat

_CHUNK = 4096

_f32 = types.Array(types.float32, 1, "C")
_i8 = types.Array(types.int8, 1, "C")
_u8 = types.Array(types.uint8, 1, "C")
_i64_2d = types.Array(types.int64, 2, "C")
_i64 = types.int64


def _weighted_sums_intrinsic(_typing, w, d, first, count, scale, limit):  # type: ignore[no-untyped-def]
    """(sum D q w, sum D q^2) over w[first : first + count], count a multiple of LANES, q the levels -limit to limit
    that are nearest to w * scale."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        weights, importance = pointers(context, builder, signature.args[:2], arguments[:2])
        first, count, scale, limit = arguments[2:]
        factor, high, low = (splat(builder, value) for value in (scale, limit, builder.fneg(limit)))
        offset = splat(builder, builder.fadd(limit, FLOAT(0.5)))
        floats = ir.VectorType(FLOAT, LANES)
        above, below = (cgutils.alloca_once(builder, floats) for _ in range(2))
        builder.store(floats(None), above)
        builder.store(floats(None), below)
        with cgutils.for_range_slice(builder, first, builder.add(first, count), count.type(LANES)) as (index, _):
            value = load(builder, builder.gep(weights, [index]))
            level = ((value * factor).clamped(low, high) + offset).to_int().to_float() - high
            weighted = load(builder, builder.gep(importance, [index])) * level
            builder.store((Lanes(builder, builder.load(above)) + weighted * value).value, above)
            builder.store((Lanes(builder, builder.load(below)) + weighted * level).value, below)
        sums = [add_up(Lanes(builder, builder.load(total))) for total in (above, below)]
        return context.make_tuple(builder, signature.return_type, sums)

    return types.UniTuple(types.float32, 2)(w, d, first, count, scale, limit), generate


_weighted_sums: Any = intrinsic(_weighted_sums_intrinsic)


@njit(nogil=True, cache=True)
def _sums(w, d, alpha, n):  # type: ignore[no-untyped-def]
    """(sum D q w, sum D q^2) of the levels q that are nearest for an alpha; in fp64 beyond a chunk."""
    scale, limit = np.float32(n / alpha), np.float32(n)
    offset = np.float32(limit + np.float32(0.5))
    whole = w.size // LANES * LANES
    above = 0.0
    below = 0.0
    for at in range(0, whole, _CHUNK):
        a, b = _weighted_sums(w, d, at, min(_CHUNK, whole - at), scale, limit)
        above += a
        below += b
    for i in range(whole, w.size):
        y = w[i] * scale
        y = limit if y > limit else y
        y = -limit if y < -limit else y
        q = np.float32(np.int32(y + offset)) - limit
        weighted = d[i] * q
        above += weighted * w[i]
        below += weighted * q
    return above, below


@njit(nogil=True, cache=True)
def _search(w, d, n, start, starts, alternations, tolerance):  # type: ignore[no-untyped-def]
    """The best alpha found for w [elements] under d, both scaled to a largest magnitude of 1; 0 where d is 0.

    At the best alpha for levels q the objective is sum D w^2 - gain, gain = (sum D q w)^2 / sum D q^2.
    """
    best, best_gain = 0.0, -1.0
    if start > 0:
        above, below = _sums(w, d, start, n)
        if below > 0:
            best, best_gain = n * above / below, above * above / below
    trial, worse, highest = 1.0, 0, -1.0
    for _ in range(starts):
        above, below = _sums(w, d, trial, n)
        gain = above * above / below if below > 0 else 0.0
        if below > 0 and gain > best_gain:
            best, best_gain = n * above / below, gain
        worse = 0 if gain > highest else worse + 1
        highest = max(highest, gain)
        if worse == 2:
            break  # downhill: smaller starts clip ever more
        trial *= SHRINK
    if best == 0.0:
        return 0.0
    for _ in range(alternations - 1):  # the start's own pass was the first one
        above, below = _sums(w, d, best, n)
        gain = above * above / below if below > 0 else 0.0
        if gain <= best_gain * (1 + tolerance):
            break
        best, best_gain = n * above / below, gain
    return best


@njit(nogil=True, cache=True)
def _scaled(w, w_bits, d, d_bits, scaled_w, scaled_d, number, word):  # type: ignore[no-untyped-def]
    """Writes w / max |w| and d / max d; returns max |w|, NaN where a weight or an importance is not finite.

    `w_bits` and `d_bits` are the same numbers as integers, whose maxima vectorise; `word` and `number` are one number.
    """
    largest_bits = np.int32(0)
    heaviest_bits = np.int32(0)
    for i in range(w.size):
        largest_bits = max(largest_bits, np.int32(w_bits[i] & np.int32(0x7FFFFFFF)))
    for i in range(w.size):
        heaviest_bits = max(heaviest_bits, np.int32(d_bits[i] & np.int32(0x7FFFFFFF)))
    if largest_bits >= np.int32(0x7F800000) or heaviest_bits >= np.int32(0x7F800000):
        return np.float32(np.nan)
    word[0] = heaviest_bits
    heaviest = number[0]
    word[0] = largest_bits
    largest = number[0]
    if largest < MIN_WEIGHT or heaviest == 0:
        return np.float32(0)
    inverse_w, inverse_d = np.float32(1.0 / largest), np.float32(min(1.0 / heaviest, 3e38))
    for i in range(w.size):
        scaled_w[i] = w[i] * inverse_w
    for i in range(w.size):
        scaled_d[i] = d[i] * inverse_d
    return largest


@njit(nogil=True, cache=True)
def _importance(v, out):  # type: ignore[no-untyped-def]
    for i in range(v.size):
        out[i] = np.float32(math.sqrt(v[i])) + np.float32(EPSILON)


@njit(nogil=True, cache=True)
def _levels(w, alpha, n, q):  # type: ignore[no-untyped-def]
    """Writes the levels [elements] that are nearest to w, as codes q + n (uint8)."""
    limit = np.float32(n)
    offset = np.float32(limit + np.float32(0.5))
    scale = np.float32(limit / alpha)
    for i in range(w.size):
        y = w[i] * scale
        y = limit if y > limit else y
        y = -limit if y < -limit else y
        q[i] = np.uint8(np.int32(y + offset))


@njit(nogil=True, cache=True)
def solve_blocks(w, d, starts_of, alphas, levels, block, bits, starts, alternations):  # type: ignore[no-untyped-def]
    """Alpha of every block of w [elements], and int8 levels -n..n; an alpha is NaN where something is not finite."""
    n = (1 << (bits - 1)) - 1
    scaled_w, scaled_d = np.empty(block, dtype=np.float32), np.empty(block, dtype=np.float32)
    codes = np.empty(block, dtype=np.uint8)
    w_bits, d_bits = w.view(np.int32), d.view(np.int32)
    number = np.empty(1, dtype=np.float32)
    word = number.view(np.int32)
    for b in range(alphas.size):
        low, high = b * block, min((b + 1) * block, w.size)
        size = high - low
        largest = _scaled(
            w[low:high], w_bits[low:high], d[low:high], d_bits[low:high], scaled_w, scaled_d, number, word
        )
        alphas[b] = largest
        levels[low:high] = 0
        if not largest > 0:
            continue
        start = starts_of[b] / largest if starts_of.size else 0.0
        alpha = np.float32(_search(scaled_w[:size], scaled_d[:size], n, start, starts, alternations, 0.0) * largest)
        alphas[b] = alpha
        if alpha > 0:
            _levels(w[low:high], alpha, n, codes[:size])
            for i in range(size):
                levels[low + i] = np.int8(np.int32(codes[i]) - n)


@njit(nogil=True, cache=True)
def _pack(codes, out, bits):  # type: ignore[no-untyped-def]
    """8 runs of codes into `bits` planes of bytes; run j is the bits j*m .. j*m + m-1 of every group's word."""
    groups = codes.size // 8
    out[:] = 0
    for j in range(8):
        plane, shift = j * bits // 8, j * bits % 8
        factor = np.int32(1 << shift)
        run = codes[j * groups : (j + 1) * groups]
        first = out[plane * groups : (plane + 1) * groups]
        for g in range(groups):
            first[g] |= np.uint8(np.int32(np.int32(run[g]) * factor))
        if shift + bits > 8:
            second = out[(plane + 1) * groups : (plane + 2) * groups]
            for g in range(groups):
                second[g] |= np.uint8(np.int32(np.int32(run[g]) * factor) >> np.int32(8))


@njit(nogil=True, cache=True)
def _unpack(packed, out, bits, n, steps):  # type: ignore[no-untyped-def]
    """Values of a padded span: steps [8] times the levels."""
    groups = out.size // 8
    mask = np.int32((1 << bits) - 1)
    for j in range(8):
        plane, shift, step = j * bits // 8, j * bits % 8, steps[j]
        beyond = plane + 1 if shift + bits > 8 else plane
        first = packed[plane * groups : (plane + 1) * groups]
        second = packed[beyond * groups : (beyond + 1) * groups]
        factor = np.int32(1 << (8 - shift))
        run = out[j * groups : (j + 1) * groups]
        for g in range(groups):
            word = np.int32(np.int32(first[g]) | np.int32(np.int32(second[g]) * np.int32(256)))
            code = np.int32(np.int32(np.int32(word * factor) >> np.int32(8)) & mask)
            run[g] = np.float32(np.int32(code - n)) * step


@njit(types.void(_f32, _f32, _i64_2d, _u8, _i64, _i64, _i64, _i64, types.float64), nogil=True, cache=True)
def encode_table(w, v, table, out, span, bits, starts, alternations, tolerance):  # type: ignore[no-untyped-def]
    """Quantizes w [elements] under sqrt(v) into out [bytes], segment by segment of a table of layout.py."""
    n = (1 << (bits - 1)) - 1
    codes = np.empty(span, dtype=np.uint8)
    padded, importance = np.zeros(span, dtype=np.float32), np.zeros(span, dtype=np.float32)
    scaled_w, scaled_d = np.empty(span // 8, dtype=np.float32), np.empty(span // 8, dtype=np.float32)
    number = np.empty(1, dtype=np.float32)
    word = number.view(np.int32)
    w_bits, d_bits = padded.view(np.int32), importance.view(np.int32)
    for s in range(table.shape[0]):
        start, numel = table[s, 0], table[s, 1]
        at = table[s, 2] * bits + table[s, 3] * LAQ_BYTES
        for low in range(start, start + numel, span):
            length = min(span, start + numel - low)
            groups = (length + 7) // 8
            padded[:length] = w[low : low + length]
            _importance(v[low : low + length], importance)
            padded[length : groups * 8] = 0
            importance[length : groups * 8] = 0
            for j in range(8):
                first, stop = j * groups, (j + 1) * groups
                run = padded[first:stop]
                alpha = _scaled(
                    run,
                    w_bits[first:stop],
                    importance[first:stop],
                    d_bits[first:stop],
                    scaled_w,
                    scaled_d,
                    number,
                    word,
                )
                if alpha > 0:
                    found = _search(scaled_w[:groups], scaled_d[:groups], n, 0.0, starts, alternations, tolerance)
                    alpha = np.float32(found * alpha)
                number[0] = alpha
                half = min((word[0] + 0x4000) >> 15, 0xFEFF)
                if np.isnan(alpha):
                    half = 0xFFFF
                out[at + 2 * j] = half & 255
                out[at + 2 * j + 1] = half >> 8
                word[0] = np.uint32(half << 15)
                if number[0] > 0:
                    _levels(run, number[0], n, codes[first:stop])
                else:
                    codes[first:stop] = n
            at += LAQ_BYTES
            _pack(codes[: groups * 8], out[at : at + groups * bits], bits)
            at += groups * bits


@njit(types.void(_u8, _i64_2d, _f32, _i64, _i64), nogil=True, cache=True)
def decode_table(payload, table, out, span, bits):  # type: ignore[no-untyped-def]
    """Writes the weights of a payload into out [elements], segment by segment."""
    n = np.int32((1 << (bits - 1)) - 1)
    padded = np.empty(span, dtype=np.float32)
    steps = np.empty(8, dtype=np.float32)
    number = np.empty(1, dtype=np.float32)
    word = number.view(np.uint32)
    for s in range(table.shape[0]):
        start, numel = table[s, 0], table[s, 1]
        at = table[s, 2] * bits + table[s, 3] * LAQ_BYTES
        for low in range(start, start + numel, span):
            length = min(span, start + numel - low)
            groups = (length + 7) // 8
            for j in range(8):
                half = np.uint32(payload[at + 2 * j]) | (np.uint32(payload[at + 2 * j + 1]) << np.uint32(8))
                word[0] = half << np.uint32(15)
                steps[j] = np.float32(number[0] / np.float32(n))
            at += LAQ_BYTES
            _unpack(payload[at : at + groups * bits], padded[: groups * 8], bits, n, steps)
            out[low : low + length] = padded[:length]
            at += groups * bits
