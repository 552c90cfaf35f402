"""Token ids of a split on disk, memory-mapped: `SPLIT.LANG.bin` (ids), `.idx` (offsets) and `.len` (lengths).

Ids are uint16 while the vocabulary fits, else uint32; offsets are int64, one more than sentences; lengths int32.
All raw little-endian arrays: what they hold is said by the corpus's manifest. Written as a stream, read by page.
"""

from __future__ import annotations

from pathlib import Path
from types import TracebackType

import numpy as np

from .subwords import EOS

LANGS = ("en", "cs")
PARTS = ("bin", "idx", "len")


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest of uint16 and uint32 that holds every id."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


class ShardWriter:
    """Appends the sentences of one language of one split to files in `folder`."""

    def __init__(self, folder: Path, split: str, lang: str, dtype: np.dtype) -> None:
        self.dtype = dtype
        self.sentences = 0
        self.tokens = 0
        self._files = {part: (folder / f"{split}.{lang}.{part}").open("wb") for part in PARTS}
        self._files["idx"].write(np.zeros(1, "<i8").tobytes())

    def append(self, sentences: list[list[int]]) -> None:
        """Add sentences given as ids without end of sentence, which is added here."""
        if not sentences:
            return
        lengths = np.fromiter((len(ids) + 1 for ids in sentences), "<i4", len(sentences))
        flat = [token for ids in sentences for token in (*ids, EOS)]
        self._files["bin"].write(np.array(flat, self.dtype).tobytes())
        self._files["len"].write(lengths.tobytes())
        self._files["idx"].write((self.tokens + np.cumsum(lengths, dtype="<i8")).tobytes())
        self.sentences += len(sentences)
        self.tokens += len(flat)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        for file in self._files.values():
            file.close()


def _map(path: Path, dtype: np.dtype | str, length: int) -> np.ndarray:
    if length == 0:  # an empty file cannot be mapped
        return np.empty(0, dtype)
    return np.memmap(path, dtype, mode="r", shape=(length,))


class PairShards:
    """The sentence pairs of one split; pages are read as they are touched, nothing is copied at opening."""

    def __init__(self, folder: Path, split: str, pairs: int, tokens: dict[str, int], dtype: np.dtype) -> None:
        self._pairs = pairs
        self._tokens = {lang: _map(folder / f"{split}.{lang}.bin", dtype, tokens[lang]) for lang in LANGS}
        self._offsets = {lang: _map(folder / f"{split}.{lang}.idx", "<i8", pairs + 1) for lang in LANGS}
        self._sizes = {lang: _map(folder / f"{split}.{lang}.len", "<i4", pairs) for lang in LANGS}

    def __len__(self) -> int:
        """Sentence pairs."""
        return self._pairs

    def tokens(self, lang: str, index: int) -> np.ndarray:
        """Ids of a sentence, int64 [length], ending with </s>."""
        if not 0 <= index < self._pairs:
            raise IndexError(f"sentence {index} of {self._pairs}")
        start, end = self._offsets[lang][index : index + 2]
        return self._tokens[lang][start:end].astype(np.int64)

    def sizes(self, lang: str) -> np.ndarray:
        """Lengths in tokens, </s> included, int32 [pairs], memory-mapped."""
        return self._sizes[lang]
