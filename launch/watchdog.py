"""Finds workers that hang: no progress inside an update or a validation for `hang_timeout` seconds, by their pulses.

The stacks of all of this node's workers go to their logs, the culprit is named and killed; what follows is as for any
worker that ends. All workers stand still when one does, and all of them have shown as many signs of life as it: the
culprit is the one that does not wait for the others.
"""

from __future__ import annotations

import logging
import os
import re
import signal
import threading
import time
from pathlib import Path

from . import pulse
from .errors import STOPPED
from .failures import write_error

logger = logging.getLogger(__name__)

DUMP = signal.SIGUSR2
"""A worker that gets it writes the stacks of all its threads to its log (faulthandler, from C: whatever it does)."""
GRACE_SECONDS = 10.0
"""How much later a node acts whose workers all wait: the culprit is another's, and its end frees them."""
_DUMP_SECONDS = 1.0
_WAITS = re.compile(r"/torch/distributed/|/torch/autograd/|[/.]comm/|_engine_run_backward")
_STATES = {"T": "stopped by a signal", "t": "stopped by a debugger", "D": "in the kernel, which does not answer"}


class Crew:
    """The workers that this process runs now, for its threads and signal handlers."""

    def __init__(self) -> None:
        self.pids: dict[int, int] = {}
        """Their process ids, by rank."""
        self.stopping: signal.Signals | None = None
        """The notice to stop that was passed on to them."""

    @property
    def code(self) -> int:
        """The exit code of a run that was stopped on notice."""
        return 128 + signal.SIGTERM if self.stopping == signal.SIGTERM else STOPPED

    def start(self, pids: dict[int, int]) -> None:
        """They run."""
        self.pids = pids

    def end(self) -> None:
        """They have ended, or are being ended."""
        self.pids = {}


class Watchdog:
    """Watches a crew from a thread; a context manager.

    Args:
        crew: whom.
        log_dir: the run's folder of logs, with pulses.
        hang_timeout: seconds; 0 watches nothing.
        several: whether other nodes run, whose worker may be the culprit.
    """

    def __init__(self, crew: Crew, log_dir: Path, hang_timeout: float, *, several: bool) -> None:
        self._crew, self._log_dir, self._several = crew, log_dir, several
        self._timeout = hang_timeout
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="tenko watchdog", daemon=True)
        self._seen: dict[int, tuple[int, int, float]] = {}

    def __enter__(self) -> Watchdog:
        if self._timeout > 0:
            self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        if self._timeout > 0:
            self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(min(1.0, self._timeout / 10)):
            try:
                self._look()
            except Exception:  # a watchdog that fails must not end what it watches
                logger.exception("the watchdog failed")

    def _look(self) -> None:
        pids, watched = self._crew.pids, False
        moved: list[float] = []
        for rank, pid in pids.items():
            beat = pulse.read(pulse.path_of(self._log_dir, rank))
            if beat is None or beat.pid != pid:
                continue
            if self._seen.get(rank, (0, 0, 0.0))[:2] != (pid, beat.beats):
                self._seen[rank] = (pid, beat.beats, time.monotonic())
            moved.append(self._seen[rank][2])
            watched = watched or beat.phase in pulse.WATCHED
        still = time.monotonic() - max(moved, default=time.monotonic())
        # In a validation one may translate for long while the others wait for it: only when all stand still one hangs.
        if watched and still > self._timeout and not self._others_move():
            self._act(pids, still)

    def _others_move(self) -> bool:
        """Whether a worker of another node has shown a sign of life, by the clock of its machine."""
        beats = pulse.read_all(self._log_dir) if self._several else []
        return any(time.time() - beat.time < self._timeout for beat in beats if beat.rank not in self._crew.pids)

    def _act(self, pids: dict[int, int], seconds: float) -> None:
        waits = self._dump(pids)
        culprits = [rank for rank in pids if not waits[rank]]
        if not culprits and self._several:  # what hangs on another node may be ended there meanwhile
            before = {rank: self._beats(rank) for rank in pids}
            self._over.wait(GRACE_SECONDS)
            if before != {rank: self._beats(rank) for rank in pids}:
                return
        rank = min(culprits or pids, key=lambda rank: (self._beats(rank), rank))
        pid = pids[rank]
        if self._crew.pids is not pids or self._over.is_set():
            return
        beat = pulse.read(pulse.path_of(self._log_dir, rank))
        doing = _STATES.get(_state(pid), "" if culprits else "it waits for others, as all do here")
        where = "at the start"
        if beat is not None:
            where = f"in update {beat.update + 1}" if beat.phase == pulse.UPDATE else f"after update {beat.update}"
        message = f"worker {rank} (process {pid}) hangs {where}, no progress for {seconds:.0f} s"
        message += f" ({doing})" if doing else ""
        kind = "hung" if culprits else "waits"
        self._report(rank, kind, f"{message}; stacks in {self._log_dir}/worker-*.log")
        os.kill(pid, signal.SIGKILL)
        self._over.wait(5.0)

    def _report(self, rank: int, kind: str, message: str) -> None:
        write_error(self._log_dir, rank, kind=kind, message=message)

    def _beats(self, rank: int) -> int:
        beat = pulse.read(pulse.path_of(self._log_dir, rank))
        return 0 if beat is None else beat.beats

    def _dump(self, pids: dict[int, int]) -> dict[int, bool]:
        """Let all write their stacks; which of them seem to wait for others."""
        logs = {rank: self._log_dir / f"worker-{rank}.log" for rank in pids}
        sizes = {rank: path.stat().st_size if path.exists() else 0 for rank, path in logs.items()}
        for pid in pids.values():
            try:
                os.kill(pid, DUMP)
            except ProcessLookupError:
                continue
        self._over.wait(_DUMP_SECONDS)
        return {rank: _state(pids[rank]) not in _STATES and waits(_tail(logs[rank], sizes[rank])) for rank in pids}


def waits(stacks: str) -> bool:
    """Whether the main thread of a process, by faulthandler's dump, is in an exchange with other ranks."""
    for stack in re.split(r"\n(?=(?:Current thread|Thread) 0x)", stacks):
        if "_run_code" in stack or "<module>" in stack:  # the main thread's lowest frames
            frames = [line for line in stack.splitlines() if line.startswith("  File")]
            return any(_WAITS.search(frame) for frame in frames[:12])
    return False


def _tail(path: Path, start: int) -> str:
    try:
        with open(path, "rb") as file:
            file.seek(start)
            return file.read().decode(errors="replace")
    except OSError:
        return ""


def _state(pid: int) -> str:
    """The kernel's letter for what a process does: R, S, T, D, Z; empty if it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return ""
