"""Which program translates: CTranslate2, converted on first use, or fairseq's own beam search.

A converted model is kept in a cache under a name made of the hash of all it came from, so a stale one is never used;
one that is damaged is converted anew. Once it is there, neither torch nor fairseq is imported: a translation begins in
a fraction of a second.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from . import vocabulary_map
from .config import DecodeConfig
from .ctranslate2_engine import CARD, FORMAT, CTranslate2Translator, DamagedModel

ENGINES = ("ctranslate2", "fairseq")
CACHE = "TENKO_CACHE"
"""Environment variable: the folder of converted models, in place of `$XDG_CACHE_HOME/tenko` or `~/.cache/tenko`."""
_SUMS = 2
"""Version of what a converted model's card holds: one without sums isn't taken from a cache."""
_MODEL_FILES = ("model.safetensors", "model.safetensors.zst")  # as container.py has them, which imports torch

logger = logging.getLogger(__name__)


class Engine(Protocol):
    """What translates."""

    direction: str
    """en-cs or cs-en."""
    tokens_produced: int
    """Subwords of all hypotheses so far, ends of sentences included."""
    cut: list[int]
    """Which of the last sentences were cut, at `MAX_SOURCE_TOKENS`."""

    def translate(
        self,
        sentences: Sequence[str],
        *,
        decode: DecodeConfig | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[str]:
        """Translations in the order of the sentences; an empty or blank line gives an empty line."""


def choose(model: Path, engine: str | None = None, device: str = "cpu") -> str:
    """The engine for a model: the one asked for, or else CTranslate2 on a CPU where it is installed.

    Args:
        model: an artefact's folder, or one that `tenko export --format ctranslate2` wrote.
        engine: ctranslate2, fairseq, or None.
        device: cpu or cuda.

    Raises:
        ValueError: no such engine, it isn't installed, or it can't read the model.
    """
    converted = (model / CARD).is_file()
    installed = importlib.util.find_spec("ctranslate2") is not None
    if engine is None:
        engine = "ctranslate2" if converted or (installed and device == "cpu") else "fairseq"
    if engine not in ENGINES:
        raise ValueError(f"--engine: unknown engine {engine!r}; valid: {', '.join(ENGINES)}")
    if engine == "fairseq" and converted:
        raise ValueError(f"--engine: {model} is a CTranslate2 model, fairseq needs an artefact; valid: ctranslate2")
    if engine == "ctranslate2" and not installed:
        raise ValueError("--engine: ctranslate2 is not installed (pip install ctranslate2); valid: fairseq")
    return engine


def load(
    model: Path,
    *,
    engine: str | None = None,
    threads: int | None = None,
    device: str = "cpu",
    cache: Path | None = None,
    quantization: str = "int8",
) -> Engine:
    """A model ready to translate.

    Args:
        model: an artefact's folder, or one that `tenko export --format ctranslate2` wrote.
        engine: as for `choose`.
        threads: CPU threads; None takes all cores.
        device: cpu or cuda.
        cache: where a converted artefact is kept; None keeps it in the artefact's folder if that can be written, else
            in `user_cache()`.
        quantization: of a converted artefact.

    Raises:
        ValueError: the folder is neither, a file is missing or damaged, or the engine can't run it.
    """
    if choose(model, engine, device) == "fairseq":
        from .translate import Translator

        return Translator.load(model, threads=threads, device=device)
    if (model / CARD).is_file():
        return CTranslate2Translator(model, threads=threads, device=device)
    name = f"ct2-{quantization}-{_fingerprint(model)}"
    folders = [cache] if cache is not None else [model, user_cache()]
    for folder in [folder / name for folder in folders if (folder / name).exists()]:
        try:
            return CTranslate2Translator(folder, threads=threads, device=device)
        except DamagedModel as error:
            logger.info("%s; converting the model anew", error)
            shutil.rmtree(folder, ignore_errors=True)
    return CTranslate2Translator(_convert(model, quantization, folders, name), threads=threads, device=device)


def user_cache() -> Path:
    """The user's folder of converted models, made if missing; one for this process where none can be written."""
    base = os.environ.get("XDG_CACHE_HOME")
    chosen = os.environ.get(CACHE) or (Path(base) / "tenko" if base else Path("~/.cache/tenko").expanduser())
    folder = Path(chosen)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK | os.X_OK):
            return folder
    except OSError:
        pass
    return _temporary_cache()


def _temporary_cache() -> Path:
    global _temporary
    if _temporary is None:
        _temporary = tempfile.TemporaryDirectory(prefix="tenko-")  # removed when the interpreter ends
    return Path(_temporary.name)


_temporary: tempfile.TemporaryDirectory[str] | None = None


def _convert(artefact: Path, quantization: str, folders: Sequence[Path], name: str) -> Path:
    """Write the model as `name` into the first of the folders that can be written."""
    from .ctranslate2_model import export_ctranslate2, sweep

    mapped = None
    if (artefact / vocabulary_map.FILE).is_file():
        from .subwords import Subwords

        vocabulary = len(Subwords(artefact / "spm.model"))
        mapped = vocabulary_map.VocabularyMap.load(artefact / vocabulary_map.FILE, vocabulary)
    target = next((folder for folder in folders if os.access(folder, os.W_OK | os.X_OK)), folders[-1])
    if target == artefact:
        for stale in artefact.glob(f"ct2-{quantization}-*"):
            shutil.rmtree(stale, ignore_errors=True)
    sweep(target, "ct2-*")
    return export_ctranslate2(artefact, target / name, quantization=quantization, vocabulary_map=mapped)


def _fingerprint(artefact: Path) -> str:
    """A hash of all files that the converted model depends on."""
    files = [artefact / name for name in (*_MODEL_FILES, "spm.model", "dict.txt", vocabulary_map.FILE)]
    digest = hashlib.sha256(f"format {FORMAT}, sums {_SUMS}".encode())
    found = [file for file in files if file.is_file()]
    if not any(file.name in _MODEL_FILES for file in found):
        either = " or ".join(_MODEL_FILES)
        what = f"misses {either}" if artefact.is_dir() else "no such folder"
        raise ValueError(f"{artefact}: {what}; give a model's folder")
    for file in found:
        with file.open("rb") as opened:
            digest.update(file.name.encode() + hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()[:16]
