"""Sequence-level distillation: a corpus whose training targets are what a teacher makes of the sources.

    runs/NAME/taught/HASH/00000.tsv ...             CHUNK pairs a file, English and Czech, in the corpus's order
    runs/NAME/taught/HASH/{train,valid,test}.tsv    what is prepared from them, as any other corpus is

HASH is of the corpus, the teacher and the search, so stages with one teacher share it. A file that
is not whole is made anew: a run that was cut goes on behind the last one. All ranks translate; rank 0 writes.

Source: Kim & Rush 2016, "Sequence-Level Knowledge Distillation", section 3.2 (the teacher's distribution over sentences
by the result of beam search).
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from tenko.compression.container import artefact_file
from tenko.nmt import distributed, engines
from tenko.nmt.config import DistillConfig
from tenko.nmt.corpus import SPLITS, Corpus
from tenko.nmt.prepare import prepare
from tenko.nmt.shards import LANGS, PairShards
from tenko.nmt.subwords import Subwords
from tenko.nmt.text_io import sha256

from .files import read_text, write_text_atomic
from .recipe import decode_config
from .rundir import ARTEFACT, StageContext
from .stage_tools import corpus_from_rank0

TAUGHT = "taught"
CHUNK = 1000
"""Pairs a file: what a cut run loses at most, for each rank."""

logger = logging.getLogger(__name__)


def taught_corpus(
    context: StageContext, device: torch.device, corpus: Corpus, distill: DistillConfig, teacher: Path | None
) -> Corpus:
    """The corpus to train on: with `distill.sequences` the teacher's translations; called on every rank.

    Validation and test split, subwords and vocabulary stay the corpus's.

    Args:
        context: the stage.
        device: where to translate.
        corpus: its training sources are translated.
        distill: of the training.
        teacher: the folder of the stage that teaches.

    Raises:
        ValueError: the teacher's artefact is damaged, or cleaning leaves none of its translations.
    """
    if not distill.sequences:
        return corpus
    assert teacher is not None, "the recipe checks that a stage comes before"
    named = str(_folder(context, corpus, teacher / ARTEFACT)) if distributed.rank() == 0 else None
    folder = Path(distributed.from_rank0(named))
    _translate(context, device, corpus, teacher / ARTEFACT, folder)
    return corpus_from_rank0(lambda: _prepare(context, corpus, folder))


def _folder(context: StageContext, corpus: Corpus, artefact: Path) -> Path:
    search = dataclasses.astuple(decode_config(context.recipe))
    parts = (context.recipe.direction, corpus.manifest["hash"], sha256(artefact_file(artefact)), CHUNK, *search)
    folder = context.run_dir / TAUGHT / hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _chunk(folder: Path, number: int) -> Path:
    return folder / f"{number:05}.tsv"


def _of_chunk(number: int, pairs: PairShards) -> range:
    """The pairs that a file holds."""
    return range(number * CHUNK, min((number + 1) * CHUNK, len(pairs)))


def _is_whole(file: Path, pairs: int) -> bool:
    """Whether it holds so many pairs; one that somebody has damaged is translated anew."""
    lines = file.read_bytes().split(b"\n")[:-1] if file.is_file() else []
    return [line.count(b"\t") for line in lines] == [1] * pairs


def _translate(context: StageContext, device: torch.device, corpus: Corpus, artefact: Path, folder: Path) -> None:
    """Write the files of translations that are missing, as rank 0 sees them."""
    pairs = corpus.split("train")
    chunks = range(-(-len(pairs) // CHUNK))
    there = [_is_whole(_chunk(folder, number), len(_of_chunk(number, pairs))) for number in chunks]
    missing = distributed.from_rank0([number for number in chunks if not there[number]])
    if not missing:
        context.reporter.log(f"{context.stage.name}: {folder} has the teacher's translations")
        return
    engine = _engine(artefact, device) if distributed.rank() == 0 else None  # others find it converted
    distributed.barrier()
    engine = engine or _engine(artefact, device)
    subwords, (source, target) = Subwords(corpus.spm_path), context.recipe.direction.split("-")
    world, decode = distributed.world_size(), decode_config(context.recipe)
    done = (len(chunks) - len(missing)) * CHUNK
    context.reporter.start(f"{context.stage.name}: translating the training split", len(pairs), done)
    for first in range(0, len(missing), world):
        turn_of = missing[first : first + world]  # a file for each rank; the last turn may have fewer
        text = ""
        if distributed.rank() < len(turn_of):
            some = _of_chunk(turn_of[distributed.rank()], pairs)
            sources = [subwords.decode(pairs.tokens(source, index)) for index in some]
            text = _tsv({source: sources, target: engine.translate(sources, decode=decode)})
        texts = distributed.gather_json(text, device)
        if distributed.rank() == 0:
            for number, written in zip(turn_of, texts, strict=False):
                write_text_atomic(_chunk(folder, number), written)
        done += CHUNK * len(turn_of)
        context.reporter.advance(min(done, len(pairs)))
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


def _prepare(context: StageContext, corpus: Corpus, folder: Path) -> Corpus:
    """The prepared corpus of the translations; rank 0 alone."""
    chunks = range(-(-len(corpus.split("train")) // CHUNK))
    texts = {split: _tsv(dict(zip(LANGS, corpus.text(split), strict=True))) for split in SPLITS[1:]}
    texts["train"] = "".join(read_text(_chunk(folder, number)) for number in chunks)
    for split, text in texts.items():
        write_text_atomic(folder / f"{split}.tsv", text)
    train, valid, test = (str(folder / f"{split}.tsv") for split in SPLITS)
    subwords = str(corpus.spm_path)
    data = dataclasses.replace(context.recipe.data, train=train, valid=valid, test=test, subwords=subwords)
    return prepare(data, report=context.reporter.log)
