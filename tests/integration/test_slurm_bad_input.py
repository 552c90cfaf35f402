"""What cannot run is refused before anything is submitted: one line, exit 2; asked of a real cluster."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from slurm_cluster import Cluster
from tenko_run import Done, environment

from tenko.launch.rundir import RunLock

LAUNCH = [sys.executable, "-m", "tenko.launch.cli", "launch"]


def call(cluster: Cluster | None, *arguments: str | Path, **more: str) -> Done:
    there = {**environment(), **(cluster.environment if cluster else {}), **more}
    done = subprocess.run([*LAUNCH, *map(str, arguments)], env=there, capture_output=True, text=True, timeout=60)
    return Done(done.returncode, done.stdout, done.stderr.splitlines())


def refused(done: Done, line: str) -> None:
    """One line on stderr that matches, nothing on stdout, exit 2."""
    assert (done.code, done.out, len(done.errors)) == (2, "", 1), done
    assert re.fullmatch(rf"tenko: error: {line}", done.errors[0]), done.errors


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--partition", "gpu"], "--partition: gpu: no such partition; valid: (train, high|high, train)"),
        (["--nodes", "4"], "--nodes: 4: partition train has 3"),
        (["--gpus-per-node", "3"], "--gpus-per-node: 3: nodes of partition train have 2"),
        (["--workers-per-node", "3"], "--workers-per-node: 3 of 1 cores each: nodes of partition train have 2"),
        (["--time", "2-0"], "--time: 2-0: partition train allows 24 h"),
        (["--time", "soon"], "--time: must be minutes, .*, is 'soon'"),
        (["--seeds", "1,x"], "--seeds: must be whole numbers with commas, for instance 1,2,3, is '1,x'"),
        (["train.lr=fast"], "override train.lr=fast: train.lr: must be a number, is fast"),
        (
            ["comm.route=server", "comm.servers=dedicated"],
            "comm.servers: dedicated .* only mpirun or srun --mpi=pmix starts them: .*",
        ),
        (["--sbatch=--no-such-option"], "sbatch: .*no-such-option.*"),
    ],
)
def test_what_the_cluster_cannot_run_is_one_line(
    cluster: Cluster, tmp_path: Path, options: list[str], line: str
) -> None:
    refused(call(cluster, "slurm", "tiny", *options, "--run-dir", tmp_path / "run"), line)
    assert cluster.call("squeue", "-h", "-n", "tenko-tiny") == ""


def test_a_recipe_that_is_none_and_a_directory_in_use_are_one_line(cluster: Cluster, tmp_path: Path) -> None:
    refused(call(cluster, "slurm", tmp_path / "no.yaml"), f"{tmp_path}/no.yaml: no such recipe; give a YAML file or .*")
    with RunLock(tmp_path / "run"):
        refused(
            call(cluster, "slurm", "tiny", "--run-dir", tmp_path / "run"), rf"{tmp_path}/run: .* is running it on .*"
        )
    refused(call(cluster, "status", tmp_path), rf"{tmp_path}: has no config.yaml; .*")
    assert cluster.call("squeue", "-h", "-n", "tenko-tiny") == ""


def test_a_job_that_waits_holds_its_run_directory(cluster: Cluster, tmp_path: Path) -> None:
    options = ["tiny", "--run-dir", tmp_path / "run", "--sbatch=--begin=now+1hour"]
    first = call(cluster, "slurm", *options)
    assert first.code == 0, first
    job = re.findall(r"^job (\d+): train of ", first.out)[0]
    try:
        refused(
            call(cluster, "slurm", *options), rf"{tmp_path}/run: job {job} of this run is PENDING; .*scancel {job}.*"
        )
        shown = call(cluster, "status", tmp_path / "run").out
        assert f"job {job} train: PENDING (BeginTime)" in shown
        assert "(not there yet)" in shown
    finally:
        cluster.call("scancel", job)
    cluster.wait(job, "CANCELLED")
    again = call(cluster, "slurm", *options)
    assert again.code == 0, again
    cluster.call("scancel", re.findall(r"^job (\d+): train of ", again.out)[0])


def test_gpus_are_asked_for_and_a_worker_is_started_for_each(cluster: Cluster, tmp_path: Path) -> None:
    options = ["tiny", "--gpus-per-node", "2", "--run-dir", tmp_path / "run", "--sbatch=--hold"]
    done = call(cluster, "slurm", *options)
    job = re.findall(r"^job (\d+): train of ", done.out)[0]
    shown = cluster.job(job)
    cluster.call("scancel", job)
    assert (shown["TresPerNode"], shown["NumCPUs"]) == ("gres:gpu:2", "2")
    assert "\nworkers: 2\n" in (tmp_path / "run" / "config.yaml").read_text()


def test_a_dry_run_needs_no_slurm_and_leaves_nothing(tmp_path: Path) -> None:
    there = {"PATH": "", "SLURM_CONF": "/nowhere"}
    run = tmp_path / "run"
    done = call(None, "slurm", "tiny", "--nodes", "2", "--run-dir", run, "--dry-run", **there)
    assert (done.code, done.errors) == (0, [])
    assert done.out.startswith("#!/bin/bash\n")
    assert "#SBATCH --nodes=2\n" in done.out
    assert not run.exists()
    refused(call(None, "slurm", "tiny", "--run-dir", run, **there), "sinfo: not found: SLURM is not installed here; .*")
    assert not run.exists()
