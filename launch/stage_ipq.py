"""The stage `ipq`: group after group becomes codes and codebooks, with a training after each, in a folder of its own.

    2-ipq/group-1-ffn/    checkpoints/ metrics.jsonl, and last quantized/: codebooks, codes, and what is still dense
    2-ipq/                artefact/ hypotheses.txt, and last result.json

A group with `quantized/` is done; one without goes on from its checkpoints. How weights become codebooks, and how these
are trained, is told in `tenko/compression/ipq.py`.
"""

from __future__ import annotations

import dataclasses
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from tenko.compression.config import QuantNoiseConfig
from tenko.compression.ipq import Ipq
from tenko.nmt import checkpoint, distributed
from tenko.nmt.trainer_state import load_weights

from .codebooks import chosen_centroids
from .rundir import ARTEFACT, RunDirectory, StageContext
from .stage_checks import check_stages
from .stage_kinds import IpqStage
from .stage_results import write_and_measure
from .stage_tools import open_corpus, previous_model, read_model, start
from .stage_training import train_model
from .taught import taught_corpus

QUANTIZED = "quantized"


def run_ipq(context: StageContext) -> None:
    """Quantize the model of the stage before iteratively; the last one with exact weights is the teacher."""
    config = context.stage.config
    assert isinstance(config, IpqStage)
    started = time.monotonic()
    # Trackers take one training a stage; groups have their metrics.jsonl.
    train = dataclasses.replace(config.train, distill=config.distill)
    accelerator = start(context, train)
    corpus = open_corpus(context)
    model, model_config = previous_model(context)
    check_stages(context, model, model_config, corpus)
    model = model.to(accelerator.device)
    taught_by = _taught_by(context)
    teacher = read_model(taught_by / ARTEFACT)[0].to(accelerator.device) if config.distill.weight > 0 else None
    corpus = taught_corpus(context, accelerator.device, corpus, config.distill, taught_by)
    centroids = chosen_centroids(
        context, model, corpus, config, include=config.include, exclude=config.exclude, scheme=config.scheme
    )
    technique = Ipq(config, seed=context.recipe.seed, centroids=centroids)
    technique.attach(model)
    figures = []
    turns = [technique.groups] if config.together else [[group] for group in technique.groups]
    for number, groups in enumerate(turns, 1):
        name = "all" if config.together else groups[0]
        folder = context.directory / f"group-{number}-{_file_name(name)}"
        title = f"{context.stage.name} {name}"
        if _done(folder):
            context.reporter.log(f"{title}: finished before, left alone")
            figures.append(_load(folder / QUANTIZED, model, technique))
            continue
        error = max(technique.quantize_group(group) for group in groups)
        most = "at most " if len(groups) > 1 else ""
        context.reporter.log(f"{title}: k-means changed the weights by {most}{error:.1%} of their norm")
        trained = train_model(
            context,
            accelerator,
            model,
            corpus,
            train,
            folder=folder,
            title=title,
            seed=int(np.random.SeedSequence((context.recipe.seed, number)).generate_state(1)[0]),
            techniques=[technique],
            teacher=teacher,
        )
        blocks = {group: config.blocks[group] for group in groups}
        figures.append({"group": name, "blocks": blocks, "error": error, **trained.figures()})
        _save(folder / QUANTIZED, model, technique, figures[-1])
    technique.bake(model)
    if distributed.rank() == 0:
        write_and_measure(
            context,
            model,
            model_config,
            corpus,
            device=str(accelerator.device),
            technique=technique,
            started=started,
            scheme=config.scheme,
            groups=figures,
            updates=sum(group["updates"] for group in figures),
            precision=figures[-1]["precision"],
            valid_bleu=figures[-1]["valid_bleu"],
            train_seconds=sum(group["train_seconds"] for group in figures),
        )
    distributed.barrier()


def _taught_by(context: StageContext) -> Path:
    """The stage before; where that has quantized its model already (p = 1), the one before that."""
    stages = context.recipe.stages
    index = stages.index(context.stage) - 1
    before = stages[index].config
    if isinstance(before, QuantNoiseConfig) and before.p == 1:
        index -= 1
    return RunDirectory(context.run_dir, context.recipe).stage_directory(index)


def _file_name(group: str) -> str:
    """A group's name or pattern as part of a folder's name; its number makes that unique."""
    return re.sub(r"[^A-Za-z0-9]+", "-", group).strip("-") or "all"


def _done(folder: Path) -> bool:
    """Whether the group is finished, as rank 0 sees it."""
    return bool(distributed.from_rank0((folder / QUANTIZED / checkpoint.SUMS).is_file()))


def _save(target: Path, model: nn.Module, technique: Ipq, figures: dict[str, Any]) -> None:
    checkpoint.save(
        target,
        model_state=dict(model.named_parameters()),
        state={"technique": technique.state_dict(), "figures": figures},
        rank=distributed.rank(),
        barrier=distributed.barrier,
    )


def _load(source: Path, model: nn.Module, technique: Ipq) -> dict[str, Any]:
    """Put the weights and codebooks of a finished group into the model; its figures."""
    weights, state, _ = checkpoint.load(source)
    technique.load_state_dict(state["technique"])
    load_weights(dict(model.named_parameters()), weights, source)
    figures: dict[str, Any] = state["figures"]
    return figures
