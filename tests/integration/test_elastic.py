"""What befalls the workers of a run, and what becomes of it: real processes under `tenko run` on one machine.

Their training is the sum of `elastic_worker.py`, whose weights are the same for any number of ranks and however often
it was cut. Two nodes are two agents on this machine; on hosts of their own they are in test_elastic_nodes.py.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
from elastic_run import HERE, UPDATES, Run, expected, finish
from processes import alive
from torch.distributed import TCPStore

pytestmark = pytest.mark.torchrun
RANKS_FROM = re.compile(r"world (\d+) from (\d+)")


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def two_nodes(*more: str) -> list[str]:
    return ["--nodes", "2", "--rendezvous", f"127.0.0.1:{free_port()}", *more]


@pytest.mark.parametrize(("rank", "workers"), [(1, 4), (0, 2)])
def test_a_killed_worker_is_started_anew_from_the_last_checkpoint(run: Run, rank: int, workers: int) -> None:
    process = run.start("--max-restarts", "2", fault=f"kill:{rank}:7", workers=workers)
    done = finish(process)
    assert (done.code, done.errors) == (0, [])
    assert run.result()["weights"] == expected()
    assert RANKS_FROM.findall(done.out) == [(str(workers), "0"), (str(workers), "5")], "one save interval lost at most"
    assert re.search(rf"worker {rank} \(process \d+\) was ended by SIGKILL .*; starts anew \(1 of 2\)", done.out)
    kept = [path.name for path in (run.directory / "logs" / "earlier").iterdir()]
    assert f"worker-{(rank + 1) % 2}.1.log" in kept, "a start does not overwrite the log of the one before"
    assert not list((run.directory / "logs").glob("error-*"))


@pytest.mark.parametrize(
    ("fault", "code", "words", "starts"),
    [
        ("value:1:7", 2, r"data\.train: the corpus is empty; the same command goes on from update 5", 1),
        ("internal:1:7:always", 1, r"KeyError: 'a surprise'; traceback in .*worker-1\.log; as in the start before", 2),
    ],
)
def test_what_would_fail_again_is_not_tried_for_ever(run: Run, fault: str, code: int, words: str, starts: int) -> None:
    process = run.start("--max-restarts", "5", fault=fault)
    beats = run.wait_for(5, process)
    done = finish(process)
    assert done.code == code, done
    assert len(done.errors) == 1
    assert re.search(words, done.errors[0]), done.errors
    assert len(RANKS_FROM.findall(done.out)) == starts
    assert not alive([beat.pid for beat in beats + run.beats()])


def test_an_error_on_one_rank_is_said_first_and_ends_all_within_30_s(run: Run) -> None:
    process = run.start(fault="memory:1:7", workers=3)
    beats = run.until(lambda beats: len(beats) == 3 and (run.directory / "fault").exists(), process)
    before = time.monotonic()
    done = finish(process)
    assert time.monotonic() - before < 30
    assert done.code == 1
    assert re.search(r"^tenko: error: internal error: MemoryError: no room for the batch", done.errors[0])
    assert "starts anew" not in done.out, "on one node not unless asked to"
    assert not alive([beat.pid for beat in beats])


@pytest.mark.parametrize("fault", ["stop", "sleep"])
def test_a_worker_that_hangs_is_named_and_ended(run: Run, fault: str) -> None:
    done = finish(run.start("--max-restarts", "1", fault=f"{fault}:1:7", hang_timeout=5))
    assert (done.code, done.errors) == (0, [])
    assert run.result()["weights"] == expected()
    named = re.search(r"worker 1 \(process \d+\) hangs in update 7, no progress for \d+ s([^;]*); stacks in", done.out)
    assert named, done.out
    assert named[1] == (" (stopped by a signal)" if fault == "stop" else "")
    logs = [path.read_text(errors="replace") for path in (run.directory / "logs" / "earlier").iterdir()]
    assert any("most recent call first" in log and "all_reduce" in log for log in logs), "who waits"
    if fault == "sleep":
        assert any("most recent call first" in log and "in befall" in log for log in logs), "who hangs, and where"


def test_a_slow_worker_is_waited_for(run: Run) -> None:
    process = run.start(hang_timeout=6)
    victim = run.wait_for(1, process)[1].pid
    for _ in range(3):
        os.kill(victim, signal.SIGSTOP)
        time.sleep(1.0)
        os.kill(victim, signal.SIGCONT)
        time.sleep(0.2)
    done = finish(process)
    assert (done.code, done.errors) == (0, [])
    assert run.result()["weights"] == expected()
    assert len(RANKS_FROM.findall(done.out)) == 1


@pytest.mark.parametrize(
    ("number", "code", "to_all", "workers"),
    [("SIGUSR1", 75, False, 2), ("SIGTERM", 143, True, 2), ("SIGTERM", 143, False, 1)],
)
def test_a_notice_ends_the_update_saves_and_leaves(
    run: Run, number: str, code: int, to_all: bool, workers: int
) -> None:
    process = run.start(PACE="0.2", workers=workers)
    beats = run.wait_for(2, process)
    for pid in [beat.pid for beat in beats] if to_all else []:
        os.kill(pid, signal.Signals[number])  # as SLURM does: every process of the step
    process.send_signal(signal.Signals[number])
    done = finish(process)
    assert done.code == code, done
    assert len(done.errors) == 1
    said = re.fullmatch(
        r"tenko: stopped on notice, saved at update (\d+); the same command goes on from there", done.errors[0]
    )
    assert said, done.errors
    done = finish(run.start(workers=workers))
    assert (done.code, done.errors) == (0, [])
    assert RANKS_FROM.findall(done.out) == [(str(workers), said[1])]
    assert run.result()["weights"] == expected()


def test_a_second_sigterm_ends_at_once(run: Run) -> None:
    process = run.start(fault="wait:1:7", WAIT="60")
    beats = run.until(lambda beats: (run.directory / "fault").exists(), process)
    process.send_signal(signal.SIGTERM)
    time.sleep(1.5)
    assert process.poll() is None, "the update has not ended yet"
    process.send_signal(signal.SIGTERM)
    done = finish(process, seconds=15)
    assert done.code == 143
    assert len(done.errors) == 1
    assert not alive([beat.pid for beat in beats])


@pytest.mark.parametrize("workers", [1, 2])
def test_a_notice_outside_of_a_training_ends_at_once(run: Run, workers: int) -> None:
    process = run.start(workers=workers, IDLE="60")
    run.until(lambda beats: (run.directory / "idle").exists(), process)
    process.send_signal(signal.SIGUSR1)
    done = finish(process, seconds=15)
    assert done.code == 75
    assert done.errors == ["tenko: stopped on notice outside of a training; the same command goes on"]


def test_a_notice_while_a_node_waits_for_others_is_no_mistake_of_the_user(run: Run) -> None:
    """SLURM's notice may come seconds after the start; with 75 its script puts the job into the queue again."""
    port = free_port()
    process = run.start("--nodes", "2", "--rendezvous", f"127.0.0.1:{port}")
    store = TCPStore("127.0.0.1", port, wait_for_workers=False, timeout=timedelta(seconds=60))
    store.get("torch.rendezvous.tenko")  # comes when the node waits for the other one
    process.send_signal(signal.SIGUSR1)
    done = finish(process)
    assert (done.code, done.errors) == (
        75,
        ["tenko: stopped on notice outside of a training; the same command goes on"],
    )


def test_nodes_too_many_are_spares_and_their_end_is_not_the_runs(run: Run) -> None:
    """Of another recipe, noticed, interrupted; and of two that wait, one takes the place of a node that is lost."""
    options = two_nodes()
    first = run.start(*options, IDLE=90)
    wait_for_port(options[3])
    second = run.start(*options, IDLE=90)
    run.until(lambda beats: (run.directory / "idle").exists(), first, second)
    other, noticed, interrupted = run.start(*options, seed=7), run.start(*options), run.start(*options)
    older = run.start(*options, NODE_CODE="older")
    spares = [run.start(*options, IDLE=90) for _ in range(2)]
    host, port = options[3].split(":")
    store = TCPStore(host, int(port), wait_for_workers=False, timeout=timedelta(seconds=60))
    while store.add("tenko/came", 0) < 7:  # the host does not count
        assert noticed.poll() is None, finish(noticed)
        time.sleep(0.1)
    time.sleep(3)  # until they have met, too
    noticed.send_signal(signal.SIGUSR1)
    interrupted.send_signal(signal.SIGINT)
    for process, code, words in (
        (interrupted, 130, ".*"),
        (other, 2, r"error: seed: \S+ was started with 7, \S+ with 1; give all nodes the same"),
        (older, 2, r"error: \S+ runs tenko older, \S+ [0-9a-f]{12}; install the same"),
        (noticed, 75, "stopped on notice outside of a training; the same command goes on"),
    ):
        done = finish(process)
        assert (done.code, len(done.errors)) == (code, 1), done
        assert re.fullmatch(f"tenko: {words}", done.errors[0])
    assert [process.poll() for process in (first, second, *spares)] == [None] * 4
    second.kill()
    (run.directory / "idle").unlink()
    run.until(lambda beats: (run.directory / "idle").exists(), first, *spares)  # of the workers that start anew
    (run.directory / "enough").touch()
    ends = [finish(process) for process in (first, *spares)]
    assert [(done.code, done.errors) for done in ends] == [(0, [])] * 3
    lost = r"is lost: no sign of life for 10 s; starts anew \(1 of 3\)"  # or the spare is seen first
    assert len(re.findall(rf"{lost}|a node joins or leaves: all workers start anew", ends[0].out)) == 1, ends[0].out
    assert sorted("finished without this node" in done.out for done in ends[1:]) == [False, True]
    assert ["the run has all its 2 nodes; this one is a spare" in done.out for done in ends] == [False, True, True]


def test_two_agents_go_on_after_a_kill_and_tell_one_story(run: Run) -> None:
    options = two_nodes()
    nodes = [run.start(*options, fault="kill:3:7") for _ in range(2)]
    ends = [finish(node) for node in nodes]
    assert [(done.code, done.errors) for done in ends] == [(0, []), (0, [])]
    assert run.result() | {"weights": 0} == {"stage": "train", "weights": 0, "world": 4, "interface": "lo"}
    assert run.result()["weights"] == expected()
    for done in ends:
        assert re.search(rf"worker 3 on {socket.gethostname()} \(process \d+\) was ended by SIGKILL", done.out)
    spoke = [done for done in ends if RANKS_FROM.search(done.out)]
    assert len(spoke) == 1, "one node has rank 0"
    assert RANKS_FROM.findall(spoke[0].out) == [("4", "0"), ("4", "5")]


def test_nodes_that_do_not_fit_together_end_with_one_line(run: Run, tmp_path: Path) -> None:
    """Pairs of commands, all at once: most of their time is importing."""
    cases = {
        "recipe": {"seed": 7},
        "directory": {"directory": tmp_path / "elsewhere"},
        "code": {"CODE": "other"},
        "node's code": {"NODE_CODE": "other"},
    }
    words = {
        "recipe": r"seed: \S+ was started with 7, \S+ with 1; give all nodes the same",
        "directory": r"elsewhere: is not the same folder on \S+ as on \S+; give --run-dir a folder on a file system",
        "code": r"rank [23] \(\S+\) runs tenko other, rank 0 \(\S+\) [0-9a-f]{12}; install the same",
        "node's code": r"tenko: error: \S+ runs tenko other, \S+ [0-9a-f]{12}; install the same",
    }
    for case, other in cases.items():
        here = Run(tmp_path / case)
        here.folder.mkdir()
        options = two_nodes()
        first = here.start(*options)
        host = f"{options[3]}"
        wait_for_port(host)
        second = here.start(*options, **other)
        for done in (finish(first), finish(second)):
            assert done.code == 2, (case, done)
            assert len(done.errors) == 1, (case, done)
            assert re.search(words[case], done.errors[0]), (case, done)
        assert not alive([beat.pid for beat in here.beats()])


def wait_for_port(place: str) -> None:
    host, port = place.split(":")
    deadline = time.monotonic() + 60
    while True:
        try:
            socket.create_connection((host, int(port)), timeout=1).close()
            return
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(0.1)


def test_a_rendezvous_that_cannot_be_is_one_line(run: Run) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        here = f"127.0.0.1:{free_port()}"
        busy = f"127.0.0.1:{taken.getsockname()[1]}"
        cases = {
            r"--interface: nowhere0: no interface of this name with an address; valid: .*lo \(127\.0\.0\.1\)": [
                *("--nodes", "2", "--rendezvous", here, "--interface", "nowhere0")
            ],
            r"--rendezvous: no-such-host\.invalid: this name does not resolve": [
                *("--nodes", "2", "--rendezvous", "no-such-host.invalid:29500")
            ],
            r"--rendezvous: 127\.0\.0\.1:\d+ is taken by another program": ["--nodes", "2", "--rendezvous", busy],
            r"--rendezvous: 1 of 2 nodes came to 127\.0\.0\.1:\d+ within 2 s$": [
                *("--nodes", "2", "--rendezvous", here, "--join-timeout", "2")
            ],
            r"--nodes 2: needs --rendezvous HOST:PORT": ["--nodes", "2"],
            r"--nodes: must be a number or MIN:MAX, .* is '3:2'": ["--nodes", "3:2", "--rendezvous", here],
            r"--rendezvous: must be HOST:PORT with a port of 1 to 65535": ["--nodes", "2", "--rendezvous", "here"],
        }
        started = {
            words: run.start(*options, directory=run.folder / str(number))
            for number, (words, options) in enumerate(cases.items())
        }
        for words, process in started.items():
            done = finish(process)
            assert done.code == 2, (words, done)
            assert len(done.errors) == 1, (words, done)
            assert re.search(words, done.errors[0]), (words, done)


def test_a_torchrun_by_hand_on_two_nodes_is_elastic_too(run: Run) -> None:
    port = free_port()
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "2"]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "hand"]
    command += ["--local-addr", "127.0.0.1", "--max-restarts", "2", "-m", "elastic_worker"]
    command += [str(HERE.parents[1] / "recipes" / "tiny.yaml"), f"train.max_update={UPDATES}"]
    command += ["train.warmup_updates=1", "--run-dir", str(run.directory)]

    def go(fault: str, **more: str) -> list[subprocess.Popen[str]]:
        environment = run.environment(fault, GLOO_SOCKET_IFNAME="lo", **more)
        pipe = subprocess.PIPE
        return [
            subprocess.Popen(command, cwd=run.folder, env=environment, text=True, stdout=pipe, stderr=pipe)
            for _ in range(2)
        ]

    nodes = go("kill:3:7", PACE="0.3")
    run.until(lambda beats: (run.directory / "fault").exists(), *nodes)
    beats = run.wait_for(8, *nodes)  # started anew
    os.kill(beats[2].pid, signal.SIGUSR1)  # a notice to one worker stops all
    ends = [finish(node) for node in nodes]
    assert [done.code for done in ends] == [0, 0], ends
    errors = "\n".join(ends[0].errors + ends[1].errors)
    said = re.search(r"stopped on notice, saved at update (\d+); the same command goes on", errors)
    assert said, ends
    ends = [finish(node) for node in go("")]
    assert [done.code for done in ends] == [0, 0], ends
    assert ("4", said[1]) in RANKS_FROM.findall(ends[0].out + ends[1].out)
    assert run.result()["weights"] == expected()
    assert run.result()["world"] == 4
