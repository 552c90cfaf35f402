"""Nodes of a run on hosts of their own: one is killed, cut off, comes back, hangs; the host that all meet at is lost.

Hosts are network namespaces with a host name each. Their training is the sum of `elastic_worker.py`; the last tests are
of a real one.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from elastic_lab import PORT, Lab, missing, start
from elastic_run import Run, expected, finish
from processes import alive
from tenko_run import WHOLE, run_arguments
from toy_training import differing

from tenko.compression import read_artefact
from tenko.launch import pulse
from tenko.launch.metrics import read_metrics
from tenko.nmt.corpus import Corpus

pytestmark = [pytest.mark.torchrun, pytest.mark.skipif(bool(missing()), reason=str(missing()))]
RANKS_FROM = re.compile(r"world (\d+) from (\d+)")


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path)


@pytest.fixture
def lab() -> Iterator[Lab]:
    with Lab(2) as lab:
        yield lab


def test_the_run_goes_on_without_a_node_that_is_cut_off_and_with_it_when_it_is_back(lab: Lab, run: Run) -> None:
    settings = {"train__max_update": 400, "PACE": 0.1}
    nodes = [start(lab, run, host, "--nodes", "1:2", **settings) for host in range(2)]
    before = run.wait_for(6, *nodes)
    assert [beat.host for beat in before] == ["host0", "host0", "host1", "host1"]
    lab.cut(1)
    lost = finish(nodes[1])
    assert lost.code == 75
    assert len(lost.errors) == 1
    assert re.match(rf"tenko: error: 10\.77\.0\.2 is cut off from 10\.77\.0\.1:{PORT}, .*; the same command goes on",
                    lost.errors[0])  # fmt: skip
    assert not alive([beat.pid for beat in before if beat.node == 1])
    reached = max(beat.update for beat in run.beats())
    run.until(lambda beats: min((beat.update for beat in beats if beat.rank < 2), default=0) > reached + 3, nodes[0])
    lab.mend(1)
    again = start(lab, run, 1, "--nodes", "1:2", **settings)
    ends = [finish(nodes[0]), finish(again)]
    assert [(done.code, done.errors) for done in ends] == [(0, []), (0, [])]
    starts = RANKS_FROM.findall(ends[0].out)
    assert [world for world, _ in starts] == ["4", "2", "4"], ends[0].out
    assert "tenko: host1 (worker 2, 3) is lost: no sign of life for 10 s; starts anew (1 of 3)" in ends[0].out
    assert "tenko: a node joins or leaves: all workers start anew" in ends[0].out
    assert run.result() == {"stage": "train", "weights": expected(400), "world": 4, "interface": "e0"}


def test_the_run_goes_on_without_a_node_that_is_killed(lab: Lab, run: Run) -> None:
    nodes = [start(lab, run, host, "--nodes", "1:2", fault="kill-node:2:7") for host in range(2)]
    before = run.wait_for(5, nodes[0])
    ends = [finish(node) for node in nodes]
    assert ends[1].code == -signal.SIGKILL
    assert (ends[0].code, ends[0].errors) == (0, [])
    assert RANKS_FROM.findall(ends[0].out) == [("4", "0"), ("2", "5")]
    assert re.search(r"host1 \(worker 2, 3\) is lost", ends[0].out)
    assert run.result()["weights"] == expected()
    assert not alive([beat.pid for beat in before])


def test_without_the_node_they_meet_at_the_others_end_and_the_same_command_goes_on(lab: Lab, run: Run) -> None:
    nodes = [start(lab, run, host, "--nodes", "2", fault="kill-node:1:7") for host in range(2)]
    before = run.wait_for(5, nodes[1])
    ends = [finish(node) for node in nodes]
    assert ends[0].code == -signal.SIGKILL
    assert ends[1].code == 75
    assert len(ends[1].errors) == 1
    assert "the same command goes on from update 5" in ends[1].errors[0]
    assert not alive([beat.pid for beat in before])
    ends = [finish(node) for node in [start(lab, run, host, "--nodes", "2") for host in range(2)]]
    assert [(done.code, done.errors) for done in ends] == [(0, []), (0, [])]
    assert RANKS_FROM.findall(ends[0].out) == [("4", "5")]
    assert run.result()["weights"] == expected()


def test_a_worker_that_hangs_on_another_node_is_named_on_both(lab: Lab, run: Run) -> None:
    nodes = [start(lab, run, host, "--nodes", "2", fault="sleep:3:7", hang_timeout=6) for host in range(2)]
    ends = [finish(node) for node in nodes]
    assert [(done.code, done.errors) for done in ends] == [(0, []), (0, [])]
    for done in ends:
        assert re.search(
            r"worker 3 on host1 \(process \d+\) hangs in update 7, no progress for \d+ s; stacks", done.out
        )
    assert RANKS_FROM.findall(ends[0].out) == [("4", "0"), ("4", "5")]
    assert run.result()["weights"] == expected()


REAL = {**WHOLE, "workers": "1"}
"""A real training: 3-bit gradients through our own sockets, which must take the lab's interface, since hosts reach each
other by no other; accumulation and dropout are on."""


def go(lab: Lab, directory: Path, tsv: Path, nodes: str = "2") -> list[subprocess.Popen[str]]:
    """It, on both hosts."""
    arguments = [str(a) for a in run_arguments(directory, tsv, **REAL)]
    return [
        lab.start(
            host,
            [
                *("env", "-u", "RANK", "-u", "WORLD_SIZE", "-u", "GLOO_SOCKET_IFNAME", "-u", "MASTER_ADDR"),
                *(sys.executable, "-m", "tenko.launch.cli", *arguments),
                *("--nodes", nodes, "--rendezvous", f"{lab.address(0)}:{PORT}"),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for host in range(2)
    ]


def end(node: subprocess.Popen[str]) -> str:
    """What a node whose run went well said."""
    out, errors = node.communicate(timeout=150)
    assert (node.returncode, errors) == (0, ""), (out, errors)
    return out


def saved(directory: Path) -> int:
    """The process of rank 1, once there is a checkpoint."""
    deadline = time.monotonic() + 90
    while not list(directory.glob("1-train/checkpoints/update-????????")):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    beat = pulse.read(directory / "logs" / "pulse-1")
    assert beat is not None
    return beat.pid


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return read_artefact(directory / "1-train" / "artefact")[0]


def figures(directory: Path, kind: str) -> list[dict[str, Any]]:
    return [entry for entry in read_metrics(directory / "1-train" / "metrics.jsonl") if entry["kind"] == kind]


@pytest.fixture(scope="module")
def uncut(tmp_path_factory: pytest.TempPathFactory, small_tsv: Path, small_corpus: Corpus) -> Path:
    directory = tmp_path_factory.mktemp("uncut") / "run"
    with Lab(2) as lab:
        assert ["starts anew" in end(node) for node in go(lab, directory, small_tsv)] == [False, False]
    return directory


def test_a_real_training_on_two_hosts_survives_a_kill_bit_for_bit(
    lab: Lab, tmp_path: Path, small_tsv: Path, uncut: Path
) -> None:
    nodes = go(lab, tmp_path / "cut", small_tsv)
    os.kill(saved(tmp_path / "cut"), signal.SIGKILL)
    assert ["was ended by SIGKILL" in end(node) for node in nodes] == [True, True]
    assert differing(weights(uncut), weights(tmp_path / "cut")) == []


def test_one_slow_link_delays_a_real_training_and_changes_nothing_else(
    lab: Lab, tmp_path: Path, small_tsv: Path, uncut: Path
) -> None:
    nodes = go(lab, tmp_path / "slow", small_tsv)
    saved(tmp_path / "slow")
    lab.shape("2mbit", host=1)
    assert ["starts anew" in end(node) for node in nodes] == [False, False]
    assert differing(weights(uncut), weights(tmp_path / "slow")) == []
    before, last = figures(tmp_path / "slow", "train")[-2:]
    floor = 8 * (last["wire_bytes"] - before["wire_bytes"]) / 2e6
    assert last["seconds"] - before["seconds"] > 0.8 * floor > 0.1, "no faster than the link"
    assert last["share_exchange"] > 0.1


def test_a_real_training_goes_on_with_the_node_that_is_left_and_keeps_its_batches(
    lab: Lab, tmp_path: Path, small_tsv: Path, uncut: Path
) -> None:
    nodes = go(lab, tmp_path / "fewer", small_tsv, "1:2")
    saved(tmp_path / "fewer")
    lab.shape("2mbit", host=1)  # so that it is not over before the cut
    lab.cut(1)
    out = end(nodes[0])
    nodes[1].communicate(timeout=60)
    assert nodes[1].returncode == 75
    assert re.search(r"\(worker 1\) is lost: no sign of life for 10 s; starts anew", out)
    assert "warning: saved by 2 workers, now 1: the 4 micro-batches of an update are shared anew" in out
    ends = [figures(directory, "train")[-1] for directory in (uncut, tmp_path / "fewer")]
    assert [entry["update"] for entry in ends] == [120, 120]
    assert ends[0]["epoch"] == pytest.approx(ends[1]["epoch"]), "as many sentences were read"
    losses = [figures(directory, "valid")[-1]["nll"] for directory in (uncut, tmp_path / "fewer")]
    assert losses[1] == pytest.approx(losses[0], rel=0.05)
