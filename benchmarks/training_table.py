"""The figures of `training.py` as a table, and what is demanded of them."""

from __future__ import annotations

from typing import Any

GOALS = {"fp32": 1.0, "bf16": 1.5}
"""Demanded speed over fairseq's in fp32."""
OVERHEAD_GOAL = 0.03
"""Share of an update that may pass outside the model's forward and backward pass."""


def table(result: dict[str, Any]) -> str:
    """The figures of `training.py` for people."""
    side = result["matmul_side"]
    lines = [
        f"{result['cpu']}, one thread a process; {result['parameters'] / 1e6:.2f}M parameters (d 256, ffn 1024, 3+3 "
        "layers, 4 heads), max_tokens 2000",
        f"medians over {result['rounds']} turns of {result['updates']} updates; in brackets least and most",
        "",
        f"{'':29}{'target tok/s':>13}{'over fairseq':>21}{'tok/CPU s':>11}{'over':>6}{'wire':>7}{'loss':>6}",
    ]
    for ranks in (1, 2):
        lines.append("1 process" if ranks == 1 else f"{ranks} ranks")
        for row in (r for r in result["rates"] if r["ranks"] == ranks):
            least, most = min(row["ratios"]), max(row["ratios"])
            ratio = f"{row['over_fairseq']:.2f} ({least:.2f} to {most:.2f})"
            wire = f"/ {row['wire']['fp32'] / row['wire']['sent']:.1f}" if row["wire"] else ""
            lines.append(
                f"  {row['name']:<27}{row['tokens_per_second']:>13,.0f}{ratio:>21}"
                f"{row['tokens_per_cpu_second']:>11,.0f}{row['cpu_over_fairseq']:>6.2f}{wire:>7}{row['loss']:>6.2f}"
            )
    lines += ["", f"{'an update in 1 process':32}" + "".join(f"{name:>14}" for name in result["update"])]
    parts = ("forward", "backward", "optimizer", "data", "other", "overhead")
    names = ("forward", "backward", "optimizer and norm", "batches: read, collate", "the rest", "outside the model")
    for part, label in zip(parts, names, strict=True):
        cells = (f"{u[part]:>14.1%}" if part in u else f"{'':>14}" for u in result["update"].values())
        lines.append(f"  {label:<30}" + "".join(cells))
    lines.append(
        f"  {'matrix products, GFLOP/s':<30}" + "".join(f"{u['gflops']:>14.1f}" for u in result["update"].values())
    )
    lines.append(
        f"  {'of the core at ' + f'{side}x{side}':<30}"
        + "".join(f"{u['of_matmul']:>14.0%}" for u in result["update"].values())
    )
    limits = ", ".join(f"{rate:.0f} GFLOP/s in {p}" for p, rate in result["matmul_gflops"].items())
    lines += [
        f"  ({side}x{side} product: {limits}; a target token: {result['flops_per_target_token'] / 1e6:.1f} MFLOP)",
        "",
    ]
    return "\n".join(lines + verdicts(result))


def verdicts(result: dict[str, Any]) -> list[str]:
    """What is demanded, and whether it was reached."""
    lines = []
    for row in result["rates"]:
        if row["name"].startswith("tenko"):
            goal, ratio = GOALS[row["precision"]], row["over_fairseq"]
            what = f"{row['ranks']} rank{'s' * (row['ranks'] > 1)}, {row['name']}"
            lines.append(
                f"{what}: at least {goal:g}x demanded, {ratio:.2f}x: {'reached' if ratio >= goal else 'MISSED'}"
            )
    for name, update in result["update"].items():
        if "overhead" in update:
            share = update["overhead"]
            verdict = "reached" if share < OVERHEAD_GOAL else "MISSED"
            lines.append(f"{name}: under {OVERHEAD_GOAL:.0%} outside the model demanded, {share:.1%}: {verdict}")
    return lines
