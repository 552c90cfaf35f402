"""Which sentences are in which update: a pure function of (seed, update, micro-batches an update).

Batches are cut once, by length, as fairseq does; each epoch shuffles them anew, and epochs follow one another without a
seam, so every update has exactly `micro_batches` batches: no dummy batches, none dropped. Because nothing but the
update's number is needed, a resumed or rewound run reads the same sentences, and every rank knows the target
tokens of all ranks without asking them. Ranks take turns: the sentences of an update are the same for any number of
ranks that shares them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .fairseq_bridge import batch_by_tokens, collate
from .shards import PairShards


@dataclass(frozen=True)
class MicroBatches:
    """The work of one rank in one update."""

    samples: list[dict[str, Any]]
    """Collated batches: those whose place in the update is the rank, the rank + world, ..."""
    target_tokens: int
    """Target tokens of the whole update, over all ranks."""


class UpdateStream:
    """Training batches of one rank.

    Args:
        shards: the training split.
        direction: `en-cs` or `cs-en`.
        seed: of the order.
        max_tokens: tokens a batch, padding included.
        update_freq: batches a rank and update, where the training begins with these ranks.
        rank, world: which share is ours.

    Raises:
        ValueError: a sentence is longer than `max_tokens`.
    """

    def __init__(
        self, shards: PairShards, direction: str, *, seed: int, max_tokens: int, update_freq: int, rank: int, world: int
    ) -> None:
        self.shards = shards
        self.source, self.target = direction.split("-")
        self.seed, self.rank, self.world = seed, rank, world
        self.micro_batches = world * update_freq
        """Batches of an update, all ranks together, at least one a rank; a training that goes on with more or fewer
        ranks keeps what it began with."""
        order, sizes = length_order(shards, direction, np.random.default_rng((seed, 0x0BDE)))
        if len(sizes) and sizes.max() > max_tokens:
            raise ValueError(
                f"train.max_tokens: a sentence has {sizes.max()} tokens, more than a batch of {max_tokens}"
            )
        batches = batch_by_tokens(order, sizes, max_tokens)
        # One flat array and offsets: a list of a million small arrays would weigh more than the sentences.
        self._flat = np.concatenate(batches)
        self._starts = np.concatenate([[0], np.cumsum([len(b) for b in batches])])
        target_sizes = shards.sizes(self.target)
        self._tokens = np.array([int(target_sizes[b].sum()) for b in batches], dtype=np.int64)
        self._epoch_order: dict[int, np.ndarray] = {}

    @property
    def batches_per_epoch(self) -> int:
        """Micro-batches in one pass over the corpus, all ranks together."""
        return len(self._tokens)

    def epoch(self, update: int) -> float:
        """Passes over the corpus when update number `update` (from 1) is done."""
        return update * self.micro_batches / self.batches_per_epoch

    def _batch_number(self, position: int) -> int:
        epoch, offset = divmod(position, self.batches_per_epoch)
        if epoch not in self._epoch_order:
            self._epoch_order = {e: o for e, o in self._epoch_order.items() if e >= epoch - 1}
            self._epoch_order[epoch] = np.random.default_rng((self.seed, epoch)).permutation(self.batches_per_epoch)
        return int(self._epoch_order[epoch][offset])

    def update(self, update: int) -> MicroBatches:
        """The batches of update number `update`, counted from 1."""
        assert self.micro_batches >= self.world, "every rank must take part in the exchange"
        first = (update - 1) * self.micro_batches
        numbers = [self._batch_number(first + i) for i in range(self.micro_batches)]
        samples = [self._collate(n) for n in numbers[self.rank :: self.world]]
        return MicroBatches(samples, int(self._tokens[numbers].sum()))

    def _collate(self, number: int) -> dict[str, Any]:
        indices = self._flat[self._starts[number] : self._starts[number + 1]]
        read = self.shards.tokens
        return collate([(int(i), read(self.source, int(i)), read(self.target, int(i))) for i in indices])


def length_order(
    shards: PairShards, direction: str, generator: np.random.Generator | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Sentences sorted by source length, then target length, ties shuffled; and the longer side of each pair.

    Returns:
        indices int64 [pairs] in that order, and lengths in tokens [pairs] indexed by sentence.
    """
    source, target = (np.asarray(shards.sizes(lang)) for lang in direction.split("-"))
    order = np.arange(len(shards)) if generator is None else generator.permutation(len(shards))
    order = order[np.argsort(target[order], kind="stable")]
    order = order[np.argsort(source[order], kind="stable")]
    return order, np.maximum(source, target)


def fixed_batches(shards: PairShards, direction: str, max_tokens: int, rank: int, world: int) -> list[np.ndarray]:
    """Batches of sentence indices for validation, longest first, this rank's share of them."""
    order, sizes = length_order(shards, direction)
    longest = int(sizes.max()) if len(sizes) else 1
    return batch_by_tokens(order, sizes, max(max_tokens, longest), multiple=1)[::-1][rank::world]


def to_device(sample: Any, device: torch.device) -> Any:
    """A collated batch with its tensors on `device`."""
    if device.type == "cpu":
        return sample
    if isinstance(sample, Tensor):
        return sample.to(device, non_blocking=True)
    if isinstance(sample, dict):
        return {key: to_device(value, device) for key, value in sample.items()}
    return sample
