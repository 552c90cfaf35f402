"""Which target subwords may translate which source subword: a map that makes the output layer narrow.

CTranslate2 gathers the candidates of all source subwords of a batch and multiplies only by their rows of the output
matrix. The map comes from the training corpus: IBM model 1, whose t(target | source) is estimated by expectation
maximization over all pairs of subwords that stand in one sentence pair; the first round is plain co-occurrence.
"""

from __future__ import annotations

import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .shards import PairShards
from .subwords import BOS, EOS, PAD

VMAP = "vmap.txt"
"""CTranslate2's name of the file in a model folder."""
FILE = "vocabulary_map.npz"
"""tenko's, in an artefact's folder."""
MAX_LINKS = 16_000_000
"""Pairs of subwords that the estimate looks at, some 40 bytes each; of a larger corpus every n-th sentence is taken."""


@dataclass(frozen=True, eq=False)
class VocabularyMap:
    """Candidates of every source subword, and those that every sentence has."""

    candidates: np.ndarray
    """Target ids by source id, best first, int32 [vocabulary, k]; -1 where there are fewer."""
    always: np.ndarray
    """Target ids that any sentence may use, int32 [n]."""

    def save(self, path: Path) -> None:
        """Write `vocabulary_map.npz`, some 100 kB for 4,000 subwords."""
        with path.open("wb") as file:
            np.savez_compressed(file, candidates=self.candidates, always=self.always)

    @classmethod
    def load(cls, path: Path, vocabulary: int) -> VocabularyMap:
        """Read what `save` wrote.

        Raises: ValueError naming the file when it is damaged, or the map of a vocabulary of another size.
        """
        try:
            with np.load(path, allow_pickle=False) as arrays:
                loaded = cls(arrays["candidates"], arrays["always"])
        except (OSError, EOFError, ValueError, KeyError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
            raise ValueError(f"{path}: damaged or no vocabulary map ({error})") from None
        for name, array, dimensions in (("candidates", loaded.candidates, 2), ("always", loaded.always, 1)):
            whole = array.dtype == np.int32 and array.ndim == dimensions
            if not whole or (array.size and not -1 <= array.min() <= array.max() < vocabulary):
                raise ValueError(f"{path}: {name} are no ids of a vocabulary of {vocabulary}")
        if len(loaded.candidates) != vocabulary:
            raise ValueError(f"{path}: is of {len(loaded.candidates)} subwords, the vocabulary has {vocabulary}")
        return loaded

    def write(self, path: Path, pieces: list[str]) -> None:
        """Write CTranslate2's `vmap.txt`: a line `source TAB target target ...`, the empty source for `always`."""
        with path.open("w", encoding="utf-8") as file:
            file.write("\t" + " ".join(pieces[i] for i in self.always) + "\n")
            for source, targets in enumerate(self.candidates):
                kept = targets[targets >= 0]
                if len(kept):
                    file.write(pieces[source] + "\t" + " ".join(pieces[i] for i in kept) + "\n")


def vocabulary_map(
    shards: PairShards, direction: str, vocabulary: int, *, candidates: int = 24, frequent: int = 128, rounds: int = 4
) -> VocabularyMap:
    """Estimate the map from the pairs of a split.

    Args:
        shards: the training split.
        direction: en-cs or cs-en.
        vocabulary: size of the joint vocabulary.
        candidates: target subwords kept for a source subword, at most; itself is always one, so that names are copied.
        frequent: the most frequent target subwords are candidates everywhere.
        rounds: of expectation maximization.

    Source: Brown et al. 1993, "The Mathematics of Statistical Machine Translation", model 1.
    """
    source, target = direction.split("-")
    keys, sizes = _links(shards, source, target, vocabulary)
    pairs, link = np.unique(keys, return_inverse=True)
    del keys
    source_of, target_of = (pairs // vocabulary).astype(np.int64), (pairs % vocabulary).astype(np.int32)
    starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    t = np.ones(len(pairs))
    for _ in range(rounds):
        # E: each target subword of a sentence is shared out among the sentence's source subwords.
        p = t[link]
        p /= np.repeat(np.add.reduceat(p, starts), sizes)
        # M: counts, normalised over the targets of a source subword.
        counts = np.bincount(link, weights=p, minlength=len(pairs))
        t = counts / np.bincount(source_of, weights=counts, minlength=vocabulary)[source_of]
    best = np.full((vocabulary, candidates), -1, np.int32)
    best[:, 0] = np.arange(vocabulary)
    best[: EOS + 1, 0] = -1
    order = np.lexsort((-t, source_of))
    order = order[source_of[order] != target_of[order]]
    first = np.searchsorted(source_of[order], np.arange(vocabulary))
    rank = np.arange(len(order)) - first[source_of[order]]
    order, rank = order[rank < candidates - 1], rank[rank < candidates - 1]
    best[source_of[order], rank + 1] = target_of[order]
    frequency = np.bincount(target_of, weights=counts, minlength=vocabulary)
    frequency[[BOS, PAD, EOS]] = 0
    always = np.argsort(-frequency, kind="stable")[:frequent].astype(np.int32)
    return VocabularyMap(best, always[frequency[always] > 0])


def _links(shards: PairShards, source: str, target: str, vocabulary: int) -> tuple[np.ndarray, np.ndarray]:
    """Keys source * vocabulary + target of all links [links], and the links of each target subword [subwords].

    Links of one target subword stand side by side; ends of sentences take no part.
    """
    lengths = (shards.sizes(source).astype(np.int64) - 1) * (shards.sizes(target).astype(np.int64) - 1)
    step = max(1, -(-int(lengths.sum()) // MAX_LINKS))
    keys, sizes = [], []
    for index in range(0, len(shards), step):
        s, t = shards.tokens(source, index)[:-1], shards.tokens(target, index)[:-1]
        if len(s) and len(t):
            keys.append((s[None, :] * vocabulary + t[:, None]).reshape(-1))
            sizes.append(np.full(len(t), len(s)))
    if not keys:
        raise ValueError("vocabulary map: the corpus has no sentence pairs to estimate it from")
    return np.concatenate(keys), np.concatenate(sizes)
