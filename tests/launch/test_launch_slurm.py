"""What tenko reads of SLURM's variables and answers, and what it writes for sbatch; the real thing is in
tests/integration/test_slurm_*.py."""

from __future__ import annotations

import re
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tenko.launch import cli, slurm_launch, slurm_query
from tenko.launch.recipe import load
from tenko.launch.rundir import RunDirectory, RunLock
from tenko.launch.slurm_env import FIRST_PORT, PORTS, first_names, meeting_point, port
from tenko.launch.slurm_query import gpus_of, said
from tenko.launch.slurm_script import EVALUATE, TRAIN, VALUES, Request, evaluate_script, seconds, train_script
from tenko.launch.world import World

STEP = {
    "SLURM_JOB_ID": "12",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "6",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "2",
    "SLURM_STEP_NUM_TASKS": "7",
    "SLURM_STEP_NUM_NODES": "3",
    "SLURM_STEP_TASKS_PER_NODE": "3,2(x2)",
    "SLURM_STEP_NODELIST": "127.0.0.1",
}
"""As srun sets them; verified in tests/integration."""


def test_a_task_of_a_step_is_a_worker_and_the_batch_script_is_alone() -> None:
    world = World.detect(STEP)
    assert world == World(launcher="srun", rank=6, size=7, local_rank=1, local_size=2, node=2, nodes=3)
    batch = {key: value for key, value in STEP.items() if "STEP" not in key}
    assert World.detect(batch) == World()


def test_tasks_learn_where_to_meet_and_what_the_user_has_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")  # no scontrol that could be asked
    environ = dict(STEP)
    World.detect(STEP).export(environ)
    assert (environ["MASTER_ADDR"], environ["MASTER_PORT"]) == ("127.0.0.1", str(port(12, "0")))
    mine = {**STEP, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "3"}
    World.detect(STEP).export(mine)
    assert (mine["MASTER_ADDR"], mine["MASTER_PORT"]) == ("10.0.0.1", "3")
    with pytest.raises(ValueError, match="SLURM_JOB_ID and SLURM_JOB_NODELIST: not set"):
        meeting_point({})


@given(job=st.integers(1, 10**7), later=st.integers(1, 300), step=st.integers(0, 35), other=st.integers(0, 35))
def test_jobs_and_steps_at_the_same_time_have_ports_of_their_own(job: int, later: int, step: int, other: int) -> None:
    mine = port(job, str(step))
    assert FIRST_PORT <= mine < FIRST_PORT + PORTS
    assert mine not in (port(job + later, str(other)), port(job, ""), port(job + later, ""))
    assert step == other or mine != port(job, str(other))


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("n0", ["n0"]),
        ("n[0-3]", ["n0", "n1"]),
        ("n[09-12],x", ["n09", "n10"]),
        ("n[01,5-7]", ["n01", "n5"]),
        ("a-1,b[2-4]", ["a-1", "b2"]),
        ("r[1-2]c[3-4]", ["r1c3", "r2c3"]),
    ],
)
def test_the_first_nodes_of_a_list(nodes: str, first: list[str]) -> None:
    assert first_names(nodes) == first


@pytest.mark.parametrize(
    ("time", "expected"),
    [("90", 5400), ("1:30", 90), ("2:00:00", 7200), ("1-12", 129600), ("1-12:30", 131400), ("1-0:0:1", 86401)],
)
def test_time_limits_as_slurm_reads_them(time: str, expected: int) -> None:
    assert seconds(time) == expected


@pytest.mark.parametrize("time", ["", "2h", "1:2:3:4", "-5", "0", "tomorrow"])
def test_a_time_limit_that_is_none_is_refused(time: str) -> None:
    with pytest.raises(ValueError, match=r"^--time: must be"):
        seconds(time)


@pytest.mark.parametrize(
    ("gres", "count"),
    [("(null)", 0), ("gpu:2", 2), ("gpu:a100:4(S:0-1),nic:1", 4), ("gpu:a:1,gpu:b:3", 4), ("gpu:h100:8(S:0,1)", 8)],
)
def test_gpus_of_a_node(gres: str, count: int) -> None:
    assert gpus_of(gres) == count


def test_what_slurm_complains_of_is_one_line() -> None:
    stderr = "sbatch: error: Invalid qos specification\nsbatch: error: Batch job submission failed: Invalid qos\n"
    assert said(stderr) == "Invalid qos specification; Batch job submission failed: Invalid qos"


def request(folder: Path) -> Request:
    return Request(name="x", run_dir=folder / "a run's", nodes=2, workers=4, gpus=4, cpus=3, time="8:00:00")


def test_a_script_is_bash_with_all_values_and_quoted_paths(tmp_path: Path) -> None:
    one = request(tmp_path)
    seeds = replace(one, seeds=(3, 1), then=("export",), account="me", partition="p", options=("--qos=low",))
    for script in (train_script(one), train_script(replace(seeds, per_task="worker")), evaluate_script(seeds)):
        assert subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True).stderr == ""
        assert re.findall("@[a-z_]+@", script) == []
        shown = script.split("\nRUN=")[1].split("\n")[0]
        told = subprocess.run(
            ["bash", "-c", f"RUN={shown}; echo $RUN"], env={"SLURM_ARRAY_TASK_ID": "3"}, text=True, capture_output=True
        )
        assert told.stdout.strip() == str(tmp_path / "a run's") + ("-seed3" if "--array" in script else "")
    options = set(re.findall(r"^#SBATCH (--\S+)$", train_script(one), flags=re.M))
    assert {"--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=12", "--gpus-per-node=4", "--requeue"} <= options
    options = set(re.findall(r"^#SBATCH (--\S+)$", train_script(replace(seeds, per_task="worker")), flags=re.M))
    assert {"--ntasks-per-node=4", "--cpus-per-task=3", "--array=3,1", "--qos=low", "--account=me"} <= options


def test_a_template_of_ones_own_is_filled_in_and_a_strange_name_in_it_refused(tmp_path: Path) -> None:
    own = tmp_path / "own.sbatch"
    own.write_text("#!/bin/bash\n@directives@\nmodule load x; @command@\n")
    script = train_script(replace(request(tmp_path), template=own))
    assert "module load x; #" in script
    assert "#SBATCH --nodes=2" in script
    own.write_bytes(b"#!/bin/bash\n\xff\n")
    with pytest.raises(ValueError, match=r"own\.sbatch:2: not valid UTF-8\Z"):
        train_script(replace(request(tmp_path), template=own))
    own.write_text("@nodes@")
    with pytest.raises(ValueError, match=rf"--template: @nodes@: unknown; valid: @directives@.*@{[*VALUES][-1]}@"):
        train_script(replace(request(tmp_path), template=own))
    for text, what in (("", "is empty"), ("@directives@\n", "begins with '#SBATCH --job-name=tenko-x'")):
        own.write_text(text)  # sbatch refuses both
        with pytest.raises(ValueError, match=rf"--template: .*own\.sbatch: must begin with #! .*, {what}\Z"):
            train_script(replace(request(tmp_path), template=own))


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"nodes": 0}, "--nodes: must be at least 1, is 0"),
        ({"then": ("test",)}, "--then: test: unknown; valid: evaluate, export"),
        ({"then": ("evaluate",)}, "--then: evaluate needs --test FILE.tsv"),
        ({"test": Path("/nowhere.tsv")}, "--test: /nowhere.tsv: no such file"),
        ({"notice": 28800}, "--notice: must be below the time limit, 8:00:00, is 28800 s"),
        ({"time": "99:99"}, "--time: minutes and seconds behind a colon must be below 60, is '99:99'"),
        ({"time": "1-1:60"}, "--time: minutes and seconds behind a colon must be below 60, is '1-1:60'"),
        ({"test": Path(__file__)}, f"--test: {__file__}: is for --then evaluate, which is not asked for"),
        ({"options": ("qos=low",)}, "--sbatch: qos=low: must be an option of sbatch, for instance --sbatch=--qos=low"),
        ({"run_dir": Path('a"b')}, '--run-dir: a"b: SLURM takes no line break and no quotation mark in it'),
    ],
)
def test_a_request_that_makes_no_sense_is_one_line(change: dict[str, object], line: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"^{re.escape(line)}$"):
        replace(request(tmp_path), **change)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (
            ["--run-dir", "run", "seed=2"],
            "run: began with seed: 1, the recipe now says 2; choose another --run-dir, .*",
        ),
        (["--run-dir", "run", "--seeds", "1,2"], "run-seed2: holds thesis.tex but no run; choose another --run-dir"),
        (["--run-dir", "thesis"], "thesis: is a file, a run directory is needed; choose another --run-dir"),
        (["--run-dir", "done"], r"done/1-train/result.json: damaged: not an object; delete it and run again"),
        (["seed=3", "--seeds", "1,2"], "override seed=3: contradicts the command's options: --seeds is given"),
        (
            ["workers=3", "--workers-per-node", "2"],
            "override workers=3: contradicts the command's options: 2 a node by the options",
        ),
        (["seed=3", "seed=4"], "override seed=4: seed: set twice, first by seed=3"),
        (["data.train=nope.tsv"], "data.train: no such file: nope.tsv; give .*"),
        (["data.test={en: thesis, cs: nope}"], "data.test: no such file: nope; give .*"),
        (["data.subwords=nope"], "data.subwords: no such file: nope"),
        (["--notice", "100000"], "--notice: must be below the time limit, 1:00:00, is 100000 s"),
        (["--template", "empty"], "--template: empty: must begin with #! .*"),
        (["--test", "thesis"], "--test: thesis: is for --then evaluate, .*"),
    ],
)
def test_a_dry_run_refuses_what_a_run_would(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    line: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "")  # no cluster
    for name in ("run", "done"):
        with RunLock(Path(name)):
            (RunDirectory.create(Path(name), load("tiny", ["workers=2"])).path / "1-train").mkdir()
    Path("run/1-train/metrics.jsonl").touch()
    Path("done/1-train/result.json").write_text("[]")
    Path("run-seed2").mkdir()
    for name in ("thesis", "empty", "run-seed2/thesis.tex"):
        Path(name).touch()
    before = sorted(Path().rglob("*"))
    code, out, error = dry_run(capsys, *arguments)
    assert (code, out, error.count("\n")) == (2, "", 1), error
    assert re.fullmatch(rf"tenko: error: {line}\n", error), error
    assert sorted(Path().rglob("*")) == before
    code, out, _ = dry_run(capsys, "--run-dir", "run")
    assert (code, out[:12]) == (0, "#!/bin/bash\n"), "the same run goes on"
    assert sorted(Path().rglob("*")) == before


def test_a_dry_run_refuses_a_model_or_a_text_that_is_not_there(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    given = ("pretrained.model=nope", "quant_noise.train.max_update=5")
    code, out, error = dry_run(capsys, *given, recipe="quant_noise")
    line = "pretrained.model: nope: no such model; valid: en-cs, cs-en, the folder of an artefact"
    assert (code, out, error) == (2, "", f"tenko: error: {line}\n")
    Path("nope").mkdir()  # what is in it the job will see
    assert dry_run(capsys, *given, recipe="quant_noise")[::2] == (0, "")
    text = "quant_noise.train.distill.text"
    code, out, error = dry_run(capsys, *given, f"{text}=nope", recipe="quant_noise")
    line = f"{text}: nope: is a folder; give a text file, a sentence a line (plain, .gz, .xz, .zst)"
    assert (code, out, error) == (2, "", f"tenko: error: {line}\n")


def dry_run(capsys: pytest.CaptureFixture[str], *arguments: str, recipe: str = "tiny") -> tuple[object, str, str]:
    with pytest.raises(SystemExit) as ended:
        cli.main(["launch", "slurm", recipe, *arguments, "--dry-run"])
    output = capsys.readouterr()
    return ended.value.code, output.out, output.err


SINFO = """train*|up|1-00:00:00|2|4|(null)
train*|up|1-00:00:00|1|16+|gpu:a100:4(S:0-1)
old|down|infinite|7|2|(null)
"""


def test_rows_of_unlike_nodes_are_one_partition(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(slurm_query, "ask", lambda *command: SINFO)
    train, old = slurm_query.partitions()
    assert (train.name, train.default, train.up, train.limit) == ("train", True, True, 86400)
    assert (train.nodes, train.cpus, train.gpus) == (3, 16, 4)
    assert (old.name, old.default, old.up, old.limit) == ("old", False, False, float("inf"))
    fits = replace(request(tmp_path), nodes=3, workers=4, cpus=4, gpus=4, time="1-0")
    slurm_query.check(fits)
    for change, line in (
        ({"nodes": 4}, "--nodes: 4: partition train has 3"),
        ({"gpus": 5}, "--gpus-per-node: 5: nodes of partition train have 4"),
        ({"cpus": 5}, "--workers-per-node: 4 of 5 cores each: nodes of partition train have 16"),
        ({"time": "1-0:0:1"}, "--time: 1-0:0:1: partition train allows 24 h"),
        ({"partition": "old"}, "--partition: old: takes no jobs now; valid: train, old"),
    ):
        with pytest.raises(ValueError, match=f"^{line}$"):
            slurm_query.check(replace(fits, **change))  # type: ignore[arg-type]


@pytest.mark.parametrize(("seeds", "after"), [((), "afterok"), ((1, 2), "aftercorr")])
def test_what_follows_waits_for_its_own_training_which_goes_where_that_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, seeds: tuple[int, ...], after: str
) -> None:
    asked: list[tuple[str, ...]] = []

    def ask(*command: str) -> str:
        asked.append(command)
        if "--dependency" in "".join(command):
            raise ValueError("sbatch: no")
        return "7;cluster\n"

    for module in (slurm_query, slurm_launch):
        monkeypatch.setattr(module, "ask", ask)
    one = replace(request(tmp_path), seeds=seeds, then=("export",))
    with pytest.raises(ValueError, match="sbatch: no"):
        slurm_launch._submit(one, {TRAIN: "", EVALUATE: ""})
    assert f"--dependency={after}:7" in asked[1]
    assert asked[-1] == ("scancel", "7")
