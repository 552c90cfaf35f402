"""Runs as jobs of a real SLURM cluster on this machine, through the template that users get."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from slurm_cluster import Cluster
from tenko_run import WHOLE, Done, environment, run_arguments, tenko

from tenko.launch.pulse import read_all

pytestmark = pytest.mark.torchrun
LONG = {**WHOLE, "train.max_update": "600", "train.save_interval": "100", "train.valid_interval": "300"}
"""Long enough to be told to stop twice."""


def launch(cluster: Cluster, tsv: Path, run: Path, *options: str, **settings: str) -> Done:
    """`tenko launch slurm` of the session's small corpus."""
    _, recipe, *overrides = run_arguments(run, tsv, **settings)
    command = [sys.executable, "-m", "tenko.launch.cli", "launch", "slurm", *map(str, [recipe, *overrides]), *options]
    return call(cluster, command)


def status(cluster: Cluster, run: Path) -> str:
    return call(cluster, [sys.executable, "-m", "tenko.launch.cli", "launch", "status", str(run)]).out


def call(cluster: Cluster, command: list[str]) -> Done:
    done = subprocess.run(
        command, env={**environment(), **cluster.environment}, capture_output=True, text=True, timeout=120
    )
    return Done(done.returncode, done.stdout, done.stderr.splitlines())


def job_ids(done: Done) -> list[str]:
    assert done.code == 0, done
    return re.findall(r"^job (\S+):", done.out, flags=re.M)


def wait_for_update(cluster: Cluster, run: Path, update: int, ranks: int = 2) -> None:
    """Until all ranks of a running start have finished an update."""

    def reached() -> bool:
        beats = read_all(run / "logs")
        return len(beats) == ranks and all(beat.phase == "update" and beat.update >= update for beat in beats)

    cluster.until(reached, f"update {update} of {run}")


def history(run: Path) -> list[str]:
    """What the script noted, without times and job ids: `0 begins on n[0-1]`."""
    lines = (run / "slurm" / "history").read_text().splitlines()
    return [line.partition(" restart ")[2] for line in lines]


@pytest.fixture(scope="module")
def whole(small_tsv: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run by a plain `tenko run` with two workers, never cut."""
    run = tmp_path_factory.mktemp("plain") / "run"
    done = tenko(*run_arguments(run, small_tsv, **LONG))
    assert done.code == 0, done
    return run


def test_preempted_and_bereft_of_a_node_a_run_ends_as_if_uncut(
    cluster: Cluster, small_tsv: Path, whole: Path, tmp_path: Path
) -> None:
    run = tmp_path / "my run"
    options = ["--nodes", "2", "--workers-per-node", "1", "--time", "10", "--then", "evaluate,export"]
    train, after = job_ids(launch(cluster, small_tsv, run, *options, "--test", str(small_tsv), **LONG))
    wait_for_update(cluster, run, 5)
    assert "RUNNING on n[0-1]" in status(cluster, run)
    high = cluster.call(
        "sbatch", "--parsable", "-p", "high", "-N3", "--exclusive", "-o", "/dev/null", "--wrap", "true"
    ).strip()
    cluster.wait(high, "COMPLETED")
    assert re.fullmatch(r"0 ended with (75|143)", history(run)[1]), history(run)
    wait_for_update(cluster, run, 5)
    cluster.crash(1)
    cluster.wait(train, "COMPLETED", timeout=150)
    print(history(run))
    cluster.mend(1)
    cluster.wait(after, "COMPLETED", timeout=60)
    for stage in ("1-train", "2-quantize"):
        ours, plain = (path / stage / "artefact" / "model.safetensors" for path in (run, whole))
        assert ours.read_bytes() == plain.read_bytes(), stage
