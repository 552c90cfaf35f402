"""The network lab itself: links have the rate asked for, both ways at once; nothing is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from lab import Lab, bits_per_second, missing, remove_leftovers

BENCHMARKS = str(Path(__file__).parents[2] / "benchmarks")
SEND = """
import os, socket, sys, threading, time
rank, size = int(os.environ["RANK"]), int(sys.argv[1])
listener = socket.create_server((f"10.77.0.{rank + 1}", 29800))
while True:
    try:
        out = socket.create_connection((f"10.77.0.{2 - rank}", 29800))
        break
    except ConnectionRefusedError:
        time.sleep(0.02)
into, _ = listener.accept()
begin = time.perf_counter()
sender = threading.Thread(target=out.sendall, args=(bytes(size),))
sender.start()
got = 0
while got < size:
    got += len(into.recv(1 << 20))
sender.join()
print(time.perf_counter() - begin)
"""


@pytest.fixture(scope="module", autouse=True)
def _possible() -> None:
    if (why := missing()) is not None:
        pytest.skip(why)


def namespaces() -> list[str]:
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    return [line.split()[0] for line in listed.splitlines() if line.startswith("tenkolab-")]


def test_link_has_the_rate_asked_for_in_both_directions_at_once() -> None:
    size = 3_000_000
    with Lab(2, "200mbit") as lab:
        before = [lab.counters(i) for i in range(2)]
        ended = lab.run([sys.executable, "-c", SEND, str(size)], timeout=60)
        after = [lab.counters(i) for i in range(2)]
        assert [one.code for one in ended] == [0, 0], [one.output for one in ended]
        slow = max(float(one.output) for one in ended)
        lab.shape("none")
        fast = max(float(one.output) for one in lab.run([sys.executable, "-c", SEND, str(size)], timeout=60))
    floor = size * 8 / bits_per_second("200mbit")
    assert 0.9 * floor < slow < 1.8 * floor, "one direction after the other would take twice the floor"
    assert fast < slow
    for now, then in zip(after, before, strict=True):
        for way in ("tx_bytes", "rx_bytes"):
            assert size < now[way] - then[way] < 1.05 * size


def test_lab_is_gone_after_its_block_with_all_that_ran_in_it() -> None:
    with Lab(2) as lab:
        mine = [name for name in namespaces() if f"-{os.getpid()}-" in name]
        assert len(mine) == 3, "two hosts and a switch"
        asleep = lab.start(1, ["sleep", "600"])
    assert asleep.poll() is not None
    assert not [name for name in namespaces() if f"-{os.getpid()}-" in name]


def test_what_was_on_its_way_into_a_host_ends_with_the_lab_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """`ip netns exec` enters a host after its processes were listed and before it is deleted: nobody has found it."""

    def find_nobody(namespaces: Sequence[str]) -> None:
        for namespace in namespaces:
            subprocess.run(["ip", "netns", "delete", namespace], check=True)

    monkeypatch.setattr("lab._remove", find_nobody)
    begin = time.monotonic()
    with Lab(1) as lab:
        asleep = lab.start(0, ["sleep", "30"])
    assert asleep.returncode == -signal.SIGTERM
    assert time.monotonic() - begin < 20


def test_lab_of_a_killed_program_is_removed_by_the_next_and_a_running_one_is_left_alone() -> None:
    program = f"import sys, time; sys.path.insert(0, {BENCHMARKS!r}); from lab import Lab\n" + (
        "with Lab(2) as lab:\n    lab.start(0, ['sleep', '600'])\n    print('up', flush=True)\n    time.sleep(600)"
    )
    started = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert started.stdout is not None
    assert started.stdout.readline() == "up\n"
    theirs = [name for name in namespaces() if f"-{started.pid}-" in name]
    assert len(theirs) == 3
    remove_leftovers()
    assert set(theirs) <= set(namespaces()), "its program runs"
    started.send_signal(signal.SIGKILL)
    started.wait()
    assert set(theirs) <= set(namespaces()), "a killed program cannot tidy up"
    begin = time.monotonic()
    with Lab(1):
        assert not set(theirs) & set(namespaces())
    assert time.monotonic() - begin < 20


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_program_removes_its_lab(sent: signal.Signals) -> None:
    program = f"import sys, time; sys.path.insert(0, {BENCHMARKS!r}); from lab import Lab\n" + (
        "with Lab(2):\n    print('up', flush=True)\n    time.sleep(600)"
    )
    started = subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell that runs the tests in its background has SIGINT ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert started.stdout is not None
    assert started.stdout.readline() == "up\n"
    started.send_signal(sent)
    started.communicate(timeout=30)
    assert not [name for name in namespaces() if f"-{started.pid}-" in name]


@pytest.mark.parametrize("rate", ["1", "fast", "-1gbit", "gbit", "0mbit"])
def test_bad_rate_is_refused_by_name(rate: str) -> None:
    with pytest.raises(ValueError, match=r"rate: must be a number with kbit, mbit, gbit, or none"):
        Lab(2, rate)
