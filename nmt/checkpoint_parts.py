"""How ranks write one checkpoint together: each its files, and last their sums; rank 0 joins the sums and renames.

`part-RANK.json` is renamed into place when all files of that rank are on the disk: who sees it needs no barrier to know
that they are whole.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

SUMS = "checksums.json"
MODEL, STATE = "model.safetensors", "state.pt"


@contextlib.contextmanager
def explained(target: Path) -> Iterator[None]:
    """Says of an OSError which checkpoint it kept from being written."""
    try:
        yield
    except OSError as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise OSError(f"{target}: cannot write the checkpoint: {reason}; earlier ones are intact") from error


def write_part(
    folder: Path,
    *,
    rank: int,
    model_state: Mapping[str, Tensor] | None = None,
    state: dict[str, Any] | None = None,
    rank_state: dict[str, Any] | None = None,
) -> None:
    """Write one rank's files into an unsealed folder, made if it is missing, and last their sums.

    Args:
        folder: of all ranks; nobody else writes files of these names into it.
        model_state, state, rank_state: see `save`; None is not written.

    Raises:
        OSError: the disk is full or not writable; what this rank wrote is removed.
    """
    writers: dict[str, Callable[[Path], None]] = {}
    if rank_state is not None:
        writers[f"rank-{rank}.pt"] = lambda path: _save_state(rank_state, path)
    if model_state is not None:
        writers[MODEL] = lambda path: _save_safetensors(model_state, path)
    if state is not None:
        writers[STATE] = lambda path: _save_state(state, path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, write in writers.items():
            write(folder / name)
            _sync(folder / name)
        _write_json({name: sha256(folder / name) for name in writers}, part_of(folder, rank))
    except OSError:
        # Only what this rank wrote: were the folder to go, other ranks would fail for want of it, and say so first.
        for name in writers:
            with contextlib.suppress(OSError):
                (folder / name).unlink(missing_ok=True)
        raise


def part_of(folder: Path, rank: int) -> Path:
    """Sums of what a rank has written into an unsealed folder: it is there when all of that is whole."""
    return folder / f"part-{rank}.json"


def seal(folder: Path, target: Path) -> None:
    """Join the sums of all parts, and rename the folder; rank 0 does so when they are all there."""
    sums: dict[str, str] = {}
    parts = sorted(folder.glob("part-*.json"))
    for part in parts:
        sums |= json.loads(part.read_text())
    _write_json(dict(sorted(sums.items())), folder / SUMS)
    for part in parts:
        part.unlink()
    _sync(folder)
    if target.exists():
        old = target.with_name(target.name + ".old")
        shutil.rmtree(old, ignore_errors=True)
        target.rename(old)
        folder.rename(target)
        shutil.rmtree(old)
    else:
        folder.rename(target)
    _sync(target.parent)


class _Sink:
    """What torch.save writes to: it hides a full disk behind a RuntimeError of its zip writer."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return self._file.write(data)
        except OSError as error:
            self.error = self.error or error
            raise

    def flush(self) -> None:
        """Left to the file."""


def _save_state(state: dict[str, Any], path: Path) -> None:
    with path.open("wb") as file:
        sink = _Sink(file)
        try:
            torch.save(state, sink)  # type: ignore[arg-type]
        except RuntimeError:
            if sink.error is None:
                raise
            raise sink.error from None


def _save_safetensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    try:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)
    except SafetensorError as error:  # its word for an I/O error
        raise OSError(str(error)) from error


def _write_json(content: dict[str, str], path: Path) -> None:
    beside = path.with_name(path.name + ".tmp")
    beside.write_text(json.dumps(content, indent=1) + "\n")
    _sync(beside)
    beside.rename(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        if not path.is_dir():  # some network file systems can't sync a folder, whose files are safe by now
            raise
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """Of a file's content, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
