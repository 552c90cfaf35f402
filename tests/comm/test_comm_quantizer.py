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
BITS = st.integers(2, 8)


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


@pytest.mark.parametrize("bits", range(2, 9))
def test_rounding_is_unbiased(bits: int) -> None:
    """The largest of about 2,000 mean errors over 4,000 draws stays below 5.5 deviations (chance: under 1e-4), and so
    does the mean of their squares, a chi square, below 4 of its own."""
    quantizer = Quantizer(bits=bits, clip=2.0, block=512)
    x = gaussian(2048, 5)
    scale = scales_of(quantizer.encode(x, (3,)), x, quantizer)
    clipped = torch.clamp(x.double(), -scale, scale)
    level = scale / quantizer.levels
    position = (clipped / level).frac().abs()
    deviation = level * (position * (1 - position)).sqrt()  # of one rounding: Bernoulli
    draws = 2000 if bits > 4 else 4000
    error = torch.stack([quantizer.decode(quantizer.encode(x, (3, i)), 2048).double() for i in range(draws)]) - clipped
    some = position.mul(1 - position) > 0.02
    z = error.mean(dim=0)[some] / (deviation[some] / draws**0.5)
    assert z.abs().max() < 5.5
    assert abs(z.square().mean() - 1) < 4 * (2 / int(some.sum())) ** 0.5, (
        "mean errors are as large as chance makes them"
    )
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


@pytest.mark.parametrize("rounding", ["stochastic", "nearest"])
@pytest.mark.parametrize("bits", range(2, 9))
def test_values_on_a_level_stay_there(bits: int, rounding: str) -> None:
    quantizer = Quantizer(bits=bits, clip=0.0, block=128, rounding=rounding)  # type: ignore[arg-type]
    k = quantizer.levels
    for scale in (1.0, 0.25, 2.0**-14, 2.0**17):
        steps = torch.arange(-k, k + 1).repeat(400)[: 1024 * (400 * (2 * k + 1) // 1024)]
        steps[::128] = k  # every block has the scale itself
        x = steps.float() * (torch.tensor(scale) / k)
        for key in range(5):
            y = quantizer.decode(quantizer.encode(x, (key,)), x.numel())
            torch.testing.assert_close(y, x, rtol=3e-7, atol=0)


@pytest.mark.parametrize("kind", ["normal", "heavy"])
@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
def test_second_moment_is_inside_the_theorem(bits: int, kind: str) -> None:
    """E|Q(g)|^2 <= (sqrt(2/pi) * c / k + 1) * |g|^2 for a Gaussian g clipped at c sigma: Hou, Zhang & Kwok's factor,
    free of the dimension (k levels a side; scales here are up to 2^(1/8) above c sigma). Heavier tails are only clipped
    more.
    """
    clip, numel = 2.5, 1 << 16
    quantizer = Quantizer(bits=bits, clip=clip, block=256)
    x = gaussian(numel, 11)
    if kind == "heavy":
        x = x / gaussian(numel, 12).abs().clamp(min=0.05)
    factor = (2 / torch.pi) ** 0.5 * clip * 2 ** (1 / 8) / quantizer.levels + 1
    moments = [quantizer.decode(quantizer.encode(x, (i,)), numel).double().square().sum() for i in range(20)]
    assert torch.stack(moments).mean() <= factor * x.double().square().sum()


@settings(max_examples=100, deadline=None)
@given(
    LENGTHS,
    BITS,
    st.sampled_from([0.0, 2.5]),
    st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    st.integers(0, 2**40),
)
def test_nearest_rounding_is_off_by_half_a_level_at_most(
    numel: int, bits: int, clip: float, dtype: torch.dtype, seed: int
) -> None:
    quantizer = Quantizer(bits=bits, clip=clip, block=256, rounding="nearest")
    x = gaussian(numel, seed).to(dtype)
    payload = quantizer.encode(x, (seed,))
    assert torch.equal(payload, quantizer.encode(x, (seed + 1,))), "no randomness"
    scale = scales_of(payload, x.float(), quantizer)
    error = quantizer.decode(payload, numel).double() - torch.clamp(x.double(), -scale, scale)
    half = 0.5 + reference.grid_of(bits) / 65536
    assert (error.abs() <= half * scale / quantizer.levels * (1 + 1e-5)).all()


@settings(max_examples=100, deadline=None)
@given(LENGTHS, st.sampled_from([torch.float32, torch.float16, torch.bfloat16]), st.booleans(), st.integers(0, 2**40))
def test_one_bit_is_the_sign_times_the_mean_magnitude(numel: int, dtype: torch.dtype, sparse: bool, seed: int) -> None:
    """Over what is not zero, to half an eighth of an octave; blocks of zeros stay zero."""
    quantizer = Quantizer(bits=1, block=64)
    x = gaussian(numel, seed).to(dtype)
    if sparse:
        x *= torch.rand(numel, generator=torch.Generator().manual_seed(seed)) < 0.02
    y = quantizer.decode(quantizer.encode(x, (seed,)), numel)
    assert torch.equal(y, quantizer.decode(quantizer.encode(x, (seed + 1,)), numel)), "no randomness"
    for begin in range(0, numel, 512):
        piece, decoded = x[begin : begin + 512].float(), y[begin : begin + 512]
        run = -(-piece.numel() // 8)
        for block, values in zip(piece.split(run), decoded.split(run), strict=True):
            if not block.any():
                assert not values.any()
                continue
            assert torch.equal(values.sign(), torch.where(block >= 0, 1.0, -1.0))
            mean = block[block != 0].double().abs().mean()
            assert (values.abs() / mean).log2().abs().max() <= 1 / 16 + 1e-5


def clipped_at(x: torch.Tensor, elements: torch.Tensor, clip: float) -> float:
    """c times sigma over some elements, zeros not counted."""
    chosen = x[elements].double()
    return clip * float(chosen[chosen != 0].square().mean().sqrt())


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(["row", "tensor"]),
    st.integers(1, 5),
    st.integers(1, 200),
    st.integers(1, 30),
    st.integers(0, 2**32),
)
def test_sigma_is_taken_over_rows_and_tensors(sigma: str, owners: int, row: int, rows: int, seed: int) -> None:
    """Of what is at hand: an owner has a run of spans, which begins and ends inside rows."""
    quantizer = Quantizer(bits=8, clip=1.5, block=8, sigma=sigma)  # type: ignore[arg-type]
    numels, starts = [rows * row, 333], [2, 2 + rows * row]
    part = layout.Cut(numels, quantizer.span, owners, [row, 0]).shard([0, 1], starts, 0)
    x = gaussian(sum(numels) + 2, seed) * torch.exp(gaussian(sum(numels) + 2, seed + 1))
    x *= torch.rand(len(x), generator=torch.Generator().manual_seed(seed)) < 0.8
    payload = torch.zeros(part.size(8), dtype=torch.uint8)
    quantizer.encode_shard(x, part, reference.key_words((seed,), part.tensors), payload)
    mine: list[list[int]] = [[], []]  # elements at hand of both tensors
    for tensor, (start, numel, *_) in zip(part.tensors, part.table.tolist(), strict=True):
        mine[tensor] += range(start, start + numel)
    for tensor, (start, numel, groups, spans, _) in zip(part.tensors, part.table.tolist(), strict=True):
        at = groups * 8 + spans * 9
        for begin in range(0, numel, quantizer.span):
            run = -(-min(quantizer.span, numel - begin) // 8)
            head = payload[at : at + 9].view(1, 9)
            said = reference.scale_values(head[:, 0], head[:, 1:]).flatten().double()
            for j, low in enumerate(range(begin, min(begin + 8 * run, numel), run)):
                block = x[start + low : start + min(low + run, numel)].double()
                scale = float(block.abs().max())
                if scale:
                    scope = torch.tensor(mine[tensor])
                    if sigma == "row" and tensor == 0:
                        of_row = (scope - starts[0]) // row
                        scope = scope[of_row == (start + low - starts[0]) // row]
                    scale = min(scale, clipped_at(x, scope, 1.5))
                near = scale > float(said.max()) * 2.0**-30
                assert scale * (1 - 1e-5) <= said[j]
                assert not near or said[j] <= scale * 2 ** (1 / 8) * (1 + 1e-5)
            at += 9 + 8 * run


@settings(max_examples=40, deadline=None)
@given(LENGTHS, st.integers(1, 8), st.integers(0, 2**40))
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


@pytest.mark.parametrize("bits", range(1, 9))
def test_bytes_are_near_the_bits(bits: int) -> None:
    numel = 1_000_003
    nominal = numel * bits / 8
    assert nominal <= Quantizer(bits=bits).size(numel) <= nominal * 1.03


def test_sparse_blocks_keep_their_energy() -> None:
    """Rows of an embedding without a word in the batch are zero; they must not tighten the clip."""
    x = gaussian(1 << 16, 1) * (torch.rand(1 << 16, generator=torch.Generator().manual_seed(2)) < 0.02)
    y = Quantizer(bits=8, clip=3.0).decode(Quantizer(bits=8, clip=3.0).encode(x, (1,)), x.numel())
    assert (y.square().sum() / x.square().sum()) > 0.95


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bad", [float("inf"), -float("inf"), float("nan")])
@pytest.mark.parametrize("sigma", ["block", "row", "tensor"])
@pytest.mark.parametrize("bits", range(1, 9))
def test_overflow_is_not_clamped_away(bits: int, sigma: str, bad: float, dtype: torch.dtype) -> None:
    quantizer = Quantizer(bits=bits, block=128, sigma=sigma)  # type: ignore[arg-type]
    x = gaussian(3000, 1).to(dtype)
    x[1500] = bad
    y = quantizer.decode(quantizer.encode(x, (1,)), 3000)
    assert y[1024:2048].isnan().all()
    assert y[:1024].isfinite().all()
    assert y[2048:].isfinite().all()
    assert y[2048:].any()


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
