"""Starts the workers of one machine as torchrun does, and turns the ways they can end into one line.

Workers run in sessions of their own: Ctrl-C reaches only this process, which ends them. Should this process be killed,
the kernel ends them (`adopt_parent`). Rank 0 keeps the terminal's stdout for its progress bar; everything else that
workers write goes to files, and what went wrong comes back as JSON.
"""

from __future__ import annotations

import ctypes
import json
import logging
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from .errors import BAD_INPUT, INTERNAL, RunFailed, Terminated

PARENT = "TENKO_PARENT"
"""Environment variable by which a worker knows that it was started here: the parent's process id."""
SHUTDOWN_SECONDS = 5
"""How long workers may take to end before they are killed; they end at once unless stuck in the kernel."""


def run_workers(
    *, workers: int, threads: int, log_dir: Path, args: Sequence[str], module: str = "tenko.launch.worker"
) -> None:
    """Run `python -m module args` in `workers` torchrun processes and wait for them.

    Args:
        workers: processes to start, at least 1.
        threads: OMP_NUM_THREADS of each; 0 divides the cores.
        log_dir: folder for worker-N.log and error-N.json.
        args: arguments of the module.
        module: the worker; when it fails it writes its reason with `write_error`.

    Raises:
        RunFailed: a worker failed or was killed; all have ended.
        KeyboardInterrupt, Terminated: this process got SIGINT, or SIGTERM or SIGHUP; all have ended.
        OSError: the logs cannot be written.
    """
    log_dir.mkdir(parents=True, exist_ok=True)
    _reserve_error_files(log_dir, workers)
    os.environ.update(thread_environment(threads, workers))
    os.environ[PARENT] = str(os.getpid())
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # one machine: no need to resolve its host name
    os.environ["PYTHONUNBUFFERED"] = "1"

    from torch.distributed.elastic.multiprocessing import LogsDest, LogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    class Logs(LogsSpecs):
        """Rank 0's stdout stays the terminal's; the rest goes to worker-N.log."""

        @property
        def root_log_dir(self) -> str:
            return str(log_dir)

        def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
            files = {rank: str(log_dir / f"worker-{rank}.log") for rank in envs}
            return LogsDest(
                stdouts={rank: "" if rank == 0 else str(log_dir / f"worker-{rank}.out") for rank in envs},
                stderrs=files,
                tee_stdouts={},
                tee_stderrs={},
                error_files={rank: str(log_dir / f"torch-error-{rank}.json") for rank in envs},
            )

    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=workers,
        run_id=f"tenko-{os.getpid()}",
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        local_addr="127.0.0.1",
        max_restarts=0,
        monitor_interval=0.1,
        logs_specs=Logs(str(log_dir)),
    )
    if hasattr(config, "shutdown_timeout"):  # torch 2.13 on
        config.shutdown_timeout = SHUTDOWN_SECONDS
    arguments = [argument.replace("$", "$$") for argument in args]  # torchrun fills in ${local_rank}
    with _own_log(log_dir / "torchrun.log"), _restored_signals():
        try:
            elastic_launch(config, sys.executable)("-m", module, *arguments)
        except ChildFailedError as error:
            raise _explain(error.failures, log_dir) from None
        except SignalException as error:
            number = int(error.sigval)
            raise (KeyboardInterrupt if number == signal.SIGINT else Terminated(number)) from None
        finally:
            _show_cursor()
            for file in [*log_dir.glob("*.out"), *log_dir.glob("error-*.json")]:
                if not file.read_bytes().strip():
                    file.unlink()


def thread_environment(threads: int, workers: int) -> dict[str, str]:
    """Variables that give `threads` to a worker; 0 divides the cores this process may use."""
    count = str(threads or max(1, len(os.sched_getaffinity(0)) // workers))
    return {"OMP_NUM_THREADS": count, "NUMBA_NUM_THREADS": count}


def limit_threads(threads: int, workers: int) -> None:
    """`thread_environment` for this process, also when torch is loaded already."""
    os.environ.update(thread_environment(threads, workers))
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


def adopt_parent() -> None:
    """In a worker, first thing: end at once on SIGTERM and SIGINT, and when the starting process ends, however.

    Whatever a run writes is whole or absent, so there is nothing to tidy up; a handler in Python could not run while
    the worker waits inside a collective.
    """
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):  # `Notice.listen` takes TERM later
        signal.signal(number, signal.SIG_DFL)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != int(os.environ[PARENT]):  # it ended before the line above
        os.kill(os.getpid(), signal.SIGKILL)


def write_error(log_dir: Path, rank: int, *, kind: str, message: str) -> None:
    """In a worker: say why it is about to fail.

    Args:
        log_dir: as given to `run_workers`.
        rank: its rank.
        kind: `user` (message is the line to show), `internal`, `peer` (an echo of another worker's end), or `stopped`
            (on notice, and saved).
        message: one line.
    """
    value = {"kind": kind, "message": message[:1000], "time": time.time()}
    with open(log_dir / f"error-{rank}.json", "r+b", buffering=0) as file:
        file.write(json.dumps(value).encode())


def _reserve_error_files(log_dir: Path, workers: int) -> None:
    """Blank files that workers write their reason into: in place, so that it can be told when the disk is full."""
    for rank in range(workers):
        (log_dir / f"error-{rank}.json").write_bytes(b" " * 8192)


def _explain(failures: dict[int, Any], log_dir: Path) -> RunFailed:
    """The cause among the workers' ends: the user's error, else who was killed, else the first internal error."""
    errors = {rank: error for rank in failures if (error := _read_error(log_dir, rank))}

    def first(kind: str) -> int | None:
        ranks = [rank for rank, error in errors.items() if error["kind"] == kind]
        return min(ranks, key=lambda rank: errors[rank]["time"], default=None)

    if (rank := first("user")) is not None:
        return RunFailed(errors[rank]["message"], BAD_INPUT)
    killed = {rank: -failure.exitcode for rank, failure in failures.items() if failure.exitcode < 0}
    hard = [rank for rank, number in killed.items() if number != signal.SIGTERM]
    if not hard and (rank := first("internal")) is not None:
        return RunFailed(errors[rank]["message"], INTERNAL)
    # SIGTERM is also how torchrun ends the others, after the cause: failures are in the order they were seen.
    rank = next(iter(hard or killed), None)
    if rank is not None:
        name = signal.Signals(killed[rank]).name
        why = " (out of memory?)" if killed[rank] == signal.SIGKILL else ""
        return RunFailed(f"worker {rank} (process {failures[rank].pid}) was ended by {name}{why}", BAD_INPUT)
    if (rank := first("peer")) is not None:
        return RunFailed(errors[rank]["message"], INTERNAL)
    rank = next(iter(failures))
    message = f"worker {rank} exited with {failures[rank].exitcode}; see {log_dir / f'worker-{rank}.log'}"
    return RunFailed(message, BAD_INPUT if failures[rank].exitcode == BAD_INPUT else INTERNAL)


def _read_error(log_dir: Path, rank: int) -> dict[str, Any] | None:
    try:
        value = json.loads((log_dir / f"error-{rank}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) and {"kind", "message", "time"} <= value.keys() else None


def last_update(run_dir: Path) -> int | None:
    """The update of the newest checkpoint in a run directory, by the names of the files; None if there is none."""
    found = [re.search(r"update-(\d+)$", str(path)) for path in run_dir.glob("*/checkpoints/update-*")]
    return max((int(match[1]) for match in found if match), default=None)


@contextmanager
def _own_log(path: Path) -> Iterator[None]:
    """Send what torch.distributed logs to a file; torch gives its loggers handlers of their own on stderr."""
    top = logging.getLogger("torch.distributed")
    names = [name for name in logging.Logger.manager.loggerDict if name.startswith(f"{top.name}.")]
    loggers = [top, *(logging.getLogger(name) for name in names)]
    before = [(logger, logger.handlers, logger.propagate) for logger in loggers]
    for logger in loggers:
        logger.handlers, logger.propagate = [], logger is not top
    handler = logging.FileHandler(path, mode="w", encoding="utf-8", delay=True)
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s %(levelname)s: %(message)s"))
    top.addHandler(handler)
    try:
        yield
    finally:
        handler.close()
        for logger, handlers, propagate in before:
            logger.handlers, logger.propagate = handlers, propagate


@contextmanager
def _restored_signals() -> Iterator[None]:
    """Put back the handlers that torchrun replaces."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
    before = {number: signal.getsignal(number) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def raise_on_signals() -> Iterator[None]:
    """Turn SIGTERM and SIGHUP into `Terminated`, as Python turns SIGINT into KeyboardInterrupt."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Terminated(number)

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _show_cursor() -> None:
    """A progress bar cut off in rank 0 leaves the terminal without its cursor."""
    if sys.stdout.isatty():
        sys.stdout.write("\r\x1b[K\x1b[?25h")
        sys.stdout.flush()
