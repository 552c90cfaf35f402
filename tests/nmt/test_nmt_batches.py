"""Which sentences are in which update: all of them, once an epoch, whatever the ranks."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch

from tenko.nmt.batches import UpdateStream, fixed_batches, length_order
from tenko.nmt.corpus import Corpus
from tenko.nmt.fairseq_bridge import EOS, PAD, batch_by_tokens
from tenko.nmt.shards import PairShards

MAX_TOKENS = 300


def stream(shards: PairShards, rank: int = 0, world: int = 1, update_freq: int = 1, **changes: Any) -> UpdateStream:
    settings = {"direction": "en-cs", "seed": 1, "max_tokens": MAX_TOKENS} | changes
    direction = settings.pop("direction")
    return UpdateStream(shards, direction, update_freq=update_freq, rank=rank, world=world, **settings)


@pytest.fixture(scope="module")
def shards(small_corpus: Corpus) -> PairShards:
    found = small_corpus.split("train")
    assert len(found) % 8, "the last batch must not be a multiple of eight"
    return found


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("update_freq", [1, 3])
def test_every_sentence_comes_once_an_epoch_over_all_ranks(shards: PairShards, world: int, update_freq: int) -> None:
    ranks = [stream(shards, rank, world, update_freq) for rank in range(world)]
    batches = ranks[0].batches_per_epoch
    assert batches > 3 * world * update_freq
    epochs = 3
    updates = -(-epochs * batches // (world * update_freq))
    seen: list[list[int]] = []  # batches in the order of the plan: ranks take turns
    for update in range(1, updates + 1):
        work = [ranked.update(update) for ranked in ranks]
        assert {len(w.samples) for w in work} == {update_freq}
        for turn in range(update_freq):
            seen += [w.samples[turn]["id"].tolist() for w in work]
        # every rank knows the tokens of all
        tokens = sum(sample["ntokens"] for w in work for sample in w.samples)
        assert {w.target_tokens for w in work} == {tokens}
        real = sum(int((sample["target"] != PAD).sum()) for w in work for sample in w.samples)
        assert real == tokens
    for epoch in range(epochs):  # the seams between epochs lie inside updates
        counts = Counter(i for batch in seen[epoch * batches : (epoch + 1) * batches] for i in batch)
        assert counts == Counter(range(len(shards))), f"epoch {epoch}"
    assert seen[:batches] != seen[batches : 2 * batches], "epochs are shuffled anew"


def test_the_union_of_an_update_does_not_depend_on_how_ranks_share_it(shards: PairShards) -> None:
    one = stream(shards, 0, 1, 6).update(4)
    two = [stream(shards, rank, 2, 3).update(4) for rank in range(2)]
    assert sorted(s["id"].tolist() for s in one.samples) == sorted(s["id"].tolist() for w in two for s in w.samples)
    assert one.target_tokens == two[0].target_tokens == two[1].target_tokens


def test_an_update_is_a_pure_function_of_its_number(shards: PairShards) -> None:
    went_through = stream(shards, 1, 2, 2)
    numbers = [1, 2, 3, 30, 31, 7, 2]
    for number in numbers:
        known, fresh = went_through.update(number), stream(shards, 1, 2, 2).update(number)
        assert known.target_tokens == fresh.target_tokens
        for one, other in zip(known.samples, fresh.samples, strict=True):
            for key in ("id", "target", "kept"):
                assert torch.equal(one[key], other[key])
            for key in ("src_tokens", "prev_output_tokens"):
                assert torch.equal(one["net_input"][key], other["net_input"][key])


def test_the_seed_changes_the_order_and_the_batches(shards: PairShards) -> None:
    streams = [stream(shards, seed=seed) for seed in (1, 1, 2)]
    first = [[s["id"].tolist() for s in each.update(1).samples] for each in streams]
    assert first[0] == first[1] != first[2]
    order = [[each._batch_number(position) for position in range(each.batches_per_epoch)] for each in streams]
    assert order[0] == order[1] != order[2], "of batches in an epoch"
    assert streams[0]._flat.tolist() == streams[1]._flat.tolist() != streams[2]._flat.tolist(), (
        "of sentences of a length"
    )


@pytest.mark.parametrize("direction", ["en-cs", "cs-en"])
def test_batches_keep_max_tokens_and_hold_the_pair_in_the_right_direction(shards: PairShards, direction: str) -> None:
    ours = stream(shards, direction=direction)
    source, target = direction.split("-")
    sizes = []
    for update in range(1, ours.batches_per_epoch + 1):
        (sample,) = ours.update(update).samples
        for side in (sample["net_input"]["src_tokens"], sample["target"]):
            assert side.numel() <= MAX_TOKENS
        sizes.append(max(sample["net_input"]["src_tokens"].numel(), sample["target"].numel()))
        index = int(sample["id"][0])
        assert [t for t in sample["net_input"]["src_tokens"][0].tolist() if t != PAD] == list(
            shards.tokens(source, index)
        )
        wanted = list(shards.tokens(target, index))
        assert [t for t in sample["target"][0].tolist() if t != PAD] == wanted
        shifted = [t for t in sample["net_input"]["prev_output_tokens"][0].tolist() if t != PAD]
        assert shifted == [EOS, *wanted[:-1]]
    assert np.mean(sizes) > 0.6 * MAX_TOKENS, "batches are nearly full"


def test_a_sentence_longer_than_a_batch_is_refused_with_the_key(shards: PairShards) -> None:
    longest = int(max(shards.sizes("en").max(), shards.sizes("cs").max()))
    stream(shards, max_tokens=longest)
    with pytest.raises(ValueError, match=rf"\Atrain\.max_tokens: a sentence has {longest} tokens.*{longest - 1}\Z"):
        stream(shards, max_tokens=longest - 1)


@pytest.mark.parametrize("sentences", [1, 7, 8, 9, 15, 100, 101])
@pytest.mark.parametrize("multiple", [1, 8])
def test_nothing_is_dropped_where_fairseq_drops_the_last_batch(sentences: int, multiple: int) -> None:
    sizes = np.random.default_rng(sentences).integers(2, 40, 2 * sentences)
    order = np.arange(0, 2 * sentences, 2)  # not every sentence of the corpus, and not numbered through
    order = order[np.argsort(sizes[order], kind="stable")]
    batches = batch_by_tokens(order, sizes, 120, multiple=multiple)
    assert np.concatenate(batches).tolist() == order.tolist()
    for batch in batches:
        assert len(batch) * sizes[batch].max() <= 120
    if multiple == 8 and sentences == 100:
        assert sum(len(batch) % 8 == 0 for batch in batches) >= 3


@pytest.mark.parametrize("world", [1, 3])
def test_validation_batches_cover_the_split_whatever_max_tokens(small_corpus: Corpus, world: int) -> None:
    valid = small_corpus.split("valid")
    for max_tokens in (1, 150, 10_000):  # at 1 a sentence is longer than a batch: it still gets one
        shares = [fixed_batches(valid, "cs-en", max_tokens, rank, world) for rank in range(world)]
        flat = sorted(int(i) for share in shares for batch in share for i in batch)
        assert flat == list(range(len(valid)))
    longest_first = fixed_batches(valid, "en-cs", 150, 0, 1)
    sizes = length_order(valid, "en-cs")[1]
    assert sizes[longest_first[0]].max() >= sizes[longest_first[-1]].max()
