"""Checkpoints are whole, vouched for, or not there at all."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from tenko.nmt import checkpoint, checkpoint_parts
from tenko.nmt.checkpoint import path_of
from tenko.nmt.checkpoint_parts import part_of, sha256, write_part

FILES = ["checksums.json", "model.safetensors", "rank-0.pt", "state.pt"]


def weights(value: float) -> dict[str, torch.Tensor]:
    return {"a": torch.full((30, 7), value), "b.weight": torch.tensor([value, -value, 3.0])}


def write(directory: Path, update: int, value: float = 1.5, size: int = 1) -> Path:
    target = path_of(directory, update)
    checkpoint.save(
        target,
        model_state=weights(value),
        state={"update": update, "optimizer": {"moments": torch.full((size,), value)}},
        rank_state={"route": {"step": update}},
    )
    return target


def test_what_was_saved_comes_back_bit_for_bit(tmp_path: Path) -> None:
    folder = write(tmp_path, 7, 0.1)
    assert sorted(os.listdir(folder)) == FILES
    tensors, state, rank_state = checkpoint.load(folder)
    assert all(torch.equal(tensors[name], tensor) for name, tensor in weights(0.1).items())
    assert state["update"] == 7
    assert torch.equal(state["optimizer"]["moments"], torch.tensor([0.1]))
    assert rank_state == {"route": {"step": 7}}
    assert checkpoint.load(folder, rank=1)[2] is None


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_byte_is_found_and_its_file_named(tmp_path: Path, name: str) -> None:
    path = write(tmp_path, 7) / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"\A.*\Z") as caught:
        checkpoint.load(path.parent)
    if name == "checksums.json":  # a digit of a sum, or the shape of the file: some file is said not to fit
        assert str(path.parent) in str(caught.value)
    else:
        assert str(caught.value).startswith(f"{path}: damaged")
    assert "delete this folder to go on from the checkpoint before it" in str(caught.value)


@pytest.mark.parametrize("name", FILES[1:])
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    path = write(tmp_path, 7) / name
    path.unlink()
    with pytest.raises(ValueError, match=r"\A.*\Z") as caught:
        checkpoint.load(path.parent)
    assert str(caught.value).startswith(f"{path}: missing")


def test_unreadable_sums_are_damage_and_a_missing_folder_is_said_to_be_missing(tmp_path: Path) -> None:
    folder = write(tmp_path, 7)
    for content in ("{", "[]", "", "[" * 5000):
        (folder / "checksums.json").write_text(content)
        with pytest.raises(ValueError, match=r"checksums\.json: damaged"):
            checkpoint.load(folder)
    with pytest.raises(ValueError, match=r"update-00000009: no such checkpoint\Z"):
        checkpoint.load(path_of(tmp_path, 9))


@pytest.mark.parametrize("name", ["model.safetensors", "state.pt"])
def test_a_file_that_is_in_no_sum_is_missed(tmp_path: Path, name: str) -> None:
    folder = write(tmp_path, 7)
    sums = json.loads((folder / "checksums.json").read_text())
    del sums[name]
    (folder / "checksums.json").write_text(json.dumps(sums))
    (folder / name).unlink()
    with pytest.raises(ValueError, match=rf"\A{folder / name}: missing from the checkpoint"):
        checkpoint.load(folder)


def test_state_is_never_unpickled_as_code(tmp_path: Path) -> None:
    folder = write(tmp_path, 7)
    torch.save({"update": 7, "path": Path("x")}, folder / "state.pt")  # any class that is not plain data
    sums = json.loads((folder / "checksums.json").read_text())
    sums["state.pt"] = sha256(folder / "state.pt")
    (folder / "checksums.json").write_text(json.dumps(sums))
    with pytest.raises(Exception, match=r"weights_only|Unsupported"):
        checkpoint.load(folder)


def test_a_torn_checkpoint_is_ignored_and_swept_away(tmp_path: Path) -> None:
    write(tmp_path, 5)
    torn = write(tmp_path, 6).rename(tmp_path / "update-00000006.partial")
    (torn / "checksums.json").unlink()
    unsealed = write(tmp_path, 7)
    (unsealed / "checksums.json").unlink()
    assert checkpoint.list_updates(tmp_path) == [5]
    write(tmp_path, 6)  # in the way of nothing
    assert checkpoint.list_updates(tmp_path) == [5, 6]
    torn.mkdir(exist_ok=True)
    checkpoint.sweep(tmp_path)
    assert not torn.exists()
    assert checkpoint.list_updates(tmp_path) == [5, 6]


def test_one_that_was_being_replaced_when_the_run_was_killed_is_still_there(tmp_path: Path) -> None:
    write(tmp_path, 5).rename(tmp_path / "update-00000005.old")
    write(tmp_path, 6)
    shutil.copytree(path_of(tmp_path, 6), tmp_path / "update-00000006.old")
    checkpoint.sweep(tmp_path)
    assert checkpoint.list_updates(tmp_path) == [5, 6]
    assert not list(tmp_path.glob("*.old"))


def test_the_newest_whole_one_is_found_and_the_others_are_named(tmp_path: Path) -> None:
    assert checkpoint.newest_whole(tmp_path) == (None, [])
    for update in (3, 6, 9, 12):
        write(tmp_path, update)
    assert checkpoint.newest_whole(tmp_path) == (12, [])
    (path_of(tmp_path, 12) / "rank-0.pt").unlink()
    (path_of(tmp_path, 9) / "model.safetensors").write_bytes(b"short")
    update, damages = checkpoint.newest_whole(tmp_path)
    assert update == 6
    assert [damage.split(":")[0] for damage in damages] == [
        str(path_of(tmp_path, 12) / "rank-0.pt"),
        str(path_of(tmp_path, 9) / "model.safetensors"),
    ]
    checkpoint.set_aside(tmp_path, 6)
    assert checkpoint.list_updates(tmp_path) == [3, 6]
    assert (tmp_path / "update-00000009.damaged" / "model.safetensors").read_bytes() == b"short"
    checkpoint.set_aside(tmp_path, 3)
    assert [path.name for path in sorted(tmp_path.glob("*.damaged"))] == ["update-00000006.damaged"]
    checkpoint.set_aside(tmp_path, 3)
    assert len(list(tmp_path.glob("*.damaged"))) == 1, "where nothing is damaged what was set aside stays"


def test_a_rank_whose_file_was_never_written_is_missed(tmp_path: Path) -> None:
    folder = path_of(tmp_path, 4)
    checkpoint.save(folder, model_state=weights(1.0), state={"world": 2}, rank_state={})
    assert checkpoint.damage_of(folder) == f"{folder / 'rank-1.pt'}: missing from the checkpoint"


def test_what_was_saved_on_notice_goes_with_the_next_and_takes_no_regular_ones_place(tmp_path: Path) -> None:
    for update in (3, 6, 7, 9, 10, 11):
        write(tmp_path, update)
    checkpoint.prune(tmp_path, 2, regular=lambda update: update % 3 == 0)
    assert checkpoint.list_updates(tmp_path) == [6, 9, 11]
    write(tmp_path, 12)
    checkpoint.prune(tmp_path, 2, regular=lambda update: update % 3 == 0)
    assert checkpoint.list_updates(tmp_path) == [9, 12]


def test_prune_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "best", model_state=weights(9.0), state={"update": 2, "bleu": 3.0})
    for update in (2, 10, 9, 100):
        write(tmp_path, update)
    checkpoint.prune(tmp_path, 2)
    assert checkpoint.list_updates(tmp_path) == [10, 100]
    assert checkpoint.load(tmp_path / "best")[1]["bleu"] == 3.0
    assert checkpoint.list_updates(tmp_path / "nowhere") == []


def test_a_newer_one_of_the_same_name_replaces_the_older(tmp_path: Path) -> None:
    for value in (1.0, 2.0):
        checkpoint.save(tmp_path / "best", model_state=weights(value), state={"bleu": value})
    tensors, state, _ = checkpoint.load(tmp_path / "best")
    assert (tensors["a"][0, 0].item(), state["bleu"]) == (2.0, 2.0)
    assert os.listdir(tmp_path) == ["best"]


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """No file may grow beyond `size` bytes: what a full disk or a quota looks like to one that writes."""
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)


@pytest.mark.parametrize("size", [100, 20_000])  # too small for the weights; for the optimizer's state
def test_a_failed_write_is_one_line_and_leaves_earlier_checkpoints_alone(tmp_path: Path, size: int) -> None:
    write(tmp_path, 5, 1.25)
    with largest_file(size), pytest.raises(OSError, match=r"\A.*\Z") as caught:
        write(tmp_path, 6, 2.5, size=100_000)
    message = str(caught.value)
    assert message.startswith(f"{path_of(tmp_path, 6)}: cannot write the checkpoint: ")
    assert "file too large" in message.lower()
    assert "earlier ones are intact" in message
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert {Path(name).parts[0] for name in left} == {"update-00000005"}, "nothing half-written"
    assert checkpoint.load(path_of(tmp_path, 5))[0]["a"][0, 0] == 1.25
    write(tmp_path, 6, 2.5)
    assert checkpoint.list_updates(tmp_path) == [5, 6]


def test_replacing_the_best_fails_without_losing_it(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "best", model_state=weights(1.0), state={"bleu": 1.0})
    with largest_file(100), pytest.raises(OSError, match="cannot write the checkpoint"):
        checkpoint.save(tmp_path / "best", model_state=weights(2.0), state={"bleu": 2.0})
    assert checkpoint.load(tmp_path / "best")[0]["a"][0, 0] == 1.0


def test_a_lost_worker_is_not_reported_as_a_disk_that_is_full(tmp_path: Path) -> None:
    def barrier() -> None:
        raise RuntimeError("[gloo] Connection closed by peer")

    with pytest.raises(RuntimeError, match="closed by peer"):
        checkpoint.save(tmp_path / "best", model_state=weights(1.0), rank=1, barrier=barrier)


def test_average_is_the_mean_of_the_files(tmp_path: Path) -> None:
    values = (0.1, 0.7, -2.9)
    folders = [write(tmp_path, update, value) for update, value in enumerate(values)]
    mean = checkpoint.average(folders)
    for name in weights(0.0):
        exact = torch.stack([weights(value)[name].double() for value in values]).mean(0)
        assert mean[name].dtype == torch.float32
        torch.testing.assert_close(mean[name], exact.float(), rtol=1e-7, atol=1e-8)
    assert torch.equal(checkpoint.average(folders[:1])["a"], weights(0.1)["a"])
    (folders[1] / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"update-00000001/model\.safetensors: missing"):
        checkpoint.average(folders)
    shutil.rmtree(folders[1])
    with pytest.raises(ValueError, match="no such checkpoint"):
        checkpoint.average(folders)


def test_a_replacement_that_is_cut_between_its_renames_leaves_the_older_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, rename = tmp_path / "best", Path.rename
    checkpoint.save(target, model_state=weights(1.0), state={})

    def cut(self: Path, to: Path) -> Path:
        if to == target:
            raise KeyboardInterrupt
        return rename(self, to)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", cut)
        with pytest.raises(KeyboardInterrupt):
            checkpoint.save(target, model_state=weights(2.0), state={})
    checkpoint.sweep(tmp_path)
    assert checkpoint.load(target)[0]["a"][0, 0] == 1.0


def test_sums_of_a_part_appear_when_they_are_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0 reads them as soon as it sees them."""
    seen: list[bool] = []
    monkeypatch.setattr(checkpoint_parts, "_sync", lambda path: seen.append(part_of(tmp_path, 1).exists()))
    write_part(tmp_path, rank=1, rank_state={"a": 1})
    assert seen == [False, False], "of the state, and of the sums"
    assert part_of(tmp_path, 1).exists()
