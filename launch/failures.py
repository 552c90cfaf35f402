"""Why a run ended: each worker leaves its reason in the run directory, where the agents of all nodes read it.

The first cause is told from its echoes: when a worker ends, those of all nodes see their connections break.
"""

from __future__ import annotations

import json
import os
import socket
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from .errors import BAD_INPUT, INTERNAL, RunFailed

ROUND = "TENKO_ROUND"
"""Environment variable: which start of the workers this is, the same on all nodes."""
CAUSES = ("user", "hung", "killed", "internal", "exit", "waits", "ended", "peer")
"""Kinds of failure, the likeliest cause first. `user`: the message is the line to show; `hung` and `killed`: found and
said by the agent; `internal`: an error of ours; `exit`: without a word; `waits`: ended while it waited for one that
hangs, nobody knows which; `ended`: by SIGTERM, as agents end workers; `peer`: an echo of another worker's end."""
STOPPED = "stopped"
"""Kind of what is no failure: stopped on notice, and saved."""
_ROOM = 8192


@dataclass(frozen=True, kw_only=True)
class Failure:
    """How a worker ended."""

    rank: int
    kind: str
    """One of CAUSES, or STOPPED."""
    message: str
    """One line."""
    host: str = ""
    """Its machine."""
    time: float = 0.0
    """Seconds since the epoch."""
    round: int = 0
    """Which start of the workers it was."""

    def line(self, *, several: bool) -> str:
        """The line for the user; says where it was when there are several nodes."""
        where = f"worker {self.rank} on {self.host}"
        if self.message.startswith(f"worker {self.rank} "):
            return self.message.replace(f"worker {self.rank}", where, 1) if several else self.message
        return f"{where}: {self.message}" if several else self.message

    def as_error(self, *, several: bool) -> RunFailed:
        """As it leaves `tenko run`."""
        code = INTERNAL if self.kind in ("internal", "ended", "peer", "exit") else BAD_INPUT
        return RunFailed(self.line(several=several), BAD_INPUT if self.kind == "ended" else code)


def write_error(log_dir: Path, rank: int, *, kind: str, message: str) -> None:
    """Say why a worker is about to fail, or has failed; what it said itself is not overwritten.

    Args:
        log_dir: the run's folder of logs.
        rank: the worker's.
        kind: one of CAUSES, or STOPPED.
        message: one line.
    """
    number = int(os.environ.get(ROUND, "0"))
    failure = Failure(
        rank=rank, kind=kind, message=message[:1000], host=socket.gethostname(), time=time.time(), round=number
    )
    path = log_dir / f"error-{rank}.json"
    if (said := read(path)) is not None and said.round == number:
        return
    with open(path, "r+b", buffering=0) as file:
        file.write(json.dumps(asdict(failure)).encode().ljust(_ROOM))


def reserve(log_dir: Path, rank: int) -> None:
    """A blank file that a worker writes its reason into: in place, so that it can be told when the disk is full."""
    (log_dir / f"error-{rank}.json").write_bytes(b" " * _ROOM)


def read(path: Path) -> Failure | None:
    """What a worker said; None if nothing."""
    try:
        return Failure(**json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError):
        return None


def read_all(log_dir: Path, number: int) -> list[Failure]:
    """What all workers of one start said."""
    found = (read(path) for path in log_dir.glob("error-*.json"))
    return [failure for failure in found if failure is not None and failure.round == number]


def first_cause(failures: list[Failure]) -> Failure | None:
    """The likeliest kind's first; None if no worker failed."""
    failed = [failure for failure in failures if failure.kind in CAUSES]
    return min(failed, key=lambda failure: (CAUSES.index(failure.kind), failure.time), default=None)


def tidy(log_dir: Path) -> None:
    """Remove the files in which nobody wrote."""
    for file in [*log_dir.glob("*.out"), *log_dir.glob("error-*.json")]:
        try:
            if not file.read_bytes().strip():
                file.unlink()
        except FileNotFoundError:  # another node was first
            continue
