"""The job scripts: what was asked for, filled into the templates of the folder slurm/.

A template is a script for sbatch in which `@name@` stands for what is filled in; `VALUES` says what there is.
"""

from __future__ import annotations

import re
import shlex
import sys
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Literal

from .files import read_text

TRAIN, EVALUATE = "train.sbatch", "evaluate.sbatch"
THEN = ("evaluate", "export")
VALUES = {
    "directives": "the #SBATCH lines of nodes, time, partition ...",
    "python": "the Python that tenko is installed in",
    "run": "the run directory",
    "notice": "seconds ahead of the time limit that the notice comes",
    "max_requeues": "how often a failed job is started again",
    "interface": "the network interface between nodes, or nothing",
    "command": "the srun line",
    "test": "the test set",
    "then": "what follows the training",
}
"""Names a template may have between @ signs."""
_PLACE = re.compile(r"@([a-z_]+)@")
_TIME = re.compile(r"(?:(\d+)-)?(\d+)(?::(\d\d?))?(?::(\d\d?))?")


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a job shall have."""

    name: str
    """Of the recipe; the job's is tenko-NAME."""
    run_dir: Path
    """Run directory; with seeds what those of the seeds begin with. Nodes must share it."""
    nodes: int = 1
    """Nodes."""
    workers: int = 1
    """Workers a node."""
    gpus: int = 0
    """GPUs a node."""
    cpus: int = 1
    """Cores a worker."""
    time: str = "1:00:00"
    """Time limit as SLURM writes it."""
    partition: str | None = None
    """None: the cluster's default."""
    account: str | None = None
    """None: the user's default."""
    per_task: Literal["node", "worker"] = "node"
    """What a task of SLURM is."""
    seeds: tuple[int, ...] = ()
    """An array with a training for each; empty: one training, with the recipe's seed."""
    then: tuple[str, ...] = ()
    """What follows: of THEN."""
    test: Path | None = None
    """Test set for `evaluate`."""
    notice: int = 120
    """Seconds ahead of the time limit that the notice comes."""
    max_restarts: int = 3
    """How often `tenko run` starts lost workers anew within the job."""
    max_requeues: int = 3
    """How often a job that failed, not by the user's error, is put into the queue again."""
    interface: str | None = None
    """The network interface between nodes; None: the one that leads to the first."""
    options: tuple[str, ...] = ()
    """More options of sbatch, for instance --qos=low."""
    template: Path | None = None
    """The user's own in place of slurm/train.sbatch."""

    def __post_init__(self) -> None:
        for name, value in (("--nodes", self.nodes), ("--workers-per-node", self.workers)):
            if value < 1:
                raise ValueError(f"{name}: must be at least 1, is {value}")
        seconds(self.time)
        unknown = [what for what in self.then if what not in THEN]
        if unknown:
            raise ValueError(f"--then: {unknown[0]}: unknown; valid: {', '.join(THEN)}")
        if "evaluate" in self.then and self.test is None:
            raise ValueError("--then: evaluate needs --test FILE.tsv")
        if self.test is not None and not self.test.is_file():
            raise ValueError(f"--test: {self.test}: no such file")
        if self.test is not None and "evaluate" not in self.then:
            raise ValueError(f"--test: {self.test}: is for --then evaluate, which is not asked for")
        if self.notice >= seconds(self.time):
            raise ValueError(f"--notice: must be below the time limit, {self.time}, is {self.notice} s")
        if "\n" in str(self.run_dir) or '"' in str(self.run_dir):
            raise ValueError(f"--run-dir: {self.run_dir}: SLURM takes no line break and no quotation mark in it")
        for option in self.options:
            if not option.startswith("-"):
                raise ValueError(f"--sbatch: {option}: must be an option of sbatch, for instance --sbatch=--qos=low")

    @property
    def run_dirs(self) -> tuple[Path, ...]:
        """The run directory, or that of each seed."""
        if not self.seeds:
            return (self.run_dir,)
        return tuple(self.run_dir.with_name(f"{self.run_dir.name}-seed{seed}") for seed in self.seeds)


def seconds(time: str) -> float:
    """Seconds of a time limit as SLURM takes it: MINUTES, M:S, H:M:S, D-H, D-H:M or D-H:M:S; infinite for UNLIMITED.

    Raises:
        ValueError: it is none; says how to write one.
    """
    if time.upper() in ("UNLIMITED", "INFINITE"):
        return float("inf")
    match = _TIME.fullmatch(time)
    if match is None:
        raise ValueError(f"--time: must be minutes, hours:minutes:seconds or days-hours[:minutes], is {time!r}")
    days, *rest = match.groups()
    numbers = [int(part) for part in rest if part is not None]
    if max(numbers[1:], default=0) >= 60:  # SLURM takes 99:99 for 1:41:00
        raise ValueError(f"--time: minutes and seconds behind a colon must be below 60, is {time!r}")
    units = [3600, 60, 1] if days or len(numbers) == 3 else [60, 1]
    total = sum(number * unit for number, unit in zip(numbers, units, strict=False)) + int(days or 0) * 86400
    if total == 0:
        raise ValueError("--time: must be more than 0")
    return total


def train_script(request: Request) -> str:
    """The script of the training.

    Raises:
        ValueError: the user's template names an unknown value, or is no script to sbatch.
        OSError: it cannot be read.
    """
    tasks, cpus = (1, request.cpus * request.workers) if request.per_task == "node" else (request.workers, request.cpus)
    lines = [
        *_common(request, request.name),
        f"--nodes={request.nodes}",
        f"--ntasks-per-node={tasks}",
        f"--cpus-per-task={cpus}",
        *([f"--gpus-per-node={request.gpus}"] if request.gpus else []),
        *request.options,
    ]
    script = _fill(_template(TRAIN, request.template), request, lines, command=_command(request))
    if not script.startswith("#!"):
        what = "is empty" if not script.strip() else f"begins with {script.splitlines()[0][:40]!r}"
        raise ValueError(f"--template: {request.template}: must begin with #! and a program, as #!/bin/bash, {what}")
    return script


def evaluate_script(request: Request) -> str:
    """The script of what follows the training, one task on one node."""
    lines = [*_common(request, f"{request.name}-then"), "--ntasks=1", f"--cpus-per-task={request.cpus}"]
    return _fill(_template(EVALUATE, None), request, [*lines, *request.options])


def log_pattern(request: Request) -> str:
    """Where SLURM writes what a job prints, in its own words: %j is the job's id, %a the seed."""
    path = str(request.run_dir.absolute()).replace("%", "%%")
    return f"{path}-seed%a/logs/slurm-%A.out" if request.seeds else f"{path}/logs/slurm-%j.out"


def _common(request: Request, name: str) -> list[str]:
    return [
        f"--job-name=tenko-{name}",
        f"--time={request.time}",
        *([f"--partition={request.partition}"] if request.partition else []),
        *([f"--account={request.account}"] if request.account else []),
        *([f"--array={','.join(map(str, request.seeds))}"] if request.seeds else []),
        f'--chdir="{Path.cwd()}"',
        f'--output="{log_pattern(request)}"',
    ]


def _command(request: Request) -> str:
    if request.per_task == "worker":
        return (
            "# One task a worker: SLURM starts them all.\n"
            'srun --wait=30 "$PYTHON" -m tenko.launch.worker --run-dir "$RUN"'
        )
    many = (
        '--nodes "$SLURM_NNODES" --rendezvous "$("$PYTHON" -m tenko.launch.slurm_env)" '
        '${INTERFACE:+--interface "$INTERFACE"} '
    )
    return (
        "# One task a node: tenko (torchrun's agent) starts the workers of its node, and anew when one is lost.\n"
        'srun --wait=30 "$PYTHON" -m tenko.launch.cli run "$RUN/config.yaml" --run-dir "$RUN" \\\n'
        f"    {many if request.nodes > 1 else ''}--max-restarts {request.max_restarts}"
    )


def _template(name: str, own: Path | None) -> str:
    if own is not None:
        return read_text(own)
    return resources.files("tenko.slurm").joinpath(name).read_text(encoding="utf-8")


def _fill(template: str, request: Request, options: list[str], command: str = "") -> str:
    run = shlex.quote(str(request.run_dir.absolute()))
    values = {
        "directives": "\n".join(f"#SBATCH {option}" for option in options),
        "python": shlex.quote(sys.executable),
        "run": f'{run}-seed"$SLURM_ARRAY_TASK_ID"' if request.seeds else run,
        "notice": str(request.notice),
        "max_requeues": str(request.max_requeues),
        "interface": shlex.quote(request.interface) if request.interface else "",
        "command": command,
        "test": shlex.quote(str(request.test.absolute())) if request.test else "",
        "then": shlex.quote(" ".join(request.then)),
    }
    assert values.keys() == VALUES.keys()

    def value(match: re.Match[str]) -> str:
        if match[1] not in values:
            raise ValueError(f"--template: @{match[1]}@: unknown; valid: {', '.join(f'@{name}@' for name in VALUES)}")
        return values[match[1]]

    return _PLACE.sub(value, template)
