"""What `tenko watch` knows of a run: read from its directory alone, on any machine that sees it.

Nothing is locked and nothing is written, so that watching can't disturb. Of files that grow only what was appended is
read; who holds the lock is read from /proc/locks, since trying it would turn away a run that begins at that moment.
"""

from __future__ import annotations

import json
import math
import os
import socket
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tenko.compression.config import LotteryConfig
from tenko.nmt.config import TrainConfig

from .errors import one_line
from .pulse import IDLE, WATCHED, Beat, read_all
from .recipe import Recipe
from .rundir import LOCK, LOGS, METRICS, RunDirectory
from .watch_logs import Tail, Troubles

SILENT = 60.0
"""Seconds without a sign of life in a training after which a run counts as stalled, unless ten updates take longer."""


@dataclass
class Training:
    """What one metrics.jsonl says."""

    folder: Path
    max_update: int = 0
    last: dict[str, Any] = field(default_factory=dict)
    """The last line of training."""
    losses: list[float] = field(default_factory=list)
    bleus: list[tuple[int, float]] = field(default_factory=list)
    """Update and BLEU of each validation."""
    best_by: str = "bleu"
    """As of the training's settings."""
    best: tuple[int, float] | None = None
    """Update and BLEU of the validation whose model the trainer keeps as the best, by its own rule."""
    valid: dict[str, Any] = field(default_factory=dict)
    """The last validation."""
    recent: deque[tuple[int, float]] = field(default_factory=lambda: deque(maxlen=6))
    """Update and seconds in updates of the last lines."""
    _rank: tuple[float, float] = (-math.inf, -math.inf)

    def add(self, entry: dict[str, Any]) -> None:
        """Take in one line."""
        update = entry.get("update", 0)
        if not isinstance(update, int):  # not tenko's
            return
        if entry.get("kind") == "valid":
            self.valid = entry
            if isinstance(entry.get("bleu"), int | float):
                self.bleus.append((update, entry["bleu"]))
                self._hold_best(update, entry["bleu"], entry.get("nll"))
            return
        self.last = entry
        if isinstance(entry.get("loss"), int | float):
            self.losses.append(entry["loss"])
        if isinstance(entry.get("seconds"), int | float):
            self.recent.append((update, entry["seconds"]))

    def _hold_best(self, update: int, bleu: float, nll: Any) -> None:
        """As `Trainer._validate`: a lower loss breaks ties of BLEU, for instance while that is still 0."""
        loss = nll if isinstance(nll, int | float) else math.inf
        rank = (-loss, 0.0) if self.best_by == "perplexity" else (bleu, -loss)
        if rank > self._rank:
            self._rank, self.best = rank, (update, bleu)

    @property
    def update(self) -> int:
        """The last update that has figures."""
        return max(self.last.get("update", 0), self.valid.get("update", 0))

    @property
    def seconds_an_update(self) -> float | None:
        """Over the last lines; None before there are figures."""
        if not self.recent:
            return None
        (first, before), (last, after) = self.recent[0], self.recent[-1]
        if last > first and after > before:
            return (after - before) / (last - first)
        return after / last if last and after else None


@dataclass(frozen=True)
class StageView:
    """A stage at one moment."""

    name: str
    state: str
    """finished, running, stopped (it has begun, and nothing runs), waiting, or damaged (its result.json is)."""
    training: Training | None
    """Its newest training."""
    update: int
    """That training's, to the update where ranks give signs of life."""
    result: dict[str, Any]
    """Empty unless finished."""


@dataclass(frozen=True)
class RunView:
    """A run at one moment."""

    path: Path
    recipe: Recipe
    state: str
    """running, stalled, finished, damaged (a result.json is, and nothing runs), or not running."""
    detail: str
    """Who runs it, who is silent, or what to delete; empty where there is nothing to say."""
    stages: tuple[StageView, ...]
    beats: tuple[Beat, ...]
    """Of the ranks of a run that is on."""
    troubles: tuple[str, ...]
    """The last warnings and errors, oldest first, with the log's name."""
    now: float
    """Seconds since the epoch."""

    @property
    def current(self) -> StageView:
        """The first stage that is not finished, else the last one that was trained."""
        return current_stage(self.stages)


def current_stage(stages: Sequence[StageView]) -> StageView:
    """As `RunView.current`."""
    unfinished = [stage for stage in stages if stage.state != "finished"]
    trained = [stage for stage in stages if stage.training is not None]
    return (unfinished or trained or [*stages])[0 if unfinished else -1]


class Watcher:
    """Looks at one run directory again and again.

    Args:
        path: a run directory.

    Raises:
        ValueError: it is none, or its config.yaml is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.run = RunDirectory.read(path)
        self._trainings: dict[Path, tuple[Tail, Training]] = {}
        self._troubles = Troubles(self.run.path / LOGS)
        self._damage = ""

    def look(self) -> RunView:
        """The run as it is now."""
        now = time.time()
        holder, beats = lock_holder(self.run.path), self._beats(now)
        on = holder is not None and (holder.seen or any(now - beat.time < SILENT for beat in beats))
        beats = beats if on else []
        self._damage = ""
        stages = self._stages(beats, on)
        if all(stage.state == "finished" for stage in stages):
            state, detail = "finished", ""
        elif self._damage and not on:
            state, detail = "damaged", self._damage
        elif holder is None or not on:
            state, detail = "not running", "the same `tenko run` goes on with it"
        elif silent := _silent(beats, current_stage(stages).training, now):
            rank = f"rank {silent.rank} on {silent.host}"
            state, detail = "stalled", f"{rank} has given no sign of life for {now - silent.time:,.0f} s"
        else:
            state, detail = "running", holder.name
        return RunView(self.run.path, self.run.recipe, state, detail, stages, tuple(beats), self._troubles.look(), now)

    def _beats(self, now: float) -> list[Beat]:
        """Signs of life of the run that is on; files of earlier ones, with more ranks, are older than its lock."""
        try:
            begun = (self.run.path / LOCK).stat().st_mtime
        except OSError:
            return []
        return [beat for beat in read_all(self.run.path / LOGS) if beat.time > begun - SILENT]

    def _stages(self, beats: list[Beat], on: bool) -> tuple[StageView, ...]:
        views: list[StageView] = []
        waiting = False
        for index, spec in enumerate(self.run.recipe.stages):
            result = self._result(index)
            training = None if waiting else self._training(index)
            update = training.update if training else 0
            if result is not None:
                state = "finished" if result else "damaged"
            elif waiting:
                state = "waiting"
            else:
                begun = training is not None or self.run.is_begun(index)
                state = "running" if on else "stopped" if begun else "waiting"
                waiting = True
                if training:
                    update = max([update, *(beat.update for beat in beats if beat.phase != IDLE)])
            views.append(StageView(spec.name, state, training, update, result or {}))
        return tuple(views)

    def _result(self, index: int) -> dict[str, Any] | None:
        """A stage's result: None before there is one, empty where it is damaged."""
        try:
            return self.run.result(index)
        except ValueError as error:
            self._damage = self._damage or one_line(error)
            return {}
        except FileNotFoundError:  # gone since it was looked for
            return None
        except OSError as error:
            self._damage = self._damage or one_line(error)
            return {}

    def _training(self, index: int) -> Training | None:
        """The stage's newest training: rounds of a lottery and groups of ipq have folders of their own."""
        folder = self.run.stage_directory(index)
        files = [path for path in (folder / METRICS, *folder.glob(f"*/{METRICS}")) if path.is_file()]
        if not files:
            return None
        path = max(files, key=lambda path: (path.stat().st_mtime_ns, path))
        if path not in self._trainings:
            self._trainings[path] = Tail(path), Training(path.parent)
        tail, training = self._trainings[path]
        anew, lines = tail.read()
        config = training_of(self.run.recipe, index)
        if anew:
            training = Training(path.parent)
            self._trainings[path] = tail, training
        if config:
            training.max_update, training.best_by = config.max_update, config.best_by
        for line in lines:
            try:
                training.add(json.loads(line))
            except (ValueError, TypeError, AttributeError):
                continue  # a damaged line; `tenko run` and `tenko report` name it
        return training


def training_of(recipe: Recipe, index: int) -> TrainConfig | None:
    """The settings that a stage trains with; None where it does not train."""
    config: Any = recipe.stages[index].config
    if isinstance(config, LotteryConfig):
        before = [spec.config for spec in recipe.stages[:index]]
        return next((c for c in reversed(before) if isinstance(c, TrainConfig)), None)
    config = getattr(config, "train", config)
    return config if isinstance(config, TrainConfig) else None


def _silent(beats: list[Beat], training: Training | None, now: float) -> Beat | None:
    """The rank that has been silent for longest, if it should have moved on."""
    slow = 10 * ((training.seconds_an_update if training else None) or 0.0)
    # While one translates in a validation the others wait for it: somebody hangs when nobody moves.
    if any(now - beat.time < max(SILENT, slow) for beat in beats):
        return None
    return min((beat for beat in beats if beat.phase in WATCHED), key=lambda beat: beat.time, default=None)


@dataclass(frozen=True)
class Holder:
    """Who holds a run's lock, as far as this machine can tell."""

    name: str
    """For instance `process 4711 on node1`."""
    seen: bool
    """Whether the kernel of this machine knows the lock; otherwise it is another machine's, or it was killed."""


def lock_holder(path: Path) -> Holder | None:
    """Who runs a run directory; None where nobody does."""
    try:
        with open(path / LOCK, "rb") as file:
            text, found = file.read(256).decode(errors="replace"), os.fstat(file.fileno())
    except OSError:
        return None
    process, host, *_ = [*text.split(), "", ""]
    name = f"process {process}" + (f" on {host}" if host else "")
    device = f"{os.major(found.st_dev):02x}:{os.minor(found.st_dev):02x}:{found.st_ino}"
    try:
        locks = [line.split() for line in Path("/proc/locks").read_text().splitlines()]
        seen = any("FLOCK" in fields and device in fields for fields in locks)
    except OSError:
        seen = False
    if seen:
        return Holder(name, True)
    return Holder(name, False) if process and host != socket.gethostname() else None
