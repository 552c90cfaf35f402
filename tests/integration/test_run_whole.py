"""Whole runs through the command line, with real workers: what they leave, and that cut ones end as uncut ones."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
from safetensors.torch import load_file
from tenko_run import (
    WHOLE,
    Done,
    all_gone,
    environment,
    finish,
    result,
    run_arguments,
    start,
    tenko,
    wait_for_checkpoint,
    workers,
)
from toy_training import TIMINGS, differing

from tenko.compression import read_artefact
from tenko.nmt.corpus import Corpus

pytestmark = pytest.mark.torchrun


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def whole(home: Path, small_tsv: Path, small_corpus: Corpus) -> tuple[Path, Done]:
    """Train and quantize with two workers, never cut."""
    directory = home / "whole"
    done = tenko(*run_arguments(directory, small_tsv, **WHOLE))
    assert (done.code, done.errors) == (0, []), done
    return directory, done


@pytest.fixture(scope="module")
def czech(home: Path, small_tsv: Path, small_corpus: Corpus) -> Path:
    """The other direction, one worker in the parent's own process, averaged checkpoints."""
    directory = home / "czech"
    settings = {**WHOLE, "direction": "cs-en", "workers": "1", "train.average_last": "2", "train.max_update": "60"}
    done = tenko(*run_arguments(directory, small_tsv, **settings))
    assert (done.code, done.errors) == (0, []), done
    assert "average of the checkpoints of updates 40, 60" in done.out
    return directory


def metrics(directory: Path, *left_out: str) -> list[dict[str, object]]:
    lines = (directory / "1-train" / "metrics.jsonl").read_text().splitlines()
    entries = [json.loads(line) for line in lines]
    return [{key: value for key, value in entry.items() if key not in (*TIMINGS, *left_out)} for entry in entries]


def test_a_run_leaves_artefacts_results_and_a_report(whole: tuple[Path, Done]) -> None:
    directory, done = whole
    train, quantize = result(directory, "1-train"), result(directory, "2-quantize")
    for figures, stage in ((train, "1-train"), (quantize, "2-quantize")):
        files = [path for path in (directory / stage / "artefact").iterdir()]
        assert {path.name for path in files} == {"model.safetensors", "spm.model", "dict.txt"}
        model = directory / stage / "artefact" / "model.safetensors"
        assert figures["artefact_bytes"] in (model.stat().st_size, sum(path.stat().st_size for path in files))
        assert figures["sentences"] == 20
        assert figures["tokens_per_second"] > 0
        assert figures["bleu_signature"].startswith("nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:")
        assert len(figures["samples"]) == 8
        assert all(sample["source"] and sample["reference"] for sample in figures["samples"])
        assert (directory / stage / "report.html").is_file()
        assert f"{figures['bleu']:.2f}" in done.out
    assert train["updates"] == 120
    assert train["precision"] == "fp32"
    assert train["wire"]["fp32_bytes"] / train["wire"]["bytes_sent"] > 7
    assert train["wire"]["bytes_sent"] == train["wire"]["up_bytes"] + train["wire"]["down_bytes"] > 0
    assert train["artefact_bytes"] / quantize["artefact_bytes"] > 2.5, "int8, and room for scales and biases"
    assert "2 workers" in done.out
    assert str(directory / "report.html") in done.out


def test_metrics_tell_the_run(whole: tuple[Path, Done]) -> None:
    lines = metrics(whole[0])
    assert [(line["kind"], line["update"]) for line in lines] == [
        *[("train", update) for update in (20, 40, 60)],
        ("valid", 60),
        *[("train", update) for update in (80, 100, 120)],
        ("valid", 120),
    ]
    losses = [float(str(line["loss"])) for line in lines if line["kind"] == "train"]
    assert losses[-1] < losses[0] - 0.5
    wire = [int(str(line["wire_bytes"])) for line in lines if line["kind"] == "train"]
    assert wire == sorted(wire)
    assert wire[-1] == result(whole[0], "1-train")["wire"]["bytes_sent"]


def test_the_report_needs_no_network(whole: tuple[Path, Done]) -> None:
    for page in (whole[0] / "report.html", whole[0] / "1-train" / "report.html"):
        text = page.read_text(encoding="utf-8")
        assert text.count("<svg") >= 3, "loss, BLEU, bytes on the wire"
        loaded = re.findall(r"""(?:src|href)\s*=\s*["']?\s*([^"'\s>]+)""", text)
        assert [target for target in loaded if not target.startswith(("#", "data:"))] == []
        assert not re.search(r"@import|url\(\s*[\"']?(?!#|data:)", text)
        assert "<script src" not in text


def test_the_quantized_artefact_is_the_trained_one_rounded(whole: tuple[Path, Done]) -> None:
    trained, _ = read_artefact(whole[0] / "1-train" / "artefact")
    quantized, metadata = read_artefact(whole[0] / "2-quantize" / "artefact")
    assert metadata["direction"] == "en-cs"
    best = load_file(whole[0] / "1-train" / "checkpoints" / "best" / "model.safetensors")
    assert differing(best, {name: trained[name] for name in best}) == []
    for name, tensor in trained.items():
        if tensor.dim() < 2:
            assert quantized[name].equal(tensor)
        else:
            step = tensor.abs().amax(dim=1, keepdim=True) / 127
            assert ((quantized[name] - tensor).abs() <= 0.501 * step).all()
            assert not quantized[name].equal(tensor)


def test_a_finished_run_is_left_alone(whole: tuple[Path, Done], small_tsv: Path) -> None:
    directory, _ = whole
    before = {path: path.stat().st_mtime_ns for path in directory.rglob("*") if path.is_file() and path.name != "lock"}
    done = tenko(*run_arguments(directory, small_tsv, **WHOLE))
    assert (done.code, done.errors) == (0, [])
    assert "nothing to do" in done.out
    after = {path: path.stat().st_mtime_ns for path in directory.rglob("*") if path.is_file() and path.name != "lock"}
    assert after == before


def test_a_run_cut_between_its_stages_goes_on_with_the_second(
    whole: tuple[Path, Done], home: Path, small_tsv: Path
) -> None:
    directory = Path(shutil.copytree(whole[0], home / "between"))
    shutil.rmtree(directory / "2-quantize")
    trained = (directory / "1-train" / "result.json").read_bytes()
    done = tenko(*run_arguments(directory, small_tsv, **WHOLE))
    assert (done.code, done.errors) == (0, [])
    assert "stage 1/2 train: finished before, left alone" in done.out
    assert (directory / "1-train" / "result.json").read_bytes() == trained
    artefact = Path("2-quantize") / "artefact" / "model.safetensors"
    assert (directory / artefact).read_bytes() == (whole[0] / artefact).read_bytes()


def test_a_run_that_is_killed_and_interrupted_ends_as_if_it_had_not_been(
    whole: tuple[Path, Done], home: Path, small_tsv: Path
) -> None:
    directory = home / "cut"
    arguments = run_arguments(directory, small_tsv, **WHOLE)

    process = start(*arguments)
    wait_for_checkpoint(process, directory)
    victims = workers(directory)
    assert len(victims) == 2
    os.kill(victims[1], signal.SIGKILL)
    done = finish(process)
    assert done.code == 2
    assert len(done.errors) == 1
    assert re.match(r"tenko: error: worker \d \(process \d+\) was ended by SIGKILL", done.errors[0])
    assert str(victims[1]) in done.errors[0]
    assert "the same command goes on from update" in done.errors[0]
    assert all_gone(directory)
    assert not (directory / "1-train" / "result.json").exists()

    reached = max(int(path.name[7:]) for path in directory.glob("1-train/checkpoints/update-????????"))
    process = start(*arguments)
    wait_for_checkpoint(process, directory, after=reached)
    process.send_signal(signal.SIGINT)
    done = finish(process)
    assert done.code == 130
    assert len(done.errors) == 1
    assert done.errors[0].startswith("tenko: interrupted")
    assert f"goes on from update {reached}" in done.out
    assert all_gone(directory)

    done = tenko(*arguments)
    assert (done.code, done.errors) == (0, [])
    for stage in ("1-train", "2-quantize"):
        ours, theirs = (read_artefact(d / stage / "artefact")[0] for d in (directory, whole[0]))
        assert differing(ours, theirs) == []
        assert result(directory, stage)["bleu"] == result(whole[0], stage)["bleu"]
        assert result(directory, stage)["chrf"] == result(whole[0], stage)["chrf"]
    # Bytes may differ by padding: DDP's first buckets are back after a resume.
    assert metrics(directory, "wire_bytes") == metrics(whole[0], "wire_bytes")


def test_a_full_disk_is_one_line_and_the_run_goes_on(home: Path, small_tsv: Path, small_corpus: Corpus) -> None:
    directory = home / "full"
    arguments = run_arguments(directory, small_tsv, **{**WHOLE, "train.max_update": "4", "train.save_interval": "4"})
    done = finish(start(*arguments, largest_file=60_000))  # the weights take more
    assert done.code == 2
    assert len(done.errors) == 1
    assert re.match(r"tenko: error: \S+/checkpoints/(best|update-00000004): cannot write", done.errors[0])
    assert "file too large" in done.errors[0].lower()
    assert all_gone(directory)
    assert not list(directory.glob("1-train/checkpoints/*/*.safetensors"))
    assert not list(directory.glob("1-train/checkpoints/*/checksums.json"))
    assert not (directory / "1-train" / "artefact").exists()
    # As with `| head -1`: the workers have nobody to speak to, and go on all the same.
    process = start(*arguments)
    assert process.stdout is not None
    assert b"2 workers, logs in" in process.stdout.readline()
    process.stdout.close()
    process.stdout = None
    errors = process.communicate(timeout=180)[1]
    assert (process.returncode, errors) == (0, b"")
    assert sorted(os.listdir(directory / "1-train" / "checkpoints")) == ["best", "update-00000004"]


def test_four_ranks_under_an_outer_torchrun(home: Path, small_tsv: Path, small_corpus: Corpus) -> None:
    directory = home / "four"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4"]
    arguments = run_arguments(directory, small_tsv, **{"train.max_update": "6", "train.max_tokens": "300"})
    done = subprocess.run(
        [*command, "-m", "tenko.launch.worker", *map(str, arguments[1:])],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "4 workers" in done.stdout
    # The trainer demands at each validation that all ranks hold the same weights: it has not complained.
    assert [line["update"] for line in metrics(directory) if line["kind"] == "valid"] == [6]
    figures = result(directory, "1-train")
    assert figures["wire"]["fp32_bytes"] == pytest.approx(6 * 2 * 3 / 4 * 4 * figures["parameters"])
    assert figures["wire"]["fp32_bytes"] / figures["wire"]["bytes_sent"] > 6
    states = sorted(path.name for path in (directory / "1-train" / "checkpoints" / "update-00000006").glob("rank-*"))
    assert states == [f"rank-{rank}.pt" for rank in range(4)]
    assert (directory / "2-quantize" / "result.json").exists()
    assert all_gone(directory)


def test_translate_keeps_order_and_empty_lines(whole: tuple[Path, Done]) -> None:
    samples = result(whole[0], "2-quantize")["samples"]
    sources = [sample["source"] for sample in samples]
    lines = [sources[2], "", sources[0], "  ", sources[1], sources[2]]
    text = "\n".join(lines).encode()  # a last line needs no end
    done = tenko("translate", "--run", whole[0], "--engine", "fairseq", stdin=text)
    assert (done.code, done.errors) == (0, [])
    by_source = {sample["source"]: sample["hypothesis"] for sample in samples}
    assert done.out.split("\n") == [*[by_source.get(line, "") for line in lines], ""]


@pytest.mark.parametrize(("which", "stage"), [("whole", "train"), ("czech", "quantize")])
def test_evaluate_prints_one_json_object_and_agrees_with_the_run(
    request: pytest.FixtureRequest, small_corpus: Corpus, tmp_path: Path, which: str, stage: str
) -> None:
    made = request.getfixturevalue(which)
    directory = made if isinstance(made, Path) else made[0]
    test = tmp_path / "test.tsv"
    pairs = [f"{en}\t{cs}\tignored\n" for en, cs in zip(*small_corpus.text("test"), strict=True)]
    # As files come: a byte order mark, letters taken apart, spaces that don't break, a pair of which half is missing.
    text = unicodedata.normalize("NFD", "".join([*pairs[:3], "Open.\t \n", *pairs[3:]])).replace(" ", "\u00a0")
    test.write_text(f"\ufeff{text}", encoding="utf-8")
    done = tenko("evaluate", "--run", directory, "--test", test, "--stage", stage, "--json")
    left_out = f"tenko: {test}: left out 1 of 21 lines, of which a side is empty"
    assert (done.code, done.errors) == (0, [left_out])
    figures = json.loads(done.out)
    wanted = result(directory, "1-train" if stage == "train" else "2-quantize")
    assert figures["sentences"] == 20
    assert figures["tokens_per_second"] > 0
    assert (figures["bleu"], figures["chrf"]) == (wanted["bleu"], wanted["chrf"])
    assert figures["chrf"] > 0
    assert figures["bleu_signature"] == wanted["bleu_signature"]
    assert figures["direction"] == ("en-cs" if which == "whole" else "cs-en")


def test_the_other_direction_translates_into_english(czech: Path, small_corpus: Corpus) -> None:
    english, czech_side = small_corpus.text("test")
    for sample in result(czech, "2-quantize")["samples"]:
        assert sample["source"] in czech_side
        assert sample["reference"] in english
    assert read_artefact(czech / "2-quantize" / "artefact")[1]["direction"] == "cs-en"
    assert "wire" not in result(czech, "1-train"), "one worker sends nothing"
    folders = [czech / "1-train" / "checkpoints" / f"update-{update:08d}" / "model.safetensors" for update in (40, 60)]
    first, second = (load_file(path) for path in folders)
    trained, _ = read_artefact(czech / "1-train" / "artefact")
    for name in first:
        assert trained[name].equal(((first[name].double() + second[name].double()) / 2).float())


def test_export_writes_what_fairseq_reads(czech: Path, tmp_path: Path) -> None:
    done = tenko("export", "--run", czech, "--format", "fairseq", "--out", tmp_path / "exported")
    assert (done.code, done.errors) == (0, [])
    assert done.out.strip() == str(tmp_path / "exported" / "model.pt")
    assert sorted(os.listdir(tmp_path / "exported")) == ["dict.cs.txt", "dict.en.txt", "model.pt", "spm.model"]


def damaged(directory: Path) -> Path:
    """Flip one bit in the newest checkpoint of an unfinished copy."""
    newest = max(directory.glob("1-train/checkpoints/update-????????")) / "model.safetensors"
    content = bytearray(newest.read_bytes())
    content[-7] ^= 4
    newest.write_bytes(content)
    return newest


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_goes_on_to_the_same_end(
    whole: tuple[Path, Done], home: Path, small_tsv: Path
) -> None:
    directory = Path(shutil.copytree(whole[0], home / "damaged"))
    for stage in ("1-train", "2-quantize"):
        (directory / stage / "result.json").unlink()
    file = damaged(directory)
    arguments = run_arguments(directory, small_tsv, **WHOLE)
    before_all = Path(shutil.copytree(directory, home / "all-damaged"))
    done = tenko(*arguments)
    assert (done.code, done.errors) == (0, [])
    said = f"{file}: damaged (its checksum differs); set aside, goes on from update 100"
    assert said in done.out.replace("\n", "")
    assert file.parent.with_name("update-00000120.damaged").is_dir()
    ours, theirs = (read_artefact(d / "2-quantize" / "artefact")[0] for d in (directory, whole[0]))
    assert differing(ours, theirs) == [], "from the checkpoint before, to the same end"

    for path in before_all.glob("1-train/checkpoints/update-*/model.safetensors"):
        path.write_bytes(b"")
    done = tenko(*run_arguments(before_all, small_tsv, **WHOLE))
    assert done.code == 2
    assert len(done.errors) == 1
    assert "model.safetensors: damaged (its checksum differs); no checkpoint is whole; delete " in done.errors[0]
    assert all_gone(before_all)
