"""What the quantizer promises: unbiased inside the clip, bounded, exact at zeros and levels, thin, loud about NaN."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tenko.comm import Quantizer, layout, reference

LENGTHS = st.one_of(st.sampled_from([0, 1, 7, 8, 9, 1023, 1024, 1025]), st.integers(0, 4000))
BITS = st.sampled_from([2, 3, 4, 8])


def gaussian(numel: int, seed: int) -> torch.Tensor:
    return torch.randn(numel, generator=torch.Generator().manual_seed(seed))


def scales_of(payload: torch.Tensor, x: torch.Tensor, quantizer: Quantizer) -> torch.Tensor:
    """Scale at every element [numel], as the payload says, checked against the definition."""
    result, at = torch.empty_like(x, dtype=torch.float64), 0
    for begin in range(0, x.numel(), quantizer.span):
        piece = x[begin : begin + quantizer.span].double()
        run = -(-piece.numel() // 8)  # a block
        head = payload[at : at + 9].view(1, 9)
        said = reference.scale_values(head[:, 0], head[:, 1:]).flatten().double()
        for i, block in enumerate(piece.split(run)):
            scale = block.abs().max()
            if quantizer.clip and block.any():
                scale = torch.minimum(scale, quantizer.clip * block[block != 0].square().mean().sqrt())
            assert scale * (1 - 1e-6) <= said[i] <= scale * 2 ** (1 / 8) * (1 + 1e-6), "rounded up, a little"
            result[begin + i * run : begin + i * run + block.numel()] = said[i]
        at += 9 + run * quantizer.bits
    return result


@settings(max_examples=100, deadline=None)
@given(
    LENGTHS,
    BITS,
    st.sampled_from([0.0, 2.5, 3.0]),
    st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    st.integers(0, 2**40),
)
def test_error_is_below_one_level_inside_the_clip(
    numel: int, bits: int, clip: float, dtype: torch.dtype, seed: int
) -> None:
    quantizer = Quantizer(bits=bits, clip=clip, block=256)
    x = gaussian(numel, seed).to(dtype)
    payload = quantizer.encode(x, (seed, 1))
    assert payload.dtype == torch.uint8
    assert payload.shape == (quantizer.size(numel),)
    y = quantizer.decode(payload, numel).double()
    scale = scales_of(payload, x.float(), quantizer)
    clipped = torch.clamp(x.double(), -scale, scale)
    assert ((y - clipped).abs() <= scale / quantizer.levels * (1 + 1e-5)).all()
    assert (y[x == 0] == 0).all()
    assert (y * x.double() >= 0).all(), "a sign never flips"


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_rounding_is_unbiased(bits: int) -> None:
    quantizer = Quantizer(bits=bits, clip=2.0, block=512)
    x = gaussian(2048, 5)
    scale = scales_of(quantizer.encode(x, (3,)), x, quantizer)
    clipped = torch.clamp(x.double(), -scale, scale)
    level = scale / quantizer.levels
    position = (clipped / level).frac().abs()
    deviation = level * (position * (1 - position)).sqrt()  # of one rounding: Bernoulli
    draws = 4000
    error = torch.stack([quantizer.decode(quantizer.encode(x, (3, i)), 2048).double() for i in range(draws)]) - clipped
    some = position.mul(1 - position) > 0.02
    z = error.mean(dim=0)[some] / (deviation[some] / draws**0.5)
    assert z.abs().max() < 5.5
    assert 0.85 < z.square().mean() < 1.15, "mean errors are as large as chance makes them"
    assert 0.95 < (error.std(dim=0)[some] / deviation[some]).mean() < 1.05


@pytest.mark.parametrize("probability", [0.5, 0.1])
def test_roundings_of_different_elements_and_keys_are_independent(probability: float) -> None:
    """Also those of elements half a span apart, which share a hash."""
    quantizer = Quantizer(bits=3, clip=0.0, block=256)
    level = 4.0 / 3
    x = torch.full((2048,), probability * level)
    x[::256] = 4.0  # the scale: a power of two is kept as it is
    rounded = torch.stack([quantizer.decode(quantizer.encode(x, (9, i)), 2048) for i in range(2000)])
    unit = ((rounded / level - probability) / (probability * (1 - probability)) ** 0.5).double()
    unit[:, ::256] = 0
    pairs = {lag: unit[:, :-lag] * unit[:, lag:] for lag in (1, 2, 16, 128, 256, 512, 1023, 1024, 1025)}
    pairs[-1] = unit[:-1] * unit[1:]  # one key to the next
    for lag, products in pairs.items():
        assert abs(products.mean()) * products.numel() ** 0.5 < 5, lag


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_values_on_a_level_stay_there(bits: int) -> None:
    quantizer = Quantizer(bits=bits, clip=0.0)
    k = quantizer.levels
    for scale in (1.0, 0.25, 2.0**-14, 2.0**17):
        steps = torch.arange(-k, k + 1).repeat(400)[: 1024 * (400 * (2 * k + 1) // 1024)]
        steps[::128] = k  # every block has the scale itself
        x = steps.float() * (torch.tensor(scale) / k)
        for key in range(5):
            y = quantizer.decode(quantizer.encode(x, (key,)), x.numel())
            torch.testing.assert_close(y, x, rtol=3e-7, atol=0)


@settings(max_examples=40, deadline=None)
@given(LENGTHS, BITS, st.integers(0, 2**40))
def test_decode_add_adds_what_decode_gives(numel: int, bits: int, seed: int) -> None:
    quantizer = Quantizer(bits=bits)
    payload = quantizer.encode(gaussian(numel, seed), (seed,))
    start = gaussian(numel, seed + 1)
    out = start.clone()
    assert quantizer.decode_add(payload, out) is out
    assert torch.equal(out, start + quantizer.decode(payload, numel))


def test_same_key_same_codes_other_key_other_codes() -> None:
    quantizer = Quantizer(bits=4)
    x = gaussian(5000, 0)
    one = quantizer.encode(x, (1, 2, 3))
    assert torch.equal(one, quantizer.encode(x, (1, 2, 3)))
    for other in ((1, 2, 4), (1, 3, 2), (1, 2), (1, 2, 3, 0), (-1, 2, 3)):
        assert (one != quantizer.encode(x, other)).float().mean() > 0.2, other


@settings(max_examples=150, deadline=None)
@given(
    LENGTHS,
    st.integers(1, 8),
    st.sampled_from(["stochastic", "nearest"]),
    st.sampled_from(["block", "row", "tensor"]),
    st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    st.sampled_from([8, 64, 128]),
    st.integers(0, 2**32),
)
def test_feedback_leaves_what_the_codes_miss(
    numel: int, bits: int, rounding: str, sigma: str, dtype: torch.dtype, block: int, seed: int
) -> None:
    """Bit for bit what adding, encoding and subtracting the decoded codes leave; elements outside stay untouched."""
    quantizer = Quantizer(bits=bits, rounding=rounding, sigma=sigma, block=block)  # type: ignore[arg-type]
    cut = layout.Cut([numel, 300], quantizer.span, 2, [60, 0])
    part = cut.shard([0, 1], [5, 5 + numel], 0)
    keys = reference.key_words((seed,), part.tensors)
    x, residual = gaussian(numel + 320, seed).to(dtype), gaussian(numel + 320, seed + 1)
    inside = torch.zeros(numel + 320, dtype=torch.bool)
    for start, count, *_ in part.table.tolist():
        inside[start : start + count] = True
    if numel > 2000:
        x[inside.nonzero()[100]] = float("inf")

    total = residual + x.float()
    expected, wanted = total.clone(), torch.zeros(part.size(bits), dtype=torch.uint8)
    quantizer.encode_shard(total, part, keys, wanted)
    quantizer.decode_shard(wanted, part, expected, factor=-1.0, add=True)
    codes, left, kept = torch.zeros_like(wanted), residual.clone(), x.clone()
    quantizer.encode_feedback(x, left, part, keys, codes)
    assert torch.equal(codes, wanted)
    assert torch.equal(left[~inside], residual[~inside])
    torch.testing.assert_close(left[inside], expected[inside], rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(x, kept, rtol=0, atol=0, equal_nan=True)
    if numel > 2000:
        assert left[inside.nonzero()[100]].isnan()


@pytest.mark.parametrize(("bits", "at_most"), [(2, 1.03), (3, 1.03), (4, 1.03), (8, 1.03)])
def test_bytes_are_near_the_bits(bits: int, at_most: float) -> None:
    numel = 1_000_003
    nominal = numel * bits / 8
    assert nominal <= Quantizer(bits=bits).size(numel) <= nominal * at_most


def test_sparse_blocks_keep_their_energy() -> None:
    """Rows of an embedding without a word in the batch are zero; they must not tighten the clip."""
    x = gaussian(1 << 16, 1) * (torch.rand(1 << 16, generator=torch.Generator().manual_seed(2)) < 0.02)
    y = Quantizer(bits=8, clip=3.0).decode(Quantizer(bits=8, clip=3.0).encode(x, (1,)), x.numel())
    assert (y.square().sum() / x.square().sum()) > 0.95


def test_overflow_is_not_clamped_away() -> None:
    x = gaussian(3000, 1)
    x[1500] = float("inf")
    y = Quantizer().decode(Quantizer().encode(x, (1,)), 3000)
    assert y[1024:2048].isnan().all()
    assert y[:1024].isfinite().all()
    assert y[2048:].isfinite().all()


@pytest.mark.parametrize(
    ("settings_", "words"),
    [
        ({"bits": 0}, "bits: must be 1 to 8, is 0"),
        ({"bits": 9}, "bits: must be 1 to 8, is 9"),
        ({"rounding": "up"}, "rounding: must be one of stochastic, nearest, is up"),
        ({"sigma": "bucket"}, "sigma: must be one of block, row, tensor, is bucket"),
        ({"clip": -1.0}, "clip: .*is -1.0"),
        ({"clip": float("nan")}, "clip: .*is nan"),
        ({"block": 12}, "block: must be a multiple of 8, or 0 for the default, is 12"),
        ({"block": -8}, "block: .*is -8"),
    ],
)
def test_bad_settings_are_named(settings_: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Quantizer(**settings_)


def test_bad_payload_and_key_are_named() -> None:
    quantizer = Quantizer()
    payload = quantizer.encode(gaussian(100, 0), (1,))
    with pytest.raises(ValueError, match=r"payload: 48 x torch.uint8, but 200 elements at 3 bits make 84"):
        quantizer.decode(payload, 200)
    with pytest.raises(ValueError, match="encode: wants a floating tensor"):
        quantizer.encode(torch.arange(10), (1,))
    with pytest.raises(ValueError, match="key of integers"):
        quantizer.encode(gaussian(10, 0), ())


def test_import_is_light() -> None:
    code = "import sys, tenko.comm; assert 'numba' not in sys.modules, 'numba was imported'"
    subprocess.run([sys.executable, "-c", code], check=True)
