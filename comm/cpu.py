"""The numba kernels on torch tensors, a large table split over threads at spans.

Every segment's bytes and random numbers depend on its place alone, so the result is the same for any number of threads.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from .reference import Limits, level_count

LEAST = 1 << 16
"""Elements that a thread must get to be worth waking."""


@lru_cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="tenko-codec")


os.register_at_fork(after_in_child=_pool.cache_clear)  # a fork has no threads


def split_table(table: np.ndarray, span: int, parts: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """A table as `parts` tables or fewer of about as many spans each, and the segment that each row is of."""
    spans = -(-table[:, 1] // span)
    ends = np.cumsum(spans)
    total = int(ends[-1]) if len(ends) else 0
    pieces = []
    for part in range(parts):
        low, high = total * part // parts, total * (part + 1) // parts
        if low == high:
            continue
        # Segments that have a span in low..high, and which of their spans.
        segments = np.flatnonzero((ends > low) & (ends - spans < high))
        rows = table[segments].copy()
        skip = np.maximum(low - (ends - spans)[segments], 0)
        stop = np.minimum(high - (ends - spans)[segments], spans[segments])
        rows[:, 0] += skip * span
        rows[:, 1] = np.minimum(rows[:, 1], stop * span) - skip * span
        rows[:, 2] += skip * (span // 8)
        rows[:, 3] += skip
        rows[:, 4] += skip
        pieces.append((np.ascontiguousarray(rows), segments))
    return pieces


def spread(table: np.ndarray, span: int, threads: int, work: Callable[[np.ndarray, np.ndarray], None]) -> None:
    """Calls work(table, segments) for a table, or for the parts of it on several threads.

    Args:
        threads: at most; 0 takes torch.get_num_threads().
        work: gets a table, and of each of its rows the segment of the whole table.
    """
    threads = threads or torch.get_num_threads()
    parts = min(threads, int(table[:, 1].sum()) // LEAST)
    if parts < 2:
        work(table, np.arange(len(table)))
        return
    first, *others = split_table(table, span, parts)
    waiting = [_pool().submit(work, *other) for other in others]
    try:
        work(*first)
    finally:
        for future in waiting:
            future.result()


_NO_FLOATS = np.empty(0, dtype=np.float32)
_NO_BYTES = np.empty(0, dtype=np.uint8)
_NO_PLACES = np.empty(0, dtype=np.int64)


def encode(
    x: Tensor,
    table: np.ndarray,
    keys: np.ndarray,
    out: Tensor,
    span: int,
    bits: int,
    clip: float,
    *,
    nearest: bool = False,
    limits: Limits | None = None,
    residual: Tensor | None = None,
    given: Tensor | None = None,
    threads: int = 0,
) -> None:
    """`reference.encode_table` on several threads."""
    from . import kernels

    values, codes = x.numpy(), out.numpy()
    left = _NO_FLOATS if residual is None else residual.numpy()
    scales = _NO_BYTES if given is None else given.numpy()
    largest = _NO_FLOATS if limits is None else limits.values

    def work(rows: np.ndarray, of: np.ndarray) -> None:
        at, of_rows = (_NO_PLACES, _NO_PLACES) if limits is None else (limits.at[of], limits.rows[of])
        kernels.encode_table(
            values, left, rows, keys[of], codes, scales, largest, at, of_rows, span, bits, clip, nearest
        )

    spread(table, span, threads, work)


def decode(
    payload: Tensor,
    table: np.ndarray,
    out: Tensor,
    span: int,
    bits: int,
    factor: float,
    add: bool,
    *,
    given: Tensor | None = None,
    levels: int = 0,
    threads: int = 0,
) -> None:
    """`reference.decode_table` on several threads."""
    from . import kernels

    codes, values = payload.numpy(), out.numpy()
    scales = _NO_BYTES if given is None else given.numpy()
    k = levels or level_count(bits)

    def work(rows: np.ndarray, _: np.ndarray) -> None:
        kernels.decode_table(codes, scales, rows, values, span, bits, k, factor, add)

    spread(table, span, threads, work)


def add_codes(
    payload: Tensor, table: np.ndarray, sums: Tensor, span: int, bits: int, first: bool, *, threads: int = 0
) -> None:
    """`reference.add_codes` on several threads."""
    from . import kernels

    codes, totals, k = payload.numpy(), sums.numpy(), level_count(bits)
    spread(table, span, threads, lambda rows, _: kernels.add_codes(codes, rows, totals, span, bits, k, first))


def pack_sums(
    sums: Tensor, table: np.ndarray, out: Tensor, span: int, bits: int, levels: int, *, threads: int = 0
) -> None:
    """`reference.pack_sums` on several threads."""
    from . import kernels

    totals, codes = sums.numpy(), out.numpy()
    spread(table, span, threads, lambda rows, _: kernels.pack_sums(totals, rows, codes, span, bits, levels))


def sums_to_values(
    sums: Tensor, given: Tensor, table: np.ndarray, out: Tensor, span: int, levels: int, *, threads: int = 0
) -> None:
    """`reference.sums_to_values` on several threads."""
    from . import kernels

    totals, scales, values = sums.numpy(), given.numpy(), out.numpy()
    spread(table, span, threads, lambda rows, _: kernels.sums_to_values(totals, scales, rows, values, span, levels))
