"""The corpus of a run: stages begin with the one that the run began with, and sentences that the model can take."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from tenko.launch import stages
from tenko.launch.progress import Reporter
from tenko.launch.recipe import load, loads
from tenko.launch.rundir import METRICS, RunDirectory, StageContext
from tenko.launch.stage_checks import check_stages
from tenko.launch.stage_tools import open_corpus
from tenko.nmt.config import DataConfig, ModelConfig
from tenko.nmt.corpus import Corpus
from tenko.nmt.prepare import prepare


def context(path: Path, data: Path, cache: Path, index: int = 0) -> StageContext:
    settings = {"train": data, "cache": cache, "valid_size": 20, "test_size": 20, "vocab_size": 300}
    settings["max_tokens_per_sentence"] = 128
    recipe = load("tiny", [f"data.{key}={value}" for key, value in settings.items()])
    return RunDirectory(path, recipe).context(index, Reporter(enabled=False), writer=True, resume=False)


def test_a_corpus_that_changed_is_refused_once_something_was_trained(
    small_tsv: Path, small_corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, cache = tmp_path / "data.tsv", small_tsv.parent / "cache"
    others = small_tsv.read_text(encoding="utf-8").splitlines(keepends=True)[:-9]
    data.write_text("".join(others), encoding="utf-8")
    first = context(tmp_path / "run", data, cache)
    assert open_corpus(first).path != small_corpus.path
    shutil.copyfile(small_tsv, data)
    assert open_corpus(first).path == small_corpus.path, "nothing was trained yet"
    (first.directory / METRICS).touch()
    data.write_text("".join(others), encoding="utf-8")
    with pytest.raises(
        ValueError, match=re.escape(f"began with another corpus: data.train ({data}) has other content")
    ):
        open_corpus(first)
    second = context(tmp_path / "run", data, cache, 1)
    with pytest.raises(ValueError, match=re.escape(f"began with another corpus: data.train ({data})")):
        open_corpus(second)
    # A run directory of before says nothing of its corpus; the model of the stage before does.
    (tmp_path / "run" / "corpus.json").unlink()
    first.artefact.mkdir()
    shutil.copyfile(small_corpus.spm_path, first.artefact / "spm.model")
    with pytest.raises(ValueError, match=r"1-train/artefact/spm\.model: not the subwords of the corpus"):
        open_corpus(second)
    # The same content, elsewhere.
    shutil.copyfile(small_tsv, tmp_path / "moved.tsv")
    monkeypatch.chdir(tmp_path)
    shutil.copytree(small_corpus.path, tmp_path / "cache" / small_corpus.path.name)
    shutil.copyfile(small_tsv, data)
    for there in (second, context(tmp_path / "run", Path("moved.tsv"), Path("cache"), 1)):
        assert open_corpus(there).manifest["hash"] == small_corpus.manifest["hash"]


def test_subwords_over_those_of_a_pretrained_model_are_refused(
    small_tsv: Path, small_corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stages, "start", lambda context: None)
    text = (
        f"name: x\nstages: [pretrained]\ndata: {{valid_size: 20, test_size: 20, subwords: {small_corpus.spm_path}}}\n"
    )
    recipe = loads(text, "x", [f"data.train={small_tsv}", f"data.cache={tmp_path}"])
    run = RunDirectory(tmp_path / "run", recipe)
    with pytest.raises(ValueError, match=r"en-cs/spm\.model: not the subwords of the corpus"):
        stages.run_pretrained(run.context(0, Reporter(enabled=False), writer=True, resume=False))
    assert not (tmp_path / "run" / "1-pretrained" / "artefact").exists()


def test_a_validation_sentence_beyond_learned_positions_is_refused(small_tsv: Path, tmp_path: Path) -> None:
    valid = tmp_path / "valid.tsv"
    valid.write_text(f"short\tkrátká\nlong\t{'dlouhá ' * 400}\n", encoding="utf-8")
    config = DataConfig(train=str(small_tsv), valid=str(valid), test_size=20, vocab_size=300, cache=str(tmp_path))
    corpus = prepare(config, report=lambda line: None)
    longest = int(corpus.split("valid").sizes("cs").max())
    assert longest > 1024
    run = RunDirectory(tmp_path / "run", loads("name: x\ndirection: en-cs\nstages: [train]\n", "x"))
    train = run.context(0, Reporter(enabled=False), writer=True, resume=False)

    def check(**extra: Any) -> None:
        check_stages(train, nn.Linear(1, 1), ModelConfig(extra=extra), corpus)

    check()
    check(encoder_learned_pos=True)  # the long one is Czech, the target
    check(decoder_learned_pos=True, max_target_positions=longest)
    message = f"data.valid: the model has 1024 learned positions for cs, </s> included, and .* of valid takes {longest}"
    with pytest.raises(ValueError, match=message):
        check(decoder_learned_pos=True)
