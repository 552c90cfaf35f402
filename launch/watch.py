"""`tenko watch`: a run as it is, in a terminal, from any machine that sees its directory. What it shows is read by
`watch_state.py`; nothing here imports torch."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from .progress import megabytes
from .watch_state import RunView, StageView, Training, Watcher

RANKS = 16
"""Ranks shown; of more the ones that have been silent for longest."""
_BARS = "▁▂▃▄▅▆▇█"
_SPARKS = 40
_COLOURS = {
    "running": "green",
    "finished": "green",
    "stalled": "bold red",
    "damaged": "bold red",
    "stopped": "yellow",
    "not running": "yellow",
}


def watch(run_dir: Path, *, once: bool, interval: float) -> None:
    """Show a run until it is finished or Ctrl-C; a single frame with `once` or where stdout is no terminal.

    Args:
        run_dir: of a `tenko run`, here or elsewhere.
        once: print one frame.
        interval: seconds between frames.

    Raises:
        ValueError: not a run directory; an interval beyond a day.
    """
    if not 0 < interval <= 86_400:
        raise ValueError(f"--interval: must be at most 86400 s, is {interval:g}")
    watcher, terminal = Watcher(run_dir), sys.stdout.isatty()
    width = None if terminal or "COLUMNS" in os.environ else 120
    console = Console(markup=False, highlight=False, width=width)
    view = watcher.look()
    if once or not terminal or view.state == "finished":
        console.print(frame(view))
        return
    try:
        # On the alternate screen, which leaves the terminal as it was: a frame may be taller than the window.
        with Live(frame(view), console=console, screen=True, auto_refresh=False, vertical_overflow="crop") as live:
            while view.state != "finished":
                time.sleep(interval)
                view = watcher.look()
                live.update(frame(view), refresh=True)
    except KeyboardInterrupt:
        pass  # how one stops watching; the run is not ours
    console.print(frame(view))


def frame(view: RunView) -> RenderableType:
    """One picture of a run."""
    recipe = view.recipe
    count, nodes = len(view.beats) or recipe.workers, len({beat.node for beat in view.beats})
    workers = ("1 worker" if count == 1 else f"{count} workers") + (f" on {nodes} nodes" if nodes > 1 else "")
    head = Text.assemble((view.state, _COLOURS.get(view.state, "")), f"  {view.detail}")
    about = Text(f"{view.path}: {recipe.name}, {recipe.direction}, {workers}", "dim")
    parts: list[RenderableType] = [head, about, Text(), _stages(view)]
    current = view.current
    if current.training is not None and (current.training.last or current.training.valid):
        parts += [Text(), _figures(current.training)]
    if view.beats:
        parts += [Text(), _ranks(view)]
    if view.troubles:
        parts += [Text("\nlast warnings and errors", "dim")]
        parts += [Text(f"  {line}", overflow="ellipsis", no_wrap=True) for line in view.troubles]
    return Group(*parts)


def _stages(view: RunView) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False)
    for index, stage in enumerate(view.stages, start=1):
        state = view.state if stage.state == "running" and view.state == "stalled" else stage.state
        bar: RenderableType = ""
        total = stage.training.max_update if stage.training else 0
        if total and stage.state in ("running", "stopped"):
            bar = ProgressBar(total=total, completed=min(stage.update, total), width=24)
        table.add_row(str(index), stage.name, Text(state, _COLOURS.get(state, "dim")), bar, _progress(stage))
    return table


def _progress(stage: StageView) -> str:
    if stage.state == "finished":
        facts = []
        if isinstance(stage.result.get("bleu"), int | float):
            facts.append(f"BLEU {stage.result['bleu']:.2f}")
        if isinstance(stage.result.get("artefact_bytes"), int):
            facts.append(megabytes(stage.result["artefact_bytes"]))
        if isinstance(stage.result.get("seconds"), int | float):
            facts.append(f"{duration(stage.result['seconds'])}")
        return "  ".join(facts)
    training = stage.training
    if training is None or not training.max_update:
        return ""
    text = f"update {stage.update:,} of {training.max_update:,}"
    if training.folder.name.partition("-")[2] != stage.name:  # a round of a lottery, a group of ipq
        text = f"{training.folder.name}: {text}"
    each = training.seconds_an_update
    if stage.state == "running" and each and stage.update < training.max_update:
        text += f"  {duration(each * (training.max_update - stage.update))} of updates left"
    return text


def _figures(training: Training) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False)
    last = training.last

    def add(label: str, *facts: str | None) -> None:
        if shown := [fact for fact in facts if fact]:
            table.add_row(Text(label, "dim"), "  ".join(shown))

    add(
        "training",
        _figure(last, "loss", "loss {:.3f}"),
        _figure(last, "ppl", "perplexity {:,.2f}"),
        _figure(last, "lr", "lr {:.2e}"),
        _figure(last, "grad_norm", "gradient norm {:.3g}"),
        _figure(last, "scale", "loss scale {:g}"),
        _figure(last, "overflows", "{} overflows"),
    )
    add("speed", _figure(last, "tokens_per_second", "{:,.0f} target tokens/s"), _figure(last, "epoch", "epoch {:.2f}"))
    shares = [(name, last.get(f"share_{name}")) for name in ("compute", "exchange", "data")]
    add("time", *(f"{name} {value:.0%}" for name, value in shares if isinstance(value, int | float)))
    sent, full = last.get("wire_bytes"), last.get("wire_fp32_bytes")
    if sent and full:
        add("wire", f"{megabytes(sent)} sent by a worker, fp32 {megabytes(full)}: {full / sent:.1f}x")
    if training.losses:
        losses = training.losses
        add("loss", sparkline(losses), f"{losses[0]:.2f} to {losses[-1]:.2f}")
    if training.bleus:
        recent = ", ".join(f"{bleu:.2f}" for _, bleu in training.bleus[-4:])
        facts = f"last {recent}"
        if training.best is not None:
            update, best = training.best
            by = " by perplexity" if training.best_by == "perplexity" else ""
            facts += f"; best{by} {best:.2f} at update {update:,}"
        add("BLEU", sparkline([bleu for _, bleu in training.bleus]), facts)
    return table


def _figure(entry: dict[str, Any], key: str, form: str) -> str | None:
    return form.format(entry[key]) if isinstance(entry.get(key), int | float) else None


def _ranks(view: RunView) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column, justify in (("rank", "right"), ("host", "left"), ("phase", "left")):
        table.add_column(column, justify=justify)  # type: ignore[arg-type]
    table.add_column("update", justify="right")
    table.add_column("last sign of life", justify="right")
    shown = sorted(view.beats, key=lambda beat: beat.time)[:RANKS]
    for beat in sorted(shown, key=lambda beat: beat.rank):
        age = max(0.0, view.now - beat.time)
        table.add_row(str(beat.rank), beat.host, beat.phase, f"{beat.update:,}", f"{age:,.1f} s ago")
    if len(view.beats) > len(shown):
        table.add_row("", f"and {len(view.beats) - len(shown)} that were heard of since")
    return table


def sparkline(values: Sequence[float], width: int = _SPARKS) -> str:
    """Values as a line of bars, from the lowest to the highest; more than `width` are averaged in groups."""
    groups = [values[i * len(values) // width : (i + 1) * len(values) // width] for i in range(width)]
    means = [sum(g) / len(g) for g in groups if g] if len(values) > width else list(values)
    low, high = min(means), max(means)
    return "".join(_BARS[round((v - low) / ((high - low) or 1) * (len(_BARS) - 1))] for v in means)


def duration(seconds: float) -> str:
    """Time in short: 12 s, 3:05 min, 2:10 h."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    return f"{whole // 60}:{whole % 60:02d} min" if whole < 3600 else f"{whole // 3600}:{whole % 3600 // 60:02d} h"
