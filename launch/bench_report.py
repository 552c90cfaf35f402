"""Tables, JSON and the picture of `tenko bench scaling`."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from .files import write_bytes_atomic, write_json_atomic, write_text_atomic

Line = dict[str, Any] | tuple[str, str]
"""A measured row, or the name of one that is not there and why."""

_COLUMNS: tuple[str, ...] = ("row", "precision", "workers", "updates", "tokens/update", "seconds", "tokens/s")
_COLUMNS += ("of the first", "valid loss", "BLEU", "others")
TARGET = 1.8
"""Tokens/s of 2 workers over 1 that is aimed at, on 2 cores."""
OTHERS = (
    "Others: cores that other programs kept busy meanwhile, the run's start and its validations included; where that "
    "is not near 0, speeds are not to be compared."
)


def write_rows(out: Path, lines: Sequence[Line], *, full: bool) -> None:
    """Print the table of the ablation; write scaling.json, scaling.md, scaling.png unless no row is there."""
    measured = [line for line in lines if isinstance(line, dict)]
    cells = [_cells(line, measured[0]) for line in lines if isinstance(line, dict)]
    missing = [line for line in lines if isinstance(line, tuple)]
    notes = [
        f"{_machine()}. Seconds are of updates, validations and checkpoints left out; loss in nats a target token of "
        "held-out pairs after the last update; BLEU of held-out test sentences. All rows read about as many tokens. "
        f"{OTHERS}"
    ]
    if not full:
        notes.append(
            "On CPUs the paper's gains are not to be expected: 16-bit is bf16, which gains only where the processor "
            "multiplies it natively (fp16 on a CPU is emulated, some twenty times slower than fp32); one machine has "
            "nothing to send in the rows with one worker, so that accumulation saves only optimizer steps; and few "
            "updates with large batches end at a worse loss. The workers of + nodes are processes on one machine."
        )
    left = [f"{name}: {why}" for name, why in missing]
    if not measured:
        print("\n".join(left))
        return
    print(f"\n{_text([_COLUMNS, *cells])}\n\n" + "\n".join([*notes, *left]))
    write_json_atomic(out / "scaling.json", {"machine": _machine(), "full": full, "rows": measured})
    commands = [f"{line['name']}\n\n    {line['command']}" for line in measured]
    picture = "![Loss by time and tokens/s](scaling.png)"
    body = [_markdown([_COLUMNS, *cells]), *notes, picture, "Each row alone:", *commands, *left]
    write_text_atomic(out / "scaling.md", "\n\n".join(body).strip() + "\n")
    _draw(out / "scaling.png", measured)
    print(f"\nWritten: {', '.join(str(out / f'scaling.{kind}') for kind in ('md', 'json', 'png'))}")


def write_ranks(out: Path, runs: Mapping[int, list[dict[str, Any]]], medians: Mapping[int, float]) -> None:
    """Print tokens/s by workers; write ranks.json and ranks.md."""
    first = next(iter(medians))
    head = ("workers", "tokens/s, median", f"over {first}", "of each turn", "others, each")
    rows = [
        (
            str(count),
            f"{speed:,.0f}",
            f"{speed / medians[first]:.2f}x",
            ", ".join(f"{run['tokens_per_second']:,.0f}" for run in runs[count]),
            ", ".join(_others(run) for run in runs[count]),
        )
        for count, speed in medians.items()
    ]
    note = (
        f"{_machine()}. One thread a worker, no shaped link, turns of all worker counts one after the other. Aimed at "
        f"on 2 quiet cores: {TARGET}x from 1 to 2. {OTHERS}"
    )
    print(f"\n{_text([head, *rows])}\n\n{note}")
    value = {"machine": _machine(), "medians": {str(count): speed for count, speed in medians.items()}}
    write_json_atomic(out / "ranks.json", {**value, "runs": {str(k): v for k, v in runs.items()}})
    commands = [f"    {of[0]['command']}" for of in runs.values()]
    write_text_atomic(out / "ranks.md", "\n\n".join([_markdown([head, *rows]), note, *commands]) + "\n")
    print(f"\nWritten: {out / 'ranks.md'}, {out / 'ranks.json'}")


def _cells(line: dict[str, Any], first: dict[str, Any]) -> tuple[str, ...]:
    return (
        line["name"],
        line["precision"],
        str(line["workers"]),
        f"{line['updates']:,}",
        f"{line['tokens_per_update']:,.0f}",
        f"{line['seconds']:,.1f}",
        f"{line['tokens_per_second']:,.0f}",
        f"{line['tokens_per_second'] / first['tokens_per_second']:.2f}x",
        f"{line['valid_loss']:.3f}",
        f"{line['test_bleu']:.2f}",
        _others(line),
    )


def _others(line: dict[str, Any]) -> str:
    return "-" if line["others"] is None else f"{line['others']:.1f}"


def _text(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    )


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    rule = "|---|" + "---:|" * (len(rows[0]) - 1)
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], rule, *lines[1:]])


def _machine() -> str:
    """What it ran on, for instance `AMD EPYC, 2 cores, torch 2.13.0`."""
    name = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            name = next((line.partition(":")[2].strip() for line in file if line.startswith("model name")), name)
    except OSError:
        pass
    return f"{name}, {len(os.sched_getaffinity(0))} cores, torch {version('torch')}"


def _draw(path: Path, measured: Sequence[dict[str, Any]]) -> None:
    """Left the training loss by time, right tokens/s; a colour for each row."""
    import io

    import matplotlib
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    names = [line["name"] for line in measured]
    colours = [matplotlib.colormaps["viridis"](i / max(1, len(names) - 1) * 0.9) for i in range(len(names))]
    for line, colour in zip(measured, colours, strict=True):
        left.plot(*zip(*line["curve"], strict=True), label=line["name"], color=colour, linewidth=1.6)
    left.set_xlabel("seconds in updates")
    left.set_ylabel("training loss, nats a target token")
    left.set_xlim(left=0)
    left.legend(frameon=False)
    right.barh(names, [line["tokens_per_second"] for line in measured], color=colours)
    right.invert_yaxis()
    right.set_xlabel("target tokens/s")
    for axes in (left, right):
        axes.grid(visible=True, color="#888888", alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    write_bytes_atomic(path, buffer.getvalue())
