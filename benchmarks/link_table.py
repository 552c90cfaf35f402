"""What `links.py` measured, as a table. A result is one contestant at one number of hosts and one rate."""

from __future__ import annotations

import statistics
from typing import Any

from lab import bits_per_second
from link_model import MODELS

BASELINE = "DDP fp32"


def ring_bytes(hosts: int, model: str) -> float:
    """What a rank sends in a ring all-reduce in fp32."""
    return 2 * (hosts - 1) / hosts * 4 * sum(MODELS[model].numels())


def earliest(model: str, compute: float, floor: float) -> float:
    """Seconds of a step in which gradients leave as soon as they are ready and the link does nothing else.

    The real bound of overlap: max(compute, floor) is below it, as no gradient is ready in the forward pass, and that
    of the shared table comes last.
    """
    shapes = MODELS[model]
    end, numels = 0.0, shapes.numels()
    for numel, ready in sorted(zip(numels, shapes.ready(), strict=True), key=lambda pair: pair[1]):
        end = max(end, ready * compute) + floor * numel / sum(numels)
    return end


def figures(result: dict[str, Any], results: list[dict[str, Any]]) -> dict[str, Any]:
    """The derived figures of a result: medians over its turns, and ratios to its floor and to the baseline's turns."""
    hosts, model = result["hosts"], result["model"]
    sent = statistics.median(result["sent"])
    floor = sent * 8 / bits_per_second(result["rate"])
    seconds = statistics.median(result["exchange"])
    found: dict[str, Any] = {
        "megabytes": sent / 1e6,
        "fewer": ring_bytes(hosts, model) / sent if sent else None,
        "metered": None if None in result["metered"] else statistics.median(result["metered"]) / sent - 1,
        "floor": floor,
        "seconds": seconds,
        "spread": (min(result["exchange"]), max(result["exchange"])),
        "over_floor": seconds / floor if floor else None,
        "steps": {},
    }
    same = [r for r in results if all(r[k] == result[k] for k in ("hosts", "rate", "model")) and "failed" not in r]
    baseline = next((r for r in same if r["peer"] == BASELINE), None)
    found["faster"] = None
    if baseline:
        # turn by turn, as both ran within the same minutes
        turns = min(len(baseline["exchange"]), len(result["exchange"]))
        pairs = zip(baseline["exchange"][:turns], result["exchange"][:turns], strict=True)
        found["faster"] = statistics.median(theirs / ours for theirs, ours in pairs)
    for compute, steps in result.get("steps", {}).items():
        step = statistics.median(steps)
        found["steps"][compute] = {
            "seconds": step,
            "over_max": step / max(float(compute), floor),
            "over_earliest": step / earliest(model, float(compute), floor),
        }
    found["error_over_once"] = result["error"] / result["once"] if result.get("once") else None
    return found


def _cell(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def markdown(document: dict[str, Any]) -> str:
    """All results as Markdown: one table for each number of hosts and rate."""
    results = document["results"]
    lines = []
    for hosts, rate, model in sorted(
        {(r["hosts"], r["rate"], r["model"]) for r in results}, key=lambda k: (k[2], k[0], bits_per_second(k[1]))
    ):
        computes = sorted({c for r in results if r["rate"] == rate for c in r.get("steps", ())}, key=float)
        ring = ring_bytes(hosts, model)
        lines += [
            f"### {hosts} hosts at {rate}, {model} ({sum(MODELS[model].numels()) / 1e6:.1f}M parameters)",
            "",
            f"fp32 ring: {ring / 1e6:.1f} MB a rank.",
            "",
            "| contestant | MB a rank (kernel) | fewer than fp32 ring | meter | exchange, s (range) | floor, s "
            "| over floor | against DDP fp32 | "
            + "".join(f"step at {c} s, s (over max, over earliest) | " for c in computes)
            + "error | over once |",
            "|" + "---|" * (10 + len(computes)),
        ]
        for result in results:
            if (result["hosts"], result["rate"], result["model"]) != (hosts, rate, model):
                continue
            if "failed" in result:
                lines.append(f"| {result['peer']} | fails: {result['failed']} |" + " |" * (8 + len(computes)))
                continue
            f = figures(result, results)
            low, high = f["spread"]
            cells = [
                result["peer"] + ("" if result["agree"] else " (ranks differ!)"),
                f"{f['megabytes']:.2f}",
                f"{_cell(f['fewer'], '.2f')}x",
                "-" if f["metered"] is None else f"{f['metered']:+.1%}",
                f"{f['seconds']:.3f} ({low:.3f} to {high:.3f})",
                f"{f['floor']:.3f}",
                _cell(f["over_floor"], ".2f"),
                _cell(f["faster"], ".2f") + "x",
            ]
            for compute in computes:
                step = f["steps"].get(compute)
                cells.append(
                    "-"
                    if step is None
                    else f"{step['seconds']:.3f} ({step['over_max']:.2f}, {step['over_earliest']:.2f})"
                )
            cells += [_cell(result.get("error"), ".3g"), _cell(f["error_over_once"], ".2f")]
            lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)
