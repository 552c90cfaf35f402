"""What every kind of stage begins with: device and ranks, the corpus, the model before."""

from __future__ import annotations

import dataclasses
import filecmp
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from tenko.nmt import distributed
from tenko.nmt.artefact_model import open_artefact
from tenko.nmt.config import DataConfig, ModelConfig, TrainConfig
from tenko.nmt.corpus import Corpus
from tenko.nmt.deepspeed_engine import plugin
from tenko.nmt.prepare import prepare

from .files import read_json, write_json_atomic
from .job import PATIENCE
from .models import pretrained_folder
from .recipe import Recipe
from .rundir import ARTEFACT, CORPUS, StageContext, is_blank
from .stage_kinds import PretrainedConfig
from .trackers import check as check_trackers

if TYPE_CHECKING:
    from accelerate import Accelerator

# torch 2.13's new name for it does what is not wanted (sends buffers at the start), and accelerate doesn't know it yet.
warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)

ONE_BUCKET = 1 << 20
"""Size in MB of a DDP bucket that holds any model: its exchange begins when backward has ended."""


def start(context: StageContext, config: TrainConfig | None = None) -> Accelerator:
    """Device and process group; accelerate's own precision stays off (see nmt/precision.py).

    Args:
        context: the stage.
        config: of its training, for engine and trackers; None where nothing is trained.

    Raises:
        ValueError: a tracker is not installed.
    """
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs

    config = config or TrainConfig()
    zero = uses_zero(config)
    if config.engine == "deepspeed" and not zero:
        context.reporter.log("engine: deepspeed has nothing to split with one worker, and is ignored")
    check_trackers(config)
    context.job.init_group()
    accelerator = Accelerator(
        cpu=not zero and not torch.cuda.is_available(),  # with cpu=True accelerate ignores DeepSpeed
        deepspeed_plugin=plugin(config.zero_stage, config.clip_norm) if zero else None,
        mixed_precision="no",
        kwargs_handlers=[
            DistributedDataParallelKwargs(
                gradient_as_bucket_view=True,
                broadcast_buffers=False,  # constants (positions): DDP would send them from rank 0 in every update
                **({} if context.recipe.comm.overlap else {"bucket_cap_mb": ONE_BUCKET}),
            ),
            InitProcessGroupKwargs(timeout=PATIENCE),
        ],
    )
    expected = int(os.environ.get("WORLD_SIZE", "1"))
    assert distributed.world_size() == expected, f"world size {distributed.world_size()}, launched as {expected}"
    return accelerator


def open_corpus(context: StageContext) -> Corpus:
    """The prepared corpus: rank 0 builds or finds it, the others open what it names.

    A recipe that begins with a pretrained model takes that model's subwords.

    Raises:
        ValueError: it is not the corpus that the run began with, or not of the subwords of the stage before.
    """

    def build() -> Corpus:
        corpus = corpus_of(context.recipe, report=context.reporter.log)
        _hold_corpus(context, corpus)
        return corpus

    return corpus_from_rank0(build)


def corpus_from_rank0(build: Callable[[], Corpus]) -> Corpus:
    """The prepared corpus that rank 0 builds or finds, on every rank."""
    path = str(build().path) if distributed.rank() == 0 else None
    return Corpus.open(Path(distributed.from_rank0(path)))


def _hold_corpus(context: StageContext, corpus: Corpus) -> None:
    """Note the corpus that a run begins with, and hold a later one to it: by content, files and caches may move.

    A run directory of before this was noted takes a corpus of the same subwords.
    """
    run_dir, now = context.run_dir, {key: corpus.manifest[key] for key in _IDENTITY}
    file = run_dir / CORPUS
    before = read_json(file) if file.exists() else None
    if before not in (None, now) and not is_blank(run_dir):
        change = _change(context.recipe.data, before, now)
        raise ValueError(
            f"{run_dir}: began with another corpus: {change}; put back what it was, or choose another --run-dir"
        )
    if context.previous is not None:
        hold_subwords(corpus, context.previous / ARTEFACT)
    if before != now:
        write_json_atomic(file, now)


_IDENTITY = ("hash", "format", "inputs", "settings", "subwords", "versions")
"""Keys of a corpus's manifest that say what it was made of."""


def _change(data: DataConfig, before: dict[str, Any], now: dict[str, Any]) -> str:
    """What two corpora differ in."""
    for split in now["inputs"]:
        if before["inputs"].get(split) != now["inputs"][split]:
            return f"data.{split} ({getattr(data, split)}) has other content"
    if before["settings"].get("subwords") != now["settings"].get("subwords"):
        return f"the subwords ({data.subwords or 'of the stage pretrained'}) have other content"
    for name, version in now["versions"].items():
        if before["versions"].get(name) != version:
            return f"{name} was version {before['versions'].get(name)}, is {version}"
    return "another version of tenko prepares it otherwise"


def hold_subwords(corpus: Corpus, artefact: Path) -> None:
    """Hold a corpus to the subwords of a model: its numbers would mean other words to it.

    Raises:
        ValueError: they differ; names both files.
        OSError: the artefact has none.
    """
    file = artefact / corpus.spm_path.name
    if not filecmp.cmp(file, corpus.spm_path, shallow=False):
        raise ValueError(
            f"{file}: not the subwords of the corpus, {corpus.spm_path}: data or data.subwords are not what this model "
            "was trained with"
        )


def corpus_of(recipe: Recipe, report: Callable[[str], None] = lambda line: None) -> Corpus:
    """The recipe's prepared corpus, in this process alone; built if it is not there."""
    data, first = recipe.data, recipe.stages[0].config
    if isinstance(first, PretrainedConfig) and data.subwords is None:
        subwords = pretrained_folder(first, recipe.direction) / "spm.model"
        data = dataclasses.replace(data, subwords=str(subwords))
    return prepare(data, report=report)


def read_model(folder: Path) -> tuple[nn.Module, ModelConfig]:
    """The model of an artefact's folder, dense, on the CPU, and its settings.

    Raises:
        ValueError: a file is missing, damaged, or holds another model; the message names it.
    """
    return open_artefact(folder)[:2]


def previous_model(context: StageContext) -> tuple[nn.Module, ModelConfig]:
    """The model that the stage before has left: its artefact, read back from disk."""
    assert context.previous is not None, "the recipe checks that this stage follows another"
    context.reporter.log(f"{context.stage.name}: from {context.previous}")
    return read_model(context.previous / ARTEFACT)


def uses_zero(config: TrainConfig) -> bool:
    """Whether the optimizer's state is split among several ranks."""
    return config.engine == "deepspeed" and int(os.environ.get("WORLD_SIZE", "1")) > 1
