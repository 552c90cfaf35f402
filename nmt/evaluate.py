"""BLEU and chrF of translations, detokenized, by sacrebleu, with the signatures that make figures comparable."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from sacrebleu.metrics import BLEU, CHRF

if TYPE_CHECKING:
    from .config import DecodeConfig
    from .engines import Engine


@dataclass(frozen=True)
class Metric:
    """A score and the signature that says how it was computed."""

    score: float
    signature: str


@dataclass(frozen=True)
class Scores:
    """What `evaluate` found."""

    bleu: float
    chrf: float
    bleu_signature: str
    chrf_signature: str
    sentences: int
    tokens_per_second: float
    """Subwords of the translations, ends of sentences included, a second of wall clock, loading left out."""
    hypotheses: list[str] = field(repr=False)


def corpus_bleu(hypotheses: Sequence[str], references: Sequence[str]) -> Metric:
    """sacreBLEU with its defaults (13a, cased, exponential smoothing) against one reference a sentence."""
    metric = BLEU()
    return Metric(metric.corpus_score(hypotheses, [references]).score, str(metric.get_signature()))


def corpus_chrf(hypotheses: Sequence[str], references: Sequence[str]) -> Metric:
    """sacreBLEU's chrF2."""
    metric = CHRF()
    return Metric(metric.corpus_score(hypotheses, [references]).score, str(metric.get_signature()))


def evaluate(
    translator: Engine,
    sources: Sequence[str],
    references: Sequence[str],
    decode: DecodeConfig,
    progress: Callable[[int, int], None] | None = None,
) -> Scores:
    """Translate `sources` and score against `references`.

    Raises:
        ValueError: the two differ in length, or are empty.
    """
    if len(sources) != len(references):
        raise ValueError(f"{len(sources)} sources but {len(references)} references")
    if not sources:
        raise ValueError("nothing to evaluate: no sentences")
    started, before = time.perf_counter(), translator.tokens_produced
    hypotheses = translator.translate(sources, decode=decode, progress=progress)
    seconds = time.perf_counter() - started
    bleu, chrf = corpus_bleu(hypotheses, references), corpus_chrf(hypotheses, references)
    return Scores(
        bleu=bleu.score,
        chrf=chrf.score,
        bleu_signature=bleu.signature,
        chrf_signature=chrf.signature,
        sentences=len(sources),
        tokens_per_second=(translator.tokens_produced - before) / seconds,
        hypotheses=hypotheses,
    )
