"""What a teacher writes to train on: its translations of the training sources, and of more text of their language.

    runs/NAME/taught/HASH/00000.tsv ...             CHUNK pairs a file, English and Czech, in the order of the sources
    runs/NAME/taught/HASH/{train,valid,test}.tsv    what is prepared from them, as any other corpus is
    runs/NAME/taught/texts.json                     the sha256 of each text that the run has begun with

HASH is of the corpus, the text, the teacher and the search, so stages with one teacher share it. A file that
is not whole is made anew: a run that was cut goes on behind the last one. All ranks translate; rank 0 writes.

Source: Kim & Rush 2016, "Sequence-Level Knowledge Distillation", section 3.2 (the teacher's distribution over sentences
by the result of beam search).
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path

import torch

from tenko.compression.container import artefact_file
from tenko.nmt import distributed, engines
from tenko.nmt.clean import normalise
from tenko.nmt.config import DistillConfig
from tenko.nmt.corpus import SPLITS, Corpus
from tenko.nmt.prepare import prepare
from tenko.nmt.shards import LANGS
from tenko.nmt.subwords import Subwords
from tenko.nmt.text_io import read_lines, sha256, text_file

from .files import read_json, write_bytes_atomic, write_json_atomic, write_text_atomic
from .recipe import decode_config
from .rundir import ARTEFACT, StageContext
from .stage_tools import corpus_from_rank0

TAUGHT, TEXTS = "taught", "texts.json"
CHUNK = 1000
"""Pairs a file: what a cut run loses at most, for each rank."""

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class _Sources:
    """Sentences that the teacher translates."""

    what: str
    """For the progress bar."""
    folder: Path
    """Of its translations."""
    count: int
    read: Callable[[], Iterator[str]]
    """All of them, always in the same order."""

    @property
    def files(self) -> list[Path]:
        return [self.folder / f"{number:05}.tsv" for number in range(-(-self.count // CHUNK))]


def taught_corpus(
    context: StageContext, device: torch.device, corpus: Corpus, distill: DistillConfig, teacher: Path | None
) -> Corpus:
    """The corpus to train on: with `distill.sequences` and `distill.text` the teacher's; called on every rank.

    Validation and test split, subwords and vocabulary stay the corpus's.

    Args:
        context: the stage.
        device: where to translate.
        corpus: its training sources are translated, or stay beside the text that is.
        distill: of the training.
        teacher: the folder of the stage that teaches.

    Raises:
        ValueError: the teacher's artefact is damaged, the text can't be read, has no sentence or is not the one that
            the run has begun with, or cleaning leaves none of the translations.
    """
    if not distill.sequences and distill.text is None:
        return corpus
    assert teacher is not None, "the recipe checks that a stage comes before"
    artefact = teacher / ARTEFACT
    parts = []
    if distill.sequences:
        parts.append(_training_sources(context, corpus, artefact))
    if distill.text is not None:
        parts.append(_text(context, corpus, artefact, distill))
    for part in parts:
        _translate(context, device, artefact, part)
    return corpus_from_rank0(lambda: _prepare(context, corpus, parts, references=not distill.sequences))


def _training_sources(context: StageContext, corpus: Corpus, artefact: Path) -> _Sources:
    source = context.recipe.direction.split("-")[0]
    subwords, pairs = Subwords(corpus.spm_path), corpus.split("train")

    def read() -> Iterator[str]:
        return (subwords.decode(pairs.tokens(source, index)) for index in range(len(pairs)))

    return _Sources("the training split", _folder(context, corpus, artefact), len(pairs), read)


def _text(context: StageContext, corpus: Corpus, artefact: Path, distill: DistillConfig) -> _Sources:
    assert distill.text is not None
    path = text_file(distill.text, "distill.text")
    subwords, limit = Subwords(corpus.spm_path), context.recipe.data.max_tokens_per_sentence

    def read() -> Iterator[str]:
        sentences = filter(None, map(normalise, read_lines(path)))
        return (sentence for sentence in sentences if len(subwords.encode(sentence)) <= limit)

    def count() -> tuple[int, str]:
        now = _hold_text(context, path)
        found = sum(1 for _ in read())
        if not found:
            raise ValueError(f"{path}: no sentence of at most {limit} subwords to translate (distill.text)")
        return found, now

    found, now = distributed.from_rank0(count() if distributed.rank() == 0 else None)
    return _Sources(path.name, _folder(context, corpus, artefact, now, limit, distill.sequences), found, read)


def _hold_text(context: StageContext, path: Path) -> str:
    """The sha256 of a text. Noted when a run begins with it, and held to later: data positions are of one order."""
    file = context.run_dir / TAUGHT / TEXTS
    file.parent.mkdir(parents=True, exist_ok=True)
    noted, now = (read_json(file) if file.exists() else {}), sha256(path)
    if noted.get(str(path), now) != now:
        raise ValueError(
            f"{path}: has changed since this run began with it (distill.text); put back what it was, or choose another "
            "--run-dir"
        )
    if str(path) not in noted:
        write_json_atomic(file, noted | {str(path): now})
    return now


def _folder(context: StageContext, corpus: Corpus, artefact: Path, *more: object) -> Path:
    def named() -> str:
        search = dataclasses.astuple(decode_config(context.recipe))
        parts = (context.recipe.direction, corpus.manifest["hash"], sha256(artefact_file(artefact)), CHUNK)
        folder = context.run_dir / TAUGHT / hashlib.sha256(repr((*parts, *search, *more)).encode()).hexdigest()[:16]
        folder.mkdir(parents=True, exist_ok=True)
        return str(folder)

    return Path(distributed.from_rank0(named() if distributed.rank() == 0 else None))


def _is_whole(file: Path, pairs: int) -> bool:
    """Whether it holds so many pairs; one that somebody has damaged is translated anew."""
    lines = file.read_bytes().split(b"\n")[:-1] if file.is_file() else []
    return [line.count(b"\t") for line in lines] == [1] * pairs


def _chunks(sentences: Iterator[str], numbers: Iterable[int]) -> Iterator[list[str]]:
    """Those of these ascending numbers; the others are read over."""
    position = 0
    for number in numbers:
        next(islice(sentences, (number - position) * CHUNK, (number - position) * CHUNK), None)
        yield list(islice(sentences, CHUNK))
        position = number + 1


def _translate(context: StageContext, device: torch.device, artefact: Path, sources: _Sources) -> None:
    """Write the files of translations that are missing, as rank 0 sees them."""
    files, count = sources.files, sources.count
    whole = [_is_whole(file, min(CHUNK, count - CHUNK * number)) for number, file in enumerate(files)]
    missing = distributed.from_rank0([number for number in range(len(files)) if not whole[number]])
    if not missing:
        context.reporter.log(f"{context.stage.name}: {sources.folder} has the teacher's translations")
        return
    engine = _engine(artefact, device) if distributed.rank() == 0 else None  # others find it converted
    distributed.barrier()
    engine = engine or _engine(artefact, device)
    source, target = context.recipe.direction.split("-")
    world, decode = distributed.world_size(), decode_config(context.recipe)
    done = (len(files) - len(missing)) * CHUNK
    own = _chunks(sources.read(), missing[distributed.rank() :: world])
    context.reporter.start(f"{context.stage.name}: translating {sources.what}", count, done)
    for first in range(0, len(missing), world):
        turn_of = missing[first : first + world]  # a file for each rank; the last turn may have fewer
        some = next(own, None)
        translated = some and {source: some, target: engine.translate(some, decode=decode)}
        texts = distributed.gather_json(_tsv(translated) if translated else "", device)
        if distributed.rank() == 0:
            for number, written in zip(turn_of, texts, strict=False):
                write_text_atomic(files[number], written)
        done += CHUNK * len(turn_of)
        context.reporter.advance(min(done, count))
    context.reporter.finish()


def _tsv(lines: Mapping[str, Sequence[str]]) -> str:
    """Aligned lines by language as the text of a TSV file."""
    return "".join("\t".join(pair) + "\n" for pair in zip(*(lines[lang] for lang in LANGS), strict=True))


def _engine(artefact: Path, device: torch.device) -> engines.Engine:
    """What translates fastest here: CTranslate2 in int8 on a CPU, fairseq where that can't take the model."""
    threads = torch.get_num_threads()
    try:
        return engines.load(artefact, device=str(device), threads=threads)
    except ValueError as error:
        if engines.choose(artefact, device=str(device)) == "fairseq":
            raise
        logger.info("%s; fairseq translates", error)
        return engines.load(artefact, engine="fairseq", device=str(device), threads=threads)


def _references(corpus: Corpus) -> Iterator[bytes]:
    """The training split as lines of a TSV file."""
    subwords, pairs = Subwords(corpus.spm_path), corpus.split("train")
    for index in range(len(pairs)):
        yield _tsv({lang: [subwords.decode(pairs.tokens(lang, index))] for lang in LANGS}).encode()


def _prepare(context: StageContext, corpus: Corpus, parts: Sequence[_Sources], *, references: bool) -> Corpus:
    """The prepared corpus of the translations, after the references where these stay; rank 0 alone."""
    folder = parts[-1].folder
    for split in SPLITS[1:]:
        write_text_atomic(folder / f"{split}.tsv", _tsv(dict(zip(LANGS, corpus.text(split), strict=True))))
    translations = (file.read_bytes() for part in parts for file in part.files)
    write_bytes_atomic(folder / "train.tsv", chain(_references(corpus) if references else (), translations))
    train, valid, test = (str(folder / f"{split}.tsv") for split in SPLITS)
    subwords = str(corpus.spm_path)
    data = dataclasses.replace(context.recipe.data, train=train, valid=valid, test=test, subwords=subwords)
    return prepare(data, report=context.reporter.log)
