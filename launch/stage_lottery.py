"""The stage `lottery`: rounds of pruning, rewinding and training again, each in a folder of its own.

    2-lottery/round-01/    masks.safetensors checkpoints/ metrics.jsonl artefact/ hypotheses.txt, and last result.json
    2-lottery/             artefact/ hypotheses.txt of the last round, tickets.svg tickets.png, and last result.json

A round with a result is done; one without goes on from its checkpoints, under the masks that it began with. What is
pruned, and what a round begins with, is told in `tenko/compression/lottery.py`.
"""

from __future__ import annotations

import dataclasses
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from tenko.compression import lottery
from tenko.compression.config import LotteryConfig
from tenko.compression.masks import Masks, PrunedWeights, share
from tenko.compression.pruning import prunable
from tenko.nmt import checkpoint, distributed
from tenko.nmt.config import ModelConfig, ProfileConfig, TrainConfig
from tenko.nmt.corpus import Corpus
from tenko.nmt.fairseq_bridge import build_model
from tenko.nmt.trainer import Trainer
from tenko.nmt.trainer_state import keep_batch, load_weights

from .files import read_json, write_json_atomic
from .report import write_report_or_warn
from .rundir import ARTEFACT, CHECKPOINTS, RESULT, RunDirectory, StageContext
from .stage_checks import check_stages
from .stage_results import HYPOTHESES, write_and_measure
from .stage_tools import open_corpus, read_model, start
from .stage_training import train_model
from .taught import taught_corpus

MASKS = "masks.safetensors"


def run_lottery(context: StageContext) -> None:
    """Draw lottery tickets, or one of their controls; the artefact is that of the last round."""
    config = context.stage.config
    assert isinstance(config, LotteryConfig)
    started = time.monotonic()
    stage = _Stage.of(context)
    accelerator = start(context, stage.train)
    corpus = open_corpus(context)
    stage.check()
    model, model_config = read_model(stage.dense / ARTEFACT)
    check_stages(context, model, model_config, corpus)
    corpus = taught_corpus(context, accelerator.device, corpus, stage.train.distill, stage.taught_by)
    masks = Masks.ones(prunable(model, config.include, config.exclude, embeddings=config.embeddings))
    trained = stage.dense
    for this in lottery.rounds(config):
        folder = context.directory / this.folder
        masks = _masks(stage, this, trained, masks, accelerator.device)
        if distributed.from_rank0((folder / RESULT).is_file()):
            context.reporter.log(f"{context.stage.name}: {this.folder} finished before, left alone")
        else:
            _run_round(stage, this, masks, trained, accelerator, corpus)
            if distributed.rank() == 0 and this.number < len(config.prunings):  # the stage's end writes the last one
                write_report_or_warn(RunDirectory(context.run_dir, context.recipe))
        trained = folder
    if distributed.rank() == 0:
        _finish(stage, trained, started)
    distributed.barrier()


@dataclass(frozen=True)
class _Stage:
    """A lottery stage and the folders that it reads."""

    context: StageContext
    config: LotteryConfig
    train: TrainConfig
    """Of each round: the stage train's."""
    dense: Path
    """Folder of the stage train."""
    taught_by: Path | None
    """The stage before the stage train, if there is one: what it learned from, its rounds do, too."""
    masks_of: tuple[Path, LotteryConfig] | None
    """The lottery stage whose masks are taken, and its folder."""

    @classmethod
    def of(cls, context: StageContext) -> _Stage:
        run, stages = RunDirectory(context.run_dir, context.recipe), context.recipe.stages
        config = context.stage.config
        assert isinstance(config, LotteryConfig)
        own = stages.index(context.stage)
        train = run.training_before(own)
        training = stages[train].config
        assert isinstance(training, TrainConfig)
        kept = (config.rewind_to,) if config.control == "stabilised" else ()
        training = dataclasses.replace(training, keep_updates=kept, profile=ProfileConfig())
        masks_of = None
        for index, spec in enumerate(stages[:own]):
            if spec.name == config.masks_of and isinstance(spec.config, LotteryConfig):
                masks_of = run.stage_directory(index), spec.config
        taught_by = run.stage_directory(train - 1) if train > 0 else None
        return cls(context, config, training, run.stage_directory(train), taught_by, masks_of)

    def check(self) -> None:
        """Raise ValueError unless what the rounds rewind to is there."""
        if self.config.control == "reinit":
            return
        saved = checkpoint.list_updates(self.dense / CHECKPOINTS)
        if self.config.rewind_to not in saved:
            raise ValueError(
                f"{self.context.stage.name}.rewind_to: update {self.config.rewind_to} was not saved in "
                f"{self.dense / CHECKPOINTS}; saved: {', '.join(map(str, saved)) or 'none'}"
            )


def _masks(stage: _Stage, this: lottery.Round, trained: Path, before: Masks, device: torch.device) -> Masks:
    """The masks of a round: rank 0 reads or makes them, and keeps them, before any training under them."""
    masks = None
    if distributed.rank() == 0:
        file = stage.context.directory / this.folder / MASKS
        if file.exists():
            masks = _read_masks(file)
        else:
            given = None
            if stage.masks_of is not None:
                folder, other = stage.masks_of
                given = _read_masks(folder / lottery.round_of(other, this.prunings).folder / MASKS)
            weights = dict(read_model(trained / ARTEFACT)[0].named_parameters())
            seed = stage.context.recipe.seed
            masks = lottery.masks_of_round(stage.config, this, weights, before, seed=seed, given=given)
            file.parent.mkdir(parents=True, exist_ok=True)
            beside = file.with_name(f".{file.name}.tmp")
            safetensors.torch.save_file(masks.state_dict(), beside)
            beside.replace(file)
        if not masks.is_within(before):
            raise ValueError(f"{file}: not nested in the masks of the round before; delete {file.parent} to draw again")
    return share(masks, before, device)


def _read_masks(file: Path) -> Masks:
    try:
        return Masks.from_state_dict(safetensors.torch.load_file(file))
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{file}: missing or damaged ({error})") from None


def _run_round(
    stage: _Stage, this: lottery.Round, masks: Masks, trained: Path, accelerator: Any, corpus: Corpus
) -> None:
    context, started = stage.context, time.monotonic()
    folder = context.directory / this.folder
    title = f"{context.stage.name} round {this.number}"
    context.reporter.log(f"{title}: {masks.fraction_remaining:.1%} of {masks.total:,} weights remain")
    begin = lottery.start_of(stage.config)
    model, model_config = _first_weights(stage, begin, masks, trained, corpus)
    model = model.to(accelerator.device)
    teacher = None
    if stage.taught_by is not None and stage.train.distill.weight > 0:
        teacher = read_model(stage.taught_by / ARTEFACT)[0].to(accelerator.device)
    technique = PrunedWeights(masks)
    technique.attach(model)
    figures = train_model(
        context,
        accelerator,
        model,
        corpus,
        stage.train,
        folder=folder,
        title=title,
        techniques=[technique],
        teacher=teacher,
        begin=lambda trainer: _rewind(trainer, stage, begin, technique, trained),
    ).figures()
    technique.bake(model)
    if distributed.rank() == 0:
        write_and_measure(
            context,
            model,
            model_config,
            corpus,
            folder=folder,
            title=title,
            device=str(accelerator.device),
            technique=technique,
            started=started,
            round=this.number,
            control=stage.config.control,
            prunable=masks.total,
            remaining=masks.remaining,
            fraction_remaining=masks.fraction_remaining,
            **figures,
        )
    distributed.barrier()


def _first_weights(
    stage: _Stage, begin: lottery.Start, masks: Masks, trained: Path, corpus: Corpus
) -> tuple[nn.Module, ModelConfig]:
    """A model with the weights that a round begins with; the masks are applied when they are attached."""
    model, model_config = read_model(trained / ARTEFACT)
    if begin.weights == "fresh":
        torch.manual_seed(lottery.reinit_seed(stage.context.recipe.seed))
        return build_model(model_config, corpus.dict_path), model_config
    if begin.weights != "trained":
        source = trained if begin.weights == "last" else stage.dense
        folder = checkpoint.path_of(source / CHECKPOINTS, stage.config.rewind_to)
        weights = checkpoint.load(folder)[0]
        if stage.config.control == "constant":
            weights = lottery.constant(weights, masks)
        load_weights(dict(model.named_parameters()), weights, folder)
    return model, model_config


def _rewind(trainer: Trainer, stage: _Stage, begin: lottery.Start, technique: PrunedWeights, trained: Path) -> None:
    """Take the trainer to where the round begins: schedule and data, loss scale, and moments under the mask."""
    weights = {name: parameter.detach().clone() for name, parameter in trainer.parameters.items()}
    dense = checkpoint.path_of(stage.dense / CHECKPOINTS, stage.config.rewind_to)
    if begin.moments == "dense":
        trainer.rewind(dense)
    elif begin.moments == "trained":
        last = checkpoint.list_updates(trained / CHECKPOINTS)[-1]
        state: dict[str, Any] = checkpoint.load(checkpoint.path_of(trained / CHECKPOINTS, last))[1]
        trainer.optimizer.load_state_dict(state["optimizer"])
        trainer.scaler.load_state_dict(state["scaler"])
    elif begin.update:
        trainer.scaler.load_state_dict(checkpoint.load(dense)[1]["scaler"])
    if begin.moments != "dense":  # whoever trains the round, its updates are as large as those it is compared with
        newest = checkpoint.path_of(stage.dense / CHECKPOINTS, checkpoint.list_updates(stage.dense / CHECKPOINTS)[-1])
        keep_batch(trainer, checkpoint.load(newest)[1], newest)
    trainer.updates = begin.update
    load_weights(trainer.parameters, weights, dense)
    technique.zero()
    lottery.mask_optimizer(trainer.optimizer, trainer.parameters, technique.masks)
    if trainer.route is not None and begin.moments == "dense":
        kept: dict[int, Tensor] = {id(trainer.parameters[name]): mask for name, mask in technique.masks.items()}
        route_state = trainer.route.state_dict()
        lottery.mask_feedback(route_state, list(trainer.wrapped.parameters()), kept)
        trainer.route.load_state_dict(route_state)


def _finish(stage: _Stage, last: Path, started: float) -> None:
    """The stage's artefact, table and plot, and last its result."""
    context = stage.context
    beside = context.artefact.with_name(f".{ARTEFACT}.tmp")
    shutil.rmtree(beside, ignore_errors=True)
    shutil.copytree(last / ARTEFACT, beside)
    shutil.rmtree(context.artefact, ignore_errors=True)
    beside.rename(context.artefact)
    shutil.copyfile(last / HYPOTHESES, context.directory / HYPOTHESES)
    from .lottery_report import finished_rows, write_plots  # draws: a training needs no matplotlib

    rows = finished_rows(stage.dense, context.directory, stage.config)
    write_plots(context.directory, {context.stage.name: rows})
    seconds = round(time.monotonic() - started, 3)
    write_json_atomic(context.result_path, {**read_json(last / RESULT), "seconds": seconds, "rounds": rows})
