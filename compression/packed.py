"""The artefact's file: `model.safetensors` with packed tensors, read back to dense fp32 to the bit.

docs/packed_file.md describes it whole. The key `tenko` of the safetensors metadata holds JSON, the document: format,
technique, direction, model, `tensors` (name -> scheme and shape), `tied` (alias -> name), and a sha256 of all the rest,
since safetensors itself notices no flipped bit. Each tensor is stored in the parts of its scheme (layout.py), tied
tensors once. Writing is atomic, and equal inputs give equal bytes. Format 1, which knew dense fp32 and int8 only and
left the document out of the sha256, is still read.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .container import (
    DIMENSIONS,
    FILE,
    ZSTD,
    Container,
    artefact_file,
    claimed,
    element_limit,
    is_sane,
    read_container,
    shown,
    write_container,
)
from .layout import DENSE, MASKABLE, SCHEMES, Form, decode, encode, find_parts, short
from .technique import Packed, Technique

FORMAT = 2
_OURS = ("format", "tensors", "tied", "sha256")


@dataclass(frozen=True)
class Opened:
    """A file whose structure and sha256 are checked; its tensors are not decoded yet."""

    file: Path
    container: Container
    document: dict[str, Any]
    forms: dict[str, Form]
    """How each tensor is stored, by name."""
    parts: dict[str, dict[str, Tensor]]
    """Each tensor's parts, by name and part."""

    def decode(self, name: str) -> Tensor:
        """The tensor of this name; ValueErrors as `read_artefact`."""
        try:
            return decode(name, self.forms[name], self.parts[name])
        except ValueError as error:
            raise ValueError(f"{self.file}: {shown(str(error))}") from None


def write_artefact(
    path: Path,
    state: Mapping[str, Tensor],
    *,
    metadata: Mapping[str, Any],
    technique: Technique | None = None,
    zstd: int | None = None,
) -> Path:
    """Write the model file of an artefact, atomically, and return its path.

    Args:
        path: the artefact's folder (made if missing), or the `.safetensors` file itself.
        state: a plain `state_dict()`; names that share one tensor are stored once. A tensor is read back equal, floats
            as fp32; only the sign of a zero may be lost.
        metadata: JSON values, for instance direction and model. `technique` defaults to the technique's name, "dense"
            without one; format, tensors, tied and sha256 are added here.
        technique: baked; its `pack` says what is stored packed. None stores all tensors dense.
        zstd: level, 1 to 22: the file is compressed whole, and its name ends in `.zst`. None leaves it plain.

    Raises:
        ValueError: zstd is no level, a tensor has a type or more dimensions than a file takes, or the file would
            decode to more than `read_artefact` takes.
        OSError: the file can't be written (disk full, ...); nothing is left half-written.
    """
    assert not set(metadata) & set(_OURS), f"{_OURS} are set by write_artefact"
    stored: dict[str, Tensor] = {}
    forms: dict[str, Form] = {}
    tied: dict[str, str] = {}
    first_name: dict[Any, str] = {}
    addresses: set[int] = set()
    for name, tensor in state.items():
        assert ".parametrizations." not in name, f"{name} is still parametrized; bake first"
        first = first_name.setdefault(_identity(tensor), name) if tensor.numel() else name
        if first != name:
            tied[name] = first
            continue
        if tensor.dtype not in DENSE and not tensor.is_floating_point():
            valid = ", ".join(map(str, DENSE))
            raise ValueError(f"tensor {name} is {tensor.dtype}, which has no place in an artefact; valid: {valid}")
        if tensor.dim() > DIMENSIONS:
            raise ValueError(f"tensor {name} has {tensor.dim()} dimensions; a file takes at most {DIMENSIONS}")
        packed = technique.pack(name) if technique is not None else None
        form, parts = encode(tensor, packed)
        keyed = {form.key(name, part): value for part, value in parts.items()}
        if packed is not None:
            back = decode(name, form, find_parts(name, form, keyed))
            assert torch.equal(back, tensor.detach().cpu().float()), f"{name} differs from its codes"
        assert not set(keyed) & set(stored), f"{name} collides with a part of another tensor"
        for key, part in keyed.items():  # the same memory seen in another way is no tie: it is stored again
            stored[key] = part.clone() if part.data_ptr() in addresses else part
            addresses.add(part.data_ptr())
        forms[name] = form
    document = {"technique": technique.name if technique else "dense", **metadata}
    document |= {"format": FORMAT, "tensors": {name: form.describe() for name, form in forms.items()}, "tied": tied}
    document = json.loads(json.dumps(document))  # as it will be read: its digest is taken of that
    document["sha256"] = _digest(stored, document)
    elements = max([sum(form.elements for form in forms.values()), *(claimed(form.shape) for form in forms.values())])
    return write_container(
        path, stored, json.dumps(document, sort_keys=True, separators=(",", ":")), elements=elements, zstd=zstd
    )


def read_artefact(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a model file back: (state of dense fp32 tensors on the CPU, metadata).

    Aliases of a tied tensor are the same tensor object. The state loads into the model with `strict=True`: fairseq's
    `version` buffers (4 bytes each) are stored too, since without them fairseq takes the weights for an ancient format.

    Args:
        path: the artefact's folder, with `model.safetensors` or `model.safetensors.zst`, or the file itself.

    Raises:
        ValueError: one line with the file and what is wrong: missing, two of them, not safetensors, no or malformed
            metadata, a newer format, an unknown scheme, a tensor missing, left over, of the wrong shape or dtype, a
            code out of range, a scale that is not finite, or damaged.
    """
    opened = open_artefact(path)
    state = {name: opened.decode(name) for name in opened.forms}
    for alias, name in opened.document["tied"].items():
        state[alias] = state[name]
    return state, opened.document


def open_artefact(path: Path) -> Opened:
    """Read a model file and check its structure and its sha256, without decoding; ValueErrors as `read_artefact`."""
    file = artefact_file(path)
    container = read_container(file)
    try:
        return _open(file, container)
    except (ValueError, RecursionError) as error:  # RecursionError: JSON of a thousand brackets
        raise ValueError(f"{file}: {shown(str(error))}") from None


def artefact_bytes(path: Path) -> int:
    """Bytes of the artefact's model file on disk, metadata included, compressed if it is.

    Raises:
        ValueError: there is none, or two.
    """
    return artefact_file(path).stat().st_size


def _open(file: Path, container: Container) -> Opened:
    """Everything `open_artefact` checks beyond the container; ValueErrors do not name the file."""
    document = _document(container.document)
    forms: dict[str, Form] = {}
    parts: dict[str, dict[str, Tensor]] = {}
    used: set[str] = set()
    for name, entry in document["tensors"].items():
        forms[name] = form = _form(name, entry, container.file_bytes)
        parts[name] = find_parts(name, form, container.tensors)
        keys = {form.key(name, part) for part in form.parts}
        _check(not keys & used, f"tensor {name} is stored in a part of another")
        used |= keys
    left = sorted(set(container.tensors) - used)
    _check(not left, f"tensor {left[0] if left else ''} is in no list of the metadata")
    for alias, name in document["tied"].items():
        _check(isinstance(name, str) and name in forms, f"{alias} is tied to {name!r}, which is missing")
        _check(alias not in forms, f"tensor {alias} is both stored and tied")
    elements = sum(form.elements for form in forms.values())
    _check(elements <= element_limit(container.file_bytes), f"claims {elements:,} elements, too many for its size")
    digest = _digest(container.tensors, document if document["format"] > 1 else None)
    _check(digest == document["sha256"], "damaged: the tensors or the metadata differ from their sha256")
    return Opened(file, container, document, forms, parts)


def _document(text: str) -> dict[str, Any]:
    try:
        document = json.loads(text)
    except ValueError as error:
        raise ValueError(f"metadata is no JSON ({error})") from None
    version = document.get("format") if isinstance(document, dict) else None
    if type(version) is not int or version < 1:
        raise ValueError("metadata has no format version")
    _check(version <= FORMAT, f"format {version} is newer than this tenko reads ({FORMAT}); update tenko")
    for key, kind in (("tensors", dict), ("tied", dict), ("sha256", str)):
        _check(isinstance(document.get(key), kind), f"metadata has no {key!r}")
    return document


def _form(name: str, entry: Any, file_bytes: int) -> Form:
    """How a tensor is stored, by its entry in the document."""
    _check(isinstance(entry, dict) and isinstance(entry.get("scheme"), str), f"tensor {name} names no scheme")
    scheme, shape, mask = entry["scheme"], entry.get("shape"), entry.get("mask", False)
    _check(scheme in SCHEMES, f"tensor {name} has unknown scheme {scheme!r}; valid are {', '.join(SCHEMES)}")
    is_shape = isinstance(shape, list) and all(type(size) is int and size >= 0 for size in shape)
    _check(is_shape, f"tensor {name} has no shape")
    _check(is_sane(shape, file_bytes), f"tensor {name} claims shape {shape}, too much for the file's size")
    _check(type(mask) is bool, f"tensor {name} has mask {mask!r}, which is neither true nor false")
    _check(not mask or scheme in MASKABLE, f"tensor {name} has a mask under {scheme}, whose code 0 is no zero weight")
    return Form(scheme, tuple(shape), mask)


def _check(holds: bool, message: str) -> None:
    if not holds:
        raise ValueError(message)


def _identity(tensor: Tensor) -> Any:
    """Equal for two tensors exactly when they are the same memory seen the same way."""
    storage = tensor.untyped_storage().data_ptr()
    return tensor.device, storage, tensor.storage_offset(), tuple(tensor.shape), tensor.stride(), tensor.dtype


def _digest(stored: Mapping[str, Tensor], document: Mapping[str, Any] | None) -> str:
    """sha256 of the tensors, and of the document but for its sha256 (None in format 1)."""
    digest = hashlib.sha256()
    if document is not None:
        rest = {key: value for key, value in document.items() if key != "sha256"}
        digest.update(json.dumps(rest, sort_keys=True).encode() + b"\n")
    for name, tensor in sorted(stored.items()):
        digest.update(f"{name} {short(tensor.dtype)} {list(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


__all__ = [
    "FILE",
    "FORMAT",
    "SCHEMES",
    "ZSTD",
    "Opened",
    "Packed",
    "artefact_bytes",
    "artefact_file",
    "open_artefact",
    "read_artefact",
    "write_artefact",
]
