"""Who a process is, from the launchers' variables; ranks that agree on when to stop; signs of life."""

from __future__ import annotations

import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.distributed import HashStore

from tenko.launch import pulse
from tenko.launch.notice import Notice
from tenko.launch.pulse import Pulse
from tenko.launch.world import World, address_of, interface_to, interfaces

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "GROUP_RANK": "1",
    "GROUP_WORLD_SIZE": "2",
    "TORCHELASTIC_RESTART_COUNT": "3",
    "TORCHELASTIC_RUN_ID": "x",
}


def test_torchruns_variables_come_before_those_of_the_step_it_runs_in() -> None:
    slurm = {"SLURM_STEP_ID": "0", "SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2"}
    world = World.detect({**TORCHRUN, **slurm})
    assert world == World(launcher="torchrun", rank=5, size=8, local_rank=1, local_size=4, node=1, nodes=2, restart=3)


@pytest.mark.parametrize("name", ["OMPI_COMM_WORLD_RANK", "MPI_LOCALRANKID"])
def test_mpiruns_ranks_are_not_taken_for_tasks_of_the_step_that_its_daemons_run_in(name: str) -> None:
    slurm = {"SLURM_STEP_ID": "0", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2"}
    assert World.detect({**slurm, name: "3"}).launcher == "mpirun"


def test_a_process_that_nobody_launched_is_alone() -> None:
    assert World.detect({}) == World()
    environ: dict[str, str] = {}
    World().export(environ)
    assert environ == {}


def test_the_world_of_other_launchers_is_exported_as_torchruns() -> None:
    world = World(launcher="mpirun", rank=2, size=4, local_rank=0, local_size=2, node=1, nodes=2)
    environ: dict[str, str] = {}
    world.export(environ)
    again = World.detect(environ)
    assert (again.rank, again.size, again.local_rank, again.local_size, again.node) == (2, 4, 0, 2, 1)


@pytest.mark.parametrize(("name", "text"), [("RANK", "x"), ("WORLD_SIZE", "")])
def test_a_variable_that_is_no_number_is_named(name: str, text: str) -> None:
    with pytest.raises(ValueError, match=f"{name}: must be a whole number"):
        World.detect({**TORCHRUN, name: text})


def test_the_interface_to_this_machine_is_loopback_and_a_strange_one_is_refused() -> None:
    assert interface_to("127.0.0.1") == ("lo", "127.0.0.1")
    assert interfaces()["lo"] == "127.0.0.1" == address_of("lo")
    with pytest.raises(ValueError, match=r"--interface: no0: .*valid: .*lo \(127\.0\.0\.1\)"):
        address_of("no0")
    with pytest.raises(ValueError, match=r"TENKO_INTERFACE: no0: "):
        address_of("no0", "TENKO_INTERFACE")
    with pytest.raises(ValueError, match=r"nowhere\.invalid: this name does not resolve"):
        interface_to("nowhere.invalid")


@settings(max_examples=200, deadline=None)
@given(
    ranks=st.integers(1, 5),
    signals=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 60)), min_size=1, max_size=5),
    seed=st.integers(0, 2**32 - 1),
    ahead=st.integers(0, 3),
)
@example(ranks=2, signals=[(0, 30), (1, 34)], seed=47915, ahead=1)
def test_all_ranks_stop_after_the_same_update_whenever_whoever_is_told(
    ranks: int, signals: list[tuple[int, int]], seed: int, ahead: int
) -> None:
    """Ranks take turns at random; one can end an update only when all have begun it, as an exchange makes it, or are at
    most `ahead` updates behind, as an asynchronous server makes it."""
    store = HashStore()
    notices = [Notice(store) for _ in range(ranks)]
    for notice in notices:
        notice.begin(ahead=ahead)
    begun, ended, stopped = [0] * ranks, [0] * ranks, [0] * ranks
    order = random.Random(seed)
    told = 0
    for turn in range(10_000):
        for rank, when in signals:
            if when == turn:
                notices[rank % ranks].signal = signal.SIGUSR1
                told = told or max(begun)
        if all(stopped):
            break
        rank = order.choice([r for r in range(ranks) if not stopped[r]])
        if begun[rank] == ended[rank]:
            begun[rank] += 1
        elif min(begun) >= begun[rank] - ahead:
            ended[rank] = begun[rank]
            if notices[rank].due(ended[rank]):
                stopped[rank] = ended[rank]
    assert len(set(stopped)) == 1
    # The first that was told may end one update more before it can tell; another, also told, may be `ahead` of it by
    # then, tell first, and count on others that are as far ahead of itself.
    assert 0 < stopped[0] <= told + 2 + 2 * ahead, "soon after the first was told"


def test_a_notice_of_one_training_does_not_name_an_update_of_the_next() -> None:
    store = HashStore()
    told, other = Notice(store), Notice(store)
    for notice in (told, other):
        notice.begin()
    told.signal = signal.SIGUSR1
    assert not told.due(9)  # both go on to 10, which is the last of the training
    for notice in (told, other):
        notice.begin()
    assert not other.due(1)
    assert not told.due(1)
    assert told.due(2)
    assert other.due(2)


LISTENER = """
import os, sys, time
from tenko.launch.notice import Notice
notice = Notice()
training = sys.argv[1] == "training"
notice.listen(training=lambda: training, ends_at_once=os.getppid() if sys.argv[2] == "agent" else None)
print("ready", flush=True)
while notice.signal is None:
    time.sleep(0.01)
print("told", notice.signal.name, flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize(
    ("phase", "sender", "number", "told"),
    [
        ("training", "other", signal.SIGTERM, True),
        ("training", "other", signal.SIGUSR1, True),
        ("training", "agent", signal.SIGUSR1, True),
        ("training", "agent", signal.SIGTERM, False),
        ("idle", "other", signal.SIGUSR1, False),
        ("idle", "other", signal.SIGTERM, False),
    ],
)
def test_a_signal_is_a_notice_in_a_training_unless_torchruns_agent_ends_the_worker(
    phase: str, sender: str, number: int, told: bool
) -> None:
    command = [sys.executable, "-c", LISTENER, phase, sender]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        if told:
            assert process.stdout.readline() == f"told {signal.Signals(number).name}\n"
            process.kill()
        else:
            assert process.wait(timeout=30) == -number


def test_a_pulse_reads_back_and_one_that_is_damaged_is_none(tmp_path: Path) -> None:
    before = time.time()
    beating = Pulse(pulse.path_of(tmp_path, 3), rank=3, node=1)
    assert not beating.training
    beating.phase(pulse.UPDATE)
    beating.update(123_456_789)
    beating.update(7)  # shorter than the line before
    (beat,) = pulse.read_all(tmp_path)
    assert (beat.rank, beat.node, beat.phase, beat.update, beat.host) == (3, 1, "update", 7, socket.gethostname()[:80])
    assert before <= beat.time <= time.time()
    assert beating.training
    count = beat.beats
    beating.phase(pulse.IDLE)
    assert pulse.read_all(tmp_path)[0].beats == count + 1
    beating.close()
    pulse.path_of(tmp_path, 4).write_bytes(b'{"rank": 4, "no')
    assert [beat.rank for beat in pulse.read_all(tmp_path)] == [3]
