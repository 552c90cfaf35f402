"""The end of a stage: its artefact on the disk, read back, measured, and the result written last."""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tenko.compression import Technique, artefact_bytes, write_artefact
from tenko.nmt.config import ModelConfig
from tenko.nmt.corpus import Corpus
from tenko.nmt.engines import Engine
from tenko.nmt.translate import Translator

from .files import write_json_atomic, write_text_atomic
from .recipe import decode_config
from .rundir import ARTEFACT, StageContext
from .stage_checks import PRUNED, pruned_before

SAMPLES = 8
"""Translations of unseen sentences kept in a result."""
HYPOTHESES = "hypotheses.txt"
"""The artefact's translations of the test split, beside result.json: for paired tests of significance."""


def write_and_measure(
    context: StageContext,
    model: nn.Module,
    model_config: ModelConfig,
    corpus: Corpus,
    *,
    folder: Path | None = None,
    technique: Technique | None = None,
    metadata: Mapping[str, Any] | None = None,
    **rest: Any,
) -> dict[str, Any]:
    """Write the artefact, then `measure` it; rank 0 alone.

    Args:
        context: the stage.
        model: plain and dense: techniques baked.
        model_config: its settings, for the artefact.
        corpus: gives subwords and test split.
        folder: where the artefact shall stand; the stage's own by default.
        technique: baked; says which tensors are packed.
        metadata: more for the artefact.
        rest: for `measure`.

    Returns:
        the result.
    """
    folder = folder or context.directory
    metadata = {"direction": context.recipe.direction, "model": dataclasses.asdict(model_config), **(metadata or {})}
    if context.stage.kind == "lottery" or (context.stage.kind != "train" and pruned_before(context)):
        metadata[PRUNED] = True
    _write_artefact(folder / ARTEFACT, model, corpus, metadata, technique, context.recipe.zstd)
    return measure(context, corpus, folder=folder, **rest)


def measure(
    context: StageContext,
    corpus: Corpus,
    *,
    folder: Path | None = None,
    title: str | None = None,
    device: str = "cpu",
    started: float | None = None,
    engine: Engine | None = None,
    **figures: Any,
) -> dict[str, Any]:
    """Read an artefact back, translate the test split with it, and write result.json last; rank 0 alone.

    Args:
        context: the stage.
        corpus: gives the test split.
        folder: holds the artefact, and gets hypotheses and result; the stage's own by default.
        title: of the progress bar; the stage's name by default.
        device: where to translate.
        started: `time.monotonic()` of when the work began, for the result's seconds.
        engine: translates; fairseq's beam search with the artefact by default.
        figures: more for the result, and over what is found here; what is None is left out.

    Returns:
        the result.
    """
    from tenko.nmt.evaluate import evaluate

    folder, title = folder or context.directory, title or context.stage.name
    translator = engine or Translator.load(folder / ARTEFACT, device=device)
    source, target = (("en", "cs").index(lang) for lang in translator.direction.split("-"))
    texts, decode, reporter = corpus.text("test"), decode_config(context.recipe), context.reporter
    reporter.start(f"{title}: translating the test split", len(texts[source]))
    scores = evaluate(translator, texts[source], texts[target], decode, lambda done, total: reporter.advance(done))
    reporter.finish()
    reporter.log(f"{title}: test BLEU {scores.bleu:.2f}, chrF {scores.chrf:.2f}")
    write_text_atomic(folder / HYPOTHESES, "".join(f"{line}\n" for line in scores.hypotheses))
    samples = zip(texts[source], texts[target], scores.hypotheses, strict=True)
    result = {
        "stage": context.stage.name,
        "kind": context.stage.kind,
        "seconds": None if started is None else round(time.monotonic() - started, 3),
        "bleu": scores.bleu,
        "chrf": scores.chrf,
        "bleu_signature": scores.bleu_signature,
        "chrf_signature": scores.chrf_signature,
        "sentences": scores.sentences,
        "tokens_per_second": scores.tokens_per_second,
        "threads": torch.get_num_threads(),
        **({} if engine else {"artefact_bytes": artefact_bytes(folder / ARTEFACT)}),
        **_parameters(translator),
        "samples": [
            {"source": s, "reference": r, "hypothesis": h}
            for (s, r, h), _ in zip(samples, range(SAMPLES), strict=False)
        ],
        **{key: value for key, value in figures.items() if value is not None},
    }
    write_json_atomic(folder / context.result_path.name, result)
    return result


def _parameters(translator: Engine) -> dict[str, int]:
    model = getattr(translator, "model", None)
    return {"parameters": sum(p.numel() for p in model.parameters())} if isinstance(model, nn.Module) else {}


def _write_artefact(
    target: Path,
    model: nn.Module,
    corpus: Corpus,
    metadata: Mapping[str, Any],
    technique: Technique | None,
    zstd: int | None,
) -> None:
    """The artefact's folder, complete under its name or not there at all."""
    beside = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    shutil.copyfile(corpus.spm_path, beside / "spm.model")
    shutil.copyfile(corpus.dict_path, beside / "dict.txt")
    write_artefact(beside, model.state_dict(), metadata=metadata, technique=technique, zstd=zstd)
    shutil.rmtree(target, ignore_errors=True)
    beside.rename(target)
