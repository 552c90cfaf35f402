"""What the loss minds: the mean squared gradient of each weight at the model as it is."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from . import distributed
from .batches import UpdateStream, to_device
from .corpus import Corpus
from .fairseq_bridge import ModelWithLoss

BATCHES = 100
"""Micro-batches to take gradients of, all ranks together."""
TOKENS = 500
"""Of a micro-batch; more where a sentence is longer. Small ones, since gradients of a batch cancel out."""


def squared_gradients(
    model: nn.Module,
    corpus: Corpus,
    direction: str,
    *,
    seed: int,
    batches: int = BATCHES,
    on_batch: Callable[[int], None] = lambda done: None,
) -> dict[str, Tensor]:
    """The diagonal of the empirical Fisher matrix; called on every rank, the same on all of them.

    Gradients are of the cross entropy of a target token in the mean of a micro-batch, without dropout, in fp32.

    Args:
        model: without parametrizations; its gradients are None before and after.
        corpus: its training split is read.
        direction: `en-cs` or `cs-en`.
        seed: of the order of sentences.
        batches: how many, at least one a rank.
        on_batch: takes how many this rank has done.

    Returns:
        for each trainable parameter, by its first name, fp32 of its shape.
    """
    shards, world = corpus.split("train"), distributed.world_size()
    longest = max(int(shards.sizes(lang).max()) for lang in direction.split("-"))
    stream = UpdateStream(
        shards,
        direction,
        seed=seed,
        max_tokens=max(TOKENS, longest),
        update_freq=1,
        rank=distributed.rank(),
        world=world,
    )
    device = next(model.parameters()).device
    training = model.training
    with_loss = ModelWithLoss(model.eval(), 0.0)
    sums = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in model.named_parameters() if p.requires_grad}
    parameters = dict(model.named_parameters())
    turns = -(-batches // world)
    for turn in range(1, turns + 1):
        for sample in stream.update(turn).samples:
            loss, _ = with_loss(to_device(sample, device))
            (loss / sample["ntokens"]).backward()
            for name, total in sums.items():
                if (gradient := parameters[name].grad) is not None:
                    total += gradient.float().square()
            model.zero_grad()
        on_batch(turn)
    for total in sums.values():
        if world > 1:
            dist.all_reduce(total)
        total /= turns * world
    model.train(training)
    return sums
