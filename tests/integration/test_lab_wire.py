"""The routes between hosts with shaped links: bytes as the kernel counts them, equal ranks, a host that is cut off."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from lab import Ended, Lab, missing

pytestmark = pytest.mark.torchrun
WORKER = str(Path(__file__).with_name("lab_worker.py"))
RATE = "200mbit"
ROUTES: dict[str, dict[str, Any]] = {
    "fp32": {"route": "fp32"},
    "fp16": {"route": "fp16"},
    "3/4": {"route": "all_reduce"},
    "3/3": {"route": "all_reduce", "bits_down": 3},
    "shared scale": {"route": "all_reduce", "bits_down": 8, "shared_scale": True},
    "server": {"route": "server"},
    "split": {
        "route": "split",
        "split": [
            {"route": "server", "match": ["decoder.*"], "min_dims": 2},
            {"route": "fp32", "match": ["decoder.*"], "max_dims": 1},
            {"route": "all_reduce", "match": ["encoder.layers.*"]},
            {"route": "rows", "match": ["encoder.embed_tokens.*"]},
        ],
    },
}
FEWER = {"fp32": 1, "fp16": 2, "3/4": 8, "3/3": 9, "shared scale": 5, "server": 8, "split": 2}
"""At least so many times fewer bytes than an fp32 ring."""


@pytest.fixture(scope="module", autouse=True)
def _possible() -> None:
    if (why := missing()) is not None:
        pytest.skip(why)


def measured(hosts: int) -> dict[str, list[dict[str, Any]]]:
    """What every rank found, by route."""
    with Lab(hosts, RATE) as lab:
        ended = lab.run([sys.executable, WORKER, "wire", json.dumps(ROUTES)], timeout=240)
    assert [one.code for one in ended] == [0] * hosts, "\n".join(one.output[-3000:] for one in ended)
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in ROUTES}
    for one in ended:
        for line in one.output.splitlines():
            if line.startswith("{"):
                result = json.loads(line)
                found[result["route"]].append(result)
    assert all(len(results) == hosts for results in found.values())
    return found


@pytest.fixture(scope="module", params=[2, 4])
def found(request: pytest.FixtureRequest) -> dict[str, list[dict[str, Any]]]:
    return measured(request.param)


@pytest.mark.parametrize("route", ROUTES)
def test_meter_agrees_with_the_kernel_on_every_host(found: dict[str, list[dict[str, Any]]], route: str) -> None:
    for rank, result in enumerate(found[route]):
        assert result["sent"] > 500_000, "enough for headers and acknowledgements to be small"
        assert abs(result["sent"] / result["metered"] - 1) < 0.03, (rank, result)
        assert result["ring"] / result["sent"] > FEWER[route] * 0.97, (rank, result)


@pytest.mark.parametrize("route", ROUTES)
def test_ranks_end_with_equal_weights(found: dict[str, list[dict[str, Any]]], route: str) -> None:
    assert all(result["moved"] for result in found[route])
    assert len({result["weights"] for result in found[route]}) == 1


def test_routes_differ_in_their_weights(found: dict[str, list[dict[str, Any]]]) -> None:
    """So the checksums mean something."""
    assert len({results[0]["weights"] for results in found.values()}) == len(ROUTES)


def test_host_that_is_cut_off_is_named_by_the_others() -> None:
    timeout, gone = 5.0, 2
    ended: list[Ended] = []
    with Lab(4, RATE) as lab:
        command = [sys.executable, WORKER, "cut", json.dumps({"timeout": timeout})]
        ready = threading.Event()
        processes = [lab.start(i, command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) for i in range(lab.hosts)]
        first = processes[0].stdout
        assert first is not None
        before = []

        def read() -> None:
            for line in first:
                before.append(line)
                if line == "training\n":
                    ready.set()
                    return

        threading.Thread(target=read, daemon=True).start()
        assert ready.wait(60), before
        time.sleep(0.5)
        lab.cut(gone)
        begin = time.monotonic()
        for i in (0, 1, 3):
            output, _ = processes[i].communicate(timeout=50)
            ended.append(Ended(host=i, code=processes[i].returncode, output=output))
        took = time.monotonic() - begin
    assert took < timeout + 25, f"{took:.0f} s"
    for one in ended:
        assert one.code not in (0, None), one.output[-2000:]
        assert "ConnectionError" in one.output, one.output[-2000:]
    named = [re.findall(r"rank (\d+) \(10\.77", one.output) for one in ended]
    assert all(str(gone) in names for names in named), [one.output[-1500:] for one in ended]
