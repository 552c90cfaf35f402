"""The hook in real torchrun jobs of 2 and 4 ranks on gloo; what is demanded stands in `hook_worker.py`."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

WORKER = Path(__file__).with_name("hook_worker.py")
SCENARIOS = ["agree", "bounds", "overflow", "no_sync", "meter", "plain", "refuse"]
LANES = [
    "half",
    "shared",
    "nodes",
    "rows",
    "sparsity",
    "server",
    "server_overflow",
    "server_by_columns",
    "server_accumulates",
    "server_state_is_a_ranks_own",
    "server_settings",
    "server_norm",
    "server_unused",
    "server_rate",
    "portions",
    "unused",
    "feedback_waits",
    "never_used",
    "frees",
    "group",
    "auto",
]
pytestmark = pytest.mark.torchrun


def torchrun(ranks: int, folder: Path, *scenarios: str, device: str = "cpu") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return subprocess.run(
        [*command, str(WORKER), str(ranks), str(folder), *scenarios],
        env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "TENKO_TEST_DEVICE": device},
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )


def held(done: subprocess.CompletedProcess[str]) -> list[str]:
    return [line.removeprefix("holds: ") for line in done.stdout.splitlines() if line.startswith("holds: ")]


# Starting the ranks is most of the time, so three jobs serve all tests.
@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hook")


@pytest.fixture(scope="module")
def two_ranks(folder: Path) -> subprocess.CompletedProcess[str]:
    return torchrun(2, folder, *SCENARIOS, "cut")


@pytest.fixture(scope="module")
def two_ranks_again(folder: Path, two_ranks: subprocess.CompletedProcess[str]) -> subprocess.CompletedProcess[str]:
    assert "cut" in held(two_ranks), two_ranks.stderr[-4000:]
    return torchrun(2, folder, "resume", "fail")


def test_two_ranks_agree_and_bytes_are_counted(two_ranks: subprocess.CompletedProcess[str]) -> None:
    assert held(two_ranks) == [*SCENARIOS, "cut"], two_ranks.stderr[-4000:]
    assert two_ranks.returncode == 0, two_ranks.stderr[-4000:]


def test_four_ranks_agree_and_bytes_are_counted(folder: Path) -> None:
    done = torchrun(4, folder, *SCENARIOS)
    assert held(done) == SCENARIOS, done.stderr[-4000:]
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.parametrize("ranks", [2, 4])
def test_other_routes_agree_and_learn(folder: Path, ranks: int) -> None:
    done = torchrun(ranks, folder, *LANES)
    assert held(done) == LANES, done.stderr[-4000:]
    assert done.returncode == 0, done.stderr[-4000:]


def test_two_agents_are_two_nodes(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "2"]
    command += ["--master-addr", "127.0.0.1", "--master-port", str(port)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    agents = [
        subprocess.Popen(
            [*command, "--node-rank", str(node), str(WORKER), "4", str(tmp_path), "two_nodes"],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for node in range(2)
    ]  # fmt: skip
    ends = [agent.communicate(timeout=120) for agent in agents]
    assert "holds: two_nodes" in ends[0][0], ends[0][1][-3000:]
    assert [agent.returncode for agent in agents] == [0, 0]


def test_resumed_run_equals_uncut_run(two_ranks_again: subprocess.CompletedProcess[str]) -> None:
    assert "resume" in held(two_ranks_again), two_ranks_again.stderr[-4000:]


def test_failed_exchange_ends_the_job_with_its_reason(two_ranks_again: subprocess.CompletedProcess[str]) -> None:
    assert "fail" not in held(two_ranks_again)
    assert two_ranks_again.returncode != 0
    assert "broken on purpose" in two_ranks_again.stderr


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_same_holds_over_nccl(tmp_path: Path) -> None:
    """Two GPUs and more: fp32 and bf16 gradients, fp16 loss scaling, two levels, the server, the split."""
    ranks = torch.cuda.device_count()
    scenarios = [*SCENARIOS, *(name for name in LANES if name not in ("group", "half")), "half"]
    done = torchrun(ranks, tmp_path, *scenarios, device="cuda")
    assert held(done) == scenarios, done.stderr[-4000:]
    assert done.returncode == 0, done.stderr[-4000:]
