"""The watchdog on real processes that only show signs of life: whom it leaves alone, and whom it names."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from tenko.launch import pulse
from tenko.launch.failures import read, reserve
from tenko.launch.watchdog import Crew, Watchdog

WORKER = """
import os, signal, sys, time
from pathlib import Path
from tenko.launch import pulse
from tenko.launch.spawn import show_stacks_on_request

rank, seconds, folder = int(sys.argv[1]), float(sys.argv[2]), Path(sys.argv[3])
show_stacks_on_request()
beats = pulse.Pulse(pulse.path_of(folder, rank), rank=rank)
beats.update(41)
beats.phase(sys.argv[4])
until = time.monotonic() + seconds
while time.monotonic() < until:
    beats.phase(sys.argv[4])
    time.sleep(0.1)
if rank:
    os.kill(os.getpid(), signal.SIGSTOP)
time.sleep(60)
"""
TIMEOUT = 2.0


def workers(tmp_path: Path, phase: str, seconds: float) -> list[subprocess.Popen[bytes]]:
    """Rank 0 waits as if in a collective from the beginning; rank 1 beats for so long, then hangs."""
    script = tmp_path / "torch" / "distributed" / "worker.py"
    script.parent.mkdir(parents=True)
    script.write_text(WORKER)
    started = []
    for rank in range(2):
        reserve(tmp_path, rank)
        log = (tmp_path / f"worker-{rank}.log").open("wb")
        command = [sys.executable, str(script), str(rank), str(seconds if rank else 0.0), str(tmp_path), phase]
        started.append(subprocess.Popen(command, stderr=log))
    deadline = time.monotonic() + 60
    while {beat.rank for beat in pulse.read_all(tmp_path) if beat.phase == phase} != {0, 1}:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return started


def test_in_a_validation_one_translates_while_others_wait_and_one_that_hangs_is_named(tmp_path: Path) -> None:
    processes = workers(tmp_path, pulse.VALIDATE, seconds=8.0)
    crew, began = Crew(), time.monotonic()
    crew.start({rank: process.pid for rank, process in enumerate(processes)})
    try:
        with Watchdog(crew, tmp_path, TIMEOUT, several=False):
            processes[1].wait(timeout=60)
            took = time.monotonic() - began
            crew.end()
        assert processes[1].returncode == -9
        assert processes[0].poll() is None, "it only waited"
        assert took > 7.0 + TIMEOUT - 1.0, "while rank 1 translated nobody hung"
        failure = read(tmp_path / "error-1.json")
        assert failure is not None
        assert failure.kind == "hung"
        assert f"worker 1 (process {processes[1].pid}) hangs after update 41, no progress for" in failure.message
        assert "(stopped by a signal)" in failure.message
        assert "worker.py" in (tmp_path / "worker-0.log").read_text(), "stacks of all are in their logs"
    finally:
        for process in processes:
            process.kill()


def test_outside_of_a_training_nobody_hangs(tmp_path: Path) -> None:
    processes = workers(tmp_path, pulse.IDLE, seconds=0.0)
    crew = Crew()
    crew.start({rank: process.pid for rank, process in enumerate(processes)})
    try:
        with Watchdog(crew, tmp_path, 0.5, several=False):
            time.sleep(3.0)
        assert [process.poll() for process in processes] == [None, None]
    finally:
        for process in processes:
            process.kill()
