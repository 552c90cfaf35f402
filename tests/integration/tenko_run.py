"""`tenko` as a user starts it, on recipes/tiny.yaml and the session's small corpus; for the tests of whole runs."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RECIPE = Path(__file__).parents[2] / "recipes" / "tiny.yaml"
WHOLE = {
    "train.max_update": "120",
    "train.update_freq": "2",
    "train.save_interval": "20",
    "train.valid_interval": "60",
    "train.log_interval": "20",
    "train.valid_sentences": "4",
    "train.max_tokens": "300",
}
"""Long enough to be cut at a checkpoint or two, with accumulation and dropout on."""


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    code: int
    out: str
    errors: list[str]


def environment() -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "TENKO_DEBUG")}
    return {**kept, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "CUDA_VISIBLE_DEVICES": ""}


def start(*arguments: str | Path, largest_file: int | None = None) -> subprocess.Popen[bytes]:
    """`tenko ARGUMENTS`; with `largest_file` no file may grow beyond so many bytes, as if the disk were full."""
    limit: Callable[[], None] | None = None
    if largest_file is not None:
        size = largest_file

        def limit() -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    command = [sys.executable, "-m", "tenko.launch.cli", *map(str, arguments)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=environment(), stdin=pipe, stdout=pipe, stderr=pipe, preexec_fn=limit)


def finish(process: subprocess.Popen[bytes], stdin: bytes = b"") -> Done:
    out, errors = process.communicate(stdin, timeout=180)
    return Done(process.returncode, out.decode(), errors.decode().splitlines())


def tenko(*arguments: str | Path, stdin: bytes = b"") -> Done:
    return finish(start(*arguments), stdin)


def run_arguments(directory: Path, tsv: Path, **settings: str) -> list[str | Path]:
    """`run tiny.yaml KEY=VALUE ... --run-dir DIRECTORY` on the corpus that the session has prepared already."""
    data = {
        "data.train": str(tsv),
        "data.cache": str(tsv.parent / "cache"),
        "data.valid_size": "20",
        "data.test_size": "20",
        "data.vocab_size": "300",
        "data.max_tokens_per_sentence": "128",
    }
    overrides = [f"{key}={value}" for key, value in {**data, **settings}.items()]
    return ["run", RECIPE, *overrides, "--run-dir", directory]


def result(directory: Path, stage: str) -> dict[str, Any]:
    return json.loads((directory / stage / "result.json").read_text(encoding="utf-8"))


def workers(directory: Path) -> list[int]:
    """Processes that run on this run directory, by their command lines; zombies left out."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                command = (entry / "cmdline").read_bytes()
                state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
            except OSError:
                continue
            if str(directory).encode() in command.split(b"\0") and state not in "ZX":
                found.append((b"tenko.launch.worker" in command, int(entry.name)))
    return [pid for is_worker, pid in found if is_worker]


def all_gone(directory: Path) -> bool:
    """Whether no worker of the run is left, after a moment to end."""
    deadline = time.monotonic() + 3
    while workers(directory):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def wait_for_checkpoint(process: subprocess.Popen[bytes], directory: Path, after: int = 0) -> int:
    """Wait until a run has written a checkpoint later than `after`; its update."""
    deadline = time.monotonic() + 90
    while True:
        done = [int(path.name[7:]) for path in directory.glob("1-train/checkpoints/update-????????")]
        if done and max(done) > after:
            return max(done)
        assert process.poll() is None, finish(process)
        assert time.monotonic() < deadline
        time.sleep(0.01)
