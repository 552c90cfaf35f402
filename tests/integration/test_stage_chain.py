"""Stages in a row, as recipes compose them: each begins with what the one before left on the disk."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tenko_run import Done, tenko
from toy_recipe import write_recipe

from tenko.compression import read_artefact
from tenko.nmt.corpus import Corpus

pytestmark = pytest.mark.torchrun
TRAIN: dict[str, Any] = {
    "max_update": 8,
    "max_tokens": 300,
    "precision": "fp32",
    "lr": 5e-3,
    "warmup_updates": 4,
    "log_interval": 4,
    "valid_interval": 8,
    "valid_sentences": 4,
    "save_interval": 4,
    "decode": {"beam": 1, "max_tokens": 2000},
}


def run(directory: Path, tsv: Path, stages: list[Any], *overrides: str, workers: int = 2) -> Done:
    path = write_recipe(directory.with_suffix(".yaml"), tsv, stages, workers=workers)
    return tenko("run", path, *overrides, "--run-dir", directory)


def result(directory: Path, stage: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((directory / stage / "result.json").read_text())
    return found


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory, small_tsv: Path, small_corpus: Corpus) -> Path:
    """train, lottery, quant_noise, export, with two ranks and a teacher."""
    directory = tmp_path_factory.mktemp("chain") / "run"
    noise = {"scheme": "int4", "clip": "mse", "train": {"max_update": 4, "distill": {"weight": 0.5}}}
    lottery = {"rounds": 1, "fraction": 0.7, "rewind_to": 0, "embeddings": True}
    stages = [{"train": {**TRAIN, "keep_updates": [0]}}, {"lottery": lottery}, {"quant_noise": noise}, "export"]
    done = run(directory, small_tsv, stages)
    assert (done.code, done.errors) == (0, []), done
    return directory


def test_what_a_lottery_has_pruned_stays_pruned_and_is_a_bitmask_in_the_file(chain: Path) -> None:
    pruned, _ = read_artefact(chain / "2-lottery" / "artefact")
    quantized, metadata = read_artefact(chain / "3-quant_noise" / "artefact")
    name = "decoder.layers.0.fc1.weight"
    assert float((pruned[name] == 0).float().mean()) > 0.5
    assert bool((quantized[name][pruned[name] == 0] == 0).all())
    assert not torch.equal(quantized[name], pruned[name])
    assert metadata["tensors"][name]["scheme"] == "int4"
    assert metadata["tensors"][name]["mask"] is True
    sizes = [result(chain, stage)["artefact_bytes"] for stage in ("1-train", "2-lottery", "3-quant_noise")]
    assert sizes == sorted(sizes, reverse=True)


def test_an_export_is_measured_as_it_was_read_back(chain: Path) -> None:
    figures = result(chain, "4-export")
    model = chain / "4-export" / "artefact" / "model.bin"
    assert figures["artefact_bytes"] == model.stat().st_size
    hypotheses = (chain / "4-export" / "hypotheses.txt").read_text().splitlines()
    assert len(hypotheses) == figures["sentences"] == 20
    done = tenko("translate", "--run", chain, stdin=b"Open the file.\n")
    assert (done.code, len(done.out.splitlines())) == (0, 1)


def test_a_pretrained_model_brings_its_subwords_and_teaches(
    chain: Path, small_tsv: Path, small_corpus: Corpus, tmp_path: Path
) -> None:
    source = Path(shutil.copytree(chain / "1-train" / "artefact", tmp_path / "source"))
    stages = [
        {"pretrained": {"model": str(source)}},
        {"train": {**TRAIN, "max_update": 4, "distill": {"weight": 1.0}}},
        {"quantize": {"scheme": "pq", "pq": {"centroids": 16}}},
        {"export": {"format": "fairseq"}},
    ]
    # Another size of vocabulary: without the model's subwords its embeddings would not fit.
    done = run(tmp_path / "run", small_tsv, stages, "data.vocab_size=400", "zstd=3", workers=1)
    assert (done.code, done.errors) == (0, []), done
    for stage in ("1-pretrained", "2-train", "3-quantize"):
        assert (tmp_path / "run" / stage / "artefact" / "spm.model").read_bytes() == (source / "spm.model").read_bytes()
    assert {path.name for path in (tmp_path / "run" / "3-quantize" / "artefact").glob("model*")} == {
        "model.safetensors.zst"
    }
    first, last = (result(tmp_path / "run", stage) for stage in ("1-pretrained", "4-export"))
    assert first["bleu"] == result(chain, "1-train")["bleu"]
    assert first["artefact_bytes"] == result(chain, "1-train")["artefact_bytes"]
    assert last["bleu"] == result(tmp_path / "run", "3-quantize")["bleu"]
    assert last["artefact_bytes"] == (tmp_path / "run" / "4-export" / "artefact" / "model.pt").stat().st_size
    lines = [json.loads(line) for line in (tmp_path / "run" / "2-train" / "metrics.jsonl").read_text().splitlines()]
    assert lines[0]["loss"] < 0.1 < lines[0]["nll"], "a pupil that is its teacher's copy has nothing to learn"

    for end in (b"", b" "):  # as it was; and another model in its place, which the run did not begin with
        with (source / "model.safetensors").open("ab") as file:
            file.write(end)
        again = run(tmp_path / "run", small_tsv, stages, "data.vocab_size=400", "zstd=3", workers=1)
        said = f"began with another model than {source} holds now; another --run-dir begins with that one"
        assert (again.code, "finished before" in again.out, said in again.out) == (0, True, bool(end)), again


def test_a_pruned_model_stays_pruned_when_another_recipe_goes_on_with_it(
    chain: Path, small_tsv: Path, tmp_path: Path
) -> None:
    source = chain / "2-lottery" / "artefact"
    small = {**TRAIN, "max_update": 2, "valid_interval": 2, "save_interval": 2, "warmup_updates": 1}
    noise = {"scheme": "int4", "train": small}
    stages = [{"pretrained": {"model": str(source)}}, {"quant_noise": noise}]
    done = run(tmp_path / "run", small_tsv, stages, workers=1)
    assert (done.code, done.errors) == (0, []), done
    pruned, _ = read_artefact(source)
    quantized, metadata = read_artefact(tmp_path / "run" / "2-quant_noise" / "artefact")
    name = "decoder.layers.0.fc1.weight"
    assert bool((quantized[name][pruned[name] == 0] == 0).all())
    assert metadata["pruned"] is True, "whoever goes on with this one knows it, too"
    for kind, settings in (("quantize", {"scheme": "binary"}), ("ipq", {})):
        again = [{"pretrained": {"model": str(tmp_path / "run" / "2-quant_noise" / "artefact")}}, {kind: settings}]
        done = run(tmp_path / kind, small_tsv, again, workers=1)
        assert (done.code, len(done.errors)) == (2, 1), done
        assert "can't follow pruning" in done.errors[0]
        assert not (tmp_path / kind / "1-pretrained" / "result.json").exists()


@pytest.mark.parametrize(
    ("stages", "override", "message"),
    [
        (["export"], "model.extra={activation_fn: tanh}", "export.format: CTranslate2 has no activation tanh; it has "),
        ([{"lottery": {"fraction": 0.99}}], "train.keep_updates=[0]", "lottery.fraction: 0.99 leaves none of "),
        (
            [{"quantize": {"scheme": "pq", "pq": {"bits": 0.2}}}],
            "train.lr=0.1",
            "quantize.pq.bits: must be 0, or at least 0.4",
        ),
        (
            [{"quant_noise": {"train": {"distill": {"text": "nowhere.en"}}}}],
            "train.lr=0.1",
            "quant_noise.train.distill.text: nowhere.en: no such file; give a text file",
        ),
    ],
)
def test_what_only_the_model_can_tell_of_later_stages_is_told_before_any_training(
    stages: list[Any], override: str, message: str, small_tsv: Path, tmp_path: Path
) -> None:
    done = run(tmp_path / "run", small_tsv, [{"train": TRAIN}, *stages], override, workers=1)
    assert (done.code, len(done.errors)) == (2, 1), done
    assert message in done.errors[0]
    assert not (tmp_path / "run" / "1-train" / "metrics.jsonl").exists()


def test_a_pretrained_model_of_the_other_direction_is_refused(chain: Path, small_tsv: Path, tmp_path: Path) -> None:
    stages = [{"pretrained": {"model": str(chain / "1-train" / "artefact")}}]
    done = run(tmp_path / "run", small_tsv, stages, "direction=cs-en", workers=1)
    assert done.code == 2
    assert len(done.errors) == 1
    assert "translates en-cs, the recipe cs-en" in done.errors[0]
    done = run(tmp_path / "none", small_tsv, [{"pretrained": {"model": "cs-pl"}}], workers=1)
    assert done.code == 2
    assert "pretrained.model: cs-pl: no such model; valid: " in done.errors[0]


def test_stages_learn_from_the_translations_of_one_teacher(small_tsv: Path, tmp_path: Path) -> None:
    """Two ranks; the model that ships finds its own translations more likely than the references."""
    small = {**TRAIN, "max_update": 1, "lr": 1e-6, "log_interval": 1, "dropout": 0}
    few: dict[str, Any] = {"include": ["*layers.0.fc1*"]}
    teacher: dict[str, Any] = {"weight": 0.5, "sequences": True}
    (tmp_path / "more.en").write_text("Open the file.\nSave the file.\n")
    more = {**teacher, "text": str(tmp_path / "more.en")}
    noise, ipq = {"scheme": "pq", "p": 1, **few}, {**few, "together": True, "distill": more, "train": small}
    taught = {**noise, "train": {**small, "distill": teacher}}
    done = run(tmp_path / "run", small_tsv, ["pretrained", {"quant_noise": taught}, {"ipq": ipq}])
    assert (done.code, done.errors) == (0, []), done
    folders = [path for path in (tmp_path / "run" / "taught").iterdir() if path.is_dir()]
    said = {folder for folder in folders if f"ipq: {folder} has the teacher's translations" in done.out}
    assert len(said) == 1
    (more_of_it,) = set(folders) - said
    with_text = (more_of_it / "train.tsv").read_text().splitlines()
    assert with_text == [*(said.pop() / "train.tsv").read_text().splitlines(), *with_text[-2:]]
    assert with_text[-2].startswith("Open the file.\tOtev"), with_text[-2:]
    run(tmp_path / "plain", small_tsv, ["pretrained", {"quant_noise": {**noise, "train": small}}], workers=1)
    assert not (tmp_path / "plain" / "taught").exists()
    first = [
        json.loads((tmp_path / file).read_text().splitlines()[0])["nll"]
        for file in (
            "plain/2-quant_noise/metrics.jsonl",
            "run/2-quant_noise/metrics.jsonl",
            "run/3-ipq/group-1-all/metrics.jsonl",
        )
    ]
    assert max(first[1:]) < 0.7 * first[0], first
