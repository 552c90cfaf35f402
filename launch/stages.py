"""What runs a stage of each kind: glue between the recipe and the packages that do the work; no arithmetic here.

A stage is called on every rank with an equal context, reads the artefact of the stage before, and ends with its own
artefact on disk, read back and measured, and a result.json.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable

import torch

from tenko.compression import read_artefact
from tenko.nmt import distributed
from tenko.nmt.config import TrainConfig
from tenko.nmt.fairseq_bridge import build_model

from .models import pretrained_folder
from .rundir import StageContext
from .stage_checks import check_pruned, check_stages
from .stage_export import run_export
from .stage_ipq import run_ipq
from .stage_kinds import PretrainedConfig
from .stage_lottery import run_lottery
from .stage_noise import run_quant_noise, run_quantize
from .stage_results import measure, write_and_measure
from .stage_tools import hold_subwords, open_corpus, previous_model, start
from .stage_training import train_model
from .taught import taught_corpus


def run_train(context: StageContext) -> None:
    """Train a model on the recipe's corpus, from nothing or from the stage before; the artefact is dense fp32."""
    recipe, config = context.recipe, context.stage.config
    assert isinstance(config, TrainConfig)
    started = time.monotonic()
    accelerator = start(context, config)
    corpus = open_corpus(context)
    teacher = None
    if context.previous is None:
        torch.manual_seed(recipe.seed)
        model, model_config = build_model(recipe.model, corpus.dict_path), recipe.model
    else:
        model, model_config = previous_model(context)
        if config.distill.weight > 0:
            teacher = previous_model(context)[0].to(accelerator.device)
    check_stages(context, model, model_config, corpus)
    model = model.to(accelerator.device)
    corpus = taught_corpus(context, accelerator.device, corpus, config.distill, context.previous)
    trained = train_model(context, accelerator, model, corpus, config, teacher=teacher)
    if distributed.rank() == 0:
        device = str(accelerator.device)
        write_and_measure(context, model, model_config, corpus, device=device, started=started, **trained.figures())
    distributed.barrier()


def run_pretrained(context: StageContext) -> None:
    """Take a trained model as it is; its test BLEU is what later stages are held to."""
    config = context.stage.config
    assert isinstance(config, PretrainedConfig)
    started = time.monotonic()
    start(context)
    folder = pretrained_folder(config, context.recipe.direction)
    corpus = open_corpus(context)
    if distributed.rank() == 0:
        hold_subwords(corpus, folder)
        direction = read_artefact(folder)[1].get("direction")
        if direction != context.recipe.direction:
            raise ValueError(
                f"pretrained.model: {folder} translates {direction}, the recipe {context.recipe.direction}"
            )
        check_pruned(context, folder)
        shutil.rmtree(context.artefact, ignore_errors=True)
        shutil.copytree(folder, context.artefact, ignore=shutil.ignore_patterns("ct2-*"))
        measure(context, corpus, started=started)
    distributed.barrier()


RUNNERS: dict[str, Callable[[StageContext], None]] = {
    "train": run_train,
    "pretrained": run_pretrained,
    "lottery": run_lottery,
    "quant_noise": run_quant_noise,
    "ipq": run_ipq,
    "quantize": run_quantize,
    "export": run_export,
}
"""What runs a stage of each kind."""
