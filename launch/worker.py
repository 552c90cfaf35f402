"""One worker: goes through the stages of a run directory.

Started by `tenko run` (`--run-dir DIR`, the recipe is already in it), or by a torchrun of the user's own:

    torchrun --nproc-per-node 2 -m tenko.launch.worker recipes/scratch.yaml --run-dir runs/scratch

Rank 0 decides where to go on and tells the others through torchrun's store, before any stage runs: were each to look
for result.json itself, a late one could take for finished what rank 0 has only just done.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import NoReturn

from .errors import BAD_INPUT, INTERNAL, INTERRUPTED, Terminated, internal, is_lost_peer, is_users, one_line
from .progress import Reporter, ReporterHandler
from .recipe import load
from .rundir import LOGS, REPORT, RunDirectory, RunLock, StageContext
from .spawn import PARENT, adopt_parent, limit_threads, raise_on_signals, write_error

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
    arguments = parser.parse_intermixed_args(argv)
    if PARENT in os.environ:
        adopt_parent()
        _spawned(arguments.run_dir, runners)
    else:
        _standalone(arguments, runners)


def _spawned(run_dir: Path, runners: Runners | None) -> NoReturn:
    rank = int(os.environ["RANK"])
    log_dir = run_dir / LOGS
    logging.basicConfig(stream=sys.stderr, format="%(asctime)s %(name)s %(levelname)s: %(message)s")
    code = 0
    try:
        run = RunDirectory.read(run_dir)
        first, resume = agree(run, rank)
        run_stages(run, rank=rank, first=first, resume=resume, runners=runners)
        _leave_group()
    except BaseException as error:  # whatever it is, the parent shall say it in one line
        log = log_dir / f"worker-{rank}.log"
        code = BAD_INPUT if is_users(error) else INTERNAL
        kind = "user" if is_users(error) else "peer" if is_lost_peer(error) else "internal"
        write_error(log_dir, rank, kind=kind, message=one_line(error) if kind == "user" else internal(error, log))
        with suppress(OSError):  # the disk may be full
            traceback.print_exc()
    _end(code)


def _standalone(arguments: argparse.Namespace, runners: Runners | None) -> NoReturn:
    """Under a torchrun, srun or shell of the user's own."""
    rank = int(os.environ.get("RANK", 0))
    code = 0
    try:
        with ExitStack() as stack:
            stack.enter_context(raise_on_signals())
            if arguments.recipe is None and arguments.run_dir is None:
                raise ValueError("give a recipe, or the --run-dir of a run to go on with")
            if arguments.recipe is None:
                recipe = RunDirectory.read(arguments.run_dir).recipe
            else:
                recipe = load(arguments.recipe, arguments.overrides)
            run_dir = arguments.run_dir or Path("runs") / recipe.name
            if rank == 0:
                stack.enter_context(RunLock(run_dir))
                run = RunDirectory.create(run_dir, recipe)
            else:
                run = RunDirectory(run_dir, recipe)
            logging.basicConfig(stream=sys.stderr, format="%(name)s %(levelname)s: %(message)s")
            local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
            limit_threads(recipe.threads, local)
            first, resume = agree(run, rank)
            run_stages(run, rank=rank, first=first, resume=resume, runners=runners)
            _leave_group()
    except KeyboardInterrupt:
        code = INTERRUPTED
    except Terminated as error:
        code = error.code
    except Exception as error:
        if is_users(error):
            code = BAD_INPUT
            print(f"tenko: error: {one_line(error)}", file=sys.stderr)
        else:
            code = INTERNAL
            traceback.print_exc()
    _end(code)


def agree(run: RunDirectory, rank: int) -> tuple[int, bool]:
    """The first stage to run and whether it goes on from checkpoints, as rank 0 sees it, on every rank."""
    decision = run.first_unfinished(), False
    if decision[0] < len(run.recipe.stages):
        decision = decision[0], run.is_begun(decision[0])
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or os.environ.get("WORLD_SIZE") == "1":
        return decision

    from torch.distributed import PrefixStore, TCPStore

    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = PrefixStore(f"tenko/{attempt}", TCPStore(host, port, is_master=False))
    if rank == 0:
        store.set("first_stage", json.dumps(decision))
        return decision
    first, resume = json.loads(store.get("first_stage"))
    return first, resume


def run_stages(run: RunDirectory, *, rank: int, first: int, resume: bool, runners: Runners | None = None) -> None:
    """Run the stages from index `first`, in this process; what every rank does.

    Args:
        run: the run directory; rank 0's caller holds its lock.
        rank: only rank 0 writes and speaks.
        first: as `agree` says.
        resume: as `agree` says; holds for the first stage only.
        runners: as in `main`.
    """
    logging.captureWarnings(True)
    reporter = Reporter(enabled=rank == 0)
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
            for index, spec in enumerate(run.recipe.stages):
                title = f"stage {index + 1}/{len(run.recipe.stages)} {spec.name}"
                if index < first:
                    reporter.log(f"{title}: finished before, left alone")
                    continue
                going_on = resume and index == first
                reporter.log(f"{title}: goes on" if going_on else title)
                runners[spec.kind](run.context(index, reporter, writer=rank == 0, resume=going_on))
                reporter.finish()
                if rank == 0:
                    assert run.is_finished(index), f"{spec.kind} returned without a result.json"
                    write_reports(run)
    finally:
        package.removeHandler(handler)


def write_reports(run: RunDirectory) -> None:
    """Write report.html of the run and of each stage that has begun; a report that fails never fails the run."""
    try:
        from .report import write_report

        write_report(run)
    except OSError:
        raise  # a full disk will fail the next stage as well: say so now
    except Exception as error:
        logger.warning("could not write %s: %s: %s", run.path / REPORT, type(error).__name__, one_line(error))


def _leave_group() -> None:
    if "torch" in sys.modules:
        import torch.distributed as dist

        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()


def _end(code: int) -> NoReturn:
    """Leave at once: on the way out of a failed run the interpreter would wait for threads inside collectives."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            code = code or BAD_INPUT
    logging.shutdown()
    os._exit(code)


if __name__ == "__main__":
    main()
