"""Checkpoints: folders written beside and renamed into place, vouched for by checksums, read without unpickling code.

checkpoints/update-00000500/
    model.safetensors     weights, fp32
    state.pt              optimizer, loss scaler, counters (torch.load with weights_only=True)
    rank-0.pt ...         what differs between ranks: the communication route's state
    checksums.json        SHA-256 of each file, written last
checkpoints/best/         the same layout, weights only, of the best validation

`save` writes one at once, with barriers between the ranks; `saver.py` in the background, without.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from .checkpoint_parts import MODEL, STATE, SUMS, explained, seal, sha256, write_part

_NAME = re.compile(r"update-(\d+)$")


def path_of(directory: Path, update: int) -> Path:
    """Folder of the checkpoint of an update."""
    return directory / f"update-{update:08d}"


def list_updates(directory: Path) -> list[int]:
    """Updates of the complete checkpoints in a folder, ascending."""
    if not directory.is_dir():
        return []
    return sorted(int(found[1]) for p in directory.iterdir() if (found := _NAME.match(p.name)) and (p / SUMS).is_file())


def save(
    target: Path,
    *,
    model_state: Mapping[str, Tensor],
    state: dict[str, Any] | None = None,
    rank_state: dict[str, Any] | None = None,
    rank: int = 0,
    barrier: Callable[[], None] = lambda: None,
) -> None:
    """Write a checkpoint folder; every rank calls this, rank 0 writes what all share and renames it into place.

    Args:
        target: the folder; an older one of the same name is replaced.
        model_state: weights by name, tied ones once.
        state: what a resumed run needs beside them; plain containers and tensors.
        rank_state: this rank's own state; of all ranks or of none.
        barrier: waits for all ranks.

    Raises:
        OSError: the disk is full or not writable; no half-written checkpoint is left under the final name.
    """
    temporary = target.with_name(target.name + ".partial")
    with explained(target):
        if rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        barrier()
        if rank == 0:
            write_part(temporary, rank=0, rank_state=rank_state, model_state=model_state, state=state)
        else:
            write_part(temporary, rank=rank, rank_state=rank_state)
        barrier()
        if rank == 0:
            seal(temporary, target)
        barrier()


# Reading


def damage_of(folder: Path) -> str | None:
    """What is wrong with a checkpoint, with the file's name before it; None if every file fits its checksum."""
    try:
        sums = json.loads((folder / SUMS).read_text())
        items = list(sums.items())
    except FileNotFoundError:
        return f"{folder}: no such checkpoint"
    except (ValueError, AttributeError, RecursionError):  # RecursionError: JSON of a thousand brackets
        return f"{folder / SUMS}: damaged"
    for name, expected in items:
        path = folder / name
        if not path.is_file():
            return f"{path}: missing from the checkpoint"
        if sha256(path) != expected:
            return f"{path}: damaged (its checksum differs)"
    needed = [MODEL, STATE, *(f"rank-{rank}.pt" for rank in range(_world(folder)))]
    for name in needed:
        if name not in sums:
            return f"{folder / name}: missing from the checkpoint"
    return None


def _world(folder: Path) -> int:
    """Ranks whose state belongs to a checkpoint; 0 where none has any."""
    if not (folder / STATE).is_file():
        return 0
    with contextlib.suppress(Exception):  # whatever it holds instead, `load` will say
        state = torch.load(folder / STATE, weights_only=True, map_location="cpu", mmap=True)
        return int(state.get("world", 0))
    return 0


def verify(folder: Path) -> None:
    """Check every file against its checksum.

    Raises:
        ValueError: the checkpoint is missing, incomplete or damaged; the message names the file and what to do.
    """
    damage = damage_of(folder)
    if damage is not None:
        missing = not folder.is_dir()
        raise ValueError(damage if missing else f"{damage}; delete this folder to go on from the checkpoint before it")


def newest_whole(directory: Path) -> tuple[int | None, list[str]]:
    """The newest checkpoint that is whole.

    Returns:
        Its update, None if there is none; and what is wrong with each newer one.
    """
    damages: list[str] = []
    for update in reversed(list_updates(directory)):
        damage = damage_of(path_of(directory, update))
        if damage is None:
            return update, damages
        damages.append(damage)
    return None, damages


def set_aside(directory: Path, after: int) -> None:
    """Rename the checkpoints of later updates, which are damaged: nothing counts them any more. They stay to be looked
    at until others are damaged."""
    damaged = [path_of(directory, update) for update in list_updates(directory) if update > after]
    if damaged:
        for earlier in directory.glob("*.damaged"):
            shutil.rmtree(earlier, ignore_errors=True)
    for folder in damaged:
        folder.rename(folder.with_name(folder.name + ".damaged"))


def load(
    folder: Path, *, rank: int = 0, check: bool = True
) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Any] | None]:
    """Read a checkpoint back: weights, shared state, and this rank's state (None if it has none).

    Args:
        folder: the checkpoint.
        rank: whose state.
        check: hold it to its checksums; False where that has just been done.

    Raises:
        ValueError: see `verify`.
    """
    if check:
        verify(folder)
    weights = load_file(folder / MODEL)
    state = _load_state(folder / STATE)
    return weights, state or {}, load_rank(folder, rank)


def load_rank(folder: Path, rank: int) -> dict[str, Any] | None:
    """A rank's state, unchecked; None if it has none."""
    return _load_state(folder / f"rank-{rank}.pt")


def _load_state(path: Path) -> dict[str, Any] | None:
    return torch.load(path, weights_only=True, map_location="cpu") if path.exists() else None


# Keeping house


def prune(
    directory: Path,
    keep_last: int,
    keep: Collection[int] = (),
    *,
    regular: Callable[[int], bool] = lambda update: True,
) -> None:
    """Delete checkpoints but the newest, the last `keep_last` of the regular ones, and those of the updates `keep`.

    Args:
        directory: of checkpoints.
        keep_last: at least 1.
        keep: updates kept for good.
        regular: whether an update is one of a series: one that was saved on notice or for good must not stand in such
            a one's place.
    """
    updates = list_updates(directory)
    kept = {*updates[-1:], *[update for update in updates if regular(update)][-keep_last:], *keep}
    for update in updates:
        if update not in kept:
            shutil.rmtree(path_of(directory, update))


def sweep(directory: Path) -> None:
    """Delete what an interrupted run left half-written; nobody may be writing."""
    for old in directory.glob("*.old"):
        whole = old.with_suffix("")
        if whole.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:  # it was being replaced
            old.rename(whole)
    for leftover in directory.glob("*.partial"):
        shutil.rmtree(leftover, ignore_errors=True)


def average(folders: list[Path]) -> dict[str, Tensor]:
    """Mean of the weights of several checkpoints, accumulated in float64, returned in their own type.

    Source: Vaswani et al. 2017, section 6.1 (the last checkpoints averaged).
    """
    assert folders
    total: dict[str, Tensor] = {}
    types: dict[str, torch.dtype] = {}
    for folder in folders:
        verify(folder)
        for name, tensor in load_file(folder / MODEL).items():
            types[name] = tensor.dtype
            total[name] = total.get(name, torch.zeros((), dtype=torch.float64)) + tensor.to(torch.float64)
    return {name: (tensor / len(folders)).to(types[name]) for name, tensor in total.items()}
