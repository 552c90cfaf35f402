"""The file that holds an artefact's tensors: safetensors, plain or as one zstd frame, written atomically.

Reading allocates in proportion to the file: what a header or a frame claims is held against `element_limit` first.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError, deserialize
from torch import Tensor

FILE = "model.safetensors"
ZSTD = ".zst"
"""What the name of a compressed file ends in."""
KEY = "tenko"
"""The key of the safetensors metadata that holds the document."""

_DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "I64": torch.int64,
    "I32": torch.int32,
    "BOOL": torch.bool,
    "I8": torch.int8,
    "U8": torch.uint8,
}
_FREE_ELEMENTS = 1 << 28
_ELEMENTS_A_BYTE = 64
DIMENSIONS = 8
"""Of a tensor in a file, at most."""


@dataclass(frozen=True)
class Container:
    """What a file holds, unchecked but for its container."""

    tensors: dict[str, Tensor]
    document: str
    """Text, by tenko's writer JSON."""
    header_bytes: int
    """Of the safetensors: everything before the tensors' own bytes."""
    raw_bytes: int
    """Of the safetensors, before zstd."""
    file_bytes: int
    """Of the file on disk."""


def element_limit(file_bytes: int) -> int:
    """The most elements that a file of this size may decode to: 2^28 (1 GiB of fp32), or 64 a byte if that is more.

    No real model comes near it (a mask has at most 8 elements a byte, pq with 256 centroids as many as its block). It
    keeps a small hostile file from filling the memory.
    """
    return max(_FREE_ELEMENTS, _ELEMENTS_A_BYTE * file_bytes)


def is_sane(shape: Sequence[int], file_bytes: int) -> bool:
    """Whether a tensor can have this shape; an empty one could claim any, such as [0, 2^60]."""
    return len(shape) <= DIMENSIONS and claimed(shape) <= element_limit(file_bytes)


def claimed(shape: Sequence[int]) -> int:
    """The elements of a shape, sizes of 0 left out: what an empty tensor is judged by."""
    return math.prod(size or 1 for size in shape)


def artefact_file(path: Path) -> Path:
    """The model file of an artefact: the path itself if it is named `.safetensors` or `.safetensors.zst`, else the
    folder's one.

    Raises:
        ValueError: there is none, or a folder holds both `model.safetensors` and `model.safetensors.zst`.
    """
    path = Path(path)
    if _is_file_name(path):
        if not path.is_file():
            raise ValueError(f"{path}: missing")
        return path
    if path.is_file():
        raise ValueError(f"{path}: a file, not a model; a model's is named {FILE} or {FILE + ZSTD}")
    found = [file for file in (path / FILE, path / (FILE + ZSTD)) if file.is_file()]
    if not found:
        raise ValueError(f"{path / FILE}: missing; an artefact is a folder with {FILE} or {FILE + ZSTD}")
    if len(found) > 1:
        raise ValueError(f"{path}: holds {FILE} and {FILE + ZSTD}; delete the one that is not meant")
    return found[0]


def write_container(
    path: Path, tensors: Mapping[str, Tensor], document: str, *, elements: int, zstd: int | None
) -> Path:
    """Write tensors and document atomically; return the file's path.

    Args:
        path: the artefact's folder (made if missing), or the file itself, whose name gets or loses `.zst` as `zstd`
            wants it; a file of the other kind, which held an earlier model, goes.
        tensors: on the CPU, contiguous, each in a storage of its own.
        document: text.
        elements: what the tensors decode to; at least what the shape of each claims.
        zstd: compression level, 1 to 22; None writes plain safetensors.

    Raises:
        ValueError: zstd is no level, or the file would hold more elements for its size than `element_limit`.
        OSError: the file can't be written; nothing is left half-written.
    """
    path = Path(path)
    if zstd is not None and not 1 <= zstd <= 22:
        raise ValueError(f"zstd: {zstd} is no level; valid are 1 to 22")
    ending = ZSTD if zstd is not None else ""
    file = path.with_name(path.name.removesuffix(ZSTD) + ending) if _is_file_name(path) else path / (FILE + ending)
    data = safetensors.torch.save(dict(tensors), {KEY: document})
    needed = max(elements, -(-len(data) // 4))
    if zstd is not None:
        import zstandard

        data = zstandard.ZstdCompressor(level=zstd, write_checksum=True, write_content_size=True).compress(data)
    if needed > element_limit(len(data)):
        raise ValueError(f"{file}: {needed:,} elements in {len(data):,} bytes would be refused when read")
    file.parent.mkdir(parents=True, exist_ok=True)
    _write_atomically(file, data)
    other = file.with_name(file.name.removesuffix(ZSTD) if ending else file.name + ZSTD)
    other.unlink(missing_ok=True)
    return file


def read_container(file: Path) -> Container:
    """Read a file that `write_container` wrote.

    Raises:
        ValueError: one line with the file and what is wrong.
    """
    data = file.read_bytes()
    file_bytes = len(data)
    if file.name.endswith(ZSTD):
        data = _decompress(file, data)
    try:
        # Checks that the header is JSON of the right form and that the tensors cover the rest without gap or overlap.
        entries = deserialize(data)
    except SafetensorError as error:
        raise ValueError(f"{file}: damaged or not a safetensors file ({_one_line(error)})") from None
    header_bytes = 8 + int.from_bytes(data[:8], "little")
    document = (json.loads(data[8:header_bytes].decode()).get("__metadata__") or {}).get(KEY)
    if document is None:
        raise ValueError(f"{file}: has no {KEY!r} metadata, so tenko did not write it")
    raw_bytes = len(data)
    del data
    tensors = {}
    for key, entry in entries:
        dtype = _DTYPES.get(str(entry["dtype"]))
        if dtype is None:
            valid = ", ".join(_DTYPES)
            raise ValueError(f"{file}: tensor {shown(key)} has dtype {entry['dtype']}; valid are {valid}")
        tensors[key] = _tensor(file, key, entry["data"], dtype, entry["shape"])
    return Container(tensors, document, header_bytes, raw_bytes, file_bytes)


def shown(name: str) -> str:
    """A name out of a file, fit for a message of one line."""
    name = name if name.isprintable() else ascii(name)
    return name if len(name) <= 200 else name[:197] + "..."


def _tensor(file: Path, key: str, data: bytearray, dtype: torch.dtype, shape: list[int]) -> Tensor:
    if not is_sane(shape, len(data)):
        raise ValueError(f"{file}: tensor {shown(key)} has shape {shown(str(shape))}, which is no weight's")
    if not data:
        return torch.zeros(0, dtype=dtype).reshape(shape)
    if dtype == torch.bool and max(data) > 1:
        raise ValueError(f"{file}: tensor {shown(key)} is bool, but holds a byte that is not 0 or 1")
    return torch.frombuffer(data, dtype=dtype).reshape(shape)


def _decompress(file: Path, data: bytes) -> bytes:
    import zstandard

    try:
        size = zstandard.frame_content_size(data)
        limit = 4 * element_limit(len(data))
        if not 0 <= size <= limit:  # -1: not told, which our writer always does
            told = f"claims {size:,} bytes" if size >= 0 else "does not tell its size"
            raise ValueError(f"{file}: its zstd frame {told}; read are {limit:,} at most")
        return zstandard.ZstdDecompressor().decompress(data, allow_extra_data=False)
    except (zstandard.ZstdError, MemoryError) as error:
        raise ValueError(f"{file}: damaged or not a zstd file ({_one_line(error)})") from None


def _is_file_name(path: Path) -> bool:
    return path.name.endswith((".safetensors", ".safetensors" + ZSTD))


def _one_line(error: BaseException) -> str:
    return shown(" ".join(str(error).split()))


def _write_atomically(file: Path, data: bytes) -> None:
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as out:
            out.write(data)
            out.flush()
            os.fsync(out.fileno())
        os.replace(temporary, file)
        folder = os.open(file.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # else a power cut may undo the rename
        finally:
            os.close(folder)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError):  # a full disk is reported by write(), which knows no file name
            raise OSError(error.errno, error.strerror, str(file)) from None
        raise
