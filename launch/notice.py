"""A notice to stop: USR1 (SLURM's, ahead of the time limit) or TERM. The run ends its update, saves and leaves.

Signals reach ranks at different moments, and the ranks must stop after the same update: the first to notice names it in
the store. That is safe without a collective, because an update needs all ranks' gradients: whoever has finished update
u knows that nobody has begun u + 2, and what is written before u + 1 begins is seen by all when it ends.

The signals are taken by a thread of their own, since Python runs a handler only when the main thread comes back from
waiting inside a collective.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from .errors import STOPPED

if TYPE_CHECKING:
    from torch.distributed import Store

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGUSR1, signal.SIGTERM)


class Notice:
    """Whether the run was asked to stop.

    Args:
        store: shared by the ranks of this launch; None for a single process.
    """

    def __init__(self, store: Store | None = None) -> None:
        self.store = store
        self.signal: signal.Signals | None = None
        """The one that asked this process; None if another was asked."""
        self._training: Callable[[], bool] = lambda: False
        self._trainings = self._ahead = 0

    def listen(self, *, training: Callable[[], bool], ends_at_once: int | None = None) -> None:
        """Take the signals from now on. Call it in the main thread, before others start, which inherit the mask.

        Args:
            training: whether a training is on, which would save; elsewhere a notice ends the process at once.
            ends_at_once: a process whose TERM is no notice but the end: torchrun's agent, which ends workers so when
                another has failed.
        """
        self._training = training
        for number in SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        threading.Thread(target=self._take, args=(ends_at_once,), daemon=True, name="tenko notice").start()

    def _take(self, ends_at_once: int | None) -> None:
        while True:
            came = signal.sigwaitinfo(SIGNALS)
            number = signal.Signals(came.si_signo)
            agents = number == signal.SIGTERM and ends_at_once is not None and came.si_pid in (ends_at_once, 0)
            # Without a sender's id (0) it comes from another namespace of processes, or from the kernel.
            if agents or not self._training() or (number == signal.SIGTERM and self.signal == signal.SIGTERM):
                signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # of this thread: enough to end the process
                os.kill(os.getpid(), number)
            self.signal = number

    @property
    def code(self) -> int:
        """The exit code of a process that has saved and leaves: 143 after TERM, else that of `errors.STOPPED`."""
        return 128 + signal.SIGTERM if self.signal == signal.SIGTERM else STOPPED

    def begin(self, *, ahead: int = 0) -> None:
        """A training begins, whose updates are counted anew; called on all ranks.

        Args:
            ahead: updates that a rank may have finished before another; 0 where each needs all ranks' gradients.
        """
        self._trainings += 1
        self._ahead = ahead

    def due(self, update: int) -> bool:
        """Whether to stop after `update`, which has just ended: the same on all ranks, who all ask after each."""
        if self.store is None:
            return self.signal is not None
        key = f"stop/{self._trainings}"
        if self.signal is None and not self.store.check([key]):
            return False
        # The first to write decides. It is not in update + 1 yet, so all others see this when that ends; where they may
        # be `ahead` of it, when they have made as many more.
        last = int(self.store.compare_set(key, "", str(update + 1 + self._ahead)))
        if self.signal is not None and last > update:
            logger.warning("%s: stops after update %d", self.signal.name, last)
        return update >= last
