"""TensorBoard and W&B hold what metrics.jsonl holds, also after a kill and a resume; a tracker ends no training."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tenko.launch import trackers
from tenko.launch.metrics import read_metrics
from tenko.launch.recipe import load
from tenko.nmt.config import TrainConfig
from tests.integration.tenko_run import finish, run_arguments, start, tenko, wait_for_checkpoint

SETTINGS = {
    "train.max_update": "60",
    "train.precision": "fp16",
    "train.log_interval": "5",
    "train.valid_interval": "20",
    "train.save_interval": "20",
    "train.max_tokens": "300",
    "train.valid_sentences": "2",
}
Curves = dict[str, dict[int, float]]


def curves_of(metrics: Path) -> Curves:
    """What metrics.jsonl holds, as KIND/NAME: {update: figure}."""
    curves: Curves = {}
    for entry in read_metrics(metrics):
        for key, value in entry.items():
            if isinstance(value, int | float):
                curves.setdefault(f"{entry['kind']}/{key}", {})[entry["update"]] = float(value)
    return curves


def in_tensorboard(folder: Path) -> Curves:
    events = EventAccumulator(str(folder)).Reload()
    found: Curves = {}
    for tag in events.Tags()["scalars"]:
        points = events.Scalars(tag)
        found[tag] = {point.step: point.value for point in points}
        assert len(found[tag]) == len(points), f"{tag}: a step is there twice"
    return found


def in_wandb(folder: Path, run: str) -> list[Curves]:
    """What each of the run's files holds, in order; W&B's own reader reads them."""
    from wandb.proto import wandb_internal_pb2
    from wandb.sdk.internal.datastore import DataStore

    found: list[Curves] = []
    for path in sorted(folder.glob(f"offline-run-*-{run}/run-{run}.wandb")):
        store = DataStore()
        store.open_for_scan(str(path))
        curves: Curves = {}
        while (data := store.scan_data()) is not None:
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            values = {(item.key or item.nested_key[0]): json.loads(item.value_json) for item in record.history.item}
            for key, value in values.items():
                if not key.startswith("_"):
                    curves.setdefault(key, {})[values["_step"]] = float(value)
        found.append(curves)
    return found


def assert_equal(found: Curves, expected: Curves) -> None:
    assert found.keys() == expected.keys()
    for tag, points in expected.items():
        assert found[tag].keys() == points.keys(), tag
        for step, value in points.items():
            assert math.isclose(found[tag][step], value, rel_tol=1e-6), (tag, step)


@pytest.mark.torchrun
def test_curves_are_those_of_the_metrics_also_over_a_kill(
    tmp_path: Path, small_tsv: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    arguments = run_arguments(tmp_path / "run", small_tsv, **SETTINGS, **{"train.trackers": "[tensorboard, wandb]"})
    stage = tmp_path / "run" / "1-train"
    process = start(*arguments)
    wait_for_checkpoint(process, tmp_path / "run")
    process.kill()
    finish(process)
    run = (stage / "wandb-id").read_text()
    done = tenko(*arguments)
    assert done.code == 0, done.errors
    assert f"train: W&B run {run}, offline; `wandb sync` sends" in done.out

    expected = curves_of(stage / "metrics.jsonl")
    wanted = ["loss", "lr", "grad_norm", "scale", "tokens_per_second", "wire_bytes", "wire_fp32_bytes"]
    assert {f"train/{key}" for key in wanted} | {"valid/bleu", "valid/nll"} <= expected.keys()
    assert [*expected["train/loss"]] == [*range(5, 61, 5)]
    assert_equal(in_tensorboard(stage / "tensorboard"), expected)

    files = in_wandb(stage / "wandb", run)
    assert len(files) == 2, "one of each start, of the same run"
    assert_equal(files[-1], expected)


@pytest.mark.torchrun
def test_a_tracker_that_fails_is_warned_about_once_and_the_run_ends_well(
    tmp_path: Path, small_tsv: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))  # no key in a .netrc
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    settings = {"workers": "1", "train.max_update": "4", "train.trackers": "[wandb, tensorboard]"}
    done = tenko(*run_arguments(tmp_path / "run", small_tsv, **settings))
    assert done.code == 0, done.errors
    warnings = [line for line in done.out.splitlines() if "warning: tracker" in line]
    assert len(warnings) == 1, done.out
    assert warnings[0].startswith("warning: tracker wandb failed and is left out from here on: ")
    stage = tmp_path / "run" / "1-train"
    assert_equal(in_tensorboard(stage / "tensorboard"), curves_of(stage / "metrics.jsonl"))


class Failing:
    """A tracker whose server goes away after the first line."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def log(self, values: dict[str, float], step: int) -> None:
        self.calls.append((values, step))
        if len(self.calls) == 2:
            raise ConnectionResetError("the server\nis gone")

    def finish(self) -> None:
        self.calls.append("finish")


def test_a_tracker_that_fails_later_is_left_and_the_others_go_on(caplog: pytest.LogCaptureFixture) -> None:
    bad, good = Failing(), Failing()
    good.calls.append("so that it never fails")
    good.calls.append("")
    ours = trackers.Trackers.__new__(trackers.Trackers)
    ours._trackers = {"wandb": bad, "tensorboard": good}
    for update in (1, 2, 3):
        ours.log({"kind": "train", "update": update, "loss": 0.5, "ppl": None, "bleu_signature": "x"})
    ours.close()
    assert bad.calls == [({"train/update": u, "train/loss": 0.5}, u) for u in (1, 2)]
    assert [call[1] for call in good.calls[2:5]] == [1, 2, 3]
    assert good.calls[5] == "finish"
    assert [record.getMessage() for record in caplog.records] == [
        "tracker wandb failed and is left out from here on: ConnectionResetError: the server is gone"
    ]


def test_a_name_that_is_none_and_one_that_is_not_installed_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"train\.trackers\[0\]: must be one of tensorboard, wandb, is mlflow"):
        load("tiny", ["train.trackers=[mlflow]"])
    trackers.check(TrainConfig(trackers=("tensorboard", "wandb")))
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"^train\.trackers: wandb is not installed; pip install tenko\[wandb\]$"):
        trackers.check(TrainConfig(trackers=("wandb",)))
    trackers.check(TrainConfig())
