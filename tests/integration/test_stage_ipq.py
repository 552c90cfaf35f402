"""The stage `ipq` as a user runs it, 2 ranks under torchrun: groups in order, the file, cuts that heal, bad blocks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tenko_run import Done, tenko
from toy_recipe import write_recipe
from toy_training import differing

from tenko.compression import artefact_bytes, read_artefact
from tenko.nmt import checkpoint
from tenko.nmt.corpus import Corpus

pytestmark = pytest.mark.torchrun
TRAIN: dict[str, Any] = {
    "max_update": 8,
    "max_tokens": 300,
    "update_freq": 2,
    "precision": "fp32",
    "lr": 5e-3,
    "warmup_updates": 4,
    "log_interval": 4,
    "valid_interval": 8,
    "valid_sentences": 4,
    "save_interval": 4,
    "decode": {"beam": 1, "max_tokens": 2000},
}
GROUPS = ["group-1-ffn", "group-2-embedding", "group-3-attention"]


def run(directory: Path, tsv: Path, ipq: dict[str, Any], **train: Any) -> Done:
    """Train the toy with dropout and 3-bit gradients, and quantize it iteratively."""
    stages = [{"train": {**TRAIN, **train}}, {"ipq": {"centroids": 16, **ipq}}]
    path = write_recipe(directory.with_suffix(".yaml"), tsv, stages)
    return tenko("run", path, "--run-dir", directory)


def done(ended: Done) -> Done:
    assert (ended.code, ended.errors) == (0, []), ended
    return ended


def group(directory: Path, name: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    weights, state, _ = checkpoint.load(directory / "2-ipq" / name / "quantized")
    return weights, state


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, small_tsv: Path, small_corpus: Corpus) -> Path:
    directory = tmp_path_factory.mktemp("ipq") / "whole"
    done(run(directory, small_tsv, {}))
    return directory


def test_each_group_is_quantized_and_trained_after_the_other(whole: Path) -> None:
    kept = [group(whole, name) for name in GROUPS]
    for number, (weights, state) in enumerate(kept, 1):
        codebooks = [name for name in weights if "parametrizations" in name]
        assert len(codebooks) == len(state["technique"]) == [4, 5, 17][number - 1]
        assert state["figures"]["updates"] == 8
        assert 0.1 < state["figures"]["error"] < 0.9
    first, second = kept[0][0], kept[1][0]
    for name in first.keys() & second.keys():
        assert not torch.equal(first[name], second[name]), f"{name}: all that is not codes goes on training"
    lines = (whole / "2-ipq" / GROUPS[1] / "metrics.jsonl").read_text().splitlines()
    assert [(line["kind"], line["update"]) for line in map(json.loads, lines)] == [
        ("train", 4),
        ("train", 8),
        ("valid", 8),
    ]


def test_the_artefact_is_what_the_last_group_has_trained(whole: Path) -> None:
    state, metadata = read_artefact(whole / "2-ipq" / "artefact")
    weights, kept = group(whole, GROUPS[2])
    schemes = {name: entry["scheme"] for name, entry in metadata["tensors"].items()}
    for name, codes in kept["technique"].items():
        assert schemes[name] == "pq"
        codebook = weights[name.removesuffix("weight") + "parametrizations.weight.original"].half().float()
        assert torch.equal(state[name], codebook[codes["codes"].long()].reshape(state[name].shape)), name
    for name in weights.keys() & state.keys():
        assert torch.equal(state[name], weights[name].half().float()), name
    assert state["decoder.output_projection.weight"] is state["encoder.embed_tokens.weight"]
    result = json.loads((whole / "2-ipq" / "result.json").read_text())
    assert result["artefact_bytes"] == artefact_bytes(whole / "2-ipq" / "artefact")
    assert result["artefact_bytes"] < artefact_bytes(whole / "1-train" / "artefact")
    assert [entry["group"] for entry in result["groups"]] == ["ffn", "embedding", "attention"]


def test_a_run_cut_within_a_group_ends_as_an_uncut_one(whole: Path, small_tsv: Path) -> None:
    directory = Path(shutil.copytree(whole, whole.with_name("cut")))
    stage = directory / "2-ipq"
    (stage / "result.json").unlink()
    shutil.rmtree(stage / "artefact")
    shutil.rmtree(stage / GROUPS[2])
    shutil.rmtree(stage / GROUPS[1] / "quantized")
    shutil.rmtree(stage / GROUPS[1] / "checkpoints" / "update-00000008")
    shutil.rmtree(stage / GROUPS[1] / "checkpoints" / "best")
    before = {path: path.stat().st_mtime_ns for path in (stage / GROUPS[0]).rglob("*")}
    ended = done(run(directory, small_tsv, {}))
    assert "ipq ffn: finished before, left alone" in ended.out
    assert "goes on from update 4" in ended.out
    assert {path: path.stat().st_mtime_ns for path in (stage / GROUPS[0]).rglob("*")} == before
    for name in GROUPS:
        assert differing(group(directory, name)[0], group(whole, name)[0]) == []
    file = Path("2-ipq") / "artefact" / "model.safetensors"
    assert (directory / file).read_bytes() == (whole / file).read_bytes()


def test_chosen_int8_centroids_under_loss_scaling(whole: Path, small_tsv: Path) -> None:
    directory = whole.with_name("half")
    ipq = {"scheme": "pq_int8", "centroids": 256, "bits": 3.2, "distill": {"weight": 0.0}}
    done(run(directory, small_tsv, ipq, precision="fp16", max_update=4))
    state, metadata = read_artefact(directory / "2-ipq" / "artefact")
    assert {entry["scheme"] for entry in metadata["tensors"].values()} == {"dense", "pq_int8"}
    file = directory / "2-ipq" / "centroids.json"
    chosen = json.loads(file.read_text())
    codebooks = group(directory, GROUPS[2])[1]["technique"]
    assert {name: kept["centroids"] for name, kept in codebooks.items()} == chosen["centroids"]
    assert len(set(chosen["centroids"].values())) > 1
    assert all(bool(torch.isfinite(tensor).all()) for tensor in state.values())
    lines = (directory / "2-ipq" / GROUPS[2] / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[0])["scale"] > 0
    assert json.loads((directory / "2-ipq" / "result.json").read_text())["precision"] == "fp16"
    # What a stage that was cut has chosen counts when it goes on.
    for path in [*(directory / "2-ipq").glob("group-*"), directory / "2-ipq" / "artefact"]:
        shutil.rmtree(path)
    (directory / "2-ipq" / "result.json").unlink()
    file.write_text(json.dumps({**chosen, "centroids": dict.fromkeys(chosen["centroids"], 4)}))
    done(run(directory, small_tsv, ipq, precision="fp16", max_update=4))
    codebooks = group(directory, GROUPS[2])[1]["technique"]
    assert {kept["centroids"] for kept in codebooks.values()} == {4}


def test_a_block_that_does_not_divide_is_one_line_before_any_training(
    tmp_path: Path, small_tsv: Path, small_corpus: Corpus
) -> None:
    ended = run(tmp_path / "bad", small_tsv, {"blocks": {"ffn": 8, "embedding": 8, "attention": 3}})
    assert ended.code == 2
    assert len(ended.errors) == 1
    assert "ipq.blocks: attention is 3, which does not divide the 16 columns of" in ended.errors[0]
    assert "possible are 1, 2, 4, 8, 16" in ended.errors[0]
    assert not list((tmp_path / "bad").rglob("update-*"))
