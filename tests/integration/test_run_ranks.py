"""The trainer in real torchrun jobs of two ranks on gloo; what each rank demands stands in `trainer_worker.py`."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from toy_training import differing, snapshot, toy_trainer, train
from trainer_worker import SHARED

from tenko.nmt import checkpoint
from tenko.nmt.corpus import Corpus

WORKER = Path(__file__).with_name("trainer_worker.py")
FIRST = [
    "uncut",
    "cut",
    "others_cut",
    "two_batches",
    "accumulate",
    "overflow",
    "collectives",
    "shares",
    "norms",
    "diverged",
]
pytestmark = pytest.mark.torchrun


def torchrun(corpus: Corpus, folder: Path, *scenarios: str, ranks: int = 2) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    done = subprocess.run(
        [*command, str(WORKER), str(ranks), str(corpus.path), str(folder), *scenarios],
        env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        capture_output=True,
        text=True,
        timeout=480,
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


def at_update_3(source: Path, target: Path) -> Path:
    """A run that was cut after its checkpoint of update 3."""
    shutil.copytree(source, target)
    for update in (6, 8):
        shutil.rmtree(checkpoint.path_of(target, update))
    return target


@pytest.fixture(scope="module")
def shared(small_corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training begun by three ranks and one begun by one, each gone on with by two."""
    path = tmp_path_factory.mktemp("shared")
    torchrun(small_corpus, path, "shared_by_three", ranks=3)
    alone = toy_trainer(small_corpus, path / "server-1", **{**SHARED, "update_freq": 3})
    train(alone, small_corpus)
    torch.save(dict(alone.parameters), path / "server-1.pt")
    for source in ("fp32-3", "server-3", "three-bit-3", "server-1"):
        at_update_3(path / source, path / f"{source}-to-2")
    torchrun(small_corpus, path, "shared_by_two", ranks=2)
    return path


def near(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """How far apart two models are: norm of the difference, key biases left out (see below)."""
    names = [name for name in one if "k_proj.bias" not in name]
    return float(torch.cat([(one[n] - other[n]).detach().reshape(-1) for n in names]).norm())


def test_fewer_workers_go_on_with_the_same_sentences_and_in_fp32_to_the_same_weights(
    small_corpus: Corpus, shared: Path, caplog: pytest.LogCaptureFixture
) -> None:
    three, two = (json.loads((shared / f"{name}.json").read_text()) for name in ("fp32-3", "fp32-3-to-2"))
    assert [len(read) for read in three] == [8] * 3
    assert [sorted(map(int, read)) for read in two] == [[4, 5, 6, 7, 8]] * 2
    for update in two[0]:
        assert sorted(batch for read in two for batch in read[update]) == sorted(
            batch for read in three for batch in read[update]
        )
    folder = at_update_3(shared / "fp32-3", shared / "fp32-3-to-1")
    assert toy_trainer(small_corpus, shared / "three-bit-3", **SHARED).resume()
    alone = toy_trainer(small_corpus, folder, **SHARED)
    assert alone.resume()
    said = [r.getMessage() for r in caplog.records if "workers" in r.getMessage()]
    shared_anew = "saved by 3 workers, now 1: the 3 micro-batches of an update are shared anew"
    assert said == [f"{shared_anew}; error feedback of the route begins at zero", shared_anew]
    train(alone, small_corpus)
    ends = [torch.load(shared / f"{name}.pt", weights_only=True) for name in ("fp32-3", "fp32-3-to-2")]
    for name, wanted in ends[0].items():
        if "k_proj.bias" in name:  # softmax does not see it: its gradient is rounding, which Adam makes large
            continue
        for found in (ends[1][name], alone.parameters[name].detach()):
            torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_shards_of_adams_state_go_on_whole_with_other_workers(small_corpus: Corpus, shared: Path) -> None:
    end = torch.load(shared / "server-3.pt", weights_only=True)
    folder = at_update_3(shared / "server-3", shared / "server-3-to-1")
    alone = toy_trainer(small_corpus, folder, **SHARED)
    assert alone.resume()
    state = alone.optimizer.state_dict()["state"]
    assert len(state) == len(alone.parameters)
    assert {float(kept["step"]) for kept in state.values()} == {3.0}
    train(alone, small_corpus)
    two = torch.load(shared / "server-3-to-2.pt", weights_only=True)
    forgetful = toy_trainer(small_corpus, at_update_3(shared / "server-3", shared / "server-3-forgets"), **SHARED)
    forgetful.rewind(checkpoint.path_of(forgetful.checkpoints, 3), moments=False)
    train(forgetful, small_corpus)
    lost = near(dict(forgetful.parameters), end)
    assert near(dict(alone.parameters), end) < lost / 5
    assert near(two, end) < lost / 5
    one, gone_on = (torch.load(shared / f"{name}.pt", weights_only=True) for name in ("server-1", "server-1-to-2"))
    assert near(one, gone_on) < lost / 5


def test_more_workers_than_micro_batches_are_refused_in_one_line(small_corpus: Corpus, shared: Path) -> None:
    trainer = toy_trainer(small_corpus, shared / "fp32-3", rank=3, world=4, **SHARED)
    with pytest.raises(ValueError, match=r"\A\S+update-00000008: .* 3 micro-batches, .*4 workers; .* at most 3\Z"):
        trainer.resume()
