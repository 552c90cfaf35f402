"""A prepared corpus: a folder of subwords, shards of three splits, held-out text, and the manifest that vouches for it.

The manifest is written last and lists every file with its size, so a folder that lost something is noticed at opening.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .shards import LANGS, PairShards

FORMAT = 1
"""Version of the folder's format, part of the content hash."""
SPLITS = ("train", "valid", "test")
MANIFEST = "manifest.json"


class DamagedCorpus(ValueError):
    """A prepared corpus lacks a file, or has one of the wrong size."""


@dataclass(frozen=True)
class Corpus:
    """An open prepared corpus; `manifest` has inputs, sizes, and counts of dropped pairs by split and reason."""

    path: Path
    manifest: dict[str, Any]

    @classmethod
    def open(cls, path: Path | str) -> Corpus:
        """Open what `prepare` wrote.

        Raises: DamagedCorpus (a ValueError) when the manifest cannot be read or a file is missing or of another size.
        """
        path = Path(path)
        try:
            manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
            files = manifest["files"]
            sizes = [*files.values(), *(manifest["splits"][split]["pairs"] for split in SPLITS)]
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            sizes = [None]  # whatever it holds instead, thousands of brackets for instance
        if not all(type(size) is int for size in sizes):
            raise DamagedCorpus(f"{path}: not a prepared corpus, no readable {MANIFEST}")
        if manifest.get("format") != FORMAT:
            raise DamagedCorpus(f"{path}: format {manifest.get('format')}, this version reads {FORMAT}")
        for name, size in files.items():
            if not (path / name).is_file():
                raise DamagedCorpus(f"{path}: damaged, {name} is missing")
            if (path / name).stat().st_size != size:
                found = (path / name).stat().st_size
                raise DamagedCorpus(f"{path}: damaged, {name} has {found} bytes instead of {size}")
        return cls(path, manifest)

    @property
    def spm_path(self) -> Path:
        """The sentencepiece model."""
        return self.path / "spm.model"

    @property
    def dict_path(self) -> Path:
        """The fairseq dictionary."""
        return self.path / "dict.txt"

    @property
    def vocab_size(self) -> int:
        """Entries of the vocabulary, special symbols included."""
        return int(self.manifest["vocab_size"])

    def split(self, name: str) -> PairShards:
        """The binarized pairs of train, valid or test."""
        sizes = self.manifest["splits"][name]
        return PairShards(self.path, name, sizes["pairs"], sizes["tokens"], np.dtype(self.manifest["dtype"]))

    def text(self, name: str) -> tuple[list[str], list[str]]:
        """Detokenized (English, Czech) sentences of valid or test, in the order of the shards."""
        if name not in ("valid", "test"):
            raise ValueError(f"{name}: text is kept of valid and test only")
        # not splitlines(), which also splits at characters that are no line ends to anybody else
        en, cs = ((self.path / f"{name}.{lang}.txt").read_text(encoding="utf-8").split("\n")[:-1] for lang in LANGS)
        return en, cs
