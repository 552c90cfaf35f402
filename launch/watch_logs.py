"""What `tenko watch` reads of files that grow: their new lines, and of a run's logs the warnings and errors."""

from __future__ import annotations

import os
import re
from collections import deque
from pathlib import Path

from .errors import is_echo

TROUBLES = 5
"""Warnings and errors shown."""
_KEPT = 20
"""Of each log: what tells may be followed by its echoes."""
_LOG_START = 1 << 16
"""Of a log that stands there already only so many bytes are read."""
_LOGGED = re.compile(r"(?:\d{4}-\d\d-\d\d [\d:,]+ )?(?P<logger>[\w.]+) (?P<said>(?:WARNING|ERROR|CRITICAL): .*)")
_RAISED = re.compile(r"\w*(?:Error|Exception|Interrupt): ")
_EMPTY = "ERROR: the run failed"
"""Stands above a traceback, whose last line says why."""


class Tail:
    """The lines that a file got since the last look; all of them anew when it was replaced or cut.

    Args:
        path: the file; it need not be there yet.
        start: bytes from its end at the first look; None takes the whole file.
    """

    def __init__(self, path: Path, start: int | None = None) -> None:
        self.path, self._start = path, start
        self._inode, self._offset = 0, 0

    def read(self) -> tuple[bool, list[bytes]]:
        """Whether this begins the file anew, and its new whole lines."""
        try:
            with open(self.path, "rb") as file:
                found = os.fstat(file.fileno())
                anew = found.st_ino != self._inode or found.st_size < self._offset
                if anew:
                    self._inode = found.st_ino
                    self._offset = 0 if self._start is None else max(0, found.st_size - self._start)
                if found.st_size == self._offset:
                    return anew, []
                file.seek(self._offset)
                data = file.read()
        except OSError:
            return False, []
        whole = data[: data.rfind(b"\n") + 1]
        self._offset += len(whole)
        return anew, whole.splitlines()


class Troubles:
    """The last warnings and errors in a run's folder of logs.

    Args:
        logs: the folder.
    """

    def __init__(self, logs: Path) -> None:
        self._logs = logs
        self._tails: dict[Path, Tail] = {}
        self._found: dict[Path, deque[tuple[int, str, bool]]] = {}
        self._count = 0

    def look(self) -> tuple[str, ...]:
        """Oldest first, as `worker-0.log: ValueError: ...`.

        Of earlier starts (logs/earlier) only where this one has none. What echoes another worker's end, and what
        torchrun's agent says of it, only where no worker says more.
        """
        for path in sorted([*self._logs.glob("*.log"), *self._logs.glob("*/*.log")]):
            self._read(path)
        now = [entry for path, found in self._found.items() if path.parent == self._logs for entry in found]
        shown = sorted(now or [entry for found in self._found.values() for entry in found])
        telling = [entry for entry in shown if not entry[2]]
        return tuple(text for _, text, _ in (telling or shown)[-TROUBLES:])

    def _read(self, path: Path) -> None:
        anew, lines = self._tails.setdefault(path, Tail(path, _LOG_START)).read()
        found = self._found.setdefault(path, deque(maxlen=_KEPT))
        if anew:
            found.clear()
        label = path.relative_to(self._logs)
        for line in lines:
            trouble = _trouble(line.decode(errors="replace").rstrip())
            if trouble is None:
                continue
            said, echo = trouble
            self._count += 1
            text = f"{label}: {said}"
            if text not in (before for _, before, _ in found):  # a cause is logged again with what it led to
                found.append((self._count, text, echo))


def _trouble(line: str) -> tuple[str, bool] | None:
    """A log's line without date and logger, and whether it only echoes another's end; None if it is no trouble."""
    if (logged := _LOGGED.fullmatch(line)) is not None:
        return None if logged["said"] == _EMPTY else (logged["said"], logged["logger"].startswith("torch."))
    return (line, is_echo(line)) if _RAISED.match(line) else None
