"""Streaming readers of parallel text: one TSV, or two aligned plain files; plain, .gz, .xz or .zst; strict UTF-8.

No file is ever held as a whole, only a line of it; everything wrong with one is a `ValueError` of one line that names
file and line. A file whose ending is none of the three is read as plain text.
"""

from __future__ import annotations

import gzip
import hashlib
import lzma
import zlib
from collections.abc import Callable, Iterator
from itertools import zip_longest
from pathlib import Path
from typing import BinaryIO, Literal

import zstandard

BLOCK = 1 << 20
"""Bytes read at a time."""
ZSTD_SLICE = 256
"""Bytes of a .zst file unpacked at a time, to one piece: of 8 MiB at most, since 4 bytes can stand for 128 KiB."""
EMBEDDED = Path(__file__).parent / "embedded" / "corpus.tsv.xz"
"""The corpus that ships with tenko."""

PACKED = (".gz", ".xz", ".zst")
"""Endings of compressed files; any other is plain text."""

Source = str | dict[str, str]
"""What a recipe gives: `embedded`, a TSV file, or {en: FILE, cs: FILE}."""


def source_files(source: Source, key: str) -> dict[str, Path]:
    """The files behind a source: {"tsv": path} or {"en": path, "cs": path}.

    Raises: ValueError naming `key` when a file is missing or is not a file.
    """
    if isinstance(source, dict):
        files = {lang: Path(source[lang]).expanduser() for lang in ("en", "cs")}
    else:
        files = {"tsv": EMBEDDED if source == "embedded" else Path(source).expanduser()}
    for path in files.values():
        if not path.exists():
            raise ValueError(f"{key}: no such file: {path}; give {_choices(key)}")
        if path.is_dir():
            raise ValueError(f"{key}: {path} is a folder; give {_choices(key)}")
    return files


def text_file(name: str, key: str) -> Path:
    """The file of a text, a sentence a line, that can be read more than once.

    Raises: ValueError naming `key` when it is missing or is no file.
    """
    path = Path(name).expanduser()
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "is a pipe, which is read once" if path.exists() else "no such file"
        raise ValueError(f"{key}: {path}: {what}; give a text file, a sentence a line (plain, .gz, .xz, .zst)")
    return path


def _choices(key: str) -> str:
    return "a TSV file" if key.startswith("--") else "`embedded`, a TSV file, or {en: FILE, cs: FILE}"


def sha256(path: Path) -> str:
    """Hex SHA-256 of the raw bytes of a file, read in blocks."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _zstd_blocks(path: Path) -> Iterator[bytes]:
    # zstandard's stream_reader takes a truncated frame for a finished one; the object interface tells them apart.
    decompress = None
    with path.open("rb") as file:
        while block := file.read(ZSTD_SLICE):
            while block:
                decompress = decompress or zstandard.ZstdDecompressor().decompressobj()
                if unpacked := decompress.decompress(block):
                    yield unpacked
                block = decompress.unused_data if decompress.eof else b""
                decompress = None if decompress.eof else decompress
    if decompress is not None:
        raise EOFError("the last frame is incomplete")


def _blocks(path: Path) -> Iterator[bytes]:
    if path.suffix == ".zst":
        yield from _zstd_blocks(path)
        return
    openers: dict[str, Callable[[Path, Literal["rb"]], BinaryIO]] = {".gz": gzip.open, ".xz": lzma.open}  # type: ignore[dict-item]
    with openers.get(path.suffix, open)(path, "rb") as file:
        while block := file.read(BLOCK):
            yield block


def read_lines(path: Path) -> Iterator[str]:
    """Lines of a text file without their line ends (`\\n` or `\\r\\n`); the ending of its name says how it is packed.

    Raises: ValueError for invalid UTF-8 (file and line) and for a damaged compressed file.
    """
    number = 0
    begun: list[bytes] = []  # blocks of a line that goes on; joined once, since a line may be long
    try:
        for block in _blocks(path):
            end, *others = block.split(b"\n")
            begun.append(end)
            if others:
                *whole, begin = others
                for line in (b"".join(begun), *whole):
                    number += 1
                    yield line.removesuffix(b"\r").decode("utf-8")
                begun = [begin]
        if tail := b"".join(begun):
            number += 1
            yield tail.removesuffix(b"\r").decode("utf-8")
    except UnicodeDecodeError as error:
        what = f"byte 0x{error.object[error.start]:02x} at column {error.start + 1}"
        raise ValueError(f"{path}: line {number}: invalid UTF-8 ({what})") from None
    except (EOFError, lzma.LZMAError, gzip.BadGzipFile, zlib.error, zstandard.ZstdError) as error:
        raise ValueError(f"{path}: damaged {path.suffix} file, cannot be read after line {number}: {error}") from None


def _read_tsv(path: Path) -> Iterator[tuple[str, str]]:
    for number, line in enumerate(read_lines(path), 1):
        columns = line.split("\t", 2)
        if len(columns) >= 2:
            yield columns[0], columns[1]
        elif not line.strip():
            yield "", ""
        else:
            raise ValueError(f"{path}: line {number}: needs two tab-separated columns, en and cs, has one")


def _read_aligned(en: Path, cs: Path) -> Iterator[tuple[str, str]]:
    counts = {"en": 0, "cs": 0}
    for left, right in zip_longest(read_lines(en), read_lines(cs)):
        counts["en"] += left is not None
        counts["cs"] += right is not None
        if counts["en"] == counts["cs"]:
            yield left, right
    if counts["en"] != counts["cs"]:
        raise ValueError(
            f"{en} has {counts['en']:,} lines and {cs} has {counts['cs']:,}: aligned files need equally many"
        )


def read_pairs(files: dict[str, Path]) -> Iterator[tuple[str, str]]:
    """(English, Czech) raw pairs of what `source_files` gave; a blank TSV line is a pair of empty strings.

    Raises: ValueError as `read_lines`; for a TSV line of one column; for unequal line counts, after the last pair.
    """
    if "tsv" in files:
        return _read_tsv(files["tsv"])
    return _read_aligned(files["en"], files["cs"])
