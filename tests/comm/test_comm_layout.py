"""Spans and shards: everything once, no span over two tensors, and codes that do not depend on the bucket."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tenko.comm import Quantizer
from tenko.comm.collectives import BucketPlan
from tenko.comm.layout import joined, shards
from tenko.comm.reference import key_words

NUMELS = st.lists(st.one_of(st.integers(1, 60), st.integers(1, 5000)), min_size=1, max_size=8)


@settings(max_examples=150, deadline=None)
@given(NUMELS, st.sampled_from([8, 64, 1024]), st.integers(1, 9))
def test_shards_cover_a_bucket_in_whole_spans(numels: list[int], block: int, world_size: int) -> None:
    parts = shards(numels, block, world_size)
    assert len(parts) == world_size
    assert parts[0].start == 0
    assert parts[-1].stop == sum(numels)
    assert all(a.stop == b.start for a, b in pairwise(parts))
    starts = np.cumsum([0, *numels])
    for part in parts:
        blocks = groups = 0
        for (start, numel, groups_before, blocks_before, first), tensor in zip(part.table, part.tensors, strict=True):
            assert (groups_before, blocks_before) == (groups, blocks)
            assert part.start + start == starts[tensor] + first * block, "begins at a block of its tensor"
            end = part.start + start + numel
            assert end == starts[tensor + 1] or numel % block == 0, "ends at a block's or the tensor's end"
            assert end <= starts[tensor + 1]
            lengths = [min(block, numel - at) for at in range(0, numel, block)]
            blocks += len(lengths)
            groups += sum(-(-length // 8) for length in lengths)
        assert (part.spans, part.groups) == (blocks, groups)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 200_000), st.integers(1, 9))
def test_shards_are_balanced(numel: int, world_size: int) -> None:
    sizes = [part.size(3) for part in shards([numel, 17], 1024, world_size)]
    one_block = Quantizer(bits=3).size(1024)
    assert max(sizes) - min(sizes) <= 2 * one_block


@settings(max_examples=60, deadline=None)
@given(NUMELS, st.integers(1, 5), st.sampled_from([2, 3, 4, 8]), st.integers(0, 2**32))
def test_codes_do_not_depend_on_the_bucket(numels: list[int], world_size: int, bits: int, seed: int) -> None:
    """A bucket's bytes, cut for any number of ranks, are its tensors' bytes, in any order of the tensors."""
    quantizer = Quantizer(bits=bits, block=64)
    generator = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(numel, generator=generator) for numel in numels]
    alone = [quantizer.encode(x, (seed, i)) for i, x in enumerate(tensors)]
    for order in (range(len(numels)), range(len(numels))[::-1]):
        plan = BucketPlan(
            tuple(order),
            tuple(numels[i] for i in order),
            0,
            world_size,
            quantizer,
            quantizer,
            torch.device("cpu"),
        )
        bucket = torch.cat([tensors[i] for i in order])
        quantizer.encode_shard(bucket, plan.whole, plan.keys(plan.whole, (seed,)), plan.sent)
        assert torch.equal(plan.sent, torch.cat([alone[i] for i in order]))
        # and each shard decodes by itself
        out = torch.empty_like(bucket)
        for part, payload in zip(plan.parts, plan.sent.split(plan.up_sizes), strict=True):
            quantizer.decode_shard(payload, part, out[part.start : part.stop])
        expected = [quantizer.decode(alone[i], numels[i]) for i in order]
        assert torch.equal(out, torch.cat(expected))


def test_joined_shards_are_one_run_of_bytes() -> None:
    parts = shards([1000, 3, 2500], 64, 4)
    whole = joined(parts)
    assert whole.size(3) == sum(part.size(3) for part in parts)
    assert (whole.start, whole.stop) == (0, 3503)


def test_key_words_differ_by_every_part() -> None:
    keys = {tuple(row) for prefix in ((1, 2), (2, 1), (1, 2, 0), (-1, 2)) for row in key_words(prefix, range(1000))}
    assert len(keys) == 4000
