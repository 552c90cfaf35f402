"""Dedicated servers in real MPI jobs of 3 workers and 2 servers; what the workers do stands in `mpi_worker.py`."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from processes import MPIRUN, needs_mpi

from tenko.comm.mpi_link import HEADER
from tenko.comm.server_config import Plan, ServerConfig, Tensors

WORKER = Path(__file__).with_name("mpi_worker.py")
pytestmark = needs_mpi
PRESENT = ["embedding.weight", "hidden.weight", "hidden.bias", "norm.weight", "norm.bias", "out.weight", "out.bias"]
TENSORS = Tensors(  # as named_parameters gives them, without the frozen ones
    (
        "never",
        "sometimes",
        "embedding.weight",
        "hidden.weight",
        "hidden.bias",
        "norm.weight",
        "norm.bias",
        "out.weight",
        "out.bias",
    ),
    (210, 1505, 703, 5719, 301, 301, 301, 301, 1),
    (3, 301, 19, 19, 0, 0, 0, 301, 0),
)


def start(scenario: str, folder: Path, *more: str, workers: int = 3, servers: int = 2) -> subprocess.Popen[str]:
    # sm: shared memory; no rank opens a port.
    options = ["--allow-run-as-root", "--oversubscribe", "--bind-to", "none", "--mca", "pml", "ob1"]
    options += ["--mca", "btl", "self,sm"]
    worker = ["-n", str(workers), sys.executable, str(WORKER), scenario, str(folder), *more]
    server = ["-n", str(servers), sys.executable, "-m", "tenko.comm.dedicated"]
    return subprocess.Popen(
        [str(MPIRUN), *options, *worker, ":", *server],
        env={**os.environ, "OMP_NUM_THREADS": "1", "NO_COLOR": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(job: subprocess.Popen[str]) -> tuple[int, str]:
    try:
        out, _ = job.communicate(timeout=400)
    except subprocess.TimeoutExpired:
        job.kill()
        raise
    return job.returncode, out


def run(scenario: str, folder: Path, *more: str, workers: int = 3, servers: int = 2) -> list[Any]:
    """What the workers wrote, of a job that must succeed."""
    code, out = finish(start(scenario, folder, *more, workers=workers, servers=servers))
    assert code == 0, out[-4000:]
    return [json.loads((folder / f"worker-{i}.json").read_text()) for i in range(workers)]


def servers_of(job: subprocess.Popen[str]) -> list[psutil.Process]:
    found = [p for p in psutil.Process(job.pid).children(recursive=True) if "tenko.comm.dedicated" in p.cmdline()]
    return sorted(found, key=lambda p: int(p.environ()["OMPI_COMM_WORLD_RANK"]))


def wait_until_update(job: subprocess.Popen[str], folder: Path, update: int) -> None:
    deadline = time.monotonic() + 300
    while not (folder / "at-0").exists() or int((folder / "at-0").read_text() or 0) < update:
        assert job.poll() is None, finish(job)
        assert time.monotonic() < deadline
        time.sleep(0.02)


def all_end(processes: list[psutil.Process]) -> bool:
    _, alive = psutil.wait_procs(processes, timeout=15)
    return not alive


@pytest.fixture(scope="module")
def notes(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    folder = tmp_path_factory.mktemp("sync")
    (folder / "file").touch()
    return run("sync", folder)


def test_workers_hold_the_same_bits_and_skip_together(notes: list[Any]) -> None:
    for other in notes[1:]:
        assert other["digests"] == notes[0]["digests"]
        assert other["skipped"] == notes[0]["skipped"]
    digests, skipped = notes[0]["digests"], notes[0]["skipped"]
    assert skipped == [i == 4 for i in range(12)], "worker 1's gradient is infinite in the 5th"
    assert [a == b for a, b in itertools.pairwise(digests)] == skipped
    still = {"never", "frozen.weight", "frozen.bias"}
    assert {name for name, moved in notes[0]["moved"].items() if not moved} == still
    assert not any(note["nan"] for note in notes)


def test_meter_counts_what_a_push_and_a_pull_are(notes: list[Any]) -> None:
    plan = Plan(ServerConfig(bits=3), TENSORS, 2)

    def push(update: int) -> int:
        names = PRESENT + (["sometimes"] if update % 2 == 0 else [])
        present = np.array([name in names for name in TENSORS.names])
        return sum(HEADER + plan.push_size(server, present) for server in range(2))

    whole = sum(map(push, range(1, 13)))
    assert notes[0]["meter"]["up_bytes"] == whole
    assert notes[1]["meter"]["up_bytes"] == whole - push(5) + 2 * HEADER, "no codes of a gradient that is not finite"
    assert notes[0]["meter"]["updates"] == 12
    down = {note["meter"]["down_bytes"] for note in notes}
    assert len(down) == 1
    vectors = sum(n for n, row in zip(TENSORS.numels, TENSORS.rows, strict=True) if not row)
    weights = 4 * vectors + (TENSORS.numel - vectors) // 2
    assert 12 * weights < down.pop() < 12 * 1.15 * weights + 26 * HEADER, "11 updates and the first pull"


def test_fine_gradients_follow_plain_training_with_clipping_and_token_weights(tmp_path: Path) -> None:
    notes = run("plain", tmp_path)
    assert notes[0]["off"] < 0.005, "square of the distance from AdamW's weights, over that of the way"
    assert notes[0]["clipped"] > 10
    assert notes[1]["digests"] == notes[0]["digests"]


def test_asynchronous_workers_stay_within_the_staleness(tmp_path: Path) -> None:
    notes = run("stale", tmp_path)
    assert [sum(note["skipped"]) for note in notes] == [0, 0, 1], "only the worker whose gradient was infinite"
    ahead = []
    for fast in notes[1:]:
        for count, (_, done) in enumerate(fast["times"], start=1):
            slowest = sum(begun < done for begun, _ in notes[0]["times"])
            ahead.append(count - slowest)
    assert max(ahead) <= 2
    assert max(ahead) >= 1, "they do run ahead"
    for note in notes:
        assert np.mean(note["losses"][-10:]) < 0.7 * np.mean(note["losses"][:5])


@pytest.fixture(scope="module")
def uncut(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("uncut")
    run("resume", folder)
    return folder


def test_killed_server_ends_the_job_and_a_second_start_equals_the_uncut_run(uncut: Path, tmp_path: Path) -> None:
    (tmp_path / "slowly").touch()
    job = start("resume", tmp_path)
    wait_until_update(job, tmp_path, 10)
    processes = psutil.Process(job.pid).children(recursive=True)
    servers_of(job)[1].kill()
    code, out = finish(job)
    assert code != 0
    assert "signal 9" in out.lower(), out[-2000:]
    assert all_end(processes)
    (tmp_path / "slowly").unlink()
    saved = sorted(path.name for path in (tmp_path / "state").iterdir() if (path / "complete.json").exists())
    assert saved[-1] in ("update-00000008", "update-00000012")
    again = run("resume", tmp_path)
    whole = [json.loads((uncut / f"worker-{i}.json").read_text()) for i in range(3)]
    for a, b in zip(again, whole, strict=True):
        assert a["resumed"] == int(saved[-1].split("-")[1])
        assert a["digests"][1:] == b["digests"][1 + a["resumed"] :]
        assert a["meter"]["up_bytes"] == b["meter"]["up_bytes"]
        assert a["meter"]["updates"] == 20
    assert len(list((tmp_path / "state").iterdir())) == 2, "older ones are deleted"


def test_state_of_another_number_of_workers_is_refused(uncut: Path) -> None:
    code, out = finish(start("resume", uncut, workers=2))
    assert code != 0
    assert "saved by 3 workers and 2 servers, but these are 2 and 2" in out, out[-3000:]


def test_hanging_server_is_named_and_no_process_stays(tmp_path: Path) -> None:
    (tmp_path / "slowly").touch()
    job = start("resume", tmp_path, "8")
    wait_until_update(job, tmp_path, 2)
    processes = psutil.Process(job.pid).children(recursive=True)
    servers_of(job)[1].send_signal(signal.SIGSTOP)
    code, out = finish(job)
    assert code != 0
    assert "server 1 of 2 (rank 4) said nothing for 8 s; it is dead or hangs" in out, out[-3000:]
    assert "server 0 of 2" not in out, "the other one lives"
    assert all_end(processes)


@pytest.mark.parametrize(
    ("scenario", "code", "message"),
    [
        ("wrong", 1, "ValueError: bits: must be one of 1, 2, 3, 4, 5, 6, 7, 8, is 9"),
        ("disagree", 2, "bits: worker 0 of 3 (rank 0) has 3, worker 2 of 3 (rank 2) 4"),
        ("diverge", 2, "workers wait for each other: worker 0 of 3 (rank 0) save, worker 1 of 3 (rank 1) push"),
    ],
)
def test_what_is_wrong_ends_the_job_with_its_reason(tmp_path: Path, scenario: str, code: int, message: str) -> None:
    ended, out = finish(start(scenario, tmp_path))
    assert message in out, out[-3000:]
    assert ended == code


def test_failed_save_is_told_to_all_and_training_goes_on(notes: list[Any]) -> None:
    assert all("Not a directory" in note["error"] for note in notes)
    assert all(len(note["losses"]) == 12 for note in notes)


def test_more_servers_than_spans(tmp_path: Path) -> None:
    notes = run("tiny", tmp_path, workers=2, servers=3)
    for before, after in notes:
        assert before == [0.0] * 5, "worker 0's"
        np.testing.assert_allclose(after, -0.1, rtol=1e-5)


def test_no_servers_is_said(tmp_path: Path) -> None:
    code = subprocess.run(
        [sys.executable, str(WORKER), "sync", str(tmp_path)], capture_output=True, text=True, timeout=200
    )
    assert code.returncode != 0
    assert "1 workers and 0 servers; start both: mpirun -n W" in code.stderr
