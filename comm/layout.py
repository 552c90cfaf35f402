"""How a bucket of several tensors is cut into spans of 8 blocks, and the spans into shards, one a rank.

A span never straddles two tensors, and a shard is a run of whole spans: so a tensor's codes depend on the
tensor alone, neither on the bucket that DDP happened to put it in nor on the rank that adds it up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

SCALE_BYTES = 9
"""Of a span: one exponent, and a scale for each of its 8 blocks."""


@dataclass(frozen=True)
class Shard:
    """Whole spans that lie side by side in a bucket."""

    start: int
    """First element, counted in the bucket."""
    stop: int
    """One past the last element."""
    table: np.ndarray
    """int64 [segments, 5]: start, numel, groups before, spans before (in the shard), first span (in the tensor)."""
    tensors: np.ndarray
    """int64 [segments]: position in the bucket of the tensor that a segment is part of."""
    groups: int
    """Groups of 8 codes."""
    spans: int

    def size(self, bits: int) -> int:
        """Bytes of the shard's codes and scales."""
        return self.groups * bits + self.spans * SCALE_BYTES


def _table(rows: Sequence[tuple[int, ...]]) -> np.ndarray:
    return np.array(rows, dtype=np.int64).reshape(len(rows), 5)


def single(numel: int, span: int) -> Shard:
    """One tensor of `numel` elements, whole."""
    return shards([numel], span, 1)[0]


def shards(numels: Sequence[int], span: int, world_size: int) -> list[Shard]:
    """Cuts tensors that lie side by side into `world_size` shards of about the same number of bytes.

    Args:
        numels: elements of every tensor, in the bucket's order.
        span: elements of a span, 8 times a block.
        world_size: number of shards; some are empty when there are fewer spans than ranks.
    """
    # Groups up to and including each span: what a shard weighs.
    spans_of = [-(-numel // span) for numel in numels]
    weights = [
        -(-min(span, numel - b * span) // 8) for numel, n in zip(numels, spans_of, strict=True) for b in range(n)
    ]
    ends = np.cumsum(np.array(weights, dtype=np.int64))
    total = int(ends[-1]) if len(ends) else 0
    # Span i belongs to the shard that holds its middle.
    middles = ends - np.array(weights, dtype=np.int64) / 2
    owner = np.minimum((middles * world_size / max(total, 1)).astype(np.int64), world_size - 1)
    bounds = np.searchsorted(owner, np.arange(world_size + 1))

    result = []
    tensor, done = 0, 0  # next span to give away: `done` in tensor `tensor`
    at = 0  # element in the bucket
    for rank in range(world_size):
        left = int(bounds[rank + 1] - bounds[rank])
        start, groups, spans = at, 0, 0
        rows: list[tuple[int, ...]] = []
        tensors: list[int] = []
        while left:
            take = min(left, spans_of[tensor] - done)
            if take:
                numel = min(numels[tensor], (done + take) * span) - done * span
                rows.append((at - start, numel, groups, spans, done))
                tensors.append(tensor)
                groups += (take - 1) * (span // 8) + -(-(numel - (take - 1) * span) // 8)
                spans += take
                at += numel
                done += take
                left -= take
            if done == spans_of[tensor]:
                tensor, done = tensor + 1, 0
        result.append(Shard(start, at, _table(rows), np.array(tensors, dtype=np.int64), groups, spans))
    assert at == sum(numels), (at, numels)
    return result


def joined(parts: Sequence[Shard]) -> Shard:
    """One table over all shards, counted from the beginning of the bucket; each shard stays one run of bytes."""
    rows: list[np.ndarray] = []
    groups = spans = 0
    for part in parts:
        rows.append(part.table + np.array([part.start, 0, groups, spans, 0], dtype=np.int64))
        groups, spans = groups + part.groups, spans + part.spans
    return Shard(
        parts[0].start,
        parts[-1].stop,
        np.ascontiguousarray(np.concatenate(rows)),
        np.concatenate([part.tensors for part in parts]),
        groups,
        spans,
    )
