"""A day of faults in small: 2,000 updates on two workers, a fault every 200, held to the same run without any.

    python benchmarks/soak.py                    # a few minutes on two cores
    python benchmarks/soak.py --updates 600 --json soak.json

The faults take turns: kill -9 of a worker and of rank 0, a worker that hangs, a notice to stop (TERM), a worker whose
disk is full, a damaged newest checkpoint. torchrun starts the workers anew where it can; where the run ends, the same
command is given again. Counted are the updates done twice, the seconds until training goes on, and memory and open
files of the process that lives through it all and of the workers between faults. At the end weights are compared.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil

from tenko.launch import pulse
from tenko.launch.rundir import LOGS

SAVE_INTERVAL = 50
HANG_SECONDS = 10
PATIENCE = 240.0
"""Seconds within which a run must go on after a fault."""


@dataclass(kw_only=True)
class Fault:
    """One fault, and what came of it."""

    kind: str
    update: int
    """The last finished update when it struck."""
    went_on_from: int = 0
    """The update it went on from."""
    seconds: float = 0.0
    """Until training went beyond that update."""
    commands: int = 0
    """How often the command had to be given again."""


@dataclass(kw_only=True)
class Sizes:
    """Memory and open files, as (update, MB, files)."""

    parents: dict[int, list[tuple[int, float, int]]] = field(default_factory=dict)
    """By process id: the command is given again after some faults."""
    workers: list[tuple[int, float, int]] = field(default_factory=list)
    """Of rank 0; the update is counted from the last fault."""


class Run:
    """A run that is given its command again whenever it ends early."""

    def __init__(self, directory: Path, updates: int, *, restarts: int) -> None:
        self.directory, self.updates = directory, updates
        self.command = [sys.executable, "-m", "tenko.launch.cli", "run", "tiny", f"train.max_update={updates}"]
        self.command += [f"train.save_interval={SAVE_INTERVAL}", "train.valid_interval=200", "train.log_interval=50"]
        self.command += ["train.update_freq=2", f"hang_timeout={HANG_SECONDS}"]
        self.command += ["--run-dir", str(directory), "--max-restarts", str(restarts)]
        self.commands = 0
        self.log = (directory.parent / f"{directory.name}.log").open("ab")
        self.process = self.start()

    def start(self) -> subprocess.Popen[bytes]:
        """Give the command."""
        self.commands += 1
        return subprocess.Popen(self.command, stdout=self.log, stderr=self.log, stdin=subprocess.DEVNULL)

    def beats(self) -> list[pulse.Beat]:
        """Of the ranks that live."""
        return [beat for beat in pulse.read_all(self.directory / LOGS) if psutil.pid_exists(beat.pid)]

    def update(self) -> int:
        """The last update that both ranks have finished in a training, 0 before."""
        beats = [beat for beat in self.beats() if beat.phase != pulse.IDLE]
        return min((beat.update for beat in beats), default=0) if len(beats) == 2 else 0

    def keep_going(self) -> None:
        """Give the command again if it ended; it fails hard if that does not help."""
        code = self.process.poll()
        if code is not None and code != 0:
            if self.commands > 100:
                raise RuntimeError(f"the run ends again and again; see {self.log.name}")
            self.process = self.start()

    def checkpoints(self) -> list[Path]:
        """Its training's checkpoints, oldest first."""
        return sorted(self.directory.glob("1-train/checkpoints/update-????????"))

    def digest(self) -> str:
        """SHA-256 of the trained artefact's weights."""
        return hashlib.sha256((self.directory / "1-train" / "artefact" / "model.safetensors").read_bytes()).hexdigest()


def kill(run: Run, rank: int) -> None:
    """kill -9 of a rank."""
    os.kill(next(beat.pid for beat in run.beats() if beat.rank == rank), signal.SIGKILL)


def hang(run: Run) -> None:
    """Rank 1 stands still, as in a driver that does not come back."""
    os.kill(next(beat.pid for beat in run.beats() if beat.rank == 1), signal.SIGSTOP)


def notice(run: Run) -> None:
    """What a cluster sends ahead of taking the machine."""
    run.process.send_signal(signal.SIGTERM)


def full_disk(run: Run) -> None:
    """Rank 0 can't write beyond some kB any more."""
    pid = next(beat.pid for beat in run.beats() if beat.rank == 0)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (20_000, 20_000))


def damage(run: Run) -> None:
    """The newest checkpoint loses its end, then a worker is killed."""
    weights = run.checkpoints()[-1] / "model.safetensors"
    os.truncate(weights, weights.stat().st_size // 2)
    kill(run, 1)


FAULTS: dict[str, Callable[[Run], None]] = {
    "kill -9 of rank 1": lambda run: kill(run, 1),
    "kill -9 of rank 0": lambda run: kill(run, 0),
    "rank 1 hangs": hang,
    "TERM": notice,
    "disk full on rank 0": full_disk,
    "newest checkpoint damaged, rank 1 killed": damage,
}


def strike(run: Run, kind: str) -> Fault:
    """Inject a fault and wait until training has gone on."""
    fault = Fault(kind=kind, update=run.update())
    commands, before = run.commands, {beat.pid for beat in run.beats()}
    began = time.monotonic()
    FAULTS[kind](run)
    while True:
        run.keep_going()
        beats = run.beats()
        if len(beats) == 2 and not before & {beat.pid for beat in beats} and run.update():
            fault.went_on_from = fault.went_on_from or run.update()
            if run.update() > fault.went_on_from:
                break
        if time.monotonic() - began > PATIENCE:
            raise RuntimeError(
                f"{kind} at update {fault.update}: no training within {PATIENCE:g} s; see {run.log.name}"
            )
        time.sleep(0.02)
    fault.seconds, fault.commands = time.monotonic() - began, run.commands - commands
    return fault


def measure(run: Run, sizes: Sizes, since: int) -> None:
    """Note memory and open files."""
    try:
        parent = psutil.Process(run.process.pid)
        rank0 = psutil.Process(next(beat.pid for beat in run.beats() if beat.rank == 0))
        update = run.update()
        sizes.parents.setdefault(parent.pid, []).append((update, parent.memory_info().rss / 1e6, parent.num_fds()))
        sizes.workers.append((update - since, rank0.memory_info().rss / 1e6, rank0.num_fds()))
    except (psutil.Error, StopIteration):
        pass  # between two lives


def soak(directory: Path, updates: int, every: int) -> tuple[Run, list[Fault], Sizes]:
    """The run with faults."""
    kinds = list(FAULTS)
    run, faults, sizes = Run(directory, updates, restarts=updates // every), list[Fault](), Sizes()
    since = 0
    for number, at in enumerate(range(every, updates, every)):
        measured = 0
        while run.update() < at:
            run.keep_going()
            if run.update() >= measured + 20:
                measured = run.update()
                measure(run, sizes, since)
            time.sleep(0.005)
        faults.append(strike(run, kinds[number % len(kinds)]))
        since = faults[-1].went_on_from
        print(f"{faults[-1].kind} at {faults[-1].update}: on from {since} after {faults[-1].seconds:.1f} s", flush=True)
    while run.process.wait() != 0:
        run.keep_going()
    return run, faults, sizes


def growth(samples: Sequence[tuple[int, float, int]], *, first: int, last: int) -> tuple[float, float]:
    """Medians late over early: of memory as a ratio, of open files as a difference."""
    early = [sample for sample in samples if sample[0] <= first]
    late = [sample for sample in samples if sample[0] >= last]
    memory = [statistics.median(s[1] for s in part) for part in (early, late)]
    files = [statistics.median(s[2] for s in part) for part in (early, late)]
    return memory[1] / memory[0], files[1] - files[0]


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=2000)
    parser.add_argument("--every", type=int, default=200, help="updates between faults")
    parser.add_argument("--json", type=Path, help="file for the figures")
    arguments = parser.parse_args()
    updates, every = arguments.updates, arguments.every
    with tempfile.TemporaryDirectory() as folder:
        whole = Run(Path(folder) / "whole", updates, restarts=0)
        if whole.process.wait():
            raise SystemExit(f"the run without faults failed; see {whole.log.name}")
        run, faults, sizes = soak(Path(folder) / "soak", updates, every)
        same = run.digest() == whole.digest()
    lost = [max(0, fault.update - fault.went_on_from) for fault in faults]
    memory, files = growth(sizes.workers, first=every // 2, last=every // 2)
    parent = max(sizes.parents.values(), key=len)
    parent_memory, parent_files = growth(parent, first=parent[len(parent) // 4][0], last=parent[-len(parent) // 4][0])
    figures: dict[str, Any] = {
        "updates": updates,
        "save_interval": SAVE_INTERVAL,
        "faults": [asdict(fault) for fault in faults],
        "weights_equal": same,
        "updates_done_twice_at_most": max(lost),
        "worker_memory_late_over_early": memory,
        "worker_files_late_minus_early": files,
        "parent_memory_late_over_early": parent_memory,
        "parent_files_late_minus_early": parent_files,
    }
    print("\n| fault | at update | goes on from | seconds | command again |\n|---|---|---|---|---|")
    for fault in faults:
        print(f"| {fault.kind} | {fault.update} | {fault.went_on_from} | {fault.seconds:.1f} | {fault.commands} |")
    print(f"\nweights equal to the run without faults: {'yes' if same else 'NO'}")
    print(f"updates done twice: at most {max(lost)} (a save every {SAVE_INTERVAL}; twice that where one was damaged)")
    print(f"rank 0, late over early in a life: memory x{memory:.3f}, open files {files:+g}")
    print(f"longest parent, last quarter over first: memory x{parent_memory:.3f}, open files {parent_files:+g}")
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")
    # Where the newest checkpoint is damaged, the one before is as old again.
    bound = [SAVE_INTERVAL * (2 if fault.kind.startswith("newest checkpoint damaged") else 1) for fault in faults]
    if files > 2 or parent_files > 2:
        return 1
    return 0 if same and all(count <= most for count, most in zip(lost, bound, strict=True)) else 1


if __name__ == "__main__":
    sys.exit(main())
