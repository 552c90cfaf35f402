"""The pictures of `speedup.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.ticker

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from lab import UNSHAPED, bits_per_second
from link_table import BASELINE
from speedup_model import errors, fit, gpu_step, speed_up

COLOURS = {BASELINE: "tab:gray", "tenko 3/4": "tab:blue"}
LABELS = {
    BASELINE: "full precision",
    "tenko 3/4": "3-bit gradients (4 down)",
    "tenko server, SQ3 + LAQ4": "3-bit gradients, LAQ4 weights",
}
GPU_RATES = ("1gbit", "10gbit", "100gbit")


def _peers(document: dict[str, Any]) -> list[str]:
    return list(dict.fromkeys(r["peer"] for r in document["results"] if "failed" not in r))


def _computes(document: dict[str, Any]) -> list[str]:
    return sorted({c for r in document["results"] for c in r.get("steps", {})}, key=float)


def _link(rate: str) -> str:
    return "unshaped link" if rate == UNSHAPED else rate.replace("gbit", " Gbit/s").replace("mbit", " Mbit/s")


def draw_measured(document: dict[str, Any], path: Path) -> None:
    """Speed-up over one worker by number of workers: a column for each link, a row for each time of computation."""
    rates = list(dict.fromkeys(r["rate"] for r in document["results"]))
    computes = _computes(document)
    figure, grid = plt.subplots(
        len(computes),
        len(rates),
        figsize=(4 * len(rates), 3.4 * len(computes)),
        squeeze=False,
        sharex=True,
        sharey=True,
    )
    for axes_row, compute in zip(grid, computes, strict=True):
        for axes, rate in zip(axes_row, rates, strict=True):
            for peer in _peers(document):
                points = [
                    (r["hosts"], speed_up(r, compute))
                    for r in document["results"]
                    if (r["peer"], r["rate"]) == (peer, rate) and compute in r.get("steps", {})
                ]
                xs, ys = zip(*sorted([(1, 1.0), *points]), strict=True)
                axes.plot(xs, ys, "o-", color=COLOURS.get(peer, "tab:red"), label=LABELS.get(peer, peer))
            axes.plot([1, 8], [1, 8], ":", color="black", linewidth=1, label="linear")
            axes.set_title(f"{_link(rate)}, {float(compute):g} s of computation", fontsize=10)
            axes.grid(alpha=0.3)
    for axes in grid[-1]:
        axes.set_xlabel("workers")
    for axes in grid[:, 0]:
        axes.set_ylabel("speed-up over one")
    grid[0][0].legend(fontsize=8)
    cores = document["machine"]["cores"]
    figure.suptitle(
        f"Measured: Transformer-base's gradients, computation replayed, all workers on {cores} cores", fontsize=10
    )
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_model(document: dict[str, Any], path: Path) -> None:
    """Left: the model against what was measured. Then: nodes of 4 GPUs, up to 16, at several rates."""
    peers, computes = _peers(document), _computes(document)
    model = document["results"][0]["model"]
    cores = document["machine"]["cores"]
    figure, grid = plt.subplots(1, 1 + len(GPU_RATES), figsize=(4 * (1 + len(GPU_RATES)), 3.8))
    axes = grid[0]
    worst = []
    for peer in peers:
        found = errors(document, peer)
        off = sorted(abs(predicted / measured - 1) for *_, measured, predicted in found)
        worst.append(f"{LABELS.get(peer, peer)}: median {off[len(off) // 2]:.0%}, largest {off[-1]:.0%}")
        axes.loglog([f[3] for f in found], [f[4] for f in found], "o", color=COLOURS.get(peer, "tab:red"), markersize=4)
    low, high = axes.get_xlim()
    axes.xaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
    axes.yaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
    axes.plot([low, high], [low, high], ":", color="black", linewidth=1)
    axes.set_title(f"model's error on {cores} shared cores\n" + "\n".join(worst), fontsize=8)
    axes.set_xlabel("measured, s")
    axes.set_ylabel("modelled, s")
    nodes = range(1, 17)
    compute = float(computes[0])
    for axes, rate in zip(grid[1:], GPU_RATES, strict=True):
        for peer in peers:
            f, thin = fit(document, peer), peer != BASELINE
            times = [gpu_step(f, n, bits_per_second(rate), model, compute, thin=thin) for n in nodes]
            ys = [4 * n * compute / t for n, t in zip(nodes, times, strict=True)]
            style = "--" if peer in COLOURS else ":"  # as many bytes as 3/4 bits: the one lies on the other
            colour, label = COLOURS.get(peer, "tab:red"), LABELS.get(peer, peer)
            axes.plot([4 * n for n in nodes], ys, style, linewidth=2, color=colour, label=label)
        axes.plot([4, 64], [4, 64], ":", color="black", linewidth=1)
        axes.set_title(f"modelled, not measured: 4 GPUs a node,\n{_link(rate)} a node, {compute:g} s", fontsize=8)
        axes.set_xlabel("GPUs")
        axes.grid(alpha=0.3)
    grid[1].set_ylabel("speed-up over one GPU")
    grid[1].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
