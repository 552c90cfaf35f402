"""A `tenko run` that is measured: done once in a folder of its own, and read back from there."""

from __future__ import annotations

import os
import resource
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from .errors import BAD_INPUT, RunFailed
from .metrics import read_metrics
from .recipe import load, to_dict
from .rundir import CONFIG, METRICS, RunDirectory, first_difference
from .spawn import raise_on_signals

_OTHERS = "cores that other programs kept busy meanwhile: "


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What a finished run came to."""

    name: str
    command: str
    """Makes this row alone."""
    precision: str
    workers: int
    updates: int
    tokens_per_update: float
    """Target tokens."""
    seconds: float
    """In updates; validations and checkpoints left out."""
    tokens_per_second: float
    """Target tokens, of all workers; the first line of metrics, which holds the warming up, left out."""
    valid_loss: float
    """Nats a target token, after the last update."""
    valid_bleu: float
    test_bleu: float
    others: float | None
    """Cores that other programs kept busy on average meanwhile; None where it was not the bench that ran it."""
    curve: tuple[tuple[float, float], ...]
    """Seconds in updates, and training loss (nats a token, not smoothed)."""


@dataclass(frozen=True)
class Run:
    """A run that is measured."""

    name: str
    recipe: str
    settings: tuple[str, ...]
    directory: Path
    nodes: int = 1

    def command(self) -> str:
        """What makes it alone."""
        where = ["--nodes", str(self.nodes), "--rendezvous", "HOST:PORT"] if self.nodes > 1 else []
        return shlex.join(["tenko", "run", self.recipe, *self.settings, "--run-dir", str(self.directory), *where])

    def finished(self) -> bool:
        """Whether this very run is done. A folder of another is left to `tenko run`, which says what differs."""
        if not (self.directory / CONFIG).exists():
            return False
        run = RunDirectory.read(self.directory)
        wanted = to_dict(load(self.recipe, self.settings))
        return first_difference(to_dict(run.recipe), wanted) is None and run.is_finished(0)

    def start(self, title: str) -> None:
        """Run it, or go on with it; what it says goes to a file beside its folder.

        Raises:
            RunFailed: it failed; the message is its last line.
        """
        print(f"{title}{self.command()}", flush=True)
        log = self._log()
        log.parent.mkdir(parents=True, exist_ok=True)
        arguments = ["run", self.recipe, *self.settings, "--run-dir", str(self.directory)]
        with open(log, "wb", buffering=0) as file, raise_on_signals():
            others = Others()
            command = [sys.executable, "-m", "tenko.launch.cli", *arguments]
            child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT)
            try:
                code = child.wait()
            except BaseException:  # a signal: the run saves what its own rules say and ends
                child.terminate()
                child.wait()
                raise
            file.seek(0, os.SEEK_END)
            file.write(f"{_OTHERS}{others.cores():.2f}\n".encode())
        if code:
            said = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[:-1] or ["it said nothing"]
            reason = said[-1].removeprefix("tenko: ").removeprefix("error: ")
            raise RunFailed(f"{self.name}: {reason}; all that it said is in {log}", code if code > 0 else BAD_INPUT)

    def measure(self) -> Measured:
        """The figures of the finished run."""
        run = RunDirectory.read(self.directory)
        result = run.result(0) or {}
        entries = read_metrics(run.stage_directory(0) / METRICS)
        train = [entry for entry in entries if entry["kind"] == "train"]
        valid = [entry for entry in entries if entry["kind"] == "valid"][-1]
        seconds = [0.0, *(entry["seconds"] for entry in train)]
        tokens = [
            e["tokens_per_second"] * (now - before) for e, before, now in zip(train, seconds, seconds[1:], strict=False)
        ]
        speed = sum(tokens[1:]) / (seconds[-1] - seconds[1]) if len(train) > 1 else train[0]["tokens_per_second"]
        return Measured(
            name=self.name,
            command=self.command(),
            precision=result["precision"],
            workers=run.recipe.workers * self.nodes,
            updates=result["updates"],
            tokens_per_update=sum(tokens) / result["updates"],
            seconds=result["train_seconds"],
            tokens_per_second=speed,
            valid_loss=valid["nll"],
            valid_bleu=valid["bleu"],
            test_bleu=result["bleu"],
            others=self._others(),
            curve=tuple((entry["seconds"], entry["nll"]) for entry in train),
        )

    def _log(self) -> Path:
        return self.directory.with_name(f"{self.directory.name}.log")

    def _others(self) -> float | None:
        try:
            line = self._log().read_text(encoding="utf-8", errors="replace").strip().rpartition("\n")[2]
        except OSError:
            return None
        return float(line.removeprefix(_OTHERS)) if line.startswith(_OTHERS) else None


class Others:
    """How much of the machine's processors others used since this was made: all that was used, less our children's."""

    def __init__(self) -> None:
        self._began, self._busy, self._ours = time.monotonic(), _busy_seconds(), _children_seconds()

    def cores(self) -> float:
        """On average; children that were not waited for count as others."""
        busy, ours = _busy_seconds() - self._busy, _children_seconds() - self._ours
        return max(0.0, busy - ours) / (time.monotonic() - self._began)


def _busy_seconds() -> float:
    user, nice, system, _idle, _iowait, *rest = map(int, Path("/proc/stat").read_text().split()[1:9])
    return (user + nice + system + sum(rest)) / os.sysconf("SC_CLK_TCK")


def _children_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
