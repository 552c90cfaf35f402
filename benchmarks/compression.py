"""The Quant-Noise table: {post-training, QAT, Quant-Noise} x {int8, int4, iPQ, iPQ + int8}, from one trained model; and
ternary (TWN, loss-aware) and binary weights.

    python benchmarks/compression.py --model en-cs          # the model that ships; hours on one core
    python benchmarks/compression.py --model runs/embedded/1-train/artefact --updates 300 --jobs 2
    python benchmarks/compression.py --table                # only the tables, of what is finished
    python benchmarks/compression.py --schemes int8 int4 --seeds 1 2 3 --name compression_scalar    # part of it
    python benchmarks/compression.py --schemes int8 int4 --taught --seeds 1 2 3 --name compression_taught

Every cell is a recipe, written to --runs and run by `tenko run`; what is finished is not done again. Bytes are of the
file on disk, BLEU of the model read back from it, on the corpus's test split; differences from the model trained as
long without quantization are judged by sacrebleu's paired bootstrap. Writes docs/results/compression.json and .md, or
under another --name.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tenko.launch.models import began_with_another
from tenko.launch.rundir import RunDirectory
from tenko.launch.stage_results import HYPOTHESES
from tenko.nmt.significance import paired_bootstrap

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "results"
PQ = {"blocks": {"ffn": 4, "embedding": 3, "attention": 4}, "bits": 1.53}
"""The blocks of recipes/ipq.yaml, which has 1.525 bits; the published figures are of 1.53."""
LR = 7e-4
TABLE = ("int8", "int4", "pq", "pq_int8")
FEW_LEVELS = ("ternary", "lat", "binary")
SCHEMES = (*TABLE, *FEW_LEVELS)
METHODS = {
    "none": "trained on, not quantized",
    "ptq": "post-training",
    "qat": "QAT (p = 1)",
    "noise": "Quant-Noise",
    "plain": "iPQ alone",
}


@dataclass(frozen=True)
class Cell:
    """A row of the table: what follows the trained model."""

    scheme: str
    method: str
    stages: tuple[dict[str, Any], ...]
    after: str | None = None
    """The cell whose result it begins with; the trained model by default."""
    shown: bool = field(default=True)

    @property
    def name(self) -> str:
        """Of its recipe and run directory."""
        return f"{self.scheme}-{self.method}"


def cells(updates: int, lr: float, taught: bool = False) -> list[Cell]:
    """All cells, each after the one it needs; every training path but post-training has the same number of updates."""
    settled = {"lr_schedule": "linear", "dropout": 0.0}
    teacher = {**settled, "distill": {"weight": 1.0}} if taught else {}

    def train(count: int) -> dict[str, Any]:
        count = max(count, 3)
        return {
            **{
                "max_update": count,
                "max_tokens": 1500,
                "update_freq": 2,
                "lr": lr,
                "warmup_updates": max(count // 5, 1),
            },
            **{"log_interval": 50, "valid_interval": count, "valid_sentences": 20, "save_interval": max(count // 6, 1)},
            **{"keep_last": 3, "average_last": 1, "clip_norm": 1.0},
        }

    def noise(scheme: str, p: float, count: int, **more: Any) -> dict[str, Any]:
        return {"quant_noise": {"scheme": scheme, "p": p, "train": {**train(count), **teacher}, **more}}

    def thin(count: int) -> dict[str, Any]:
        """Of a model at one or two bits a weight: it underfits, so no dropout, and the rate falls to 0."""
        return {**train(count), "lr": 2 * lr, **settled}

    half = updates // 2
    found = [Cell("fp32", "none", ({"train": {**train(updates), **teacher}},))]
    for scheme, more in (("int8", {}), ("int4", {"clip": "mse"})):
        found += [
            Cell(scheme, "ptq", ({"quantize": {"scheme": scheme, **more}},), after="fp32-none"),
            Cell(scheme, "qat", (noise(scheme, 1.0, updates, **more),)),
            Cell(scheme, "noise", (noise(scheme, 0.5, updates, **more),)),
        ]
    # The noise of product quantization takes half of the updates, a third of the rest each group of iPQ.
    found += [
        Cell("pq", "before-plain", ({"train": train(half)},), shown=False),
        Cell("pq", "before-noise", (noise("pq", 0.1, half, pq=PQ),), shown=False),
    ]
    for scheme in ("pq", "pq_int8"):
        found.append(Cell(scheme, "ptq", ({"quantize": {"scheme": scheme, "pq": PQ}},), after="fp32-none"))
        learned = {"scheme": scheme, "p": 1.0, "pq": {**PQ, "refit_interval": 0}}
        learned["train"] = {**thin(updates), "distill": {"weight": 1.0}}
        found.append(Cell(scheme, "qat", ({"quant_noise": learned},)))
        ipq = {"ipq": {"scheme": scheme, **PQ, "distill": {"weight": 1.0}, "train": thin((updates - half) // 3)}}
        found += [Cell(scheme, method, (ipq,), after=f"pq-before-{method}") for method in ("plain", "noise")]
    for scheme in FEW_LEVELS:
        learned = {"scheme": scheme, "p": 1.0, "train": {**thin(updates), "distill": {"weight": 1.0}}}
        found.append(Cell(scheme, "ptq", ({"quantize": {"scheme": scheme}},), after="fp32-none"))
        found.append(Cell(scheme, "qat", ({"quant_noise": learned},)))
    return found


def recipe(cell: Cell, model: str, direction: str, seed: int, runs: Path) -> dict[str, Any]:
    """The cell as a recipe."""
    start = model if cell.after is None else str(last(runs / f"{cell.after}-{seed}") / "artefact")
    return {
        "name": cell.name,
        "direction": direction,
        "seed": seed,
        "workers": 1,
        "threads": 1,
        "data": {"cache": str(runs / "data")},
        "zstd": 19 if cell.scheme.startswith("pq") else None,
        "stages": [{"pretrained": {"model": start}}, *cell.stages],
    }


def last(run: Path) -> Path:
    """Folder of the last stage of a finished run."""
    return RunDirectory.read(run).find_stage(None)


def finished(run: Path) -> bool:
    """Whether all of its stages are done."""
    if not (run / "config.yaml").is_file():
        return False
    state = RunDirectory.read(run)
    return state.first_unfinished() == len(state.recipe.stages)


def run_all(todo: list[Cell], args: argparse.Namespace) -> None:
    """Run what is not finished, `--jobs` at a time, each when what it begins with is done."""
    for run in (args.runs / f"{cell.name}-{seed}" for cell in todo for seed in args.seeds):
        if (run / "config.yaml").is_file() and (now := began_with_another(RunDirectory.read(run))):
            raise SystemExit(f"{run}: began with another model than {now} holds now; give another --runs")
    failed: list[str] = []

    def work(cell: Cell, seed: int) -> None:
        run = args.runs / f"{cell.name}-{seed}"
        if not finished(run):
            args.runs.mkdir(parents=True, exist_ok=True)
            path = args.runs / f"{cell.name}-{seed}.yaml"
            path.write_text(yaml.safe_dump(recipe(cell, args.model, args.direction, seed, args.runs), sort_keys=False))
            command = [sys.executable, "-m", "tenko.launch.cli", "run", str(path), "--run-dir", str(run)]
            print(f"begins: {cell.name} (seed {seed})", flush=True)
            with (args.runs / f"{cell.name}-{seed}.log").open("w") as log:
                code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=False).returncode
            if code:
                failed.append(f"{log.name}: exit status {code}")
            else:
                print(f"done: {cell.name}: {result(run)['bleu']:.2f} BLEU", flush=True)

    for seed in args.seeds:
        waiting = [cell for cell in todo if cell.after is None], [cell for cell in todo if cell.after is not None]
        for group in waiting:  # what stands alone first, then what builds on it
            with ThreadPoolExecutor(args.jobs) as pool:
                list(pool.map(lambda cell, seed=seed: work(cell, seed), group))
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


def result(run: Path) -> dict[str, Any]:
    """The figures of a finished run's last stage."""
    figures = json.loads((last(run) / "result.json").read_text())
    assert isinstance(figures, dict)
    return figures


def main() -> None:
    """Parse, run, write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="en-cs", help="a model that ships, or an artefact's folder")
    parser.add_argument("--direction", default="en-cs", choices=["en-cs", "cs-en"])
    parser.add_argument("--runs", type=Path, help="where recipes and runs are kept (default: runs/NAME)")
    parser.add_argument("--updates", type=int, default=600, help="of each training path")
    parser.add_argument("--lr", type=float, default=LR, help=f"peak learning rate (default: {LR:g})")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--schemes", nargs="+", default=list(TABLE), choices=SCHEMES, help="rows, beside fp32")
    parser.add_argument(
        "--taught",
        action="store_true",
        help="fp32, int8 and int4 learn from the model they begin with, at a falling rate",
    )
    parser.add_argument("--name", default="compression", help="of the files in docs/results")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, one thread each")
    parser.add_argument("--table", action="store_true", help="write the tables of what is finished, run nothing")
    args = parser.parse_args()
    args.runs = args.runs or Path("runs") / args.name
    every = cells(args.updates, args.lr, args.taught)
    rows = [cell for cell in every if cell.shown and cell.scheme in ("fp32", *args.schemes)]
    needed = {cell.after for cell in rows}
    todo = [cell for cell in every if cell in rows or cell.name in needed]
    if not args.table:
        run_all(todo, args)
    write(todo, args)


def write(todo: list[Cell], args: argparse.Namespace) -> None:
    """The table and its figures, under docs/results."""
    rows = [row for seed in args.seeds for row in _rows([cell for cell in todo if cell.shown], args, seed)]
    about_this_machine = ("runs", "jobs", "table")
    settings = {key: value for key, value in vars(args).items() if key not in about_this_machine}
    settings["commit"] = subprocess.check_output(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, text=True).strip()
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{args.name}.json").write_text(json.dumps({"settings": settings, "rows": rows}, indent=1) + "\n")
    seeds = " ".join(map(str, args.seeds))
    part = f" --lr {args.lr:g}" if args.lr != LR else ""
    part += "" if args.schemes == list(TABLE) else f" --schemes {' '.join(args.schemes)}"
    part += (" --taught" if args.taught else "") + ("" if args.name == "compression" else f" --name {args.name}")
    lines = [
        "# What each way to quantize costs",
        "",
        f"`python benchmarks/compression.py --model {args.model} --direction {args.direction} --updates {args.updates} "
        f"--seeds {seeds}{part}`, commit {settings['commit']}. All begin with the same trained model{_begun(args)}; "
        f"each path of training has {args.updates} updates. Bytes are of the file, BLEU of the model read back from "
        f"it, on {rows[0]['sentences'] if rows else 0} sentences; the difference is from the model trained as long in "
        "fp32, by sacrebleu's paired bootstrap (1,000 resamples).",
        "",
        "| weights | method | seed | file, bytes | times smaller | BLEU | less fp32 |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        against = "" if row["p"] is None else f"{row['delta']:+.2f} (p = {row['p']:.3f})"
        factor = f"{row['factor']:.1f}"
        figures = f"{row['bytes']:,} | {factor} | {row['bleu']:.2f} | {against}"
        lines.append(f"| {row['scheme']} | {METHODS[row['method']]} | {row['seed']} | {figures} |")
    text = "\n".join(lines) + "\n"
    (RESULTS / f"{args.name}.md").write_text(text)
    print(text)


def _rows(shown: list[Cell], args: argparse.Namespace, seed: int) -> list[dict[str, Any]]:
    ready = [cell for cell in shown if finished(args.runs / f"{cell.name}-{seed}")]
    if not ready or ready[0].name != "fp32-none":
        return []
    folders = [last(args.runs / f"{cell.name}-{seed}") for cell in ready]
    figures = [result(args.runs / f"{cell.name}-{seed}") for cell in ready]
    hypotheses = [(folder / HYPOTHESES).read_text().splitlines() for folder in folders]
    references = _references(args, args.runs / f"{ready[0].name}-{seed}")
    differences = [None, *paired_bootstrap(references, hypotheses[0], hypotheses[1:])]
    dense = figures[0]["artefact_bytes"]
    return [
        {
            "scheme": cell.scheme,
            "method": cell.method,
            "seed": seed,
            "bytes": figure["artefact_bytes"],
            "factor": dense / figure["artefact_bytes"],
            "bleu": figure["bleu"],
            "chrf": figure["chrf"],
            "sentences": figure["sentences"],
            "delta": difference.delta if difference else None,
            "p": difference.p if difference else None,
            "seconds": sum(json.loads(path.read_text()).get("seconds") or 0 for path in run_results(folder.parent)),
        }
        for cell, figure, folder, difference in zip(ready, figures, folders, differences, strict=True)
    ]


def _begun(args: argparse.Namespace) -> str:
    """Its BLEU, as the runs have measured it before they trained."""
    run = args.runs / f"fp32-none-{args.seeds[0]}"
    return f" ({RunDirectory.read(run).result(0)['bleu']:.2f} BLEU)" if finished(run) else ""


def run_results(run: Path) -> list[Path]:
    """result.json of each stage of a run."""
    return sorted(run.glob("*/result.json"))


def _references(args: argparse.Namespace, run: Path) -> list[str]:
    """The test split's target sentences, of the corpus that the run was measured on."""
    from tenko.launch.stage_tools import corpus_of

    english, czech = corpus_of(RunDirectory.read(run).recipe).text("test")
    return list(czech if args.direction == "en-cs" else english)


if __name__ == "__main__":
    main()
