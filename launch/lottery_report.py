"""A lottery's outcome as a table and as the papers' plot: BLEU against the fraction of weights that remain."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, NullLocator

from tenko.compression.config import LotteryConfig

from .files import read_json, write_bytes_atomic, write_text_atomic
from .plots import to_svg
from .rundir import RESULT

ROW = (
    "round",
    "control",
    "fraction_remaining",
    "remaining",
    "prunable",
    "bleu",
    "chrf",
    "valid_bleu",
    "artefact_bytes",
    "train_seconds",
)
"""What a lottery's result.json keeps of each round's, the dense model as round 0 first."""
COLUMNS = ("round", "weights left", "BLEU test", "chrF test", "BLEU valid", "artefact", "factor")
COLOURS = ("#2f7ed8", "#e2711d", "#3a9d5d", "#8a5bc7", "#b8860b", "#c0392b")
MARKS = "osD^vP"
_BESIDE = 3
"""Entries in a row of the legend."""
PLOT = "tickets"
"""Name of the plot's files in a stage's folder, without the ending."""

Rows = Sequence[Mapping[str, Any]]
"""As result.json keeps them: the keys of ROW."""


@dataclass(frozen=True)
class Series:
    """One line of the plot: at each fraction of weights left, the BLEU of one run or of several."""

    label: str
    bleus: Mapping[float, Sequence[float]] = field(repr=False)
    """Fraction remaining -> BLEU of each run."""

    @classmethod
    def of_rows(cls, label: str, rows: Rows) -> Series:
        """The rounds of one run, without the dense model."""
        return cls(label, {row["fraction_remaining"]: [row["bleu"]] for row in rows if row["round"]})


def finished_rows(dense: Path, folder: Path, config: LotteryConfig) -> list[dict[str, Any]]:
    """What the rounds of a lottery that are finished came to, the dense model as round 0 first.

    Args:
        dense: folder of the finished training before the lottery.
        folder: the lottery's own.
        config: its settings.

    Raises:
        ValueError: a result.json is damaged.
    """
    from tenko.compression import lottery  # torch, more than a second to import

    results = [{**read_json(dense / RESULT), "round": 0, "fraction_remaining": 1.0}]
    files = [folder / this.folder / RESULT for this in lottery.rounds(config)]
    results += [read_json(file) for file in files if file.is_file()]
    return [{key: result.get(key) for key in ROW} for result in results]


def tickets_table(rows: Rows) -> list[list[str]]:
    """The cells of a table of rounds, as text in the order of COLUMNS; `factor` is how much smaller the file is."""
    dense = next((row["artefact_bytes"] for row in rows if not row["round"]), None)
    return [
        [
            str(row["round"] or "dense"),
            f"{row['fraction_remaining']:.1%}",
            f"{row['bleu']:.2f}",
            f"{row['chrf']:.2f}",
            "-" if row.get("valid_bleu") is None else f"{row['valid_bleu']:.2f}",
            f"{row['artefact_bytes'] / 1e6:,.2f} MB",
            "-" if dense is None else f"x{dense / row['artefact_bytes']:.2f}",
        ]
        for row in rows
    ]


def tickets_figure(series: Sequence[Series], dense: Sequence[float], *, title: str | None = None) -> Figure:
    """BLEU on the test split against the percentage of prunable weights left, falling to the right, logarithmic.

    Args:
        series: a line each, through the means; a band from the lowest to the highest where there are several runs.
        dense: BLEU of the unpruned models, drawn as a level.
        title: above the plot.
    """
    in_legend = -(-(len(series) + bool(dense)) // _BESIDE)
    figure = Figure(figsize=(6, 3 + 0.2 * in_legend), layout="constrained")
    axes: Axes = figure.add_subplot()
    axes.set_xscale("log")
    ticks: set[float] = set()
    for index, line in enumerate(series):
        points = sorted(((left, bleus) for left, bleus in line.bleus.items() if left > 0), reverse=True)
        percent = [100 * fraction for fraction, _ in points]
        colour = COLOURS[index % len(COLOURS)]
        means = [sum(values) / len(values) for _, values in points]
        mark = MARKS[index % len(MARKS)]
        axes.plot(percent, means, label=line.label, color=colour, linewidth=1.6, marker=mark, markersize=4)
        if any(len(values) > 1 for _, values in points):
            low, high = [min(values) for _, values in points], [max(values) for _, values in points]
            axes.fill_between(percent, low, high, color=colour, alpha=0.15, linewidth=0)
        ticks |= {float(f"{x:.2g}") if x < 10 else round(x, 1) for x in percent}
    if dense:
        axes.axhline(sum(dense) / len(dense), color="#888888", linestyle="--", linewidth=1.2, label="dense")
    shown = _apart(sorted(ticks, reverse=True))
    axes.set_xticks(shown, [f"{x:g}" for x in shown])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.invert_xaxis()
    axes.set_xlabel("% of prunable weights left")
    axes.set_ylabel("BLEU, test")
    axes.grid(visible=True, color="#888888", alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=_BESIDE, frameon=False)
    if title:
        axes.set_title(title, fontsize=9)
    return figure


def _apart(ticks: Sequence[float], factor: float = 1.2) -> list[float]:
    """Those of falling ticks that leave each other room on a logarithmic axis."""
    kept: list[float] = []
    for tick in ticks:
        if not kept or kept[-1] / tick >= factor:
            kept.append(tick)
    return kept


def write_plots(folder: Path, lotteries: Mapping[str, Rows]) -> None:
    """Write tickets.svg and tickets.png: the finished lotteries by name, over one level of the dense model."""
    write_text_atomic(folder / f"{PLOT}.svg", tickets_svg(lotteries).replace("currentColor", "#333333") + "\n")
    write_bytes_atomic(folder / f"{PLOT}.png", png(lambda: _figure(lotteries)))


def tickets_svg(lotteries: Mapping[str, Rows]) -> str:
    """The plot as inline SVG, in the page's text colour."""
    return to_svg(lambda: _figure(lotteries))


def png(make: Callable[[], Figure]) -> bytes:
    """A figure as PNG on white, the same bytes for the same figure."""
    buffer = io.BytesIO()
    with matplotlib.rc_context({"font.size": 9}):
        make().savefig(buffer, format="png", dpi=160, facecolor="white", metadata={"Software": None})
    return buffer.getvalue()


def _figure(lotteries: Mapping[str, Rows]) -> Figure:
    series = [Series.of_rows(name, rows) for name, rows in lotteries.items()]
    dense = {row["bleu"] for rows in lotteries.values() for row in rows if not row["round"]}
    return tickets_figure(series, sorted(dense))


def tickets_html(name: str, lotteries: Mapping[str, Rows]) -> str:
    """A section of report.html: the rounds of one lottery, and its plot beside the others' of the run."""
    head = "".join(f"<th>{escape(column)}</th>" for column in COLUMNS)
    lines = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>"
        for cells in tickets_table(lotteries[name])
    )
    return (
        f"<div class=wide><table class=figures><tr>{head}</tr>{lines}</table></div>"
        f"<div class=plots><figure><figcaption>BLEU against the weights left</figcaption>{tickets_svg(lotteries)}"
        "</figure></div>"
    )
