"""Small unsigned integers as bytes: fields of 1 to 8 or of 16 bits, and five trits a byte.

Field i of width b takes the bits b*i to b*i + b - 1 of the bytes, read as one little-endian number; a trit is a digit
of base 3, the first the lowest. The last byte is filled up with zeros, and unpacking refuses anything else there, so
that equal values have equal bytes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

WIDTHS = (1, 2, 3, 4, 5, 6, 7, 8, 16)
TRITS = 5
"""Trits a byte: 3^5 = 243 of its 256 values are used, 1.6 bits a trit."""

Integers = NDArray[Any]
Bytes = NDArray[np.uint8]

_DIGITS = (np.arange(3**TRITS)[:, None] // 3 ** np.arange(TRITS) % 3).astype(np.uint8)  # [243, 5]


def width_for(count: int) -> int:
    """The narrowest field that tells `count` values apart, in bits; `count` is 1 to 65,536."""
    assert 1 <= count <= 1 << 16, count
    return next(width for width in WIDTHS if count <= 1 << width)


def packed_bytes(count: int, width: int) -> int:
    """Bytes that `count` fields of `width` bits take."""
    return -(-count * width // 8)


def trit_bytes(count: int) -> int:
    """Bytes that `count` trits take."""
    return -(-count // TRITS)


def pack_bits(values: Integers, width: int) -> Bytes:
    """The bytes of integers [n] in 0 to 2^width - 1.

    Args:
        values: [n]; a bool counts as 0 or 1.
        width: bits a field, of WIDTHS.
    """
    assert width in WIDTHS, width
    assert values.ndim == 1, values.shape
    if width == 16:
        return values.astype("<u2").view(np.uint8)
    if width == 8:
        return values.astype(np.uint8)
    groups = _grouped(values, 8)  # [n / 8, 8]: eight fields fill `width` bytes
    joined = np.zeros(len(groups), dtype="<u8")
    for place in range(8):
        joined |= groups[:, place].astype("<u8") << np.uint64(width * place)
    whole = joined.view(np.uint8).reshape(-1, 8)[:, :width]
    return np.ascontiguousarray(whole).reshape(-1)[: packed_bytes(values.size, width)]


def unpack_bits(data: Bytes, width: int, count: int) -> NDArray[np.uint8] | NDArray[np.uint16]:
    """`count` fields of `width` bits; uint8, or uint16 where the width is 16.

    Raises:
        ValueError: there are too few or too many bytes, or bits beyond the last field are set.
    """
    assert width in WIDTHS, width
    assert data.ndim == 1, data.shape
    _check_size(data, packed_bytes(count, width), f"{count} fields of {width} bits")
    if width == 16:
        return np.ascontiguousarray(data).view("<u2").astype(np.uint16)
    if width == 8:
        return data.copy()
    groups = -(-count // 8)
    whole = np.zeros((groups, width), dtype=np.uint8)
    whole.reshape(-1)[: data.size] = data
    wide = np.zeros((groups, 8), dtype=np.uint8)
    wide[:, :width] = whole
    joined = wide.reshape(-1).view("<u8")
    values = np.empty((groups, 8), dtype=np.uint8)
    for place in range(8):
        values[:, place] = (joined >> np.uint64(width * place)) & np.uint64((1 << width) - 1)
    return _without_filling(values.reshape(-1), count)


def pack_trits(values: Integers) -> Bytes:
    """The bytes of integers [n] in 0 to 2, five a byte."""
    assert values.ndim == 1, values.shape
    groups = _grouped(values, TRITS).astype(np.uint8)
    joined = np.zeros(len(groups), dtype=np.uint8)
    for place in range(TRITS):
        joined += groups[:, place] * np.uint8(3**place)
    return joined


def unpack_trits(data: Bytes, count: int) -> NDArray[np.uint8]:
    """`count` trits, uint8.

    Raises:
        ValueError: there are too few or too many bytes, one is 243 or more, or digits beyond the last trit are not 0.
    """
    _check_size(data, trit_bytes(count), f"{count} trits")
    if data.size and int(data.max()) >= len(_DIGITS):
        raise ValueError(f"byte {int(data.max())} holds no {TRITS} trits")
    return _without_filling(_DIGITS[data].reshape(-1), count)


def _grouped(values: Integers, size: int) -> Integers:
    filled = np.zeros(-(-values.size // size) * size, dtype=values.dtype)
    filled[: values.size] = values
    return filled.reshape(-1, size)


def _check_size(data: Bytes, wanted: int, what: str) -> None:
    if data.size != wanted:
        raise ValueError(f"has {data.size} bytes, not the {wanted} of {what}")


def _without_filling(values: NDArray[np.uint8], count: int) -> NDArray[np.uint8]:
    if values[count:].any():
        raise ValueError("the bits after its last value are not zero")
    return values[:count]
