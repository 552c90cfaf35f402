"""Fields of bits and trits: lossless at every width and length, in the documented order, strict about the filling."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tenko.compression import bits

WIDTH = st.sampled_from(bits.WIDTHS)


@settings(max_examples=200, deadline=None)
@given(width=WIDTH, count=st.integers(0, 70), seed=st.integers(0, 2**32 - 1))
def test_fields_come_back_and_take_no_byte_too_many(width: int, count: int, seed: int) -> None:
    values = np.random.default_rng(seed).integers(0, 1 << width, count)
    data = bits.pack_bits(values, width)
    assert data.dtype == np.uint8
    assert data.size == bits.packed_bytes(count, width) == (count * width + 7) // 8
    assert np.array_equal(bits.unpack_bits(data, width, count), values)


@settings(max_examples=100, deadline=None)
@given(width=WIDTH, count=st.integers(0, 40), seed=st.integers(0, 2**32 - 1))
def test_the_bytes_are_one_little_endian_number(width: int, count: int, seed: int) -> None:
    values = np.random.default_rng(seed).integers(0, 1 << width, count)
    number = sum(int(value) << (width * place) for place, value in enumerate(values))
    assert bits.pack_bits(values, width).tobytes() == number.to_bytes(bits.packed_bytes(count, width), "little")


@settings(max_examples=200, deadline=None)
@given(count=st.integers(0, 60), seed=st.integers(0, 2**32 - 1))
def test_trits_come_back_five_a_byte_with_the_first_lowest(count: int, seed: int) -> None:
    values = np.random.default_rng(seed).integers(0, 3, count)
    data = bits.pack_trits(values)
    assert data.size == bits.trit_bytes(count) == (count + 4) // 5
    assert np.array_equal(bits.unpack_trits(data, count), values)
    by_hand = [sum(int(v) * 3**place for place, v in enumerate(values[i : i + 5])) for i in range(0, count, 5)]
    assert data.tolist() == by_hand


def test_a_mask_of_bools_packs_as_ones() -> None:
    assert bits.pack_bits(np.array([True, False, True, True, False, False, False, False, True]), 1).tolist() == [13, 1]


@pytest.mark.parametrize(
    ("count", "width"), [(1, 1), (2, 1), (3, 2), (16, 4), (17, 5), (256, 8), (257, 16), (65536, 16)]
)
def test_the_narrowest_width_is_chosen(count: int, width: int) -> None:
    assert bits.width_for(count) == width


@settings(max_examples=200, deadline=None)
@given(data=st.binary(max_size=12), width=WIDTH, count=st.integers(0, 70))
def test_foreign_bytes_are_refused_or_pack_to_themselves(data: bytes, width: int, count: int) -> None:
    given_bytes = np.frombuffer(data, dtype=np.uint8)
    for unpack, pack in (
        (lambda: bits.unpack_bits(given_bytes, width, count), lambda values: bits.pack_bits(values, width)),
        (lambda: bits.unpack_trits(given_bytes, count), bits.pack_trits),
    ):
        try:
            values = unpack()
        except ValueError:
            continue
        assert values.size == count
        assert pack(values).tobytes() == data


def test_each_fault_has_its_message() -> None:
    with pytest.raises(ValueError, match="has 2 bytes, not the 1 of 3 fields of 2 bits"):
        bits.unpack_bits(np.zeros(2, np.uint8), 2, 3)
    with pytest.raises(ValueError, match="bits after its last value are not zero"):
        bits.unpack_bits(np.array([64], np.uint8), 2, 3)
    with pytest.raises(ValueError, match="byte 243 holds no 5 trits"):
        bits.unpack_trits(np.array([243], np.uint8), 5)
    with pytest.raises(ValueError, match="bits after its last value are not zero"):
        bits.unpack_trits(np.array([3], np.uint8), 1)
    with pytest.raises(ValueError, match="has 0 bytes, not the 1 of 1 trits"):
        bits.unpack_trits(np.zeros(0, np.uint8), 1)
