"""`profile:` of a training: traces of real ranks that hold these updates and no others; a profile never ends a run."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tenko.launch.profile import Profile
from tenko.launch.recipe import load, loads, to_dict
from tenko.launch.rundir import first_difference
from tenko.nmt.config import ProfileConfig
from tests.integration.tenko_run import run_arguments, tenko


def ranges(trace: dict[str, Any]) -> dict[str, tuple[float, float]]:
    """Begin and end of the phases in a trace, in its microseconds."""
    return {
        event["name"]: (event["ts"], event["ts"] + event["dur"])
        for event in trace["traceEvents"]
        if event.get("cat") == "user_annotation" and event["name"].partition(" ")[0] in ("update", "validate", "save")
    }


@pytest.mark.torchrun
def test_each_rank_leaves_a_trace_of_these_updates(tmp_path: Path, small_tsv: Path) -> None:
    settings = {"train.max_update": "12", "train.valid_interval": "6", "train.profile.updates": "[5, 7]"}
    done = tenko(*run_arguments(tmp_path / "run", small_tsv, **settings))
    assert done.code == 0, done.errors
    folder = tmp_path / "run" / "1-train" / "profile"
    assert (
        f"profile of updates 5 to 7, a file for each rank, in {folder}: open one at https://ui.perfetto.dev" in done.out
    )
    assert sorted(path.name for path in folder.iterdir()) == ["rank-0.json.gz", "rank-1.json.gz"]
    for rank in range(2):
        with gzip.open(folder / f"rank-{rank}.json.gz") as file:
            trace = json.load(file)
        assert trace["distributedInfo"]["rank"] == rank
        assert trace["distributedInfo"]["world_size"] == 2
        found = ranges(trace)
        assert [name for name in found if name.startswith("update")] == ["update 5", "update 6", "update 7"]
        assert found["update 6"][1] <= found["validate"][0] <= found["validate"][1] <= found["update 7"][0]
        events = [event for event in trace["traceEvents"] if event.get("ph") == "X" and event.get("cat") == "cpu_op"]
        begin, end = found["update 5"][0], found["update 7"][1]
        assert all(begin - 1e4 <= event["ts"] <= end + 1e4 for event in events), "10 ms for what comes between updates"
        within = [event for event in events if begin <= event["ts"] <= end]
        assert sum(event["name"] == "aten::_fused_adamw_" for event in within) == 3, "one step an update"
        assert sum(event["name"].startswith("aten::") for event in within) > 1000
        assert len({event["tid"] for event in within}) > 1, "the exchange has threads of its own"


def train_on(profile: Profile, updates: range) -> None:
    """What a trainer tells a profile, with an operation in each update."""
    for update in updates:
        profile.phase("update", update - 1)
        torch.ones(3).cumsum(0)
        profile.update(update)
    profile.close()


def test_a_run_that_resumes_within_them_records_the_rest(tmp_path: Path) -> None:
    lines: list[str] = []
    train_on(Profile(ProfileConfig(updates=(10, 20)), tmp_path, rank=3, log=lines.append), range(18, 30))
    with gzip.open(tmp_path / "profile" / "rank-3.json.gz") as file:
        trace = json.load(file)
    assert [*ranges(trace)] == ["update 18", "update 19", "update 20"]
    assert sum(event["name"] == "aten::cumsum" for event in trace["traceEvents"]) == 3
    assert [line.partition(",")[0] for line in lines] == ["profile of updates 18 to 20"]


def test_a_training_that_ends_within_them_leaves_what_there_is(tmp_path: Path) -> None:
    lines: list[str] = []
    train_on(Profile(ProfileConfig(updates=(2, 9)), tmp_path, rank=0, log=lines.append), range(1, 4))
    with gzip.open(tmp_path / "profile" / "rank-0.json.gz") as file:
        assert [*ranges(json.load(file))] == ["update 2", "update 3"]
    assert [line.partition(",")[0] for line in lines] == ["profile of updates 2 to 3"]


def test_none_is_made_without_updates_or_past_them(tmp_path: Path) -> None:
    for updates in ((), (1, 3)):
        train_on(Profile(ProfileConfig(updates=updates), tmp_path, rank=0, log=print), range(4, 8))
    assert not (tmp_path / "profile").exists()


def test_a_profile_that_cannot_be_written_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "profile").write_text("in the way")
    lines: list[str] = []
    train_on(Profile(ProfileConfig(updates=(1, 2)), tmp_path, rank=0, log=lines.append), range(1, 4))
    assert "could not write the profile" in caplog.text
    assert not lines


def test_a_run_that_goes_on_may_change_it_and_later_stages_have_their_own() -> None:
    plain, profiled = load("demo"), load("demo", ["quant_noise.train.profile.updates=[3, 4]"])
    assert first_difference(to_dict(plain), to_dict(profiled)) is None
    assert first_difference(to_dict(plain), to_dict(load("demo", ["quant_noise.train.lr=0.1"]))) is not None
    text = "{name: x, stages: [train: {lr: 0.1, profile: {updates: [3, 4]}}, quant_noise: {}]}"
    own = {spec.kind: getattr(spec.config, "train", spec.config) for spec in loads(text, "x.yaml").stages}
    assert own["quant_noise"].lr == 0.1  # type: ignore[union-attr]
    assert own["train"].profile.updates == (3, 4)  # type: ignore[union-attr]
    assert own["quant_noise"].profile.updates == ()  # type: ignore[union-attr]


@pytest.mark.parametrize("updates", ["[20, 10]", "[0, 3]", "[5]", "[1, 2, 3]"])
def test_bad_updates_are_one_line(updates: str) -> None:
    with pytest.raises(ValueError, match=r"train\.profile\.updates: must be \[\] or \[FROM, TO\], FROM at least 1, is"):
        load("tiny", [f"train.profile.updates={updates}"])
