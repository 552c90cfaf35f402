"""Runs that mpirun starts, workers alone or with parameter servers, in real MPI jobs; and what kills them."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from processes import MPIRUN, needs_mpi
from tenko_run import environment, result, run_arguments

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import lab

from tenko.nmt import checkpoint

pytestmark = needs_mpi
OPTIONS = ["--allow-run-as-root", "--oversubscribe", "--bind-to", "none", "--mca", "pml", "ob1"]
WORKER = ["-m", "tenko.launch.worker"]
STAGE = [str(Path(__file__).with_name("mpi_stage.py"))]
SERVER = [sys.executable, "-m", "tenko.comm.dedicated"]
DEDICATED = {"comm.route": "server", "comm.servers": "dedicated"}
TRAIN = {
    **DEDICATED,
    "train.max_update": "40",
    "train.update_freq": "2",
    "train.save_interval": "8",
    "train.valid_interval": "20",
    "train.log_interval": "4",
    "train.valid_sentences": "4",
    "train.max_tokens": "300",
    "train.clip_norm": "0.5",
    "train.precision": "fp16",
    "train.init_scale": "1e7",  # overflows at first
}


PIPE, STDOUT = subprocess.PIPE, subprocess.STDOUT
ENVIRONMENT = {**{key: value for key, value in environment().items() if key != "GLOO_SOCKET_IFNAME"}, "NO_COLOR": "1"}


@dataclass
class Started:
    """A job of mpirun, and all its processes that were seen."""

    process: subprocess.Popen[str]
    seen: list[psutil.Process]

    def look(self) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            known = {process.pid for process in self.seen}
            children = psutil.Process(self.process.pid).children(recursive=True)
            self.seen += [child for child in children if child.pid not in known]

    def find(self, word: str, rank: int) -> psutil.Process:
        """The process of a rank whose command line has the word."""
        self.look()
        for process in self.seen:
            with contextlib.suppress(psutil.Error):
                if word in process.cmdline() and process.environ().get("OMPI_COMM_WORLD_RANK") == str(rank):
                    return process
        raise AssertionError(f"no rank {rank} of {word}")

    def finish(self, seconds: float = 240) -> tuple[int, str]:
        """Exit code and output; nobody may be left."""
        self.look()
        try:
            out, _ = self.process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise
        assert not psutil.wait_procs(self.seen, timeout=15)[1], "processes are left"
        return self.process.returncode, out


def start(workers: list[str], *, n: int = 2, servers: int = 0, options: tuple[str, ...] = ()) -> Started:
    command = [str(MPIRUN), *OPTIONS, *(options or ("--mca", "btl", "self,sm"))]
    command += ["-n", str(n), sys.executable, *workers]
    if servers:
        command += [":", "-n", str(servers), *SERVER]
    return Started(subprocess.Popen(command, env=ENVIRONMENT, stdout=PIPE, stderr=STDOUT, text=True), [])


def arguments(directory: Path, tsv: Path, **settings: str) -> list[str]:
    """What `tenko run` is given, for the worker."""
    return [str(argument) for argument in run_arguments(directory, tsv, **settings)[1:]]


def wait_for_checkpoint(job: Started, directory: Path, after: int = 0) -> int:
    """Wait for a checkpoint later than `after`; its update."""
    deadline = time.monotonic() + 200
    while True:
        done = checkpoint.list_updates(directory / "1-train" / "checkpoints")
        if done and done[-1] > after:
            job.look()
            return done[-1]
        assert job.process.poll() is None, job.finish()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def lines(directory: Path) -> list[dict[str, Any]]:
    """metrics.jsonl, without what a clock says."""
    text = (directory / "1-train" / "metrics.jsonl").read_text()
    timed = ("seconds", "tokens_per_second", "share_compute", "share_exchange", "share_data")
    return [{k: v for k, v in json.loads(line).items() if k not in timed} for line in text.splitlines()]


def weights(directory: Path) -> dict[str, str]:
    """Checksums of the last checkpoint's files that hold the training."""
    folder = checkpoint.path_of(directory / "1-train" / "checkpoints", int(TRAIN["train.max_update"]))
    sums = json.loads((folder / "checksums.json").read_text())
    return {"model": sums["model.safetensors"], "best": result(directory, "1-train")["valid_bleu"]}


@pytest.fixture(scope="module")
def uncut(small_tsv: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run on two workers and two servers that nothing happens to, and its output."""
    directory = tmp_path_factory.mktemp("uncut") / "run"
    code, out = start([*WORKER, *arguments(directory, small_tsv, **TRAIN)], servers=2).finish()
    assert code == 0, out[-4000:]
    return directory, out


def test_recipe_trains_with_servers_through_the_one_loop(uncut: tuple[Path, str]) -> None:
    directory, out = uncut
    assert "2 workers on 1 node, started by mpirun; gloo over lo" in out
    assert "parameter servers: server 0 of 2 (rank 2) on" in out
    train = [line for line in lines(directory) if line["kind"] == "train"]
    assert train[-1]["loss"] < 0.9 * train[0]["loss"]
    assert train[0]["overflows"] > 0
    assert train[-1]["scale"] < 1e7
    assert 0 < train[-1]["grad_norm"] < 20
    assert train[-1]["wire_bytes"] * 4 < train[-1]["wire_fp32_bytes"], "3 bits up, 4 bits down, vectors in fp32"


def test_killed_server_then_a_notice_and_the_run_ends_with_the_uncut_bits(
    uncut: tuple[Path, str], small_tsv: Path, tmp_path: Path
) -> None:
    directory = tmp_path / "run"
    command = [*WORKER, *arguments(directory, small_tsv, **TRAIN)]
    job = start(command, servers=2)
    saved = wait_for_checkpoint(job, directory)
    job.find("tenko.comm.dedicated", 3).kill()
    killed = time.monotonic()
    code, out = job.finish(60)
    assert time.monotonic() - killed < 30
    assert code not in (0, 75), out[-4000:]
    assert "signal 9" in out, "mpirun's word, which names the rank"
    assert "rank 3" in out

    job = start(command, servers=2)
    wait_for_checkpoint(job, directory, saved)
    job.process.send_signal(signal.SIGUSR1)
    code, out = job.finish()
    assert code == 75, out[-4000:]
    assert out.count("stopped on notice, saved at update") == 1

    code, out = start(command, servers=2).finish()
    assert code == 0, out[-4000:]
    assert lines(directory) == lines(uncut[0])
    assert weights(directory) == weights(uncut[0])


def test_mpi_says_who_is_where_and_one_ranks_exception_ends_all(small_tsv: Path, tmp_path: Path) -> None:
    command = [*STAGE, *arguments(tmp_path / "run", small_tsv)]
    (tmp_path / "do").write_text("raise")
    code, out = start(command, n=3).finish(180)
    assert code == 1, out[-4000:]
    assert "internal error: RuntimeError: the second rank has had enough; traceback in" in out
    assert out.count("tenko: error: rank") == 1, "the others say nothing of what they saw of its end"
    assert "had enough" in (tmp_path / "run" / "logs" / "worker-1.log").read_text()
    worlds = [json.loads((tmp_path / f"world-{rank}.json").read_text()) for rank in range(3)]
    for rank, world in enumerate(worlds):
        assert (world["rank"], world["size"], world["local_rank"], world["local_size"]) == (rank, 3, rank, 3)
        assert (world["node"], world["nodes"], world["launcher"], world["interface"]) == (0, 1, "mpirun", "lo")
        assert world["sum"] == 3


def test_killed_worker_and_one_that_hangs_end_all(small_tsv: Path, tmp_path: Path) -> None:
    command = [*STAGE, *arguments(tmp_path / "run", small_tsv)]
    (tmp_path / "do").write_text("wait")
    job = start(command, n=3)
    deadline = time.monotonic() + 120
    while not (tmp_path / "world-2.json").exists():
        assert job.process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    job.find(STAGE[0], 1).kill()
    code, out = job.finish(30)
    assert code != 0
    assert "signal 9" in out

    (tmp_path / "do").write_text("hang")
    code, out = start([*command, "hang_timeout=3"], n=3).finish(180)
    assert code != 0
    assert re.search(r"tenko: error: worker 1 \(process \d+\) hangs in update 1, no progress for \d+ s; stacks in", out)
    logs = [(tmp_path / "run" / "logs" / f"worker-{rank}.log").read_text() for rank in range(3)]
    assert [("mpi_stage.py" in log, "barrier" in log) for log in logs] == [(True, True), (True, False), (True, True)]


@pytest.mark.parametrize(
    ("servers", "settings", "message"),
    [
        (0, DEDICATED, "comm.servers: dedicated needs parameter servers, and mpirun has started none: mpirun -n W"),
        (1, {}, "comm.servers: is sharded (route all_reduce), but mpirun has started parameter servers"),
        (1, {**DEDICATED, "train.lr": "fast"}, "train.lr"),
    ],
)
def test_what_is_wrong_at_the_start_is_one_line(
    small_tsv: Path, tmp_path: Path, servers: int, settings: dict[str, str], message: str
) -> None:
    job = start([*WORKER, *arguments(tmp_path / "run", small_tsv, **settings)], servers=servers)
    code, out = job.finish(180)
    assert code == 2, out[-3000:]
    assert out.count("tenko: error:") == 1, out
    assert message in out
    assert not (tmp_path / "run").exists()


def test_servers_without_mpirun_are_one_line(small_tsv: Path, tmp_path: Path) -> None:
    command = [sys.executable, *WORKER, *arguments(tmp_path / "run", small_tsv, **DEDICATED)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=90)
    assert done.returncode == 2
    assert (
        "comm.servers: dedicated needs parameter servers, and only mpirun or srun --mpi=pmix starts them: mpirun -n W"
        in done.stderr
    )
    assert len(done.stderr.splitlines()) == 1


@pytest.fixture
def two_hosts() -> Iterator[lab.Lab]:
    if (why := lab.missing()) is not None:
        pytest.skip(why)
    with lab.Lab(2) as there:
        yield there


def test_two_hosts_meet_where_they_are_told_and_one_goes_on_without_the_other(
    two_hosts: lab.Lab, small_tsv: Path, tmp_path: Path
) -> None:
    """Asynchronously, until the second host is cut off; then the first alone, with one worker."""
    agent = tmp_path / "agent"  # in ssh's place: enters the host's namespace, under a host name of its own
    base = two_hosts.name(0)[: -len("0")]
    agent.write_text(
        "#!/bin/bash\n"
        "while [[ $1 == -* ]]; do shift; done\n"
        "i=$((${1##*.} - 1)); shift; export OMP_NUM_THREADS=1\n"
        f'exec ip netns exec {base}$i unshare --uts bash -c "hostname host$i; $*"\n'
    )
    agent.chmod(0o755)
    network, directory = "10.77.0.0/24", tmp_path / "run"
    settings = {**TRAIN, "comm.staleness": "3", "train.precision": "fp32", "train.valid_interval": "8"}
    worker = [sys.executable, *WORKER, *arguments(directory, small_tsv, **settings)]
    options = ["--map-by", "node", "--prtemca", "plm_ssh_agent", str(agent), "--prtemca", "prte_if_include", network]
    options += ["--mca", "btl", "tcp,self", "--mca", "btl_tcp_if_include", network, "-x", "TENKO_INTERFACE=e0"]
    for name, value in (("time", "5"), ("intvl", "2"), ("probes", "3")):
        options += ["--prtemca", f"oob_tcp_keepalive_{name}", value]
    inside = ["ip", "netns", "exec", two_hosts.name(0), "unshare", "--uts"]
    inside += ["bash", "-c", 'hostname host0; exec "$@"', "_", str(MPIRUN), *OPTIONS, *options]

    def run(hosts: int) -> Started:
        there = ",".join(f"{two_hosts.address(i)}:2" for i in range(hosts))
        command = [*inside, "--host", there, "-n", str(hosts), *worker, ":", "-n", "1", *SERVER]
        return Started(subprocess.Popen(command, env=ENVIRONMENT, stdout=PIPE, stderr=STDOUT, text=True), [])

    job = run(2)
    wait_for_checkpoint(job, directory)
    sent = two_hosts.counters(1)["tx_bytes"]
    two_hosts.cut(1)
    _, out = job.finish(60)  # mpirun 5.0 exits with 0 then
    assert "2 workers on 2 nodes, started by mpirun; gloo over e0, met at 10.77.0.1:" in out
    assert "ranks: 0 host0 cpu, 1 host1 cpu; parameter servers: server 0 of 1 (rank 2) on host0" in out
    assert "lost communication with a remote daemon" in out
    push = lines(directory)[0]["wire_bytes"] / 4 / 2  # of an update, about: half of it comes down
    assert sent > (8 - 3 - 1) * push, "worker 1's gradients have left by its link; it may be 3 updates behind"
    two_hosts.mend(1)

    code, out = run(1).finish()
    assert code == 0, out[-4000:]
    assert "saved by 2 workers, now 1" in out
    train = [line for line in lines(directory) if line["kind"] == "train"]
    assert [line["update"] for line in train] == list(range(4, 41, 4))
    assert train[-1]["loss"] < 0.9 * train[0]["loss"]
