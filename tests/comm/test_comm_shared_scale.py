"""Shared scales: the sum of all ranks' codes is exact, and the scales are the largest of every block."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tenko.comm import cpu, layout, reference
from tenko.comm.quantizer import Quantizer
from tenko.comm.shared_scale import SharedScale

SPAN = 128


def gaussian(numel: int, seed: int) -> torch.Tensor:
    return torch.randn(numel, generator=torch.Generator().manual_seed(seed))


def gradients(ranks: int, numel: int, seed: int) -> list[torch.Tensor]:
    """Of unlike magnitudes, with zeros."""
    found = []
    for rank in range(ranks):
        x = gaussian(numel, seed + rank) * 2.0 ** (3 * gaussian(1, seed + 77 * rank).item())
        x[: min(numel, 40)] = 0
        found.append(x * (gaussian(numel, seed + 100 + rank) > -1))
    return found


def make(bits: int, down: int, ranks: int, block: int = SPAN // 8, clip: float = 3.0) -> SharedScale:
    return SharedScale(Quantizer(bits, clip, block), Quantizer(down, clip, block), ranks)


def shards(numel: int, owners: int, owner: int) -> layout.Shard:
    return layout.Cut([numel, 200], SPAN, owners).shard([0, 1], [3, 3 + numel], owner)


def inside(part: layout.Shard, numel: int) -> torch.Tensor:
    """Which elements of a buffer a part has."""
    mask = torch.zeros(numel, dtype=torch.bool)
    for start, count, *_ in part.table.tolist():
        mask[start : start + count] = True
    return mask


def scale_of(heads: torch.Tensor) -> torch.Tensor:
    """The largest scale."""
    return reference.scale_values(heads.view(-1, 9)[:, 0], heads.view(-1, 9)[:, 1:]).max()


def summed(
    shared: SharedScale, part: layout.Shard, xs: list[torch.Tensor], residuals: list[torch.Tensor] | None, seed: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Merged scales, the owner's sums, and the sum of what each rank's codes decode to, fp64."""
    stacked = torch.zeros(len(xs), shared.scale_size(part), dtype=torch.uint8)
    for rank, x in enumerate(xs):
        shared.scales(x, part, stacked[rank], residuals[rank] if residuals else None)
    scales = shared.merge(stacked)
    sums, decoded = shared.sums(part), torch.zeros(xs[0].numel(), dtype=torch.float64)
    for rank, x in enumerate(xs):
        keys = reference.key_words((seed, rank), part.tensors)
        codes = torch.zeros(shared.up_size(part), dtype=torch.uint8)
        shared.encode(x, part, keys, scales, codes, residuals[rank] if residuals else None)
        shared.add(codes, part, sums, first=rank == 0)
        values = torch.zeros(x.numel())
        cpu.decode(codes, part.table, values, shared.up.span, shared.up.bits, 1.0, False, given=scales)
        decoded += values.double()
    return scales, sums, decoded


@settings(max_examples=100, deadline=None)
@given(
    st.integers(1, 2000),
    st.integers(2, 6),
    st.integers(2, 8),
    st.integers(1, 5),
    st.integers(1, 2),
    st.booleans(),
    st.integers(0, 2**32),
)
def test_the_mean_is_that_of_the_decoded_codes(
    numel: int, bits: int, down: int, ranks: int, owners: int, feedback: bool, seed: int
) -> None:
    """Exactly, where the bits hold the sums; else as far off as one more quantization is."""
    shared = make(bits, down, ranks)
    part = shards(numel, owners, owners - 1)
    xs = gradients(ranks, numel + 203, seed)
    residuals = [gaussian(numel + 203, seed + 50 + rank) for rank in range(ranks)]
    before = [residual.clone() for residual in residuals]
    scales, sums, decoded = summed(shared, part, xs, residuals if feedback else None, seed)
    inner = inside(part, numel + 203)
    if feedback:
        left = sum((residual.double() for residual in residuals), torch.zeros(1))
        due = sum((x.double() + r.double() for x, r in zip(xs, before, strict=True)), torch.zeros(1))
        torch.testing.assert_close(left[inner], (due - decoded)[inner], rtol=0, atol=1e-6 * float(due.abs().max()))
        assert all(torch.equal(r[~inner], b[~inner]) for r, b in zip(residuals, before, strict=True))

    payload = torch.zeros(shared.down_size(part), dtype=torch.uint8)
    shared.encode_sums(sums, part, scales, reference.key_words((seed, 99), part.tensors), payload)
    mean = torch.full((numel + 203,), 5.0)
    shared.decode_sums(payload, part, scales, mean)
    assert (mean[~inner] == 5.0).all(), "elements of others are left alone"
    values, compact = torch.zeros(part.numel), part.compact()
    cpu.sums_to_values(sums, scales, compact.table, values, SPAN, shared.levels)
    close = {"rtol": 1e-6, "atol": 1e-7 * float(scale_of(scales))}
    torch.testing.assert_close(values.double(), decoded[inner] / ranks, **close)
    if 2 * ranks * shared.up.levels + 1 <= 2**down:
        assert torch.equal(mean[inner], values)
    else:
        again, codes = torch.zeros(part.numel), torch.zeros(part.size(down), dtype=torch.uint8)
        shared.down.encode_shard(values, compact, reference.key_words((seed, 99), part.tensors), codes)
        shared.down.decode_shard(codes, compact, again)
        assert torch.equal(mean[inner], again)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 700), st.integers(1, 5), st.sampled_from([0.0, 2.0]), st.integers(0, 2**32))
def test_merged_scales_are_the_mean_or_the_largest_of_every_block(
    numel: int, ranks: int, clip: float, seed: int
) -> None:
    shared, part = make(3, 8, ranks, clip=clip), shards(numel, 1, 0)
    stacked = torch.zeros(ranks, shared.scale_size(part), dtype=torch.uint8)
    for x, row in zip(gradients(ranks, numel + 203, seed), stacked, strict=True):
        shared.scales(x, part, row)

    def values(rows: torch.Tensor) -> torch.Tensor:
        heads = rows.view(-1, 9)
        return reference.scale_values(heads[:, 0], heads[:, 1:])

    each = torch.stack([values(row) for row in stacked]).double()
    merged = values(shared.merge(stacked)).double()
    largest = each.amax(dim=0)
    assert torch.equal(merged == 0, largest == 0)
    near = largest > largest.amax(dim=1, keepdim=True) * 2.0**-30
    if clip == 0:
        torch.testing.assert_close(merged[near], largest[near], rtol=1e-6, atol=0)
        assert (merged >= largest).all()
    else:
        mean = ((each**4).sum(dim=0) / (each > 0).sum(dim=0).clamp(min=1)) ** 0.25
        assert (merged >= mean * 2 ** (-1 / 16) * 0.999).all()
        assert (merged[near] <= mean[near] * 2 ** (1 / 16) * 1.001).all()
    assert torch.equal(shared.merge(stacked[:1]), stacked[0]), "one rank keeps its own"


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 700), st.integers(2, 8), st.integers(1, 5), st.booleans(), st.integers(0, 2**32))
def test_kernels_equal_the_reference(numel: int, bits: int, ranks: int, nearest: bool, seed: int) -> None:
    part, xs = shards(numel, 2, 1), gradients(2, numel + 203, seed)
    scales = [torch.zeros(part.spans * 9, dtype=torch.uint8) for _ in range(2)]
    keys, k = reference.key_words((seed,), part.tensors), reference.level_count(bits)
    results = []
    for use, mine in ((cpu, scales[0]), (reference, scales[1])):
        encode, decode = (cpu.encode, cpu.decode) if use is cpu else (reference.encode_table, reference.decode_table)
        residual = gaussian(numel + 203, seed + 9)
        encode(xs[0], part.table, keys, mine, SPAN, 0, 3.0, residual=residual)
        assert torch.equal(residual, gaussian(numel + 203, seed + 9)), "scales only read the residual"
        given_, options = scales[0], {"nearest": nearest, "residual": residual}
        codes = torch.zeros(part.groups * bits, dtype=torch.uint8)
        encode(xs[0], part.table, keys, codes, SPAN, bits, 3.0, given=given_, **options)
        sums = torch.zeros(8 * part.groups, dtype=torch.int16)
        for i in range(ranks):
            use.add_codes(codes, part.table, sums, SPAN, bits, i == 0)
        assert sums.abs().max() <= k * ranks
        values = torch.zeros(numel + 203)
        use.sums_to_values(sums, given_, part.table, values, SPAN, k * ranks)
        found = [codes, residual, sums, values]
        if 2 * k * ranks < 256:
            packed, back = torch.zeros(part.groups * 8, dtype=torch.uint8), torch.zeros(numel + 203)
            use.pack_sums(sums, part.table, packed, SPAN, 8, k * ranks)
            decode(packed, part.table, back, SPAN, 8, 1.0, False, given=given_, levels=k * ranks)
            assert torch.equal(back, values)
            found += [packed]
        results.append(found)
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)
    a, b = (reference.scale_values(h[:, 0], h[:, 1:]) for h in (s.view(-1, 9) for s in scales))
    torch.testing.assert_close(a, b, rtol=0.1, atol=0)  # sums in another order


@pytest.mark.parametrize(("bits", "down", "ranks"), [(3, 5, 4), (3, 4, 2), (4, 8, 16)])
def test_error_is_that_of_quantizing_once(bits: int, down: int, ranks: int) -> None:
    """At most 1.05 times that of codes under each rank's own scales, added exactly (gradients of like magnitude)."""
    numel = 1 << 15
    shared = make(bits, down, ranks, block=128)
    assert shared.exact
    part = layout.single(numel, shared.up.span)
    common = gaussian(numel, 1)
    xs = [0.5 * common + gaussian(numel, 10 + rank) for rank in range(ranks)]
    scales, sums, _ = summed(shared, part, xs, None, 7)
    payload, mean = torch.zeros(shared.down_size(part), dtype=torch.uint8), torch.zeros(numel)
    shared.encode_sums(sums, part, scales, reference.key_words((1,), part.tensors), payload)
    shared.decode_sums(payload, part, scales, mean)
    once = torch.stack([shared.up.decode(shared.up.encode(x, (3, r)), numel) for r, x in enumerate(xs)]).mean(dim=0)
    exact = torch.stack(xs).mean(dim=0)
    assert (mean - exact).square().sum() <= 1.05 * (once - exact).square().sum()


@pytest.mark.parametrize("down", [8, 4])
def test_what_is_not_finite_on_one_rank_is_nan_in_the_mean(down: int) -> None:
    shared, part = make(3, down, 4), layout.single(3 * SPAN, SPAN)
    assert shared.exact == (down == 8)
    xs = [gaussian(3 * SPAN, rank) for rank in range(4)]
    xs[2][SPAN + 5] = float("inf")
    scales, sums, _ = summed(shared, part, xs, None, 1)
    payload, mean = torch.zeros(shared.down_size(part), dtype=torch.uint8), torch.zeros(3 * SPAN)
    shared.encode_sums(sums, part, scales, reference.key_words((1,), part.tensors), payload)
    shared.decode_sums(payload, part, scales, mean)
    assert mean[SPAN : 2 * SPAN].isnan().all()
    assert mean.isfinite().sum() == 2 * SPAN


@pytest.mark.parametrize(
    ("up", "down", "ranks", "words"),
    [
        ({"bits": 1}, {}, 2, "bits: must be 2 to 8 with a shared scale, is 1"),
        ({"block": 8}, {"block": 16}, 2, "block: must be the same up and down, is 8 and 16"),
        ({"bits": 8}, {}, 300, "world_size: must be 1 to 258 at 8 bits, is 300"),
    ],
)
def test_bad_settings_are_named(up: dict, down: dict, ranks: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        SharedScale(Quantizer(**{"block": 128, **up}), Quantizer(**{"block": 128, **down}), ranks)
