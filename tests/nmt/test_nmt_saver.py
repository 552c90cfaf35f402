"""Saves in the background: what is written is what was there, one at a time, and nothing is lost or hidden."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_nmt_checkpoint import largest_file
from toy_training import toy_trainer, validations

from tenko.nmt import checkpoint, saver
from tenko.nmt.checkpoint_parts import part_of, write_part
from tenko.nmt.corpus import Corpus
from tenko.nmt.saver import Content, Saver


class Gate:
    """Holds up the saving thread of this process before it writes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.opened, self.begun = threading.Event(), 0

        def held(*args: Any, **kwargs: Any) -> None:
            self.begun += 1
            assert self.opened.wait(60)
            write_part(*args, **kwargs)

        monkeypatch.setattr(saver, "write_part", held)


def content(folder: Path, update: int, weights: dict[str, torch.Tensor], **state: Any) -> Content:
    target = checkpoint.path_of(folder, update)
    return Content(target=target, model_state=weights, state={"update": update, **state}, rank_state={"rank": 0})


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_what_is_written_is_what_was_there_when_training_went_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch)
    weights = {"a": torch.ones(5)}
    moments = {"optimizer": {"state": {0: {"exp_avg": torch.full((3,), 2.0)}}, "groups": [{"lr": 0.5}]}}
    saves = Saver(tmp_path)
    saves.save([content(tmp_path, 1, weights, **moments)])
    weights["a"].zero_()
    moments["optimizer"]["state"][0]["exp_avg"].zero_()
    moments["optimizer"]["groups"][0]["lr"] = 0.25
    assert checkpoint.list_updates(tmp_path) == []
    gate.opened.set()
    saves.finish()
    tensors, state, own = checkpoint.load(checkpoint.path_of(tmp_path, 1))
    assert torch.equal(tensors["a"], torch.ones(5))
    assert torch.equal(state["optimizer"]["state"][0]["exp_avg"], torch.full((3,), 2.0))
    assert state["optimizer"]["groups"] == [{"lr": 0.5}]
    assert own == {"rank": 0}


def test_the_next_save_waits_for_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch)
    saves, pruned = Saver(tmp_path), []
    saves.save([content(tmp_path, 1, {"a": torch.full((5,), 1.0)})], lambda: pruned.append(1))
    threading.Timer(0.3, gate.opened.set).start()
    started = time.monotonic()
    saves.save([content(tmp_path, 2, {"a": torch.full((5,), 2.0)})], lambda: pruned.append(2))
    assert time.monotonic() - started > 0.2
    assert 1 in pruned, "what follows a save is part of it"
    saves.finish()
    for update in (1, 2):  # the memory of the copy is used again, after it was written
        assert checkpoint.load(checkpoint.path_of(tmp_path, update))[0]["a"][0] == update


def test_training_goes_on_while_a_checkpoint_is_written(
    small_corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch)
    trainer = toy_trainer(small_corpus, tmp_path, max_update=6, save_interval=2, valid_interval=6)
    seen: list[tuple[int, list[int]]] = []

    def on_update(update: int) -> None:
        if update == 4:  # made while the thread stands before writing update 2
            assert gate.begun == 1
            gate.opened.set()
        seen.append((update, checkpoint.list_updates(tmp_path)))

    trainer.run(validate=validations(1.0), on_update=on_update)
    assert seen[:4] == [(update, []) for update in (1, 2, 3, 4)]
    assert checkpoint.list_updates(tmp_path) == [2, 4, 6], "all are there when the training returns"


def test_a_full_disk_ends_the_run_at_the_next_update_with_the_checkpoints_name(
    small_corpus: Corpus, tmp_path: Path
) -> None:
    trainer = toy_trainer(small_corpus, tmp_path, max_update=50, save_interval=2, valid_interval=50)
    with largest_file(1000), pytest.raises(OSError, match=r"\A.*\Z") as caught:
        trainer.run(validate=validations(), on_update=lambda update: time.sleep(0.1) if update > 2 else None)
    wanted = f"{checkpoint.path_of(tmp_path, 2)}: cannot write the checkpoint: "
    assert str(caught.value).startswith(wanted)
    assert str(caught.value).endswith("; earlier ones are intact")
    assert trainer.updates <= 4
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    again = toy_trainer(small_corpus, tmp_path, max_update=3, valid_interval=50)
    assert not again.resume()
    again.run(validate=validations(1.0))
    assert checkpoint.list_updates(tmp_path) == [3]
    assert not list(tmp_path.glob("*.partial"))


def test_a_failure_of_the_last_save_is_not_hidden(small_corpus: Corpus, tmp_path: Path) -> None:
    trainer = toy_trainer(small_corpus, tmp_path, max_update=2, valid_interval=50)
    with largest_file(1000), pytest.raises(OSError, match="cannot write the checkpoint"):
        trainer.run(validate=validations(1.0))


def test_rank_0_waits_for_the_parts_of_all_and_takes_none_of_a_run_that_was_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed = tmp_path / "update-00000001.0badcafe-1.partial"
    write_part(killed, rank=1, rank_state={"of": "the killed run"})
    saves = Saver(tmp_path)
    assert not killed.exists()
    write_part(killed, rank=1, rank_state={"of": "the killed run"})  # it was still writing
    saves.world = 2
    saves.save([content(tmp_path, 1, {"a": torch.ones(5)})])
    wait_for(lambda: any(part_of(path, 0).exists() for path in tmp_path.glob("*.partial")))
    time.sleep(0.1)
    assert checkpoint.list_updates(tmp_path) == []
    (ours,) = [path for path in tmp_path.glob("*.partial") if path != killed]
    write_part(ours, rank=1, rank_state={"of": "this run"})
    saves.finish()
    folder = checkpoint.path_of(tmp_path, 1)
    assert checkpoint.load_rank(folder, 1) == {"of": "this run"}
    assert checkpoint.damage_of(folder) is None

    monkeypatch.setattr(saver, "PARTING", 0.2)
    saves.save([content(tmp_path, 2, {"a": torch.ones(5)})])
    saves.abandon()  # the other rank is gone
    with pytest.raises(OSError, match=r"update-00000002: cannot write .*rank 1 has not written its part"):
        saves.finish()
    assert checkpoint.list_updates(tmp_path) == [1]


def test_a_save_with_the_best_takes_no_memory_beyond_that_of_one_without(tmp_path: Path) -> None:
    weights, moment = {"a": torch.ones(5)}, torch.zeros(7)
    saves = Saver(tmp_path)

    def update(number: int) -> Content:
        state = {"optimizer": {0: {"exp_avg": moment}}, "techniques": [{"moments": moment + number}]}
        target = checkpoint.path_of(tmp_path, number)
        return Content(target=target, model_state=weights, state=state, rank_state={"route": {"feedback": moment}})

    def best(number: int) -> Content:
        state = {"bleu": 1.0, "techniques": [{"moments": moment + number}]}
        return Content(target=tmp_path / "best", model_state=weights, state=state)

    sizes = []
    for contents in ([update(1)], [best(2), update(2)], [update(3)], [best(4)], [best(5), update(5)]):
        saves.save(contents)
        saves.finish()
        sizes.append(sum(buffer.numel() for buffer in saves._buffers.values()))
    assert sizes == [5 + 3 * 7] * 5
    for folder in (tmp_path / "best", checkpoint.path_of(tmp_path, 5)):
        assert torch.equal(checkpoint.load(folder)[1]["techniques"][0]["moments"], moment + 5)


def test_a_rank_beside_0_writes_its_own_state_and_copies_nothing_else(tmp_path: Path) -> None:
    saves = Saver(tmp_path)
    saves.rank, saves.world = 1, 2
    best = Content(target=tmp_path / "best", model_state={"a": torch.ones(5)}, state={})
    saves.save([best, content(tmp_path, 1, {"a": torch.ones(5)}, moments=torch.ones(5))])
    saves.finish()
    (folder,) = tmp_path.iterdir()
    assert sorted(path.name for path in folder.iterdir()) == ["part-1.json", "rank-1.pt"]
    assert saves._buffers == {}
