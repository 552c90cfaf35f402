"""The numba kernels compute what the plain torch reference computes, bit for bit given the same scales."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tenko.comm import cpu, layout, reference

LENGTHS = st.one_of(st.sampled_from([0, 1, 7, 8, 9, 1015, 1016, 1023, 1024, 1025, 2048, 5000]), st.integers(0, 3000))
BITS = st.integers(1, 8)
SPANS = st.sampled_from([64, 128, 1000, 1024])


def values(kind: str, numel: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(numel, generator=generator)
    if kind == "sparse":
        x *= torch.rand(numel, generator=generator) < 0.05
    elif kind == "heavy":
        x = x / torch.rand(numel, generator=generator).clamp(min=1e-3)
    elif kind == "tiny":
        x *= 1e-22
    elif kind == "huge":
        x *= 1e30
    elif kind == "zero":
        x.zero_()
    return x


def test_scales_of_an_octave_repeat_in_every_other() -> None:
    """The kernels look eighths of an octave up in the first one."""
    q = np.arange(255)
    np.testing.assert_array_equal(reference.SCALES[:255], np.ldexp(reference.SCALES[q % 8], -(q // 8)))


KINDS = st.sampled_from(["normal", "sparse", "heavy", "tiny", "huge", "zero"])


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(1, 5000), min_size=1, max_size=6),
    st.sampled_from([64, 128, 1024]),
    st.integers(1, 5),
    st.integers(1, 3),
    st.integers(0, 2**32),
)
def test_threads_change_nothing(numels: list[int], span: int, parts: int, owners: int, seed: int) -> None:
    """A table in parts, in any order, gives the bytes, residuals and values that the whole table gives."""
    cut = layout.Cut(numels, span, owners, [7 * (i % 3) for i in range(len(numels))])
    part = cut.shard(range(len(numels)), [0, *np.cumsum(numels)[:-1].tolist()], 0)
    x = values("normal", sum(numels), seed)
    keys = reference.key_words((seed,), part.tensors)
    limits = reference.limits(x, part, span, 2.0, by_row=True)
    results = []
    for pieces in (1, parts):
        tables = cpu.split_table(part.table, span, pieces)
        assert sum(int(rows[:, 1].sum()) for rows, _ in tables) == part.numel
        out, residual = torch.zeros(part.size(3), dtype=torch.uint8), values("normal", sum(numels), seed + 1)
        back = torch.zeros(sum(numels))
        for rows, of in reversed(tables):
            mine = reference.Limits(limits.values, limits.at[of], limits.rows[of])
            cpu.encode(x, rows, keys[of], out, span, 3, 2.0, limits=mine, residual=residual, threads=1)
        for rows, _ in tables:
            cpu.decode(out, rows, back, span, 3, 1.0, False, threads=1)
        results.append((out, residual, back))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_a_large_table_on_threads_equals_one_thread() -> None:
    numels = [3 * cpu.LEAST + 5, 9, 2 * cpu.LEAST + 1000]
    part = layout.Cut(numels, 1024, 1).shard([0, 1, 2], [0, numels[0], numels[0] + 9], 0)
    x = values("heavy", sum(numels), 3)
    keys = reference.key_words((1,), part.tensors)
    results = []
    for threads in (1, 3):
        out, residual = torch.zeros(part.size(4), dtype=torch.uint8), values("normal", sum(numels), 4)
        total = torch.ones(sum(numels))
        cpu.encode(x, part.table, keys, out, 1024, 4, 3.0, residual=residual, threads=threads)
        cpu.decode(out, part.table, total, 1024, 4, 0.5, True, threads=threads)
        results.append((out, residual, total))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)
    assert results[0][1].abs().sum() > 0


def both(x: torch.Tensor, bits: int, clip: float, span: int, key: int) -> tuple[np.ndarray, np.ndarray, layout.Shard]:
    part = layout.single(x.numel(), span)
    keys = reference.key_words((key,), [3] * len(part.table))
    fast = np.zeros(part.size(bits), dtype=np.uint8)
    plain = torch.zeros(part.size(bits), dtype=torch.uint8)
    cpu.encode(x, part.table, keys, torch.from_numpy(fast), span, bits, clip)
    reference.encode_table(x, part.table, keys, plain, span, bits, clip)
    return fast, plain.numpy(), part


def split(payload: np.ndarray, numel: int, span: int, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Exponent and relative scales [spans, 9], and all the bytes of codes."""
    heads, codes, at = [np.zeros((0, 9), np.uint8)], [np.zeros(0, np.uint8)], 0
    for begin in range(0, numel, span):
        size = -(-min(span, numel - begin) // 8) * bits
        heads.append(payload[at : at + 9].reshape(1, 9))
        codes.append(payload[at + 9 : at + 9 + size])
        at += 9 + size
    assert at == len(payload)
    return np.concatenate(heads), np.concatenate(codes)


@settings(max_examples=150, deadline=None)
@given(LENGTHS, BITS, SPANS, st.sampled_from([0.0, 1.5, 3.0]), KINDS, st.integers(0, 2**32))
def test_scales_equal_the_reference(numel: int, bits: int, span: int, clip: float, kind: str, seed: int) -> None:
    x = values(kind, numel, seed)
    fast, plain, _ = both(x, bits, clip, span, seed)
    heads = [torch.from_numpy(split(payload, numel, span, bits)[0]) for payload in (fast, plain)]
    a, b = (reference.scale_values(head[:, 0], head[:, 1:]) for head in heads)
    # Sums of squares in another order may tip a scale into the next eighth of an octave, seldom.
    torch.testing.assert_close(a, b, rtol=0.1, atol=0)
    assert (a != b).sum() <= 1 + 0.01 * a.numel()


@settings(max_examples=150, deadline=None)
@given(LENGTHS, BITS, SPANS, st.sampled_from([0.0, 3.0]), KINDS, st.integers(0, 2**32))
def test_codes_are_bit_equal_under_the_same_scales(
    numel: int, bits: int, span: int, clip: float, kind: str, seed: int
) -> None:
    x = values(kind, numel, seed)
    part = layout.single(numel, span)
    keys = reference.key_words((seed,), [3] * len(part.table))
    fast = np.zeros(part.size(bits), dtype=np.uint8)
    cpu.encode(x, part.table, keys, torch.from_numpy(fast), span, bits, clip)
    heads, codes = split(fast, numel, span, bits)
    rows = torch.from_numpy(heads).to(torch.int64)
    original, taken = reference.scale_codes, 0

    def given_codes(scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        nonlocal taken
        mine = rows[taken : taken + len(scale)]
        taken += len(scale)
        return mine[:, 0], mine[:, 1:]

    plain = torch.zeros(part.size(bits), dtype=torch.uint8)
    try:
        reference.scale_codes = given_codes
        reference.encode_table(x, part.table, keys, plain, span, bits, clip)
    finally:
        reference.scale_codes = original
    np.testing.assert_array_equal(codes, split(plain.numpy(), numel, span, bits)[1])


@settings(max_examples=200, deadline=None)
@given(st.lists(st.one_of(st.just(0.0), st.floats(1e-30, 1e37)), min_size=8, max_size=8))
def test_a_scale_is_rounded_up_by_less_than_an_eighth_of_an_octave(wanted: list[float]) -> None:
    scale = torch.tensor([wanted], dtype=torch.float32)
    exponent, q = reference.scale_codes(scale)
    assert int(exponent) < 255
    got = reference.scale_values(exponent, q)
    assert ((got == 0) == (scale == 0)).all()
    far_below = scale < scale.max() * 2.0**-30  # 32 octaves below the largest the bytes end
    near = (scale > 0) & ~far_below
    assert (got[scale > 0] >= scale[scale > 0] * (1 - 1e-6)).all()
    assert (got[near] <= scale[near] * 2 ** (1 / 8) * (1 + 1e-6)).all()


@settings(max_examples=100, deadline=None)
@given(LENGTHS, BITS, SPANS, st.sampled_from([1.0, 0.25, 1 / 3]), st.booleans(), st.integers(0, 2**32))
def test_decode_equals_reference(numel: int, bits: int, span: int, factor: float, add: bool, seed: int) -> None:
    x = values("normal", numel, seed)
    fast, _, part = both(x, bits, 3.0, span, seed)
    start = values("normal", numel, seed + 1)
    a, b = start.clone(), start.clone()
    cpu.decode(torch.from_numpy(fast), part.table, a, span, bits, factor, add)
    reference.decode_table(torch.from_numpy(fast), part.table, b, span, bits, factor, add)
    assert torch.equal(a, b)


@pytest.mark.parametrize("bad", [float("inf"), -float("inf"), float("nan")])
@pytest.mark.parametrize("at", [0, 5, 1023, 1024, 2999])
def test_not_finite_blocks_decode_to_nan_and_leave_others_alone(bad: float, at: int) -> None:
    x = values("normal", 3000, 1)
    x[at] = bad
    for bits in range(1, 9):
        fast, plain, part = both(x, bits, 3.0, 1024, 1)
        for payload in (fast, plain):
            out = torch.zeros(3000)
            cpu.decode(torch.from_numpy(payload), part.table, out, 1024, bits, 1.0, True)
            nan = out.isnan().view(-1)
            block = at // 1024
            assert nan[block * 1024 : (block + 1) * 1024].all()
            assert int(nan.sum()) == min(1024, 3000 - block * 1024)


@settings(max_examples=60, deadline=None)
@given(BITS, st.integers(1, 40), st.integers(1, 5), st.integers(0, 2**32))
def test_packing_comes_back(bits: int, groups: int, rows: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 1 << bits, (rows, 8 * groups), generator=generator)
    packed = reference.pack(codes, bits)
    assert packed.shape == (rows, bits * groups)
    assert torch.equal(reference.unpack(packed, bits), codes)


def test_kernels_release_the_gil() -> None:
    """Another thread counts while a long encode runs: held, it could only count before and after."""
    import threading
    import time

    x = values("normal", 1 << 25, 0)
    part = layout.single(x.numel(), 1024)
    keys = reference.key_words((1,), [0])
    out = np.zeros(part.size(3), dtype=np.uint8)
    ticks: list[float] = []
    stop = threading.Event()

    def tick() -> None:
        while not stop.is_set():
            ticks.append(time.perf_counter())
            time.sleep(0.0005)

    thread = threading.Thread(target=tick)
    thread.start()
    begin = time.perf_counter()
    for _ in range(4):
        cpu.encode(x, part.table, keys, torch.from_numpy(out), 1024, 3, 3.0, threads=1)
    end = time.perf_counter()
    stop.set()
    thread.join()
    # four calls in a row: with the lock held, at most one tick between two of them
    assert sum(begin < t < end for t in ticks) > 8
