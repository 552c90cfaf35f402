"""What the commands of `cli.py` do, `run` excepted. They raise; `cli.main` turns that into a line and an exit code."""

from __future__ import annotations

import dataclasses
import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from tenko.nmt.config import DecodeConfig

from .recipe import Recipe, decode_config
from .rundir import RunDirectory
from .spawn import limit_threads
from .summary import stage_table

if TYPE_CHECKING:
    from tenko.nmt.engines import Engine

    from .models import Chosen

CHUNK = 1 << 16
"""Bytes of stdin translated at once at most; what a terminal or a slow pipe has ready is translated at once."""


def _decode(recipe: Recipe | None, **given: Any) -> DecodeConfig:
    """Beam search as the recipe trains with, what is given over it."""
    base = decode_config(recipe) if recipe else DecodeConfig()
    return dataclasses.replace(base, **{key: value for key, value in given.items() if value is not None})


def _engine(chosen: Chosen, engine: str | None, threads: int | None, device: str) -> Engine:
    from tenko.nmt import engines

    logging.disable(logging.INFO)
    engine = engines.choose(chosen.folder, engine, device)
    if engine == "fairseq":
        limit_threads(threads or 0, 1)
        import torch

        if device == "cuda" and not torch.cuda.is_available():
            raise ValueError("--device: cuda is not available here; valid: cpu")
    return engines.load(chosen.folder, engine=engine, threads=threads, device=device, cache=chosen.cache)


def translate(
    model: str | None,
    run_dir: Path | None,
    stage: str | None,
    beam: int | None,
    length_penalty: float | None,
    threads: int | None,
    engine: str | None,
    device: str,
) -> None:
    """`tenko translate`: stdin to stdout, a chunk of lines at a time."""
    from .models import choose

    chosen = choose(model, run_dir, stage)
    decode = _decode(chosen.recipe, beam=beam, length_penalty=length_penalty)
    translator = _engine(chosen, engine, threads, device)
    read, cut = 0, list[int]()
    for lines in read_chunks(sys.stdin.buffer):
        for line in translator.translate(lines, decode=decode):
            sys.stdout.buffer.write(line.encode("utf-8") + b"\n")
        sys.stdout.buffer.flush()
        cut += [read + index + 1 for index in translator.cut]
        read += len(lines)
    _warn_of_cut("stdin", cut)


def _warn_of_cut(file: str, lines: list[int]) -> None:
    from tenko.nmt.subwords import MAX_SOURCE_TOKENS

    if lines:
        others = f" (so were {len(lines) - 1:,} others)" if len(lines) > 1 else ""
        what = f"line {lines[0]}: cut after {MAX_SOURCE_TOKENS:,} subwords{others}"
        print(f"tenko: warning: {file}: {what}", file=sys.stderr)


def read_chunks(stream: BinaryIO) -> Iterator[list[str]]:
    """Lines in groups as they become available, without line ends; a last line needs none.

    Raises:
        ValueError: invalid UTF-8, after the lines before it; names the line.
    """
    number, read = 0, getattr(stream, "read1", stream.read)
    begun: list[bytes] = []  # blocks of a line that goes on; joined once, since a line may be long
    while True:
        block = read(CHUNK)
        first, *others = block.split(b"\n")
        begun.append(first)
        complete: list[bytes] = []
        if others:
            *whole, rest = others
            complete, begun = [b"".join(begun), *whole], [rest]
        elif not block and any(begun):
            complete = [b"".join(begun)]
        lines: list[str] = []
        for raw in complete:
            number += 1
            try:
                lines.append(raw.removesuffix(b"\r").decode("utf-8"))
            except UnicodeDecodeError:
                if lines:
                    yield lines
                raise ValueError(f"stdin: line {number}: invalid UTF-8") from None
        if lines:
            yield lines
        if not block:
            return


def evaluate(
    model: str | None,
    run_dir: Path | None,
    test: Path,
    stage: str | None,
    beam: int | None,
    length_penalty: float | None,
    threads: int | None,
    engine: str | None,
    device: str,
    *,
    as_json: bool,
) -> None:
    """`tenko evaluate`: scores on a TSV of English and Czech, normalised as a run's own test split is."""
    from tenko.nmt.clean import normalise
    from tenko.nmt.text_io import read_pairs, source_files

    from .models import choose

    if str(test) == "embedded":
        raise ValueError("--test: give a TSV file")
    pairs = [(normalise(en), normalise(cs)) for en, cs in read_pairs(source_files(str(test), "--test"))]
    numbers = [number for number, (en, cs) in enumerate(pairs, 1) if en and cs]
    if not numbers:
        raise ValueError(f"--test: {test} is empty" + (f": {len(pairs):,} lines without a pair" if pairs else ""))
    if len(numbers) < len(pairs):
        left_out = f"{len(pairs) - len(numbers):,} of {len(pairs):,} lines, of which a side is empty"
        print(f"tenko: {test}: left out {left_out}", file=sys.stderr)
    chosen = choose(model, run_dir, stage)
    decode = _decode(chosen.recipe, beam=beam, length_penalty=length_penalty)
    # An artefact's figure is that of its own weights, unless another program is asked for.
    engine = engine or ("fairseq" if chosen.is_artefact else "ctranslate2")
    translator = _engine(chosen, engine, threads, device)
    from tenko.nmt.evaluate import evaluate as score

    from .progress import Reporter

    english, czech = [list(side) for side in zip(*(pairs[number - 1] for number in numbers), strict=True)]
    sources, references = (english, czech) if translator.direction == "en-cs" else (czech, english)
    with Reporter(enabled=not as_json and sys.stdout.isatty()) as reporter:
        reporter.start(f"translating {test.name}", len(sources))
        scores = score(translator, sources, references, decode, lambda done, total: reporter.advance(done))
    _warn_of_cut(str(test), [numbers[index] for index in translator.cut])
    figures = {
        "bleu": scores.bleu,
        "chrf": scores.chrf,
        "sentences": scores.sentences,
        "tokens_per_second": scores.tokens_per_second,
        "bleu_signature": scores.bleu_signature,
        "chrf_signature": scores.chrf_signature,
        "direction": translator.direction,
        "engine": engine,
        "stage": chosen.stage,
    }
    if as_json:
        print(json.dumps(figures, ensure_ascii=False))
        return
    print(f"BLEU {scores.bleu:.2f}  {scores.bleu_signature}")
    print(f"chrF {scores.chrf:.2f}  {scores.chrf_signature}")
    print(f"{scores.sentences:,} sentences, {scores.tokens_per_second:,.0f} tokens/s, {translator.direction}, {engine}")


def export(
    model: str | None,
    run_dir: Path | None,
    out: Path,
    format: str,
    quantization: str | None,
    stage: str | None,
    *,
    vocabulary_map: bool,
) -> None:
    """`tenko export`: write the artefact for another program and print where."""
    from .models import choose

    chosen = choose(model, run_dir, stage, exported=False)
    if not chosen.is_artefact:
        raise ValueError(f"{chosen.folder}: is exported already; give an artefact")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"--out: {out} exists and is not an empty folder; choose another")
    if format == "ctranslate2" and out.resolve() == Path.cwd():  # it takes the place of a folder
        raise ValueError(f"--out: {out} is the folder that you are in; give another")
    logging.disable(logging.INFO)
    if format == "fairseq":
        for name, given in (("--quantization", quantization), ("--vocabulary-map", vocabulary_map)):
            if given:
                raise ValueError(f"{name}: needs --format ctranslate2")
        from tenko.nmt.export import export_fairseq

        print(export_fairseq(chosen.folder, out))
        return
    from tenko.nmt.ctranslate2_model import export_ctranslate2

    mapped = None
    if vocabulary_map:
        if chosen.recipe is None:
            raise ValueError("--vocabulary-map: needs --run, whose corpus it is estimated from")
        from tenko.nmt.vocabulary_map import vocabulary_map as estimate

        from .stage_tools import corpus_of, hold_subwords

        corpus = corpus_of(chosen.recipe, lambda line: print(line, file=sys.stderr))
        hold_subwords(corpus, chosen.folder)
        mapped = estimate(corpus.split("train"), chosen.recipe.direction, corpus.vocab_size)
    print(export_ctranslate2(chosen.folder, out, quantization=quantization or "int8", vocabulary_map=mapped))


def report(run_dir: Path) -> None:
    """`tenko report`: write the reports anew from what the run directory holds."""
    state = RunDirectory.read(run_dir)
    from .report import write_report

    path = write_report(state)
    results = [(spec, result) for i, spec in enumerate(state.recipe.stages) if (result := state.result(i))]
    print(stage_table(results) if results else f"{run_dir}: no stage is finished yet")
    print(f"\nReport: {path}")
