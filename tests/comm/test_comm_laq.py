"""LAQ: the paper's objective really falls to where it should, and the bytes say what the solver chose."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tenko.comm import laq, laq_kernels
from tenko.comm.laq import WeightQuantizer, solve, values
from tenko.comm.layout import Cut, Shard, single

BITS = st.integers(2, 8)


def gaussian(numel: int, seed: int) -> tuple[Tensor, Tensor]:
    """Weights, and second moments that differ by orders of magnitude."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(numel, generator=generator), torch.randn(numel, generator=generator).exp() * 1e-6


def weighted_error(w: Tensor, d: Tensor, quantized: Tensor) -> float:
    w, d, quantized = w.double(), d.double(), quantized.double()
    return float((d * (quantized - w).square()).sum() / (d * w.square()).sum())


def shard_of(numels: list[int], span: int = 64) -> Shard:
    starts = np.cumsum([0, *numels[:-1]]).tolist()
    return Cut(numels, span, 1, [1] * len(numels)).shard(range(len(numels)), starts, 0)


def through_the_wire(w: Tensor, v: Tensor, quantizer: WeightQuantizer, shard: Shard | None = None) -> Tensor:
    part = quantizer.layout(single(w.numel(), quantizer.span) if shard is None else shard)
    payload = torch.empty(quantizer.size(part), dtype=torch.uint8)
    quantizer.encode(w, v, part, payload)
    out = torch.full_like(w, torch.inf)
    quantizer.decode(payload, part, out)
    return out


def test_exact_alpha_has_the_published_error_and_the_papers_code_eight_times_it() -> None:
    exact, converged, paper, ours = [], [], [], []
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        w, d = torch.randn(1000, generator=generator), torch.rand(1000, generator=generator)
        for errors, how in (
            (exact, {"starts": 1, "alternations": 10}),
            (converged, {"starts": 1, "alternations": 200}),
            (ours, {}),
        ):
            errors.append(weighted_error(w, d, values(*solve(w, d, 4, **how), 4)))
        alpha = w.abs().max()
        for _ in range(10):
            b = (w / alpha).clamp(-1, 1).mul(7).round() / 7
            alpha = (b * d * w).abs().sum() / (b * d).abs().sum()
        paper.append(weighted_error(w, d, alpha * (w / alpha).clamp(-1, 1).mul(7).round() / 7))
    assert np.mean(exact) == pytest.approx(0.0154, rel=0.03)
    assert np.mean(converged) == pytest.approx(0.0132, rel=0.03)
    assert np.mean(paper) == pytest.approx(0.122, rel=0.03)
    assert np.mean(ours) <= np.mean(converged), "a few starts find what 200 alternations of one find"


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 700), BITS, st.integers(0, 1000), st.booleans())
def test_objective_never_rises_over_alternations(numel: int, bits: int, seed: int, importance: bool) -> None:
    w, v = gaussian(numel, seed)
    d = v.sqrt() if importance else torch.ones_like(w)
    errors = [
        weighted_error(w, d, values(*solve(w, d, bits, starts=1, alternations=turns), bits)) for turns in range(1, 12)
    ]
    assert (np.diff(errors) <= 1e-6).all(), errors


@pytest.mark.parametrize("bits", range(2, 9))
def test_weights_on_levels_are_exact(bits: int) -> None:
    n = 2 ** (bits - 1) - 1
    q = torch.randint(-n, n + 1, (3, 104), generator=torch.Generator().manual_seed(bits))
    q[:, ::13] = n  # in every block, whether it is a row or an 8th of one
    alpha = torch.tensor([0.5, 3.0, 1e-6])
    w = q * (alpha / n).unsqueeze(1)
    found, levels = solve(w, None, bits, block=104)
    torch.testing.assert_close(found, alpha)
    assert torch.equal(levels, q.to(torch.int8))
    for row in w:
        out = through_the_wire(row, torch.rand(104), WeightQuantizer(bits, 16))
        torch.testing.assert_close(out, row, rtol=2**-9, atol=0)


def test_important_weights_are_kept_better() -> None:
    w, v = gaussian(256, 5)
    v[::4] *= 1e6
    error = (through_the_wire(w, v, WeightQuantizer(2, 256)) - w).square()
    blind = (through_the_wire(w, torch.zeros_like(v), WeightQuantizer(2, 256)) - w).square()
    assert error[::4].sum() < 0.9 * blind[::4].sum()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 700), min_size=1, max_size=4), BITS, st.sampled_from([8, 16, 64]), st.integers(0, 1000))
def test_kernel_agrees_with_plain_torch(numels: list[int], bits: int, block: int, seed: int) -> None:
    w, v = gaussian(sum(numels), seed)
    v[torch.rand(v.shape, generator=torch.Generator().manual_seed(seed)) < 0.2] = 0
    quantizer = WeightQuantizer(bits, block)
    part = quantizer.layout(shard_of(numels))
    fast, plain = (torch.zeros(quantizer.size(part), dtype=torch.uint8) for _ in range(2))
    quantizer.encode(w, v, part, fast)
    laq.encode_table(w, v, part.table, plain, quantizer.span, bits)
    decoded, also = torch.empty_like(w), torch.empty_like(w)
    quantizer.decode(fast, part, decoded)
    laq.decode_table(fast, part.table, also, quantizer.span, bits)
    assert torch.equal(decoded, also)
    laq.decode_table(plain, part.table, also, quantizer.span, bits)
    d = v.sqrt() + laq.EPSILON
    # The order of summation may choose another of two starts that are nearly as good.
    assert weighted_error(w, d, decoded) <= 1.02 * weighted_error(w, d, also) + 1e-6


def test_kernel_and_plain_torch_write_nearly_the_same_bytes() -> None:
    w, v = gaussian(100_000, 9)
    quantizer = WeightQuantizer(4, 256)
    part = quantizer.layout(single(w.numel(), 1024))
    fast, plain = (torch.zeros(quantizer.size(part), dtype=torch.uint8) for _ in range(2))
    quantizer.encode(w, v, part, fast)
    laq.encode_table(w, v, part.table, plain, quantizer.span, 4)
    assert (fast != plain).float().mean() < 0.01


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 3000), BITS, st.integers(0, 100))
def test_solver_agrees_with_plain_torch_and_a_start_never_harms(numel: int, bits: int, seed: int) -> None:
    w, v = gaussian(numel, seed)
    d, blocks = v.sqrt(), -(-numel // 128)
    alpha, levels = solve(w, d, bits, block=128)
    rows, weights = (
        torch.nn.functional.pad(x, (0, blocks * 128 - numel)).view(blocks, 128) for x in (w, d)
    )  # fmt: skip
    plain = laq.search(rows, weights, bits, tolerance=0.0)
    quantized = laq.nearest(rows, plain, bits).flatten()[:numel]
    ours, theirs = (
        weighted_error(w, d, values(a, q, bits, block=128)) for a, q in ((alpha, levels), (plain, quantized))
    )
    assert ours <= 1.02 * theirs + 1e-6
    assert theirs <= 1.02 * ours + 1e-6
    again = solve(w, d, bits, block=128, start=alpha)
    assert weighted_error(w, d, values(*again, bits, block=128)) <= ours * (1 + 1e-5) + 1e-7


@pytest.mark.parametrize("numel", [1, 7, 8, 9, 63, 64, 65, 511, 512, 513, 1025])
@pytest.mark.parametrize("bits", [2, 3, 5, 8])
def test_odd_lengths_and_scattered_segments(numel: int, bits: int) -> None:
    w, v = gaussian(numel + 40, numel)
    quantizer = WeightQuantizer(bits, 64)
    whole = shard_of([numel, 40])
    table = whole.table.copy()
    table[:, 0] = [40, 0]  # the second tensor lies first
    scattered = Shard(table, whole.tensors, whole.rows, whole.numel, whole.groups, whole.spans)
    moved = [torch.cat([x[numel:], x[:numel]]) for x in (w, v)]
    straight, other = through_the_wire(w, v, quantizer, whole), through_the_wire(*moved, quantizer, scattered)
    assert torch.equal(torch.cat([other[40:], other[:40]]), straight)
    assert weighted_error(w, v.sqrt(), straight) < {2: 0.35, 3: 0.1, 5: 0.01, 8: 1e-4}[bits]


def test_threads_write_the_same_bytes() -> None:
    w, v = gaussian(300_001, 12)
    quantizer = WeightQuantizer(3, 64)
    part = quantizer.layout(shard_of([200_001, 100_000]))
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            payload = torch.zeros(quantizer.size(part), dtype=torch.uint8)
            quantizer.encode(w, v, part, payload)
            out = torch.full_like(w, torch.nan)
            quantizer.decode(payload, part, out)
            results.append((payload, out))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


def test_payload_is_thin() -> None:
    quantizer = WeightQuantizer(4)
    part = quantizer.layout(single(1_000_000, 1024))
    assert quantizer.size(part) * 8 / 1_000_000 == pytest.approx(4 + 0.0625, rel=1e-3)


def test_16_bit_alphas_cost_nothing() -> None:
    w, v = gaussian(50_000, 11)
    d = v.sqrt() + laq.EPSILON
    for bits in (2, 4, 8):
        # Blocks of the payload are runs of an 8th of a span: with 50,000 / 8 a run they are those of `solve`.
        sent = through_the_wire(w, v, WeightQuantizer(bits, 6256))
        kept = values(*solve(w, d, bits, block=6250, alternations=laq.ALTERNATIONS), bits, block=6250)
        assert weighted_error(w, d, sent) <= 1.02 * weighted_error(w, d, kept)


def test_zeros_stay_zero() -> None:
    w, v = gaussian(2048, 1)
    w[256:512] = 0
    w[512:768] = 1e-35
    out = through_the_wire(w, v, WeightQuantizer(3, 256))
    assert not out[256:768].any()
    assert out[:256].any()
    alpha, levels = solve(torch.zeros(10), None, 2)
    assert not alpha.any()
    assert not levels.any()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", ["w", "v"])
def test_a_block_that_is_not_finite_decodes_to_nan_alone(bad: float, where: str) -> None:
    w, v = gaussian(2048, 2)
    (w if where == "w" else v)[300] = abs(bad) if where == "v" else bad
    out = through_the_wire(w, v, WeightQuantizer(4, 256))
    assert out[256:512].isnan().all()
    assert torch.isfinite(out[:256]).all()
    assert torch.isfinite(out[512:]).all()
    with pytest.raises(ValueError, match=r"w: must be finite.*block 1 is not"):
        solve(w, v, 4, block=256)


def test_weights_of_any_size_survive() -> None:
    w, v = gaussian(2048, 6)
    for scale in (1e-28, 1e-12, 1e12, 3e37):
        for moment in (0.0, 1e-30, 1e30):
            out = through_the_wire(w / w.abs().max() * scale, v * moment, WeightQuantizer(4, 256))
            assert weighted_error(w / w.abs().max(), torch.ones_like(w), out / scale) < 0.1, (scale, moment)


def test_whole_tensor_of_ternary_weights_beats_every_alpha_of_a_grid() -> None:
    w, v = gaussian(20_000, 8)
    d = v.sqrt()
    found = weighted_error(w, d, values(*solve(w, d, 2), 2))
    for alpha in torch.linspace(0.1, 4, 200):
        q = laq.nearest(w.view(1, -1), alpha.view(1), 2)
        assert found <= weighted_error(w, d, alpha * q.flatten()) * (1 + 1e-3)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"bits": 1}, "bits: must be 2 to 8, is 1"),
        ({"bits": 9}, "bits: must be 2 to 8, is 9"),
        ({"block": -1}, "block: must be"),
        ({"starts": 0}, "starts, alternations: must be"),
        ({"d": torch.ones(3)}, "d: must be"),
        ({"d": -torch.ones(4)}, "d: must be"),
        ({"start": torch.ones(2)}, "start: must have"),
    ],
)
def test_wrong_settings_are_named(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        solve(**{"w": torch.ones(4), "d": None, "bits": 4, **wrong})  # type: ignore[arg-type]


@pytest.mark.parametrize(("bits", "block"), [(1, 8), (9, 8), (4, 12), (4, 0)])
def test_wrong_settings_of_a_shard_are_named(bits: int, block: int) -> None:
    with pytest.raises(ValueError, match="weight_"):
        WeightQuantizer(bits, block)


def test_kernels_share_the_constants_of_the_plain_version() -> None:
    for name in ("LAQ_BYTES", "MIN_WEIGHT", "SHRINK", "EPSILON"):
        assert getattr(laq_kernels, name) == getattr(laq, name)
