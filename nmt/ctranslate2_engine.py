"""Translate text with CTranslate2, from a folder of `ctranslate2_model.py`: several times as fast as fairseq's search.

In fp32 it gives fairseq's hypotheses: the same beams, the same score (log-probability / length ** penalty, </s>
counted), the same longest translation. torch is never imported, so a translation begins in a fraction of a second.

Sentences are sorted by length and cut into small batches: on a CPU they keep the caches warm, and with a vocabulary
map, whose candidates are those of the whole batch, they keep the output layer narrow. Threads take batches in turn.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .config import DIRECTIONS, DecodeConfig
from .subwords import MAX_SOURCE_TOKENS, PAD, Subwords
from .vocabulary_map import VMAP

CARD = "tenko.json"
"""What tenko keeps beside CTranslate2's own files: direction, quantization, whether there is a vocabulary map, and the
other files' sizes and sums."""
FORMAT = 1
FILES = ("model.bin", "config.json", "shared_vocabulary.json", "spm.model")
"""What a model folder has besides, to translate."""
QUANTIZATIONS = {"int8": "int8", "int16": "int16", "fp32": "float32"}
"""What weights are stored as, and CTranslate2's word for it."""

BLANK = "<blank>"
"""CTranslate2's name of what it pads with; it has the id of fairseq's <pad>."""
BATCH_TOKENS = 512
"""Source tokens of a batch, padding included, where `DecodeConfig.max_tokens` allows as many."""
MAPPED_BATCH_TOKENS = 256
"""The same with a vocabulary map and a beam."""
MAX_TARGET_TOKENS = 1023
"""Where positions of the decoder end."""


class CTranslate2Translator:
    """A CTranslate2 model with its subwords, ready to translate; the interface is `translate.Translator`'s.

    Args:
        folder: what `export_ctranslate2` wrote.
        threads: CPU threads, each with a batch of its own; None takes all cores.
        device: cpu or cuda.

    Raises:
        DamagedModel: the folder is no such model, or not as it was written, or CTranslate2 can't load it.
        ValueError: the device isn't there.
    """

    def __init__(self, folder: Path | str, *, threads: int | None = None, device: str = "cpu") -> None:
        import ctranslate2

        self.folder = Path(folder)
        card = read_card(self.folder)
        self.direction: str = card["direction"]
        self.quantization: str = card["quantization"]
        self.vocabulary_map: bool = card["vocabulary_map"]
        self.tokens_produced = 0
        """Subwords of all hypotheses so far, ends of sentences included."""
        self.cut: list[int] = []
        """Which of the last sentences were cut, at `MAX_SOURCE_TOKENS`."""
        hold_files(self.folder, card)
        self.subwords = Subwords(self.folder / "spm.model")
        self._tokens = vocabulary(self.subwords.pieces())
        self._ids = {token: index for index, token in enumerate(self._tokens)}
        hold_vocabulary(self.folder, self._tokens)
        if device == "cuda" and not ctranslate2.get_cuda_device_count():
            raise ValueError("--device: cuda is not available to CTranslate2 here; valid: cpu")
        self.threads = threads or len(os.sched_getaffinity(0))
        ctranslate2.set_log_level(40)  # errors: it warns of processors without 16-bit products, and takes 8-bit ones
        try:
            self._model = ctranslate2.Translator(
                str(self.folder), device=device, inter_threads=self.threads if device == "cpu" else 1, intra_threads=1
            )
        except (RuntimeError, ValueError) as error:
            raise DamagedModel(f"{self.folder}: CTranslate2 cannot load it ({' '.join(str(error).split())})") from None

    def translate(
        self,
        sentences: Sequence[str],
        *,
        decode: DecodeConfig | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[str]:
        """Translations in the order of the sentences; an empty or blank line gives an empty line.

        Args:
            sentences: detokenized text, one sentence each.
            decode: beam search; the default is beam 4.
            progress: told (sentences done, sentences in all) after each batch.
        """
        decode = decode or DecodeConfig()
        encoded = [self.subwords.encode(sentence) for sentence in sentences]
        self.cut = [index for index, ids in enumerate(encoded) if len(ids) > MAX_SOURCE_TOKENS]
        sources = [ids[:MAX_SOURCE_TOKENS] for ids in encoded]
        results = [""] * len(sentences)
        done = sum(not source for source in sources)
        running: deque[tuple[list[int], list[Any]]] = deque()

        def finish_first() -> None:
            nonlocal done
            batch, translations = running.popleft()
            for index, translation in zip(batch, translations, strict=True):
                ids = [self._ids[piece] for piece in translation.result().hypotheses[0]]
                results[index] = self.subwords.decode(ids)
                self.tokens_produced += len(ids) + 1
            done += len(batch)
            if progress is not None:
                progress(done, len(sentences))

        for batch in self._batches(sources, decode):
            running.append((batch, self._start([sources[index] for index in batch], decode)))
            if len(running) > 2 * self.threads:
                finish_first()
        while running:
            finish_first()
        return results

    def _batches(self, sources: list[list[int]], decode: DecodeConfig) -> Iterator[list[int]]:
        """Indices of sentences, longest first, as many as fit with their padding and </s>; empty ones left out."""
        limit = MAPPED_BATCH_TOKENS if self.vocabulary_map and decode.beam > 1 else BATCH_TOKENS
        order = sorted((i for i, source in enumerate(sources) if source), key=lambda i: -len(sources[i]))
        start = 0
        while start < len(order):
            count = max(1, min(limit, decode.max_tokens) // (len(sources[order[start]]) + 1))
            yield order[start : start + count]
            start += count

    def _start(self, batch: list[list[int]], decode: DecodeConfig) -> list[Any]:
        # As long as `fairseq_bridge.Beam` lets a translation grow: twice the longest source, its </s> counted, and 20.
        longest = min(2 * (len(batch[0]) + 1) + 20, MAX_TARGET_TOKENS)
        return self._model.translate_batch(
            [[self._tokens[token] for token in source] for source in batch],
            asynchronous=True,
            beam_size=decode.beam,
            length_penalty=decode.length_penalty,
            max_input_length=0,
            max_decoding_length=longest,
            use_vmap=self.vocabulary_map,
            suppress_sequences=[[BLANK]],  # as fairseq never says <pad>
        )


class DamagedModel(ValueError):
    """A folder's files are not those that were written."""


def vocabulary(pieces: Sequence[str]) -> list[str]:
    """CTranslate2's entries by id, of sentencepiece's."""
    return [BLANK if index == PAD else piece for index, piece in enumerate(pieces)]


def sums_of(folder: Path) -> dict[str, dict[str, Any]]:
    """Size in bytes and sha256 of each file in a folder, by name, for its card."""
    return {
        file.name: {"bytes": file.stat().st_size, "sha256": _sha256(file)}
        for file in sorted(folder.iterdir())
        if file.name != CARD
    }


def hold_files(folder: Path, card: Mapping[str, Any]) -> None:
    """Hold a model folder's files to its card, before CTranslate2, which trusts them, is given them.

    Folders of earlier versions have no sums: their files are only looked at.

    Raises:
        DamagedModel: one is missing, or not as it was written; names it.
    """
    sums: Mapping[str, Any] = card.get("files", {})
    for name in sorted({*FILES, *([VMAP] if card["vocabulary_map"] else []), *sums}):
        file = folder / name
        if not file.is_file():
            raise DamagedModel(f"{file}: missing")
        if name in sums:
            size, wanted = file.stat().st_size, sums[name]
            if size != wanted["bytes"]:
                raise DamagedModel(f"{file}: damaged (has {size:,} bytes, {CARD} says {wanted['bytes']:,})")
            if _sha256(file) != wanted["sha256"]:
                raise DamagedModel(f"{file}: damaged (its checksum differs)")
    if (folder / VMAP).exists() and not card["vocabulary_map"]:
        raise DamagedModel(f"{folder / VMAP}: is no part of the model, says {CARD}")


def hold_vocabulary(folder: Path, tokens: Sequence[str]) -> None:
    """Hold the vocabulary of a model folder, and of its map, to the subwords': CTranslate2 crashes with another.

    Raises:
        DamagedModel: it is another; names the file.
    """
    file = folder / "shared_vocabulary.json"
    try:
        found = json.loads(file.read_bytes())
    except (ValueError, RecursionError):
        raise DamagedModel(f"{file}: damaged: no JSON") from None
    if found != tokens:
        raise DamagedModel(f"{file}: its entries are not those of spm.model")
    if not (folder / VMAP).is_file():
        return
    known = {*tokens, ""}
    for line in (folder / VMAP).read_bytes().removesuffix(b"\n").split(b"\n"):
        source, *targets = line.decode("utf-8", "replace").split("\t")
        if len(targets) != 1 or source not in known or not known.issuperset(targets[0].split(" ")):
            raise DamagedModel(f"{folder / VMAP}: damaged, or of other subwords")


_SUMS = {"bytes": int, "sha256": str}
"""What a card says of each file."""


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def read_card(folder: Path) -> dict[str, Any]:
    """`tenko.json` of a model folder that `tenko export --format ctranslate2` wrote.

    Raises:
        DamagedModel: the folder or the file is missing or malformed, or from a newer tenko.
    """
    file = folder / CARD
    try:
        card = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DamagedModel(f"{folder}: no model of `tenko export --format ctranslate2` ({CARD} is missing)") from None
    except (ValueError, RecursionError):  # RecursionError: JSON of a thousand brackets
        raise DamagedModel(f"{file}: damaged: no JSON") from None
    wanted = {"format": int, "direction": str, "quantization": str, "vocabulary_map": bool}
    for key, kind in wanted.items():
        if not isinstance(card, dict) or not isinstance(card.get(key), kind):
            raise DamagedModel(f"{file}: damaged: has no {key!r}")
    if card["format"] > FORMAT:
        raise DamagedModel(f"{file}: format {card['format']} is newer than this tenko reads ({FORMAT}); update tenko")
    if card["direction"] not in DIRECTIONS:
        raise DamagedModel(f"{file}: unknown direction {card['direction']!r}; valid are {', '.join(DIRECTIONS)}")
    sums = card.get("files", {})
    for name, entry in sums.items() if isinstance(sums, dict) else [("files", sums)]:
        if "/" in name or not isinstance(entry, dict) or [type(entry.get(key)) for key in _SUMS] != [*_SUMS.values()]:
            raise DamagedModel(f"{file}: damaged: has no size and sum of {name!r}")
    return card
