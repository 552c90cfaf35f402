"""Files that are whole or absent: written beside their place, flushed to disk, renamed."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def write_text_atomic(path: Path, text: str) -> None:
    """Write `text` (UTF-8) so that a reader, or a cut at any moment, finds the old file or the new one.

    Raises:
        OSError: names the file, for instance on a full disk; the old file is untouched and nothing is left beside it.
    """
    write_bytes_atomic(path, text.encode())


def write_bytes_atomic(path: Path, data: bytes | Iterable[bytes]) -> None:
    """`write_text_atomic` of bytes, or of pieces that are written as they come."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(beside, "wb") as file:
            file.writelines([data] if isinstance(data, bytes) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise named(error, path) from error
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def read_text(path: Path) -> str:
    """The text of a file. Raises: ValueError naming the file and line where it is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise ValueError(f"{path}:{line}: not valid UTF-8") from None


def write_json_atomic(path: Path, value: Any) -> None:
    """`write_text_atomic` of readable JSON. Raises ValueError for NaN and infinities, which are not JSON."""
    write_text_atomic(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file. Raises: ValueError naming the file and line when it is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno}: damaged: {error.msg}") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path}: damaged: not valid UTF-8") from None
    except RecursionError:
        raise ValueError(f"{path}: damaged: nested too deeply") from None


def named(error: OSError, path: Path) -> OSError:
    """The same error naming `path` (a failed write or fsync names no file)."""
    return type(error)(error.errno, error.strerror or str(error), str(path))
