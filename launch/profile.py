"""`profile: {updates: [FROM, TO]}` of a training: what each rank does in these updates, as a trace that Perfetto shows.

All threads are recorded, those of the exchange too, on the clock of the machine; each update, validation and save is a
range in the trace. A profile that can't be made or written is a warning: the training goes on.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from tenko.nmt.config import ProfileConfig

from .errors import one_line

FOLDER = "profile"

logger = logging.getLogger(__name__)


class Profile:
    """Records the updates of one training on this rank; without updates in the settings it does nothing.

    Args:
        config: which updates.
        folder: of the training; gets `profile/rank-N.json.gz`.
        rank: this process's.
        log: takes the line that says where the trace is.
    """

    def __init__(self, config: ProfileConfig, folder: Path, *, rank: int, log: Callable[[str], None]) -> None:
        self._first, self._last = config.updates or (0, -1)
        self._path = folder / FOLDER / f"rank-{rank}.json.gz"
        self._log = log
        self._profile: profile | None = None
        self._range: AbstractContextManager[Any] | None = None
        self._done = 0

    def phase(self, phase: str, update: int) -> None:
        """A phase of the training begins; `update` are finished. The trace is written between phases, so that the time
        it takes counts as no update's."""
        if self._profile is not None and update >= self._last:
            self.close()
        if self._profile is None and phase == "update" and self._first <= update + 1 <= self._last:
            self._start(update + 1)
        if self._profile is not None:
            self._enter(f"update {update + 1}" if phase == "update" else phase)

    def update(self, update: int) -> None:
        """An update is finished."""
        self._done = update
        if self._profile is not None:
            self._enter(None)

    def close(self) -> None:
        """Write what was recorded, if anything was."""
        if self._profile is None:
            return
        recorded, self._profile = self._profile, None
        try:
            self._enter(None)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            recorded.stop()
            self._path.parent.mkdir(parents=True, exist_ok=True)
            beside = self._path.with_name(f".{self._path.stem}.tmp.gz")
            recorded.export_chrome_trace(str(beside))
            beside.replace(self._path)
        except (OSError, RuntimeError) as error:
            logger.warning("could not write the profile %s: %s", self._path, one_line(error))
            return
        self._log(
            f"profile of updates {self._first} to {self._done}, a file for each rank, in {self._path.parent}: "
            "open one at https://ui.perfetto.dev"
        )

    def _start(self, update: int) -> None:
        self._first = update  # a run that resumes within them records the rest
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
        every_thread = torch._C._profiler._ExperimentalConfig(profile_all_threads=True)
        try:
            self._profile = profile(activities=activities, experimental_config=every_thread)
            self._profile.start()
        except RuntimeError as error:  # another profiler is on
            self._profile, self._last = None, -1
            logger.warning("no profile: %s", one_line(error))

    def _enter(self, name: str | None) -> None:
        if self._range is not None:
            self._range.__exit__(None, None, None)
        self._range = None if name is None else record_function(name)
        if self._range is not None:
            self._range.__enter__()
