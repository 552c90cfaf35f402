"""The stage `lottery` as a user runs it, two ranks under torchrun: exact rewinding, zeros that stay, cuts that heal."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tenko_run import Done, tenko
from torch import Tensor
from toy_recipe import write_recipe
from toy_training import TIMINGS

from tenko.compression import read_artefact
from tenko.compression.masks import Masks
from tenko.nmt import checkpoint

pytestmark = pytest.mark.torchrun
TRAIN: dict[str, Any] = {
    "max_update": 20,
    "max_tokens": 300,
    "update_freq": 2,
    "precision": "fp32",
    "lr": 5e-3,
    "warmup_updates": 6,
    "weight_decay": 0.01,
    "log_interval": 4,
    "valid_interval": 10,
    "valid_sentences": 4,
    "save_interval": 4,
    "keep_last": 5,
    "average_last": 2,
    "keep_updates": [0, 6],
    "decode": {"beam": 1, "max_tokens": 2000},
}
TICKET: dict[str, Any] = {"rounds": 2, "fraction": 0.3, "rewind_to": 6}


def recipe(folder: Path, tsv: Path, *stages: dict[str, Any], workers: int = 2, **train: Any) -> Path:
    """A recipe file that trains the toy, and then goes through `stages`."""
    return write_recipe(folder / "toy.yaml", tsv, [{"train": {**TRAIN, **train}}, *stages], workers=workers)


def run(path: Path, directory: Path) -> Done:
    done = tenko("run", path, "--run-dir", directory)
    assert done.code == 0, done.errors[-20:]
    return done


@pytest.fixture(scope="module")
def whole(small_tsv: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ticket of two rounds, then one that prunes nothing."""
    folder = tmp_path_factory.mktemp("whole")
    nothing = {"lottery": {"rounds": 1, "fraction": 0.0, "rewind_to": 6}, "name": "nothing"}
    run(recipe(folder, small_tsv, {"lottery": TICKET}, nothing), folder / "run")
    return folder / "run"


def round_masks(folder: Path) -> Masks:
    return Masks.from_state_dict(load_file(folder / "masks.safetensors"))


def checkpoints(folder: Path) -> dict[str, dict[str, Any]]:
    """Of a training: by name, all tensors of its weights and of its optimizer."""
    found = {}
    for path in sorted((folder / "checkpoints").iterdir()):
        weights, state, rank_state = checkpoint.load(path)
        found[path.name] = {"weights": weights, "state": state, "rank": rank_state}
    return found


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(value, other[key]) for key, value in one.items())
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    return bool(one == other)


def assert_pruned(folder: Path, masks: Masks) -> None:
    """Every checkpoint and the artefact of a round hold exact zeros where it pruned, and others elsewhere."""
    found = checkpoints(folder)
    assert {"best", "update-00000020"} <= found.keys()
    held = {name: entry["weights"] for name, entry in found.items()}
    held["artefact"] = read_artefact(folder / "artefact")[0]
    for where, weights in held.items():
        for name, mask in masks.items():
            zeros = weights[name][~mask]
            assert torch.equal(zeros, torch.zeros_like(zeros)), (where, name)
            assert weights[name][mask].count_nonzero() > 0.9 * mask.sum(), (where, name)


def test_a_ticket_that_prunes_nothing_is_the_dense_run_bit_for_bit(whole: Path) -> None:
    dense, again = checkpoints(whole / "1-train"), checkpoints(whole / "3-nothing" / "round-01")
    assert {f"update-{u:08d}" for u in (8, 12, 16, 20)} <= again.keys()
    for name in again.keys() & dense.keys() - {"best"}:
        assert equal(dense[name]["weights"], again[name]["weights"]), name
        for key in ("optimizer", "scaler", "update"):
            assert equal(dense[name]["state"][key], again[name]["state"][key]), (name, key)
        assert equal(dense[name]["rank"]["route"], again[name]["rank"]["route"]), f"{name}: error feedback as well"
    assert equal(read_artefact(whole / "1-train/artefact")[0], read_artefact(whole / "3-nothing/artefact")[0])
    hypotheses = [(whole / stage / "hypotheses.txt").read_text() for stage in ("1-train", "3-nothing")]
    assert hypotheses[0] == hypotheses[1]


def test_rounds_prune_to_the_exact_count_and_pruned_weights_stay_zero(whole: Path) -> None:
    stage = whole / "2-lottery"
    first, second = (round_masks(stage / name) for name in ("round-01", "round-02"))
    assert second.is_within(first)
    assert not any("embed" in name or "norm" in name or "bias" in name for name in first)
    assert [masks.remaining for masks in (first, second)] == [round(first.total * 0.7**n) for n in (1, 2)]
    assert_pruned(stage / "round-01", first)
    assert_pruned(stage / "round-02", second)
    assert Masks.of_zeros(*_model(stage / "artefact")).counts == second.counts, "later stages find the mask"


def _model(artefact: Path) -> tuple[torch.nn.Module]:
    from tenko.launch.stage_tools import read_model

    return (read_model(artefact)[0],)


def test_moments_were_restored_under_the_mask_and_the_wire_carried_zeros(whole: Path) -> None:
    stage = whole / "2-lottery"
    dense = checkpoints(whole / "1-train")["update-00000006"]
    names = list(_model(stage / "artefact")[0].state_dict().keys() & dense["weights"].keys())
    order = [name for name, _ in _model(stage / "artefact")[0].named_parameters()]
    for folder in ("round-01", "round-02"):
        masks = round_masks(stage / folder)
        early = checkpoints(stage / folder)["update-00000008"]
        assert names
        for name, mask in masks.items():
            index = order.index(name)
            moments, before = early["state"]["optimizer"]["state"][index], dense["state"]["optimizer"]["state"][index]
            assert moments["step"] == before["step"] + 2, "goes on from update 6"
            assert not moments["exp_avg"][~mask].any(), name
            assert not moments["exp_avg_sq"][~mask].any(), name
            # 3 bits may send nothing of one weight in eight updates
            assert moments["exp_avg_sq"][mask].count_nonzero() > 0.98 * mask.sum(), name


def test_the_result_is_a_table_and_a_plot_of_figures_from_the_files(whole: Path) -> None:
    stage = whole / "2-lottery"
    result = json.loads((stage / "result.json").read_text())
    assert [row["round"] for row in result["rounds"]] == [0, 1, 2]
    for row, folder in zip(result["rounds"], (whole / "1-train", stage / "round-01", stage / "round-02"), strict=True):
        own = json.loads((folder / "result.json").read_text())
        assert row["bleu"] == own["bleu"]
        assert row["artefact_bytes"] == (folder / "artefact/model.safetensors").stat().st_size
        assert len((folder / "hypotheses.txt").read_text().splitlines()) == own["sentences"]
    sizes = [row["artefact_bytes"] for row in result["rounds"]]
    assert sizes == sorted(sizes, reverse=True)
    assert (stage / "artefact/model.safetensors").read_bytes() == (
        stage / "round-02/artefact/model.safetensors"
    ).read_bytes()
    assert (stage / "tickets.png").read_bytes().startswith(b"\x89PNG")
    assert (stage / "tickets.svg").read_text().startswith("<svg")
    report = (whole / "report.html").read_text()
    assert report.count("BLEU against the weights left") == 2
    assert "<td>49.0%</td>" in report


def test_cut_and_resumed_equals_uncut_and_finished_rounds_are_left_alone(whole: Path, tmp_path: Path) -> None:
    cut = tmp_path / "run"
    shutil.copytree(whole, cut)
    shutil.rmtree(cut / "3-nothing")
    stage = cut / "2-lottery"
    # As a kill after update 13 of round 2 leaves it: a checkpoint of 12, lines of metrics beyond it.
    for name in ("result.json", "artefact", "hypotheses.txt"):
        for path in (stage / name, stage / "round-02" / name):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    for update in (16, 20):
        shutil.rmtree(checkpoint.path_of(stage / "round-02/checkpoints", update))
    untouched = {p: p.stat().st_mtime_ns for p in (stage / "round-01").rglob("*") if p.is_file()}
    config = cut / "config.yaml"
    content = yaml.safe_load(config.read_text())
    content["stages"].pop()
    config.write_text(yaml.safe_dump(content, sort_keys=False))
    assert tenko("report", cut).code == 0
    page = (cut / "report.html").read_text()
    assert "Not finished; 1 of 2 rounds are." in page
    assert "<td>70.0%</td>" in page
    assert "<td>49.0%</td>" not in page
    done = run(config, cut)
    assert any("round-01 finished before, left alone" in line for line in [*done.errors, *done.out.splitlines()])
    assert {p: p.stat().st_mtime_ns for p in (stage / "round-01").rglob("*") if p.is_file()} == untouched
    uncut, resumed = checkpoints(whole / "2-lottery/round-02"), checkpoints(stage / "round-02")
    assert uncut.keys() == resumed.keys()
    for name in uncut.keys() - {"best"}:
        for part in ("weights", "rank"):
            assert equal(_timeless(uncut[name][part]), _timeless(resumed[name][part])), (name, part)
        assert equal(uncut[name]["state"]["optimizer"], resumed[name]["state"]["optimizer"]), name
    for file in ("artefact/model.safetensors", "hypotheses.txt", "round-02/masks.safetensors"):
        assert (stage / file).read_bytes() == (whole / "2-lottery" / file).read_bytes(), file
    lines = [
        [{k: v for k, v in json.loads(line).items() if k not in TIMINGS} for line in f]
        for f in ((path / "round-02/metrics.jsonl").read_text().splitlines() for path in (whole / "2-lottery", stage))
    ]
    assert lines[0] == lines[1]


def test_other_workers_train_rounds_with_updates_as_large_as_the_dense_ones(
    whole: Path, small_tsv: Path, tmp_path: Path
) -> None:
    directory = tmp_path / "run"
    shutil.copytree(whole, directory, ignore=shutil.ignore_patterns("2-*", "3-*", "lock"))
    config = yaml.safe_load((directory / "config.yaml").read_text())
    (directory / "config.yaml").write_text(yaml.safe_dump({**config, "stages": config["stages"][:1]}))
    ticket = {"rounds": 1, "fraction": 0.3, "rewind_to": 6}
    rounds = {"reinit": {"control": "reinit"}, "zero": {"moments": "zero"}, "no_rewind": {"control": "no_rewind"}}
    stages = [{"lottery": {**ticket, **settings}, "name": name} for name, settings in rounds.items()]
    run(recipe(tmp_path, small_tsv, *stages, workers=1), directory)
    for number, name in enumerate(rounds, 2):
        state = checkpoint.load(directory / f"{number}-{name}/round-01/checkpoints/update-00000020")[1]
        assert (state["world"], state["micro_batches"]) == (1, 4), f"{name}: 2 workers of 2 micro-batches each before"


def _timeless(part: Any) -> Any:
    return {key: value for key, value in part.items() if key != "figures"}


def test_fp16_with_loss_scaling_keeps_exact_zeros(small_tsv: Path, tmp_path: Path) -> None:
    path = recipe(tmp_path, small_tsv, {"lottery": {**TICKET, "rounds": 1, "embeddings": True}}, precision="fp16")
    run(path, tmp_path / "run")
    folder = tmp_path / "run/2-lottery/round-01"
    masks = round_masks(folder)
    assert "encoder.embed_tokens.weight" in masks
    assert not any("decoder.embed" in name or "output_projection" in name for name in masks), "tied: counted once"
    assert_pruned(folder, masks)
    state = checkpoints(folder)["update-00000020"]["state"]
    assert state["scaler"]["scale"] > 0
    assert json.loads((folder / "result.json").read_text())["precision"] == "fp16"


def test_a_round_learns_from_the_teacher_of_the_dense_model(whole: Path, small_tsv: Path, tmp_path: Path) -> None:
    taught = {**TRAIN, "max_update": 12, "distill": {"weight": 0.7}, "keep_updates": [4]}
    stages = [
        {"pretrained": {"model": str(whole / "1-train/artefact")}},
        {"train": taught},
        {"lottery": {"rounds": 1, "fraction": 0.0, "rewind_to": 4}},
    ]
    run(write_recipe(tmp_path / "toy.yaml", small_tsv, stages, workers=1), tmp_path / "run")
    dense, ticket = (read_artefact(tmp_path / "run" / stage / "artefact")[0] for stage in ("2-train", "3-lottery"))
    assert equal(dense, ticket)


def test_controls_train_what_they_say(small_tsv: Path, tmp_path: Path) -> None:
    ticket = {**TICKET, "rounds": 2}
    controls = [
        {"lottery": {**ticket, "control": control, **more}, "name": control}
        for control, more in {
            "random": {"masks_of": "lottery"},
            "reinit": {"masks_of": "lottery"},
            "constant": {"masks_of": "lottery"},
            "no_rewind": {},
            "stabilised": {"scope": "module", "moments": "zero"},
        }.items()
    ]
    alone = {**ticket, "control": "reinit", "masks_of": "lottery", "one_shot": True}
    controls.append({"lottery": alone, "name": "alone"})
    # a learning rate of (nearly) zero and no decay: what a round ends with is what it began with
    still = {
        "lr": 1e-30,
        "warmup_init_lr": 0,
        "weight_decay": 0,
        "max_update": 8,
        "save_interval": 8,
        "average_last": 1,
    }
    run(recipe(tmp_path, small_tsv, {"lottery": ticket}, *controls, workers=1, **still), tmp_path / "run")
    stages = {path.name[2:]: path for path in (tmp_path / "run").glob("?-*")}
    only = stages.pop("alone")
    masks = {name: round_masks(stages[name] / "round-02") for name in stages if name != "train"}
    assert masks["random"].counts == masks["lottery"].counts
    assert masks["random"] != masks["lottery"] == masks["reinit"] == masks["constant"]
    assert len(set(masks["stabilised"].counts.values())) == len({m.numel() for m in masks["stabilised"].values()})
    ends = {name: checkpoint.load(checkpoint.path_of(stages[name] / "round-02/checkpoints", 8))[0] for name in masks}
    dense = checkpoint.load(checkpoint.path_of(stages["train"] / "checkpoints", 6))[0]
    for name, mask in masks["lottery"].items():
        torch.testing.assert_close(ends["lottery"][name], dense[name] * mask, msg=name)
        torch.testing.assert_close(ends["random"][name], dense[name] * masks["random"][name], msg=name)
        torch.testing.assert_close(ends["no_rewind"][name], dense[name] * masks["no_rewind"][name], msg=name)
        torch.testing.assert_close(ends["stabilised"][name], dense[name] * masks["stabilised"][name], msg=name)
        assert torch.equal(ends["reinit"][name] != 0, mask)
        assert not torch.isclose(ends["reinit"][name], dense[name])[mask].any(), name
        assert len(ends["constant"][name][mask].abs().unique()) == 1
        assert torch.equal(ends["constant"][name].sign(), dense[name].sign() * mask)
    assert [path.name for path in only.glob("round-*")] == ["round-01"]
    assert round_masks(only / "round-01") == masks["lottery"], "of the round with as many prunings"
    end = checkpoint.load(checkpoint.path_of(only / "round-01/checkpoints", 8))[0]
    assert all(torch.equal(end[name], weight) for name, weight in ends["reinit"].items())
    begins = {name: _first_update(stages[name] / "round-02") for name in masks}
    assert begins == {**dict.fromkeys(masks, 8), "reinit": 4, "stabilised": 4}, "first line of metrics: every 4 updates"


def _first_update(folder: Path) -> int:
    return int(json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])["update"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fraction": 1.0}, "control.fraction: must be in [0, 1), is 1.0"),
        ({"rounds": 0}, "control.rounds: must be at least 1, is 0"),
        ({"rewind_to": 7}, "control.rewind_to: update 7 is not among train.keep_updates: 0, 6"),
        ({"control": "random", "masks_of": "other"}, "control.masks_of: other is no lottery stage before this one"),
        (
            {"control": "random", "masks_of": "lottery", "rounds": 3},
            "control.rounds: lottery has no masks after 3 prunings; it has them after 1, 2",
        ),
    ],
)
def test_bad_settings_are_one_line_before_any_training(
    small_tsv: Path, tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    control = {"lottery": {**TICKET, **settings}, "name": "control"}
    path = recipe(tmp_path, small_tsv, {"lottery": TICKET}, control)
    done = tenko("run", path, "--run-dir", tmp_path / "run")
    assert done.code == 2
    assert len(done.errors) == 1, done.errors
    assert message in done.errors[0]
    assert not (tmp_path / "run").exists()


def test_a_pattern_without_a_match_and_a_lost_checkpoint_are_one_line(whole: Path, tmp_path: Path) -> None:
    cut = tmp_path / "run"
    shutil.copytree(whole / "1-train", cut / "1-train")
    content = yaml.safe_load((whole / "config.yaml").read_text())
    content["workers"] = 1
    content["stages"] = [content["stages"][0], {"lottery": {**TICKET, "include": ["*fc9*"]}}]
    (cut / "config.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    done = tenko("run", cut / "config.yaml", "--run-dir", cut)
    assert done.code == 2
    assert "lottery.include: '*fc9*' matches no weight; valid names are encoder" in done.errors[-1]
    done = tenko("run", cut / "config.yaml", "--run-dir", tmp_path / "anew")
    assert done.code == 2
    assert "lottery.include: '*fc9*' matches no weight" in done.errors[-1]
    assert not (tmp_path / "anew/1-train/metrics.jsonl").exists(), "said before any training"
    shutil.rmtree(checkpoint.path_of(cut / "1-train/checkpoints", 6))
    content["stages"][1] = {"lottery": TICKET}
    (cut / "config.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    done = tenko("run", cut / "config.yaml", "--run-dir", cut)
    assert done.code == 2
    assert "rewind_to: update 6 was not saved in" in done.errors[-1]
    assert done.errors[-1].endswith("saved: 0, 4, 8, 12, 16, 20")
