"""Each scheme's bytes: what is written reads back to the bit, in as few bytes as promised, at any shape."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tenko.compression import Packed
from tenko.compression.layout import LINEAR, Form, decode, encode, find_parts
from tenko.compression.schemes import decode_binary, decode_pq, dequantize

SHAPES = st.lists(st.integers(0, 7), min_size=1, max_size=3).map(tuple)


def roundtrip(tensor: Tensor, packed: Packed | None) -> tuple[Form, dict[str, Tensor], Tensor]:
    form, parts = encode(tensor, packed)
    found = find_parts("w", form, {form.key("w", part): value for part, value in parts.items()})
    return form, parts, decode("w", form, found)


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a.view(torch.int32), b.view(torch.int32))


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@settings(max_examples=150, deadline=None)
@given(
    scheme=st.sampled_from(sorted(LINEAR)),
    shape=SHAPES,
    per_row=st.booleans(),
    zeros=st.sampled_from([0.0, 0.5, 0.95, 1.0]),
    seed=st.integers(0, 1000),
)
def test_linear_codes_come_back(scheme: str, shape: tuple[int, ...], per_row: bool, zeros: float, seed: int) -> None:
    rng, limit = generator(seed), LINEAR[scheme]
    shape = (*shape[:-1], 40 * shape[-1])
    codes = torch.randint(-limit, limit + 1, shape, generator=rng, dtype=torch.int8)
    codes[torch.rand(shape, generator=rng) < zeros] = 0
    scale = torch.rand(shape[0] if per_row else 1, generator=rng)
    tensor = dequantize(codes, scale)
    form, parts, back = roundtrip(tensor, Packed(scheme, {"codes": codes, "scale": scale}))
    assert same_bits(back, tensor)
    assert set(parts) == {"codes", "scale"} | ({"mask"} if form.mask else set())
    bits = {"int8": 8, "int4": 4, "ternary": 1.6}[scheme]
    assert sum(p.nbytes for p in parts.values()) <= math.ceil(codes.numel() * bits / 8) + 4 * scale.numel()


@settings(max_examples=60, deadline=None)
@given(shape=SHAPES, per_row=st.booleans(), seed=st.integers(0, 1000))
def test_binary_codes_come_back_at_one_bit(shape: tuple[int, ...], per_row: bool, seed: int) -> None:
    rng = generator(seed)
    codes = torch.randint(0, 2, shape, generator=rng, dtype=torch.int8)
    levels = torch.randn(shape[0] if per_row else 1, 2, generator=rng)
    tensor = decode_binary(codes, levels)
    form, parts, back = roundtrip(tensor, Packed("binary", {"codes": codes, "levels": levels}))
    assert same_bits(back, tensor)
    assert not form.mask
    assert parts["codes"].nbytes == math.ceil(codes.numel() / 8)


@settings(max_examples=100, deadline=None)
@given(
    rows=st.integers(0, 5),
    blocks=st.integers(0, 9),
    block=st.sampled_from([1, 3, 8]),
    centroids=st.sampled_from([1, 2, 5, 16, 100, 256, 257, 1000]),
    kind=st.sampled_from(["float", "half", "int8", "int8 per centroid"]),
    seed=st.integers(0, 1000),
)
def test_product_quantization_comes_back(
    rows: int, blocks: int, block: int, centroids: int, kind: str, seed: int
) -> None:
    rng = generator(seed)
    shape = (rows, blocks * block)
    codes = torch.randint(0, centroids, (rows, blocks), generator=rng).to(
        torch.uint8 if centroids <= 256 else torch.int16
    )
    parts = {"codes": codes, "codebook": torch.randn(centroids, block, generator=rng)}
    if kind == "half":
        parts["codebook"] = parts["codebook"].half()
    if kind.startswith("int8"):
        parts["codebook"] = torch.randint(-127, 128, (centroids, block), generator=rng, dtype=torch.int8)
        parts["scale"] = torch.rand(1 if kind == "int8" else centroids, generator=rng)
    tensor = decode_pq(codes, parts["codebook"], shape, parts.get("scale"))
    assert tensor.shape == shape
    scheme = "pq_int8" if kind.startswith("int8") else "pq"
    _, stored, back = roundtrip(tensor, Packed(scheme, parts))
    assert same_bits(back, tensor)
    width = 16 if centroids > 256 else max(1, math.ceil(math.log2(centroids)))
    assert stored["codes"].nbytes == math.ceil(codes.numel() * width / 8)
    assert stored["codebook"].dtype == parts["codebook"].dtype


@settings(max_examples=100, deadline=None)
@given(
    shape=st.lists(st.integers(0, 7), max_size=3).map(tuple),
    zeros=st.sampled_from([0.0, 0.3, 1.0]),
    half=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_dense_floats_come_back(shape: tuple[int, ...], zeros: float, half: bool, seed: int) -> None:
    rng = generator(seed)
    shape = (*shape[:-1], 30 * shape[-1]) if shape else ()
    tensor = torch.randn(shape, generator=rng)
    tensor = tensor.half().float() if half else tensor
    tensor = tensor.masked_fill(torch.rand(shape, generator=rng) < zeros, 0.0)
    form, parts, back = roundtrip(tensor, None)
    assert same_bits(back, tensor)
    main = parts["values"]
    assert main.dtype == (torch.float16 if half or not bool(tensor.any()) else torch.float32)
    if form.mask:
        assert main.numel() == int((tensor != 0).sum())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e-30, 70000.0, 1 / 3])
def test_a_float_that_fp16_can_not_hold_keeps_its_bits(value: float) -> None:
    tensor = torch.tensor([1.0, value, -0.0])
    _, parts, back = roundtrip(tensor, None)
    assert same_bits(back, tensor)
    assert parts["values"].dtype == (torch.float16 if value == float("inf") else torch.float32)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.bool])
def test_dense_integers_stay_as_they_are(dtype: torch.dtype) -> None:
    tensor = torch.zeros(4000, dtype=dtype)
    form, _, back = roundtrip(tensor, None)
    assert not form.mask
    assert back.dtype == dtype
    assert torch.equal(back, tensor)


# Bytes with a mask: n/8, and what is left of the plain bytes. It pays above 1/8, 1/4 and 3/8 of zeros.
@pytest.mark.parametrize(("scheme", "bits", "left"), [("int8", 8, 8), ("int4", 4, 4), ("ternary", 1.6, 1)])
def test_the_smaller_of_plain_and_masked_is_stored(scheme: str, bits: float, left: int) -> None:
    n, limit = 40_000, LINEAR[scheme]
    threshold = (bits - 1) / left
    for kept, masked in ((threshold - 0.05, True), (threshold + 0.05, False)):
        codes = torch.full((1, n), limit, dtype=torch.int8)
        codes[:, int(kept * n) :] = 0
        packed = Packed(scheme, {"codes": codes, "scale": torch.ones(1)})
        form, parts, _ = roundtrip(dequantize(codes, torch.ones(1)), packed)
        assert form.mask is masked
        total = sum(p.nbytes for p in parts.values()) - 4
        assert total == (n / 8 + int(kept * n) * left / 8 if masked else n * bits / 8)


def test_dense_weights_are_masked_above_a_thirtysecond_of_zeros_and_lose_no_bit() -> None:
    tensor = torch.randn(100, 100, generator=generator(0))
    tensor[:, :50] = 0
    form, parts, back = roundtrip(tensor, None)
    assert form.mask
    assert same_bits(back, tensor)
    assert sum(p.nbytes for p in parts.values()) == 10_000 / 8 + 4 * 5_000


def test_small_tensors_get_no_mask_that_costs_more_than_it_saves() -> None:
    assert not encode(torch.tensor([1.0 / 3] + [0.0] * 20), None)[0].mask
    assert encode(torch.tensor([1.0 / 3] + [0.0] * 60), None)[0].mask


def test_zeros_of_either_sign_are_dropped_under_a_mask() -> None:
    tensor = torch.full((1000,), -0.0)
    tensor[7] = 1 / 3
    form, _, back = roundtrip(tensor, None)
    assert form.mask
    assert torch.equal(back, tensor)


def test_the_documented_bytes_are_the_stored_ones() -> None:
    scale = torch.ones(1)

    def stored(scheme: str, codes: list[int], **parts: Tensor) -> dict[str, list[int]]:
        packed = Packed(scheme, {"codes": torch.tensor([codes], dtype=torch.int8), **parts})
        return {key: value.tolist() for key, value in encode(torch.empty(1, len(codes)), packed)[1].items()}

    assert stored("int4", [1, -1, 7, -7, 2], scale=scale)["codes"] == [0xF1, 0x97, 0x02]
    assert stored("ternary", [1, -1, 0, 0, -1, 1], scale=scale)["codes"] == [1 + 2 * 3 + 2 * 81, 1]
    assert stored("binary", [1, 0, 1, 1, 0, 0, 0, 0, 1], levels=torch.ones(1, 2))["codes"] == [0b1101, 1]
    sparse = stored("ternary", [0] * 1000 + [1, -1, -1] + [0] * 1000, scale=scale)
    assert sparse["mask"][125] == 0b111
    assert sum(sparse["mask"]) == 0b111
    assert sparse["codes"] == [0b110]
    nibbles = stored("int4", [0] * 1000 + [5, -2, 3], scale=scale)
    assert nibbles["mask"] == [0] * 125 + [0b111]
    assert nibbles["codes"] == [0xE5, 0x03]
    pq = {"codes": torch.tensor([[0, 1, 2, 1]], dtype=torch.uint8), "codebook": torch.tensor([[1.0], [2.0], [3.0]])}
    assert encode(torch.empty(1, 4), Packed("pq", pq))[1]["codes"].tolist() == [0b01_10_01_00]


def test_a_codebook_of_fp16_numbers_takes_two_bytes_each() -> None:
    codebook = torch.randn(16, 8, generator=generator(1)).half()
    codes = torch.zeros(4, 2, dtype=torch.uint8)
    for given_codebook in (codebook, codebook.float()):
        form, parts = encode(
            decode_pq(codes, codebook, (4, 16)), Packed("pq", {"codes": codes, "codebook": given_codebook})
        )
        assert parts["codebook"].dtype == torch.float16
        assert form == Form("pq", (4, 16))
