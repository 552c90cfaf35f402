"""A training within a stage: from scratch, from a model, or on from its newest checkpoint.

A stage may train several times (rounds of a lottery, groups of a product quantization). Each training has a folder of
its own, with checkpoints and metrics, resumes from there, and leaves neither DDP nor route on the model behind it.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from tenko.comm import DedicatedRoute, Route, make_route, register
from tenko.compression import Technique
from tenko.nmt import distributed
from tenko.nmt.batches import UpdateStream
from tenko.nmt.config import TrainConfig
from tenko.nmt.corpus import Corpus
from tenko.nmt.deepspeed_engine import ZeroEngine
from tenko.nmt.trainer import Trainer
from tenko.nmt.trainer_state import final_weights, load_weights
from tenko.nmt.validate import Validator

from .errors import Stopped
from .metrics import MetricsLog
from .profile import Profile
from .pulse import IDLE, VALIDATE
from .rundir import CHECKPOINTS, METRICS, StageContext
from .stage_tools import uses_zero
from .trackers import Trackers

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass(frozen=True)
class Trained:
    """What a training came to; the weights are in the model."""

    updates: int
    seconds: float
    """In updates; validations and checkpoints left out."""
    precision: str
    valid_bleu: float
    """Of the best of its validations."""
    wire: dict[str, int] | None
    """Bytes this rank sent, and would have sent in fp32; None in a single process."""

    def figures(self) -> dict[str, Any]:
        """As they stand in result.json."""
        return {
            "updates": self.updates,
            "train_seconds": self.seconds,
            "precision": self.precision,
            "valid_bleu": self.valid_bleu,
            "wire": self.wire,
        }


def train_model(
    context: StageContext,
    accelerator: Accelerator,
    model: nn.Module,
    corpus: Corpus,
    config: TrainConfig,
    *,
    folder: Path | None = None,
    title: str | None = None,
    seed: int | None = None,
    techniques: Sequence[Technique] = (),
    teacher: nn.Module | None = None,
    begin: Callable[[Trainer], None] = lambda trainer: None,
) -> Trained:
    """Train to the end, or go on from the folder's newest checkpoint; called on every rank.

    The model then holds the final weights (the average or the best, as `config` says), techniques still attached.

    Args:
        context: the stage.
        accelerator: of `start`.
        model: on the accelerator's device, techniques attached.
        corpus: trained on, and validated on.
        config: of this training.
        folder: of checkpoints and metrics; the stage's own by default. Each training needs another.
        title: of the progress bar; the stage's name by default.
        seed: of order and dropout; the recipe's by default.
        techniques: told before and after each update.
        teacher: frozen, on the same device; see `TrainConfig.distill`.
        begin: called once with the trainer when nothing is resumed, for instance to rewind it.
    """
    folder, title = folder or context.directory, title or context.stage.name
    seed = context.recipe.seed if seed is None else seed
    stream = UpdateStream(
        corpus.split("train"),
        context.recipe.direction,
        seed=seed,
        max_tokens=config.max_tokens,
        update_freq=config.update_freq,
        rank=distributed.rank(),
        world=distributed.world_size(),
    )
    trainer = Trainer(
        model,
        stream,
        config,
        seed=seed,
        checkpoints=folder / CHECKPOINTS,
        wrap=lambda module: _distribute(accelerator, module, context, config),
        engine=partial(ZeroEngine, accelerator) if uses_zero(config) else None,
        techniques=techniques,
        teacher=teacher,
    )
    if not trainer.resume():
        begin(trainer)
    _run(context, config, corpus, trainer, folder, title)
    weights, which = final_weights(folder / CHECKPOINTS, config, trainer.updates, techniques, best=trainer.best.update)
    context.reporter.log(f"{context.stage.name}: {which}")
    load_weights(trainer.parameters, weights, folder / CHECKPOINTS)
    meter = trainer.route.meter if trainer.route is not None else None
    wire = None if meter is None else {key: getattr(meter, key) for key in _WIRE}
    trained = Trained(trainer.updates, trainer.seconds, trainer.precision, trainer.best.bleu, wire)
    distributed.barrier()
    if trainer.route is not None:
        trainer.route.close()
    # A model can be in one DDP at a time: the next training of this stage wraps it anew.
    del trainer
    accelerator.free_memory()
    gc.collect()
    return trained


_WIRE = ("bytes_sent", "fp32_bytes", "up_bytes", "down_bytes")


def _distribute(
    accelerator: Accelerator, module: nn.Module, context: StageContext, config: TrainConfig
) -> tuple[nn.Module, Route | None]:
    """DDP with the recipe's route; a single process, and workers of dedicated servers, keep the module as it is."""
    mpi, comm = context.job.mpi, context.recipe.comm
    if mpi is not None and comm.servers == "dedicated":
        recipe = context.recipe
        # A worker that hangs is for the watchdog, which has the stacks written; this is for one that it cannot reach.
        worker_timeout = recipe.hang_timeout and recipe.hang_timeout + 60
        return module, DedicatedRoute(
            comm, mpi.link, seed=recipe.seed, clip_norm=config.clip_norm, worker_timeout=worker_timeout
        )
    if distributed.world_size() == 1:
        return module, None
    wrapped = accelerator.prepare(module)
    return wrapped, register(wrapped, make_route(context.recipe.comm, context.recipe.seed))


def _workers() -> str:
    return "1 worker" if distributed.world_size() == 1 else f"{distributed.world_size()} workers"


def _run(
    context: StageContext,
    config: TrainConfig,
    corpus: Corpus,
    trainer: Trainer,
    folder: Path,
    title: str,
) -> None:
    reporter = context.reporter
    log = MetricsLog(folder / METRICS) if distributed.rank() == 0 else None
    if log is not None:
        log.truncate_after(trainer.updates)
        parameters = sum(p.numel() for p in trainer.model.parameters())
        reporter.log(
            f"{title}: {parameters / 1e6:.2f}M parameters, {trainer.precision} on {trainer.device}, "
            f"{_workers()}, {trainer.stream.batches_per_epoch} batches an epoch"
            + (f", goes on from update {trainer.updates}" if trainer.updates else "")
        )
    reporter.start(title, config.max_update, trainer.updates)
    trackers = None if log is None else Trackers(context, config, folder, title, trainer.updates)

    def on_metrics(figures: dict[str, Any]) -> None:
        if log is None or trackers is None:
            return
        log.append(figures)
        trackers.log(figures)
        if figures["kind"] == "valid":
            reporter.log(
                f"validation at update {figures['update']}: perplexity {figures['ppl']:.2f}, "
                f"BLEU {figures['bleu']:.2f} (best {figures['best_bleu']:.2f}; {figures['bleu_signature']})"
            )
        else:
            reporter.advance(
                figures["update"],
                loss=figures["loss"],
                ppl=figures["ppl"],
                lr=figures["lr"],
                tokens_per_second=figures["tokens_per_second"],
                wire_bytes=figures.get("wire_bytes"),
                fp32_bytes=figures.get("wire_fp32_bytes"),
                scale=figures.get("scale"),
            )

    pulse, notice = context.job.pulse, context.job.notice
    profile = Profile(config.profile, folder, rank=distributed.rank(), log=reporter.log)

    def on_phase(phase: str) -> None:
        pulse.phase(phase)
        profile.phase(phase, trainer.updates)

    def on_update(update: int) -> None:
        pulse.update(update)
        profile.update(update)
        if reporter.terminal:
            reporter.advance(update)

    notice.begin(ahead=context.recipe.comm.staleness)
    pulse.update(trainer.updates)
    try:
        trainer.run(
            validate=Validator(
                trainer.model, corpus, context.recipe.direction, config, on_batch=lambda: pulse.phase(VALIDATE)
            ),
            on_metrics=on_metrics,
            on_update=on_update,
            on_phase=on_phase,
            should_stop=notice.due,
        )
    finally:
        pulse.phase(IDLE)
        profile.close()
        if log is not None:
            log.close()
        if trackers is not None:
            trackers.close()
    if trainer.stopped:
        raise Stopped(trainer.updates)
    if trainer.stopped_early:
        reporter.log(f"{title}: BLEU has not risen for {config.patience} validations, stopped at {trainer.updates}")
