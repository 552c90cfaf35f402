"""The command line of `tenko launch`; what it does is in `slurm_launch.py` and `slurm_status.py`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Start a run as a job of SLURM, and look after it.", no_args_is_help=True, rich_markup_mode=None)


class Task(StrEnum):
    """What a task of SLURM is."""

    node = "node"
    worker = "worker"


@app.command(short_help="Submit a run.")
def slurm(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="YAML file, or a bundled recipe, as of `tenko run`.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Settings over the recipe's.", show_default=False),
    ] = None,
    nodes: Annotated[int, typer.Option(help="Nodes.")] = 1,
    workers: Annotated[
        int | None,
        typer.Option("--workers-per-node", min=1, help="Workers a node.", show_default="one a GPU, else the recipe's"),
    ] = None,
    gpus: Annotated[int, typer.Option("--gpus-per-node", min=0, help="GPUs a node.")] = 0,
    cpus: Annotated[
        int | None,
        typer.Option("--cpus-per-worker", min=1, help="Cores a worker.", show_default="the recipe's threads"),
    ] = None,
    time: Annotated[
        str, typer.Option(help="Time limit: minutes, H:M:S or D-H:M. The job goes on after it.")
    ] = "1:00:00",
    partition: Annotated[str | None, typer.Option(help="Partition.", show_default="the cluster's default")] = None,
    account: Annotated[str | None, typer.Option(help="Account.", show_default="yours")] = None,
    per_task: Annotated[
        Task,
        typer.Option(help="One task of SLURM a node, which starts workers by torchrun, or one a worker."),
    ] = Task.node,
    seeds: Annotated[
        str | None,
        typer.Option(metavar="1,2,3", help="An array: a run for each seed, in DIR-seed1 ...", show_default=False),
    ] = None,
    then: Annotated[
        str | None,
        typer.Option(metavar="evaluate,export", help="What a second job does when the first ended well."),
    ] = None,
    test: Annotated[
        Path | None, typer.Option(metavar="FILE.tsv", help="Test set for --then evaluate.", show_default=False)
    ] = None,
    run_dir: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Run directory, on a disk that the nodes share.")
    ] = None,
    notice: Annotated[int, typer.Option(min=1, help="Seconds ahead of the time limit at which to save.")] = 120,
    max_restarts: Annotated[
        int, typer.Option(min=0, help="How often lost workers are started anew within the job, with --per-task node.")
    ] = 3,
    max_requeues: Annotated[
        int, typer.Option(min=0, help="How often a job that failed (exit 2 excepted) is put into the queue again.")
    ] = 3,
    interface: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Network interface between nodes.", show_default="that to the first node"),
    ] = None,
    options: Annotated[
        list[str] | None,
        typer.Option("--sbatch", metavar="OPTION", help="Another option of sbatch: --sbatch=--qos=low. Repeatable."),
    ] = None,
    template: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Your own template in place of slurm/train.sbatch.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the script, submit nothing.")] = False,
    wait: Annotated[bool, typer.Option("--wait", help="Return when all jobs have ended.")] = False,
) -> None:
    """Submit a run to SLURM: a script for sbatch is written into the run directory and submitted.

    Ahead of the time limit and of a preemption the run saves and goes into the queue again, and goes on from there.

    \b
    tenko launch slurm scratch --nodes 2 --gpus-per-node 4 --time 8:00:00 --dry-run
    tenko launch slurm scratch train.lr=1e-3 --nodes 2 --workers-per-node 8 --run-dir /shared/me/scratch
    tenko launch slurm scratch --seeds 1,2,3 --then evaluate,export --test my-test.tsv
    """
    from .slurm_launch import launch
    from .slurm_script import Request

    request = Request(
        name="",
        run_dir=run_dir or Path(),
        nodes=nodes,
        gpus=gpus,
        time=time,
        partition=partition,
        account=account,
        per_task=per_task.value,
        seeds=_seeds(seeds),
        then=tuple(then.split(",")) if then else (),
        test=test,
        notice=notice,
        max_restarts=max_restarts,
        max_requeues=max_requeues,
        interface=interface,
        options=tuple(options or ()),
        template=template,
    )
    launch(recipe, overrides or [], request, run_dir=run_dir, workers=workers, cpus=cpus, dry_run=dry_run, wait=wait)


@app.command(short_help="Jobs of a run, and how far it is.")
def status(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN", help="Run directory, or what those of seeds begin with.")],
) -> None:
    """Jobs of a run: state, nodes, restarts, log; and how far the run is. Also when SLURM has forgotten them.

    \b
    tenko launch status runs/scratch
    """
    from .slurm_status import status as show

    show(run_dir)


def _seeds(text: str | None) -> tuple[int, ...]:
    """`1,2,3`."""
    if text is None:
        return ()
    try:
        seeds = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"--seeds: must be whole numbers with commas, for instance 1,2,3, is {text!r}") from None
    if len(set(seeds)) < len(seeds) or min(seeds) < 0:
        raise ValueError(f"--seeds: must differ and be at least 0, is {text!r}")
    return seeds
