"""Splits over more records than are read at a time: the decisions are those of one read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tenko.nmt import splits
from tenko.nmt.splits import DUPLICATE, LEAK, TEST, TRAIN, VALID


def decide(folder: Path, records: np.ndarray) -> tuple[np.ndarray, list[int]]:
    """Fates as `prepare` comes to them, and how many duplicates and leaks were told."""
    path, fates = folder / "hashes", np.zeros(len(records), np.uint8)
    path.write_bytes(records.tobytes())
    told = [splits.mark_duplicates(path, fates, folder)]
    for fate, size in ((TEST, 7), (VALID, 5)):
        told.append(splits.mark_leaks(path, fates, splits.hold_out(path, fates, size, fate)))
    return fates, told


@pytest.fixture
def records() -> np.ndarray:
    """500 pairs of 40 English and 60 Czech keys: duplicates, and sentences of one key, everywhere."""
    draw = np.random.default_rng(1)
    found = np.empty(500, splits.RECORD)
    found["en"], found["cs"] = draw.integers(0, 40, 500) * 2**57, draw.integers(0, 60, 500) * 2**57
    found["pair"] = found["en"] ^ (found["cs"] >> 7) ^ draw.integers(0, 2, 500, np.uint64)
    return found


@pytest.mark.parametrize("chunk", [1, 7, 100, 499, 500])
def test_fates_do_not_depend_on_how_many_records_are_read_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, records: np.ndarray, chunk: int
) -> None:
    whole, told = decide(tmp_path, records)
    monkeypatch.setattr(splits, "CHUNK", chunk)
    fates, again = decide(tmp_path, records)
    assert fates.tolist() == whole.tolist()
    assert again == told == [int((whole == DUPLICATE).sum()), *told[1:]]
    assert sum(told[1:]) == int((whole == LEAK).sum())


def test_fates_are_what_they_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, records: np.ndarray) -> None:
    monkeypatch.setattr(splits, "CHUNK", 64)
    fates, _ = decide(tmp_path, records)
    _, first = np.unique(records["pair"], return_index=True)
    assert set(np.flatnonzero(fates == DUPLICATE)) == set(range(500)) - set(first.tolist()), "the first stays"
    for fate, size in ((TEST, 7), (VALID, 5)):
        held = records[fates == fate]
        assert len(held) == len(set(held["en"].tolist())) == size
    for side in ("en", "cs"):
        test, valid, train = ({*records[side][fates == fate].tolist()} for fate in (TEST, VALID, TRAIN))
        assert not test & valid
        assert not train & (test | valid)
    unique = np.ones(500, bool)
    unique[fates == DUPLICATE] = False
    assert {*records["en"][fates == TEST].tolist()} == {*np.unique(records["en"][unique])[:7].tolist()}
