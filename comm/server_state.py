"""What dedicated servers and their workers save, so that a job that died goes on.

FOLDER/update-00000100/
    server-0.safetensors ...    weights and Adam's state of a server's shard
    worker-0.safetensors ...    a worker's error feedback, learning rate and meter
    complete.json               written when all others are: without it the folder does not count
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

COMPLETE = "complete.json"
_NAME = re.compile(r"update-(\d{8,})$")


def folder_of(folder: Path, update: int) -> Path:
    return folder / f"update-{update:08d}"


def write(path: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, str]) -> None:
    """Writes tensors and facts beside `path`, then renames: there is a whole file, or none.

    Raises:
        OSError: the disk is full or not writable.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial, dict(facts))
    except SafetensorError as error:  # its word for an I/O error
        raise OSError(f"{path}: cannot write the state: {error}") from None
    _replace(partial, path)


def _replace(partial: Path, path: Path) -> None:
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    partial.replace(path)


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and facts of a file that `write` wrote.

    Raises:
        ValueError: it is missing or damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"{path}: missing or damaged ({error}); delete its folder to go on from an older one"
        ) from None


def complete(folder: Path, update: int, *, workers: int, servers: int, keep: int = 2) -> None:
    """Declares a saved update whole, and deletes older ones but `keep`, and halves of such."""
    here = folder_of(folder, update)
    partial = here / (COMPLETE + ".partial")
    partial.write_text(json.dumps({"update": update, "workers": workers, "servers": servers}) + "\n")
    _replace(partial, here / COMPLETE)
    kept = updates(folder)[-keep:]
    for path in folder.iterdir():
        name = _NAME.match(path.name)
        if name and int(name[1]) < update and int(name[1]) not in kept:
            shutil.rmtree(path, ignore_errors=True)


def updates(folder: Path) -> list[int]:
    """Updates whose state is complete, ascending."""
    if not folder.is_dir():
        return []
    return sorted(int(m[1]) for p in folder.iterdir() if (m := _NAME.match(p.name)) and (p / COMPLETE).is_file())


def check(folder: Path, update: int, *, workers: int, servers: int) -> None:
    """Raises ValueError if an update was saved by another number of workers or servers."""
    path = folder_of(folder, update) / COMPLETE
    try:
        said = json.loads(path.read_text())
        had = int(said["workers"]), int(said["servers"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: damaged ({error}); delete its folder to go on from an older one") from None
    if had != (workers, servers):
        raise ValueError(
            f"{path.parent}: saved by {had[0]} workers and {had[1]} servers, but these are {workers} and {servers}"
        )
