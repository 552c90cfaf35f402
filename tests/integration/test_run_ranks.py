"""The trainer in real torchrun jobs of two ranks on gloo; what each rank demands stands in `trainer_worker.py`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from toy_training import differing, snapshot, toy_trainer, train

from tenko.nmt.corpus import Corpus

WORKER = Path(__file__).with_name("trainer_worker.py")
FIRST = ["uncut", "cut", "others_cut", "two_batches", "accumulate", "overflow", "collectives"]
pytestmark = pytest.mark.torchrun


def torchrun(corpus: Corpus, folder: Path, *scenarios: str) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, str(WORKER), str(corpus.path), str(folder), *scenarios],
        env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    held = [line.removeprefix("holds: ") for line in done.stdout.splitlines() if line.startswith("holds: ")]
    assert held == list(scenarios), done.stderr[-6000:]
    assert done.returncode == 0, done.stderr[-6000:]


@pytest.fixture(scope="module")
def folder(small_corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two jobs left: the second resumes, in processes of its own, what the first cut."""
    path = tmp_path_factory.mktemp("ranks")
    torchrun(small_corpus, path, *FIRST)
    torchrun(small_corpus, path, "resume", "others_resume")
    return path


def read(folder: Path, name: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    return torch.load(folder / f"{name}.pt", weights_only=True), json.loads((folder / f"{name}.json").read_text())


def test_three_bit_run_cut_and_resumed_equals_uncut(folder: Path) -> None:
    whole, whole_figures = read(folder, "uncut")
    resumed, resumed_figures = read(folder, "resumed")
    assert differing(whole, resumed) == []
    before = json.loads((folder / "before.json").read_text())
    assert before + resumed_figures["lines"] == whole_figures["lines"], "bytes of before the cut are counted once"
    assert resumed_figures["meters"] == whole_figures["meters"]
    assert all(meter["updates"] == 8 and meter["fp32_bytes"] > 0 for meter in whole_figures["meters"])


def test_thin_gradients_cost_a_seventh_of_fp32_or_less(folder: Path) -> None:
    lines = [line for line in read(folder, "uncut")[1]["lines"] if line["kind"] == "train"]
    assert lines[-1]["wire_fp32_bytes"] / lines[-1]["wire_bytes"] > 7
    assert lines[-1]["wire_bytes"] == pytest.approx(4 * lines[0]["wire_bytes"], rel=0.05), "8 updates to 2"


def test_two_ranks_equal_one_with_two_accumulated_batches(small_corpus: Corpus, folder: Path, tmp_path: Path) -> None:
    two, figures = read(folder, "two")
    alone = toy_trainer(small_corpus, tmp_path, update_freq=2, max_update=4, log_interval=2, valid_interval=4)
    lines = train(alone, small_corpus)
    for name, tensor in snapshot(alone).items():
        if "k_proj.bias" in name:  # softmax does not see it: its gradient is rounding, which Adam makes large
            continue
        torch.testing.assert_close(tensor, two[name], rtol=1e-3, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")
    # the ranks share validation: the same perplexity and BLEU as of one
    assert [(line["kind"], line["update"]) for line in figures["lines"]] == [("train", 2), ("train", 4), ("valid", 4)]
    for ours, theirs in zip(lines, figures["lines"], strict=True):
        for key in ours:
            assert theirs[key] == (pytest.approx(ours[key], rel=1e-4) if isinstance(ours[key], float) else ours[key])
