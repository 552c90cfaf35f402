"""The numba kernels compute what the plain torch reference computes, bit for bit given the same scales."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tenko.comm import kernels, layout, reference

LENGTHS = st.one_of(st.sampled_from([0, 1, 7, 8, 9, 1015, 1016, 1023, 1024, 1025, 2048, 5000]), st.integers(0, 3000))
BITS = st.sampled_from([2, 3, 4, 8])
BLOCKS = st.sampled_from([8, 64, 1000, 1024])


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


KINDS = st.sampled_from(["normal", "sparse", "heavy", "tiny", "huge", "zero"])


def both(x: torch.Tensor, bits: int, clip: float, block: int, key: int) -> tuple[np.ndarray, np.ndarray, layout.Shard]:
    part = layout.single(x.numel(), block)
    keys = reference.key_words((key,), [3] * len(part.table))
    fast = np.zeros(part.size(bits), dtype=np.uint8)
    plain = torch.zeros(part.size(bits), dtype=torch.uint8)
    kernels.encode_table(x.numpy(), part.table, keys, fast, block, bits, clip)
    reference.encode_table(x, part.table, keys, plain, block, bits, clip)
    return fast, plain.numpy(), part


def split(payload: np.ndarray, numel: int, block: int, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Scales [blocks] and all the bytes of codes."""
    scales, codes, at = [], [], 0
    for begin in range(0, numel, block):
        size = -(-min(block, numel - begin) // 8) * bits
        scales.append(payload[at : at + 4].view(np.float32)[0])
        codes.append(payload[at + 4 : at + 4 + size])
        at += 4 + size
    assert at == len(payload)
    return np.array(scales, dtype=np.float32), np.concatenate([*codes, np.zeros(0, np.uint8)])


@settings(max_examples=150, deadline=None)
@given(LENGTHS, BITS, BLOCKS, st.sampled_from([0.0, 1.5, 3.0]), KINDS, st.integers(0, 2**32))
def test_encode_equals_reference(numel: int, bits: int, block: int, clip: float, kind: str, seed: int) -> None:
    x = values(kind, numel, seed)
    fast, plain, _ = both(x, bits, clip, block, seed)
    scales_fast, _ = split(fast, numel, block, bits)
    scales_plain, _ = split(plain, numel, block, bits)
    np.testing.assert_allclose(scales_fast, scales_plain, rtol=1e-6)


@settings(max_examples=150, deadline=None)
@given(LENGTHS, BITS, BLOCKS, st.sampled_from([0.0, 3.0]), KINDS, st.integers(0, 2**32))
def test_codes_are_bit_equal_under_the_same_scales(
    numel: int, bits: int, block: int, clip: float, kind: str, seed: int
) -> None:
    x = values(kind, numel, seed)
    part = layout.single(numel, block)
    keys = reference.key_words((seed,), [3] * len(part.table))
    fast = np.zeros(part.size(bits), dtype=np.uint8)
    kernels.encode_table(x.numpy(), part.table, keys, fast, block, bits, clip)
    given_scales, codes = split(fast, numel, block, bits)
    original = reference.scales
    taken = iter(
        [torch.from_numpy(given_scales[: numel // block]), torch.from_numpy(given_scales[numel // block :])]
        if numel >= block
        else [torch.from_numpy(given_scales)]
    )
    plain = torch.zeros(part.size(bits), dtype=torch.uint8)
    try:
        reference.scales = lambda _x, _clip: next(taken)
        reference.encode_table(x, part.table, keys, plain, block, bits, clip)
    finally:
        reference.scales = original
    np.testing.assert_array_equal(codes, split(plain.numpy(), numel, block, bits)[1])


@settings(max_examples=100, deadline=None)
@given(LENGTHS, BITS, BLOCKS, st.sampled_from([1.0, 0.25, 1 / 3]), st.booleans(), st.integers(0, 2**32))
def test_decode_equals_reference(numel: int, bits: int, block: int, factor: float, add: bool, seed: int) -> None:
    x = values("normal", numel, seed)
    fast, _, part = both(x, bits, 3.0, block, seed)
    start = values("normal", numel, seed + 1)
    a, b = start.clone(), start.clone()
    kernels.decode_table(fast, part.table, a.numpy(), block, bits, factor, add)
    reference.decode_table(torch.from_numpy(fast), part.table, b, block, bits, factor, add)
    assert torch.equal(a, b)


@pytest.mark.parametrize("bad", [float("inf"), -float("inf"), float("nan")])
@pytest.mark.parametrize("at", [0, 5, 1023, 1024, 2999])
def test_not_finite_blocks_decode_to_nan_and_leave_others_alone(bad: float, at: int) -> None:
    x = values("normal", 3000, 1)
    x[at] = bad
    for bits in (2, 3, 4, 8):
        fast, plain, part = both(x, bits, 3.0, 1024, 1)
        for payload in (fast, plain):
            out = torch.zeros(3000)
            kernels.decode_table(payload, part.table, out.numpy(), 1024, bits, 1.0, True)
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
        kernels.encode_table(x.numpy(), part.table, keys, out, 1024, 3, 3.0)
    end = time.perf_counter()
    stop.set()
    thread.join()
    # four calls in a row: with the lock held, at most one tick between two of them
    assert sum(begin < t < end for t in ticks) > 8
