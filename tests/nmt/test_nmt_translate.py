"""Translation from an artefact: order, empty lines, and the same words whatever the batch size."""

from __future__ import annotations

import dataclasses
import io
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from toy_training import toy_config, toy_trainer

from tenko.compression import read_artefact, write_artefact
from tenko.launch.commands import read_chunks
from tenko.nmt import artefact_model
from tenko.nmt.config import DecodeConfig
from tenko.nmt.corpus import Corpus
from tenko.nmt.export import export_fairseq
from tenko.nmt.fairseq_bridge import Beam
from tenko.nmt.translate import MAX_SOURCE_TOKENS, Translator

BEAM = DecodeConfig(beam=3, max_tokens=2000)


@pytest.fixture(scope="module")
def artefact(small_corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy after 60 updates: it says different nonsense of different sentences."""
    folder = tmp_path_factory.mktemp("artefact")
    trainer = toy_trainer(small_corpus, folder / "none", max_tokens=600, lr=2e-2)
    for _ in range(60):
        trainer.update()
    shutil.copyfile(small_corpus.spm_path, folder / "spm.model")
    shutil.copyfile(small_corpus.dict_path, folder / "dict.txt")
    metadata = {"direction": "en-cs", "model": dataclasses.asdict(toy_config())}
    write_artefact(folder, trainer.model.state_dict(), metadata=metadata)
    return folder


@pytest.fixture(scope="module")
def translator(artefact: Path) -> Translator:
    return Translator.load(artefact)


@pytest.fixture(scope="module")
def sentences(small_corpus: Corpus) -> list[str]:
    return small_corpus.text("test")[0]


@pytest.fixture(scope="module")
def translations(translator: Translator, sentences: list[str]) -> list[str]:
    found = translator.translate(sentences, decode=BEAM)
    assert len(set(found)) > len(sentences) // 3, "the model says the same of everything"
    return found


@pytest.mark.parametrize("max_tokens", [1, 60, 150])
def test_translations_do_not_depend_on_the_batch_size(
    translator: Translator, sentences: list[str], translations: list[str], max_tokens: int
) -> None:
    again = translator.translate(sentences, decode=dataclasses.replace(BEAM, max_tokens=max_tokens))
    assert again == translations


def test_order_and_empty_lines_are_kept(translator: Translator, sentences: list[str], translations: list[str]) -> None:
    lines = ["", *sentences[::-1], "   ", "\t", sentences[2], ""]
    assert translator.translate(lines, decode=BEAM) == ["", *translations[::-1], "", "", translations[2], ""]
    assert translator.translate([], decode=BEAM) == []
    assert translator.translate(["", " "], decode=BEAM) == ["", ""]


def test_progress_counts_sentences_to_the_end(translator: Translator, sentences: list[str]) -> None:
    told: list[tuple[int, int]] = []
    before = translator.tokens_produced
    lines = ["", *sentences]
    decode = DecodeConfig(beam=1, max_tokens=100)
    translator.translate(lines, decode=decode, progress=lambda done, total: told.append((done, total)))
    assert told[-1] == (len(lines), len(lines))
    assert [done for done, _ in told] == sorted({done for done, _ in told})
    assert len(told) > 3
    assert translator.tokens_produced >= before + len(sentences), "an end of sentence each, at least"


def test_beam_one_is_greedy(translator: Translator, sentences: list[str], small_corpus: Corpus) -> None:
    source = torch.tensor([[*translator.subwords.encode(sentences[0]), 2]])
    tokens = [2]
    with torch.no_grad():
        encoded = translator.model.encoder(source, torch.tensor([source.size(1)]))
        for _ in range(2 * source.size(1) + 20):
            logits, _ = translator.model.decoder(torch.tensor([tokens]), encoder_out=encoded)
            scores = logits[0, -1].clone()
            scores[1] = -torch.inf  # padding is never said
            if len(tokens) == 1:
                scores[2] = -torch.inf  # nor an empty sentence
            tokens.append(int(scores.argmax()))
            if tokens[-1] == 2:
                break
    greedy = translator.subwords.decode([t for t in tokens if t != 2])
    assert translator.translate(sentences[:1], decode=DecodeConfig(beam=1)) == [greedy]


def test_a_sentence_beyond_the_models_positions_is_cut_and_noted(
    translator: Translator, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def generate(beam: Any, sample: dict[str, Any]) -> list[tuple[int, list[int]]]:
        seen.extend(sample["net_input"]["src_tokens"].tolist())
        return [(int(index), []) for index in sample["id"]]

    monkeypatch.setattr(Beam, "generate", generate)
    assert translator.translate(["Open.", "", "abc " * (2 * MAX_SOURCE_TOKENS)]) == ["", "", ""]
    assert translator.cut == [2]
    longest = max(seen, key=lambda tokens: tokens[0] != 1)
    assert (len(longest), longest[-1]) == (MAX_SOURCE_TOKENS + 1, 2)
    translator.translate(["Open."])
    assert translator.cut == []


def test_a_line_of_many_blocks_is_joined_once() -> None:
    """It takes as many times longer as it is longer, in blocks as a pipe gives them."""

    def seconds(blocks: int) -> float:
        stream = io.BytesIO(b"x" * (blocks << 16) + b"\n\nlast")
        begun = time.process_time()
        assert [len(line) for chunk in read_chunks(stream) for line in chunk] == [blocks << 16, 0, 4]
        return time.process_time() - begun

    seconds(8)
    assert seconds(512) < 40 * max(seconds(32), 0.005)


def test_threads_are_set(artefact: Path) -> None:
    before = torch.get_num_threads()
    try:
        Translator.load(artefact, threads=2)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_a_direction_and_weights_come_from_the_artefact(artefact: Path, translator: Translator) -> None:
    assert translator.direction == "en-cs"
    state, _ = read_artefact(artefact)
    loaded = translator.model.state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())
    assert not translator.model.training


@pytest.mark.parametrize("name", ["model.safetensors", "spm.model", "dict.txt"])
@pytest.mark.parametrize("what", ["missing", "damaged"])
def test_a_missing_or_damaged_file_is_named_in_one_line(artefact: Path, tmp_path: Path, name: str, what: str) -> None:
    folder = shutil.copytree(artefact, tmp_path / "artefact")
    if what == "missing":
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(b"\xff\xfenonsense here")
    with pytest.raises((ValueError, OSError), match=r"\A.*\Z") as caught:
        Translator.load(folder)
    assert str(folder / name) in str(caught.value) or str(caught.value).startswith(str(folder))


def test_embeddings_of_a_file_are_never_read_again(artefact: Path, translator: Translator, tmp_path: Path) -> None:
    """The weights follow; the file may be gone, or be one that never ends."""
    folder = shutil.copytree(artefact, tmp_path / "artefact")
    state, metadata = read_artefact(artefact)
    paths = dict.fromkeys(("encoder_embed_path", "decoder_embed_path"), str(tmp_path / "embeddings.txt"))
    model = {**metadata["model"], "extra": paths}
    write_artefact(folder, state, metadata={"direction": "en-cs", "model": model})
    assert Translator.load(folder).translate(["Open."]) == translator.translate(["Open."])
    assert "embeddings.txt" not in str(torch.load(export_fairseq(folder, tmp_path / "out"), weights_only=True)["cfg"])


def test_positions_are_bounded_by_the_models_width(artefact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(artefact_model, "_SINUSOIDS", 1024 * 16 - 1)
    with pytest.raises(
        ValueError, match=r"model\.safetensors: .*\(max_source_positions 1024 is too many for the width"
    ):
        Translator.load(artefact)


def test_weights_of_another_model_are_refused(artefact: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(artefact, tmp_path / "artefact")
    state, metadata = read_artefact(artefact)
    for model, message in (
        ({**metadata["model"], "ffn_dim": 64}, "has shape "),
        ({**metadata["model"], "depth": 2}, "metadata describe no model"),
        ({**metadata["model"], "extra": {"activation_fn": "foo"}}, "no model of these tensors .*--activation-fn foo"),
        ({**metadata["model"], "embed_dim": 2**44}, "no model of these tensors"),
        ({**metadata["model"], "embed_dim": 32.0}, "embed_dim: must be a whole number"),
        ({**metadata["model"], "encoder_layers": 10**9}, "1000000000 layers in the encoder; the file has"),
        ({**metadata["model"], "extra": []}, "extra: must be options by name"),
    ):
        write_artefact(folder, state, metadata={"direction": "en-cs", "model": model})
        with pytest.raises(ValueError, match=rf"\A{folder}/model.safetensors: .*{message}.*\Z"):
            Translator.load(folder)
