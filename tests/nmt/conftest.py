"""A trained model for tests of engines and exports, and a cache of conversions of their own."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from sentence_model import write_sentence_model

from tenko.nmt import engines


@pytest.fixture
def own_artefact(tmp_path: Path, plain: Path) -> Path:
    return Path(shutil.copytree(plain, tmp_path / "own"))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    write_sentence_model(folder, int8=True)
    return folder


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(engines.CACHE, str(tmp_path / "cache"))
