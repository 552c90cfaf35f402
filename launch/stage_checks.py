"""What only the model can tell of a recipe's later stages, asked before anything is trained: patterns, blocks, exports.

What settings alone can tell, `stage_kinds.py` does.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from tenko.compression import read_artefact
from tenko.compression.config import IpqConfig, LotteryConfig, QuantizeConfig
from tenko.compression.noise import select_noisy
from tenko.compression.pq import select_blocks
from tenko.compression.pruning import prunable, remaining_count
from tenko.nmt.config import ModelConfig
from tenko.nmt.corpus import Corpus

from .codebooks import check_bits
from .rundir import ARTEFACT, RunDirectory, StageContext
from .stage_kinds import ExportConfig, check_text, unfit_for_pruned

PRUNED = "pruned"
"""Metadata of an artefact: true where a lottery has pruned the model, whatever was done to it since."""


def check_stages(context: StageContext, model: nn.Module, model_config: ModelConfig, corpus: Corpus) -> None:
    """Hold this stage and those after it to the model.

    Args:
        context: the stage.
        model: plain, on the CPU.
        model_config: its settings.
        corpus: gives the vocabulary.

    Raises:
        ValueError: a text to learn from is not there, a pattern matches no weight, a block divides no weight's columns,
            a lottery leaves nothing, a format has no place for the model, or the model none for the longest sentence;
            names stage and key.
    """
    _hold_lengths(context.recipe.direction, model_config, corpus)
    stages = context.recipe.stages
    for spec in stages[stages.index(context.stage) :]:
        try:
            check_text(spec.config)
            _check(spec.config, model, model_config, corpus)
        except ValueError as error:
            raise ValueError(f"{spec.name}.{error}") from None


def _check(config: Any, model: nn.Module, model_config: ModelConfig, corpus: Corpus) -> None:
    if isinstance(config, LotteryConfig):
        weights = prunable(model, config.include, config.exclude, embeddings=config.embeddings)
        total = sum(weight.tensor.numel() for weight in weights)
        if remaining_count(total, config.fraction, config.rounds) == 0:
            raise ValueError(
                f"fraction: {config.fraction} leaves none of {total:,} weights after {config.rounds} rounds"
            )
    elif isinstance(config, IpqConfig):
        items = select_blocks(model, config.include, config.exclude, config)
        check_bits(items, config, config.scheme, "bits")
    elif isinstance(config, QuantizeConfig) and config.scheme in ("pq", "pq_int8"):
        items = select_blocks(model, config.include, config.exclude, config.pq, key="pq.blocks")
        check_bits(items, config.pq, config.scheme, "pq.bits")
    elif isinstance(config, QuantizeConfig):
        select_noisy(model, config)
    elif isinstance(config, ExportConfig) and config.format == "ctranslate2":
        from tenko.nmt.ctranslate2_model import specification
        from tenko.nmt.subwords import Subwords

        try:
            specification(model_config, model.state_dict(), Subwords(corpus.spm_path).pieces())
        except ValueError as error:
            raise ValueError(f"format: {error}") from None


def _hold_lengths(direction: str, model_config: ModelConfig, corpus: Corpus) -> None:
    """Hold training and validation to learned positions; a recipe can't tell those of a model that it takes."""
    for side, lang in zip(("source", "target"), direction.split("-"), strict=True):
        positions = model_config.learned_positions(side)
        for split, key in (("train", "max_tokens_per_sentence"), ("valid", "valid")):
            longest = int(corpus.split(split).sizes(lang).max())
            if positions is not None and longest > positions:
                raise ValueError(
                    f"data.{key}: the model has {positions} learned positions for {lang}, </s> included, and the "
                    f"longest sentence of {split} takes {longest}"
                )


def check_pruned(context: StageContext, artefact: Path) -> None:
    """Hold the stages after `pretrained` to what its model is: none may fill the zeros of a lottery before it.

    Raises:
        ValueError: one would; names stage and key.
    """
    if not is_pruned(artefact):
        return
    stages = context.recipe.stages
    for spec in stages[stages.index(context.stage) + 1 :]:
        if spec.kind == "train":  # trains all weights anew
            return
        if found := unfit_for_pruned(spec.kind, spec.config):
            key, message = found
            raise ValueError(f"{'.'.join(filter(None, (spec.name, key)))}: {message} ({artefact} is pruned)")


def is_pruned(artefact: Path) -> bool:
    """Whether a lottery has pruned the model of an artefact's folder."""
    metadata = read_artefact(artefact)[1]
    # The first versions did not say it; the technique is that of the last stage only.
    return metadata.get(PRUNED) is True or metadata.get("technique") == "pruned"


def pruned_before(context: StageContext) -> bool:
    """Whether a lottery has pruned the model that this stage begins with, in this recipe or before `pretrained`."""
    stages = context.recipe.stages
    own = stages.index(context.stage)
    for index in reversed(range(own)):
        if stages[index].kind in ("lottery", "train"):
            return stages[index].kind == "lottery"
        if stages[index].kind == "pretrained":
            return is_pruned(RunDirectory(context.run_dir, context.recipe).stage_directory(index) / ARTEFACT)
    return False
