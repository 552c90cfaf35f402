"""Chosen centroids come back from their file only where the same was asked for, and the file is whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tenko.launch.codebooks import read_chosen

ASKED: dict[str, Any] = {"bits": 1.5, "scheme": "pq", "seed": 1, "blocks": {"a": 4, "b": 2}, "model": "00ff"}
CHOSEN = {"a": 16, "b": 256}


def test_what_was_chosen_comes_back(tmp_path: Path) -> None:
    file = tmp_path / "centroids.json"
    assert read_chosen(file, ASKED) is None, "nothing there"
    file.write_text(json.dumps({"asked": ASKED, "centroids": CHOSEN}))
    assert read_chosen(file, ASKED) == CHOSEN
    for key, other in (("bits", 1.6), ("scheme", "pq_int8"), ("seed", 2), ("blocks", {"a": 4, "b": 4}), ("model", "f")):
        assert read_chosen(file, {**ASKED, key: other}) is None, key


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        '{"asked": ',
        json.dumps(CHOSEN),
        json.dumps({"asked": ASKED}),
        json.dumps({"asked": ASKED, "centroids": [16, 256]}),
        json.dumps({"asked": ASKED, "centroids": {"a": 16}}),
        json.dumps({"asked": ASKED, "centroids": {"a": 16, "b": 300}}),
        json.dumps({"asked": ASKED, "centroids": {"a": 16, "b": "256"}}),
        json.dumps({"asked": ASKED, "centroids": {"a": 16, "b": True}}),
        json.dumps({"asked": ASKED, "centroids": {"a": 16, "b": 2.0}}),
    ],
)
def test_a_damaged_file_counts_as_none(tmp_path: Path, content: str) -> None:
    file = tmp_path / "centroids.json"
    file.write_text(content)
    assert read_chosen(file, ASKED) is None
