"""From a fault to training again: seconds, and updates that are made twice.

    python benchmarks/faults.py                  # 4 ranks of recipes/tiny.yaml on one machine, each fault 3 times
    python benchmarks/faults.py --hosts          # and on two hosts of the network lab (root, iproute2)
    python benchmarks/faults.py --json faults.json

A fault is over when every rank that there is then, each a new process, has finished an update. `hang_timeout` is 10 s.
The limit that was set for kill -9 of a worker stands beside the seconds, as `wanted`; the others have none.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import option_types as types
from lab import Lab, missing
from startup import LONG, RECIPE, end, start, wait

from tenko.launch import pulse

PORT = 29640
Fault = Callable[[list[pulse.Beat]], None]
SETTINGS = ("hang_timeout=10",)
WANTED = 30
"""Seconds from kill -9 of a worker to training again, at most: set before anything was measured."""


def recover(run_dir: Path, fault: Fault, ranks: int, *processes: subprocess.Popen[str]) -> tuple[float, int]:
    """Seconds from the fault until `ranks` new workers train, and the updates that they make again.

    The fault comes later in the training than the one before: what fails at the same update twice is not tried again.
    """
    beats = pulse.read_all(run_dir / "logs")
    after = 12 + max((beat.update for beat in beats), default=0)
    wait(run_dir, lambda beats: len(beats) >= ranks and min(beat.update for beat in beats) > after, *processes)
    before = pulse.read_all(run_dir / "logs")
    old = {beat.pid for beat in before}
    reached, began = max(beat.update for beat in before), time.time()
    fault(before)
    first: dict[int, int] = {}

    def again(beats: Any) -> bool:
        fresh = [beat for beat in beats if beat.pid not in old]
        for beat in fresh:
            first.setdefault(beat.pid, beat.update)
        trained = [beat for beat in fresh if beat.phase == pulse.UPDATE and beat.update > max(first[beat.pid], 1)]
        return len(trained) >= ranks

    seconds = wait(run_dir, again, *processes) - began
    newest = max((run_dir / "1-train" / "checkpoints").glob("update-*"))
    return seconds, max(0, reached - min(int(newest.name[7:]), reached))


def on_one_machine(ranks: int, times: int) -> dict[str, list[tuple[float, int]]]:
    """Faults of single workers."""

    def kill(rank: int, number: int) -> Fault:
        return lambda beats: os.kill(next(beat.pid for beat in beats if beat.rank == rank), number)

    faults = {
        "kill -9 of a worker": (kill(1, signal.SIGKILL), str(WANTED)),
        "kill -9 of rank 0": (kill(0, signal.SIGKILL), str(WANTED)),
        "a worker hangs (SIGSTOP)": (kill(1, signal.SIGSTOP), ""),
    }
    found: dict[str, list[tuple[float, int]]] = {}
    for name, (fault, wanted) in faults.items():
        with tempfile.TemporaryDirectory() as folder:
            run_dir = Path(folder) / "run"
            process = start(run_dir, f"workers={ranks}", *SETTINGS, "--max-restarts", str(times))
            try:
                found[name] = [recover(run_dir, fault, ranks, process) for _ in range(times)]
            finally:
                end(process)
        print(f"| {name} | {wanted} | {_row(found[name])} |", flush=True)
    return found


def on_two_hosts(times: int) -> dict[str, list[tuple[float, int]]]:
    """A node is lost: two ranks of four are left."""
    found: dict[str, list[tuple[float, int]]] = {}
    for name in ("kill -9 of a node's agent", "a node is cut off"):
        found[name] = []
        for _ in range(times):
            with Lab(2) as lab, tempfile.TemporaryDirectory() as folder:
                run_dir = Path(folder) / "run"
                nodes = [_on_host(lab, host, run_dir) for host in range(2)]

                def fault(beats: list[pulse.Beat], lab: Lab = lab, cut: bool = "cut" in name) -> None:
                    if cut:
                        lab.cut(1)
                        return
                    worker = next(beat.pid for beat in beats if beat.node == 1)
                    parent = int(Path(f"/proc/{worker}/stat").read_text().rpartition(")")[2].split()[1])
                    os.kill(parent, signal.SIGKILL)

                wait(run_dir, lambda beats: len(beats) == 4 and min(beat.update for beat in beats) > 12, *nodes)
                found[name].append(recover(run_dir, fault, 2, nodes[0]))
                end(*nodes)
        print(f"| {name} | | {_row(found[name])} |", flush=True)
    return found


def _on_host(lab: Lab, host: int, run_dir: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tenko.launch.cli", "run", str(RECIPE), *LONG, *SETTINGS, "workers=2"]
    command += ["--run-dir", str(run_dir), "--nodes", "1:2", "--rendezvous", f"{lab.address(0)}:{PORT}"]
    kept = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "GLOO_SOCKET_IFNAME")}
    inside = ["nsenter", f"--net=/run/netns/{lab.name(host)}"]
    return subprocess.Popen([*inside, *command], env=kept, text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def _row(found: list[tuple[float, int]]) -> str:
    seconds = [time for time, _ in found]
    return f"{statistics.median(seconds):.1f} | {max(seconds):.1f} | {max(lost for _, lost in found)}"


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=types.integer(2), default=4)
    parser.add_argument("--times", type=types.integer(1), default=3)
    parser.add_argument("--hosts", action="store_true")
    parser.add_argument("--json", type=types.new_file)
    options = parser.parse_args()
    if options.hosts and (why := missing()) is not None:
        print(f"faults: {why}", file=sys.stderr)
        return 2
    load, cores = os.getloadavg()[0], len(os.sched_getaffinity(0))
    print(f"{options.ranks} ranks, {cores} cores, load before {load:.1f}\n")
    seconds = "wanted, at most | seconds to training again, median | most"
    print(f"| fault | {seconds} | updates made twice, most |\n|---|---|---|---|---|")
    found = on_one_machine(options.ranks, options.times)
    if options.hosts:
        found |= on_two_hosts(options.times)
    if options.json:
        figures = {"ranks": options.ranks, "cores": cores, "load before": load, "faults": found}
        options.json.write_text(json.dumps(figures, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
