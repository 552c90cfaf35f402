"""From a finished run into the package, and from there to `tenko translate en-cs`."""

from __future__ import annotations

import io
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from sentence_model import PAIRS, write_sentence_model

from tenko.launch import cli, ship
from tenko.launch.files import write_json_atomic
from tenko.launch.recipe import load
from tenko.launch.rundir import RunDirectory, RunLock
from tenko.nmt import engines, pretrained
from tenko.nmt.corpus import Corpus
from tenko.nmt.ctranslate2_model import export_ctranslate2
from tenko.nmt.translate import Translator
from tenko.nmt.vocabulary_map import FILE, vocabulary_map


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of tiny as if its two stages had made the model of a hundred sentences."""
    path = tmp_path_factory.mktemp("runs") / "tiny"
    with RunLock(path):
        run = RunDirectory.create(path, load("tiny"))
    for index, updates in ((0, 12), (1, None)):
        artefact = run.stage_directory(index) / "artefact"
        artefact.mkdir(parents=True)
        write_sentence_model(artefact, int8=index == 1, updates=150)
        figures = {"bleu": 20.0 + index, "chrf": 40.0, "bleu_signature": "b", "chrf_signature": "c", "sentences": 3}
        write_json_atomic(artefact.parent / "result.json", figures | ({"updates": updates} if updates else {}))
    return path


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(pretrained, "MODELS", tmp_path / "models")
    monkeypatch.setenv(engines.CACHE, str(tmp_path / "cache"))
    return tmp_path / "models"


def test_a_shipped_model_translates_by_its_name(
    finished: Path, models: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert ship.ship(finished, commit="abc") == models / "en-cs"
    assert sorted(os.listdir(models / "en-cs")) == ["dict.txt", "model.json", "model.safetensors", "spm.model"]
    card = json.loads((models / "en-cs" / "model.json").read_text())
    assert (card["commit"], card["stage"], card["updates"], card["bleu"]) == ("abc", "2-quantize", 12, 21.0)
    assert card["recipe"]["data"]["train"] == "embedded"
    assert "ATTRIBUTIONS.md" in card["licence"]
    lines = [pair[0] for pair in PAIRS[:9]]
    wanted = Translator.load(models / "en-cs").translate(lines)
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO("\n".join([*lines, ""]).encode())))
    with pytest.raises(SystemExit) as ended:
        cli.main(["translate", "en-cs", "--threads", "1"])
    output = capsys.readouterr()
    assert (ended.value.code, output.err) == (0, "")
    said = output.out.split("\n")[:-1]
    assert len(said) == len(wanted)
    assert sum(a == b for a, b in zip(said, wanted, strict=True)) >= 7, "8 bits change little"
    assert len(os.listdir(models.parent / "cache")) == 1
    assert sorted(os.listdir(models / "en-cs")) == ["dict.txt", "model.json", "model.safetensors", "spm.model"]


def test_a_stage_and_a_map_can_be_chosen_and_the_older_model_goes(
    finished: Path, models: Path, small_corpus: Corpus
) -> None:
    ship.ship(finished, commit="old")
    mapped = vocabulary_map(small_corpus.split("train"), "en-cs", small_corpus.vocab_size)
    ship.ship(finished, stage="train", commit="new", vocabulary_map=mapped)
    assert pretrained.card("en-cs")["stage"] == "1-train"
    assert (models / "en-cs" / FILE).is_file()
    assert os.listdir(models) == ["en-cs"]


def test_what_must_not_ship_is_refused(
    finished: Path, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ship, "LIMIT", 1000)
    with pytest.raises(ValueError, match=r"more than the 1,000 of a shipped model"):
        ship.ship(finished, commit="abc")
    assert pretrained.pretrained() == []
    assert os.listdir(models) == []
    exported = Path(shutil.copytree(finished, tmp_path / "exported"))
    shutil.rmtree(exported / "2-quantize" / "artefact")
    export_ctranslate2(exported / "1-train" / "artefact", exported / "2-quantize" / "artefact")
    with pytest.raises(ValueError, match="is exported; give --stage"):
        ship.ship(exported, commit="abc")
    other = Path(shutil.copytree(finished, tmp_path / "other"))
    config = other / "config.yaml"
    config.write_text(config.read_text().replace("train: embedded", "train: mine.tsv"))
    with pytest.raises(SystemExit) as ended:
        ship.main([str(other), "--commit", "abc"])
    assert ended.value.code == 2
    assert (
        capsys.readouterr().err
        == f"tenko: error: {other}: data.train must be embedded, whose licences ship too, is mine.tsv\n"
    )
