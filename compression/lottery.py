"""Lottery tickets by late rewinding: the rounds, their masks, and what each of them begins with; no training here.

Save theta_k while the dense model trains to T. Each round prunes a fraction of the smallest surviving weights of what
the round before trained, rewinds the others to theta_k, with schedule and data position, and trains to T again.

The controls change one thing each (`Start` says which):
- random: random masks with the ticket's counts in each tensor.
- reinit: the masks on weights drawn anew, which begin at update 0.
- no_rewind: magnitude pruning. The trained weights go on; only learning rate and data are rewound ("learning rate
  rewinding", Renda et al. 2020), so that the budget is that of a ticket.
- stabilised: as Brix et al. 2020 do it. The weights are those that the round before, not the dense model, had after k
  updates, and the schedule begins at 0 with its warm-up and without moments. (The stabilised lottery ticket of Frankle
  et al. 2019, theta_k of the dense model, is what control none does with rewind_to above 0.) They prune each layer for
  itself: scope module.
- constant: sign(theta_k) * alpha, alpha = sqrt(6 / (inputs + outputs)) of the tensor: signs survive, values do not.

Source: Frankle & Carbin 2019; Frankle et al. 2019, 2020 (rewinding); Yu et al. 2020 (Transformers); Brix, Bahar & Ney
2020, section 3 (stabilised and constant tickets); Zhou et al. 2019 (constant).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .config import LotteryConfig
from .masks import Masks
from .pruning import prune, random_masks, seed_of


@dataclass(frozen=True)
class Round:
    """One training of a pruned model."""

    number: int
    """From 1."""
    prunings: int
    """How often the fraction has been pruned by then."""

    @property
    def folder(self) -> str:
        """Name of its folder in the stage's."""
        return f"round-{self.number:02d}"


def rounds(config: LotteryConfig) -> list[Round]:
    """The rounds of a stage, in order; one-shot pruning has one."""
    return [Round(number, prunings) for number, prunings in enumerate(config.prunings, start=1)]


def round_of(config: LotteryConfig, prunings: int) -> Round:
    """The round of a stage whose weights have been pruned so often.

    Raises:
        ValueError: it has none.
    """
    return Round(config.prunings.index(prunings) + 1, prunings)


@dataclass(frozen=True)
class Start:
    """What a round begins with."""

    weights: Literal["dense", "last", "trained", "fresh"]
    """dense: of update `rewind_to` of the dense model. last: of the same update of the round before. trained: of the
    end of the round before. fresh: drawn anew."""
    update: int
    """Where schedule and data begin."""
    moments: Literal["dense", "trained", "zero"]
    """Adam's moments: of update `rewind_to` of the dense model, of the end of the round before, or none."""


def start_of(config: LotteryConfig) -> Start:
    """What each round of a stage begins with."""
    restored = config.moments == "restore"
    if config.control == "reinit":
        return Start("fresh", 0, "zero")
    if config.control == "stabilised":
        return Start("last", 0, "zero")
    if config.control == "no_rewind":
        return Start("trained", config.rewind_to, "trained" if restored else "zero")
    return Start("dense", config.rewind_to, "dense" if restored else "zero")


def masks_of_round(
    config: LotteryConfig,
    this: Round,
    trained: Mapping[str, Tensor],
    before: Masks,
    *,
    seed: int,
    given: Masks | None = None,
) -> Masks:
    """The masks of a round; each is nested in those of the round before.

    Args:
        config: fraction, scope and control.
        this: the round.
        trained: weights that the round before ended with, the dense model's for round 1.
        before: masks of the round before; all ones for round 1.
        seed: of random masks.
        given: masks of another stage (`masks_of`), of its round by `round_of`, which are taken instead of pruning.

    Raises:
        ValueError: see `prune`.
    """
    masks = given
    if masks is None:
        masks = prune(trained, before, fraction=config.fraction, rounds=this.prunings, scope=config.scope)
    return random_masks(masks, seed_of("masks", seed)) if config.control == "random" else masks


def reinit_seed(seed: int) -> int:
    """The seed of the weights that control reinit draws, of the recipe's."""
    return seed_of("reinit", seed)


def constant(weights: Mapping[str, Tensor], masks: Masks) -> dict[str, Tensor]:
    """Weights under a mask by their signs, in one magnitude a tensor; others as they are.

    Args:
        weights: by name, [outputs, inputs, ...].
        masks: of some of them.

    Returns:
        sign(w) * sqrt(6 / (inputs + outputs)), or w where there is no mask.

    Source: Zhou et al. 2019; the magnitude of Brix et al. 2020, section 3.
    """
    result = dict(weights)
    for name in masks:
        weight = weights[name]
        result[name] = weight.sign() * math.sqrt(6 / (weight.numel() // len(weight) + len(weight)))
    return result


@torch.no_grad()
def mask_optimizer(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], masks: Masks) -> None:
    """Zero the moments of pruned weights, so that they don't move on their own."""
    for name, mask in masks.items():
        for value in optimizer.state.get(parameters[name], {}).values():
            if isinstance(value, Tensor) and value.shape == mask.shape:
                value.masked_fill_(~mask.to(value.device), 0)


def mask_feedback(route_state: dict[str, Any], parameters: list[nn.Parameter], masks: Mapping[int, Tensor]) -> None:
    """Zero what a route's error feedback still owes to pruned weights, in the route's state, in place.

    Args:
        route_state: `Route.state_dict()`.
        parameters: of the DDP model, in order: the state counts by it.
        masks: by the id of the parameter.
    """
    for index, residual in (route_state.get("feedback") or {}).items():
        mask = masks.get(id(parameters[int(index)]))
        if mask is not None:
            residual.view(-1).masked_fill_(~mask.reshape(-1), 0)
    for candidate in (route_state.get("candidates") or {}).values():  # route: auto
        mask_feedback(candidate, parameters, masks)
