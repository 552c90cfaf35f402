"""How the tensors of a model are cut into spans of 8 blocks, and the spans into shards, one an owner.

A span never straddles two tensors. Where a tensor is cut is a function of the model alone, never of the bucket that DDP
happened to put the tensor in: so a tensor's codes, the owner of each of its elements, and whatever an owner keeps
(optimizer state, residuals) survive a rebuild of the buckets and a resume.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

SCALE_BYTES = 9
"""Of a span: one exponent, and a scale for each of its 8 blocks."""


@dataclass(frozen=True)
class Shard:
    """Whole spans of one or several tensors, and where their elements lie in a flat buffer."""

    table: np.ndarray
    """int64 [segments, 5]: start (in the buffer), numel, groups before, spans before (in the shard), first span (in the
    tensor). A segment is a run of spans of one tensor."""
    tensors: np.ndarray
    """int64 [segments]: which of the tensors that the shard was made for a segment is part of."""
    rows: np.ndarray
    """int64 [segments]: elements of a row of that tensor; 0 where it has fewer than two dimensions."""
    numel: int
    """Elements of all segments."""
    groups: int
    """Groups of 8 codes."""
    spans: int

    def size(self, bits: int) -> int:
        """Bytes of the shard's codes and scales."""
        return self.groups * bits + self.spans * SCALE_BYTES

    def compact(self) -> Shard:
        """The same spans in a buffer of their own [numel], one segment after the other."""
        table = self.table.copy()
        if len(table):
            table[:, 0] = np.cumsum(table[:, 1]) - table[:, 1]
        return Shard(table, self.tensors, self.rows, self.numel, self.groups, self.spans)


@dataclass(frozen=True)
class Piece:
    """Some spans of one tensor: what travels together where a tensor is too large to travel whole."""

    tensor: int
    """Index in the model."""
    number: int
    """Of the tensor's pieces."""
    start: int
    """First element, counted in the tensor."""
    numel: int
    """Elements."""


class Cut:
    """Every tensor of a model cut into `parts` runs of whole spans, the same number of bytes for each part.

    Args:
        numels: elements of every tensor, in the model's order.
        span: elements of a span, 8 times a block.
        parts: how many owners there are.
        rows: elements of a row of every tensor, 0 for those with fewer than two dimensions; default all 0.
        piece: larger tensors are dealt out in pieces of about so many elements, one by one; 0 keeps them whole.

    Spans are dealt out evenly; those that are left over go to the parts whose turn it is, so that small tensors do not
    all fall to the first one.
    """

    def __init__(
        self, numels: Sequence[int], span: int, parts: int, rows: Sequence[int] | None = None, piece: int = 0
    ) -> None:
        self.numels, self.span, self.parts = tuple(numels), span, parts
        self.rows = tuple(rows) if rows is not None else (0,) * len(self.numels)
        self._pieces: list[list[Piece]] = []
        self._bounds: list[np.ndarray] = []  # of every tensor [pieces, parts + 1], in spans of the tensor
        turn = 0
        for tensor, numel in enumerate(self.numels):
            spans = -(-numel // span)
            most = max(piece // span, 1) if piece else max(spans, 1)
            pieces: list[Piece] = []
            bounds: list[np.ndarray] = []
            for number, first in enumerate(range(0, spans, most)):
                count = min(most, spans - first)
                start = first * span
                pieces.append(Piece(tensor, number, start, min(numel, start + count * span) - start))
                each, left = divmod(count, parts)
                sizes = np.full(parts, each)
                sizes[(turn + np.arange(left)) % parts] += 1
                turn = (turn + left) % parts
                bounds.append(first + np.append(0, np.cumsum(sizes)))
            self._pieces.append(pieces)
            self._bounds.append(np.array(bounds, dtype=np.int64).reshape(len(bounds), parts + 1))

    def pieces(self, tensor: int) -> list[Piece]:
        """The pieces of a tensor; none of one without elements."""
        return self._pieces[tensor]

    def shard(
        self, tensors: Sequence[int | Piece], starts: Sequence[int], first: int, stop: int | None = None
    ) -> Shard:
        """What the parts first..stop (default: `first` alone) own of some tensors or pieces.

        Args:
            tensors: indices in the model, or pieces.
            starts: where each of them (the tensor, not the piece) begins in the flat buffer.
            first, stop: parts.
        """
        stop = first + 1 if stop is None else stop
        rows: list[tuple[int, int, int, int, int]] = []
        at: list[int] = []
        row_of: list[int] = []
        groups = spans = elements = 0
        for position, (item, start) in enumerate(zip(tensors, starts, strict=True)):
            for piece in [item] if isinstance(item, Piece) else self._pieces[item]:
                low, high = (int(self._bounds[piece.tensor][piece.number, part]) for part in (first, stop))
                if low == high:
                    continue
                numel = min(self.numels[piece.tensor], high * self.span) - low * self.span
                rows.append((start + low * self.span, numel, groups, spans, low))
                at.append(position)
                row_of.append(self.rows[piece.tensor])
                count = high - low
                groups += (count - 1) * (self.span // 8) + -(-(numel - (count - 1) * self.span) // 8)
                spans += count
                elements += numel
        return Shard(
            np.array(rows, dtype=np.int64).reshape(len(rows), 5),
            np.array(at, dtype=np.int64),
            np.array(row_of, dtype=np.int64),
            elements,
            groups,
            spans,
        )


def single(numel: int, span: int, row: int = 0) -> Shard:
    """One tensor of `numel` elements, whole; `row` elements a row, 0 for a vector."""
    return Cut([numel], span, 1, [row]).shard([0], [0], 0)


def joined(parts: Sequence[Shard]) -> Shard:
    """Several shards of one buffer as one; each stays one run of bytes."""
    rows: list[np.ndarray] = []
    groups = spans = 0
    for part in parts:
        rows.append(part.table + np.array([0, 0, groups, spans, 0], dtype=np.int64))
        groups, spans = groups + part.groups, spans + part.spans
    return Shard(
        np.ascontiguousarray(np.concatenate(rows)),
        np.concatenate([part.tensors for part in parts]),
        np.concatenate([part.rows for part in parts]),
        sum(part.numel for part in parts),
        groups,
        spans,
    )


def as_stored(tensor: Tensor, parameter: Tensor) -> Tensor:
    """A tensor of a parameter's shape with its dimensions in the order in which the parameter's lie in memory.

    That is how DDP lays a gradient into its bucket, side by side: the parameter's own order of elements, which for a
    transposed weight or one in channels_last is not that of its indices. A parameter with gaps goes by its indices.

    Returns:
        A view of `tensor`.
    """
    strides = parameter.stride()
    order = sorted(range(len(strides)), key=lambda dim: -strides[dim])
    return tensor.permute(order) if parameter.permute(order).is_contiguous() else tensor
