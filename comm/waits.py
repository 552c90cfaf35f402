"""How long a rank stands waiting for others: what of an exchange did not hide behind the computation.

On a CPU the clock of the waiting thread tells; on a GPU, which works behind the program's back, events on its stream.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Waits:
    """Sums up the waits of one rank, from `begin` to `end`."""

    def __init__(self) -> None:
        self._seconds = 0.0
        self._since: float | torch.cuda.Event | None = None
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def begin(self, device: torch.device) -> None:
        """From here on nothing is left to do but to wait."""
        self._since = _event() if device.type == "cuda" else time.perf_counter()

    def end(self) -> None:
        """What was waited for is there; nothing if no wait has begun."""
        if isinstance(self._since, float):
            self._seconds += time.perf_counter() - self._since
        elif self._since is not None:
            self._events.append((self._since, _event()))
        self._since = None

    @contextmanager
    def around(self, device: torch.device) -> Iterator[None]:
        """`begin` and `end` around a block."""
        self.begin(device)
        try:
            yield
        finally:
            self.end()

    def read(self) -> float:
        """Seconds since the last reading. On a GPU the device must have been waited for."""
        seconds = self._seconds + sum(begun.elapsed_time(ended) for begun, ended in self._events) / 1000
        self.forget()
        return seconds

    def forget(self) -> None:
        """Begin anew."""
        self._seconds, self._since, self._events = 0.0, None, []


def _event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event
