"""Sequence-level distillation: what the teacher writes, in which order, and what a cut run does not do again."""

from __future__ import annotations

import dataclasses
import lzma
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tenko.compression import write_artefact
from tenko.compression.container import artefact_file
from tenko.launch import taught
from tenko.launch.progress import Reporter
from tenko.launch.recipe import load
from tenko.launch.rundir import StageContext
from tenko.launch.stage_tools import corpus_of
from tenko.nmt import engines, pretrained
from tenko.nmt.config import DecodeConfig, DistillConfig, ModelConfig
from tenko.nmt.corpus import Corpus
from tenko.nmt.fairseq_bridge import build_model
from tenko.nmt.subwords import Subwords
from tenko.nmt.translate import Translator

CPU = torch.device("cpu")
SEQUENCES = DistillConfig(sequences=True)


@pytest.fixture(params=["en-cs", "cs-en"])
def context(request: pytest.FixtureRequest, small_tsv: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The stage train after the model that ships, with files of 100 pairs."""
    monkeypatch.setattr(taught, "CHUNK", 100)
    shutil.copytree(pretrained.path(request.param), tmp_path / "1-pretrained" / "artefact")
    text = f"""
name: taught
direction: {request.param}
data: {{train: {small_tsv}, valid_size: 20, test_size: 20, cache: {small_tsv.parent / "cache"}}}
stages: [pretrained, {{train: {{decode: {{beam: 2}}, distill: {{sequences: true}}}}}}]
"""
    (tmp_path / "recipe.yaml").write_text(text)
    recipe = load(str(tmp_path / "recipe.yaml"))
    return StageContext(
        recipe=recipe,
        stage=recipe.stages[1],
        directory=tmp_path / "2-train",
        previous=tmp_path / "1-pretrained",
        run_dir=tmp_path,
        reporter=Reporter(enabled=False),
        job=None,  # type: ignore[arg-type]  # of no use here
        resume=False,
    )


def pairs(corpus: Corpus) -> set[tuple[str, ...]]:
    """The training pairs as text, English and Czech."""
    subwords, train = Subwords(corpus.spm_path), corpus.split("train")
    return {tuple(subwords.decode(train.tokens(lang, i)) for lang in ("en", "cs")) for i in range(len(train))}


def test_the_training_split_is_what_the_teacher_translates_and_all_else_the_corpus_s(context: StageContext) -> None:
    corpus = corpus_of(context.recipe)
    made = taught.taught_corpus(context, CPU, corpus, SEQUENCES, context.previous)
    source = context.recipe.direction.split("-")[0]
    position = ("en", "cs").index(source)
    before, after = pairs(corpus), pairs(made)
    sources = sorted({pair[position] for pair in before})
    assert {pair[position] for pair in after} <= set(sources)
    assert len(after) > 0.9 * len(sources), "cleaning drops few"
    assert context.previous is not None
    translations = engines.load(context.previous / "artefact", threads=1).translate(
        sources, decode=DecodeConfig(beam=2)
    )
    expected = {(s, t)[:: 1 if position == 0 else -1] for s, t in zip(sources, translations, strict=True)}
    assert len(after & expected) > 0.98 * len(after), "padding may turn a sentence"
    assert len(after & before) < len(after) / 2, "references are gone"
    for split in ("valid", "test"):
        assert made.text(split) == corpus.text(split)
    assert made.spm_path.read_bytes() == corpus.spm_path.read_bytes()
    assert made.dict_path.read_bytes() == corpus.dict_path.read_bytes()


def test_a_cut_run_translates_only_what_is_missing(context: StageContext) -> None:
    corpus = corpus_of(context.recipe)
    first = taught.taught_corpus(context, CPU, corpus, SEQUENCES, context.previous)
    (folder,) = (context.run_dir / "taught").iterdir()
    files = sorted(folder.glob("0*.tsv"))
    assert len(files) == 4
    assert all(len(file.read_text().splitlines()) == 100 for file in files[:3])
    lost, damaged = files[1].read_text(), files[2].read_text()
    files[1].unlink()
    files[2].write_text("no second column\n" * 100)
    kept = files[0].read_text().replace(".\t", "!\t")
    files[0].write_text(kept)
    again = taught.taught_corpus(context, CPU, corpus, SEQUENCES, context.previous)
    assert [file.read_text() for file in files[:3]] == [kept, lost, damaged]
    assert again.path != first.path
    assert len(pairs(again) & pairs(first)) > 250


def test_another_search_or_teacher_has_a_folder_of_its_own(context: StageContext) -> None:
    corpus = corpus_of(context.recipe)
    taught.taught_corpus(context, CPU, corpus, SEQUENCES, context.previous)
    train = context.recipe.stages[1]
    wider = dataclasses.replace(train, config=dataclasses.replace(train.config, decode=DecodeConfig(beam=1)))
    recipe = dataclasses.replace(context.recipe, stages=(context.recipe.stages[0], wider))
    taught.taught_corpus(dataclasses.replace(context, recipe=recipe), CPU, corpus, SEQUENCES, context.previous)
    assert len(list((context.run_dir / "taught").iterdir())) == 2


@pytest.mark.parametrize("sequences", [False, True])
def test_translations_of_a_text_join_the_training_split(context: StageContext, sequences: bool) -> None:
    corpus = corpus_of(context.recipe)
    source = context.recipe.direction.split("-")[0]
    held_out = dict(zip(("en", "cs"), corpus.text("test"), strict=True))[source][0]
    more = [f"{word} {number} ({held_out})" for number in range(120) for word in ("Open", "Otevřít")]
    text = context.run_dir / "more.txt.xz"
    text.write_bytes(lzma.compress("\r\n".join(["", *more, f"  {held_out} ", " ", "x " * 500]).encode()))
    distill = DistillConfig(sequences=sequences, text=str(text))
    made = taught.taught_corpus(context, CPU, corpus, distill, context.previous)
    position = ("en", "cs").index(source)
    before, after = pairs(corpus), pairs(made)
    joined = {pair for pair in after if pair[position] in more}
    assert 200 < len(joined) <= len(more)
    sources, targets = zip(*((pair[position], pair[1 - position]) for pair in joined), strict=True)
    assert context.previous is not None
    engine = engines.load(context.previous / "artefact", threads=1)
    expected = engine.translate(list(sources), decode=DecodeConfig(beam=2))
    assert sum(map(str.__eq__, targets, expected)) > 0.95 * len(joined), "padding may turn a sentence"
    assert held_out not in {pair[position] for pair in after}, "a test sentence is not trained on"
    if sequences:
        assert len(after & before) < len(before) / 2, "references are gone"
    else:
        assert after - joined == before, "references stay"
    assert made.text("test") == corpus.text("test")
    text.write_bytes(lzma.compress(b"Another text.\n"))
    with pytest.raises(ValueError, match=r"more\.txt\.xz: has changed since this run began with it"):
        taught.taught_corpus(context, CPU, corpus, distill, context.previous)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\n \n" + b"x " * 500, "no sentence of at most 128 subwords"),
        (b"One.\n\xff\n", "line 2: invalid UTF-8"),
    ],
    ids=["nothing to translate", "not UTF-8"],
)
def test_a_text_without_sentences_is_named(context: StageContext, content: bytes, message: str) -> None:
    text = context.run_dir / "more.txt"
    text.write_bytes(content)
    with pytest.raises(ValueError, match=rf"more\.txt: {message}"):
        taught.taught_corpus(context, CPU, corpus_of(context.recipe), DistillConfig(text=str(text)), context.previous)
    assert not list((context.run_dir / "taught").glob("*/0*.tsv"))


def test_without_sequences_the_corpus_is_as_it_was(context: StageContext) -> None:
    corpus = corpus_of(context.recipe)
    assert taught.taught_corpus(context, CPU, corpus, DistillConfig(weight=1.0), context.previous) is corpus
    assert not (context.run_dir / "taught").exists()


def test_fairseq_translates_where_ctranslate2_has_no_place_for_the_teacher(
    small_corpus: Corpus, tmp_path: Path
) -> None:
    config = ModelConfig(
        encoder_layers=1, decoder_layers=1, embed_dim=8, ffn_dim=8, attention_heads=2, extra={"activation_fn": "tanh"}
    )
    model = build_model(config, small_corpus.dict_path)
    for file in (small_corpus.spm_path, small_corpus.dict_path):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    metadata = {"direction": "en-cs", "model": dataclasses.asdict(config)}
    write_artefact(tmp_path, model.state_dict(), metadata=metadata)
    assert isinstance(taught._engine(tmp_path, CPU), Translator)
    (tmp_path / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        taught._engine(tmp_path, CPU)


def test_another_teacher_corpus_or_direction_has_a_folder_of_its_own(context: StageContext) -> None:
    assert context.previous is not None
    corpus, artefact = corpus_of(context.recipe), context.previous / "artefact"
    first = taught._folder(context, corpus, artefact)
    assert taught._folder(context, corpus, artefact) == first
    found = {first, taught._folder(context, dataclasses.replace(corpus, manifest={"hash": "another"}), artefact)}
    other = {"en-cs": "cs-en", "cs-en": "en-cs"}[context.recipe.direction]
    turned = dataclasses.replace(context, recipe=dataclasses.replace(context.recipe, direction=other))  # type: ignore[arg-type]
    found.add(taught._folder(turned, corpus, artefact))
    with artefact_file(artefact).open("ab") as file:
        file.write(b" ")
    found.add(taught._folder(context, corpus, artefact))
    assert len(found) == 4
