"""What a checkpoint holds of a trainer, and how a trainer takes it back, by as many workers or by others.

An update has as many micro-batches as when the training began, whoever computes them: other workers share the same ones
anew. Sentences, their order and dropout stay what they were; sums are added up in another order. What a worker keeps of
its own goes: error feedback begins at zero. Shards of optimizer state are put together again (`comm/reshard.py`); where
they cannot be (DeepSpeed's), that is an error, never a silent loss.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tenko.comm import reshard
from tenko.compression.technique import Technique

from . import checkpoint, distributed
from .config import TrainConfig

if TYPE_CHECKING:
    from .trainer import Trainer

logger = logging.getLogger(__name__)


def shared_state(trainer: Trainer) -> dict[str, Any]:
    """What all ranks have in common beside the weights."""
    best = trainer.best
    return {
        "update": trainer.updates,
        "world": trainer.stream.world,
        "micro_batches": trainer.stream.micro_batches,
        "optimizer": None if trainer.engine else trainer.optimizer.state_dict(),
        "scaler": trainer.scaler.state_dict(),
        "best": [best.bleu, best.update, best.since, best.nll],
        "seconds": trainer.seconds,
        **techniques_state(trainer),
    }


def techniques_state(trainer: Trainer) -> dict[str, Any]:
    """What techniques keep beside the weights, which are read by it: the codebooks of that update, for instance."""
    states = [technique.state_dict() for technique in trainer.techniques]
    return {"techniques": states} if states else {}


def load_techniques(techniques: Sequence[Technique], state: dict[str, Any]) -> None:
    """Take back what `techniques_state` gave; the checkpoint may be of a training without techniques."""
    if kept := state.get("techniques"):
        for technique, own_state in zip(techniques, kept, strict=True):
            technique.load_state_dict(own_state)


def rank_state(trainer: Trainer) -> dict[str, Any]:
    """This rank's own."""
    return {
        "route": None if trainer.route is None else trainer.route.state_dict(),
        "engine": None if trainer.engine is None else trainer.engine.state_dict(),
        "figures": trainer.sums.state(),
    }


def restore(trainer: Trainer, folder: Path, *, only_weights: bool = False, check: bool = True) -> None:
    """Take weights, counters and all other state of a checkpoint; called on every rank.

    Args:
        trainer: of the same model.
        folder: the checkpoint.
        only_weights: leave optimizer, route and techniques as they are.
        check: hold the files to their checksums.

    Raises:
        ValueError: it is damaged, of another model, or cannot be gone on with by so many workers; names the file.
    """
    weights, state, own = checkpoint.load(folder, rank=distributed.rank(), check=check)
    load_weights(trainer.parameters, weights, folder)
    trainer.take_counters(state)
    keep_batch(trainer, state, folder)
    if only_weights:
        return
    load_techniques(trainer.techniques, state)
    before = int(state["world"])
    if trainer.stream.world != before:
        _from_others(trainer, folder, state, before)
        return
    if own is None:
        raise ValueError(f"{folder}: has no state of rank {distributed.rank()}")
    if trainer.engine is not None:
        trainer.engine.load_state_dict(own.get("engine"))
    elif state["optimizer"] is None:
        raise ValueError(_zero(folder, before))
    else:
        trainer.optimizer.load_state_dict(state["optimizer"])
    if trainer.route is not None and own["route"] is not None:
        trainer.route.load_state_dict(own["route"])
    trainer.sums.take(own["figures"])


def keep_batch(trainer: Trainer, state: dict[str, Any], folder: Path) -> None:
    """Take over how many micro-batches an update has, whoever computes them now.

    Args:
        trainer: takes them.
        state: shared state of a checkpoint.
        folder: of the checkpoint, for the message.

    Raises:
        ValueError: they are too few for so many workers.
    """
    world = trainer.stream.world
    # Older checkpoints do not say it: no other workers went on with them.
    micro_batches = state.get("micro_batches", int(state["world"]) * trainer.config.update_freq)
    if world > micro_batches:
        raise ValueError(
            f"{folder}: an update of this training has {micro_batches} micro-batches, too few for {world} workers; "
            f"go on with at most {micro_batches}"
        )
    trainer.stream.micro_batches = micro_batches


def _from_others(trainer: Trainer, folder: Path, state: dict[str, Any], before: int) -> None:
    """Optimizer and route, saved by another number of workers."""
    if trainer.engine is not None or state["optimizer"] is None:
        raise ValueError(_zero(folder, before))
    world, micro_batches = trainer.stream.world, trainer.stream.micro_batches
    saved = [(checkpoint.load_rank(folder, rank) or {}).get("route") for rank in range(before)]
    routes = [route for route in saved if route is not None]
    try:
        reshard.adopt(trainer.route, trainer.optimizer, list(trainer.model.parameters()), state["optimizer"], routes)
    except ValueError as error:
        raise ValueError(f"{folder}: saved by {before} workers, now {world}: {error}") from None
    owed = any(_has_feedback(route) for route in routes)
    if distributed.rank() == 0:
        logger.warning(
            "saved by %d workers, now %d: the %d micro-batches of an update are shared anew%s",
            before,
            world,
            micro_batches,
            "; error feedback of the route begins at zero" if owed else "",
        )


def _has_feedback(route: dict[str, Any]) -> bool:
    return bool(route.get("feedback")) or any(map(_has_feedback, (route.get("candidates") or {}).values()))


def _zero(folder: Path, before: int) -> str:
    return (
        f"{folder}: its optimizer's state is DeepSpeed's, in shares of {before} workers; "
        f"go on with {before} workers and train.engine: deepspeed"
    )


def load_weights(parameters: dict[str, nn.Parameter], weights: dict[str, Tensor], source: Path) -> None:
    """Copy weights into parameters of the same names and shapes.

    Raises:
        ValueError: names or shapes differ; the message names the first.
    """
    for name in sorted(parameters.keys() ^ weights.keys()):
        raise ValueError(f"{source}: holds another model ({name} is {'missing' if name in parameters else 'unknown'})")
    with torch.no_grad():
        for name, parameter in parameters.items():
            if parameter.shape != weights[name].shape:
                raise ValueError(
                    f"{source}: holds another model ({name} is {list(weights[name].shape)}, "
                    f"expected {list(parameter.shape)})"
                )
            parameter.copy_(weights[name])


def final_weights(
    checkpoints: Path, config: TrainConfig, last: int, techniques: Sequence[Technique] = (), *, best: int
) -> tuple[dict[str, Tensor], str]:
    """The weights that a finished training comes to, and in words which; techniques go back to where these were.

    They are the average of the last checkpoints, or those of the best validation, as `config` says. Checkpoints that
    were made on notice, or kept for a rewind, do not count: a run that was stopped and went on ends as one that was
    not, and a ticket as the dense model. Where the best are lost, or those in the folder are another update's, the
    checkpoint of their update stands in for them, or else the newest one. Called on every rank, rank 0 looks.

    Args:
        checkpoints: their folder.
        config: of the training.
        last: its last update.
        techniques: of the training, attached, as its last update left them: of an average they stay so.
        best: the update of the best validation.

    Raises:
        ValueError: one of an average, or all are damaged; names the file.
    """
    regular = [u for u in checkpoint.list_updates(checkpoints) if config.is_regular(u) or u == last]
    if config.average_last == 1:
        known = (best,) if best else ()  # 0: no validation had a figure; the initial weights may be there, for a rewind
        candidates = [checkpoint.path_of(checkpoints, update) for update in (*known, *reversed(regular))]
        found = _first_whole(checkpoints / "best", best, candidates) if distributed.rank() == 0 else None
        name, damage = distributed.from_rank0(found)
        if name is None:
            raise ValueError(f"{damage}; no checkpoint is whole; delete {checkpoints} to begin this training anew")
        weights, state, _ = checkpoint.load(checkpoints / name, check=False)
        load_techniques(techniques, state)
        if damage is None:
            if config.best_by == "perplexity":
                best_is = f"best validation perplexity {math.exp(min(state['nll'], 100)):.2f}, BLEU {state['bleu']:.2f}"
            else:
                best_is = f"best validation BLEU {state['bleu']:.2f}"
            return weights, f"{best_is} at update {state['update']}"
        which = f"weights of {'the best ' if state['update'] == best else ''}update {state['update']}"
        if distributed.rank() == 0:
            logger.warning("%s; takes the %s", damage, which)
        return weights, which
    updates = regular[-config.average_last :]
    folders = [checkpoint.path_of(checkpoints, update) for update in updates]
    return checkpoint.average(folders), f"average of the checkpoints of updates {', '.join(map(str, updates))}"


def _first_whole(wanted: Path, update: int, others: Sequence[Path]) -> tuple[str | None, str | None]:
    """The name of the first checkpoint that is whole, None if none is; and what is wrong with the wanted one, which is
    to be of this update."""
    damage = checkpoint.damage_of(wanted)
    if damage is None:
        found = checkpoint.load(wanted, check=False)[1]["update"]
        if found == update:
            return wanted.name, None
        # A run that was cut left it, and the one that went on did not make its updates again to the last bit.
        damage = f"{wanted}: is of update {found}, the best of this training is update {update}"
    return next((folder.name for folder in others if checkpoint.damage_of(folder) is None), None), damage
