"""What do thin wires cost in BLEU? The same recipe by several routes, several seeds each.

    python benchmarks/quality.py                     # recipes/scratch.yaml, seeds 1 2 3, all routes
    python benchmarks/quality.py --set train.max_update=500 --seeds 1 2 --routes fp32 server

Runs go to --runs; what is finished there is not done again. With --json, figures of earlier calls are read from that
file, kept and not measured again, so that routes and seeds may be added one by one. The table gives test BLEU of each
run, and each route's mean difference from fp32 over the pairs (same seed, same data order, same initial weights) with
its 95 % interval by Student's t.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import option_types as types

from tenko.launch.recipe import load
from tenko.nmt.config import TrainConfig

# 97.5 % quantiles of Student's t for 1 to 9 degrees of freedom; t975 has the others.
T975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
SPLIT = (
    "comm.split=[{route: server, match: ['*embed_tokens*']}, {route: fp32, max_dims: 1}, "
    "{route: all_reduce, min_dims: 2, exclude: ['*embed_tokens*']}]"
)
ROUTES = {
    "fp32": ["comm.route=fp32"],
    "3/4 bits": [],
    "3/4 bits, nearest": ["comm.rounding=nearest"],
    "server": ["comm.route=server"],
    "server, delta": ["comm.route=server", "comm.weights=delta"],
    "split": ["comm.route=split", SPLIT],
}
"""nearest: gradients are rounded to the nearest level, not stochastically. server: 3-bit gradients up, LAQ weights of 4
bits down; delta: what the weights changed by, in 4 bits. split: the embeddings to a LAQ server, vectors in fp32, the
other matrices at 3/4 bits."""


def run(recipe: str, directory: Path, settings: list[str]) -> dict:
    """One whole run; the figures of its first stage."""
    command = [sys.executable, "-m", "tenko.launch.cli", "run", recipe, "--run-dir", str(directory), *settings]
    with (directory.parent / f"{directory.name}.log").open("a") as log:
        subprocess.run(command, check=True, stdout=log, stderr=subprocess.STDOUT)
    return json.loads((directory / "1-train" / "result.json").read_text())


def t975(freedom: int) -> float:
    """97.5 % quantile of Student's t, to 0.001. Source: Abramowitz & Stegun 26.7.5, beyond the table."""
    if freedom <= len(T975):
        return T975[freedom - 1]
    z = statistics.NormalDist().inv_cdf(0.975)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return z + sum(term / freedom**power for power, term in enumerate(terms, start=1))


def interval(differences: list[float]) -> tuple[float, float]:
    """Mean and half width of its 95 % interval."""
    mean = statistics.mean(differences)
    if len(differences) < 2:
        return mean, math.inf
    half = t975(len(differences) - 1) * statistics.stdev(differences) / math.sqrt(len(differences))
    return mean, half


def main() -> None:
    """Run, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="scratch")
    parser.add_argument("--seeds", type=types.integer(0), nargs="+", default=[1, 2, 3])
    parser.add_argument("--runs", type=Path, default=Path("runs/quality"))
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="settings for all runs")
    parser.add_argument("--routes", nargs="+", choices=ROUTES, default=list(ROUTES), metavar="ROUTE")
    parser.add_argument("--json", type=types.new_file, help="add the figures to those in this file")
    options = parser.parse_args()
    for route in options.routes:
        try:
            first = load(options.recipe, [*ROUTES[route], *options.set]).stages[0]
        except (ValueError, OSError) as error:
            parser.error(f"--recipe {options.recipe}, route {route}: {error}")
        if not isinstance(first.config, TrainConfig) or first.name != "train":
            parser.error(f"--recipe {options.recipe}: its first stage must be train, is {first.name}")
    options.runs.mkdir(parents=True, exist_ok=True)
    results: dict[str, dict[str, dict]] = {}
    if options.json and options.json.exists():
        results = json.loads(options.json.read_text())
    for route in options.routes:
        for seed in options.seeds:
            if str(seed) in results.get(route, {}):
                continue
            name = f"{re.sub('[^a-z0-9]+', '-', route)}-seed-{seed}"
            done = run(options.recipe, options.runs / name, [f"seed={seed}", *ROUTES[route], *options.set])
            results.setdefault(route, {})[str(seed)] = done
            print(f"{route}, seed {seed}: BLEU {done['bleu']:.2f}", flush=True)
            if options.json:
                options.json.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    print(table(results))


def table(results: dict[str, dict[str, dict]]) -> str:
    """Of results by route and seed."""
    lines = [
        "| route | BLEU by seed | mean | less fp32 (95 % interval) | chrF | MB sent by a rank |",
        "|---|---|---|---|---|---|",
    ]
    full = results.get("fp32", {})
    for route, found in results.items():
        bleus = {seed: r["bleu"] for seed, r in found.items()}
        pairs = [bleu - full[seed]["bleu"] for seed, bleu in bleus.items() if seed in full]
        difference = ""
        if route != "fp32" and pairs:
            mean, half = interval(pairs)
            spread = f"{mean - half:+.2f} to {mean + half:+.2f}" if len(pairs) > 1 else "one pair: no interval"
            difference = f"{mean:+.2f} ({spread})"
        wire = next(iter(found.values()))["wire"]["bytes_sent"] / 1e6
        lines.append(
            f"| {route} | {' '.join(f'{b:.2f}' for b in bleus.values())} | {statistics.mean(bleus.values()):.2f} "
            f"| {difference} | {statistics.mean(r['chrf'] for r in found.values()):.2f} | {wire:,.0f} |"
        )
    signature = next(iter(next(iter(results.values())).values()))["bleu_signature"]
    return "\n".join([*lines, "", signature])


if __name__ == "__main__":
    main()
