"""Starts the workers of this node as torchrun does, and turns the ways they can end into one line.

Workers run in sessions of their own: Ctrl-C reaches only this process, which ends them. Should this process be killed,
the kernel ends them (`adopt_parent`). Rank 0 keeps the terminal's stdout for its progress bar; everything else that
workers write goes to files, and what went wrong comes back as JSON. A notice to stop (USR1, TERM) is passed on to them.
"""

from __future__ import annotations

import ctypes
import faulthandler
import logging
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from .errors import BAD_INPUT, STOPPED, Halted, NotBegun, RunFailed, Terminated
from .failures import STOPPED as SAID_STOPPED
from .failures import read_all, reserve, tidy
from .nodes import Nodes
from .notice import SIGNALS, Notice
from .rundir import CHECKPOINTS, RESULT
from .watchdog import DUMP, Crew, Watchdog

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing import LogsSpecs

    from .agent import Agent
    from .rendezvous import Meeting

PARENT = "TENKO_PARENT"
"""Environment variable by which a worker knows that it was started here: the parent's process id."""
NOTHING_TO_SAVE = "stopped on notice outside of a training; the same command goes on"
KEPT_LOGS = 10
"""Logs of earlier starts that are kept of each worker."""


def prepare_environment(nodes: Nodes, *, workers: int, threads: int) -> None:
    """Set what workers, and torch in this process, find in the environment. Before torch is imported."""
    os.environ.update(thread_environment(threads, workers))
    os.environ[PARENT] = str(os.getpid())
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    os.environ["PYTHONUNBUFFERED"] = "1"
    os.environ["TENKO_JOIN_SECONDS"] = f"{nodes.join_seconds:g}"
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "TP_SOCKET_IFNAME"):
        if nodes.several:
            os.environ[name] = nodes.interface
        elif name.startswith("GLOO"):
            os.environ.setdefault(name, nodes.interface)  # one machine: no need to resolve its host name


def run_workers(
    *,
    meeting: Meeting,
    workers: int,
    log_dir: Path,
    args: Sequence[str],
    module: str = "tenko.launch.worker",
    max_restarts: int = 0,
    hang_timeout: float = 0.0,
    say: Callable[[str], None] = print,
) -> None:
    """Run `python -m module args` in `workers` processes of this node and wait for those of all nodes.

    Args:
        meeting: of this run's agents; `prepare_environment` was called before.
        workers: processes to start, at least 1.
        log_dir: folder for worker-N.log, error-N.json and pulse-N, shared by the nodes.
        args: arguments of the module.
        module: the worker; when it fails it writes its reason with `write_error`.
        max_restarts: how often workers that failed are started anew.
        hang_timeout: seconds after which a worker counts as hung; 0 never.
        say: takes lines for the user while the run goes on.

    Raises:
        RunFailed: a worker failed or was killed, or the other nodes are gone; all of this node's have ended.
        Stopped: on notice, and saved.
        KeyboardInterrupt, Terminated: this process got SIGINT, or a second SIGTERM, or SIGHUP; all have ended.
        OSError: the logs cannot be written.
    """
    log_dir.mkdir(parents=True, exist_ok=True)
    from torch.distributed.elastic.agent.server.api import WorkerSpec
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.rendezvous import (
        RendezvousClosedError,
        RendezvousConnectionError,
        RendezvousTimeoutError,
    )

    from .agent import Agent
    from .rendezvous import Rendezvous

    crew, handler = Crew(), Rendezvous(meeting)
    spec = WorkerSpec(
        role="worker",
        local_world_size=workers,
        entrypoint=sys.executable,
        args=("-m", module, *(argument.replace("$", "$$") for argument in args)),  # torch fills in ${local_rank}
        rdzv_handler=handler,
        max_restarts=max_restarts,
        monitor_interval=0.1,
        local_addr=meeting.nodes.address,
    )
    name = f"torchrun-{meeting.nodes.address}.log" if meeting.nodes.several else "torchrun.log"
    with (
        _own_log(log_dir / name),
        _restored_signals(),
        _notices_passed_on(crew),
        Watchdog(crew, log_dir, hang_timeout, several=meeting.nodes.several),
    ):
        agent = Agent(spec, _logs_specs(log_dir), meeting=meeting, crew=crew, log_dir=log_dir, say=say)
        try:
            result = agent.run()
            if result is None or result.is_failed():
                raise agent.cause()
        except SignalException as error:
            number = int(error.sigval)
            raise (KeyboardInterrupt if number == signal.SIGINT else Terminated(number)) from None
        except (RunFailed, RendezvousClosedError, RendezvousTimeoutError, RendezvousConnectionError) as error:
            raise _explained(error, agent, meeting, crew) from None
        finally:
            handler.leave()
            _show_cursor()
            tidy(log_dir)
        stopped = [failure for failure in read_all(log_dir, handler.round) if failure.kind == SAID_STOPPED]
    if stopped:
        raise Halted(stopped[0].message, crew.code)


def _explained(error: Exception, agent: Agent, meeting: Meeting, crew: Crew) -> RunFailed:
    """The run's end as one line, the same on all nodes as far as they hear of one another."""
    from torch.distributed.elastic.rendezvous import RendezvousConnectionError, RendezvousTimeoutError

    nodes, place = meeting.nodes, f"{meeting.nodes.host}:{meeting.port}"
    verdict = meeting.verdict()
    if agent.rendezvous.round < 0:
        if verdict is None and crew.stopping is not None:
            return Halted(NOTHING_TO_SAVE, crew.code)
        if verdict is None and isinstance(error, RendezvousTimeoutError):
            if agent.rendezvous.goes_on_without_us():
                apart = f"the run at {place} has begun, and this node could not join within {nodes.join_seconds:g} s"
                return NotBegun(f"--rendezvous: {apart}", BAD_INPUT)
            there = agent.rendezvous.nodes_present()
            ending = f"{there} of {nodes.least} nodes came to {place} within {nodes.join_seconds:g} s"
            verdict = meeting.fail(RunFailed(f"--rendezvous: {ending}", BAD_INPUT))
        if verdict is None:
            verdict = RunFailed(f"--rendezvous: the run at {place} has ended meanwhile", BAD_INPUT)
        return NotBegun(str(verdict), verdict.code)
    if verdict is not None:
        return verdict
    if crew.stopping is not None:
        return Halted(NOTHING_TO_SAVE, crew.code)
    if isinstance(error, RunFailed):
        return meeting.fail(error)
    cause = agent.cause(patience=0.0)
    if isinstance(error, RendezvousTimeoutError):
        there = agent.rendezvous.nodes_present()
        return meeting.fail(RunFailed(f"{cause}; {there} of the {nodes.least} nodes it needs are left", cause.code))
    if isinstance(error, RendezvousConnectionError):
        here = f"{nodes.address} is cut off from {place}, or the run there is gone"
        return RunFailed(here, STOPPED)  # nobody's mistake
    return cause


def _logs_specs(log_dir: Path) -> LogsSpecs:
    from torch.distributed.elastic.multiprocessing import LogsDest, LogsSpecs

    class Logs(LogsSpecs):
        """Rank 0's stdout stays the terminal's; the rest goes to worker-N.log, a new one each start."""

        @property
        def root_log_dir(self) -> str:
            return str(log_dir)

        def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
            ranks = {local: int(env["RANK"]) for local, env in envs.items()}
            for rank in ranks.values():
                _put_aside(log_dir, rank)
                reserve(log_dir, rank)
            return LogsDest(
                stdouts={local: str(log_dir / f"worker-{rank}.out") if rank else "" for local, rank in ranks.items()},
                stderrs={local: str(log_dir / f"worker-{rank}.log") for local, rank in ranks.items()},
                tee_stdouts={},
                tee_stderrs={},
                error_files={local: str(log_dir / f"torch-error-{rank}.json") for local, rank in ranks.items()},
            )

    return Logs(str(log_dir))


def _put_aside(log_dir: Path, rank: int) -> None:
    """Keep what a worker logged before: as earlier/worker-RANK.1.log and on, the newest last."""
    log, earlier = log_dir / f"worker-{rank}.log", log_dir / "earlier"
    (log_dir / f"pulse-{rank}").unlink(missing_ok=True)
    if not log.exists() or not log.stat().st_size:
        return
    earlier.mkdir(exist_ok=True)
    numbers = sorted(int(path.suffixes[-2][1:]) for path in earlier.glob(f"worker-{rank}.*.log"))
    log.rename(earlier / f"worker-{rank}.{numbers[-1] + 1 if numbers else 1}.log")
    for number in numbers[: len(numbers) + 1 - KEPT_LOGS]:
        (earlier / f"worker-{rank}.{number}.log").unlink(missing_ok=True)


@contextmanager
def _notices_passed_on(crew: Crew) -> Iterator[None]:
    """Pass USR1 and TERM on to the workers as USR1: they save and leave. A second TERM ends this process, as does a
    notice while no worker runs."""

    def notice(number: int, frame: FrameType | None) -> None:
        first, pids = crew.stopping is None, crew.pids
        again = crew.stopping == signal.SIGTERM and number == signal.SIGTERM
        crew.stopping = signal.SIGTERM if number == signal.SIGTERM else crew.stopping or signal.SIGUSR1
        if again or (not pids and number == signal.SIGTERM):
            raise Terminated(number)
        if not pids:
            raise Halted(NOTHING_TO_SAVE, crew.code)
        for pid in pids.values() if first else ():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGUSR1)

    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "SIGINT,SIGHUP,SIGQUIT"
    with _handled(notice):
        yield


@contextmanager
def notices_here(notice: Notice, training: Callable[[], bool]) -> Iterator[None]:
    """The same for a worker in this process: the first notice in a training is noted, others end the process."""

    def note(number: int, frame: FrameType | None) -> None:
        again = notice.signal == signal.SIGTERM and number == signal.SIGTERM
        if again or (number == signal.SIGTERM and not training()):
            raise Terminated(number)
        if not training():
            raise Halted(NOTHING_TO_SAVE, STOPPED)
        notice.signal = signal.SIGTERM if number == signal.SIGTERM else notice.signal or signal.SIGUSR1

    with _handled(note):
        yield


@contextmanager
def _handled(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in SIGNALS}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


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
    end_with_parent()
    if os.getppid() != int(os.environ[PARENT]):  # it ended before the line above
        os.kill(os.getpid(), signal.SIGKILL)
    show_stacks_on_request()


def end_with_parent() -> None:
    """Let the kernel end this process when the one that started it ends, however."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def show_stacks_on_request() -> None:
    """Let the watchdog's signal, or `kill -USR2 PID`, write the stacks of this process to its stderr."""
    faulthandler.register(DUMP, all_threads=True)


def last_update(run_dir: Path) -> int | None:
    """The update that a run goes on from, by the names of its files; None if the training it is in has saved nothing.

    That is the last round or group of the first stage without a result; of a finished run the last stage that trained.
    """

    def number(folder: Path) -> int:
        match = re.search(r"\d+", folder.name)
        return int(match[0]) if match else 0

    def updates(training: Path) -> list[int]:
        found = (re.fullmatch(r"update-(\d+)", path.name) for path in training.glob(f"{CHECKPOINTS}/*"))
        return [int(match[1]) for match in found if match]

    stages = sorted(run_dir.glob("[0-9]*-*"), key=number)
    unfinished = [stage for stage in stages if not (stage / RESULT).is_file()][:1]
    trainings = [
        max([*stage.glob("round-*"), *stage.glob("group-*")], key=number, default=stage)
        for stage in unfinished or reversed(stages)
    ]
    return next((max(found) for training in trainings if (found := updates(training))), None)


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
    """Turn SIGTERM and SIGHUP into `Terminated`, as Python turns SIGINT into KeyboardInterrupt; USR1 into `Halted`."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Halted(NOTHING_TO_SAVE, STOPPED) if number == signal.SIGUSR1 else Terminated(number)

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)}
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
