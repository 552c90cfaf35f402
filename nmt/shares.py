"""Where an update's time goes: reading and collating, waiting for other ranks, and the rest, which is computing.

Exchange is the time that the training thread stands: from the last bucket that it handed over to the end of backward,
in norms, and until the owners' weights are there (`Route.waits`). What hides behind backward costs nothing and is not
in it; a rank that waits for a slower one stands, too. DeepSpeed's exchange counts as computing.

On a GPU the clock of the thread says nothing of the device: only updates that end with a line of metrics, where the
loop waits for the device anyway, are looked at, and events tell how long the device waited.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from tenko.comm import Route


class Shares:
    """Sums up, in seconds, since it was last read.

    Args:
        device: of the training.
        route: of the gradients; None without one.
    """

    def __init__(self, device: torch.device, route: Route | None) -> None:
        self._route = route
        self._asynchronous = device.type == "cuda"
        self._data = self._exchange = self._total = 0.0
        self._began = self._data_now = 0.0

    def begin(self) -> None:
        """An update begins."""
        self._began = time.perf_counter()
        self._data_now = 0.0
        if self._route is not None:
            self._route.waits.forget()

    def data_read(self, since: float) -> None:
        """Reading and collating, begun at `since` (`time.perf_counter`), has ended."""
        self._data_now += time.perf_counter() - since

    def end(self, *, logged: bool) -> None:
        """The update has ended; `logged`: the device has been waited for."""
        if self._asynchronous and not logged:
            return
        self._total += time.perf_counter() - self._began
        self._data += self._data_now
        if self._route is not None:
            self._exchange += self._route.waits.read()

    def read(self) -> tuple[float, float, float]:
        """Seconds of data, exchange and all; begins anew."""
        sums = self._data, self._exchange, self._total
        self._data = self._exchange = self._total = 0.0
        return sums
