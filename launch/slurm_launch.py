"""`tenko launch slurm`: checks what can be checked, writes the scripts into the run directory, submits them.

RUN/config.yaml             the recipe as the job will run it; later changes of the recipe's file don't reach it
RUN/slurm/train.sbatch      the script as submitted
RUN/slurm/evaluate.sbatch   of what follows it, if anything does
RUN/slurm/jobs.json         ids and logs of the jobs, for `tenko launch status`
RUN/slurm/history           what the script noted of its beginnings and ends
"""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from tenko.nmt.text_io import source_files

from . import recipe as recipes
from .errors import BAD_INPUT, RunFailed
from .files import read_json, write_json_atomic, write_text_atomic
from .models import pretrained_folder
from .mpi_env import check_servers
from .recipe import Recipe
from .rundir import LOGS, RunDirectory, RunLock, check_place
from .slurm_query import ENDED, JobState, ask, check, job_state, submit
from .slurm_script import EVALUATE, TRAIN, Request, evaluate_script, log_pattern, train_script
from .stage_kinds import PretrainedConfig, check_text

FOLDER, JOBS, HISTORY = "slurm", "jobs.json", "history"
POLL_SECONDS = (0.5, 10.0)
"""Between two looks of --wait: at first, and at last."""


@dataclass(frozen=True, kw_only=True)
class Submitted:
    """One job of a run, as jobs.json keeps it."""

    job: str
    """Its id; of an array's task `12_3`."""
    kind: str
    """`train`, or what follows it: `evaluate`, `export`, or both joined by +."""
    script: str
    """What was submitted."""
    log: str
    """Where its output goes."""
    time: float
    """When it was submitted, seconds since the epoch."""


def launch(
    recipe_path: str,
    overrides: Sequence[str],
    request: Request,
    *,
    run_dir: Path | None,
    workers: int | None,
    cpus: int | None,
    dry_run: bool,
    wait: bool,
) -> None:
    """Submit a run, or print its scripts.

    Args:
        recipe_path, overrides: as of `tenko run`.
        request: what the job shall have; name, run directory, workers and cores are filled in here.
        run_dir: as given; None: runs/NAME.
        workers: a node's, as given; None: one a GPU, else the recipe's.
        cpus: a worker's, as given; None: the recipe's threads.
        dry_run: print and submit nothing; what needs no cluster is checked, which need not be there.
        wait: return when all jobs have ended.

    Raises:
        ValueError, OSError: the user's errors, in one line; nothing was submitted.
        RunFailed: with `wait`: a job failed.
    """
    recipes.refuse_repeats(overrides)
    asked = recipes.load(recipe_path, list(overrides)).workers
    count = workers or request.gpus or asked
    settled = {
        "workers": count != asked and f"{count} a node by the options",
        "seed": request.seeds and "--seeds is given",
    }
    for override in overrides:
        key = override.partition("=")[0]
        if settled.get(key):
            raise ValueError(f"override {override}: contradicts the command's options: {settled[key]}")
    given = [*overrides, f"workers={count}"]
    recipe = recipes.load(recipe_path, given)
    check_servers(recipe.comm, None)
    request = replace(
        request,
        name=recipe.name,
        run_dir=run_dir or Path("runs") / recipe.name,
        workers=count,
        cpus=cpus or max(1, recipe.threads),
    )
    scripts = {TRAIN: train_script(request)}
    if request.then:
        scripts[EVALUATE] = evaluate_script(request)
    seeds = request.seeds or (recipe.seed,)
    runs = [
        (directory, recipes.load(recipe_path, [*given, f"seed={seed}"]))
        for directory, seed in zip(request.run_dirs, seeds, strict=True)
    ]
    _check_files(recipe)
    for directory, one in runs:
        _check_run(directory, one)
    if dry_run:
        _print_scripts(scripts)
        return
    check(request)
    with ExitStack() as stack:
        for directory, _ in runs:
            _check_free(directory)
            stack.enter_context(RunLock(directory))
        for directory, one in runs:
            _prepare(directory, one, scripts)
        jobs = _submit(request, scripts)
    for directory, _ in runs:
        _tell(directory, jobs[directory])
    if request.seeds:
        print(f"{len(runs)} runs; tenko launch status {request.run_dir} shows all")
    if wait:
        _wait([job for directory, _ in runs for job in jobs[directory]])


def _print_scripts(scripts: dict[str, str]) -> None:
    for name, script in scripts.items():
        if len(scripts) > 1:
            print(f"# ---- {name}")
        print(script, end="")
    sys.stdout.flush()


def _check_files(recipe: Recipe) -> None:
    """Raises: ValueError: the model to begin with, or a file of the corpus, is not there, as the job would find after
    it has waited for its turn."""
    data, first = recipe.data, recipe.stages[0].config
    if isinstance(first, PretrainedConfig):
        pretrained_folder(first, recipe.direction)
    for key, source in (("train", data.train), ("valid", data.valid), ("test", data.test)):
        if source is not None:
            source_files(source, f"data.{key}")
    for spec in recipe.stages:
        try:
            check_text(spec.config)
        except ValueError as error:
            raise ValueError(f"{spec.name}.{error}") from None
    if data.subwords is not None and not Path(data.subwords).expanduser().is_file():
        raise ValueError(f"data.subwords: no such file: {data.subwords}")


def _check_run(directory: Path, recipe: Recipe) -> None:
    """Raises: ValueError: the directory is another run's, or damaged."""
    check_place(directory)
    if RunDirectory.hold(directory, recipe) is not None:
        RunDirectory(directory, recipe).first_unfinished()


def _check_free(directory: Path) -> None:
    """Raises: ValueError: a job of this run waits or runs; names it."""
    for job in read_jobs(directory):
        state = job_state(job.job)
        if state is not None and state.state not in ENDED:
            raise ValueError(
                f"{directory}: job {job.job} of this run is {state.state}; wait for it, end it with scancel {job.job}, "
                "or choose another --run-dir"
            )


def _prepare(directory: Path, recipe: Recipe, scripts: dict[str, str]) -> None:
    RunDirectory.create(directory, recipe)
    (directory / LOGS).mkdir(exist_ok=True)  # SLURM doesn't make it, and writes no log without it
    (directory / FOLDER).mkdir(exist_ok=True)
    for name, script in scripts.items():
        write_text_atomic(directory / FOLDER / name, script)


def _submit(request: Request, scripts: dict[str, str]) -> dict[Path, list[Submitted]]:
    """Submit training and what follows it; the jobs of each run directory, which are also written there."""
    folder = request.run_dirs[0] / FOLDER
    ids = {"train": submit(folder / TRAIN)}
    if EVALUATE in scripts:
        after = "aftercorr" if request.seeds else "afterok"
        kind = "+".join(request.then)
        try:
            ids[kind] = submit(folder / EVALUATE, f"--dependency={after}:{ids['train']}", "--kill-on-invalid-dep=yes")
        except ValueError:
            ask("scancel", ids["train"])
            raise
    jobs: dict[Path, list[Submitted]] = {}
    for index, directory in enumerate(request.run_dirs):
        seed = str(request.seeds[index]) if request.seeds else ""
        jobs[directory] = [
            Submitted(
                job=f"{job}_{seed}" if seed else job,
                kind=kind,
                script=str(directory / FOLDER / (TRAIN if kind == "train" else EVALUATE)),
                log=log_pattern(request).replace("%a", seed).replace("%A", job).replace("%j", job).replace("%%", "%"),
                time=time.time(),
            )
            for kind, job in ids.items()
        ]
        before = [asdict(job) for job in read_jobs(directory)]
        write_json_atomic(directory / FOLDER / JOBS, [*before, *map(asdict, jobs[directory])])
    return jobs


def read_jobs(directory: Path) -> list[Submitted]:
    """The jobs of a run, in the order of their submission; empty when there were none.

    Raises:
        ValueError: jobs.json is damaged.
    """
    path = directory / FOLDER / JOBS
    if not path.is_file():
        return []
    try:
        return [Submitted(**job) for job in read_json(path)]
    except TypeError:
        raise ValueError(f"{path}: damaged; delete it to go on") from None


def _tell(directory: Path, jobs: list[Submitted]) -> None:
    """What was submitted and what to type next."""
    run = shlex.quote(str(directory))
    for job in jobs:
        print(f"job {job.job}: {job.kind} of {run}, {job.script}")
    print(f"  tenko launch status {run}    tenko watch {run}    tail -F {shlex.quote(jobs[0].log)}", flush=True)


def _wait(jobs: Sequence[Submitted]) -> None:
    """Until every job has ended; says whenever a state changes.

    Raises:
        RunFailed: one did not end well.
    """
    seen: dict[str, JobState | None] = {}
    began = time.monotonic()
    while True:
        for job in jobs:
            before, now = seen.get(job.job), job_state(job.job)
            if now is None:  # forgotten: it has ended, and was last seen as `before`
                now = before
            if now is not None and (before is None or now.state != before.state):
                print(f"job {job.job} ({job.kind}): {describe(now)}", flush=True)
            seen[job.job] = now
        if all(state is None or state.state in ENDED for state in seen.values()):
            break
        time.sleep(min(max(POLL_SECONDS[0], (time.monotonic() - began) / 50), POLL_SECONDS[1]))
    bad = [job for job in jobs if (state := seen[job.job]) is None or state.state != "COMPLETED"]
    if bad:
        raise RunFailed(f"job {bad[0].job} ({bad[0].kind}) did not end well; see {bad[0].log}", BAD_INPUT)


def describe(state: JobState) -> str:
    """A job's state in a few words: `RUNNING on n[0-1], restarted 2 times`."""
    parts = [state.state]
    if state.nodes:
        parts.append(f"on {state.nodes}")
    if state.reason:
        parts.append(f"({state.reason})")
    if state.restarts:
        parts.append(f"restarted {state.restarts} time{'s' if state.restarts > 1 else ''}")
    if state.state in ENDED and state.exit_code not in ("", "0:0"):
        parts.append(f"exit {state.exit_code}")
    return " ".join(parts)
