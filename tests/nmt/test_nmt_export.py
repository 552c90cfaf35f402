"""Export: real fairseq-generate and CTranslate2 take the same file and translate as the model in memory does."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import ctranslate2
import pytest
import safetensors.torch
import torch
from safetensors import safe_open
from sentence_model import PAIRS, UNSEEN, ids, write_sentence_model

from tenko.compression import read_artefact, write_artefact
from tenko.nmt.config import DecodeConfig, ModelConfig
from tenko.nmt.export import export_fairseq
from tenko.nmt.fairseq_bridge import Beam, build_model, collate
from tenko.nmt.subwords import Subwords

BIN = Path(sys.executable).parent
BEAM = DecodeConfig(beam=4)


@pytest.fixture(scope="module", params=["post-norm, tied, int8", "pre-norm, untied, fp32"])
def artefact(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model trained on 86 of 100 sentences, for seconds, as an artefact."""
    folder = tmp_path_factory.mktemp("artefact")
    untied: dict[str, Any] = {"share_all_embeddings": False, "extra": {"activation_fn": "gelu"}}
    write_sentence_model(
        folder,
        int8="int8" in request.param,
        normalize_before="pre-norm" in request.param,
        **(untied if "untied" in request.param else {}),
    )
    return folder


def in_memory(artefact: Path, sources: list[str]) -> list[str]:
    """Hypotheses, as pieces, of fairseq's generator on the model that the artefact's file describes."""
    state, metadata = read_artefact(artefact)
    model = build_model(ModelConfig(**metadata["model"]), artefact / "dict.txt").eval()
    model.load_state_dict(state, strict=True)
    subwords = Subwords(artefact / "spm.model")
    sample = collate([(i, ids(subwords, text), None) for i, text in enumerate(sources)])
    found = dict(Beam(model, artefact / "dict.txt", BEAM).generate(sample))
    return [" ".join(subwords.pieces()[t] for t in found[i]) for i in range(len(sources))]


def run(*command: str | Path) -> str:
    done = subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def fairseq_generate(export: Path, text: Path, sources: list[list[str]]) -> list[str]:
    """Hypotheses of the command `fairseq-generate` on data made by `fairseq-preprocess`, by sentence."""
    for language in ("en", "cs"):  # references play no part
        lines = "".join(" ".join(pieces) + "\n" for pieces in sources)
        (text / f"test.{language}").write_text(lines, encoding="utf-8")
    dictionaries = ["--srcdict", export / "dict.en.txt", "--tgtdict", export / "dict.cs.txt"]
    preprocess = [BIN / "fairseq-preprocess", "-s", "en", "-t", "cs", *dictionaries]
    run(*preprocess, "--testpref", text / "test", "--destdir", text / "bin")
    generate = [BIN / "fairseq-generate", text / "bin", "-s", "en", "-t", "cs", "--path", export / "model.pt"]
    # With the default of 8 its batching loses the 6 longest of 14 sentences.
    whole = ["--required-batch-size-multiple", "1"]
    out = run(*generate, "--beam", "4", "--max-len-a", "2", "--max-len-b", "20", "--cpu", *whole)
    hypotheses = (line.split("\t") for line in out.splitlines() if line.startswith("H-"))
    found = {int(name[2:]): pieces for name, _, pieces in hypotheses}
    return [found[i] for i in range(len(sources))]


def test_fairseq_generate_and_ctranslate2_translate_as_the_model_in_memory(artefact: Path, tmp_path: Path) -> None:
    export = tmp_path / "export"
    assert export_fairseq(artefact, export) == export / "model.pt"
    assert sorted(os.listdir(export)) == ["dict.cs.txt", "dict.en.txt", "model.pt", "spm.model"]
    subwords = Subwords(export / "spm.model")
    sources = [PAIRS[i][0] for i in UNSEEN]
    pieces = [subwords.encode_pieces(text) for text in sources]

    wanted = in_memory(artefact, sources)
    assert len(set(wanted)) >= 10, "the model says the same of everything"
    right = sum(
        subwords.decode(subwords.pieces().index(p) for p in hypothesis.split()) == PAIRS[i][1]
        for i, hypothesis in zip(UNSEEN, wanted, strict=True)
    )
    assert right >= 7, f"only {right} of {len(wanted)} unseen sentences are right"

    assert fairseq_generate(export, tmp_path, pieces) == wanted

    converter = ctranslate2.converters.FairseqConverter(str(export / "model.pt"), str(export))
    converter.convert(str(tmp_path / "ct2"))
    translator = ctranslate2.Translator(str(tmp_path / "ct2"), compute_type="float32", intra_threads=1)
    translated = translator.translate_batch(pieces, beam_size=4)
    assert [" ".join(result.hypotheses[0]) for result in translated] == wanted


def test_languages_follow_the_direction(artefact: Path, tmp_path: Path) -> None:
    state, metadata = read_artefact(artefact)
    other = shutil.copytree(artefact, tmp_path / "other")
    write_artefact(other, state, metadata={"direction": "cs-en", "model": metadata["model"]})
    checkpoint = torch.load(export_fairseq(other, tmp_path / "export"), weights_only=True)
    model, task = checkpoint["cfg"]["model"], checkpoint["cfg"]["task"]
    assert (task["source_lang"], task["target_lang"]) == ("cs", "en")
    assert (model["source_lang"], model.source_lang, model.target_lang) == ("cs", "cs", "en")
    assert checkpoint["model"].keys() == state.keys()
    assert all(torch.equal(checkpoint["model"][name], state[name]) for name in state)


def damage(folder: Path, case: str) -> str:
    """Damage the artefact in one way; return the file that the message must name."""
    file = folder / "model.safetensors"
    state, metadata = read_artefact(folder)
    kept = {key: metadata[key] for key in ("direction", "model")}
    if case == "no folder":
        shutil.rmtree(folder)
        return str(folder)
    if case in ("dict.txt", "spm.model", "model.safetensors"):
        (folder / case).unlink()
        return str(folder / case)
    if case == "spm damaged":
        (folder / "spm.model").write_bytes(b"x" * 50)
        return str(folder / "spm.model")
    if case == "dict cut":
        text = (folder / "dict.txt").read_text(encoding="utf-8")
        (folder / "dict.txt").write_text("".join(text.splitlines(keepends=True)[:-3]), encoding="utf-8")
        return str(folder / "dict.txt")
    if case == "cut":
        file.write_bytes(file.read_bytes()[:-100])
    if case == "tensor gone":
        state.pop("decoder.layers.0.fc1.bias")
    if case == "other width":
        kept["model"] = kept["model"] | {"ffn_dim": 128}
    if case == "unknown setting":
        kept["model"] = kept["model"] | {"depth": 3}
    if case == "unknown direction":
        kept["direction"] = "en-de"
    if case == "no model":
        kept.pop("model")
    if case != "cut":
        write_artefact(folder, state, metadata=kept)
    return str(file)


DAMAGE = {
    "no folder": "no such artefact folder",
    "dict.txt": "missing",
    "spm.model": "missing",
    "model.safetensors": "missing",
    "spm damaged": "not a sentencepiece model",
    "dict cut": "its 107 entries are not the 110 of spm.model",
    "cut": "damaged or not a safetensors file",
    "tensor gone": "misses tensor decoder.layers.0.fc1.bias",
    "other width": r"shape [64, 32], not [128, 32]",
    "unknown setting": "describe no model (ModelConfig.__init__() got an unexpected keyword argument 'depth')",
    "unknown direction": "unknown direction 'en-de'; valid are en-cs, cs-en",
    "no model": "describe no model",
}


@pytest.mark.parametrize("artefact", ["post-norm, tied, int8"], indirect=True)
@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_artefacts_are_refused_in_one_line_before_anything_is_written(
    artefact: Path, tmp_path: Path, case: str
) -> None:
    folder = shutil.copytree(artefact, tmp_path / "copy")
    file = damage(folder, case)
    with pytest.raises(ValueError, match=r"\A.*\Z") as caught:
        export_fairseq(folder, tmp_path / "export")
    assert str(caught.value).startswith(file + ": ")
    assert DAMAGE[case] in str(caught.value)
    assert not (tmp_path / "export").exists()


@pytest.mark.parametrize("artefact", ["post-norm, tied, int8"], indirect=True)
def test_unwritable_target_is_named(artefact: Path, tmp_path: Path) -> None:
    (tmp_path / "export" / "dict.en.txt").mkdir(parents=True)
    with pytest.raises(OSError, match=r"dict\.en\.txt: could not be written \(Is a directory\)"):
        export_fairseq(artefact, tmp_path / "export")
    assert os.listdir(tmp_path / "export") == ["dict.en.txt"]


@pytest.mark.parametrize("artefact", ["post-norm, tied, int8"], indirect=True)
@pytest.mark.parametrize("there", [False, True])
def test_nothing_is_left_of_an_export_that_failed(
    artefact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: bool
) -> None:
    def full(_: object, path: Path) -> None:
        path.write_bytes(b"begun")
        raise RuntimeError("[enforce fail at inline_container.cc] . PytorchStreamWriter failed writing file")

    if there:
        (tmp_path / "export").mkdir()
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match=r"export/model\.pt: could not be written"):
        export_fairseq(artefact, tmp_path / "export")
    assert os.listdir(tmp_path) == (["export"] if there else [])
    assert not there or os.listdir(tmp_path / "export") == []


@pytest.mark.parametrize("artefact", ["post-norm, tied, int8"], indirect=True)
def test_int8_artefact_stores_the_embedding_once_as_codes(artefact: Path) -> None:
    with safe_open(str(artefact / "model.safetensors"), "pt") as opened:
        document = json.loads(opened.metadata()["tenko"])
    parts = safetensors.torch.load((artefact / "model.safetensors").read_bytes())
    assert document["tied"] == {
        "decoder.embed_tokens.weight": "encoder.embed_tokens.weight",
        "decoder.output_projection.weight": "encoder.embed_tokens.weight",
    }
    assert parts["encoder.embed_tokens.weight.codes"].shape == (110, 32)
    assert {name.rsplit(".", 1)[0] for name in parts if "embed" in name} == {"encoder.embed_tokens.weight"}
    assert all(f"decoder.layers.0.encoder_attn.{p}_proj.weight.codes" in parts for p in ("q", "k", "v", "out"))
