"""Checkpoints: folders written beside and renamed into place, vouched for by checksums, read without unpickling code.

checkpoints/update-00000500/
    model.safetensors     weights, fp32
    state.pt              optimizer, loss scaler, counters (torch.load with weights_only=True)
    rank-0.pt ...         what differs between ranks: the communication route's state
    checksums.json        SHA-256 of each file, written last
checkpoints/best/         the same layout, weights only, of the best validation BLEU
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
import shutil
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

SUMS = "checksums.json"
_NAME = re.compile(r"update-(\d+)$")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
        rank_state: this rank's own state.
        barrier: waits for all ranks.

    Raises:
        OSError: the disk is full or not writable; no half-written checkpoint is left under the final name.
    """
    temporary = target.with_name(target.name + ".partial")
    try:
        if rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        barrier()
        if rank_state is not None:
            _save_state(rank_state, temporary / f"rank-{rank}.pt")
        if rank == 0:
            _save_safetensors({k: v.detach().cpu().contiguous() for k, v in model_state.items()}, temporary)
            if state is not None:
                _save_state(state, temporary / "state.pt")
        barrier()
        if rank == 0:
            _seal(temporary, target)
        barrier()
    except OSError as error:
        # Only what this rank wrote: were the folder to go, other ranks would fail for want of it, and say so first.
        mine = [f"rank-{rank}.pt", *(["model.safetensors", "state.pt"] if rank == 0 else [])]
        for name in mine:
            with contextlib.suppress(OSError):
                (temporary / name).unlink(missing_ok=True)
        raise OSError(
            f"{target}: cannot write the checkpoint: {_first_line(error)}; earlier ones are intact"
        ) from error


def _save_state(state: dict[str, Any], path: Path) -> None:
    buffer = io.BytesIO()  # given a file, torch.save hides a full disk behind a RuntimeError of its zip writer
    torch.save(state, buffer)
    path.write_bytes(buffer.getbuffer())


def _save_safetensors(tensors: dict[str, Tensor], folder: Path) -> None:
    try:
        save_file(tensors, folder / "model.safetensors")
    except SafetensorError as error:  # its word for an I/O error
        raise OSError(str(error)) from error


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _seal(temporary: Path, target: Path) -> None:
    sums = {p.name: _sha256(p) for p in sorted(temporary.iterdir())}
    (temporary / SUMS).write_text(json.dumps(sums, indent=1) + "\n")
    for path in temporary.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    if target.exists():
        old = target.with_name(target.name + ".old")
        shutil.rmtree(old, ignore_errors=True)
        target.rename(old)
        temporary.rename(target)
        shutil.rmtree(old)
    else:
        temporary.rename(target)


def verify(folder: Path) -> None:
    """Check every file against its checksum.

    Raises:
        ValueError: the checkpoint is missing, incomplete or damaged; the message names the file and what to do.
    """
    cure = "delete this folder to go on from the checkpoint before it"
    try:
        sums = json.loads((folder / SUMS).read_text())
        items = list(sums.items())
    except FileNotFoundError:
        raise ValueError(f"{folder}: no such checkpoint") from None
    except (ValueError, AttributeError):
        raise ValueError(f"{folder / SUMS}: damaged; {cure}") from None
    for name, expected in items:
        path = folder / name
        if not path.is_file():
            raise ValueError(f"{path}: missing from the checkpoint; {cure}")
        if _sha256(path) != expected:
            raise ValueError(f"{path}: damaged (its checksum differs); {cure}")


def load(folder: Path, *, rank: int = 0) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Any] | None]:
    """Read a checkpoint back: weights, shared state, and this rank's state (None if it has none).

    Raises:
        ValueError: see `verify`.
    """
    verify(folder)
    weights = load_file(folder / "model.safetensors")
    state_path, rank_path = folder / "state.pt", folder / f"rank-{rank}.pt"
    state = torch.load(state_path, weights_only=True, map_location="cpu") if state_path.exists() else {}
    rank_state = torch.load(rank_path, weights_only=True, map_location="cpu") if rank_path.exists() else None
    return weights, state, rank_state


def prune(directory: Path, keep_last: int, keep: Collection[int] = ()) -> None:
    """Delete all but the newest `keep_last` checkpoints and those of the updates `keep`, and what an interrupted run
    left half-written."""
    for update in list_updates(directory)[:-keep_last]:
        if update in keep:
            continue
        shutil.rmtree(path_of(directory, update))
    for leftover in [*directory.glob("*.partial"), *directory.glob("*.old")]:
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
        for name, tensor in load_file(folder / "model.safetensors").items():
            types[name] = tensor.dtype
            total[name] = total.get(name, torch.zeros((), dtype=torch.float64)) + tensor.to(torch.float64)
    return {name: (tensor / len(folders)).to(types[name]) for name, tensor in total.items()}
