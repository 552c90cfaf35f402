"""Saves in the background: training stands still for a copy in memory; a thread of each rank writes it to the disk.

What is notable: no collective is called outside the main thread. Ranks meet in the folder itself: rank 0 seals it when
the parts of all are there (`checkpoint_parts.py`). The folder's name holds a word that rank 0 draws for this run, so
that what a killed run left half-written is never taken for a part of this one.

One save is in flight at a time; the next waits for the one before. What a copy takes in memory is kept for the next.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import checkpoint, distributed
from .checkpoint_parts import explained, part_of, seal, write_part

PATIENCE = 1800.0
"""Seconds that rank 0 waits for the parts of other ranks."""
PARTING = 5.0
"""Seconds that a save in flight is given when the run ends with an error."""


@dataclass(frozen=True, kw_only=True)
class Content:
    """What is written into one folder."""

    target: Path
    """The folder; an older one of the same name is replaced."""
    model_state: Mapping[str, Tensor]
    """Weights by name."""
    state: dict[str, Any]
    """What the ranks have in common; plain containers and tensors."""
    rank_state: dict[str, Any] | None = None
    """This rank's own; of all ranks or of none."""


class Saver:
    """Writes checkpoints of one folder; made on all ranks together.

    What an interrupted run left half-written there is deleted.

    Args:
        directory: of the checkpoints.
    """

    def __init__(self, directory: Path) -> None:
        self.rank, self.world = distributed.rank(), distributed.world_size()
        if self.rank == 0:
            checkpoint.sweep(directory)
        self._word: str = distributed.from_rank0(secrets.token_hex(4))
        self._number = 0
        self._buffers: dict[tuple[Any, ...], Tensor] = {}
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._deadline = 0.0

    def save(self, contents: Sequence[Content], then: Callable[[], None] = lambda: None) -> None:
        """Copy, and go on; waits for the save before.

        Args:
            contents: written one after the other; weights, and state of the same keys, are the same in all.
            then: called on rank 0 when they are written, in the thread.

        Raises:
            OSError: the save before has failed.
        """
        self.finish()
        self._number += 1
        fresh: set[tuple[Any, ...]] = set()
        copies = [
            Content(
                target=content.target,
                # Rank 0 writes what all share: nobody else needs a copy of it.
                model_state=self._copy(dict(content.model_state), ("weights",), fresh) if self.rank == 0 else {},
                state=self._copy(content.state, ("state",), fresh) if self.rank == 0 else {},
                rank_state=self._copy(content.rank_state, ("rank",), fresh),
            )
            for content in contents
        ]
        copied = None
        if any(buffer.is_pinned() for buffer in self._buffers.values()):
            copied = torch.cuda.Event()
            copied.record()
        self._deadline = time.monotonic() + PATIENCE
        self._thread = threading.Thread(target=self._run, args=(copies, copied, then), name="tenko-save", daemon=True)
        self._thread.start()

    @property
    def busy(self) -> bool:
        """Whether a save is in flight."""
        return self._thread is not None and self._thread.is_alive()

    def check(self) -> None:
        """Raise what a save has failed with, on the rank where it did; an OSError names the checkpoint."""
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    def finish(self) -> None:
        """Wait for the save in flight, if there is one. Raises as `check`."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.check()

    def close(self) -> None:
        """`finish`, and give the memory back."""
        self.finish()
        self._buffers.clear()

    def abandon(self) -> None:
        """Give the save in flight a few seconds: the run ends with an error, other ranks may be gone."""
        self._deadline = min(self._deadline, time.monotonic() + PARTING)
        if self._thread is not None:
            self._thread.join(PARTING)

    def _copy(self, value: Any, place: tuple[Any, ...], fresh: set[tuple[Any, ...]]) -> Any:
        """Containers anew; tensors in memory of the CPU, pinned where they come from a GPU (the copy is under way)."""
        if isinstance(value, Mapping):
            return {key: self._copy(item, (*place, key), fresh) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(self._copy(item, (*place, i), fresh) for i, item in enumerate(value))
        if not isinstance(value, Tensor):
            return value
        buffer, on_gpu = self._buffers.get(place), value.device.type == "cuda"
        if buffer is None or buffer.shape != value.shape or buffer.dtype != value.dtype:
            assert place not in fresh, f"{place} differs among the contents of one save"
            buffer = torch.empty(value.shape, dtype=value.dtype, pin_memory=on_gpu)
            self._buffers[place] = buffer
        if place not in fresh:
            buffer.copy_(value.detach(), non_blocking=on_gpu)
            fresh.add(place)
        return buffer

    def _run(self, contents: Sequence[Content], copied: torch.cuda.Event | None, then: Callable[[], None]) -> None:
        try:
            if copied is not None:
                copied.synchronize()
            for content in contents:
                with explained(content.target):
                    self._write(content)
            if self.rank == 0:
                then()
        except BaseException as error:  # whatever it is, the main thread shall raise it
            self._failure = error

    def _write(self, content: Content) -> None:
        target = content.target
        folder = target.with_name(f"{target.name}.{self._word}-{self._number}.partial")
        if self.rank == 0:
            write_part(
                folder, rank=0, rank_state=content.rank_state, model_state=content.model_state, state=content.state
            )
            for rank in range(1, self.world if content.rank_state is not None else 1):
                self._await(part_of(folder, rank), rank)
            seal(folder, target)
        elif content.rank_state is not None:
            write_part(folder, rank=self.rank, rank_state=content.rank_state)

    def _await(self, part: Path, rank: int) -> None:
        while not part.is_file():
            if time.monotonic() > self._deadline:
                raise TimeoutError(f"rank {rank} has not written its part of it")
            time.sleep(0.02)
