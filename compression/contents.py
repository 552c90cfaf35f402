"""What an artefact's file holds, tensor by tensor, in bytes that add up to the file's size exactly."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .layout import short
from .packed import open_artefact


@dataclass(frozen=True, kw_only=True)
class Row:
    """One tensor, or several of one kind."""

    name: str
    """The tensor's; `*` stands for a layer's number in a group's."""
    scheme: str
    """A dense tensor's is its dtype; `+ mask` where only the elements that are not zero are stored."""
    shape: tuple[int, ...] | None
    """Of one tensor, as it is read back; None for a group of several shapes."""
    tensors: int = 1
    """How many."""
    elements: int
    """Of all."""
    bytes: int
    """Of all their parts (codes, scales, mask, ...), before zstd."""
    fp32_bytes: int
    """Of the same tensors as they are read back: four an element of floats."""
    tied: tuple[str, ...] = ()
    """Other names of the same tensor, which take no bytes."""

    @property
    def bits(self) -> float:
        """Bits an element; 0 without elements."""
        return 8 * self.bytes / self.elements if self.elements else 0.0


@dataclass(frozen=True, kw_only=True)
class Contents:
    """A file's bytes: `sum(row.bytes) + header_bytes + zstd_bytes == file_bytes`."""

    file: Path
    format: int
    metadata: dict[str, Any]
    """What `write_artefact` was given, and the technique."""
    rows: tuple[Row, ...]
    """By tensor, in the order of their names; tied tensors once."""
    header_bytes: int
    """Names, shapes and metadata."""
    zstd_bytes: int
    """What zstd adds: below 0 by what it saves, 0 without it."""
    file_bytes: int
    """Of the file on disk."""

    @property
    def elements(self) -> int:
        return sum(row.elements for row in self.rows)

    @property
    def fp32_bytes(self) -> int:
        """Of the same model's tensors in fp32, without any header."""
        return sum(row.fp32_bytes for row in self.rows)

    @property
    def factor(self) -> float:
        """How many times smaller the file is than the same model in fp32."""
        return self.fp32_bytes / self.file_bytes


def read_contents(path: Path) -> Contents:
    """The contents of an artefact's file, after all the checks that reading it makes.

    Args:
        path: the artefact's folder, or the file itself.

    Raises:
        ValueError: as `read_artefact`.
    """
    opened = open_artefact(path)
    names: dict[str, list[str]] = {}
    for alias, name in opened.document["tied"].items():
        names.setdefault(name, []).append(alias)
    rows = []
    for name, form in sorted(opened.forms.items()):
        parts = opened.parts[name]
        stored = parts["values"].dtype if "values" in parts else torch.float32
        scheme = form.scheme if form.scheme != "dense" else _SHORTER.get(stored, short(stored))
        size = sum(part.nbytes for part in parts.values())
        rows.append(
            Row(
                name=name,
                scheme=scheme + (" + mask" if form.mask else ""),
                shape=form.shape,
                elements=form.elements,
                bytes=size,
                fp32_bytes=opened.decode(name).nbytes,
                tied=tuple(sorted(names.get(name, []))),
            )
        )
    container = opened.container
    return Contents(
        file=opened.file,
        format=opened.document["format"],
        metadata={key: value for key, value in opened.document.items() if key not in _STRUCTURE},
        rows=tuple(rows),
        header_bytes=container.header_bytes,
        zstd_bytes=container.file_bytes - container.raw_bytes,
        file_bytes=container.file_bytes,
    )


def grouped(rows: Iterable[Row]) -> list[Row]:
    """As few rows with the same sums.

    One row for all tensors whose names differ in numbers only (of layers) and which have one scheme and one shape; one,
    at the end, for all biases, norms and other tensors of fewer than two dimensions of a scheme.
    """
    groups: dict[Any, list[Row]] = {}
    for row in sorted(rows, key=_is_vector):
        key = (VECTORS, row.scheme) if _is_vector(row) else (_NUMBER.sub("*", row.name), row.scheme, row.shape)
        groups.setdefault(key, []).append(row)
    return [group[0] if len(group) == 1 else _joined(key[0], group) for key, group in groups.items()]


def _is_vector(row: Row) -> bool:
    return row.shape is not None and len(row.shape) < 2


def _joined(name: str, group: list[Row]) -> Row:
    return Row(
        name=name,
        scheme=group[0].scheme,
        shape=group[0].shape if len({row.shape for row in group}) == 1 else None,
        tensors=sum(row.tensors for row in group),
        elements=sum(row.elements for row in group),
        bytes=sum(row.bytes for row in group),
        fp32_bytes=sum(row.fp32_bytes for row in group),
        tied=tuple(alias for row in group for alias in row.tied),
    )


VECTORS = "(biases, norms, other vectors)"
_STRUCTURE = ("format", "tensors", "tied", "sha256")
_SHORTER = {torch.float32: "fp32", torch.float16: "fp16"}
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)|^\d+(?=\.)")
