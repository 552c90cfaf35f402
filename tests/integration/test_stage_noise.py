"""The stages `quant_noise` and `quantize` as a user runs them, two ranks under torchrun: small in the file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tenko_run import Done, tenko
from torch import Tensor
from toy_recipe import write_recipe

from tenko.compression import read_artefact
from tenko.compression.config import QuantizeConfig
from tenko.compression.contents import read_contents
from tenko.compression.noise import make_quantizer
from tenko.compression.scalar import decode
from tenko.nmt import checkpoint
from tenko.nmt.translate import Translator

pytestmark = pytest.mark.torchrun
TRAIN: dict[str, Any] = {
    "max_update": 12,
    "max_tokens": 300,
    "update_freq": 2,
    "precision": "fp32",
    "lr": 5e-3,
    "warmup_updates": 6,
    "log_interval": 4,
    "valid_interval": 6,
    "valid_sentences": 4,
    "save_interval": 4,
    "average_last": 2,
    "keep_updates": [4],
    "decode": {"beam": 1, "max_tokens": 2000},
}
NOISE: dict[str, Any] = {"scheme": "int4", "p": 0.5, "activations": True, "train": {"distill": {"weight": 0.5}}}


def recipe(folder: Path, tsv: Path, *stages: dict[str, Any], workers: int = 2, **top: Any) -> Path:
    """A recipe file of the toy that goes through `stages`."""
    return write_recipe(folder / "toy.yaml", tsv, stages, workers=workers, **top)


def run(path: Path, directory: Path) -> Done:
    done = tenko("run", path, "--run-dir", directory)
    assert done.code == 0, done.errors[-20:]
    return done


@pytest.fixture(scope="module")
def whole(small_tsv: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained, then finetuned in int4 with 8-bit inputs and the trained model as the teacher."""
    folder = tmp_path_factory.mktemp("whole")
    run(recipe(folder, small_tsv, {"train": TRAIN}, {"quant_noise": NOISE}), folder / "run")
    return folder / "run"


def averaged(stage: Path) -> dict[str, Tensor]:
    """The weights that the training left, under the names they have without parametrizations."""
    folders = sorted((stage / "checkpoints").glob("update-*"))[-2:]
    weights = checkpoint.average(folders)
    return {name.replace(".parametrizations", "").removesuffix(".original"): w for name, w in weights.items()}


def is_matrix(name: str, tensor: Tensor) -> bool:
    return tensor.dim() == 2 and "norm" not in name


def test_the_file_holds_the_trained_weights_in_codes(whole: Path) -> None:
    stage = whole / "2-quant_noise"
    state, metadata = read_artefact(stage / "artefact")
    trained = averaged(stage)
    quantizer = make_quantizer(QuantizeConfig(scheme="int4"))
    assert trained.keys() <= state.keys()
    for name, weight in trained.items():
        wanted = decode(quantizer.quantize(weight)) if is_matrix(name, weight) else weight
        assert torch.equal(state[name], wanted), name
        assert metadata["tensors"][name]["scheme"] == ("int4" if is_matrix(name, weight) else "dense"), name
    result = json.loads((stage / "result.json").read_text())
    assert (result["scheme"], result["p"], result["updates"]) == ("int4", 0.5, 12)
    assert result["artefact_bytes"] == (stage / "artefact/model.safetensors").stat().st_size
    before = json.loads((whole / "1-train/result.json").read_text())
    assert result["artefact_bytes"] < before["artefact_bytes"] / 2, "names, scales and biases are most of a toy"


def test_the_artefact_translates_with_8_bit_inputs(whole: Path) -> None:
    stage = whole / "2-quant_noise"
    _, metadata = read_artefact(stage / "artefact")
    assert all(limit > 0 for limit in metadata["activations"].values())
    translator = Translator.load(stage / "artefact")
    modules = dict(translator.model.named_modules())
    assert set(metadata["activations"]) == {name for name, m in modules.items() if isinstance(m, torch.nn.Linear)}
    assert set(metadata["activations"]) == {name for name, m in modules.items() if m._forward_pre_hooks}


def test_a_model_trained_for_8_bit_inputs_keeps_them_when_it_is_quantized_again(
    whole: Path, small_tsv: Path, tmp_path: Path
) -> None:
    source = whole / "2-quant_noise/artefact"
    stages = [{"pretrained": {"model": str(source)}}, {"quantize": {"scheme": "int8"}}]
    run(write_recipe(tmp_path / "toy.yaml", small_tsv, stages, workers=1), tmp_path / "run")
    before, after = (read_artefact(path)[1] for path in (source, tmp_path / "run/2-quantize/artefact"))
    assert after["activations"] == before["activations"]


def test_cut_and_resumed_equals_uncut(whole: Path, tmp_path: Path) -> None:
    cut = tmp_path / "run"
    shutil.copytree(whole, cut)
    stage = cut / "2-quant_noise"
    # As a kill after update 9 leaves it: a checkpoint of 8, lines of metrics beyond it.
    for path in (stage / "result.json", stage / "artefact", stage / "hypotheses.txt"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    shutil.rmtree(checkpoint.path_of(stage / "checkpoints", 12))
    done = run(cut / "config.yaml", cut)
    assert "goes on from update 8" in done.out
    for file in ("artefact/model.safetensors", "hypotheses.txt"):
        assert (stage / file).read_bytes() == (whole / "2-quant_noise" / file).read_bytes(), file
    lines = [
        [{k: v for k, v in json.loads(line).items() if k in ("update", "loss", "bleu")} for line in f]
        for f in ((path / "2-quant_noise/metrics.jsonl").read_text().splitlines() for path in (whole, cut))
    ]
    assert lines[0] == lines[1]


def test_a_ticket_stays_pruned_under_fp16_and_loss_scaling(small_tsv: Path, tmp_path: Path) -> None:
    ticket = {"rounds": 1, "fraction": 0.5, "rewind_to": 4}
    noise = {"scheme": "lat", "train": {"precision": "fp16", "init_scale": 2.0**26}}
    path = recipe(tmp_path, small_tsv, {"train": TRAIN}, {"lottery": ticket}, {"quant_noise": noise})
    run(path, tmp_path / "run")
    before, after = (
        read_artefact(tmp_path / "run" / stage / "artefact")[0] for stage in ("2-lottery", "3-quant_noise")
    )
    pruned = [name for name, w in before.items() if w.dim() == 2 and (w == 0).float().mean() > 0.2]
    assert len(pruned) > 10
    for name in pruned:
        assert not after[name][before[name] == 0].any(), name
        assert all(row.abs().unique().numel() <= 2 for row in after[name]), name
        assert after[name].any(), name
    result = json.loads((tmp_path / "run/3-quant_noise/result.json").read_text())
    assert result["precision"] == "fp16"
    states = [checkpoint.load(folder) for folder in (tmp_path / "run/3-quant_noise/checkpoints").glob("update-*")]
    assert all(state["scaler"]["scale"] < 2.0**26 for _, state, _ in states), "the first gradients overflowed"
    for weights, _, _ in states:
        for name in pruned:
            owner, _, attribute = name.rpartition(".")
            stored = weights[f"{owner}.parametrizations.{attribute}.original"]
            assert not stored[before[name] == 0].any(), name


def test_product_quantization_noise_leaves_dense_weights_for_codes_to_follow(small_tsv: Path, tmp_path: Path) -> None:
    blocks = {"blocks": {"ffn": 8, "embedding": 8, "attention": 4}, "centroids": 16}
    train = {"max_update": 4, "valid_interval": 4, "average_last": 1}
    noise = {"scheme": "pq", "p": 0.1, "pq": {**blocks, "refit_interval": 2}, "train": train}
    quantize = {"scheme": "pq", "pq": {"blocks": blocks["blocks"], "bits": 2.2}}
    path = recipe(tmp_path, small_tsv, {"train": TRAIN}, {"quant_noise": noise}, {"quantize": quantize}, workers=2)
    run(path, tmp_path / "run")
    schemes = [
        {entry["scheme"] for entry in read_artefact(tmp_path / "run" / stage / "artefact")[1]["tensors"].values()}
        for stage in ("2-quant_noise", "3-quantize")
    ]
    assert schemes == [{"dense"}, {"dense", "pq"}]
    chosen = json.loads((tmp_path / "run/3-quantize/centroids.json").read_text())["centroids"]
    rows = {row.name: row for row in read_contents(tmp_path / "run/3-quantize/artefact").rows if row.scheme == "pq"}
    assert chosen.keys() == rows.keys()
    assert len(set(chosen.values())) > 1, "not the same for all"
    bits = 8 * sum(row.bytes for row in rows.values()) / sum(row.elements for row in rows.values())
    assert 2.0 < bits < 2.21


@pytest.mark.parametrize("pq", [{"centroids": {"ffn": 8, "embedding": 32, "attention": 16}}, {"bits": 2.5}])
def test_trained_at_p_1_a_model_is_product_quantized_and_ipq_goes_on_with_its_codes(
    small_tsv: Path, tmp_path: Path, pq: dict[str, Any]
) -> None:
    blocks = {"blocks": {"ffn": 4, "embedding": 2, "attention": 8}}
    train = {"max_update": 4, "valid_interval": 4, "average_last": 1}
    noise = {"scheme": "pq", "p": 1, "pq": {**blocks, **pq}, "train": train}
    given = {key: value for key, value in pq.items() if key != "bits"}
    ipq = {**blocks, **given, "together": True, "train": {**train, "log_interval": 1}, "distill": {"weight": 1.0}}
    path = recipe(tmp_path, small_tsv, {"train": TRAIN}, {"quant_noise": noise}, {"ipq": ipq}, workers=1)
    run(path, tmp_path / "run")
    (quantized, first), (finetuned, _) = (
        read_artefact(tmp_path / "run" / stage / "artefact") for stage in ("2-quant_noise", "3-ipq")
    )
    assert {entry["scheme"] for entry in first["tensors"].values()} == {"dense", "pq"}
    result = json.loads((tmp_path / "run/3-ipq/result.json").read_text())
    assert [(group["error"], group["blocks"]) for group in result["groups"]] == [(0, blocks["blocks"])]
    names = ("decoder.layers.0.fc1.weight", "encoder.embed_tokens.weight", "encoder.layers.0.self_attn.k_proj.weight")
    chosen = dict(zip(names, (8, 32, 16), strict=True))
    if "bits" in pq:
        chosen = json.loads((tmp_path / "run/2-quant_noise/centroids.json").read_text())["centroids"]
    for name, block in zip(names, (4, 2, 8), strict=True):
        centroids = chosen[name]
        codes = [state[name].reshape(-1, block) for state in (quantized, finetuned)]
        assert [len(blocks.unique(dim=0)) for blocks in codes] == [centroids, centroids]
        assert not torch.equal(*codes), "centroids are trained"
    line = json.loads((tmp_path / "run/3-ipq/group-1-all/metrics.jsonl").read_text().splitlines()[0])
    assert line["loss"] > 0.05, "the teacher is the model that was not quantized, not the pupil's copy"


@pytest.mark.parametrize("scheme", ["ternary", "lat", "binary"])
def test_post_training_quantization_by_every_scheme(whole: Path, tmp_path: Path, scheme: str) -> None:
    content = yaml.safe_load((whole / "config.yaml").read_text())
    quantize = {"scheme": scheme, "granularity": "tensor", "exclude": ["*embed*"]}
    content["workers"] = 1
    content["stages"] = [content["stages"][0], {"quantize": quantize}]
    shutil.copytree(whole / "1-train", tmp_path / "run" / "1-train")
    config = tmp_path / "run" / "config.yaml"
    config.write_text(yaml.safe_dump(content, sort_keys=False))
    run(config, tmp_path / "run")
    trained = read_artefact(whole / "1-train" / "artefact")[0]
    state, metadata = read_artefact(tmp_path / "run/2-quantize/artefact")
    quantizer = make_quantizer(QuantizeConfig(scheme=scheme, granularity="tensor"))  # type: ignore[arg-type]
    for name, weight in trained.items():
        packed = is_matrix(name, weight) and "embed" not in name and "output_projection" not in name
        expected = decode(quantizer.quantize(weight)) if packed else weight
        assert torch.equal(state[name], expected), name
        if name in metadata["tensors"]:
            assert (metadata["tensors"][name]["scheme"] != "dense") == packed, name
    assert json.loads((tmp_path / "run/2-quantize/result.json").read_text())["scheme"] == scheme


@pytest.mark.parametrize(
    ("stage", "top", "message"),
    [
        ({"quant_noise": {"p": 0}}, {}, "quant_noise.p: must be above 0 and at most 1, is 0"),
        ({"quant_noise": {"scheme": "int3"}}, {}, "quant_noise.scheme: "),
        ({"quant_noise": {"scheme": "binary", "clip": "mse"}}, {}, "quant_noise.clip: mse is for int8 and int4"),
        ({"quant_noise": {"scheme": "lat"}}, {"comm": {"route": "server"}}, "comm.route: owners of shards keep Adam's"),
        ({"quant_noise": {"include": ["*fc9*"]}}, {}, "quant_noise.include: '*fc9*' matches no weight; valid names"),
        (
            {"quant_noise": {"block_size": 5}},
            {},
            "quant_noise.block_size: must divide the columns of every weight, is 5; encoder.embed_tokens.weight has 16",
        ),
    ],
)
def test_bad_settings_are_one_line_before_any_training(
    small_tsv: Path, tmp_path: Path, stage: dict[str, Any], top: dict[str, Any], message: str
) -> None:
    path = recipe(tmp_path, small_tsv, {"train": TRAIN}, stage, workers=1, **top)
    done = tenko("run", path, "--run-dir", tmp_path / "run")
    assert done.code == 2
    assert len(done.errors) == 1, done.errors
    assert message in done.errors[0]
    assert not (tmp_path / "run/1-train/metrics.jsonl").exists()
