"""`tenko inspect`: what an artefact's file holds, as a table whose bytes add up to the file's size, or as JSON."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from tenko.compression.contents import Contents, Row

WIDTH = 100
"""Columns of the table where the output is no terminal."""


def inspect(model: str | None, run_dir: Path | None, stage: str | None, *, all_tensors: bool, as_json: bool) -> None:
    """Print the contents of a model's file.

    Args:
        model: the file, or what `models.choose` takes: a name of a model that ships, an artefact's folder; None takes
            the artefact of a run.
        run_dir, stage: the run, and the stage's name, None for the last finished one.
        all_tensors: a row for every tensor, not one for all that are alike (`grouped`).
        as_json: one JSON object in place of the table, always with every tensor.

    Raises:
        ValueError: as `models.choose` and `read_artefact`, or an exported model.
    """
    if model is not None and run_dir is None and stage is None and Path(model).is_file():
        artefact = Path(model)
    else:
        from tenko.nmt.pretrained import pretrained

        from .models import choose

        if model is not None and not Path(model).exists() and model not in pretrained():
            valid = ", ".join([*pretrained(), "a model file", "the folder of an artefact"])
            raise ValueError(f"{model}: no such file; valid: {valid}")
        chosen = choose(model, run_dir, stage, exported=False)
        artefact = chosen.folder
        if not chosen.is_artefact:
            raise ValueError(f"{artefact}: is exported for CTranslate2; give the artefact that it was made of")
    from tenko.compression.contents import grouped, read_contents

    contents = read_contents(artefact)
    if as_json:
        print(json.dumps(as_document(contents)))
        return
    console = Console(width=None if sys.stdout.isatty() else WIDTH, highlight=False, soft_wrap=False)
    console.print(_headline(contents))
    console.print(_table(contents, list(contents.rows) if all_tensors else grouped(contents.rows)))
    console.print(
        f"The same model in fp32 takes {contents.fp32_bytes:,} bytes ({contents.fp32_bytes / 1e6:,.2f} MB), "
        f"{contents.factor:.1f} times as many."
    )


def as_document(contents: Contents) -> dict[str, object]:
    """The contents as JSON values; bytes of tensors, header and zstd add up to `file_bytes`."""
    tensors = [{**dataclasses.asdict(row), "bits": row.bits} for row in contents.rows]
    for tensor in tensors:
        del tensor["tensors"]
    return {
        "file": str(contents.file),
        "format": contents.format,
        "metadata": contents.metadata,
        "file_bytes": contents.file_bytes,
        "header_bytes": contents.header_bytes,
        "zstd_bytes": contents.zstd_bytes,
        "elements": contents.elements,
        "fp32_bytes": contents.fp32_bytes,
        "factor": contents.factor,
        "tensors": tensors,
    }


def _headline(contents: Contents) -> Text:
    known = [f"{key} {contents.metadata[key]}" for key in ("technique", "direction") if key in contents.metadata]
    return Text(_plain(", ".join([str(contents.file), f"format {contents.format}", *known])))


def _table(contents: Contents, rows: list[Row]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold", show_footer=False)
    table.add_column("tensor", overflow="fold", ratio=1)
    table.add_column("scheme", no_wrap=True)
    for title in ("n", "shape", "bits", "bytes"):
        table.add_column(title, justify="right", no_wrap=True)
    for row in rows:
        tied = f" (tied: {len(row.tied)})" if row.tied else ""
        shape = "" if row.shape is None else "x".join(map(str, row.shape)) or "1"
        name = Text(_plain(row.name) + tied)
        table.add_row(name, row.scheme, str(row.tensors), shape, f"{row.bits:.2f}", f"{row.bytes:,}")
    table.add_row("header", "", "", "", "", f"{contents.header_bytes:,}")
    if contents.zstd_bytes:
        table.add_row("zstd", "", "", "", "", f"{contents.zstd_bytes:,}")
    bits = 8 * contents.file_bytes / max(contents.elements, 1)
    count = str(len(contents.rows))
    table.add_row("total", "", count, f"{contents.elements:,}", f"{bits:.2f}", f"{contents.file_bytes:,}", style="bold")
    return table


def _plain(text: str) -> str:
    """Text out of a file without what would steer a terminal."""
    return text if text.isprintable() else ascii(text)
