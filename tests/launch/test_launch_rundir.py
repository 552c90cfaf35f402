"""Run directories, their files and metrics: whole or absent, one writer, one recipe."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tenko.launch import cli
from tenko.launch.files import write_json_atomic, write_text_atomic
from tenko.launch.metrics import MetricsLog, read_metrics
from tenko.launch.progress import Reporter
from tenko.launch.recipe import load, loads
from tenko.launch.rundir import LOGS, METRICS, RESULT, RunDirectory, RunLock

ONE = "name: x\nstages:\n  - train: {max_update: 3}\n"


def make(path: Path) -> RunDirectory:
    with RunLock(path):
        run = RunDirectory.create(path, load("tiny"))
        run.context(0, Reporter(enabled=False), writer=True, resume=False)
    return run


def test_a_run_directory_reads_back_its_recipe(tmp_path: Path) -> None:
    run = make(tmp_path / "r")
    assert RunDirectory.read(run.path).recipe == load("tiny")
    assert (run.path / "1-train" / "config.yaml").read_text().startswith("train:\n  max_update: 12\n")


@pytest.mark.parametrize(
    ("override", "difference"),
    [
        ("train.lr=1", "train.lr: 0.005, the recipe now says 1.0"),
        ("data.train={en: a, cs: b}", "data.train: embedded, the recipe now says {'en': 'a', 'cs': 'b'}"),
        ("seed=3", "seed: 1, the recipe now says 3"),
    ],
)
def test_another_recipe_is_refused_and_the_key_named(tmp_path: Path, override: str, difference: str) -> None:
    run = make(tmp_path / "r")
    (run.path / "1-train" / METRICS).write_text("{}\n")
    with pytest.raises(ValueError, match="choose another --run-dir") as caught:
        RunDirectory.create(run.path, load("tiny", [override]))
    assert difference in str(caught.value)
    assert RunDirectory.read(run.path).recipe == load("tiny")


def test_where_nothing_was_trained_another_recipe_takes_the_place(tmp_path: Path) -> None:
    run = make(tmp_path / "r")
    (run.path / LOGS).mkdir()
    (run.path / LOGS / "worker-0.log").write_text("data: no such file\n")
    other = RunDirectory.create(run.path, load("scratch", ["train.max_update=5"]))
    assert RunDirectory.read(run.path).recipe == other.recipe
    other.context(0, Reporter(enabled=False), writer=True, resume=False)
    assert "max_update: 5\n" in (run.path / "1-train" / "config.yaml").read_text()


def test_threads_workers_and_appended_stages_may_change(tmp_path: Path) -> None:
    path = tmp_path / "r"
    with RunLock(path):
        (RunDirectory.create(path, loads(ONE, "a")).path / "1-train").mkdir()
        (path / "1-train" / METRICS).touch()
        longer = RunDirectory.create(path, loads(ONE + "  - quantize\n", "b", ["threads=7", "workers=3"]))
        assert RunDirectory.read(path).recipe == longer.recipe
        with pytest.raises(ValueError, match=r"began with stages: \[train, quantize\], the recipe now says \[train\];"):
            RunDirectory.create(path, loads(ONE, "a"))
        other = ONE + "  - export: {format: fairseq}\n    name: x\n"
        with pytest.raises(ValueError, match=r"\[train, quantize\], the recipe now says \[train, x \(export\)\];"):
            RunDirectory.create(path, loads(other, "a"))


def test_a_stages_folder_is_no_run_directory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stage = make(tmp_path / "r").path / "1-train"
    for command in (["run", "tiny", "--run-dir", str(stage)], ["report", str(stage)], ["watch", "--once", str(stage)]):
        with pytest.raises(SystemExit) as ended:
            cli.main(command)
        assert ended.value.code == 2
        line = f"tenko: error: {stage}: is the folder of a stage; give the run directory, {stage.parent}\n"
        assert capsys.readouterr().err == line


def test_a_checkpoint_for_fairseq_is_no_artefact(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "r"
    with RunLock(path):
        run = RunDirectory.create(path, loads(ONE + "  - export: {format: fairseq}\n", "a"))
    for stage in ("1-train", "2-export"):
        (path / stage / "artefact").mkdir(parents=True)
        write_json_atomic(path / stage / RESULT, {"bleu": 1.0})
    (path / "2-export/artefact/model.pt").touch()
    (path / "1-train/artefact/model.safetensors").touch()
    with pytest.raises(ValueError, match=r"^--stage: export is a checkpoint for fairseq-generate; valid: train$"):
        run.artefact("export")
    assert run.artefact("train") == run.artefact(None) == path / "1-train/artefact"
    for model, said in (
        ("2-export/artefact", "is a checkpoint for fairseq-generate; give the artefact that it was exported from"),
        ("1-train/artefact/model.safetensors", f"is a file; give its folder, {path / '1-train/artefact'}"),
    ):
        with pytest.raises(SystemExit):
            cli.main(["translate", str(path / model)])
        assert capsys.readouterr().err == f"tenko: error: {path / model}: {said}\n"


def test_stages_are_found_by_name_and_the_valid_ones_named(tmp_path: Path) -> None:
    run = make(tmp_path / "r")
    with pytest.raises(ValueError, match="no stage is finished yet"):
        run.find_stage(None)
    write_json_atomic(run.path / "1-train" / RESULT, {"bleu": 1.0})
    assert run.find_stage(None) == run.path / "1-train"
    assert run.first_unfinished() == 1
    with pytest.raises(ValueError, match=r"stage quantize is not finished .*; finished: train"):
        run.find_stage("quantize")
    with pytest.raises(ValueError, match=r"no stage x .*; finished: train"):
        run.find_stage("x")
    with pytest.raises(ValueError, match="artefact: missing"):
        run.artefact("train")


@pytest.mark.parametrize(
    ("text", "flaw"),
    [
        ("{}", " damaged: holds none of stage, bleu, chrf"),
        ("[]", " damaged: not an object"),
        ("garbage", "1: damaged: Expecting value"),
        ("", "1: damaged: Expecting value"),
        ('{"stage": "quantize", "bleu": "high"}', " damaged: bleu is no number"),
        ('{"stage": "quantize", "sentences": "many"}', " damaged: sentences is no number"),
        ("[" * 100_000, " damaged: nested too deeply"),
        ('{"stage": "quantize", "wire": 3}', " damaged: wire is no object"),
        ('{"stage": "quantize", "wire": {"bytes_sent": []}}', " damaged: wire.bytes_sent is no number"),
        ('{"stage": "quantize", "samples": ["x"]}', " damaged: samples is no list of objects"),
    ],
)
def test_a_damaged_result_is_told_by_all_who_ask_what_is_finished(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, flaw: str
) -> None:
    run = make(tmp_path / "r")
    result = run.path / "2-quantize" / RESULT
    result.parent.mkdir()
    write_json_atomic(run.path / "1-train" / RESULT, {"stage": "train", "bleu": 1.0})
    result.write_text(text)
    with pytest.raises(ValueError, match=r"2-quantize/result\.json:") as caught:
        run.first_unfinished()
    line = str(caught.value)
    assert line.startswith(f"{result}:{flaw}")
    assert line.endswith("; delete it and run again")
    for command in (["run", "tiny", "--run-dir"], ["report"]):
        with pytest.raises(SystemExit) as ended:
            cli.main([*command, str(run.path)])
        assert ended.value.code == 2
        assert capsys.readouterr() == ("", f"tenko: error: {line}\n")
    with pytest.raises(SystemExit):
        cli.main(["watch", "--once", str(run.path)])
    shown = "".join(capsys.readouterr().out.split())  # a long path is broken anywhere
    assert shown.startswith(f"damaged {line} {run.path}: tiny".replace(" ", ""))
    assert "2quantizedamaged" in shown
    assert "goesonwithit" not in shown


def test_a_stage_resumes_only_from_whole_checkpoints(tmp_path: Path) -> None:
    run = make(tmp_path / "r")
    (run.path / "1-train" / "checkpoints" / "update-00000001.partial").mkdir(parents=True)
    assert not run.is_begun(0)
    (run.path / "1-train" / "checkpoints" / "update-00000001").mkdir()
    assert run.is_begun(0)


def test_one_run_at_a_time(tmp_path: Path) -> None:
    with RunLock(tmp_path / "r"):
        code = "from pathlib import Path; from tenko.launch.rundir import RunLock; RunLock(Path('r')).__enter__()"
        done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert f"process {os.getpid()} is running it" in done.stderr
    with RunLock(tmp_path / "r"):
        pass


def test_a_folder_with_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(ValueError, match=r"holds thesis\.tex but no run"), RunLock(tmp_path):
        pass
    assert not (tmp_path / "lock").exists()


def test_reading_what_is_no_run_says_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no config\.yaml"):
        RunDirectory.read(tmp_path)
    (tmp_path / "config.yaml").write_bytes(b"name: x\n\xff\n")
    with pytest.raises(ValueError, match=r"config\.yaml:2: not valid UTF-8"):
        RunDirectory.read(tmp_path)
    with pytest.raises(ValueError, match="does not exist"):
        RunDirectory.read(tmp_path / "x")
    with pytest.raises(ValueError, match=r"config\.yaml: is a file; give the run directory"):
        RunDirectory.read(tmp_path / "config.yaml")


def test_metrics_lose_a_torn_line_and_what_a_resume_will_repeat(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    log = MetricsLog(path)
    for update in (1, 2, 3):
        log.append({"update": update, "loss": float("nan") if update == 2 else 1.5})
    log.close()
    with path.open("a") as file:
        file.write('{"update": 4, "lo')
    assert [entry["update"] for entry in read_metrics(path)] == [1, 2, 3]
    log = MetricsLog(path)
    log.truncate_after(2)
    log.append({"update": 3, "loss": 1.0})
    log.close()
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    assert entries == [{"update": 1, "loss": 1.5}, {"update": 2, "loss": None}, {"update": 3, "loss": 1.0}]


def test_damaged_metrics_name_the_line(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    for line in ("nonsense", '{"update": null}'):
        path.write_text(f'{{"update": 1}}\n{line}\n{{"update": 2}}\n')
        with pytest.raises(ValueError, match=r"m\.jsonl:2: damaged"):
            read_metrics(path)


def test_a_write_that_fails_half_way_leaves_the_old_file(tmp_path: Path) -> None:
    """A limit on the size of files stands in for a full disk: the kernel takes the first bytes and refuses the rest."""
    path = tmp_path / "result.json"
    write_text_atomic(path, "old")
    code = (
        "import resource, sys; from pathlib import Path; from tenko.launch.files import write_text_atomic\n"
        "from tenko.launch.metrics import MetricsLog\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))\n"
        "for act in (lambda: write_text_atomic(Path('result.json'), 'x' * 1000),\n"
        "            lambda: MetricsLog(Path('m.jsonl')).append({'update': 1, 'text': 'x' * 1000})):\n"
        "    try: act()\n"
        "    except OSError as error: print(error.filename)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["result.json", "m.jsonl"], done.stderr
    assert path.read_text() == "old"
    assert sorted(item.name for item in tmp_path.iterdir()) == ["m.jsonl", "result.json"]
    assert read_metrics(tmp_path / "m.jsonl") == []
