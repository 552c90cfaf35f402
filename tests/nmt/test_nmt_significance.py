"""The paired bootstrap tells a clear difference from none."""

from __future__ import annotations

import random

import pytest

from tenko.nmt.evaluate import corpus_bleu
from tenko.nmt.significance import paired_bootstrap

WORDS = [
    "the",
    "file",
    "could",
    "not",
    "be",
    "opened",
    "because",
    "it",
    "is",
    "already",
    "in",
    "use",
    "by",
    "another",
    "process",
]


def spoiled(sentences: list[str], share: float, seed: int) -> list[str]:
    draw = random.Random(seed)
    return [" ".join("oops" if draw.random() < share else word for word in line.split()) for line in sentences]


def test_a_clear_difference_is_significant_and_a_shuffle_of_faults_is_not() -> None:
    draw = random.Random(1)
    references = [" ".join(draw.choices(WORDS, k=12)) for _ in range(200)]
    baseline = spoiled(references, 0.2, 2)
    same, worse, better = paired_bootstrap(
        references, baseline, [spoiled(references, 0.2, 3), spoiled(references, 0.3, 4), spoiled(references, 0.1, 5)]
    )
    assert not same.significant
    assert worse.significant
    assert worse.delta < 0
    assert better.significant
    assert better.delta > 0
    score = corpus_bleu(spoiled(references, 0.3, 4), references).score
    assert worse.bleu == pytest.approx(score)
    assert worse.delta == pytest.approx(score - corpus_bleu(baseline, references).score)
    assert str(worse).startswith("-")


def test_equal_translations_are_not_different() -> None:
    references = ["a file is in use by another process", "the file could not be opened"]
    baseline = ["the file is in use", "a file could not be opened"]
    (same,) = paired_bootstrap(references, baseline, [list(baseline)])
    assert (same.delta, same.p, same.significant) == (0.0, 1.0, False)


def test_lists_of_other_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="2 references, but hypotheses of"):
        paired_bootstrap(["a", "b"], ["a", "b"], [["a"]])
    with pytest.raises(ValueError, match="0 references"):
        paired_bootstrap([], [], [])
