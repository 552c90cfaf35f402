"""int8 and int4: codes as torch's and torchao's, errors bounded, zeros kept, the least squared error truly less."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tenko.compression.scalar import Granularity, Linear, decode
from tenko.compression.schemes import dequantize

GRANULARITIES: tuple[Granularity, ...] = ("channel", "tensor")


def uneven(rows: int, columns: int, seed: int = 0) -> Tensor:
    """Normal weights, each row of another magnitude."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator) * torch.rand(rows, 1, generator=generator)


@settings(max_examples=100, deadline=None)
@given(
    st.integers(0, 10_000),
    st.integers(-30, 30),
    st.sampled_from([(3, 5), (1, 1), (4, 2, 3), (7, 130)]),
    st.sampled_from([4, 8]),
    st.sampled_from(GRANULARITIES),
)
def test_error_is_at_most_half_a_scale(
    seed: int, exponent: int, shape: tuple[int, ...], bits: int, granularity: Granularity
) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 10.0**exponent
    packed = Linear(bits, granularity).quantize(weight)
    codes, scale = packed.parts["codes"], packed.parts["scale"]
    assert packed.scheme == f"int{bits}"
    assert (codes.dtype, codes.shape) == (torch.int8, weight.shape)
    assert scale.shape == (weight.shape[:1] if granularity == "channel" else (1,))
    rows = scale.numel()
    error = (decode(packed).double() - weight.double()).abs().reshape(rows, -1).amax(1)
    assert bool((error <= scale.double() / 2 * (1 + 1e-4)).all())  # 127 * 2**-24 of rounding in the quotient
    if exponent > -30:
        assert bool((codes.reshape(rows, -1).abs().amax(1) == 2 ** (bits - 1) - 1).all())


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_numerics_are_those_of_torchs_fake_quantization(bits: int, granularity: Granularity) -> None:
    n = 2 ** (bits - 1) - 1
    weight = uneven(70, 90)
    if granularity == "channel":
        scale = weight.abs().amax(1) / n
        zero = torch.zeros(70, dtype=torch.int32)
        wanted = torch.fake_quantize_per_channel_affine(weight, scale, zero, 0, -n, n)
    else:
        wanted = torch.fake_quantize_per_tensor_affine(weight, float(weight.abs().max() / n), 0, -n, n)
    packed = Linear(bits, granularity).quantize(weight)
    step = packed.parts["scale"].max()
    found = decode(packed)
    # torch multiplies by 1 / scale, so a weight in the middle of two codes may go the other way.
    assert float(((found - wanted).abs() > step * 1e-3).float().mean()) < 1e-3
    assert float((found - wanted).abs().max()) <= float(step) * 1.001


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_codes_and_scales_are_torchaos_to_the_bit(bits: int, granularity: Granularity) -> None:
    torchao = pytest.importorskip("torchao.quantization.quant_primitives")
    n = 2 ** (bits - 1) - 1
    weight = uneven(70, 90)
    block = (1, 90) if granularity == "channel" else (70, 90)
    limits = {"quant_min": -n, "quant_max": n}
    symmetric = torchao.MappingType.SYMMETRIC
    scale, zero = torchao.choose_qparams_affine(
        weight, symmetric, block, torch.int8, scale_dtype=torch.float32, **limits
    )
    codes = torchao.quantize_affine(weight, block, scale, zero, torch.int8, **limits)
    packed = Linear(bits, granularity).quantize(weight)
    assert torch.equal(packed.parts["scale"], scale.flatten())
    assert torch.equal(packed.parts["codes"], codes)
    assert torch.equal(decode(packed), torchao.dequantize_affine(codes, block, scale, zero, torch.int8, **limits))


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_mse_is_within_five_per_cent_of_the_best_clip_of_a_fine_grid(granularity: Granularity) -> None:
    weight = uneven(40, 500)
    rows = weight if granularity == "channel" else weight.reshape(1, -1)

    def error(scale: Tensor) -> Tensor:
        codes = torch.clamp(torch.round(rows / scale[:, None]), -7, 7)
        return (codes * scale[:, None] - rows).double().square().sum(1)

    largest = rows.abs().amax(1) / 7
    grid = torch.stack([error(largest * fraction) for fraction in torch.linspace(0.1, 1.0, 400)]).amin(0)
    packed = Linear(4, granularity, "mse").quantize(weight)
    found = error(packed.parts["scale"])
    assert bool((found <= grid * 1.05).all())  # a few starts, then downhill: not always the deepest hollow
    assert float(found.sum()) < float(error(largest).sum()) * 0.8
    assert packed.parts["codes"].abs().max() == 7
    assert torch.allclose(decode(packed).reshape(rows.shape).sub(rows).double().square().sum(1), found, rtol=1e-4)


@pytest.mark.parametrize("clip", ["max", "mse"])
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("bits", [4, 8])
def test_zeros_stay_zeros(bits: int, granularity: Granularity, clip: str) -> None:
    weight = uneven(20, 30)
    weight[weight.abs() < 0.2] = 0.0
    weight[3] = 0.0
    value = decode(Linear(bits, granularity, clip).quantize(weight))  # type: ignore[arg-type]
    assert not value[weight == 0].any()
    assert value[weight != 0].any()


def test_rows_of_zeros_and_of_tiny_values_become_zero() -> None:
    parts = Linear(8).quantize(torch.tensor([[0.0, -0.0], [1e-40, 3e-42], [1.0, -0.5]])).parts
    assert parts["scale"].tolist()[:2] == [0.0, 0.0]
    assert parts["codes"].tolist() == [[0, 0], [0, 0], [127, -64]]
    assert not dequantize(parts["codes"], parts["scale"])[:2].any()


@pytest.mark.parametrize("clip", ["max", "mse"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_does_not_become_finite(bad: float, clip: str) -> None:
    weight = uneven(4, 6)
    weight[1, 2] = bad
    value = decode(Linear(8, "channel", clip).quantize(weight))  # type: ignore[arg-type]
    assert not torch.isfinite(value[1]).all()
    assert bool(torch.isfinite(value[[0, 2, 3]]).all())
