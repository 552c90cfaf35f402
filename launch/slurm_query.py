"""What SLURM says of its partitions and jobs, by its own programs; each answer is read once, in one place."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .slurm_script import Request, seconds

ENDED = {
    "BOOT_FAIL",
    "CANCELLED",
    "COMPLETED",
    "DEADLINE",
    "FAILED",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "PREEMPTED",
    "TIMEOUT",
}
"""States from which a job does not go on."""


@dataclass(frozen=True, kw_only=True)
class Partition:
    """A partition."""

    name: str
    default: bool
    """Whether jobs that name none go here."""
    up: bool
    """Whether it takes jobs."""
    limit: float
    """Longest time of a job, seconds."""
    nodes: int
    """Nodes it has, those that are down included."""
    cpus: int
    """Cores of its largest node."""
    gpus: int
    """GPUs of the node that has most."""


@dataclass(frozen=True, kw_only=True)
class JobState:
    """What SLURM knows of a job."""

    state: str
    """PENDING, RUNNING, COMPLETED ..."""
    reason: str = ""
    """Why it waits or has failed; empty where SLURM gives none."""
    nodes: str = ""
    """Its nodes, as SLURM writes lists of them."""
    restarts: int = 0
    """How often it has been put into the queue again."""
    exit_code: str = ""
    """Of its script, as CODE:SIGNAL."""
    log: str = ""
    """Its log."""


def ask(*command: str) -> str:
    """stdout of one of SLURM's programs.

    Raises:
        ValueError: it is not installed, or refuses; one line.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    except FileNotFoundError:
        raise ValueError(
            f"{command[0]}: not found: SLURM is not installed here; go to a machine from which jobs are submitted, or "
            "take --dry-run for the script"
        ) from None
    except subprocess.TimeoutExpired:
        raise ValueError(f"{command[0]}: no answer from slurmctld for 120 s") from None
    if done.returncode:
        raise ValueError(f"{command[0]}: {said(done.stderr)}")
    return done.stdout


def said(stderr: str) -> str:
    """What a program of SLURM complains of, in one line without its name."""
    lines = [re.sub(r"^\w+: (error|fatal): ", "", line) for line in stderr.splitlines() if line.strip()]
    return "; ".join(lines)[:500] or "failed and does not say why"


def partitions() -> list[Partition]:
    """The cluster's partitions, from sinfo; a row of its answer is a group of nodes alike.

    Raises:
        ValueError: as `ask`.
    """
    found: dict[str, Partition] = {}
    for line in ask("sinfo", "--noheader", "--format=%P|%a|%l|%D|%c|%G").splitlines():
        name, up, limit, nodes, cpus, gres = line.strip().split("|")
        plain = name.removesuffix("*")
        before = found.get(plain)
        found[plain] = Partition(
            name=plain,
            default=name != plain,
            up=up == "up",
            limit=seconds(limit) if limit.lower() != "n/a" else float("inf"),
            nodes=int(nodes) + (before.nodes if before else 0),
            cpus=max(int(cpus.rstrip("+")), before.cpus if before else 0),
            gpus=max(gpus_of(gres), before.gpus if before else 0),
        )
    return list(found.values())


def gpus_of(gres: str) -> int:
    """GPUs in a node's generic resources: `gpu:a100:4(S:0-1),nic:1` has 4."""
    outside = re.sub(r"\([^)]*\)", "", gres)
    return sum(int(match[1]) for match in re.finditer(r"(?:^|,)gpu(?::[^:,]+)?:(\d+)", outside))


def check(request: Request) -> None:
    """Hold what is asked for to what the cluster has.

    Raises:
        ValueError: it can never run; names what there is.
    """
    known = partitions()
    if request.partition is None:
        found = next((one for one in known if one.default), None)
        if found is None:
            raise ValueError(f"--partition: this cluster has no default; valid: {_names(known)}")
    else:
        found = next((one for one in known if one.name == request.partition), None)
        if found is None:
            raise ValueError(f"--partition: {request.partition}: no such partition; valid: {_names(known)}")
    where = f"partition {found.name}"
    if not found.up:
        raise ValueError(f"--partition: {found.name}: takes no jobs now; valid: {_names(known)}")
    if request.nodes > found.nodes:
        raise ValueError(f"--nodes: {request.nodes}: {where} has {found.nodes}")
    if request.gpus > found.gpus:
        raise ValueError(f"--gpus-per-node: {request.gpus}: nodes of {where} have {found.gpus or 'none'}")
    cpus = request.cpus * request.workers
    if cpus > found.cpus:
        raise ValueError(
            f"--workers-per-node: {request.workers} of {request.cpus} cores each: nodes of {where} have {found.cpus}"
        )
    if seconds(request.time) > found.limit:
        raise ValueError(f"--time: {request.time}: {where} allows {found.limit / 3600:g} h")


def _names(known: Sequence[Partition]) -> str:
    return ", ".join(one.name for one in known) or "none"


def submit(script: Path, *options: str) -> str:
    """Submit a script; the job's id.

    Raises:
        ValueError: as `ask`.
    """
    return ask("sbatch", "--parsable", *options, str(script)).strip().partition(";")[0]


def job_state(job: str) -> JobState | None:
    """What SLURM knows of a job, or task of an array (`12_3`); None when it has forgotten it, or is not installed."""
    try:
        shown = ask("scontrol", "show", "job", "--oneliner", job)
    except ValueError:
        return _accounted(job)
    # An array whose tasks have not begun yet is one line for all of them.
    fields = dict(re.findall(r"(\w[\w/:]*)=(\S*)", shown.splitlines()[0] if shown else ""))
    if "JobState" not in fields:
        return None
    return JobState(
        state=fields["JobState"],
        reason=_said(fields.get("Reason", "")).replace("_", " "),
        nodes=_said(fields.get("NodeList", "")),
        restarts=int(fields.get("Restarts", "0")),
        exit_code=fields.get("ExitCode", ""),
        log=fields.get("StdOut", ""),
    )


def _accounted(job: str) -> JobState | None:
    """From the accounting database, where there is one."""
    try:
        shown = ask(
            "sacct", "--noheader", "--parsable2", "--allocations", "--format=State,NodeList,ExitCode", "-j", job
        )
        state, nodes, code = shown.splitlines()[0].split("|")
    except (ValueError, IndexError):
        return None
    return JobState(state=state.split()[0], nodes=nodes, exit_code=code)


def _said(value: str) -> str:
    return "" if value in ("None", "(null)", "N/A") else value
