"""A run cut anywhere and resumed equals the uncut run, bit for bit: fp32 on a CPU, dropout and accumulation on."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from toy_training import Cut, differing, snapshot, toy_model, toy_trainer, train, validations

from tenko.nmt import checkpoint
from tenko.nmt.corpus import Corpus

# Checkpoints fall between lines of metrics, and validations between checkpoints: nothing coincides to help.
SETTINGS: dict[str, Any] = {
    "max_update": 8,
    "save_interval": 3,
    "log_interval": 2,
    "valid_interval": 4,
    "update_freq": 2,
    "dropout": 0.1,
}
Run = tuple[dict[str, torch.Tensor], list[dict[str, Any]], dict[str, torch.Tensor]]


@pytest.fixture(scope="module")
def uncut(small_corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("uncut")
    trainer = toy_trainer(small_corpus, folder, **SETTINGS)
    lines = train(trainer, small_corpus)
    assert [(line["kind"], line["update"]) for line in lines] == [
        ("train", 2),
        ("train", 4),
        ("valid", 4),
        ("train", 6),
        ("train", 8),
        ("valid", 8),
    ]
    return snapshot(trainer), lines, checkpoint.load(folder / "best")[0]


def finish(corpus: Corpus, folder: Path, **changes: Any) -> tuple[Any, int, list[dict[str, Any]]]:
    """A new process's part: fresh weights, resume, train to the end."""
    torch.manual_seed(12345)  # what a resumed run must not depend on
    trainer = toy_trainer(corpus, folder, **{**SETTINGS, **changes})
    resumed = trainer.resume()
    start = trainer.updates
    assert resumed == (start > 0)
    lines = train(trainer, corpus)
    return trainer, start, lines


@pytest.mark.parametrize(("cut", "start"), [(2, 0), (3, 0), (4, 3), (5, 3), (6, 3), (7, 6), (8, 6)])
def test_cut_and_resumed_equals_uncut(small_corpus: Corpus, tmp_path: Path, uncut: Run, cut: int, start: int) -> None:
    first = toy_trainer(small_corpus, tmp_path, **SETTINGS)
    before = train(first, small_corpus, cut=cut)
    assert first.updates == cut
    trainer, found_start, after = finish(small_corpus, tmp_path)
    assert found_start == start
    weights, lines, best = uncut
    assert differing(snapshot(trainer), weights) == []
    assert [line for line in before if line["update"] <= start] + after == lines
    assert differing(checkpoint.load(tmp_path / "best")[0], best) == []


def test_a_run_cut_twice_and_inside_a_checkpoint_equals_uncut(
    small_corpus: Corpus, tmp_path: Path, uncut: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(toy_trainer(small_corpus, tmp_path, **SETTINGS), small_corpus, cut=5)

    def killed(temporary: Path, target: Path) -> None:
        raise Cut

    again = toy_trainer(small_corpus, tmp_path, **SETTINGS)
    assert again.resume()
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_seal", killed)
        with pytest.raises(Cut):
            # It dies while it writes the best of update 4: all is there but for the sums.
            again.run(validate=validations(50.0))
    assert (tmp_path / "best.partial").is_dir() or (tmp_path / "update-00000006.partial").is_dir()
    trainer, start, _ = finish(small_corpus, tmp_path)
    assert start == 3
    assert differing(snapshot(trainer), uncut[0]) == []
    assert not list(tmp_path.glob("*.partial"))


def test_a_finished_run_has_nothing_left_to_do(small_corpus: Corpus, tmp_path: Path, uncut: Run) -> None:
    train(toy_trainer(small_corpus, tmp_path, **SETTINGS), small_corpus)
    trainer, start, lines = finish(small_corpus, tmp_path)
    assert (start, lines) == (8, [])
    assert differing(snapshot(trainer), uncut[0]) == []


def test_fp16_resumes_with_its_loss_scale_and_window(small_corpus: Corpus, tmp_path: Path) -> None:
    # From this scale the first updates overflow, then it grows within the run: both must be carried over.
    changes: dict[str, Any] = {"precision": "fp16", "init_scale": 2.0**19, "scale_window": 2}
    whole = toy_trainer(small_corpus, tmp_path / "whole", **{**SETTINGS, **changes})
    lines = train(whole, small_corpus)
    assert len({line["scale"] for line in lines if line["kind"] == "train"}) > 1
    first = train(toy_trainer(small_corpus, tmp_path / "cut", **{**SETTINGS, **changes}), small_corpus, cut=5)
    trainer, start, rest = finish(small_corpus, tmp_path / "cut", **changes)
    assert start == 3
    assert [line for line in first if line["update"] <= 3] + rest == lines
    assert differing(snapshot(trainer), snapshot(whole)) == []


def test_a_damaged_newest_checkpoint_stops_the_resume_and_its_removal_cures(
    small_corpus: Corpus, tmp_path: Path, uncut: Run
) -> None:
    train(toy_trainer(small_corpus, tmp_path, **SETTINGS), small_corpus, cut=7)
    newest = checkpoint.path_of(tmp_path, 6)
    content = bytearray((newest / "state.pt").read_bytes())
    content[-100] ^= 0x10
    (newest / "state.pt").write_bytes(content)
    trainer = toy_trainer(small_corpus, tmp_path, **SETTINGS)
    with pytest.raises(ValueError, match=rf"\A{newest / 'state.pt'}: damaged .*delete this folder"):
        trainer.resume()
    shutil.rmtree(newest)
    healed, start, _ = finish(small_corpus, tmp_path)
    assert start == 3
    assert differing(snapshot(healed), uncut[0]) == []


def test_a_checkpoint_of_another_model_is_refused(small_corpus: Corpus, tmp_path: Path) -> None:
    toy_trainer(small_corpus, tmp_path).save()
    for fields, message in (
        ({"ffn_dim": 64}, r"expected \[64"),
        ({"encoder_layers": 2}, r"encoder\.layers\.1\.\S+ is missing"),
    ):
        trainer = toy_trainer(small_corpus, tmp_path, model=toy_model(small_corpus, **fields))
        with pytest.raises(ValueError, match=rf"update-00000000: holds another model .*{message}"):
            trainer.resume()


def test_nothing_to_resume_from_is_not_an_error(small_corpus: Corpus, tmp_path: Path) -> None:
    assert not toy_trainer(small_corpus, tmp_path / "nowhere").resume()
