"""Fused CPU kernels of the quantizer, in numba: one call for all tensors of a bucket, without the GIL.

Notable:
- A span is read once from memory, front to back, as the processor's prefetching wants it: the pass that finds the
  scales of its blocks leaves it in the first-level cache for the pass that rounds and packs it, eight runs side by
  side. With error feedback a span's residual is added, and later reduced, in place in that cache.
- The two passes are written in vectors of 16 lanes (`vectors.py`; `_scan`, `_round`): numba's own loops would cost half
  the speed at blocks of 128. Runs that are no multiple of 16 long (the last span of a tensor; odd blocks) go through a
  padded copy.
- The largest magnitude is found on the bit patterns, as integers: a result of 0x7f800000 or more says that the block
  holds an inf or a NaN.
- Two elements, half a span apart, share one 32-bit hash: 16 random bits each.
- The arithmetic, operation by operation, is `reference.py`'s; tests hold the two together bit for bit. Only sums run
  in another order.

numba's cache looks at this file alone: after a change of the constants in `reference.py`, change this file too (a test
fails otherwise). Importing this module compiles the kernels (about 11 seconds of processor time) or loads them from
numba's cache: import it late. A table is what `layout.py` makes: int64 [segments, 5], columns start, numel, groups
before, spans before, first span.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from .decode_kernels import add_codes, decode_table, pack_sums, sums_to_values
from .layout import SCALE_BYTES
from .reference import (
    HALF,
    HASH_A,
    HASH_B,
    MAX_PLAIN,
    MIN_PLAIN,
    MIN_SCALE,
    ONE_BIT_CENTRE,
    SCALES,
    grid_of,
    level_count,
)
from .vectors import FLOAT, I32, I64, LANES, Lanes, add_up, call, load, pointers, splat

__all__ = ["add_codes", "decode_table", "encode_table", "pack_sums", "sums_to_values"]

_INF_BITS = np.int32(0x7F800000)
_MIN_SCALE = MIN_SCALE
_SCALES = SCALES
_SCALE_BYTES = SCALE_BYTES
_MIN_PLAIN = MIN_PLAIN
_MAX_PLAIN = MAX_PLAIN
_ONE_BIT_CENTRE = ONE_BIT_CENTRE
_NEAREST = np.uint32(HALF << 16 | HALF)
_EIGHTHS = np.append(SCALES[1:8].view(np.int32) & 0x7FFFFF, 0).astype(np.int32)
"""Mantissas of 2^(-b/8), b = 1 to 8."""

_f32 = types.Array(types.float32, 1, "C")
_u8 = types.Array(types.uint8, 1, "C")
_u32_2d = types.Array(types.uint32, 2, "C")
_i64_1d = types.Array(types.int64, 1, "C")
_i64_2d = types.Array(types.int64, 2, "C")
_i64, _f64, _bool = types.int64, types.float64, types.boolean

_grid_of = njit(grid_of, inline="always")
_level_count = njit(level_count, inline="always")


def _scan_intrinsic(_typing, x, residual, feedback, mean, groups, largest, counts, sums):  # type: ignore[no-untyped-def]
    """Of the 8 runs of x [8 * groups] (groups a multiple of LANES): bits of the largest magnitude [8], how many are not
    zero [8], sum of squares, or of magnitudes if `mean` [8]. With `feedback`, of x + residual, which goes to residual.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        arrays = [0, 1, 5, 6, 7]
        data, left, largest, counts, sums = pointers(
            context, builder, [signature.args[a] for a in arrays], [arguments[a] for a in arrays]
        )
        feedback, mean, groups = arguments[2:5]
        for with_left in (False, True):
            for of_magnitudes in (False, True):
                wanted = builder.and_(
                    builder.icmp_unsigned("==", feedback, feedback.type(int(with_left))),
                    builder.icmp_unsigned("==", mean, mean.type(int(of_magnitudes))),
                )
                with builder.if_then(wanted), cgutils.for_range(builder, groups.type(8)) as run:
                    results = [builder.gep(array, [run.index]) for array in (largest, counts, sums)]
                    start = builder.mul(groups, run.index)
                    run_left = builder.gep(left, [start]) if with_left else None
                    _emit_scan(builder, builder.gep(data, [start]), run_left, of_magnitudes, groups, *results)
        return context.get_dummy_value()

    signature = types.void(x, residual, feedback, mean, groups, largest, counts, sums)
    return signature, generate


_scan: Any = intrinsic(_scan_intrinsic)


def _emit_scan(builder, data, left, of_magnitudes, groups, largest, count, sum_):  # type: ignore[no-untyped-def]
    vector, floats = ir.VectorType(I32, LANES), ir.VectorType(FLOAT, LANES)
    top, number, total = (cgutils.alloca_once(builder, kind) for kind in (vector, I32, floats))
    for zero, place in ((vector(None), top), (I32(0), number), (floats(None), total)):
        builder.store(zero, place)
    with cgutils.for_range_slice(builder, groups.type(0), groups, groups.type(LANES)) as (index, _):
        value = load(builder, builder.gep(data, [index]))
        if left is not None:
            value = load(builder, builder.gep(left, [index])) + value
            value.store(builder.gep(left, [index]))
        magnitude = value.bits() & 0x7FFFFFFF
        builder.store(Lanes(builder, builder.load(top)).larger(magnitude).value, top)
        mask = builder.icmp_signed("!=", magnitude.value, vector(None))
        ones = call(builder, "llvm.ctpop.i32", I32, builder.zext(builder.bitcast(mask, ir.IntType(LANES)), I32))
        builder.store(builder.add(builder.load(number), ones), number)
        term = magnitude.as_float() if of_magnitudes else value * value
        builder.store((Lanes(builder, builder.load(total)) + term).value, total)
    builder.store(call(builder, f"llvm.vector.reduce.smax.v{LANES}i32", I32, builder.load(top)), largest)
    builder.store(builder.load(number), count)
    builder.store(add_up(Lanes(builder, builder.load(total))), sum_)


def _round_intrinsic(  # type: ignore[no-untyped-def]
    _typing, x, inverses, steps, out, at, bits, groups, padded, first, key0, key1, random, centre, feedback
):
    """Rounds and packs a span x [8 * padded] (`padded` a multiple of LANES, the first `groups` of each run count for
    the counter of the hash) into planes of `padded` bytes from out[at] on.

    A hash becomes (hash & random) | centre. With `feedback`, x is left holding x + (r * steps), the steps negative.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        data, inverses, steps, out = pointers(context, builder, signature.args[:4], arguments[:4])
        at, bits, groups, padded, first, key0, key1, random, centre, feedback = arguments[4:]
        out = builder.gep(out, [at])
        constants = [splat(builder, value) for value in (key0, key1, random, centre)]
        first = builder.trunc(first, I32)
        for count in range(1, 9):
            for with_feedback in (False, True):
                wanted = builder.and_(
                    builder.icmp_signed("==", bits, bits.type(count)),
                    builder.icmp_unsigned("==", feedback, feedback.type(int(with_feedback))),
                )
                with builder.if_then(wanted):
                    _emit_round(
                        builder,
                        data,
                        inverses,
                        steps if with_feedback else None,
                        out,
                        count,
                        groups,
                        padded,
                        first,
                        constants,
                    )
        return context.get_dummy_value()

    signature = types.void(
        x, inverses, steps, out, at, bits, groups, padded, first, key0, key1, random, centre, feedback
    )
    return signature, generate


_round: Any = intrinsic(_round_intrinsic)


def _emit_round(builder, data, inverses, steps, out, bits, groups, padded, first, constants):  # type: ignore[no-untyped-def]
    key0, key1, random, centre = constants
    k, grid = level_count(bits), grid_of(bits)
    high = splat(builder, ir.Constant(FLOAT, float(k << 16)))
    low = splat(builder, ir.Constant(FLOAT, float(-(k << 16))))
    offset = splat(builder, ir.Constant(FLOAT, (k << 16) + 0.5 * grid))
    lane = Lanes(builder, ir.Constant(ir.VectorType(I32, LANES), list(range(LANES))))

    def broadcast(array: ir.Value, run: int) -> Lanes:
        return splat(builder, builder.load(builder.gep(array, [I64(run)])))

    scaling = [broadcast(inverses, run) for run in range(8)]
    backward = [broadcast(steps, run) for run in range(8)] if steps is not None else []
    short = builder.trunc(groups, I32)
    with cgutils.for_range_slice(builder, padded.type(0), padded, padded.type(LANES)) as (index, _):
        codes: list[Any] = [None] * 8
        for pair in range(4):
            hashed: Any = None
            if bits > 1:
                begin = builder.add(builder.add(first, builder.mul(short, I32(pair))), builder.trunc(index, I32))
                hashed = _emit_hash(splat(builder, begin) + lane, key0, key1) & random | centre
            for run in (pair, pair + 4):
                place = builder.gep(data, [builder.add(builder.mul(padded, padded.type(run)), index)])
                value = load(builder, place)
                y = value * scaling[run]
                if bits == 1:
                    positive = builder.fcmp_ordered(">=", y.value, ir.Constant(y.value.type, None))
                    codes[run] = Lanes(builder, builder.zext(positive, ir.VectorType(I32, LANES)))
                    level = codes[run] + codes[run] - 1
                else:
                    fixed = (y.clamped(low, high) + offset).to_int()
                    if grid > 1:
                        fixed = fixed & -grid
                    codes[run] = (fixed + ((hashed & 0xFFFF) if run == pair else (hashed >> 16))) >> 16
                    level = codes[run] - k
                if steps is not None:
                    (level.to_float() * backward[run] + value).store(place)
        for plane in range(bits):
            byte: Any = None
            for run in range(8):
                shift = run * bits - 8 * plane
                if -bits < shift < 8:
                    part = codes[run] << shift if shift >= 0 else codes[run] >> -shift
                    byte = part if byte is None else byte | part
            byte.store(builder.gep(out, [builder.add(builder.mul(padded, padded.type(plane)), index)]))


def _emit_hash(counter: Lanes, key0: Lanes, key1: Lanes) -> Lanes:
    """32 random bits from a counter and a 64-bit key."""
    h = counter ^ key0
    h = (h ^ (h >> 16)) * HASH_A
    h = ((h ^ (h >> 15)) ^ key1) * HASH_B
    return h ^ (h >> 16)


@njit(nogil=True, cache=True)
def _find_scales(x, groups, clip, limits, mean, largest, counts, sums, scales):  # type: ignore[no-untyped-def]
    """Writes the scales [8] of a span's blocks x [8 * groups], from what `_scan` wrote; NaN when one is not finite.

    `limits` [8] are c * sigma where sigma is not of the block; else empty.
    """
    numbers = largest.view(np.float32)
    for j in range(8):
        scale = numbers[j]
        if largest[j] >= _INF_BITS:
            scale = np.float32(np.nan)
        elif largest[j] > 0:
            plain = _MIN_PLAIN < scale < _MAX_PLAIN  # else squares in fp32 have left its range
            if mean:
                total = np.float64(sums[j])
                if not plain:
                    total = np.float64(0)
                    for i in range(j * groups, (j + 1) * groups):
                        total += abs(np.float64(x[i]))
                scale = np.float32(total / counts[j] * _ONE_BIT_CENTRE)
            elif limits.size > 0:
                if np.isfinite(limits[j]):
                    scale = min(scale, limits[j])
            elif clip > 0:
                if plain:
                    sigma = np.float32(math.sqrt(sums[j] / np.float32(counts[j])))
                else:
                    total = np.float64(0)
                    for i in range(j * groups, (j + 1) * groups):
                        total += np.float64(x[i]) * np.float64(x[i])
                    sigma = np.float32(math.sqrt(total / counts[j]))
                scale = min(scale, np.float32(clip) * sigma)
        scales[j] = np.float32(0) if scale < _MIN_SCALE else scale


@njit(nogil=True, cache=True)
def _encode_scales(scales, codes, number, q):  # type: ignore[no-untyped-def]
    """Writes the bytes q [8] of the scales of blocks [8], returns the span's exponent, and makes scales what they say.

    `number` [1] and `codes` (int32 [8]) are room to work in.
    """
    word, words = number.view(np.int32), scales.view(np.int32)
    largest = np.float32(0)
    for j in range(8):
        if np.isnan(scales[j]):
            q[:] = 255
            return 255
        largest = max(largest, scales[j])
    number[0] = largest
    exponent = min((word[0] >> 23) + (1 if word[0] & 0x7FFFFF else 0), 254)
    word[0] = exponent << 23
    base = number[0]
    if base == 0:
        q[:] = 255
        return exponent
    # The smallest of the 2^(-q/8) that is not below, relative to the span: octaves by the exponents' difference,
    # eighths by the mantissa.
    for j in range(8):
        codes[j] = np.int32(8) * np.int32(np.int32(exponent - 1) - np.int32(words[j] >> 23))
    for b in range(8):
        eighth = _EIGHTHS[b]
        for j in range(8):
            codes[j] += np.int32(np.int32(words[j] & np.int32(0x7FFFFF)) <= eighth)
    for j in range(8):
        code = min(max(codes[j], 0), 254)
        code = 255 if scales[j] == 0 else code
        q[j] = code
        scales[j] = base * _SCALES[code]
    return exponent


@njit(nogil=True, cache=True)
def _spread(values, padded, groups, stride):  # type: ignore[no-untyped-def]
    """8 runs of `groups` values, the last ones perhaps short, into runs of `stride`, zeros behind them."""
    padded[:] = 0
    for j in range(8):
        for i in range(min(groups, values.size - j * groups)):
            padded[j * stride + i] = values[j * groups + i]


@njit(nogil=True, cache=True)
def _gather(padded, values, groups, stride):  # type: ignore[no-untyped-def]
    """Inverse of `_spread`."""
    for j in range(8):
        for i in range(min(groups, values.size - j * groups)):
            values[j * groups + i] = padded[j * stride + i]


@njit(
    types.void(_f32, _f32, _i64_2d, _u32_2d, _u8, _u8, _f32, _i64_1d, _i64_1d, _i64, _i64, _f64, _bool),
    nogil=True,
    cache=True,
)
def encode_table(  # type: ignore[no-untyped-def]
    x, residual, table, keys, out, given, limits, limit_at, limit_rows, span, bits, clip, nearest
):
    """Quantizes x [elements] into out [bytes], segment by segment; 0 bits: scales alone, and residual only read.

    residual [elements] (empty: none), given [spans * 9] (empty: none) and limits with their places (empty: none) are
    those of `reference.encode_table`.
    """
    feedback, mean = residual.size > 0, bits == 1
    k = np.float32(_level_count(max(bits, 1)))
    limit = np.float32(k * np.float32(65536))
    random, centre = (np.uint32(0), _NEAREST) if nearest else (np.uint32(0xFFFFFFFF), np.uint32(0))
    room = (span // 8 + LANES - 1) // LANES * LANES
    padded, padded_left = np.empty(8 * room, dtype=np.float32), np.empty(8 * room, dtype=np.float32)
    planes = np.empty(8 * room, dtype=np.uint8)
    scales, inverses, steps = np.empty(8, np.float32), np.empty(8, np.float32), np.empty(8, np.float32)
    codes, number, sums = np.empty(8, np.int32), np.empty(1, np.float32), np.empty(8, np.float32)
    largest, counts = np.empty(8, np.int32), np.empty(8, np.int32)
    block_limits = np.empty(8 if limits.size > 0 else 0, np.float32)
    heads = np.empty(_SCALE_BYTES, np.uint8)
    word = number.view(np.int32)
    for s in range(table.shape[0]):
        start, numel = table[s, 0], table[s, 1]
        end = table[s, 2] * bits + (0 if given.size > 0 else table[s, 3] * _SCALE_BYTES)
        key0, key1 = keys[s, 0], keys[s, 1]
        for b in range((numel + span - 1) // span):
            begin = start + b * span
            length = min(span, start + numel - begin)
            groups = (length + 7) // 8
            whole = groups % LANES == 0 and length == groups * 8 and not (feedback and bits == 0)
            if whole:
                stride = groups
                piece, left = x[begin : begin + length], residual[begin : begin + length]
            else:
                stride = (groups + LANES - 1) // LANES * LANES
                piece, left = padded[: 8 * stride], padded_left[: 8 * stride]
                _spread(x[begin : begin + length], piece, groups, stride)
                if feedback:
                    _spread(residual[begin : begin + length], left, groups, stride)
            if given.size == 0 or feedback:
                _scan(piece, left, feedback, mean, stride, largest, counts, sums)
            if feedback:
                piece = left
            if given.size > 0:
                exponent = given[(table[s, 3] + b) * _SCALE_BYTES]
                word[0] = np.int32(exponent) << np.int32(23)
                for j in range(8):
                    scales[j] = number[0] * _SCALES[given[(table[s, 3] + b) * _SCALE_BYTES + 1 + j]]
            else:
                for j in range(block_limits.size):
                    element = table[s, 4] * span + min(b * span + j * groups, numel - 1)
                    block_limits[j] = limits[limit_at[s] + element // limit_rows[s]]
                _find_scales(piece, stride, clip, block_limits, mean, largest, counts, sums, scales)
                exponent = _encode_scales(scales, codes, number, heads)
                out[end] = exponent
                for j in range(8):
                    out[end + 1 + j] = heads[j]
                end += _SCALE_BYTES
                if bits == 0:
                    continue
            dead = exponent == 255
            if dead:  # codes of zeros, and a residual that is NaN throughout
                piece = padded[: 8 * stride]
                piece[:] = 0
            for j in range(8):
                inverses[j] = limit / scales[j] if scales[j] > 0 and not dead else np.float32(0)
                if feedback:
                    steps[j] = -(scales[j] / k)
            first = (table[s, 4] + b) * (span // 2)
            if whole:
                _round(
                    piece, inverses, steps, out, end, bits, groups, stride, first, key0, key1, random, centre, feedback
                )
            else:
                _round(
                    piece, inverses, steps, planes, 0, bits, groups, stride, first, key0, key1, random, centre, feedback
                )
                for plane in range(bits):
                    for i in range(groups):
                        out[end + plane * groups + i] = planes[plane * stride + i]
            if feedback and dead:
                residual[begin : begin + length] = np.nan
            elif feedback and not whole:
                _gather(piece, residual[begin : begin + length], groups, stride)
            end += groups * bits
