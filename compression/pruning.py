"""Pruning: which weights go, to the exact count.

What is notable: how many weights survive is a function of the number of prunable weights, the fraction and the round
alone. No threshold decides it, so that equal magnitudes (zeros, say) never prune more than was asked for.

A pruner is a score (`magnitude`: a figure for every weight) and a granularity (`WEIGHTS`: what is pruned as one):
heads, neurons and layers need another granularity and nothing else.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from .masks import Masks
from .technique import Weight, name_matches, select_weights, weights


def prunable(
    model: nn.Module, include: Sequence[str] = ("*",), exclude: Sequence[str] = (), *, embeddings: bool = False
) -> list[Weight]:
    """The weights that may be pruned: two or more dimensions, so neither biases nor LayerNorm; a tied one once.

    Args:
        model: not parametrized.
        include, exclude: see `select_weights`.
        embeddings: also what an `nn.Embedding` holds, with the output projection where it is tied to one. Embeddings
            have another scale than matrices, which one threshold for all does not suit.

    Raises:
        ValueError: as `select_weights`, or a pattern of `include` matches embeddings only and they are not asked for.
    """
    found = select_weights(model, include, exclude)
    if embeddings:
        return found
    for pattern in include:
        if all(_is_embedding(w) for w in weights(model) if name_matches(w, (pattern,))):
            raise ValueError(f"include: {pattern!r} matches embeddings only; set embeddings: true to prune them")
    matrices = [w for w in found if not _is_embedding(w)]
    if not matrices:
        raise ValueError(f"exclude: {list(exclude)} leaves embeddings only; set embeddings: true to prune them")
    return matrices


def _is_embedding(weight: Weight) -> bool:
    return any(isinstance(module, nn.Embedding) for module, _ in weight.sites)


def remaining_count(total: int, fraction: float, rounds: int) -> int:
    """round(total * (1 - fraction)^rounds): what survives when each round prunes that fraction of the survivors.

    Raises:
        ValueError: the fraction is not in [0, 1).
    """
    if not 0 <= fraction < 1:
        raise ValueError(f"fraction: must be in [0, 1), is {fraction}")
    assert total >= 0, total
    assert rounds >= 0, rounds
    return round(total * (1 - fraction) ** rounds)


Score = Callable[[Tensor], Tensor]
"""Weight [shape] to fp32 scores of the same shape; the smallest are pruned."""


def magnitude(weight: Tensor) -> Tensor:
    """|w|. Source: Han et al. 2015."""
    return weight.detach().float().abs()


class Granularity(Protocol):
    """What is pruned as one: a weight, a row (neuron), a group of rows (head)."""

    def units(self, scores: Tensor) -> Tensor:
        """Scores of the weights [shape] to scores of the units [n]."""
        ...

    def spread(self, units: Tensor, like: Tensor) -> Tensor:
        """A bool a unit [n] to one a weight, in the shape of `like`."""
        ...


class EachWeight:
    """Every weight for itself: unstructured pruning."""

    def units(self, scores: Tensor) -> Tensor:
        return scores.reshape(-1)

    def spread(self, units: Tensor, like: Tensor) -> Tensor:
        return units.reshape(like.shape)


WEIGHTS = EachWeight()


def prune(
    tensors: Mapping[str, Tensor],
    masks: Masks,
    *,
    fraction: float,
    rounds: int,
    scope: Literal["global", "module"] = "global",
    score: Score = magnitude,
    granularity: Granularity = WEIGHTS,
) -> Masks:
    """Prune the surviving units of the smallest scores until as many survive as after `rounds` rounds.

    Args:
        tensors: trained weights, at least those that have a mask.
        masks: what survives so far; the result is nested in it.
        fraction: of the survivors, pruned in each round.
        rounds: rounds in all, those that led to `masks` included.
        scope: global ranks all weights together; module leaves the same fraction of each tensor.
        score: what the weights are ranked by. Of equal ones the earlier is pruned first, by name and place.
        granularity: what is pruned as one.

    Raises:
        ValueError: fraction is not in [0, 1), or a weight holds inf or NaN; names it.
    """
    scores, alive = {}, {}
    names = sorted(masks)  # no order of the model's: masks read from a file have another
    for name in names:
        mask = masks[name]
        if not bool(torch.isfinite(tensors[name]).all()):
            raise ValueError(f"{name}: holds inf or NaN and can't be ranked for pruning")
        scores[name] = granularity.units(score(tensors[name]).cpu())
        alive[name] = granularity.units(mask)
    if scope == "global":
        flat = torch.cat([alive[name] for name in names])
        kept = keep_largest(
            torch.cat([scores[name] for name in names]), flat, remaining_count(flat.numel(), fraction, rounds)
        )
        parts = dict(zip(names, kept.split([alive[name].numel() for name in names]), strict=True))
    else:
        parts = {
            name: keep_largest(scores[name], alive[name], remaining_count(alive[name].numel(), fraction, rounds))
            for name in masks
        }
    return Masks({name: granularity.spread(parts[name], mask) for name, mask in masks.items()})


def random_masks(like: Masks, seed: int) -> Masks:
    """Random masks with as many survivors in each tensor as `like` has.

    A seed stands for one random order of each tensor's weights, so masks of the same seed and of falling counts are
    nested.
    """
    masks = {}
    for name, mask in like.items():
        generator = torch.Generator().manual_seed(seed_of(seed, name))
        order = torch.randperm(mask.numel(), generator=generator)
        survives = torch.zeros(mask.numel(), dtype=torch.bool)
        survives[order[: int(mask.sum())]] = True
        masks[name] = survives.reshape(mask.shape)
    return Masks(masks)


def keep_largest(scores: Tensor, alive: Tensor, keep: int) -> Tensor:
    """The `keep` units of the largest scores among those alive; of equal scores the later ones are kept.

    Args:
        scores: fp32 [n], finite.
        alive: bool [n].
        keep: how many; all that are alive if there are no more.

    Returns:
        bool [n].
    """
    drop = int(alive.sum()) - keep
    if drop <= 0:
        return alive.clone()
    of_alive = scores[alive]
    bound = of_alive.kthvalue(drop).values
    dropped = of_alive < bound
    equal = torch.nonzero(of_alive == bound).reshape(-1)
    dropped[equal[: drop - int(dropped.sum())]] = True
    kept = alive.clone()
    kept[alive] = ~dropped
    return kept


def seed_of(*parts: int | str) -> int:
    """A seed for torch, 63 bits, of what tells one use of randomness from another."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "little") >> 1
