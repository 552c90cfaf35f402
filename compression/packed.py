"""The artefact's file: `model.safetensors` with packed tensors, read back to dense fp32 to the bit.

A dense tensor NAME is stored under its name, a packed one as its parts (`NAME.codes`, `NAME.scale`), tied tensors once.
The key `tenko` of the safetensors metadata holds JSON: format, technique, direction, model, `tensors` (name -> scheme
and shape), `tied` (alias -> name) and a sha256 of all tensors, since safetensors itself notices no flipped bit. Writing
is atomic, and equal inputs give equal bytes.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .int8 import dequantize_rows
from .technique import Packed, Technique

FORMAT = 1
FILE = "model.safetensors"
_KEY = "tenko"
_DENSE_DTYPES = (torch.float32, torch.int64, torch.int32, torch.bool)
_OURS = ("format", "tensors", "tied", "sha256")


@dataclass(frozen=True)
class Scheme:
    """How one scheme is stored: part suffix -> (dtype, shape given the tensor's), and the way back to fp32."""

    parts: Mapping[str, tuple[torch.dtype, Callable[[tuple[int, ...]], tuple[int, ...]]]]
    decode: Callable[[Mapping[str, Tensor]], Tensor]


SCHEMES: dict[str, Scheme] = {
    "int8": Scheme(
        parts={"codes": (torch.int8, lambda shape: shape), "scale": (torch.float32, lambda shape: shape[:1])},
        decode=lambda parts: dequantize_rows(parts["codes"], parts["scale"]),
    ),
}


def write_artefact(
    path: Path, state: Mapping[str, Tensor], *, metadata: Mapping[str, Any], technique: Technique | None = None
) -> Path:
    """Write the model file of an artefact, atomically, and return its path.

    Args:
        path: the artefact's folder (made if missing), or the `.safetensors` file itself.
        state: a plain `state_dict()`; names that share one tensor are stored once. Floats are stored as fp32.
        metadata: JSON values, for instance direction and model. `technique` defaults to the technique's name, "dense"
            without one; format, tensors, tied and sha256 are added here.
        technique: baked; its `pack` says what is stored packed. None stores all tensors dense.

    Raises:
        OSError: the file can't be written (disk full, ...); nothing is left half-written.
    """
    file = _file(path)
    assert not set(metadata) & set(_OURS), f"{_OURS} are set by write_artefact"
    stored: dict[str, Tensor] = {}
    tensors: dict[str, dict[str, Any]] = {}
    tied: dict[str, str] = {}
    first_name: dict[Any, str] = {}
    for name, tensor in state.items():
        assert ".parametrizations." not in name, f"{name} is still parametrized; bake first"
        first = first_name.setdefault(_identity(tensor), name) if tensor.numel() else name
        if first != name:
            tied[name] = first
            continue
        packed = technique.pack(name) if technique is not None else None
        if packed is None:
            parts = {name: _dense(tensor)}
        else:
            parts = {f"{name}.{part}": _own(value) for part, value in packed.parts.items()}
            assert set(packed.parts) == set(SCHEMES[packed.scheme].parts), f"{packed.scheme} has other parts"
            assert torch.equal(SCHEMES[packed.scheme].decode(packed.parts).cpu(), tensor.cpu()), (
                f"{name} differs from its codes"
            )
        assert not set(parts) & set(stored), f"{name} collides with a part of another tensor"
        stored |= parts
        tensors[name] = {"scheme": packed.scheme if packed else "dense", "shape": list(tensor.shape)}
    document = {"technique": technique.name if technique else "dense", **metadata}
    document |= {"format": FORMAT, "tensors": tensors, "tied": tied, "sha256": _digest(stored)}
    data = safetensors.torch.save(stored, {_KEY: json.dumps(document, sort_keys=True)})
    file.parent.mkdir(parents=True, exist_ok=True)
    _write_atomically(file, data)
    return file


def read_artefact(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a model file back: (state of dense fp32 tensors on the CPU, metadata).

    Aliases of a tied tensor are the same tensor object. The state loads into the model with `strict=True`: fairseq's
    `version` buffers (4 bytes each) are stored too, since without them fairseq takes the weights for an ancient format.

    Args:
        path: the artefact's folder, or the `.safetensors` file itself.

    Raises:
        ValueError: one line with the file and what is wrong: missing, not safetensors, no or malformed metadata, a
            newer format, an unknown scheme, a tensor missing, left over, of the wrong shape or dtype, or damaged.
    """
    file = _file(path)
    stored, metadata = _read_file(file)

    def check(holds: bool, message: str) -> None:
        if not holds:
            raise ValueError(f"{file}: {message}")

    state: dict[str, Tensor] = {}
    used: set[str] = set()
    for name, entry in metadata["tensors"].items():
        check(isinstance(entry, dict) and isinstance(entry.get("scheme"), str), f"tensor {name} names no scheme")
        scheme, shape = entry["scheme"], entry.get("shape")
        valid = ", ".join(["dense", *SCHEMES])
        check(scheme == "dense" or scheme in SCHEMES, f"tensor {name} has unknown scheme {scheme!r}; valid are {valid}")
        check(isinstance(shape, list) and all(type(n) is int and n >= 0 for n in shape), f"tensor {name} has no shape")
        wanted: dict[str, tuple[tuple[torch.dtype, ...], tuple[int, ...]]] = {"": (_DENSE_DTYPES, tuple(shape))}
        if scheme != "dense":
            wanted = {f".{part}": ((dtype,), of(tuple(shape))) for part, (dtype, of) in SCHEMES[scheme].parts.items()}
        parts = {}
        for suffix, (dtypes, part_shape) in wanted.items():
            key = name + suffix
            check(key in stored, f"tensor {key} is missing")
            part = stored[key]
            check(part.dtype in dtypes, f"tensor {key} is {_short(part.dtype)}, not {_short(dtypes[0])}")
            check(tuple(part.shape) == part_shape, f"tensor {key} has shape {list(part.shape)}, not {list(part_shape)}")
            parts[suffix[1:]] = part
            used.add(key)
        state[name] = parts[""] if scheme == "dense" else SCHEMES[scheme].decode(parts)
    left = sorted(set(stored) - used)
    check(not left, f"tensor {left[0] if left else ''} is in no list of the metadata")
    for alias, name in metadata["tied"].items():
        check(isinstance(name, str) and name in metadata["tensors"], f"{alias} is tied to {name!r}, which is missing")
        check(alias not in metadata["tensors"], f"tensor {alias} is both stored and tied")
        state[alias] = state[name]
    check(_digest(stored) == metadata["sha256"], "damaged: the tensors differ from their sha256")
    return state, metadata


def artefact_bytes(path: Path) -> int:
    """Bytes of the artefact's model file on disk, metadata included."""
    return _file(path).stat().st_size


def _file(path: Path) -> Path:
    path = Path(path)
    return path if path.suffix == ".safetensors" else path / FILE


def _read_file(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    if not file.is_file():
        raise ValueError(f"{file}: missing; an artefact is a folder with {FILE}")
    try:
        with safe_open(str(file), "pt") as opened:
            header = opened.metadata() or {}
            # Cloned, for the tensors may be views of the mapped file, which a later run replaces.
            stored = {key: opened.get_tensor(key).clone() for key in opened.keys()}  # noqa: SIM118 (no mapping)
    except SafetensorError as error:
        raise ValueError(f"{file}: damaged or not a safetensors file ({error})") from None
    if _KEY not in header:
        raise ValueError(f"{file}: has no {_KEY!r} metadata, so tenko did not write it")
    try:
        metadata = json.loads(header[_KEY])
    except json.JSONDecodeError as error:
        raise ValueError(f"{file}: metadata is no JSON ({error})") from None
    version = metadata.get("format") if isinstance(metadata, dict) else None
    if type(version) is not int or version < 1:
        raise ValueError(f"{file}: metadata has no format version")
    if version > FORMAT:
        raise ValueError(f"{file}: format {version} is newer than this tenko reads ({FORMAT}); update tenko")
    for key, kind in (("tensors", dict), ("tied", dict), ("sha256", str)):
        if not isinstance(metadata.get(key), kind):
            raise ValueError(f"{file}: metadata has no {key!r}")
    return stored, metadata


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


def _identity(tensor: Tensor) -> Any:
    """Equal for two tensors exactly when they are the same memory seen the same way."""
    storage = tensor.untyped_storage().data_ptr()
    return tensor.device, storage, tensor.storage_offset(), tuple(tensor.shape), tensor.stride(), tensor.dtype


def _dense(tensor: Tensor) -> Tensor:
    return _own(tensor.detach().float() if tensor.is_floating_point() else tensor)


def _own(tensor: Tensor) -> Tensor:
    """On the CPU, contiguous, and in a storage of its own, as safetensors asks."""
    tensor = tensor.detach().cpu().contiguous()
    whole = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return tensor if whole else tensor.clone()


def _digest(stored: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(stored.items()):
        digest.update(f"{name} {_short(tensor.dtype)} {list(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


__all__ = ["FILE", "FORMAT", "SCHEMES", "Packed", "Scheme", "artefact_bytes", "read_artefact", "write_artefact"]
