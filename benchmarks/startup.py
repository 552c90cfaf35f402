"""From `tenko run` to the first update: seconds, warm files, and what of it is imports.

    python benchmarks/startup.py                       # 2 ranks, recipes/tiny.yaml, 5 times
    python benchmarks/startup.py --workers 4 --json startup.json

A first run, not counted, prepares the corpus and warms the files. The time is until all ranks have finished their first
update, by their signs of life; imports are those of a process alone on the machine. The limits that were set stand
beside the medians, as `wanted`.
"""

from __future__ import annotations

import argparse
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
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import option_types as types

from tenko.launch import pulse

RECIPE = Path(__file__).parents[1] / "recipes" / "tiny.yaml"
WANTED = {"imports of both": 6.0, "first update": 15.0}
"""Limits that were set before anything was measured: seconds, at most."""
LONG = ("train.max_update=100000", "train.save_interval=10", "train.valid_interval=100000", "train.log_interval=10")
"""A training that does not end by itself."""
IMPORTS = {
    "tenko run": "import tenko.launch.cli, tenko.launch.run_command, tenko.launch.agent",
    "worker": "import tenko.launch.worker, tenko.launch.stages, accelerate",
}


def start(run_dir: Path, *arguments: str) -> subprocess.Popen[str]:
    """`tenko run tiny` on a run directory; arguments are settings and options."""
    command = [sys.executable, "-m", "tenko.launch.cli", "run", str(RECIPE), *LONG, *arguments]
    pipe = subprocess.PIPE
    return subprocess.Popen([*command, "--run-dir", str(run_dir)], text=True, stdout=subprocess.DEVNULL, stderr=pipe)


def wait(run_dir: Path, there: Callable[[Sequence[pulse.Beat]], bool], *processes: subprocess.Popen[str]) -> float:
    """The moment at which the ranks' beats are as wanted, in seconds since the epoch.

    Raises:
        RuntimeError: all processes have ended, or it took longer than five minutes.
    """
    deadline = time.time() + 300
    while not there(pulse.read_all(run_dir / "logs")):
        if all(process.poll() is not None for process in processes) or time.time() > deadline:
            said = [
                process.stderr.read() if process.poll() is not None and process.stderr else "" for process in processes
            ]
            raise RuntimeError(f"the run did not get there: {said}")
        time.sleep(0.01)
    return time.time()


def end(*processes: subprocess.Popen[str]) -> None:
    """Ctrl-C, and wait."""
    for process in processes:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
    for process in processes:
        process.communicate(timeout=60)


def first_update(workers: int) -> float:
    """Seconds from `tenko run` until all workers have made an update."""
    with tempfile.TemporaryDirectory() as folder:
        run_dir, began = Path(folder) / "run", time.time()
        process = start(run_dir, f"workers={workers}")
        try:
            there = wait(run_dir, lambda beats: len(beats) == workers and all(beat.update for beat in beats), process)
        finally:
            end(process)
        return there - began


def importing(code: str) -> tuple[float, float]:
    """Seconds of a Python that only imports, by the clock and of the processor."""
    began, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", code], check=True)
    seconds, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    return seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=types.integer(1), default=2)
    parser.add_argument("--times", type=types.integer(1), default=5)
    parser.add_argument("--json", type=types.new_file)
    options = parser.parse_args()
    first_update(options.workers)
    figures: dict[str, Any] = {"workers": options.workers, "cores": len(os.sched_getaffinity(0))}
    load = os.getloadavg()[0]
    for name, code in IMPORTS.items():
        found = [importing(code) for _ in range(options.times)]
        figures[f"imports of {name}"] = [seconds for seconds, _ in found]
        figures[f"imports of {name}, of the processor"] = [cpu for _, cpu in found]
    each = [figures[f"imports of {name}"] for name in IMPORTS]
    figures["imports of both"] = [sum(turn) for turn in zip(*each, strict=True)]
    figures["first update"] = [first_update(options.workers) for _ in range(options.times)]
    figures["load before"] = load
    print(f"{options.workers} ranks, {figures['cores']} cores, load before {load:.1f}\n")
    print("| seconds | wanted, at most | median | least | most |\n|---|---|---|---|---|")
    for name, found in figures.items():
        if isinstance(found, list):
            wanted = f"{WANTED[name]:.0f}" if name in WANTED else ""
            print(f"| {name} | {wanted} | {statistics.median(found):.1f} | {min(found):.1f} | {max(found):.1f} |")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
