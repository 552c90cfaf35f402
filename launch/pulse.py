"""A rank's sign of life: a line of JSON in a small file, rewritten in place, for the watchdog and `tenko watch`."""

from __future__ import annotations

import json
import os
import socket
import time
from dataclasses import asdict, dataclass
from pathlib import Path

WIDTH = 256
"""Bytes of the line, padded: a reader never sees the tail of an older one."""
IDLE, UPDATE, VALIDATE, SAVE = "idle", "update", "validate", "save"
"""Phases."""
WATCHED = (UPDATE, VALIDATE)
"""Those in which some rank moves on within `hang_timeout`; the others may take hours."""


@dataclass(kw_only=True)
class Beat:
    """What a rank was last seen doing."""

    rank: int
    node: int = 0
    host: str = ""
    pid: int = 0
    phase: str = IDLE
    update: int = 0
    """Updates finished in this training."""
    beats: int = 0
    """Grows with every sign of life."""
    time: float = 0.0
    """Of the last one, seconds since the epoch."""


class Pulse:
    """Writes a rank's beats.

    Args:
        path: the file; None writes nothing.
        rank, node: who beats.
    """

    def __init__(self, path: Path | None = None, *, rank: int = 0, node: int = 0) -> None:
        self.beat = Beat(rank=rank, node=node, host=socket.gethostname()[:80], pid=os.getpid())
        self._file = None if path is None else os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        self.phase(IDLE)

    def phase(self, phase: str) -> None:
        """Note what begins."""
        self.beat.phase = phase
        self._write()

    def update(self, update: int) -> None:
        """Note that an update is finished."""
        self.beat.update = update
        self._write()

    @property
    def training(self) -> bool:
        """Whether a training is on."""
        return self.beat.phase != IDLE

    def _write(self) -> None:
        self.beat.beats += 1
        self.beat.time = time.time()
        if self._file is not None:
            line = json.dumps(asdict(self.beat)).encode().ljust(WIDTH - 1) + b"\n"
            os.pwrite(self._file, line, 0)

    def close(self) -> None:
        """Close the file; it stays."""
        if self._file is not None:
            os.close(self._file)
            self._file = None


def path_of(log_dir: Path, rank: int) -> Path:
    """The file of a rank."""
    return log_dir / f"pulse-{rank}"


def read(path: Path) -> Beat | None:
    """The last beat in a file; None where there is none, or it is being written."""
    try:
        return Beat(**json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError):
        return None


def read_all(log_dir: Path) -> list[Beat]:
    """The beats of all ranks whose files are in a folder, by rank."""
    beats = [beat for path in log_dir.glob("pulse-*") if (beat := read(path)) is not None]
    return sorted(beats, key=lambda beat: beat.rank)
