"""Is one translation better than another, or was it luck? sacrebleu's paired bootstrap on the same test sentences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sacrebleu.metrics import BLEU
from sacrebleu.significance import PairedTest, Result


@dataclass(frozen=True)
class Difference:
    """A system against a base line on the same test set."""

    bleu: float
    """Of the system."""
    delta: float
    """The system's BLEU less the base line's."""
    p: float
    """sacrebleu's: the share of resamples whose difference is above their mean by as much as this one is above none.
    Below 0.05 is called significant. It counts one tail: a two-sided test's p would be about twice as large."""

    @property
    def significant(self) -> bool:
        """Whether the difference is significant at 5 %."""
        return self.p < 0.05

    def __str__(self) -> str:
        return f"{self.delta:+.2f} BLEU (p = {self.p:.3f})"


def paired_bootstrap(
    references: Sequence[str], baseline: Sequence[str], systems: Sequence[Sequence[str]], *, samples: int = 1000
) -> list[Difference]:
    """Compare each system's hypotheses with the base line's.

    Args:
        references, baseline: a sentence each, in the same order.
        systems: hypotheses of each system, in the same order.
        samples: resamples of the test set. Seeded by sacrebleu (12345, or SACREBLEU_SEED).

    Raises:
        ValueError: the lists differ in length, or are empty.

    Source: Koehn 2004, "Statistical Significance Tests for Machine Translation Evaluation".
    """
    lengths = {len(lines) for lines in (references, baseline, *systems)}
    if len(lengths) != 1 or 0 in lengths:
        raise ValueError(f"{len(references)} references, but hypotheses of {sorted(lengths)} lines")
    named: list[tuple[str, Sequence[str]]] = [
        ("base line", list(baseline)),
        *((str(i), list(lines)) for i, lines in enumerate(systems)),
    ]
    _, scores = PairedTest(named, {"BLEU": BLEU()}, [list(references)], test_type="bs", n_samples=samples)()
    base, *others = (result for result in scores["BLEU"] if isinstance(result, Result))
    # sacrebleu counts the resamples that differ by more: equal translations have none, and would be called different.
    found = []
    for result in others:
        assert result.p_value is not None, "only the base line has none"
        p = 1.0 if result.score == base.score else result.p_value
        found.append(Difference(result.score, result.score - base.score, p))
    return found
