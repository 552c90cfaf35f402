"""What the commands of `cli.py` do. They raise; `cli.main` turns that into a line and an exit code."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from tenko.nmt.config import DecodeConfig

from .errors import BAD_INPUT, INTERNAL, Halted, NotBegun, RunFailed, Stopped, internal, is_users, one_line
from .mpi_env import check_servers
from .nodes import Nodes
from .recipe import Recipe, decode_config, load, to_dict
from .rundir import LOGS, REPORT, RunDirectory, RunLock, first_difference, is_shared
from .spawn import (
    last_update,
    limit_threads,
    notices_here,
    prepare_environment,
    raise_on_signals,
    run_workers,
    show_stacks_on_request,
)
from .streams import say
from .summary import samples_lines, stage_table
from .world import World

if TYPE_CHECKING:
    from tenko.nmt.engines import Engine

    from .models import Chosen
    from .rendezvous import Meeting

CHUNK = 1 << 16
"""Bytes of stdin translated at once at most; what a terminal or a slow pipe has ready is translated at once."""
RESTARTS = 3
"""How often workers that failed are started anew on several nodes, as torchrun does; on one node a run ends, and the
same command goes on."""
ONE_NODE = Nodes()


def run(
    recipe_path: str,
    overrides: list[str],
    run_dir: Path | None,
    nodes: Nodes = ONE_NODE,
    *,
    max_restarts: int | None = None,
) -> None:
    """`tenko run`: make or go on with a run, then print what came out.

    Args:
        recipe_path, overrides: as `recipe.load` takes them.
        run_dir: the run directory; of the recipe's name when None.
        nodes: the nodes of the run; the same command runs on each.
        max_restarts: how often workers that failed are started anew; None: 3 on several nodes, else never.

    Raises:
        ValueError, OSError: the user's errors, in one line.
        RunFailed: a worker failed; the message says from where the same command goes on.
        KeyboardInterrupt, Terminated: ended by a signal; workers are gone.
    """
    recipe = load(recipe_path, overrides)
    directory = run_dir or Path("runs") / recipe.name
    world = World.detect()
    if not nodes.several and max_restarts is None and (world.size > 1 or world.launcher == "mpirun"):
        from .worker import main  # inside a torchrun, srun or mpirun: a worker

        main([recipe_path, *overrides, "--run-dir", str(directory)])
    check_servers(recipe.comm, None)
    restarts = max_restarts if max_restarts is not None else RESTARTS if nodes.several else 0
    with raise_on_signals():
        if nodes.several:
            _run_on_nodes(recipe, directory, nodes, restarts)
            return
        with RunLock(directory):
            state = RunDirectory.create(directory, recipe)
            first = state.first_unfinished()
            if first == len(recipe.stages):
                say(f"{directory}: finished before; nothing to do")
            elif recipe.workers > 1 or restarts:
                say(f"{directory}: {_workers(recipe)}, logs in {directory / LOGS}")
                _run_spawned(state, restarts)
            else:
                _run_here(state, first)
            _print_outcome(state)


def _workers(recipe: Recipe) -> str:
    return "1 worker" if recipe.workers == 1 else f"{recipe.workers} workers"


def _run_spawned(state: RunDirectory, restarts: int) -> None:
    prepare_environment(ONE_NODE, workers=state.recipe.workers, threads=state.recipe.threads)
    from .rendezvous import Meeting

    with Meeting(ONE_NODE) as meeting:
        _run_workers(state, meeting, restarts)


def _run_workers(state: RunDirectory, meeting: Meeting, restarts: int) -> None:
    directory = state.path
    try:
        run_workers(
            meeting=meeting,
            workers=state.recipe.workers,
            log_dir=directory / LOGS,
            args=["--run-dir", str(directory)],
            max_restarts=restarts,
            hang_timeout=state.recipe.hang_timeout,
            say=lambda line: say(f"tenko: {line}"),
        )
    except (Halted, NotBegun):
        raise
    except RunFailed as error:
        raise RunFailed(f"{error}; {going_on(directory)}", error.code) from None


def _run_on_nodes(recipe: Recipe, directory: Path, nodes: Nodes, restarts: int) -> None:
    """This node's part of a run; the node where they meet holds the run directory's lock, and makes it."""
    if _is_finished(recipe, directory):
        say(f"{directory}: finished before; nothing to do")
        return
    prepare_environment(nodes, workers=recipe.workers, threads=recipe.threads)
    from .rendezvous import Meeting

    with Meeting(nodes) as meeting, ExitStack() as stack:
        try:
            if meeting.is_host:
                lock = stack.enter_context(RunLock(directory))
                state = RunDirectory.create(directory, recipe)
                meeting.tell("run", [lock.holder, to_dict(recipe)])
                count = nodes.least if nodes.least == nodes.most else f"{nodes.least} to {nodes.most}"
                place = f"{count} nodes meet at {nodes.host}:{nodes.port}"
                say(f"{directory}: {place}, {_workers(recipe)} each, logs in {directory / LOGS}")
            else:
                state = _joined(recipe, directory, meeting)
                say(f"{directory}: joins {nodes.host}:{nodes.port}, {_workers(recipe)}")
        except (ValueError, OSError) as error:
            raise meeting.refuse(RunFailed(one_line(error), BAD_INPUT)) from None
        _run_workers(state, meeting, restarts)
        if meeting.is_host:
            _print_outcome(state)
        else:
            say(f"{directory}: finished")


def _joined(recipe: Recipe, directory: Path, meeting: Meeting) -> RunDirectory:
    """The run directory that the host has made, and this node's own recipe held to it.

    Raises:
        ValueError: the directory is another here, or the recipe is.
    """
    told = meeting.ask("run", seconds=60.0)
    if told is None:
        raise meeting.verdict() or ValueError("--rendezvous: the run there has ended before it began")
    holder, theirs = told
    here, there = socket.gethostname(), holder.split()[1]
    difference = first_difference(theirs, to_dict(recipe))
    if difference is not None:
        key, was, now = difference
        raise ValueError(f"{key}: {here} was started with {now}, {there} with {was}; give all nodes the same")
    if not is_shared(directory, holder):
        raise ValueError(
            f"{directory}: is not the same folder on {here} as on {there}; give --run-dir a folder on a file system "
            "that all nodes share"
        )
    return RunDirectory.read(directory)


def _is_finished(recipe: Recipe, directory: Path) -> bool:
    """Whether a run of this recipe is complete already."""
    try:
        state = RunDirectory.read(directory)
    except ValueError:
        return False
    same = first_difference(to_dict(state.recipe), to_dict(recipe)) is None
    return same and RunDirectory(directory, recipe).first_unfinished() == len(recipe.stages)


def _run_here(state: RunDirectory, first: int) -> None:
    """One worker: in this process. What it logs goes to a file, as workers' logs do."""
    limit_threads(state.recipe.threads, 1)
    from . import pulse, worker
    from .job import Job

    log_dir = state.path / LOGS
    log_dir.mkdir(exist_ok=True)
    log = log_dir / "worker-0.log"
    logging.basicConfig(filename=log, filemode="w", format="%(asctime)s %(name)s %(levelname)s: %(message)s")
    job = Job(pulse=pulse.Pulse(pulse.path_of(log_dir, 0)))
    show_stacks_on_request()
    try:
        with notices_here(job.notice, training=lambda: job.pulse.training):
            worker.run_stages(state, job=job, first=first, resume=state.is_begun(first))
    except Stopped as error:
        raise Halted(str(error), job.notice.code) from None
    except Halted:
        raise
    except Exception as error:
        logging.getLogger().error("the run failed", exc_info=True)
        if is_users(error):
            raise
        if os.environ.get("TENKO_DEBUG", "0") not in ("", "0"):
            raise
        raise RunFailed(internal(error, log), INTERNAL) from error


def going_on(directory: Path) -> str:
    """How to go on with a run that ended early."""
    update = last_update(directory)
    if update is None:
        return "nothing of this stage or round was saved yet"
    return f"the same command goes on from update {update}"


def _print_outcome(state: RunDirectory) -> None:
    results = [(spec, result) for i, spec in enumerate(state.recipe.stages) if (result := state.result(i))]
    say(f"\n{stage_table(results)}")
    lines = samples_lines(results[-1][1] if results else {}, 3)
    if lines:
        say("\n".join(["\nUnseen sentences (source, reference, translation):", *lines]))
    say(f"\nReport: {state.path / REPORT}")


def _decode(recipe: Recipe | None, beam: int | None) -> DecodeConfig:
    """Beam search as the recipe trains with, `beam` over it."""
    base = decode_config(recipe) if recipe else DecodeConfig()
    return base if beam is None else dataclasses.replace(base, beam=beam)


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
    threads: int | None,
    engine: str | None,
    device: str,
) -> None:
    """`tenko translate`: stdin to stdout, a chunk of lines at a time."""
    from .models import choose

    chosen = choose(model, run_dir, stage)
    translator = _engine(chosen, engine, threads, device)
    decode, read, cut = _decode(chosen.recipe, beam), 0, list[int]()
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
    number, rest, read = 0, b"", getattr(stream, "read1", stream.read)
    while True:
        block = read(CHUNK)
        *complete, rest = (rest + block).split(b"\n")
        if not block and rest:
            complete, rest = [rest], b""
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
    # An artefact's figure is that of its own weights, unless another program is asked for.
    engine = engine or ("fairseq" if chosen.is_artefact else "ctranslate2")
    translator = _engine(chosen, engine, threads, device)
    from tenko.nmt.evaluate import evaluate as score

    from .progress import Reporter

    english, czech = [list(side) for side in zip(*(pairs[number - 1] for number in numbers), strict=True)]
    sources, references = (english, czech) if translator.direction == "en-cs" else (czech, english)
    decode = _decode(chosen.recipe, beam)
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
