"""The mesh of sockets between real processes; what is demanded stands in `mesh_worker.py`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tenko.comm.address import own_address

WORKER = Path(__file__).with_name("mesh_worker.py")
pytestmark = pytest.mark.torchrun


def torchrun(ranks: int, *scenarios: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    return subprocess.run(
        [*command, str(WORKER), *scenarios], env=environment, capture_output=True, text=True, timeout=120, check=False
    )


@pytest.mark.parametrize("ranks", [2, 4])
def test_messages_arrive_and_errors_name_the_rank(ranks: int) -> None:
    scenarios = [
        "delivers",
        "names_the_late",
        "refuses_other_sizes",
        "forgives_who_has_ended",
        "takes_what_comes_early",
        "turns_strangers_away",
    ]
    done = torchrun(ranks, *scenarios)
    assert [line for line in done.stdout.splitlines() if line.startswith("holds")] == [
        f"holds: {name}" for name in scenarios
    ], done.stderr[-3000:]
    assert done.returncode == 0


def test_a_killed_rank_is_named_on_all_the_others() -> None:
    done = torchrun(3, "names_the_dead")
    # Not by lines: two ranks on one pipe may print theirs as one.
    assert all(f"held on rank {rank}" in done.stdout for rank in (0, 2)), done.stderr[-3000:]


def test_the_address_is_loopback_unless_one_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MASTER_ADDR", "GLOO_SOCKET_IFNAME", "TENKO_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    assert own_address()[0] == "127.0.0.1"
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    assert own_address()[0] in ("127.0.0.1", "::1")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    assert own_address()[0] == "127.0.0.1"
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nothere0")
    with pytest.raises(ValueError, match=r"GLOO_SOCKET_IFNAME: must be an interface .* is nothere0; there are .*lo"):
        own_address()
    monkeypatch.setenv("TENKO_ADDRESS", "127.0.0.1")
    assert own_address()[0] == "127.0.0.1"
    monkeypatch.setenv("TENKO_ADDRESS", "192.0.2.77")
    with pytest.raises(ValueError, match="TENKO_ADDRESS: must be"):
        own_address()
