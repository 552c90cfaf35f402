"""`tenko run` with the workers of `elastic_worker.py`: start, watch, tell how it ended."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tenko.launch import pulse

HERE = Path(__file__).parent
DRIVER = """
import functools, os
from elastic_worker import RUNNERS
from tenko.launch import cli, job, run_command, worker
if "NODE_CODE" in os.environ:
    job.code_digest = lambda: os.environ["NODE_CODE"]
worker.run_stages = functools.partial(worker.run_stages, runners=RUNNERS)
run_command.run_workers = functools.partial(run_command.run_workers, module="elastic_worker")
cli.main()
"""
UPDATES = 20


@dataclass
class Ended:
    """How a node's command ended."""

    code: int
    out: str
    errors: list[str]


@dataclass
class Run:
    """A run directory and the commands that run on it."""

    folder: Path
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def directory(self) -> Path:
        return self.folder / "run"

    def command(self, *options: str, directory: Path | None = None, **settings: Any) -> list[str]:
        merged = {"train.max_update": UPDATES, "train.warmup_updates": 1, **self.settings, **settings}
        overrides = [f"{key}={value}" for key, value in merged.items()]
        run = [sys.executable, "-c", DRIVER, "run", str(HERE.parents[1] / "recipes" / "tiny.yaml"), *overrides]
        return [*run, "--run-dir", str(directory or self.directory), *options]

    def environment(self, fault: str = "", **more: str) -> dict[str, str]:
        kept = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "TENKO_DEBUG")}
        path = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])
        return {**kept, "PYTHONPATH": path, "FAULT": fault, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **more}

    def start(
        self, *options: str, fault: str = "", directory: Path | None = None, **more: Any
    ) -> subprocess.Popen[str]:
        """`tenko run`; lower-case `more` are settings with __ for a dot, upper-case ones environment variables."""
        environment = {key: str(value) for key, value in more.items() if key.isupper()}
        settings = {key.replace("__", "."): value for key, value in more.items() if not key.isupper()}
        return subprocess.Popen(
            self.command(*options, directory=directory, **settings),
            cwd=self.folder,
            env=self.environment(fault, **environment),
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def result(self) -> dict[str, Any]:
        return json.loads((self.directory / "1-train" / "result.json").read_text(encoding="utf-8"))

    def log(self, name: str) -> str:
        return (self.directory / "logs" / name).read_text(encoding="utf-8", errors="replace")

    def beats(self) -> list[pulse.Beat]:
        return pulse.read_all(self.directory / "logs")

    def wait_for(self, update: int, *processes: subprocess.Popen[str]) -> list[pulse.Beat]:
        """Until all ranks have made so many updates."""
        return self.until(lambda beats: bool(beats) and min(beat.update for beat in beats) >= update, *processes)

    def until(
        self, there: Callable[[list[pulse.Beat]], bool], *processes: subprocess.Popen[str], seconds: float = 90
    ) -> list[pulse.Beat]:
        deadline = time.monotonic() + seconds
        while not there(self.beats()):
            for process in processes:
                assert process.poll() is None, finish(process)
            assert time.monotonic() < deadline, self.beats()
            time.sleep(0.05)
        return self.beats()


def finish(process: subprocess.Popen[str], seconds: float = 120) -> Ended:
    out, errors = process.communicate(timeout=seconds)
    return Ended(process.returncode, out, errors.splitlines())


def expected(updates: int = UPDATES) -> float:
    """The weights that every run ends with."""
    weights = 0.0
    for update in range(1, updates + 1):
        weights = (weights * 31 + sum((item + 1) * update % 7 for item in range(12))) % 1_000_003
    return weights
