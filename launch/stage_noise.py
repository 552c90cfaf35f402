"""The stages `quant_noise` and `quantize`: weights made small by a scheme, with training under noise and without.

quant_noise finetunes the model of the stage before with a fraction of its weights quantized, and then quantizes them
all; p = 1 is quantization-aware training. With the schemes pq and pq_int8 and a p below 1 the artefact stays
dense, for a stage of product quantization to follow. What a lottery before has pruned stays pruned.
"""

from __future__ import annotations

import copy
import time

from torch import nn

from tenko.compression import QuantizeConfig, QuantNoise, Technique, activation_ranges, read_artefact
from tenko.compression.masks import Masks, PrunedWeights
from tenko.compression.pq import PostTrainingPq, PqScheme
from tenko.compression.pq_noise import PqNoise
from tenko.nmt import distributed
from tenko.nmt.corpus import Corpus

from .codebooks import chosen_centroids
from .rundir import ARTEFACT, StageContext
from .stage_checks import check_stages, pruned_before
from .stage_kinds import QuantNoiseStage
from .stage_results import write_and_measure
from .stage_tools import open_corpus, previous_model, read_model, start
from .stage_training import train_model
from .taught import taught_corpus


def run_quant_noise(context: StageContext) -> None:
    """Train under quantization noise, then quantize; the model of the stage before may be the teacher."""
    config = context.stage.config
    assert isinstance(config, QuantNoiseStage)
    started = time.monotonic()
    accelerator = start(context, config.train)
    corpus = open_corpus(context)
    model, model_config = previous_model(context)
    check_stages(context, model, model_config, corpus)
    model = model.to(accelerator.device)
    teacher = copy.deepcopy(model) if config.train.distill.weight > 0 else None
    technique: QuantNoise | PqNoise
    if config.scheme in ("pq", "pq_int8"):
        technique = PqNoise(config, seed=context.recipe.seed, centroids=_centroids(context, config, model, corpus))
    else:
        technique = QuantNoise(config, context.recipe.seed)
    pruned = _pruned(context, model)
    techniques: list[Technique] = [*pruned, technique]  # masks first: they go on the plain weights
    for each in techniques:
        each.attach(model)
    corpus = taught_corpus(context, accelerator.device, corpus, config.train.distill, context.previous)
    trained = train_model(context, accelerator, model, corpus, config.train, techniques=techniques, teacher=teacher)
    ranges = activation_ranges(technique) if isinstance(technique, QuantNoise) else {}
    for each in reversed(techniques):
        each.bake(model)
    if distributed.rank() == 0:
        write_and_measure(
            context,
            model,
            model_config,
            corpus,
            device=str(accelerator.device),
            technique=technique,
            metadata={"activations": ranges} if ranges else None,
            started=started,
            scheme=config.scheme,
            p=config.p,
            **trained.figures(),
        )
    distributed.barrier()


def run_quantize(context: StageContext) -> None:
    """Quantize the weights of the stage before; rank 0 works, all choose centroids where these are to be chosen."""
    config = context.stage.config
    assert isinstance(config, QuantizeConfig)
    started = time.monotonic()
    accelerator = start(context)  # makes the process group, when a resumed run begins here
    corpus = open_corpus(context)
    centroids = {}
    if config.scheme in ("pq", "pq_int8") and config.pq.bits:
        assert context.previous is not None, "the recipe checks that this stage follows another"
        model = read_model(context.previous / ARTEFACT)[0].to(accelerator.device)
        centroids = _centroids(context, config, model, corpus)
    if distributed.rank() == 0:
        model, model_config = previous_model(context)
        assert context.previous is not None, "previous_model has read it"
        ranges = read_artefact(context.previous / ARTEFACT)[1].get("activations")
        technique: Technique
        if config.scheme in ("pq", "pq_int8"):
            technique = PostTrainingPq(config, seed=context.recipe.seed, centroids=centroids)
        else:
            technique = QuantNoise(config)
        technique.attach(model)
        technique.bake(model)
        write_and_measure(
            context,
            model,
            model_config,
            corpus,
            technique=technique,
            metadata={"activations": ranges} if ranges else None,  # what it was trained with, it is translated with
            started=started,
            scheme=config.scheme,
        )
    distributed.barrier()


def _centroids(context: StageContext, config: QuantizeConfig, model: nn.Module, corpus: Corpus) -> dict[str, int]:
    """Chosen centroids by weight, on every rank."""
    scheme: PqScheme = "pq" if config.scheme == "pq" else "pq_int8"
    return chosen_centroids(
        context, model, corpus, config.pq, include=config.include, exclude=config.exclude, scheme=scheme
    )


def _pruned(context: StageContext, model: nn.Module) -> list[Technique]:
    """What keeps pruned weights at zero, if a lottery has pruned the model. Other models may hold zeros by chance."""
    return [PrunedWeights(Masks.of_zeros(model))] if pruned_before(context) else []
