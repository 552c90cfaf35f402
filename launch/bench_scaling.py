"""`tenko bench scaling`: the ablation of Ott et al. as runs of recipes/scaling.yaml, and tokens/s by ranks.

A row is a real `tenko run` in a folder of its own: a row that is finished is not done again, one that was cut goes on.
Each adds to the row before it; rows end when they have read as many tokens as the first, so that those with larger
batches make fewer updates.

Source: Ott et al. 2018, Scaling Neural Machine Translation, arXiv 1806.00187, table 1.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from tenko.nmt.config import TrainConfig

from .bench_report import write_ranks, write_rows
from .bench_run import Measured, Run
from .recipe import Recipe, load

FULL, SMALL = "scaling", "scaling-small"
"""Recipes of the first row."""

RANKS = (
    *("model.encoder_layers=3", "model.decoder_layers=3", "model.embed_dim=256", "model.ffn_dim=1024"),
    *("comm.route=all_reduce", "comm.bits=3", "comm.bits_down=4", "comm.overlap=true"),
    *("train.precision=auto", "train.max_tokens=2000", "train.valid_sentences=1", "train.log_interval=5"),
)
"""What numbers of workers are compared on, over SMALL: 6.5 million parameters, 2,000 tokens a worker and update."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the ablation."""

    name: str
    """As in the paper."""
    small: tuple[str, ...]
    """What it adds with --small, KEY=VALUE."""
    full: tuple[str, ...]
    """What it adds with --full."""
    nodes: int = 1
    """Machines that it needs with --full."""


ROWS = (
    Row(name="fp32", small=(), full=()),
    Row(name="+ 16-bit", small=("train.precision=bf16",), full=("train.precision=fp16",)),
    Row(name="+ accumulation", small=("train.update_freq=4",), full=("train.update_freq=16",)),
    Row(name="+ 2x lr", small=("train.lr=4e-3",), full=("train.lr=1e-3",)),
    Row(
        name="+ larger batches",
        small=("train.max_tokens=720", "train.update_freq=3"),
        full=("train.max_tokens=5120", "train.update_freq=10"),
    ),
    # As in the paper from the batches of + 2x lr: as many tokens an update, by more workers instead of accumulation.
    Row(
        name="+ nodes",
        small=("workers=2", "train.max_tokens=500", "train.update_freq=2"),
        full=("train.max_tokens=3584", "train.update_freq=1"),
        nodes=16,
    ),
    Row(name="+ overlap", small=("comm.overlap=true",), full=("comm.overlap=true",), nodes=16),
    Row(name="+ 3-bit gradients", small=("comm.route=all_reduce",), full=("comm.route=all_reduce",), nodes=16),
)
"""The paper's, and one more of ours."""


def check_options(out: Path, ranks: Sequence[int] | None, **others: object) -> None:
    """What is refused before anything runs.

    Args:
        out: folder of the runs, which may be missing.
        ranks: as given.
        others: options by name, as given; `rounds` is for `--ranks`, the others are for the rows.

    Raises:
        ValueError: an option would be of no effect, or the folder is a file.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out: {out}: is a file; give a folder")
    for name, given in others.items():
        if given and (ranks is None) == (name == "rounds"):
            raise ValueError(f"--{name}: {'goes with --ranks' if ranks is None else 'does not go with --ranks'}")


def bench(
    overrides: Sequence[str], *, full: bool, rows: Sequence[str], updates: int | None, workers: int | None, out: Path
) -> None:
    """Run the rows that are not finished, print the table, write scaling.json, scaling.md and scaling.png into `out`.

    Args:
        overrides: KEY=VALUE for all rows, over the recipe's and below the rows'.
        full: the paper's sizes on GPUs; otherwise small ones on CPUs.
        rows: names of those to run; none runs all. The table has all that are finished.
        updates: of the first row; the others read as many tokens.
        workers: with `full`, GPUs of a machine; None takes those that are here.
        out: folder of the run directories.

    Raises:
        ValueError: no such row, or a bad override.
        RunFailed: a row failed; the rows before it stay.
    """
    known = [row.name.removeprefix("+ ") for row in ROWS]
    for name in rows:
        if name not in known:
            raise ValueError(f"--row: {name}: no such row; valid: {', '.join(known)}")
    if workers is not None and not full:
        raise ValueError("--workers: goes with --full; a small row has its own")
    recipe = FULL if full else SMALL
    base = [f"workers={workers or _gpus()}"] if full else []
    base += [*overrides, *([f"train.max_update={updates}"] if updates else [])]
    first = load(recipe, base)
    lines: list[Measured | tuple[str, str]] = []
    added: list[str] = []
    for index, (row, name) in enumerate(zip(ROWS, known, strict=True), start=1):
        added += row.full if full else row.small
        nodes = row.nodes if full else 1
        settings = _as_many_tokens(first, recipe, _last_of_each([*base, *added]), nodes)
        run = Run(row.name, recipe, tuple(settings), out / f"{index}-{name.replace(' ', '-')}", nodes)
        wanted = not rows or name in rows
        if not run.finished() and wanted and nodes == 1:
            run.start(f"{row.name}: ")
        if run.finished():
            lines.append(run.measure())
        else:
            why = f"needs {nodes} machines; on each of them: " if nodes > 1 else "not run: "
            lines.append((row.name, why + run.command()))
    write_rows(out, [asdict(line) if isinstance(line, Measured) else line for line in lines], full=full)


def bench_ranks(overrides: Sequence[str], *, ranks: Sequence[int], rounds: int, updates: int | None, out: Path) -> None:
    """Tokens/s by the number of workers, each as a `tenko run`, in turns; prints the table, writes ranks.json and .md.

    Args:
        overrides: KEY=VALUE over RANKS.
        ranks: the numbers of workers to compare; the first is the reference.
        rounds: turns of all of them; figures are medians.
        updates: of each run.
        out: folder of the run directories; finished ones are not done again.

    Raises:
        ValueError, RunFailed: as in `bench`.
    """
    count = updates or 40
    once = [f"train.{key}={count}" for key in ("max_update", "valid_interval", "save_interval")]
    load(SMALL, [*RANKS, *once, *overrides])  # a bad override is to be told before anything runs
    found: dict[int, list[Measured]] = {workers: [] for workers in ranks}
    for turn in range(1, rounds + 1):
        for workers in ranks:
            settings = _last_of_each([*RANKS, *once, *overrides, f"workers={workers}"])
            run = Run(f"{workers} workers", SMALL, tuple(settings), out / f"ranks-{workers}-turn-{turn}")
            if not run.finished():
                run.start(f"turn {turn} of {rounds}: ")
            found[workers].append(run.measure())
    medians = {workers: statistics.median(one.tokens_per_second for one in runs) for workers, runs in found.items()}
    runs = {workers: [asdict(one) for one in of] for workers, of in found.items()}
    write_ranks(out, runs, medians)


def _last_of_each(settings: Sequence[str]) -> list[str]:
    """The settings, those left out that later ones replace."""
    return [f"{key}={value}" for key, value in dict(setting.split("=", 1) for setting in settings).items()]


def _as_many_tokens(first: Recipe, recipe: str, settings: list[str], nodes: int) -> list[str]:
    """The settings with as many updates as read the first row's tokens, and intervals to match."""
    this = load(recipe, settings)
    whole, config = first.stages[0].config, this.stages[0].config
    assert isinstance(whole, TrainConfig)
    assert isinstance(config, TrainConfig)
    batch = config.max_tokens * config.update_freq * this.workers * nodes
    updates = max(1, round(whole.max_update * whole.max_tokens * whole.update_freq * first.workers / batch))
    fitted = [f"train.max_update={updates}"]
    for key in ("log_interval", "valid_interval", "save_interval"):
        fitted.append(f"train.{key}={max(1, getattr(whole, key) * updates // whole.max_update)}")
    return _last_of_each([*settings, *fitted])


def _gpus() -> int:
    import torch

    if not torch.cuda.is_available():
        raise ValueError("--full: no GPU is here; give --workers, or leave --full out")
    return torch.cuda.device_count()
