"""A model of the exchange, fitted to measured points and extended to 16 nodes of 4 GPUs.

    exchange = ALPHA * (n - 1)  +  HEADERS * bytes / rate  +  gamma * elements * max(1, n / cores)

ALPHA: latency that another rank adds, seconds. bytes: what a rank sends, as the kernel counted. gamma: processor time
an element, codec and sockets; here all ranks share this machine's cores, on real machines they do not. gamma is fitted,
by contestant, to the exchanges over all rates; a step is an exchange whose gradients leave as they become ready
(link_table.earliest).
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any

from lab import bits_per_second
from link_model import MODELS
from link_table import BASELINE, earliest

ALPHA = 1e-4
"""Above the lab's round trip of 0.07 ms: an exchange is one up and one down."""
HEADERS = 1.045
"""TCP's and Ethernet's, at an MTU of 1500."""
GPU_SECONDS = 60.5e6 * 40 / 1e12
"""Codec of 60.5M elements on a GPU: some 40 bytes an element through memory at 1 TB/s. Assumed, not measured."""
INSIDE = 100e9
"""Bytes/s between the GPUs of a node. Assumed."""


@dataclass(frozen=True)
class Fit:
    """A contestant's constants."""

    gamma: float
    """Seconds an element."""
    bytes_per_element: float
    """A rank sends this times (n - 1) / n, an element."""

    def exchange(self, n: int, rate: float, elements: float, cores: float) -> float:
        """Seconds of an exchange of `elements` among n ranks, `cores` of which compute at once."""
        if n == 1:
            return 0.0
        sent = self.bytes_per_element * (n - 1) / n * elements
        return ALPHA * (n - 1) + HEADERS * sent * 8 / rate + self.gamma * elements * max(1.0, n / cores)


def elements(model: str) -> int:
    return sum(MODELS[model].numels())


def fit(document: dict[str, Any], peer: str) -> Fit:
    """The median over the measured exchanges of what gamma would explain each of them."""
    cores = document["machine"]["cores"]
    gammas, per_element = [], []
    for r in document["results"]:
        if r["peer"] != peer or "failed" in r:
            continue
        n, count, sent = r["hosts"], elements(r["model"]), statistics.median(r["sent"])
        wire = ALPHA * (n - 1) + HEADERS * sent * 8 / bits_per_second(r["rate"])
        gammas.append(max(0.0, statistics.median(r["exchange"]) - wire) / (count * max(1.0, n / cores)))
        per_element.append(sent / count * n / (n - 1))
    return Fit(statistics.median(gammas), statistics.median(per_element))


def step(constants: Fit, n: int, rate: float, model: str, compute: float, cores: float) -> float:
    """Seconds of a step with overlap."""
    return earliest(model, compute, constants.exchange(n, rate, elements(model), cores))


def gpu_step(constants: Fit, nodes: int, rate: float, model: str, compute: float, *, thin: bool) -> float:
    """Seconds of a step on nodes of 4 GPUs: a sum inside the node, then the exchange between nodes, codec on GPUs."""
    inside = 2 * 3 / 4 * 4 * elements(model) / INSIDE
    between = Fit(0.0, constants.bytes_per_element).exchange(nodes, rate, elements(model), nodes)
    return earliest(model, compute, inside + between + (GPU_SECONDS if thin else 0.0))


def errors(document: dict[str, Any], peer: str) -> list[tuple[int, str, float, float, float]]:
    """Of every measured step: hosts, rate, compute, measured, modelled seconds; of exchanges with compute 0."""
    constants, cores = fit(document, peer), document["machine"]["cores"]
    found = []
    for r in document["results"]:
        if r["peer"] != peer or "failed" in r:
            continue
        measured = {"0": r["exchange"], **r.get("steps", {})}
        for compute, seconds in measured.items():
            predicted = step(constants, r["hosts"], bits_per_second(r["rate"]), r["model"], float(compute), cores)
            found.append((r["hosts"], r["rate"], float(compute), statistics.median(seconds), predicted))
    return found


def speed_up(r: dict[str, Any], compute: str) -> float:
    """Measured, over one worker."""
    return float(r["hosts"] * float(compute) / statistics.median(r["steps"][compute]))


def describe(document: dict[str, Any]) -> str:
    """Measured speed-ups, where compression loses, the model's constants and its errors, in Markdown."""
    good = [r for r in document["results"] if "failed" not in r]
    peers = list(dict.fromkeys(r["peer"] for r in good))
    computes = sorted({c for r in good for c in r["steps"]}, key=float)
    lines = ["Speed-up over one worker, measured (n times the computation's time over the step's):", ""]
    lines += ["| computation, s | link | n | " + " | ".join(peers) + " |", "|---|---|---|" + "---|" * len(peers)]
    loses: dict[str, list[tuple[float, str]]] = {}
    for compute in computes:
        for rate in dict.fromkeys(r["rate"] for r in good):
            for n in sorted({r["hosts"] for r in good}):
                here = {r["peer"]: r for r in good if (r["rate"], r["hosts"]) == (rate, n)}
                cells = [f"{speed_up(here[p], compute):.2f}" if p in here else "-" for p in peers]
                lines.append(f"| {compute} | {rate} | {n} | " + " | ".join(cells) + " |")
                for p in peers:
                    if p != BASELINE and p in here and BASELINE in here:
                        share = speed_up(here[p], compute) / speed_up(here[BASELINE], compute)
                        if share < 1:
                            loses.setdefault(p, []).append((share, f"n = {n}, {rate}, {compute} s"))
    lines += ["", "Where compression loses to fp32:" + ("" if loses else " at none of these points."), ""]
    for p, points in loses.items():
        share, where = min(points)
        each = f", with a speed-up of {share:.2f} to {max(points)[0]:.2f} of its; least at {where}"
        lines.append(f"- {p}: {len(points)} of {sum(r['peer'] == p for r in good) * len(computes)} points{each}")
    lines.append("")
    lines += ["The model (`speedup_model.py`), fitted to these exchanges:", ""]
    lines += ["| contestant | gamma, ns an element | bytes an element | median error | largest |"]
    lines += ["|---|---|---|---|---|"]
    for peer in peers:
        f = fit(document, peer)
        off = [abs(predicted / measured - 1) for *_, measured, predicted in errors(document, peer)]
        lines.append(
            f"| {peer} | {f.gamma * 1e9:.2f} | {f.bytes_per_element:.2f} (n-1)/n "
            f"| {statistics.median(off):.0%} | {max(off):.0%} |"
        )
    lines += ["", "Errors are those of all measured exchanges and steps, the ones fitted to included.", ""]
    return "\n".join(lines)
