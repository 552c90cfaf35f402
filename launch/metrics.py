"""metrics.jsonl: one JSON object a line, appended while a stage runs, cut back to the checkpoint when it resumes."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any, BinaryIO

from .files import named


class MetricsLog:
    """Appends lines to a metrics file. Only rank 0 makes one.

    A last line that a cut left torn is removed on opening. Figures that are not finite are written as null.

    Args:
        path: the metrics.jsonl; made, with its folder, when missing.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._keep(lambda entry: True)
        self._file: BinaryIO = open(path, "ab", buffering=0)  # noqa: SIM115

    def append(self, entry: dict[str, Any]) -> None:
        """Write one line; it is in the file when this returns.

        Raises:
            OSError: names the file (full disk).
        """
        clean = {key: _finite(value) for key, value in entry.items()}
        line = json.dumps(clean, ensure_ascii=False, allow_nan=False).encode() + b"\n"
        try:
            while line:  # a nearly full disk takes part of a line, then says why
                line = line[self._file.write(line) :]
        except OSError as error:
            raise named(error, self.path) from error

    def truncate_after(self, update: int) -> None:
        """Forget lines of later updates: they will be written again by the run that resumes at `update`."""
        self._file.close()
        self._keep(lambda entry: entry.get("update", 0) <= update)
        self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115

    def close(self) -> None:
        """Flush to disk and close."""
        if not self._file.closed:
            os.fsync(self._file.fileno())
            self._file.close()

    def _keep(self, wanted: Any) -> None:
        if not self.path.exists():
            return
        kept = b"".join(
            json.dumps(e, ensure_ascii=False).encode() + b"\n" for e in read_metrics(self.path) if wanted(e)
        )
        if kept == self.path.read_bytes():
            return
        beside = self.path.with_name(f".{self.path.name}.tmp")
        try:
            with open(beside, "wb") as file:
                file.write(kept)
                file.flush()
                os.fsync(file.fileno())
            os.replace(beside, self.path)
        except OSError as error:
            beside.unlink(missing_ok=True)
            raise named(error, self.path) from error


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The entries of a metrics file, in order; a torn last line is left out, a missing file is empty.

    Raises:
        ValueError: a line before the last is damaged; names file and line.
    """
    if not path.exists():
        return []
    entries: list[dict[str, Any]] = []
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        try:
            entry = json.loads(line)
            if not isinstance(entry, dict) or not isinstance(entry.get("update", 0), int):
                raise ValueError
        except ValueError:  # JSON and UTF-8 errors are ValueErrors
            if number == len(lines):  # no newline after it: torn
                break
            raise ValueError(f"{path}:{number}: damaged; remove the line to go on") from None
        entries.append(entry)
    return entries


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
