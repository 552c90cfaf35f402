"""Cuts and shards: everything once, no span over two tensors, and codes and owners that do not depend on the bucket."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tenko.comm import Quantizer
from tenko.comm.lanes import gather, scatter
from tenko.comm.layout import Cut, as_stored, joined
from tenko.comm.reference import key_words

NUMELS = st.lists(st.one_of(st.integers(0, 60), st.integers(1, 5000)), min_size=1, max_size=8)


def starts_of(numels: list[int]) -> list[int]:
    return (np.cumsum(numels) - np.array(numels)).tolist()


@settings(max_examples=150, deadline=None)
@given(NUMELS, st.sampled_from([8, 64, 1024]), st.integers(1, 9), st.sampled_from([0, 500, 2048]))
def test_shards_cover_a_bucket_in_whole_spans(numels: list[int], span: int, world_size: int, piece: int) -> None:
    cut = Cut(numels, span, world_size, piece=piece)
    seen = np.zeros(sum(numels), dtype=np.int64)
    starts = starts_of(numels)
    for rank in range(world_size):
        part = cut.shard(range(len(numels)), starts, rank)
        spans = groups = 0
        for (start, numel, groups_before, spans_before, first), tensor in zip(part.table, part.tensors, strict=True):
            assert (groups_before, spans_before) == (groups, spans)
            assert start == starts[tensor] + first * span, "begins at a span of its tensor"
            assert start + numel == starts[tensor] + numels[tensor] or numel % span == 0, "ends at one's end"
            assert start + numel <= starts[tensor] + numels[tensor]
            seen[start : start + numel] += 1
            lengths = [min(span, numel - at) for at in range(0, numel, span)]
            spans += len(lengths)
            groups += sum(-(-length // 8) for length in lengths)
        assert (part.spans, part.groups, part.numel) == (spans, groups, part.table[:, 1].sum())
    assert (seen == 1).all(), "every element has one owner"


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 200_000), min_size=1, max_size=6), st.integers(1, 9))
def test_shards_are_balanced(numels: list[int], world_size: int) -> None:
    """The spans that are left over go round, so shards differ by one span, and by the short last spans of tensors."""
    cut = Cut(numels, 1024, world_size)
    shards = [cut.shard(range(len(numels)), starts_of(numels), rank) for rank in range(world_size)]
    spans = [shard.spans for shard in shards]
    assert max(spans) - min(spans) <= 1


def test_small_tensors_do_not_all_fall_to_one_owner() -> None:
    cut = Cut([10] * 8, 1024, 4)
    assert [cut.shard(range(8), starts_of([10] * 8), rank).spans for rank in range(4)] == [2, 2, 2, 2]


@settings(max_examples=60, deadline=None)
@given(NUMELS, st.integers(1, 5), st.sampled_from([2, 3, 4, 8]), st.integers(0, 2**32), st.sampled_from([0, 1024]))
def test_codes_and_owners_do_not_depend_on_the_bucket(
    numels: list[int], world_size: int, bits: int, seed: int, piece: int
) -> None:
    """Whatever tensors a bucket holds, in whatever order: the same owner gets the same bytes of each tensor."""
    quantizer = Quantizer(bits=bits, block=64)
    generator = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(numel, generator=generator) for numel in numels]
    cut = Cut(numels, quantizer.span, world_size, piece=piece)
    alone: dict[tuple[int, int], torch.Tensor] = {}
    for index, x in enumerate(tensors):
        for rank in range(world_size):
            part = cut.shard([index], [0], rank)
            out = torch.empty(part.size(bits), dtype=torch.uint8)
            quantizer.encode_shard(x, part, np.repeat(key_words((seed,), [index]), len(part.table), axis=0), out)
            alone[index, rank] = out
    for order in (range(len(numels)), range(len(numels))[::-1]):
        bucket = torch.cat([tensors[i] for i in order])
        starts = starts_of([numels[i] for i in order])
        parts = [cut.shard(list(order), starts, rank) for rank in range(world_size)]
        whole = joined(parts)
        sent = torch.empty(whole.size(bits), dtype=torch.uint8)
        keys = key_words((seed,), np.array(list(order), dtype=np.int64)[whole.tensors])
        quantizer.encode_shard(bucket, whole, keys, sent)
        shards = sent.split([part.size(bits) for part in parts])
        for rank, shard in enumerate(shards):
            assert torch.equal(shard, torch.cat([alone[i, rank] for i in order]))
        # all at once, shard by shard into the bucket, and shard by shard into a buffer of its own: the same values
        at_once, by_shard, compact = (torch.full_like(bucket, 9) for _ in range(3))
        quantizer.decode_shard(sent, whole, at_once)
        for part, payload in zip(parts, shards, strict=True):
            quantizer.decode_shard(payload, part, by_shard)
            own = torch.empty(part.numel)
            quantizer.decode_shard(payload, part.compact(), own)
            assert torch.equal(own, gather(by_shard, part))
            scatter(own, part, compact)
        assert torch.equal(at_once, by_shard)
        assert torch.equal(at_once, compact)


def test_pieces_of_a_tensor_lie_side_by_side() -> None:
    cut = Cut([5000, 3, 0], 64, 2, piece=1000)
    pieces = cut.pieces(0)
    assert [piece.numel for piece in pieces] == [960] * 5 + [200]
    assert [piece.start for piece in pieces] == [960 * i for i in range(6)]
    assert [piece.numel for piece in cut.pieces(1)] == [3]
    assert cut.pieces(2) == []
    one = [cut.shard([pieces[2]], [100], rank) for rank in range(2)]
    assert sum(part.numel for part in one) == 960
    assert one[0].table[0, 0] == 100 + 1920
    with pytest.raises(ValueError, match="zip"):
        cut.shard([0, 1], [0], 0)


def test_a_run_of_parts_is_its_parts() -> None:
    """Two levels: what parts 2 to 4 own is one run of each tensor, and contains what each of them owns."""
    numels = [9000, 700, 64]
    cut = Cut(numels, 64, 6, rows=[90, 0, 8])
    starts = starts_of(numels)
    run = cut.shard(range(3), starts, 2, 5)
    assert len(run.table) <= 3
    parts = [cut.shard(range(3), starts, rank) for rank in (2, 3, 4)]
    assert run.numel == sum(part.numel for part in parts)
    assert set(run.rows.tolist()) <= {90, 0, 8}
    for part in parts:
        for start, numel, *_ in part.table:
            assert any(s <= start and start + numel <= s + n for s, n, *_ in run.table)


def test_joined_shards_are_one_run_of_bytes() -> None:
    numels = [1000, 3, 2500]
    parts = [Cut(numels, 64, 4).shard(range(3), starts_of(numels), rank) for rank in range(4)]
    whole = joined(parts)
    assert whole.size(3) == sum(part.size(3) for part in parts)
    assert whole.numel == 3503


def test_key_words_differ_by_every_part() -> None:
    keys = {tuple(row) for prefix in ((1, 2), (2, 1), (1, 2, 0), (-1, 2)) for row in key_words(prefix, range(1000))}
    assert len(keys) == 4000


@pytest.mark.parametrize(
    "parameter",
    [
        torch.zeros(()),
        torch.zeros(0, 7),
        torch.zeros(3, 4),
        torch.zeros(3, 4).t(),
        torch.zeros(6, 1).t(),
        torch.zeros(5, 6, 7).permute(2, 0, 1),
        torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last),
    ],
    ids=lambda parameter: str(parameter.stride()),
)
def test_a_gradient_lies_in_the_bucket_as_its_parameter_lies_in_memory(parameter: torch.Tensor) -> None:
    bucket = torch.arange(parameter.numel())
    gradient = bucket.as_strided(parameter.shape, parameter.stride())  # DDP's view of it
    assert torch.equal(as_stored(gradient, parameter).reshape(-1), bucket)


def test_a_parameter_with_gaps_goes_by_its_indices() -> None:
    with_gaps = torch.zeros(6, 8)[:, :5]
    assert as_stored(with_gaps, with_gaps) is with_gaps
