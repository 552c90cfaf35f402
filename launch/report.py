"""report.html: one file that needs no network: table of stages, curves, sample translations, the resolved recipe."""

from __future__ import annotations

import logging
from html import escape
from pathlib import Path
from typing import Any

from tenko.compression.config import LotteryConfig

from .errors import one_line
from .files import write_text_atomic
from .metrics import read_metrics
from .recipe import StageSpec, dump
from .rundir import METRICS, REPORT, RunDirectory
from .summary import COLUMNS, stage_rows

logger = logging.getLogger(__name__)

SAMPLES = 20
"""Sample translations shown of a stage."""

_CSS = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 76rem; margin: 2rem auto; padding: 0 1rem; }
h1 { margin-bottom: 0; } h2 { margin-top: 2.5rem; border-bottom: 1px solid var(--line); }
table { border-collapse: collapse; } th, td { padding: .3rem .8rem; border-bottom: 1px solid var(--line); }
th { text-align: left; font-weight: 600; } .figures td + td, .figures th + th { text-align: right; }
.figures td { font-variant-numeric: tabular-nums; white-space: nowrap; }
.wide { overflow-x: auto; } .samples { width: 100%; }
.samples td { vertical-align: top; width: 33%; overflow-wrap: anywhere; }
.plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(30rem, 100%), 1fr)); gap: 1.5rem; }
.plots { margin-top: 1.5rem; } code { overflow-wrap: anywhere; } .quiet { opacity: .7; }
figure { margin: 0; } figcaption { font-weight: 600; } svg { width: 100%; height: auto; }
pre { background: var(--soft); padding: 1rem; overflow-x: auto; }
"""


def write_report(run: RunDirectory) -> Path:
    """Write report.html of the run, and one in the folder of each stage that has begun.

    Returns:
        The path of the run's.

    Raises:
        ValueError: a damaged metrics.jsonl or result.json; names file and line.
        OSError: it cannot be written.
    """
    sections: list[str] = []
    rows: list[tuple[StageSpec, dict[str, Any]]] = []
    lotteries: dict[str, Any] = {}
    for index, spec in enumerate(run.recipe.stages):
        directory = run.stage_directory(index)
        result = run.result(index)
        if result is not None:
            rows.append((spec, result))
        rounds = _rounds(run, index, result)
        if len(rounds) > 1:  # the first is the dense model
            lotteries[spec.name] = rounds
        if not directory.is_dir():
            sections.append(f"<h2>{escape(spec.name)}</h2><p class=quiet>Not begun.</p>")
            continue
        section = _stage(spec, directory, result, lotteries)
        sections.append(section)
        table = _table([(spec, result)] if result is not None else [])
        title = f"{run.recipe.name}: {spec.name}"
        write_text_atomic(directory / REPORT, _page(title, run, table + section))
    path = run.path / REPORT
    write_text_atomic(path, _page(run.recipe.name, run, _table(rows) + "".join(sections)))
    return path


def write_report_or_warn(run: RunDirectory) -> None:
    """`write_report`, in the course of a run, which a report that can't be drawn does not end.

    Raises:
        OSError: a full disk will fail the next stage as well, so it is said now.
    """
    try:
        write_report(run)
    except OSError:
        raise
    except Exception as error:
        logger.warning("could not write %s: %s: %s", run.path / REPORT, type(error).__name__, one_line(error))


def _page(title: str, run: RunDirectory, body: str) -> str:
    recipe = run.recipe
    source, target = ({"en": "English", "cs": "Czech"}[side] for side in recipe.direction.split("-"))
    workers = "1 worker" if recipe.workers == 1 else f"{recipe.workers} workers"
    stages = ", then ".join(escape(spec.name) for spec in recipe.stages)
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>tenko: {escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{_CSS}</style></head><body>'
        f"<h1>{escape(title)}</h1><p>{source} to {target}, {workers}, seed {recipe.seed}: {stages}.</p>"
        f"{body}<h2>Recipe, resolved</h2><pre>{escape(dump(recipe))}</pre></body></html>\n"
    )


def _table(rows: list[tuple[StageSpec, dict[str, Any]]]) -> str:
    if not rows:
        return "<p>No stage is finished yet.</p>"
    head = "".join(f"<th>{escape(column)}</th>" for column in COLUMNS)
    lines = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>" for cells in stage_rows(rows)
    )
    signatures = {
        name: result[key]
        for name, key in (("BLEU", "bleu_signature"), ("chrF", "chrf_signature"))
        for _, result in rows
        if result.get(key)
    }
    notes = [f"{name}: <code>{escape(str(signature))}</code>" for name, signature in signatures.items()]
    if sentences := next((result["sentences"] for _, result in rows if result.get("sentences")), None):
        notes.insert(0, f"{sentences:,} test sentences, translated by the artefact read back from disk")
    notes.append("wire: bytes one worker sent, beside what an fp32 ring all-reduce would have")
    table = f"<div class=wide><table class=figures><tr>{head}</tr>{lines}</table></div>"
    return f"{table}<p class=quiet>{'; '.join(notes)}.</p>"


def _rounds(run: RunDirectory, index: int, result: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The rounds of a stage that is a lottery, finished or not; of another none."""
    config = run.recipe.stages[index].config
    if result is not None or not isinstance(config, LotteryConfig) or not run.is_finished(run.training_before(index)):
        return (result or {}).get("rounds") or []
    from .lottery_report import finished_rows  # matplotlib, a second to import

    return finished_rows(run.stage_directory(run.training_before(index)), run.stage_directory(index), config)


def _stage(spec: StageSpec, directory: Path, result: dict[str, Any] | None, lotteries: dict[str, Any]) -> str:
    parts = [f"<h2>{escape(spec.name)}</h2>"]
    entries = read_metrics(directory / METRICS)
    if result is None:
        updates = [entry["update"] for entry in entries if isinstance(entry.get("update"), int)]
        reached = f"; the last line of metrics is of update {max(updates):,}" if updates else ""
        if spec.name in lotteries and isinstance(spec.config, LotteryConfig):
            reached = f"; {len(lotteries[spec.name]) - 1} of {len(spec.config.prunings)} rounds are"
        parts.append(f"<p class=quiet>Not finished{reached}.</p>")
    elif facts := _facts(result):
        parts.append(f"<p>{escape(facts)}.</p>")
    if spec.name in lotteries:
        from .lottery_report import tickets_html

        parts.append(tickets_html(spec.name, lotteries))
    if entries:
        from .plots import stage_plots  # matplotlib, a second to import

        figures = "".join(
            f"<figure><figcaption>{escape(title)}</figcaption>{svg}</figure>" for title, svg in stage_plots(entries)
        )
        parts.append(f"<div class=plots>{figures}</div>")
    samples = (result or {}).get("samples") or []
    if samples:
        lines = "".join(
            "<tr>" + "".join(f"<td>{escape(str(sample.get(key, '')))}</td>" for key in _SAMPLE) + "</tr>"
            for sample in samples[:SAMPLES]
        )
        head = "".join(f"<th>{key.capitalize()}</th>" for key in _SAMPLE)
        parts.append(f"<h3>Unseen sentences</h3><table class=samples><tr>{head}</tr>{lines}</table>")
    return "".join(parts)


def _facts(result: dict[str, Any]) -> str:
    """What the table has no column for: `2,000 updates, 1.57M parameters, bf16`."""
    facts = []
    if isinstance(result.get("updates"), int):
        facts.append(f"{result['updates']:,} updates")
    if isinstance(result.get("parameters"), int):
        facts.append(f"{result['parameters'] / 1e6:.2f}M parameters")
    if result.get("precision"):
        facts.append(str(result["precision"]))
    if isinstance(result.get("valid_bleu"), int | float):
        facts.append(f"validation BLEU {result['valid_bleu']:.2f} at its best")
    if isinstance(result.get("threads"), int):
        facts.append(f"{result['threads']} threads for tokens/s" if result["threads"] > 1 else "tokens/s of one thread")
    return ", ".join(facts)


_SAMPLE = ("source", "reference", "hypothesis")
