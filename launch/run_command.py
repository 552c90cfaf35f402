"""`tenko run` on this node: in this process, as workers beside it, or as one of several nodes."""

from __future__ import annotations

import logging
import os
import socket
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import BAD_INPUT, INTERNAL, Halted, NotBegun, RunFailed, Stopped, internal, is_users, one_line
from .mpi_env import check_servers
from .nodes import Nodes
from .recipe import Recipe, load, refuse_repeats, to_dict
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
    from .rendezvous import Meeting

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
    refuse_repeats(overrides)
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
            _say_what_it_began_with(state)
            first = state.first_unfinished()
            if first == len(recipe.stages):
                say(f"{directory}: finished before; nothing to do")
            elif recipe.workers > 1 or restarts:
                say(f"{directory}: {_workers(recipe)}, logs in {directory / LOGS}")
                _run_spawned(state, restarts)
            else:
                _run_here(state, first)
            _print_outcome(state)


def _say_what_it_began_with(state: RunDirectory) -> None:
    from .models import began_with_another

    if now := began_with_another(state):
        say(f"{state.path}: began with another model than {now} holds now; another --run-dir begins with that one")


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
    from .job import versions
    from .rendezvous import Meeting

    with Meeting(nodes) as meeting, ExitStack() as stack:
        try:
            if meeting.is_host:
                lock = stack.enter_context(RunLock(directory))
                state = RunDirectory.create(directory, recipe)
                _say_what_it_began_with(state)
                meeting.tell("run", [lock.holder, to_dict(recipe), versions()])
                count = nodes.least if nodes.least == nodes.most else f"{nodes.least} to {nodes.most}"
                place = f"{count} nodes meet at {nodes.host}:{nodes.port}"
                say(f"{directory}: {place}, {_workers(recipe)} each, logs in {directory / LOGS}")
            else:
                state = _joined(recipe, directory, meeting)
                say(f"{directory}: joins {nodes.host}:{nodes.port}, {_workers(recipe)}")
        except (ValueError, OSError) as error:
            raise meeting.refuse(RunFailed(one_line(error), BAD_INPUT)) from None
        try:
            _run_workers(state, meeting, restarts)
        except NotBegun:
            if not _is_finished(recipe, directory):
                raise
            say(f"{directory}: finished without this node")
            return
        if meeting.is_host:
            _print_outcome(state)
        else:
            say(f"{directory}: finished")


def _joined(recipe: Recipe, directory: Path, meeting: Meeting) -> RunDirectory:
    """The run directory that the host has made, and this node's own recipe held to it.

    Raises:
        ValueError: the directory is another here, or the recipe or the program is.
    """
    from .job import other_program, versions

    told = meeting.ask("run", seconds=60.0)
    if told is None:
        raise meeting.verdict() or ValueError("--rendezvous: the run there has ended before it began")
    holder, theirs, installed = told
    here, there = socket.gethostname(), holder.split()[1]
    difference = first_difference(theirs, to_dict(recipe))
    if difference is not None:
        key, was, now = difference
        raise ValueError(f"{key}: {here} was started with {now}, {there} with {was}; give all nodes the same")
    if other := other_program(installed, versions(), there):
        raise ValueError(f"{here} {other}")
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
