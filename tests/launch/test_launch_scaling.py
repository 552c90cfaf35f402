"""`tenko bench scaling`: its rows are the paper's, each a run of its own that is done once; what it writes adds up."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from tenko.launch import bench_scaling, cli
from tenko.launch.bench_scaling import FULL, ROWS, SMALL, _as_many_tokens, _last_of_each
from tenko.launch.errors import RunFailed
from tenko.launch.metrics import read_metrics
from tenko.launch.recipe import Recipe, load, loads, to_dict
from tenko.launch.rundir import RunDirectory
from tenko.nmt.config import TrainConfig
from tests.integration.tenko_run import result, tenko

TOY = {
    "data.vocab_size": "300",
    "data.valid_size": "20",
    "data.test_size": "20",
    "model.encoder_layers": "1",
    "model.decoder_layers": "1",
    "model.embed_dim": "64",
    "model.ffn_dim": "1024",
    "model.attention_heads": "2",
    "train.warmup_updates": "4",
    "train.valid_sentences": "2",
    "train.max_tokens": "300",
}


def toy(tsv: Path) -> list[str]:
    data = {"data.train": str(tsv), "data.cache": str(tsv.parent / "cache")}
    return [f"{key}={value}" for key, value in {**data, **TOY}.items()]


def recipes(full: bool) -> dict[str, Recipe]:
    """The rows' recipes, with one GPU a machine or on CPUs."""
    name, base = (FULL, ["workers=8"]) if full else (SMALL, [])
    first, added, found = load(name, base), [], {}
    for row in ROWS:
        added += row.full if full else row.small
        found[row.name] = load(
            name, _as_many_tokens(first, name, _last_of_each([*base, *added]), row.nodes if full else 1)
        )
    return found


def training(recipe: Recipe) -> TrainConfig:
    config = recipe.stages[0].config
    assert isinstance(config, TrainConfig)
    return config


def test_the_full_rows_have_the_papers_hyper_parameters() -> None:
    rows = recipes(full=True)
    first = training(rows["fp32"])
    assert rows["fp32"].model.arch == "transformer_vaswani_wmt_en_de_big"
    assert (rows["fp32"].model.dropout, rows["fp32"].data.vocab_size) == (0.3, 32768)
    assert (first.lr, first.warmup_updates, first.adam_betas, first.label_smoothing) == (5e-4, 4000, (0.9, 0.98), 0.1)
    assert (first.precision, first.max_tokens, first.update_freq, first.clip_norm) == ("fp32", 3584, 1, 0.0)
    second = training(rows["+ 16-bit"])
    assert (second.precision, second.init_scale, second.scale_window) == ("fp16", 128, 2000)
    table = {name: (training(r).update_freq, training(r).lr, training(r).max_tokens) for name, r in rows.items()}
    assert table == {
        "fp32": (1, 5e-4, 3584),
        "+ 16-bit": (1, 5e-4, 3584),
        "+ accumulation": (16, 5e-4, 3584),
        "+ 2x lr": (16, 1e-3, 3584),
        "+ larger batches": (10, 1e-3, 5120),
        "+ nodes": (1, 1e-3, 3584),
        "+ overlap": (1, 1e-3, 3584),
        "+ 3-bit gradients": (1, 1e-3, 3584),
    }
    assert all(training(recipe).precision == "fp16" for name, recipe in rows.items() if name != "fp32")
    assert [name for name, recipe in rows.items() if recipe.comm.overlap] == ["+ overlap", "+ 3-bit gradients"]


@pytest.mark.parametrize("full", [False, True])
def test_rows_read_as_many_tokens_and_validate_as_often(full: bool) -> None:
    rows = recipes(full)
    nodes = {row.name: row.nodes if full else 1 for row in ROWS}
    first = training(rows["fp32"])
    budget = first.max_update * first.max_tokens * rows["fp32"].workers
    for name, recipe in rows.items():
        config = training(recipe)
        tokens = config.max_update * config.max_tokens * config.update_freq * recipe.workers * nodes[name]
        assert abs(tokens / budget - 1) < 0.02, name
        assert config.max_update // config.valid_interval == first.max_update // first.valid_interval, name
    accumulated, spread = training(rows["+ 2x lr"]), training(rows["+ nodes"])
    assert accumulated.max_update == spread.max_update, "as many tokens an update, by workers or by accumulation"


@pytest.mark.torchrun
def test_rows_are_run_once_and_the_table_is_theirs(tmp_path: Path, small_tsv: Path) -> None:
    out = tmp_path / "out"
    command = ["bench", "scaling", *toy(small_tsv), "--updates", "16", "--out", out]
    wanted = ["--row", "accumulation", "--row", "3-bit gradients"]
    done = tenko(*command, *wanted)
    assert done.code == 0, done.errors
    assert sorted(path.name for path in out.iterdir() if path.is_dir()) == ["3-accumulation", "8-3-bit-gradients"]
    table = [line.split("  ")[0] for line in done.out.splitlines()]
    assert {"row", "+ accumulation", "+ 3-bit gradients"} <= {*table}
    assert "+ 16-bit: not run: tenko run scaling-small " in done.out

    rows = {row["name"]: row for row in json.loads((out / "scaling.json").read_text())["rows"]}
    accumulation, ours = rows["+ accumulation"], rows["+ 3-bit gradients"]
    assert (accumulation["updates"], accumulation["workers"], accumulation["precision"]) == (4, 1, "bf16")
    assert (ours["workers"], ours["precision"]) == (2, "bf16")
    lines = read_metrics(out / "3-accumulation" / "1-train" / "metrics.jsonl")
    assert accumulation["valid_loss"] == next(line["nll"] for line in reversed(lines) if line["kind"] == "valid")
    assert accumulation["test_bleu"] == result(out / "3-accumulation", "1-train")["bleu"]
    seconds = [line["seconds"] for line in lines if line["kind"] == "train"]
    assert accumulation["seconds"] == seconds[-1]
    assert [point[0] for point in accumulation["curve"]] == seconds
    assert 300 < accumulation["tokens_per_update"] < 4 * 300
    wire = result(out / "8-3-bit-gradients", "1-train")["wire"]
    assert wire["fp32_bytes"] > 3 * wire["bytes_sent"]
    assert (out / "scaling.png").read_bytes().startswith(b"\x89PNG")
    markdown = (out / "scaling.md").read_text()
    assert markdown.startswith("| row | precision | workers |")

    program, run, recipe, *arguments = shlex.split(accumulation["command"])
    assert (program, run, recipe, arguments[-2:]) == ("tenko", "run", SMALL, ["--run-dir", str(out / "3-accumulation")])
    assert to_dict(load(recipe, arguments[:-2])) == to_dict(RunDirectory.read(out / "3-accumulation").recipe)
    again = tenko(*command, *wanted)
    assert again.code == 0
    assert "accumulation: tenko run" not in again.out, "a finished row is not done again"
    assert [line for line in again.out.splitlines() if line.startswith("+ acc")] == [
        line for line in done.out.splitlines() if line.startswith("+ acc") and "tenko run" not in line
    ]

    whole = shlex.split(ours["command"].replace("comm.overlap=true", "comm.overlap=false"))[1:-1]
    assert tenko(*whole, tmp_path / "one-piece").code == 0
    artefacts = [
        folder / "1-train" / "artefact" / "model.safetensors"
        for folder in (out / "8-3-bit-gradients", tmp_path / "one-piece")
    ]
    assert artefacts[0].read_bytes() == artefacts[1].read_bytes(), "overlap changes no bit"

    other = tenko(*command, "train.lr=0.1", *wanted[:2])
    assert other.code == 2
    assert re.search(
        r"^tenko: error: \+ accumulation: .*began with train.lr: 0.002, the recipe now says 0.1", other.errors[-1]
    )


@pytest.mark.torchrun
def test_ranks_are_compared_in_turns(tmp_path: Path, small_tsv: Path) -> None:
    settings = [*toy(small_tsv), "--ranks", "1", "2", "--rounds", "1", "--updates", "12"]
    done = tenko("bench", "scaling", *settings, "--out", tmp_path)
    assert done.code == 0, done.errors
    value = json.loads((tmp_path / "ranks.json").read_text())
    assert [value["runs"][count][0]["workers"] for count in ("1", "2")] == [1, 2]
    one, two = (value["medians"][count] for count in ("1", "2"))
    assert f"{two / one:.2f}x" in (tmp_path / "ranks.md").read_text()
    wire = result(tmp_path / "ranks-2-turn-1", "1-train")["wire"]
    assert wire["fp32_bytes"] > 5 * wire["bytes_sent"], "3 bits up, 4 down"


def test_without_overlap_all_gradients_are_one_bucket() -> None:
    import torch
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    from tenko.launch.stage_tools import ONE_BUCKET

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        counts = []
        for cap in ({}, {"bucket_cap_mb": ONE_BUCKET}):
            layers = torch.nn.Sequential(*[torch.nn.Linear(512, 512) for _ in range(4)])
            model = DistributedDataParallel(layers, **cap)
            for _ in range(3):  # buckets are rebuilt after the first
                model(torch.ones(2, 512)).sum().backward()
            counts.append(model._get_ddp_logging_data()["num_buckets_reduced"])
    finally:
        dist.destroy_process_group()
    assert counts == [2, 1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--row", "fp64"],
            "--row: fp64: no such row; valid: fp32, 16-bit, accumulation, 2x lr, larger batches, nodes",
        ),
        (["--workers", "2"], "--workers: goes with --full"),
        (["train.nix=2"], "override train.nix=2: train.nix: unknown key"),
        (["--ranks", "1", "2", "nix"], "override nix: must be key=value"),
        (["--ranks", "0", "2"], "Invalid value for '--ranks'"),
    ],
)
def test_bad_input_is_one_line(tmp_path: Path, arguments: list[str], message: str) -> None:
    done = tenko("bench", "scaling", *arguments, "--out", tmp_path / "out")
    assert done.code == 2
    assert len(done.errors) == 1
    assert done.errors[0].startswith(f"tenko: error: {message}"), done.errors
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ranks", "1", "2", "--row", "16-bit"], "--row: does not go with --ranks"),
        (["--ranks", "1", "2", "--full"], "--full: does not go with --ranks"),
        (["--ranks", "1", "2", "--workers", "3"], "--workers: does not go with --ranks"),
        (["--rounds", "2"], "--rounds: goes with --ranks"),
        (["--out", "file"], "--out: file: is a file; give a folder"),
        (["--out", "file", "--ranks", "1", "2"], "--out: file: is a file; give a folder"),
    ],
)
def test_what_would_be_of_no_effect_is_refused_before_anything_runs(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    def start(run: bench_scaling.Run, title: str) -> None:
        raise RunFailed(f"{title}was started", 1)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bench_scaling.Run, "start", start)
    Path("file").touch()
    with pytest.raises(SystemExit) as ended:
        cli.main(["bench", "scaling", *arguments])
    assert ended.value.code == 2
    assert capsys.readouterr() == ("", f"tenko: error: {message}\n")


def test_what_needs_more_machines_is_a_command_for_each(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bench_scaling.bench([], full=True, rows=["nodes"], updates=None, workers=8, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("+ nodes: "))
    assert line.startswith("+ nodes: needs 16 machines; on each of them: tenko run scaling workers=8 ")
    assert line.endswith(f"--run-dir {tmp_path}/out/6-nodes --nodes 16 --rendezvous HOST:PORT")
    arguments = shlex.split(line)[line.split().index("scaling") + 1 :]
    assert load(FULL, arguments[: arguments.index("--run-dir")]).workers == 8
    assert loads("{name: x, comm: {overlap: false}, stages: [train]}", "x").comm.overlap is False
