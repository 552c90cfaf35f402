"""One worker: goes through the stages of a run directory.

Started by `tenko run` (`--run-dir DIR`, the recipe is already in it), or by a torchrun of the user's own:

    torchrun --nproc-per-node 2 -m tenko.launch.worker recipes/scratch.yaml --run-dir runs/scratch

or by srun or mpirun (see mpi_env.py).

Rank 0 decides where to go on and tells the others through torchrun's store, before any stage runs: were each to look
for result.json itself, a late one could take for finished what rank 0 has only just done.
"""

from __future__ import annotations

import argparse
import logging
import os
import socket
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import NoReturn

from . import mpi_env
from .errors import (
    BAD_INPUT,
    INTERNAL,
    INTERRUPTED,
    STOPPED,
    Stopped,
    Terminated,
    internal,
    is_lost_peer,
    is_users,
    one_line,
)
from .failures import STOPPED as SAID_STOPPED
from .failures import write_error
from .job import Job
from .peers import PeersWatchdog
from .progress import Reporter, ReporterHandler
from .recipe import load, refuse_repeats
from .report import write_report_or_warn
from .rundir import LOGS, RunDirectory, RunLock, StageContext
from .spawn import PARENT, adopt_parent, end_with_parent, limit_threads, raise_on_signals
from .streams import open_closed
from .world import World

FEW_PRIMITIVES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")
"""oneDNN keeps the code of 1024 shapes of operands, some MB each. Batches of a corpus have more shapes than that, so
most are not met again in time: memory grew from 1.4 to 4 GB, and training was no faster for it."""

Runners = Mapping[str, Callable[[StageContext], None]]

logger = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None, runners: Runners | None = None) -> None:
    """Entry point of `python -m tenko.launch.worker`; ends the process.

    Args:
        argv: arguments; sys.argv when None.
        runners: what runs a stage of each kind; those of `stages.py` when None.
    """
    parser = argparse.ArgumentParser(prog="tenko.launch.worker", description="One worker of a tenko run.")
    parser.add_argument("recipe", nargs="?", help="YAML file or name; none when the run directory has its config.yaml")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings over the recipe's")
    parser.add_argument("--run-dir", type=Path, help="default: runs/NAME")
    open_closed()
    arguments = parser.parse_intermixed_args(argv)
    os.environ.setdefault(*FEW_PRIMITIVES)
    if PARENT in os.environ:
        adopt_parent()
        _spawned(arguments.run_dir, runners)
    else:
        _standalone(arguments, runners)


def _spawned(run_dir: Path, runners: Runners | None) -> NoReturn:
    world = World.detect()
    rank, log_dir = world.rank, run_dir / LOGS
    logging.basicConfig(stream=sys.stderr, format="%(asctime)s %(name)s %(levelname)s: %(message)s")
    code = 0
    try:
        run = RunDirectory.read(run_dir)
        job = Job.join(world, log_dir, listen=True, ends_at_once=os.getppid())
        job.check_agreement(run.recipe)
        first, resume = agree(run, job)
        run_stages(run, job=job, first=first, resume=resume, runners=runners)
        _leave_group()
    except Stopped as error:  # no failure: torchrun shall not start it anew
        write_error(log_dir, rank, kind=SAID_STOPPED, message=str(error))
    except BaseException as error:  # whatever it is, the parent shall say it in one line
        log = log_dir / f"worker-{rank}.log"
        code = BAD_INPUT if is_users(error) else INTERNAL
        kind = "user" if is_users(error) else "peer" if is_lost_peer(error) else "internal"
        message = one_line(error) if kind == "user" else internal(error, log)
        if kind == "peer":
            message = f"worker {rank} lost the connection to another; see {log}"
        write_error(log_dir, rank, kind=kind, message=message)
        with suppress(OSError):  # the disk may be full
            traceback.print_exc()
    _end(code)


def _standalone(arguments: argparse.Namespace, runners: Runners | None) -> NoReturn:
    """Under a torchrun, srun, mpirun or shell of the user's own."""
    code, mpi, log = 0, None, None
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # one line tells why a run ends, not a stack of C++
    try:
        with ExitStack() as stack:
            stack.enter_context(raise_on_signals())
            world = World.detect()
            if arguments.recipe is None and arguments.run_dir is None:
                raise ValueError("give a recipe, or the --run-dir of a run to go on with")
            if arguments.recipe is None:
                recipe = RunDirectory.read(arguments.run_dir).recipe
            else:
                refuse_repeats(arguments.overrides)
                recipe = load(arguments.recipe, arguments.overrides)
            run_dir = arguments.run_dir or Path("runs") / recipe.name
            if mpi_env.is_needed(world, recipe.comm):
                mpi = mpi_env.Mpi.start(world.launcher)
                world = mpi.world
            mpi_env.check_servers(recipe.comm, mpi)
            if world.rank == 0:
                stack.enter_context(RunLock(run_dir))
                run = RunDirectory.create(run_dir, recipe)
                (run_dir / LOGS).mkdir(exist_ok=True)
            else:
                run = RunDirectory(run_dir, recipe)
            logging.basicConfig(stream=sys.stderr, format="%(name)s %(levelname)s: %(message)s")
            limit_threads(recipe.threads, world.local_size)
            (run_dir / LOGS).mkdir(parents=True, exist_ok=True)
            if mpi is not None:
                log = run_dir / LOGS / f"worker-{world.rank}.log"
            # TERM from torchrun or mpirun follows another worker's end; from SLURM's daemon it is the notice.
            ends_at_once = None if world.launcher == "srun" else os.getppid()
            listen = world.launcher != "alone"
            if world.launcher == "torchrun":
                end_with_parent()  # torchrun killed leaves its workers behind
            job = Job.join(world, run_dir / LOGS, mpi=mpi, listen=listen, ends_at_once=ends_at_once)
            if listen:
                stack.enter_context(PeersWatchdog(job, run_dir / LOGS, recipe.hang_timeout))
            job.check_agreement(recipe)
            first, resume = agree(run, job)
            run_stages(run, job=job, first=first, resume=resume, runners=runners)
            _leave_group()
    except Stopped as error:
        # torchrun would start anew what it takes for a failure, and says 1 whatever its workers say.
        code = 0 if world.launcher == "torchrun" else STOPPED
        if world.rank == 0:
            print(f"tenko: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        code = INTERRUPTED
    except Terminated as error:
        code = error.code
    except Exception as error:
        code = BAD_INPUT if is_users(error) else INTERNAL
        mpi_env.wait_to_be_heard(echo=is_lost_peer(error))
        if is_users(error):
            print(f"tenko: error: {one_line(error)}", file=sys.stderr)
        elif log is not None:
            with suppress(OSError):
                log.write_text(traceback.format_exc(), encoding="utf-8")
            where = f"rank {world.rank} ({socket.gethostname()})"
            print(f"tenko: error: {where}: {internal(error, log)}", file=sys.stderr)
        else:
            traceback.print_exc()
    _end(code, mpi)


def agree(run: RunDirectory, job: Job) -> tuple[int, bool]:
    """The first stage to run and whether it goes on from checkpoints, as rank 0 sees it, on every rank."""
    decision = run.first_unfinished(), False
    if decision[0] < len(run.recipe.stages):
        decision = decision[0], run.is_begun(decision[0])
    first, resume = job.from_rank0("first_stage", decision)
    return first, resume


def run_stages(run: RunDirectory, *, job: Job, first: int, resume: bool, runners: Runners | None = None) -> None:
    """Run the stages from index `first`, in this process; what every rank does.

    Args:
        run: the run directory; rank 0's caller holds its lock.
        job: this process; only rank 0 writes and speaks.
        first: as `agree` says.
        resume: as `agree` says; holds for the first stage only.
        runners: as in `main`.
    """
    logging.captureWarnings(True)
    rank = job.world.rank
    # mpirun gives rank 0 a terminal of its own, wherever the output goes: no bar there.
    reporter = Reporter(enabled=rank == 0, terminal=None if job.mpi is None else False)
    handler = ReporterHandler(reporter)
    package = logging.getLogger("tenko")
    if rank == 0:
        package.addHandler(handler)
        package.setLevel(logging.INFO)
        package.propagate = False
    if runners is None:
        from .stages import RUNNERS

        runners = RUNNERS
    try:
        with reporter:
            if line := job.describe():
                reporter.log(line)
            for index, spec in enumerate(run.recipe.stages):
                title = f"stage {index + 1}/{len(run.recipe.stages)} {spec.name}"
                if index < first:
                    reporter.log(f"{title}: finished before, left alone")
                    continue
                going_on = resume and index == first
                reporter.log(f"{title}: goes on" if going_on else title)
                runners[spec.kind](run.context(index, reporter, writer=rank == 0, resume=going_on, job=job))
                reporter.finish()
                if rank == 0:
                    assert run.is_finished(index), f"{spec.kind} returned without a result.json"
                    write_report_or_warn(run)
    finally:
        package.removeHandler(handler)


def _leave_group() -> None:
    if "torch" in sys.modules:
        import torch.distributed as dist

        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()


def _end(code: int, mpi: mpi_env.Mpi | None = None) -> NoReturn:
    """Leave at once: on the way out of a failed run the interpreter would wait for threads inside collectives."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            code = code or BAD_INPUT
    logging.shutdown()
    if mpi is not None:
        mpi.leave(code, clean=code in (0, STOPPED))
    os._exit(code)


if __name__ == "__main__":
    main()
