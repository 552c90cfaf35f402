"""Lanes: the ways that tensors of a bucket travel. A route has one or several of them, and says who takes which tensor.

A bucket is exchanged in portions of about `PORTION` elements, so that the first ones are on the wire while the next are
still being encoded; each is a generator (see link.py). Lanes see flat fp32 buffers and know tensors by their index in
the model.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from .feedback import ErrorFeedback
from .layout import Cut, Piece, Shard, joined
from .link import Exchange, Link
from .meter import WireMeter
from .quantizer import Quantizer
from .reference import key_words

UP, DOWN = 0, 1
"""Parts of the rounding's key that tell the legs apart."""

PORTION = 1 << 21
"""Elements of a portion on a CPU: 8 MB of gradients, within a core's share of the last cache."""


@dataclass(frozen=True)
class Bucket:
    """Which tensors of the model lie in a bucket, and where."""

    tensors: tuple[int, ...]
    numels: tuple[int, ...]

    @cached_property
    def starts(self) -> dict[int, int]:
        """Where each tensor begins."""
        ends = np.cumsum(self.numels)
        return {t: int(end) - n for t, n, end in zip(self.tensors, self.numels, ends, strict=True)}


@dataclass(frozen=True)
class Portion:
    """Pieces of a bucket that one exchange takes."""

    bucket: Bucket
    pieces: tuple[Piece, ...]

    @property
    def starts(self) -> list[int]:
        """Where the tensor of each piece begins in the bucket."""
        return [self.bucket.starts[piece.tensor] for piece in self.pieces]

    @property
    def tensors(self) -> list[int]:
        return [piece.tensor for piece in self.pieces]

    @property
    def numel(self) -> int:
        """Elements of all pieces."""
        return sum(piece.numel for piece in self.pieces)


@dataclass
class Context:
    """What a route tells its lanes when it is put on a model."""

    link: Link
    device: torch.device
    shapes: Sequence[torch.Size]
    """Of every tensor of the model."""
    seed: int
    meter: WireMeter
    feedback: ErrorFeedback | None
    nodes: list[list[int]] = field(default_factory=list)
    """Ranks of every node, the same number on each; empty: all ranks are equals."""

    @property
    def rank(self) -> int:
        return self.link.rank

    @property
    def world_size(self) -> int:
        return self.link.world_size

    @property
    def numels(self) -> list[int]:
        return [shape.numel() for shape in self.shapes]

    @property
    def rows(self) -> list[int]:
        """Elements of a row of every tensor, 0 for a vector."""
        return [shape[1:].numel() if len(shape) > 1 else 0 for shape in self.shapes]

    def residual(self, bucket: Bucket) -> Tensor | None:
        """Error feedback of a bucket [its elements], laid out like the bucket."""
        if self.feedback is None:
            return None
        return self.feedback.flat(bucket.tensors, bucket.numels, self.device)


class Lane(ABC):
    """A way for tensors to become their mean over the ranks."""

    def bind(self, context: Context) -> None:
        """Learns the ranks and the model."""
        self.context = context

    @abstractmethod
    def portions(self, bucket: Bucket, tensors: Sequence[int]) -> list[Portion]:
        """How this lane divides its tensors of a bucket."""

    @abstractmethod
    def exchange(self, buffer: Tensor, portion: Portion, step: int, tag: int) -> Exchange:
        """Replaces a portion of `buffer` [elements of the bucket, fp32] by its mean over the ranks.

        Args:
            buffer: the bucket's gradients, side by side.
            portion: the pieces to take.
            step: part of the rounding's key.
            tag: the first of 8 tags for the link.
        """

    @abstractmethod
    def finite(self, buffer: Tensor, portion: Portion) -> Tensor:
        """Whether the exchanged portion is free of inf and NaN: bool []."""


def pack_portions(bucket: Bucket, pieces: Sequence[Piece], most: int) -> list[Portion]:
    """Neighbouring pieces together, `most` elements a portion or one piece."""
    portions: list[Portion] = []
    now: list[Piece] = []
    size = 0
    for piece in pieces:
        if now and size + piece.numel > most:
            portions.append(Portion(bucket, tuple(now)))
            now, size = [], 0
        now.append(piece)
        size += piece.numel
    if now:
        portions.append(Portion(bucket, tuple(now)))
    return portions


def gather(buffer: Tensor, shard: Shard) -> Tensor:
    """A shard's elements side by side [shard.numel]."""
    segments = shard.table[:, :2].tolist()
    return torch.cat([buffer[start : start + numel] for start, numel in segments]) if segments else buffer[:0]


def scatter(values: Tensor, shard: Shard, buffer: Tensor) -> None:
    """Inverse of `gather`: puts values [shard.numel] where they belong."""
    at = 0
    for start, numel in shard.table[:, :2].tolist():
        buffer[start : start + numel] = values[at : at + numel]
        at += numel


def all_finite(buffer: Tensor, portion: Portion) -> Tensor:
    """Whether no element of a portion is an inf or a NaN: bool []."""
    parts = zip(portion.pieces, portion.starts, strict=True)
    sums = [buffer[at + piece.start : at + piece.start + piece.numel].sum() for piece, at in parts]
    return torch.isfinite(torch.stack(sums)).all()


def first_elements(shard: Shard, span: int) -> Tensor:
    """Where each span of a shard begins in the buffer: int64 [spans]."""
    starts = [np.arange(start, start + numel, span) for start, numel in shard.table[:, :2].tolist()]
    return torch.from_numpy(np.concatenate([np.empty(0, dtype=np.int64), *starts]))


class SraPlan:
    """Scatter-reduce and all-gather (SRA) of one portion: every gradient is quantized twice, for any world size.

    The error of a ring that requantizes at every hop grows with the ring; here the owner of a shard adds n decoded
    gradients in fp32, in the order of ranks, and sends one quantized mean. Owner and others decode the same bytes, so
    all ranks end with bit-identical gradients; a NaN scale that one rank sent up comes down to all.

    Args:
        cut: of the model, made with the quantizers' span.
        items: tensors or pieces.
        starts: where each one's tensor begins in the buffer.
        tensors: the index in the model of each item, for the rounding's keys.
        peers: the ranks that take part; peer i owns part `first + i`.
        context: of the lane.
    """

    def __init__(
        self,
        cut: Cut,
        items: Sequence[Piece],
        starts: Sequence[int],
        peers: Sequence[int],
        context: Context,
        up: Quantizer,
        down: Quantizer,
        first: int = 0,
    ) -> None:
        self.context, self.up, self.down, self.peers = context, up, down, list(peers)
        self.tensors = np.array([item.tensor for item in items], dtype=np.int64)
        self.parts = [cut.shard(items, starts, first + i) for i in range(len(self.peers))]
        self.whole = joined(self.parts)
        self.index = self.peers.index(context.rank)
        self.mine = self.parts[self.index]
        self.total_of_mine = self.mine.compact()
        self._sent = self._empty(self.whole.size(up.bits))
        self._sent_parts = self._sent.split([part.size(up.bits) for part in self.parts])

    def _empty(self, size: int, dtype: torch.dtype = torch.uint8) -> Tensor:
        return torch.empty(size, dtype=dtype, device=self.context.device)

    @cached_property
    def _received(self) -> dict[int, Tensor]:
        size = self.mine.size(self.up.bits)
        return {peer: self._empty(size) for peer in self.peers if peer != self.context.rank and size}

    @cached_property
    def total(self) -> Tensor:
        """The mean of this rank's shard [its elements]."""
        return self._empty(self.mine.numel, torch.float32)

    @cached_property
    def _means(self) -> Tensor:
        return self._empty(self.whole.size(self.down.bits))

    @cached_property
    def first_elements(self) -> Tensor:
        """Where each span begins in the buffer: an inf or a NaN fills its whole span, so these tell of all."""
        return first_elements(self.whole, self.up.span).to(self.context.device)

    def keys(self, part: Shard, prefix: Sequence[int]) -> np.ndarray:
        """A key for every segment of `part`: of the prefix and the index of the tensor in the model."""
        return key_words(prefix, self.tensors[part.tensors])

    def up_leg(self, buffer: Tensor, step: int, tag: int, residual: Tensor | None) -> Exchange:
        """Leaves the mean of this rank's shard in `total`; `residual`, laid out like `buffer`, is added and updated."""
        context, rank = self.context, self.context.rank
        keys = self.keys(self.whole, (context.seed, step, UP, rank))
        if residual is None:
            self.up.encode_shard(buffer, self.whole, keys, self._sent)
        else:
            self.up.encode_feedback(buffer, residual, self.whole, keys, self._sent)
        outgoing = {p: s for p, s in zip(self.peers, self._sent_parts, strict=True) if p != rank and s.numel()}
        handle = context.link.start(tag, outgoing, self._received)
        context.meter.add(up=sum(s.numel() for s in outgoing.values()))
        yield handle
        n = len(self.peers)
        for i, peer in enumerate(self.peers):
            codes = self._sent_parts[self.index] if peer == rank else self._received.get(peer)
            if codes is not None:
                self.up.decode_shard(codes, self.total_of_mine, self.total, factor=1 / n, add=i > 0)

    def down_leg(self, buffer: Tensor, step: int, tag: int) -> Exchange:
        """Quantizes `total` and gives `buffer` everybody's."""
        context, rank = self.context, self.context.rank
        means = self._means.split([part.size(self.down.bits) for part in self.parts])
        own = means[self.index]
        self.down.encode_shard(self.total, self.total_of_mine, self.keys(self.mine, (context.seed, step, DOWN)), own)
        outgoing = {peer: own for peer in self.peers if peer != rank and own.numel()}
        incoming = {p: m for p, m in zip(self.peers, means, strict=True) if p != rank and m.numel()}
        handle = context.link.start(tag, outgoing, incoming)
        context.meter.add(down=own.numel() * len(outgoing))
        yield handle
        self.down.decode_shard(self._means, self.whole, buffer)


class QuantizedLane(Lane):
    """Quantized gradients up to the owners of shards, quantized means down."""

    def __init__(self, up: Quantizer, down: Quantizer) -> None:
        assert up.block == down.block, (up, down)
        self.up, self.down = up, down
        self._plans: dict[Portion, SraPlan] = {}

    def bind(self, context: Context) -> None:
        super().bind(context)
        self.most = PORTION if context.device.type == "cpu" else 0
        self.cut = self._cut(context.world_size)

    def _cut(self, parts: int) -> Cut:
        return Cut(self.context.numels, self.up.span, parts, self.context.rows, piece=PORTION)

    def portions(self, bucket: Bucket, tensors: Sequence[int]) -> list[Portion]:
        pieces = [piece for tensor in tensors for piece in self.cut.pieces(tensor)]
        return pack_portions(bucket, pieces, self.most or sum(bucket.numels))

    def plan(self, portion: Portion) -> SraPlan:
        """Tables and room for a portion, made once."""
        if portion not in self._plans:
            peers = range(self.context.world_size)
            self._plans[portion] = SraPlan(
                self.cut, portion.pieces, portion.starts, peers, self.context, self.up, self.down
            )
        return self._plans[portion]

    def exchange(self, buffer: Tensor, portion: Portion, step: int, tag: int) -> Exchange:
        plan = self.plan(portion)
        yield from plan.up_leg(buffer, step, tag, self.context.residual(portion.bucket))
        yield from plan.down_leg(buffer, step, tag + 1)

    def finite(self, buffer: Tensor, portion: Portion) -> Tensor:
        return torch.isfinite(buffer[self.plan(portion).first_elements]).all()


class PlainLane(Lane):
    """Unquantized: fp32, fp16 or bf16 numbers up to the owners of shards, their mean down. Sums are in fp32."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self.dtype = dtype
        self._shards: dict[Portion, list[Shard]] = {}

    def bind(self, context: Context) -> None:
        super().bind(context)
        self.cut = Cut(context.numels, 64, context.world_size, piece=PORTION)

    def portions(self, bucket: Bucket, tensors: Sequence[int]) -> list[Portion]:
        pieces = [piece for tensor in tensors for piece in self.cut.pieces(tensor)]
        return pack_portions(bucket, pieces, PORTION)

    def exchange(self, buffer: Tensor, portion: Portion, step: int, tag: int) -> Exchange:
        context = self.context
        rank, n = context.rank, context.world_size
        if portion not in self._shards:
            self._shards[portion] = [self.cut.shard(portion.pieces, portion.starts, i) for i in range(n)]
        shards = self._shards[portion]
        sent = {peer: gather(buffer, shard).to(self.dtype) for peer, shard in enumerate(shards)}
        size = sent[rank].numel() * sent[rank].element_size()
        outgoing = {p: s.view(torch.uint8) for p, s in sent.items() if p != rank and s.numel()}
        incoming = {p: buffer.new_empty(size, dtype=torch.uint8) for p in range(n) if p != rank and size}
        context.meter.add(up=sum(o.numel() for o in outgoing.values()))
        yield context.link.start(tag, outgoing, incoming)

        total = torch.zeros(shards[rank].numel, dtype=torch.float32, device=buffer.device)
        for peer in range(n):
            if size:
                total += sent[rank] if peer == rank else incoming[peer].view(self.dtype)
        mean = (total / n).to(self.dtype)
        outgoing = {p: mean.view(torch.uint8) for p in range(n) if p != rank and size}
        means = {p: torch.empty_like(s) for p, s in sent.items() if p != rank and s.numel()}
        context.meter.add(down=size * len(outgoing))
        yield context.link.start(tag + 1, outgoing, {p: m.view(torch.uint8) for p, m in means.items()})
        for peer, shard in enumerate(shards):
            if shard.numel:
                scatter((mean if peer == rank else means[peer]).float(), shard, buffer)

    def finite(self, buffer: Tensor, portion: Portion) -> Tensor:
        return all_finite(buffer, portion)
