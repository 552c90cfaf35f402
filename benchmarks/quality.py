"""What do 3-bit gradients cost in BLEU? The same recipe with quantized and with fp32 communication, several seeds each.

    python benchmarks/quality.py                     # recipes/demo.yaml, seeds 1 2 3: six runs
    python benchmarks/quality.py --set train.max_update=500 --seeds 1 2

Runs go to --runs; what is finished there is not done again. The table gives test BLEU of each run, and the mean
difference of the pairs (same seed, same data order, same initial weights) with its 95 % interval by Student's t.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
from pathlib import Path

# 97.5 % quantiles of Student's t for 1 to 9 degrees of freedom.
T975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
ROUTES = {"3/4 bits": [], "fp32": ["comm.route=fp32"]}


def run(recipe: str, directory: Path, settings: list[str]) -> dict:
    """One whole run; the figures of its first stage."""
    command = [sys.executable, "-m", "tenko.launch.cli", "run", recipe, "--run-dir", str(directory), *settings]
    with (directory.parent / f"{directory.name}.log").open("a") as log:
        subprocess.run(command, check=True, stdout=log, stderr=subprocess.STDOUT)
    return json.loads((directory / "1-train" / "result.json").read_text())


def interval(differences: list[float]) -> tuple[float, float]:
    """Mean and half width of its 95 % interval."""
    mean = statistics.mean(differences)
    if len(differences) < 2:
        return mean, math.inf
    half = T975[len(differences) - 2] * statistics.stdev(differences) / math.sqrt(len(differences))
    return mean, half


def main() -> None:
    """Run, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="demo")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="at most 10")
    parser.add_argument("--runs", type=Path, default=Path("runs/quality"))
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="settings for all runs")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    options.runs.mkdir(parents=True, exist_ok=True)
    results: dict[str, list[dict]] = {route: [] for route in ROUTES}
    for seed in options.seeds:
        for route, settings in ROUTES.items():
            name = f"{route.replace('/', '-').replace(' ', '-')}-seed-{seed}"
            results[route].append(run(options.recipe, options.runs / name, [f"seed={seed}", *settings, *options.set]))
            print(f"{route}, seed {seed}: BLEU {results[route][-1]['bleu']:.2f}", flush=True)
    print(f"\n{'communication':14}  {'BLEU by seed':24}  mean   chrF   bytes sent by a rank")
    for route, found in results.items():
        bleus = [r["bleu"] for r in found]
        chrf = statistics.mean(r["chrf"] for r in found)
        print(
            f"{route:14}  {' '.join(f'{b:.2f}' for b in bleus):24}  {statistics.mean(bleus):.2f}  {chrf:.2f}  "
            f"{found[0]['wire']['bytes_sent'] / 1e6:,.0f} MB"
        )
    thin, full = results.values()
    mean, half = interval([a["bleu"] - b["bleu"] for a, b in zip(thin, full, strict=True)])
    print(f"\n3/4 bits less fp32: {mean:+.2f} BLEU in the mean, 95 % interval {mean - half:+.2f} to {mean + half:+.2f}")
    print(thin[0]["bleu_signature"])
    if options.json:
        options.json.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
