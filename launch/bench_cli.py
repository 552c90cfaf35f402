"""The command line of `tenko bench`; what it does is in `bench_scaling.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Measure what trains faster, and by how much.")


@app.callback()
def _bench_options() -> None:
    """Keeps `bench` a group while it has one command."""


@app.command(short_help="Scaling Neural Machine Translation, row by row.")
def scaling(
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Settings of all rows, over the recipe's.", show_default=False),
    ] = None,
    full: Annotated[
        bool, typer.Option("--full/--small", help="The paper's sizes on GPUs, or small ones on CPUs.")
    ] = False,
    row: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME", help="Run only this row, for instance 16-bit; may be repeated.", show_default="all"
        ),
    ] = None,
    ranks: Annotated[
        tuple[int, int] | None,
        typer.Option(min=1, help="Compare tokens/s of two numbers of workers instead.", show_default=False),
    ] = None,
    rounds: Annotated[
        int | None, typer.Option(min=1, help="With --ranks: turns, of which medians are taken.", show_default="3")
    ] = None,
    updates: Annotated[
        int | None,
        typer.Option(min=2, help="Updates of the first row.", show_default="the recipe's; small 320, ranks 40"),
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="With --full: GPUs of a machine.", show_default="all that are here")
    ] = None,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder of the runs and the table.")] = Path("runs/scaling"),
) -> None:
    """The ablation of Ott et al. 2018, row by row: fp32, 16-bit, accumulation, learning rate, batches, nodes, overlap.

    Each row is a `tenko run scaling` in a folder of its own; the same command goes on where it was cut, and finished
    rows are not done again.

    \b
    tenko bench scaling
    tenko bench scaling --full data.train=corpus.tsv.xz --out runs/ott
    tenko bench scaling --ranks 1 2
    """
    from . import bench_scaling as bench

    bench.check_options(out, ranks, row=row, full=full, workers=workers, rounds=rounds)
    if ranks is not None:
        bench.bench_ranks(overrides or [], ranks=ranks, rounds=rounds or 3, updates=updates, out=out)
    else:
        bench.bench(overrides or [], full=full, rows=row or [], updates=updates, workers=workers, out=out)
