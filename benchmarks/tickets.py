"""Lottery tickets against their controls and the dense model: BLEU by the fraction of weights left, from finished runs.

    for seed in 1 2 3; do tenko run lottery seed=$seed --run-dir runs/lottery-$seed; done
    python benchmarks/tickets.py runs/lottery-1 runs/lottery-2 runs/lottery-3
    python benchmarks/tickets.py runs/lottery-1 runs/rewound-to-0 --out /tmp --name rewinding
    python benchmarks/tickets.py runs/lottery-4 --earlier docs/results/tickets.json     # other seeds, measured before

Runs no training. A run directory may hold several lottery stages; of one that is not finished the rounds that are
count. Equal ones of several runs (seeds) become one line of the plot, its mean with a band from the lowest to the
highest. A lottery with `fraction: 0` and `control: no_rewind` is the dense model, trained on: its rounds stand beside
the tickets of the same run that took as many updates. Each round is judged by sacrebleu's paired bootstrap on the test
set's translations, against the dense model of the same run, and against the first tickets among the runs of its seed
with as many weights left. Writes tickets.json, tickets.md and tickets.png to docs/results; --out and --name choose
others.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from tenko.compression import lottery
from tenko.compression.config import LotteryConfig
from tenko.launch.lottery_report import Series, png, tickets_figure
from tenko.launch.rundir import RESULT, RunDirectory
from tenko.launch.stage_results import HYPOTHESES
from tenko.launch.stage_tools import corpus_of
from tenko.nmt.config import TrainConfig
from tenko.nmt.significance import Difference, paired_bootstrap

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "results"
LONGER = "dense, as many updates"
"""The series of a lottery that prunes nothing; its fractions are those of the tickets with as many updates."""
NAMES = {
    "none": "tickets",
    "random": "random masks",
    "reinit": "redrawn weights",
    "no_rewind": "no rewinding",
    "stabilised": "stabilised (Brix et al.)",
    "constant": "signs only",
}


@dataclass(frozen=True)
class Measured:
    """One round of one run, or its dense model (series dense, all weights left)."""

    run: str
    seed: int
    series: str
    fraction: float
    """Of the prunable weights, left."""
    bleu: float
    bytes: int
    """Of the artefact's file."""
    hypotheses: tuple[str, ...]


def label(config: LotteryConfig) -> str:
    """Names a line of the plot: what it is, and what of its settings is not the usual."""
    if config.control == "no_rewind" and config.fraction == 0:
        return LONGER
    parts = [NAMES[config.control]]
    if config.control != "reinit":
        parts.append(f"rewound to {config.rewind_to}" if config.control != "no_rewind" else "")
    parts += ["one-shot"] if config.one_shot and not config.masks_of else []
    parts += [f"scope {config.scope}"] if config.scope != "global" and config.control != "stabilised" else []
    parts += ["embeddings too"] if config.embeddings else []
    parts += ["moments zero"] if config.moments == "zero" and config.control in ("none", "random") else []
    return ", ".join(part for part in parts if part)


def read_run(path: Path) -> tuple[list[Measured], list[str]]:
    """All that a run measured, the dense model first, and the references of its test set.

    Raises:
        ValueError: no round of a lottery in it is finished.
    """
    run = RunDirectory.read(path)
    recipe, found = run.recipe, list[Measured]()
    of_tickets: dict[int, float] = {}  # what is left, by round

    def add(folder: Path, series: str, fraction: float) -> None:
        result = json.loads((folder / RESULT).read_text())
        lines = tuple((folder / HYPOTHESES).read_text(encoding="utf-8").split("\n")[:-1])
        entry = Measured(str(path), recipe.seed, series, fraction, result["bleu"], result["artefact_bytes"], lines)
        found.append(entry)

    for index, spec in enumerate(recipe.stages):
        folder = run.stage_directory(index)
        if isinstance(spec.config, TrainConfig) and run.is_finished(index):
            found.clear()  # a lottery is held to the training right before it
            add(folder, "dense", 1.0)
        elif isinstance(spec.config, LotteryConfig):
            for this in lottery.rounds(spec.config):
                if (folder / this.folder / RESULT).is_file():
                    result = json.loads((folder / this.folder / RESULT).read_text())
                    series, fraction = label(spec.config), result["fraction_remaining"]
                    if series.startswith(NAMES["none"]) and not spec.config.one_shot:
                        of_tickets.setdefault(this.number, fraction)
                    if series == LONGER:
                        fraction = of_tickets.get(this.number)
                    if fraction is not None:
                        add(folder / this.folder, series, fraction)
    if len(found) < 2:
        raise ValueError(f"{path}: holds no finished round of a lottery")
    texts = corpus_of(recipe).text("test")
    return found, list(texts[("en", "cs").index(recipe.direction.split("-")[1])])


def judge(
    measured: Sequence[Measured], references: Sequence[str], tickets: Mapping[tuple[int, float], Measured]
) -> list[dict[str, Any]]:
    """The rounds of one run with their differences from its dense model and from the tickets.

    Args:
        measured: of `read_run`.
        references: of the test set.
        tickets: by seed and fraction left; what is compared with them is not from them.
    """
    dense, *others = measured
    against_dense = paired_bootstrap(references, dense.hypotheses, [entry.hypotheses for entry in others])
    rows = [_row(dense)]
    for entry, difference in zip(others, against_dense, strict=True):
        row = {**_row(entry), "dense": _difference(difference)}
        ticket = tickets.get((entry.seed, entry.fraction))
        if ticket is not None and ticket.series != entry.series:
            row["ticket"] = _difference(paired_bootstrap(references, ticket.hypotheses, [entry.hypotheses])[0])
        rows.append(row)
    return rows


def read_earlier(path: Path) -> dict[str, Any]:
    """What an earlier call of this program wrote as .json, and its `sources`: command and commit of all its rows.

    Raises:
        ValueError: it is no such file.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        document["sources"] = [*document.get("earlier", []), {key: document[key] for key in ("command", "commit")}]
        wanted = {field.name for field in fields(Measured)} - {"hypotheses"}
        _ = document["sentences"]
        for row in document["rows"]:
            if missing := wanted - row.keys():
                raise KeyError(*sorted(missing))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not a table of benchmarks/tickets.py ({type(error).__name__}: {error})") from None
    return document


def _row(entry: Measured) -> dict[str, Any]:
    return {
        "run": entry.run,
        "seed": entry.seed,
        "series": entry.series,
        "fraction": entry.fraction,
        "bleu": entry.bleu,
        "bytes": entry.bytes,
    }


def _difference(difference: Difference) -> dict[str, float]:
    return {"delta": difference.delta, "p": difference.p}


def markdown(rows: Sequence[dict[str, Any]], sources: Sequence[dict[str, str]], sentences: int, name: str) -> str:
    """The tables: each series by weights left, and the controls against the tickets.

    Args:
        rows: of `judge`.
        sources: command and commit by which rows came, the newest last.
        sentences: in the test set.
        name: of the plot's file, without its ending.
    """
    dense = [row for row in rows if row["series"] == "dense"]
    seeds = sorted({row["seed"] for row in rows})
    names = list(dict.fromkeys(row["series"] for row in rows if row["series"] != "dense"))
    fractions = sorted({row["fraction"] for row in rows if row["series"] != "dense"}, reverse=True)

    def at(name: str, fraction: float) -> list[dict[str, Any]]:
        return [row for row in rows if row["series"] == name and row["fraction"] == fraction]

    def cell(found: Sequence[dict[str, Any]], against: str, *, bleu: bool = True) -> str:
        judged = [row[against] for row in found if against in row]
        if not judged:
            return "-"
        mean = f"{statistics.mean(row['bleu'] for row in found):.2f}, " if bleu else ""
        ps = " ".join(f"{entry['p']:.3f}" for entry in judged)
        return f"{mean}{statistics.mean(entry['delta'] for entry in judged):+.2f} (p {ps})"

    lines = [
        "# Lottery tickets: BLEU by the weights left",
        "",
        f"{'; '.join('`{command}`, commit {commit}'.format_map(source) for source in sources)}. "
        f"Seeds {' '.join(map(str, seeds))}; means over seeds, of as many as have a p. Dense: "
        f"{statistics.mean(row['bleu'] for row in dense):.2f} BLEU, "
        f"{statistics.mean(row['bytes'] for row in dense):,.0f} bytes. BLEU is of {sentences} test sentences, by the "
        "artefact read back from disk; bytes are of its file; p is of sacrebleu's paired bootstrap (1,000 resamples), "
        "one for each seed.",
        "",
        f"![BLEU by the weights left]({name}.png)",
        "",
        "BLEU, less dense:",
        "",
        f"| weights left | bytes | {' | '.join(names)} |",
        f"|---|---|{'---|' * len(names)}",
    ]
    for fraction in fractions:
        sizes = [row["bytes"] for name in names for row in at(name, fraction) if name != LONGER]
        cells = [cell(at(name, fraction), "dense") for name in names]
        lines.append(f"| {fraction:.1%} | {statistics.mean(sizes):,.0f} | {' | '.join(cells)} |")
    controls = [name for name in names if any("ticket" in row for row in rows if row["series"] == name)]
    if controls:
        lines += [
            "",
            "Controls, less the tickets with as many weights left:",
            "",
            f"| weights left | {' | '.join(controls)} |",
            f"|---|{'---|' * len(controls)}",
        ]
        for fraction in fractions:
            cells = [cell(at(name, fraction), "ticket", bleu=False) for name in controls]
            lines.append(f"| {fraction:.1%} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def report(args: argparse.Namespace) -> None:
    """Read the runs, compare, write table and plot.

    Raises:
        ValueError: a run or an earlier table can't be read, or they don't belong together.
    """
    runs = [read_run(path) for path in args.runs]
    if any(references != runs[0][1] for _, references in runs):
        raise ValueError("these runs have different test sets, whose BLEU can't be compared")
    tickets: dict[tuple[int, float], Measured] = {}
    for measured, _ in runs:
        for entry in measured:
            if entry.series.startswith(NAMES["none"]):
                tickets.setdefault((entry.seed, entry.fraction), entry)
    rows = [row for measured, references in runs for row in judge(measured, references, tickets)]
    sentences = len(runs[0][1])
    before = read_earlier(args.earlier) if args.earlier else {"sentences": sentences, "rows": [], "sources": []}
    if again := {row["seed"] for row in rows} & {row["seed"] for row in before["rows"]}:
        raise ValueError(f"{args.earlier}: has seeds {sorted(again)} too, which only runs put side by side can compare")
    if before["sentences"] != sentences:
        raise ValueError(f"{args.earlier}: its test set has {before['sentences']} sentences, these have {sentences}")
    rows = [*before["rows"], *rows]
    named = [] if args.name == "tickets" else ["--name", args.name]
    command = " ".join(["python benchmarks/tickets.py", *map(str, args.runs), *named])
    command += f" --earlier {args.earlier}" if args.earlier else ""
    commit = subprocess.check_output(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, text=True).strip()
    args.out.mkdir(parents=True, exist_ok=True)
    document = {"command": command, "commit": commit, "earlier": before["sources"], "sentences": sentences}
    document["rows"] = rows
    (args.out / f"{args.name}.json").write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n")
    text = markdown(rows, [*before["sources"], {"command": command, "commit": commit}], sentences, args.name)
    (args.out / f"{args.name}.md").write_text(text)
    (args.out / f"{args.name}.png").write_bytes(png(lambda: tickets_figure(_series(rows), _dense(rows))))
    print(text)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="run directories with lotteries")
    parser.add_argument("--earlier", type=Path, help="a .json of this program, with seeds whose runs need not be there")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of tickets.json, .md and .png")
    parser.add_argument("--name", default="tickets", help="of these files, in place of tickets")
    args = parser.parse_args()
    try:
        report(args)
    except ValueError as error:
        parser.exit(2, f"error: {error}\n")


def _series(rows: Sequence[dict[str, Any]]) -> list[Series]:
    found: dict[str, dict[float, list[float]]] = {}
    for row in rows:
        if row["series"] != "dense":
            found.setdefault(row["series"], {}).setdefault(row["fraction"], []).append(row["bleu"])
    return [Series(name, bleus) for name, bleus in found.items()]


def _dense(rows: Sequence[dict[str, Any]]) -> list[float]:
    return [row["bleu"] for row in rows if row["series"] == "dense"]


if __name__ == "__main__":
    main()
