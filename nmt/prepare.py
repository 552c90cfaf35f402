"""From text files to a binarized corpus in a folder named by the hash of what went in.

Three passes, all streaming: clean and hash every pair; decide by hashes alone which are duplicates, held out, or would
leak; train subwords on a bounded sample and write the shards. The folder is built beside its place and renamed into
it, under a lock: a second run waits for the first and takes what it made, and nothing half-written ever has the name.
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
import os
import shutil
import time
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
import zstandard

from . import splits
from .clean import REASONS, hash64, normalise, reason_to_drop, sentence_key
from .config import DataConfig
from .corpus import FORMAT, MANIFEST, SPLITS, Corpus, DamagedCorpus
from .shards import LANGS, ShardWriter, token_dtype
from .subwords import TRAINING, Subwords, train_subwords
from .text_io import PACKED, read_lines, read_pairs, sha256, source_files

Report = Callable[[str], None]
Pair = tuple[str, str]

BATCH = 8192
"""Pairs encoded, written or hashed at a time."""
SUBWORD_SAMPLE, SUBWORD_CHARACTERS = 500_000, 100_000_000
"""Pairs, and characters, that the subword model is trained on at most: bounds the memory of its training."""
ENCODE_THREADS = 2


def _batches(items: Iterable[Any], size: int = BATCH) -> Iterator[list[Any]]:
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch


def _counts(dropped: Counter[str]) -> dict[str, int]:
    return {reason: dropped[reason] for reason in REASONS if dropped[reason]}


def _show(dropped: dict[str, int]) -> str:
    return ", ".join(f"{reason} {count:,}" for reason, count in dropped.items()) or "none"


def _identity(config: DataConfig, files: dict[str, dict[str, Path]]) -> dict[str, Any]:
    """All that the prepared corpus depends on: content and kind of the inputs, settings, versions."""
    inputs = {
        split: {role: [path.suffix if path.suffix in PACKED else "", sha256(path)] for role, path in roles.items()}
        for split, roles in files.items()
    }
    settings = {key: getattr(config, key) for key in ("vocab_size", "max_tokens_per_sentence", "max_ratio")}
    settings |= {f"{split}_size": getattr(config, f"{split}_size") for split in SPLITS[1:] if split not in files}
    if config.subwords is not None:
        del settings["vocab_size"]
        settings["subwords"] = sha256(Path(config.subwords))
    versions = {"sentencepiece": sentencepiece.__version__, "unicode": unicodedata.unidata_version}
    return {"format": FORMAT, "inputs": inputs, "settings": settings, "subwords": TRAINING, "versions": versions}


@contextmanager
def _locked(path: Path, report: Report) -> Iterator[None]:
    with path.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            report("data: another run is preparing the same corpus, waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def prepare(config: DataConfig, *, report: Report) -> Corpus:
    """Build the corpus that `config` describes, or open it when it has been built from the same content before.

    Args: report: called with lines of plain text on what is being done.

    Raises: ValueError for bad input (names the file, line or key); OSError when the disk says no. Either way, and on
    Ctrl-C, nothing is left behind.
    """
    files = {
        split: source_files(source, f"data.{split}")
        for split, source in (("train", config.train), ("valid", config.valid), ("test", config.test))
        if source is not None
    }
    for split, roles in files.items():
        for path in roles.values():
            if not path.is_file():
                raise ValueError(f"data.{split}: {path} is a pipe, which is read once; give a file")
    if config.subwords is not None:
        given = Path(config.subwords).expanduser()
        config = dataclasses.replace(config, subwords=str(given))
        try:
            Subwords(given)
        except ValueError as error:
            raise ValueError(f"data.subwords: {error}") from None
    identity = _identity(config, files)
    name = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    cache = Path(config.cache).expanduser()
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"data.cache: {cache}: can't be made a folder ({error.strerror})") from None
    place, building = cache / name, cache / f".{name}.building"
    with _locked(cache / f".{name}.lock", report):
        if place.exists():
            try:
                corpus = Corpus.open(place)
                sizes = corpus.manifest["splits"]
                if all(sizes[split]["pairs"] for split in SPLITS):
                    report(f"data: {place} is up to date, {sizes['train']['pairs']:,} training pairs")
                    return corpus
                report(f"data: warning: {place}: has an empty split; preparing it again")  # of an older version
            except DamagedCorpus as error:
                report(f"data: warning: {error}; preparing it again")
        shutil.rmtree(building, ignore_errors=True)  # of a run that was killed: nobody else holds the lock
        building.mkdir()
        try:
            _Builder(config, files, building, report).build(identity | {"hash": name})
            shutil.rmtree(place, ignore_errors=True)
            building.rename(place)
        finally:
            shutil.rmtree(building, ignore_errors=True)
    return Corpus.open(place)


class _Builder:
    """One build in `folder`; the methods are its passes, in order."""

    def __init__(self, config: DataConfig, files: dict[str, dict[str, Path]], folder: Path, report: Report) -> None:
        self.config, self.files, self.folder, self.report = config, files, folder, report
        self.scratch = folder / "scratch"
        self.clean_path, self.hash_path = self.scratch / "clean.tsv.zst", self.scratch / "hashes"
        self.read = self.characters = 0
        self.dropped = {split: Counter[str]() for split in SPLITS}
        self.given = [split for split in ("valid", "test") if split in files]

    def build(self, identity: dict[str, Any]) -> None:
        started = time.monotonic()
        self.scratch.mkdir()
        fates = self._decide(self._clean())
        subwords = self._train_subwords(fates)
        dtype = token_dtype(len(subwords))
        sizes = self._write(subwords, fates, dtype)
        shutil.rmtree(self.scratch)
        manifest = identity | {
            "names": {split: {role: str(path) for role, path in roles.items()} for split, roles in self.files.items()},
            "vocab_size": len(subwords),
            "dtype": dtype.str,
            "read": self.read,
            "splits": sizes,
            "dropped": {split: _counts(self.dropped[split]) for split in SPLITS},
            "seconds": round(time.monotonic() - started, 2),
            "files": {path.name: path.stat().st_size for path in sorted(self.folder.iterdir())},
        }
        with (self.folder / MANIFEST).open("w", encoding="utf-8") as file:
            json.dump(manifest, file, indent=1, ensure_ascii=False)
            file.flush()
            os.fsync(file.fileno())
        sizes_text = ", ".join(f"{split} {sizes[split]['pairs']:,}" for split in SPLITS)
        self.report(f"data: {sizes_text} pairs, {len(subwords):,} subwords, {manifest['seconds']} s")
        self.report(f"data: dropped from train: {_show(manifest['dropped']['train'])}")

    def _clean(self) -> int:
        """Pass 1: the clean training pairs to one file, their hashes to another. Returns how many were kept."""
        max_ratio, max_tokens = self.config.max_ratio, self.config.max_tokens_per_sentence
        dropped, kept, shown = self.dropped["train"], 0, time.monotonic()
        with (
            self.hash_path.open("wb") as hashes,
            self.clean_path.open("wb") as packed,
            zstandard.ZstdCompressor(level=1).stream_writer(packed) as clean,
        ):
            for batch in _batches(read_pairs(self.files["train"])):
                records, lines = [], []
                for raw_en, raw_cs in batch:
                    en, cs = normalise(raw_en), normalise(raw_cs)
                    if reason := reason_to_drop(en, cs, max_ratio=max_ratio, max_tokens=max_tokens):
                        dropped[reason] += 1
                        continue
                    line = f"{en}\t{cs}"
                    lines.append(line)
                    records.append((hash64(line), hash64(sentence_key(en)), hash64(sentence_key(cs))))
                hashes.write(np.array(records, splits.RECORD).tobytes())
                clean.write("".join(f"{line}\n" for line in lines).encode())
                self.read += len(batch)
                self.characters += sum(map(len, lines))
                kept += len(lines)
                if time.monotonic() - shown > 5:
                    shown = time.monotonic()
                    self.report(f"data: {self.read:,} pairs read, {kept:,} kept")
        names = " and ".join(str(path) for path in self.files["train"].values())
        if not self.read:
            raise ValueError(f"{names}: empty corpus, no sentence pairs")
        if not kept:
            raise ValueError(f"{names}: no pair is left of {self.read:,}; dropped: {_show(_counts(dropped))}")
        return kept

    def _given_pairs(self, split: str) -> Iterator[Pair]:
        """The valid or test set of the user: normalised, empty lines left out and counted, otherwise as it is."""
        for raw_en, raw_cs in read_pairs(self.files[split]):
            en, cs = normalise(raw_en), normalise(raw_cs)
            if en and cs:
                yield en, cs
            else:
                self.dropped[split]["empty"] += 1

    def _given_keys(self, split: str) -> splits.Keys:
        rows = [(hash64(sentence_key(en)), hash64(sentence_key(cs))) for en, cs in self._given_pairs(split)]
        self.dropped[split].clear()  # counted again when the shards are written
        if not rows:
            names = " and ".join(str(path) for path in self.files[split].values())
            raise ValueError(f"{names}: empty corpus, no sentence pairs for data.{split}")
        table = np.array(rows, "<u8")
        return splits.Keys(np.unique(table[:, 0]), np.unique(table[:, 1]))

    def _decide(self, pairs: int) -> np.ndarray:
        """Pass 2: the fate of every clean pair, uint8 [pairs]."""
        fates = np.zeros(pairs, np.uint8)
        dropped = self.dropped["train"]
        dropped["duplicates"] = splits.mark_duplicates(self.hash_path, fates, self.scratch)
        unique, leaks = pairs - dropped["duplicates"], 0
        for split in self.given:
            leaks += splits.mark_leaks(self.hash_path, fates, self._given_keys(split))
        for split, fate, size in (
            ("test", splits.TEST, self.config.test_size),
            ("valid", splits.VALID, self.config.valid_size),
        ):
            if split not in self.given:
                leaks += splits.mark_leaks(self.hash_path, fates, splits.hold_out(self.hash_path, fates, size, fate))
        dropped["in valid or test"] = leaks
        left = int((fates == splits.TRAIN).sum())
        if not left:
            held = [f"data.{split}_size" for split in ("valid", "test") if split not in self.given]
            raise ValueError(
                f"{' and '.join(held) or 'data.train'}: no training pair is left of {unique:,} clean ones beside "
                f"valid and test; give a larger corpus{' or hold out fewer' if held else ''}"
            )
        return fates

    def _clean_pairs(self, fates: np.ndarray) -> Iterator[tuple[int, str, str]]:
        """(fate, English, Czech) of every clean pair."""
        for fate, line in zip(fates, read_lines(self.clean_path), strict=True):
            en, cs = line.split("\t")
            yield int(fate), en, cs

    def _train_subwords(self, fates: np.ndarray) -> Subwords:
        """Subwords trained on all of train, or on a sample taken by hash: always the same, from all over the corpus;
        or those that the user gave."""
        if self.config.subwords is not None:
            shutil.copyfile(self.config.subwords, self.folder / "spm.model")
            given = Subwords(self.folder / "spm.model")
            given.write_dictionary(self.folder / "dict.txt")
            return given
        pairs = int((fates == splits.TRAIN).sum())
        share = min(1.0, SUBWORD_SAMPLE / pairs, SUBWORD_CHARACTERS / self.characters)
        threshold = int(share * (1 << 64))

        def sample() -> Iterator[str]:
            for fate, en, cs in self._clean_pairs(fates):
                if fate == splits.TRAIN and (share == 1 or hash64(f"{en}\t{cs}") < threshold):
                    yield en
                    yield cs

        self.report(f"data: training {self.config.vocab_size:,} subwords on about {int(share * pairs):,} pairs")
        subwords = train_subwords(sample, self.folder / "spm.model", vocab_size=self.config.vocab_size)
        subwords.write_dictionary(self.folder / "dict.txt")
        return subwords

    def _write(self, subwords: Subwords, fates: np.ndarray, dtype: np.dtype) -> dict[str, Any]:
        """Pass 3: the shards of all splits and the text of the held-out ones."""
        with ExitStack() as stack:
            writers = {
                split: [stack.enter_context(ShardWriter(self.folder, split, lang, dtype)) for lang in LANGS]
                for split in SPLITS
            }
            texts = {
                split: [stack.enter_context((self.folder / f"{split}.{lang}.txt").open("wb")) for lang in LANGS]
                for split in ("valid", "test")
            }
            limit = self.config.max_tokens_per_sentence

            def add(split: str, pairs: list[Pair], keep_all: bool) -> None:
                encoded = [subwords.encode_batch([pair[side] for pair in pairs], ENCODE_THREADS) for side in (0, 1)]
                keep = [keep_all or (len(en) <= limit and len(cs) <= limit) for en, cs in zip(*encoded, strict=True)]
                self.dropped[split]["length"] += len(keep) - sum(keep)
                for side in (0, 1):
                    writers[split][side].append([ids for ids, kept in zip(encoded[side], keep, strict=True) if kept])
                    if split in texts:
                        lines = (f"{pair[side]}\n" for pair, kept in zip(pairs, keep, strict=True) if kept)
                        texts[split][side].write("".join(lines).encode())

            names = {splits.TRAIN: "train", splits.VALID: "valid", splits.TEST: "test"}
            done, shown = 0, time.monotonic()
            for batch in _batches(self._clean_pairs(fates)):
                for fate, split in names.items():
                    if chosen := [(en, cs) for where, en, cs in batch if where == fate]:
                        add(split, chosen, keep_all=False)
                done += len(batch)
                if time.monotonic() - shown > 5:
                    shown = time.monotonic()
                    self.report(f"data: {done:,} of {len(fates):,} pairs binarized")
            for split in self.given:
                for pairs in _batches(self._given_pairs(split)):
                    add(split, pairs, keep_all=True)
        for split in SPLITS:
            if not writers[split][0].sentences:
                dropped = f"{self.dropped[split]['length']:,} were dropped for a side of more than {limit} subwords"
                raise ValueError(f"data.max_tokens_per_sentence: no pair is left for {split}: {dropped}")
        return {
            split: {
                "pairs": writers[split][0].sentences,
                "tokens": {lang: writer.tokens for lang, writer in zip(LANGS, writers[split], strict=True)},
            }
            for split in SPLITS
        }
