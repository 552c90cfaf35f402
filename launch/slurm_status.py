"""`tenko launch status`: the jobs of a run as SLURM knows them, and the run as its directory shows it.

SLURM forgets a job minutes after its end unless it keeps accounts; the run directory doesn't.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from pathlib import Path

from .metrics import read_metrics
from .pulse import read_all
from .rundir import LOGS, METRICS, RunDirectory
from .slurm_launch import FOLDER, HISTORY, Submitted, describe, read_jobs
from .slurm_query import job_state
from .spawn import last_update


def status(run_dir: Path) -> None:
    """Print jobs and progress of a run, or of the runs of all seeds.

    Raises:
        ValueError: there is no such run, or SLURM never had it.
    """
    for index, directory in enumerate(_directories(run_dir)):
        if index:
            print()
        for line in lines(directory):
            print(line)


def _directories(run_dir: Path) -> list[Path]:
    if run_dir.is_dir():
        return [run_dir]

    def seed(path: Path) -> int:
        match = re.fullmatch(rf"{re.escape(run_dir.name)}-seed(\d+)", path.name)
        return int(match[1]) if match else -1

    found = sorted((path for path in run_dir.parent.glob("*") if seed(path) >= 0), key=seed)
    return found or [run_dir]


def lines(directory: Path) -> Iterator[str]:
    """What there is to say of one run."""
    run = RunDirectory.read(directory)
    jobs = read_jobs(directory)
    if not jobs:
        raise ValueError(f"{directory}: no job of SLURM; `tenko launch slurm` submits one, `tenko watch` shows any run")
    yield f"{directory}: {_progress(run)}"
    newest = {job.kind: job for job in jobs}  # those before were of earlier submissions
    for job in newest.values():
        yield f"  job {job.job} {job.kind}: {_state(job, directory)}"
        yield f"    log {job.log}{'' if Path(job.log).is_file() else ' (not there yet)'}"
    history = _history(directory)
    if history:
        yield f"  last note: {history[-1]}"


def _state(job: Submitted, directory: Path) -> str:
    state = job_state(job.job)
    if state is not None:
        return describe(state)
    notes = _history(directory) if job.kind == "train" else []
    ended = f"; its script noted: {notes[-1].partition(' ')[2]}" if notes else ""
    return f"not known to SLURM any more{ended}"


def _history(directory: Path) -> list[str]:
    try:
        return (directory / FOLDER / HISTORY).read_text(encoding="utf-8").splitlines()
    except OSError:
        return []


def _progress(run: RunDirectory) -> str:
    """Stages finished, the update reached, and when the ranks were last heard of."""
    count, first = len(run.recipe.stages), run.first_unfinished()
    if first == count:
        return f"finished, all {count} stages"
    reached = _update(run, first)
    parts = [f"stage {first + 1}/{count} {run.recipe.stages[first].name}"]
    if reached is not None:
        parts.append(f"update {reached}")
    saved = last_update(run.path)
    if saved is not None:
        parts.append(f"saved at update {saved}")
    beats = read_all(run.path / LOGS)
    if beats:
        newest = max(beat.time for beat in beats)
        parts.append(f"{len(beats)} ranks last heard of {max(0, time.time() - newest):.0f} s ago")
    return ", ".join(parts)


def _update(run: RunDirectory, index: int) -> int | None:
    """The last update that the ranks' signs of life, or the metrics, tell of."""
    beats = [beat.update for beat in read_all(run.path / LOGS) if beat.update]
    metrics = read_metrics(run.stage_directory(index) / METRICS)
    found = [*beats, *(entry["update"] for entry in metrics[-1:] if "update" in entry)]
    return max(found, default=None)
