"""Runs as jobs of a real SLURM cluster on this machine, through the template that users get."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from processes import needs_mpi
from slurm_cluster import Cluster, Lab, no_lab
from tenko_run import WHOLE, Done, environment, run_arguments, tenko

from tenko.launch.pulse import read_all
from tenko.launch.spawn import last_update
from tenko.launch.world import World

pytestmark = pytest.mark.torchrun
LONG = {**WHOLE, "train.max_update": "300", "train.save_interval": "50", "train.valid_interval": "150"}
"""Long enough to be told to stop twice."""
SHORT = {**WHOLE, "train.max_update": "20", "train.save_interval": "10", "train.valid_interval": "20"}
TENKO = [sys.executable, "-m", "tenko.launch.cli"]


def launch(cluster: Cluster, tsv: Path, run: Path, *options: str, **settings: str) -> Done:
    """`tenko launch slurm` of the session's small corpus."""
    _, recipe, *overrides = run_arguments(run, tsv, **settings)
    return call(cluster, [*TENKO, "launch", "slurm", *map(str, [recipe, *overrides]), *options])


def status(cluster: Cluster, run: Path) -> str:
    return call(cluster, [*TENKO, "launch", "status", str(run)]).out


def call(cluster: Cluster, command: list[str], **more: str) -> Done:
    there = {**environment(), **cluster.environment, **more}
    done = subprocess.run(command, env=there, capture_output=True, text=True, timeout=120)
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
    path = run / "slurm" / "history"
    lines = path.read_text().splitlines() if path.exists() else []
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
    run, test = tmp_path / "my run", tmp_path / "test.tsv"
    test.write_text("".join(small_tsv.read_text().splitlines(keepends=True)[:20]))
    options = ["--nodes", "2", "--workers-per-node", "1", "--time", "10", "--then", "evaluate,export"]
    options += ["--test", str(test)]
    train, after = job_ids(launch(cluster, small_tsv, run, *options, **LONG))
    wait_for_update(cluster, run, 5)
    shown = status(cluster, run)
    assert re.search(
        rf"job {train} train: RUNNING on n\[0-1\]\n +log {re.escape(str(run))}/logs/slurm-{train}.out\n", shown
    )
    assert f"job {after} evaluate+export: PENDING (Dependency)" in shown
    again = launch(cluster, small_tsv, run, *options, **LONG)
    assert again.code == 2
    assert f"{run}: job {train} of this run is RUNNING" in again.errors[-1]

    high = cluster.call("sbatch", "--parsable", "-p", "high", "-N3", "--exclusive", "-o", "/dev/null", "--wrap", "true")
    cluster.wait(high.strip(), "COMPLETED")
    assert re.fullmatch(r"0 ended with (75|143)", history(run)[1]), history(run)
    saved = last_update(run)
    wait_for_update(cluster, run, (saved or 0) + 2)
    cluster.fail(1)
    cluster.wait(train, "COMPLETED")
    assert [line.split()[:2] for line in history(run)[2:]] == [["1", "begins"], ["2", "begins"], ["2", "ended"]]
    for stage in ("1-train", "2-quantize"):
        ours, plain = (path / stage / "artefact" / "model.safetensors" for path in (run, whole))
        assert ours.read_bytes() == plain.read_bytes(), stage

    cluster.wait(after, "COMPLETED")
    figures = json.loads((run / "evaluation.json").read_text())
    assert (figures["stage"], figures["sentences"]) == ("quantize", 20)
    assert (run / "exported" / "model.bin").is_file()
    shown = status(cluster, run)
    assert shown.startswith(f"{run}: finished, all 2 stages\n")
    assert f"job {train} train: COMPLETED on n[0-1] restarted 2 times" in shown
    shown = call(cluster, [*TENKO, "launch", "status", str(run)], PATH="").out  # elsewhere, or when it is forgotten
    assert (
        f"job {train} train: not known to SLURM any more; its script noted: job {train} restart 2 ended with 0" in shown
    )


def test_seeds_share_nodes_as_tasks_of_an_array_one_worker_a_task(
    cluster: Cluster, small_tsv: Path, tmp_path: Path
) -> None:
    options = ["--nodes", "2", "--workers-per-node", "1", "--per-task", "worker", "--seeds", "2,5", "--time", "10"]
    options += ["--then", "export", "--wait"]
    done = launch(cluster, small_tsv, tmp_path / "run", *options, **SHORT)
    assert done.code == 0, done
    first, *others = re.findall(r"^job (\d+)_2: ", done.out, flags=re.M)
    assert len(others) == 1
    assert f"job {first}_5 (train): COMPLETED on n[0-1]" in done.out
    plain = tmp_path / "plain"
    assert tenko(*run_arguments(plain, small_tsv, seed="5", **SHORT)).code == 0
    runs = [tmp_path / "run-seed2", tmp_path / "run-seed5"]
    artefacts = [(path / "1-train" / "artefact" / "model.safetensors").read_bytes() for path in (*runs, plain)]
    assert artefacts[1] == artefacts[2] != artefacts[0]
    assert all((run / "exported" / "model.bin").is_file() for run in runs)
    log = (runs[1] / "logs" / f"slurm-{first}.out").read_text()
    assert "2 workers on 2 nodes, started by srun" in log
    shown = status(cluster, tmp_path / "run")
    assert [line for line in shown.splitlines() if "finished, all 2 stages" in line] == [
        f"{run}: finished, all 2 stages" for run in runs
    ]


def test_ahead_of_the_time_limit_a_run_saves_and_is_queued_again_but_not_when_cancelled(
    cluster: Cluster, small_tsv: Path, tmp_path: Path
) -> None:
    """SLURM looks at time limits every 30 s and tells up to 30 s early: of its 2 minutes the job is told within 50 s;
    where it does not train yet there is nothing to save, and the next start is told."""
    run = tmp_path / "run"
    settings = {**LONG, "train.max_update": "100000", "train.valid_interval": "100000"}
    options = ["--workers-per-node", "1", "--time", "2", "--notice", "100"]
    (job,) = job_ids(launch(cluster, small_tsv, run, *options, **settings))
    log = run / "logs" / f"slurm-{job}.out"

    def saved() -> list[str]:
        return re.findall(r"saved at update (\d+)", log.read_text() if log.exists() else "")

    cluster.until(lambda: bool(saved()), "a save on notice", timeout=180)
    cluster.wait(job, "PENDING")
    assert last_update(run) == int(saved()[0])
    cluster.wait(job, "RUNNING")
    cluster.call("scontrol", "update", f"JobId={job}", "TimeLimit=60")
    cluster.until(lambda: history(run)[-1].endswith("begins on n0"), "the next start")
    told = history(run)
    assert all(re.fullmatch(r"\d+ (begins on n0|ended with (75|138))", line) for line in told), told
    wait_for_update(cluster, run, int(saved()[0]) + 1, ranks=1)
    cluster.call("scancel", job)
    cluster.wait(job, "CANCELLED")
    assert "CANCELLED" in status(cluster, run)
    assert not [line for line in history(run)[len(told) :] if "begins" in line], "put into the queue again"


def test_an_error_of_the_users_ends_the_job(cluster: Cluster, small_tsv: Path, tmp_path: Path) -> None:
    run, gone = tmp_path / "run", tmp_path / "gone.tsv"
    gone.write_text("")
    done = launch(cluster, gone, run, "--time", "10", "--wait", **SHORT)
    assert done.code == 2
    assert re.fullmatch(r"tenko: error: job (\d+) \(train\) did not end well; see .*", done.errors[-1]), done
    assert history(run) == ["0 begins on n0", "0 ended with 2"]
    assert "FAILED on n0 (NonZeroExitCode) exit 2:0" in status(cluster, run)


MEET = """
import os, sys, torch, torch.distributed as dist
from tenko.launch.job import Job
from tenko.launch.world import World
job = Job.join(World.detect())
job.init_group()
total = torch.tensor([float(job.world.rank)])
dist.all_reduce(total)
with open(f"{sys.argv[1]}/{job.world.rank}", "w") as file:
    file.write(repr((job.world, total.item(), os.environ["GLOO_SOCKET_IFNAME"], os.environ["MASTER_ADDR"])))
dist.barrier()
os._exit(0)
"""


def skip_without(cluster: Cluster, mpi: str) -> None:
    """Skip where SLURM has no such plugin; one that is there and fails is for the test to find."""
    tried = call(cluster, [*cluster.prefix(cluster.nodes), "srun", f"--mpi={mpi}", "--exclusive", "-N", "1", "true"])
    if any("Invalid MPI type" in line for line in tried.errors):
        pytest.skip(f"this SLURM cannot --mpi={mpi} (Debian's plugin for PMIx wants libpmix-dev)")


def meet(cluster: Cluster, folder: Path, mpi: str, nodes: int, tasks: int) -> list[tuple[World, float, str, str]]:
    """What each of so many tasks finds out, with nothing set but by srun, on the first nodes of the cluster."""
    where = [*cluster.prefix(cluster.nodes), "srun", f"--mpi={mpi}", "--exclusive", "-N", str(nodes)]
    where += ["-w", f"n[0-{nodes - 1}]"]  # else SLURM takes others while a job before is still being cleaned up
    skip_without(cluster, mpi)
    there = {name: value for name, value in environment().items() if name != "GLOO_SOCKET_IFNAME"}
    command = [*where, "-n", str(tasks), sys.executable, "-c", MEET, str(folder)]
    done = subprocess.run(command, env={**there, **cluster.environment}, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done
    assert len(list(folder.iterdir())) == tasks, done
    return [eval((folder / str(rank)).read_text(), {"World": World}) for rank in range(tasks)]


@pytest.mark.parametrize("mpi", ["none", "pmix"])
def test_srun_alone_starts_workers_that_find_one_another(cluster: Cluster, tmp_path: Path, mpi: str) -> None:
    met = meet(cluster, tmp_path, mpi, nodes=2, tasks=3)
    places = [(0, 0, 2), (0, 1, 2), (1, 0, 1)]
    for rank, (world, total, interface, address) in enumerate(met):
        assert (world.launcher, world.rank, world.size, world.nodes) == ("srun", rank, 3, 2)
        assert (world.node, world.local_rank, world.local_size) == places[rank]
        assert (total, interface, address) == (3.0, "lo", "127.0.0.1")


@pytest.fixture
def apart() -> Iterator[Cluster]:
    """Three nodes, each on a host of its own. Their names resolve nowhere: SLURM knows their addresses."""
    if (why := no_lab()) is not None:
        pytest.skip(why)
    with Lab(4) as hosts, Cluster(3, hosts) as cluster:
        yield cluster


def test_on_hosts_of_their_own_workers_meet_at_the_first_nodes_address(apart: Cluster, tmp_path: Path) -> None:
    assert apart.hosts is not None
    for mpi in ("none", "pmix"):
        (tmp_path / mpi).mkdir()
        met = meet(apart, tmp_path / mpi, mpi, 2, tasks=2)
        assert [world.node for world, *_ in met] == [0, 1]
        assert [found for _, *found in met] == [[1.0, "e0", apart.hosts.address(0)]] * 2


@needs_mpi
def test_srun_starts_parameter_servers_as_a_second_program_and_its_notice_spares_them(
    apart: Cluster, small_tsv: Path, tmp_path: Path
) -> None:
    """TERM, which SLURM sends to all tasks at preemption, is for the workers to save by."""
    assert apart.hosts is not None
    run = tmp_path / "run"
    settings = {**LONG, "comm.route": "server", "comm.servers": "dedicated"}
    settings |= {"train.max_update": "120", "train.valid_interval": "120", "train.save_interval": "5"}
    _, recipe, *words = map(str, run_arguments(run, small_tsv, **settings))
    worker = ["-N", "2", "-n", "2", sys.executable, "-m", "tenko.launch.worker", recipe, *words]
    server = ["-N", "1", "-n", "1", sys.executable, "-m", "tenko.comm.dedicated"]
    there = {name: value for name, value in environment().items() if name != "GLOO_SOCKET_IFNAME"}
    there |= {**apart.environment, "TENKO_INTERFACE": "e0"}
    command = [*apart.prefix(apart.nodes), "srun", "--mpi=pmix", *worker, ":", *server]
    skip_without(apart, "pmix")

    pipe = subprocess.PIPE
    step = subprocess.Popen(command, env=there, stdout=pipe, stderr=subprocess.STDOUT, text=True)
    apart.until(lambda: last_update(run) is not None or step.poll() is not None, "a first save", timeout=120)
    apart.call("scancel", "--signal=TERM", *apart.call("squeue", "-h", "-t", "R", "-o", "%i").split())
    said, _ = step.communicate(timeout=60)
    assert step.returncode == 75, said
    assert f"2 workers on 2 nodes, started by srun; gloo over e0, met at {apart.hosts.address(0)}:" in said
    assert "ranks: 0 n0 cpu, 1 n1 cpu; parameter servers: server 0 of 1 (rank 2) on n2" in said
    (saved,) = re.findall(r"stopped on notice, saved at update (\d+)", said)
    assert last_update(run) == int(saved) < 120

    done = subprocess.run(command, env=there, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done
    assert f"goes on from update {saved}" in done.stderr + done.stdout
    assert last_update(run) == 120
