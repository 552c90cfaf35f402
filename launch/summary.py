"""The outcome of a run in plain text: a table of stages and sample translations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .recipe import StageSpec

Results = Sequence[tuple[StageSpec, dict[str, Any]]]
"""Finished stages with the contents of their result.json."""

COLUMNS = ("stage", "BLEU", "chrF", "artefact", "tokens/s", "seconds", "wire sent", "fp32 would", "ratio")


def stage_rows(results: Results) -> list[list[str]]:
    """The cells of a table of stages, as text in the order of COLUMNS; a figure that a stage has not is `-`."""
    rows = []
    for spec, result in results:
        wire = result.get("wire") or {}
        sent, full = wire.get("bytes_sent"), wire.get("fp32_bytes")
        rows.append(
            [
                spec.name,
                _number(result.get("bleu"), ".2f"),
                _number(result.get("chrf"), ".2f"),
                _size(result.get("artefact_bytes")),
                _number(result.get("tokens_per_second"), ",.0f"),
                _number(result.get("seconds"), ",.1f"),
                _size(sent or None),
                _size(full or None),
                f"{full / sent:.1f}x" if sent and full else "-",
            ]
        )
    return rows


def stage_table(results: Results) -> str:
    """The table of stages, aligned; the first column left, figures right."""
    rows = [list(COLUMNS), *stage_rows(results)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(COLUMNS))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        lines.append("  ".join(cells).rstrip())
    lines.insert(1, "  ".join("-" * width for width in widths))
    signature = next((result["bleu_signature"] for _, result in results if result.get("bleu_signature")), None)
    return "\n".join([*lines, *([f"BLEU is {signature}"] if signature else [])])


def samples_lines(result: dict[str, Any], count: int) -> list[str]:
    """The first sample translations, three lines each."""
    lines: list[str] = []
    for sample in (result.get("samples") or [])[:count]:
        lines += [
            f"  {mark} {sample.get(key, '')}"
            for key, mark in (("source", ">"), ("reference", "="), ("hypothesis", "<"))
        ]
        lines.append("")
    return lines[:-1]


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _size(value: float | None) -> str:
    return "-" if value is None else f"{value / 1e6:,.2f} MB" if value < 1e8 else f"{value / 1e6:,.0f} MB"
