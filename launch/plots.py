"""Curves of a stage as inline SVG, drawn by matplotlib without a display; black follows the page's text colour."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

INK = "#010203"
"""Stands for the page's text colour: replaced by currentColor in the SVG."""
COLOURS = ("#2f7ed8", "#e2711d", "#3a9d5d")
MAX_POINTS = 800
PERCENT = "% of the time"
"""Unit of shares of one whole, which are drawn on top of each other."""


@dataclass(frozen=True)
class Curve:
    """One line of a plot; points without a figure are left out."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    marker: bool = False


def stage_plots(entries: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    """Titles and SVGs of what a metrics.jsonl holds; a plot that would be empty is left out."""
    train = [entry for entry in entries if entry.get("kind") == "train"]
    valid = [entry for entry in entries if entry.get("kind") == "valid"]
    plots: list[tuple[str, str]] = []

    def add(title: str, unit: str, curves: list[Curve], *, log: bool = False) -> None:
        drawn = [curve for curve in curves if curve.x]
        if drawn:
            plots.append((title, _svg(drawn, unit, log=log)))

    add(
        "Loss",
        "nats a target token",
        [
            curve(train, "loss", "training, what is minimised"),
            curve(train, "nll", "training, cross entropy"),
            curve(valid, "nll", "validation, cross entropy", marker=True),
        ],
    )
    add("BLEU on validation sentences", "BLEU", [curve(valid, "bleu", "BLEU", marker=True)])
    add(
        "Bytes on the wire, cumulative, one worker",
        "MB",
        [
            curve(train, "wire_bytes", "sent", scale=1e-6, positive=True),
            curve(train, "wire_fp32_bytes", "fp32 would have sent", scale=1e-6, positive=True),
        ],
        log=True,
    )
    add("Training speed", "target tokens/s", [curve(train, "tokens_per_second", "tokens/s")])
    shares = [curve(train, f"share_{name}", name, scale=100) for name in ("compute", "exchange", "data")]
    add("Where the time of updates goes", PERCENT, shares)
    return plots


def curve(
    entries: Sequence[dict[str, Any]],
    key: str,
    label: str,
    *,
    scale: float = 1.0,
    marker: bool = False,
    positive: bool = False,
) -> Curve:
    """The figure `key` by update, thinned to at most MAX_POINTS; with `positive` only figures above 0."""
    points = [
        (entry["update"], entry[key] * scale)
        for entry in entries
        if isinstance(entry.get(key), int | float) and "update" in entry and (entry[key] > 0 or not positive)
    ]
    step = -(-len(points) // MAX_POINTS) or 1
    kept = points[::step] if not points or (len(points) - 1) % step == 0 else [*points[::step], points[-1]]
    return Curve(label, [x for x, _ in kept], [y for _, y in kept], marker)


def draw(curves: Sequence[Curve], unit: str, *, log: bool) -> Figure:
    """One plot, 6 by 3 inches, transparent."""
    figure = Figure(figsize=(6, 3), layout="constrained")
    axes: Axes = figure.add_subplot()
    stacked = unit == PERCENT
    if stacked:
        ys, labels = [line.y for line in curves], [line.label for line in curves]
        axes.stackplot(curves[0].x, *ys, labels=labels, colors=COLOURS, alpha=0.75)
        axes.set_ylim(0, 100)
    for index, line in enumerate([] if stacked else curves):
        dots = "o" if line.marker or len(line.x) == 1 else ""
        axes.plot(line.x, line.y, label=line.label, color=COLOURS[index % 3], linewidth=1.6, marker=dots, markersize=4)
    if log:
        axes.set_yscale("log")
    elif not stacked and min(min(line.y) for line in curves) >= 0 and unit != "nats a target token":
        axes.set_ylim(0, 1.08 * max(max(line.y) for line in curves) or 1)
    axes.set_xlim(left=0)
    axes.set_xlabel("update")
    axes.set_ylabel(unit)
    axes.grid(visible=True, color="#888888", alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    if len(curves) > 1:
        beside: dict[str, Any] = {"loc": "center left", "bbox_to_anchor": (1, 0.5), "reverse": True}
        axes.legend(edgecolor="none", framealpha=0.6, **(beside if stacked else {}))
    return figure


def _svg(curves: Sequence[Curve], unit: str, *, log: bool) -> str:
    return to_svg(lambda: draw(curves, unit, log=log))


def to_svg(make: Callable[[], Figure]) -> str:
    """A figure as inline SVG in the page's text colour; the same figure gives the same text.

    Args:
        make: draws it, called under the style.
    """
    style: dict[Any, Any] = {
        "svg.fonttype": "none",  # text stays text, in the page's font
        "svg.hashsalt": "tenko",  # the same figures give the same bytes
        "font.size": 9,
        **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
    }
    buffer = io.StringIO()
    with matplotlib.rc_context(style):
        make().savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    return re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
