"""Scores are sacreBLEU's own, with the signatures that make them comparable."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import cast

import pytest
import sacrebleu

from tenko.nmt.config import DecodeConfig
from tenko.nmt.evaluate import corpus_bleu, corpus_chrf, evaluate
from tenko.nmt.translate import Translator

REFERENCES = ["Kočka sedí na rohožce u dveří.", "Soubor nelze otevřít pro zápis.", "Vyberte buňku v tabulce."]
HYPOTHESES = ["Kočka sedí na rohožce u okna.", "Soubor nelze otevřít pro čtení.", "Vyberte buňku v tabulce."]


class Parrot:
    """Says what it is given to say, in half a second or so."""

    direction = "en-cs"

    def __init__(self, hypotheses: Sequence[str]) -> None:
        self.hypotheses, self.tokens_produced, self.cut = list(hypotheses), 1000, list[int]()

    def translate(
        self, sentences: Sequence[str], *, decode: DecodeConfig, progress: Callable[[int, int], None] | None = None
    ) -> list[str]:
        time.sleep(0.2)
        self.tokens_produced += 50
        if progress:
            progress(len(sentences), len(sentences))
        return self.hypotheses[: len(sentences)]


def parrot(hypotheses: Sequence[str] = HYPOTHESES) -> Translator:
    return cast(Translator, Parrot(hypotheses))


def test_scores_are_sacrebleus() -> None:
    bleu, chrf = corpus_bleu(HYPOTHESES, REFERENCES), corpus_chrf(HYPOTHESES, REFERENCES)
    assert bleu.score == sacrebleu.corpus_bleu(HYPOTHESES, [REFERENCES]).score
    assert chrf.score == sacrebleu.corpus_chrf(HYPOTHESES, [REFERENCES]).score
    assert 20 < bleu.score < 90
    assert bleu.score != pytest.approx(chrf.score)
    assert bleu.signature.startswith("nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:")
    assert chrf.signature.startswith("nrefs:1|case:mixed|eff:yes|nc:6|nw:0|space:no|version:")
    assert corpus_bleu(REFERENCES, REFERENCES).score == pytest.approx(100)


def test_evaluate_scores_what_the_translator_says() -> None:
    told: list[tuple[int, int]] = []
    scores = evaluate(parrot(), ["a", "b", "c"], REFERENCES, DecodeConfig(), lambda *n: told.append(n))
    assert scores.bleu == corpus_bleu(HYPOTHESES, REFERENCES).score
    assert scores.chrf == corpus_chrf(HYPOTHESES, REFERENCES).score
    assert scores.hypotheses == HYPOTHESES
    assert scores.sentences == 3
    assert 50 < scores.tokens_per_second <= 250, "50 tokens in 0.2 seconds; what came before does not count"
    assert told == [(3, 3)]


def test_unequal_or_no_sentences_are_refused() -> None:
    with pytest.raises(ValueError, match="2 sources but 3 references"):
        evaluate(parrot(), ["a", "b"], REFERENCES, DecodeConfig())
    with pytest.raises(ValueError, match="no sentences"):
        evaluate(parrot(), [], [], DecodeConfig())
