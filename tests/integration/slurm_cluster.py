"""A real SLURM cluster on this machine, for tests and for trying things out: its own munged, slurmctld and slurmds.

    python tests/integration/slurm_cluster.py            # a shell in which sbatch, srun and squeue speak to 3 nodes

Programs use `with Cluster() as cluster`. Nodes are slurmds on loopback, on ports of their own, or with `--hosts` on
hosts of a network lab (benchmarks/lab.py), with names and interfaces of their own. They share the machine's cores;
each claims two cores and two GPUs that do not exist. Of two partitions, `train` and `high`, the second preempts.
Everything is below one folder and ends with the block. Needs Linux, root, and Debian's slurmctld, slurmd, slurm-client
and munge.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from lab import Lab
from lab import missing as no_lab

__all__ = ["Cluster", "Lab", "missing", "no_lab"]

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "sinfo")
SBIN = "/usr/sbin:/usr/local/sbin"

CONF = """\
ClusterName=tenko{pid}
SlurmctldHost={host}({address})
SlurmctldPort={port}
SlurmUser=root
AuthType=auth/munge
# cred_expire is also how long a requeued job waits before it may start: 120 s by default.
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
# PMIx makes folders there of the same names on each node.
TmpFS={folder}/tmp-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
GresTypes=gpu
ReturnToService=2
SlurmdTimeout=60
SlurmctldTimeout=10
MessageTimeout=10
MinJobAge=300
KillWait=10
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SchedulerParameters=bf_interval=1,sched_interval=1
NodeName=DEFAULT CPUs=2 CoresPerSocket=2 RealMemory=4000 Gres=gpu:2 State=UNKNOWN
{nodes}
PartitionName=DEFAULT Nodes=ALL State=UP
PartitionName=train Default=YES PriorityTier=1 GraceTime=60 MaxTime=1-0
PartitionName=high PriorityTier=10 PreemptMode=OFF
"""
CGROUP = "CgroupPlugin=cgroup/v1\nCgroupAutomount=no\n"


def missing() -> str | None:
    """What keeps a cluster from working here, in one line; None where it works."""
    if not sys.platform.startswith("linux") or os.geteuid() != 0:
        return "a SLURM cluster needs Linux and root"
    absent = [name for name in PROGRAMS if shutil.which(name, path=f"{os.environ['PATH']}:{SBIN}") is None]
    if absent:
        return f"no {', '.join(absent)} (Debian: apt-get install slurmctld slurmd slurm-client munge)"
    return None


class Cluster:
    """Nodes n0, n1, ... with slurmctld, for a `with` block.

    Args:
        nodes: how many.
        hosts: a network lab of so many hosts and one more, for slurmctld and commands; None puts all on loopback.

    Raises:
        RuntimeError: it is not up in time; says what its logs end with.
    """

    def __init__(self, nodes: int = 3, hosts: Lab | None = None) -> None:
        self.nodes, self.hosts = nodes, hosts
        self.folder = Path()
        self._stack = ExitStack()

    def __enter__(self) -> Cluster:
        with ExitStack() as stack:
            self.folder = Path(tempfile.mkdtemp(prefix="tenko-slurm-"))
            stack.callback(shutil.rmtree, self.folder, ignore_errors=True)
            self.folder.chmod(0o755)
            stack.callback(self._end_all)
            self._start()
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    @property
    def environment(self) -> dict[str, str]:
        """Variables under which SLURM's commands speak to this cluster."""
        others = ("SLURM", "SBATCH", "GLOO_", "MASTER_")  # an interface or address of this process is none of a node's
        kept = {key: value for key, value in os.environ.items() if not key.startswith(others)}
        return {**kept, "SLURM_CONF": str(self.folder / "slurm.conf"), "PATH": f"{os.environ['PATH']}:{SBIN}"}

    def call(self, *command: str | Path, check: bool = True, timeout: float = 60) -> str:
        """stdout of a command; with `check` a failure raises RuntimeError with its stderr."""
        words = [*self.prefix(self.nodes), *map(str, command)]
        done = subprocess.run(words, env=self.environment, capture_output=True, text=True, timeout=timeout)
        if check and done.returncode:
            raise RuntimeError(f"{' '.join(words)}: {done.returncode}: {done.stderr.strip()[-2000:]}")
        return done.stdout

    def prefix(self, host: int) -> list[str]:
        """What puts a command on a host of the lab, under a host name of its own."""
        if self.hosts is None:
            return []
        # Not `ip netns exec`, which hides /sys/fs/cgroup from slurmd.
        name = f"n{host}" if host < self.nodes else "control"
        inside = ["nsenter", f"--net=/run/netns/{self.hosts.name(host)}", "unshare", "--uts", "sh", "-c"]
        return [*inside, f'hostname {name}; exec "$@"', "sh"]

    def job(self, job: str) -> dict[str, str]:
        """What `scontrol show job` says of a job; empty when it is forgotten."""
        words = self.call("scontrol", "show", "job", "-o", job, check=False).split()
        return {key: value for word in words for key, _, value in [word.partition("=")] if value}

    def wait(self, job: str, *states: str, timeout: float = 90) -> dict[str, str]:
        """Wait until a job is in one of these states (COMPLETED, FAILED, RUNNING, PENDING ...), and return it."""
        self.until(lambda: self.job(job).get("JobState") in states, f"job {job} in {states}", timeout)
        return self.job(job)

    def until(self, condition: Callable[[], bool], what: str, timeout: float = 90) -> None:
        """Wait for a condition; after `timeout` seconds AssertionError with the cluster's state."""
        deadline = time.monotonic() + timeout
        while not condition():
            state = self.call("scontrol", "show", "job", check=False) if time.monotonic() > deadline else ""
            assert time.monotonic() < deadline, f"waited {timeout} s for {what}\n{state}"
            time.sleep(0.1)

    def fail(self, node: int) -> None:
        """Declare a node down, as slurmctld does by itself when it hears nothing of one for SlurmdTimeout. Its slurmd
        lives, by which it comes back a moment later (ReturnToService)."""
        self.call("scontrol", "update", f"NodeName=n{node}", "State=DOWN", "Reason=test")

    def _start(self) -> None:
        ports = _free_ports(self.nodes + 1)
        names = ["control", *(f"n{i}" for i in range(self.nodes))]
        addresses = ["127.0.0.1"] * len(names)
        if self.hosts is None:
            names = [socket.gethostname()] * len(names)
        else:
            addresses = [self.hosts.address(i) for i in (self.nodes, *range(self.nodes))]
        lines = [
            f"NodeName=n{i} NodeHostname={names[i + 1]} NodeAddr={addresses[i + 1]} Port={ports[i + 1]}"
            for i in range(self.nodes)
        ]
        conf = CONF.format(
            pid=os.getpid(),
            host=names[0],
            address=addresses[0],
            port=ports[0],
            folder=self.folder,
            nodes="\n".join(lines),
        )
        (self.folder / "slurm.conf").write_text(conf)
        (self.folder / "cgroup.conf").write_text(CGROUP)
        (self.folder / "gres.conf").write_text(f"Name=gpu File={self.folder}/gpu[0-1]\n")
        for index in range(2):
            (self.folder / f"gpu{index}").touch()
        (self.folder / "state").mkdir()
        for node in range(self.nodes):
            (self.folder / f"tmp-n{node}").mkdir()
        key = self.folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(1024))
        self.call(
            "munged",
            "--force",  # the folder above is /tmp, which others may write
            f"--key-file={key}",
            f"--socket={self.folder / 'munge.socket'}",
            f"--pid-file={self.folder / 'munged.pid'}",
            f"--log-file={self.folder / 'munged.log'}",
            f"--seed-file={self.folder / 'munge.seed'}",
        )
        self.call("slurmctld")
        for node in range(self.nodes):
            subprocess.run([*self.prefix(node), "slurmd", "-N", f"n{node}"], env=self.environment, check=True)
        self._wait_idle()

    def _wait_idle(self) -> None:
        deadline = time.monotonic() + 30
        while self.call("sinfo", "-h", "-p", "train", "-t", "idle", "-o", "%D", check=False).strip() != str(self.nodes):
            if time.monotonic() > deadline:
                logs = "\n".join(path.read_text()[-1000:] for path in sorted(self.folder.glob("*.log")))
                raise RuntimeError(f"the cluster is not up: {self.call('sinfo', check=False)}\n{logs}")
            time.sleep(0.05)

    def _pid(self, name: str) -> int | None:
        try:
            return int((self.folder / f"{name}.pid").read_text())
        except (OSError, ValueError):
            return None

    def _steps(self) -> list[int]:
        """This cluster's slurmstepds. They are children of init; the files they keep open tell whose they are."""
        found = []
        for process in Path("/proc").iterdir():
            with suppress(OSError):
                if process.name.isdigit() and (process / "comm").read_text().strip() == "slurmstepd":
                    files = [os.readlink(link) for link in (process / "fd").iterdir()]
                    if any(name.startswith(f"{self.folder}/") for name in files):
                        found.append(int(process.name))
        return found

    def _end_all(self) -> None:
        """The jobs first, with all that they started, then the daemons."""
        for step in self._steps():
            for process in [*_descendants(step), step]:
                with suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
        names = [*(f"n{node}" for node in range(self.nodes)), "slurmctld", "munged"]
        pids = [pid for name in names if (pid := self._pid(name)) is not None]
        for sent, seconds in ((signal.SIGTERM, 5.0), (signal.SIGKILL, 5.0)):
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, sent)
            deadline = time.monotonic() + seconds
            while any(_alive(pid) for pid in pids) and time.monotonic() < deadline:
                time.sleep(0.05)


def _stat(pid: int) -> list[str]:
    """Fields of /proc/PID/stat from the state on; empty when it is gone."""
    try:
        return (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def _alive(pid: int) -> bool:
    stat = _stat(pid)
    return bool(stat) and stat[0] not in "ZX"


def _descendants(pid: int) -> list[int]:
    children: dict[int, list[int]] = {}
    for process in [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]:
        if stat := _stat(process):
            children.setdefault(int(stat[1]), []).append(process)
    found, queue = [], [pid]
    while queue:
        below = children.get(queue.pop(), [])
        found += below
        queue += below
    return found


def _free_ports(count: int) -> list[int]:
    """Ports that are free now; all held at once, so that they differ."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def main() -> int:
    """The command line: a cluster for as long as a shell or a command runs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=3)
    parser.add_argument("--hosts", action="store_true", help="nodes on a network of their own, not on loopback")
    parser.add_argument("command", nargs="*", help="default: a shell")
    options = parser.parse_args()
    if (why := missing()) is not None:
        print(f"slurm_cluster: {why}", file=sys.stderr)
        return 2
    with ExitStack() as stack:
        hosts = stack.enter_context(Lab(options.nodes + 1)) if options.hosts else None
        cluster = stack.enter_context(Cluster(options.nodes, hosts))
        print(cluster.call("sinfo"), end="", flush=True)
        command = [*cluster.prefix(options.nodes), *(options.command or [os.environ.get("SHELL", "/bin/bash")])]
        return subprocess.run(command, env=cluster.environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
