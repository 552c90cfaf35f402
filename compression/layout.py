"""How a tensor of each scheme lies in the file (docs/packed_file.md): its parts, their bytes, and the way back.

Techniques give codes as plain integers; here they become fields of bits. Where enough elements are zero, only the
others are stored, beside a mask of one bit an element; and floats are stored as fp16 where that loses nothing. Both are
decided by the bytes they save, tensor by tensor, so no technique needs to know of them. Reading trusts nothing: parts
are checked against the shape before anything is allocated, and codes against their range.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import bits
from .schemes import decode_binary, decode_pq, dequantize
from .technique import Packed

LINEAR = {"int8": 127, "int4": 7, "ternary": 1}
"""Schemes of codes times a scale, with the largest code; a code of 0 is a weight of 0."""
PQ = ("pq", "pq_int8")
BESIDE = {
    **dict.fromkeys(LINEAR, ("scale",)),
    "binary": ("levels",),
    "pq": ("codebook",),
    "pq_int8": ("codebook", "scale"),
}
"""Packed schemes, with the parts that stand beside the codes."""
SCHEMES = ("dense", *BESIDE)
MASKABLE = ("dense", *LINEAR)
"""Schemes that a mask of the elements that are not zero goes with."""
MASK_HEADER = 100
"""Bytes that a mask's entry in the header takes, about: a mask must save more."""
CENTROIDS = 1 << 16
"""The most centroids of a codebook."""

_FLOATS = (torch.float32, torch.float16)
DENSE = (*_FLOATS, torch.int64, torch.int32, torch.bool)
"""What a tensor without a scheme may be; of a float of another type fp32 is stored."""


@dataclass(frozen=True)
class Form:
    """How one tensor is stored."""

    scheme: str
    """One of SCHEMES."""
    shape: tuple[int, ...]
    """Of the tensor that is read back."""
    mask: bool = False
    """Whether only the elements that are not zero are stored, beside a mask that says which."""

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    def key(self, name: str, part: str) -> str:
        """The name in the file of a part of tensor `name`."""
        return name if self.scheme == "dense" and not self.mask else f"{name}.{part}"

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts that the tensor is stored as."""
        rest = ("values",) if self.scheme == "dense" else ("codes", *BESIDE[self.scheme])
        return ("mask", *rest) if self.mask else rest

    def describe(self) -> dict[str, Any]:
        """The tensor's entry in the document."""
        return {"scheme": self.scheme, "shape": list(self.shape), **({"mask": True} if self.mask else {})}


def encode(tensor: Tensor, packed: Packed | None) -> tuple[Form, dict[str, Tensor]]:
    """The smallest way to store a tensor that reads back equal.

    Args:
        tensor: any shape and device; floats are stored as fp32 at most.
        packed: its codes as the technique gives them; None stores it dense.
    """
    shape = tuple(tensor.shape)
    if packed is None:
        packed = Packed("dense", {"values": tensor.detach()})
    parts = {part: value.detach().cpu() for part, value in packed.parts.items()}
    plain = Form(packed.scheme, shape)
    assert set(parts) == set(plain.parts), f"{packed.scheme} has parts {sorted(parts)}, not {sorted(plain.parts)}"
    if packed.scheme == "dense":
        if not tensor.is_floating_point():
            return plain, {"values": _own(parts["values"])}
        parts["values"] = _narrow(parts["values"])
    if packed.scheme == "pq":
        parts["codebook"] = _narrow(parts["codebook"])
    main = plain.parts[0]
    body = parts.pop(main).reshape(-1)
    beside = {part: _own(value) for part, value in parts.items()}
    centroids = len(parts["codebook"]) if "codebook" in parts else 0
    full = _pack(plain, body, centroids)
    if packed.scheme in MASKABLE:
        kept = body != 0
        masked = Form(packed.scheme, shape, mask=True)
        mask = torch.from_numpy(bits.pack_bits(kept.numpy(), 1))
        left = _pack(masked, body[kept], 0)
        if mask.nbytes + left.nbytes + MASK_HEADER < full.nbytes:
            return masked, {"mask": mask, main: left, **beside}
    return plain, {main: full, **beside}


def find_parts(name: str, form: Form, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The parts of a tensor among all that a file stores, of the right number, dtype and shape.

    Raises:
        ValueError: what is wrong, with the name.
    """
    found = {}
    for part in form.parts:
        key = form.key(name, part)
        if key not in stored:
            raise ValueError(f"tensor {key} is missing")
        found[part] = stored[key]
    if form.scheme != "dense" and not form.shape:
        raise ValueError(f"tensor {name} has no dimension, so it can't be {form.scheme}")
    for part in form.parts:  # in this order: the codes' number depends on the mask and the codebook
        if part in BESIDE.get(form.scheme, ()):
            _check_beside(form.key(name, part), form, part, found)
    if form.mask:
        mask_bytes = (bits.packed_bytes(form.elements, 1),)
        _check(form.key(name, "mask"), found["mask"], (torch.uint8,), mask_bytes)
    main = "values" if form.scheme == "dense" else "codes"
    dtypes, shape = _body(form, found)
    _check(form.key(name, main), found[main], dtypes, shape)
    return found


def decode(name: str, form: Form, parts: Mapping[str, Tensor]) -> Tensor:
    """The tensor of its parts: fp32, or a dense one's own dtype if that is no float.

    Args:
        name: for messages.
        form: how it is stored.
        parts: as `find_parts` gives them.

    Raises:
        ValueError: a code is out of range, a scale is not finite, or bits after the last value are set.
    """
    for part in BESIDE.get(form.scheme, ()):
        if not bool(torch.isfinite(parts[part].float()).all()):
            raise ValueError(f"tensor {form.key(name, part)} holds inf or NaN")
    try:
        kept = _unpack_mask(form, parts["mask"]) if form.mask else None
    except ValueError as error:
        raise ValueError(f"tensor {name}.mask: {error}") from None
    if form.scheme == "dense":
        values = parts["values"]
        values = values.float() if values.is_floating_point() else values
        return (values if kept is None else _scatter(values, kept)).reshape(form.shape)
    try:
        codes = _unpack(form, parts)
    except ValueError as error:
        raise ValueError(f"tensor {name}.codes: {error}") from None
    if kept is not None:
        codes = _scatter(codes, kept)
    if form.scheme in PQ:
        columns = math.prod(form.shape[1:]) // parts["codebook"].shape[1]
        return decode_pq(codes.reshape(form.shape[0], columns), parts["codebook"], form.shape, parts.get("scale"))
    codes = codes.reshape(form.shape)
    return decode_binary(codes, parts["levels"]) if form.scheme == "binary" else dequantize(codes, parts["scale"])


def _pack(form: Form, body: Tensor, centroids: int) -> Tensor:
    """What is stored of codes or values [n]."""
    if form.scheme in ("dense", "int8"):
        return _own(body if form.mask else body.reshape(form.shape))
    codes = body.numpy()
    if form.scheme == "int4":
        data = bits.pack_bits(codes & 15, 4)  # two's complement
    elif form.scheme == "ternary":
        data = bits.pack_bits(codes < 0, 1) if form.mask else bits.pack_trits(codes % 3)
    else:
        data = bits.pack_bits(codes, _width(form, centroids))
    return torch.from_numpy(data)


def _unpack(form: Form, parts: Mapping[str, Tensor]) -> Tensor:
    """The codes [n] of what is stored."""
    data, count = parts["codes"].reshape(-1), _count(form, parts)
    if form.scheme == "int8":
        codes = data
    elif form.scheme == "int4":
        fields = bits.unpack_bits(data.numpy(), 4, count)
        codes = torch.from_numpy((fields << 4).view(np.int8) >> 4)
    elif form.scheme == "ternary" and form.mask:
        codes = 1 - 2 * torch.from_numpy(bits.unpack_bits(data.numpy(), 1, count)).to(torch.int8)
    elif form.scheme == "ternary":
        trits = torch.from_numpy(bits.unpack_trits(data.numpy(), count)).to(torch.int8)
        codes = torch.where(trits == 2, -1, trits).to(torch.int8)
    else:
        fields = bits.unpack_bits(data.numpy(), _width(form, _centroids(parts)), count)
        codes = torch.from_numpy(fields.astype(np.int32) if fields.dtype == np.uint16 else fields)
    largest = LINEAR.get(form.scheme, _centroids(parts) - 1 if form.scheme in PQ else 1)
    if codes.numel() and (int(codes.max()) > largest or (form.scheme in LINEAR and int(codes.min()) < -largest)):
        lowest = -largest if form.scheme in LINEAR else 0
        raise ValueError(f"holds a code out of range; {form.scheme} has {lowest} to {largest}")
    return codes


def _body(form: Form, parts: Mapping[str, Tensor]) -> tuple[tuple[torch.dtype, ...], tuple[int, ...]]:
    """The dtypes and the shape that the codes or values must have."""
    if form.mask and form.scheme in ("dense", "int8"):
        return (_FLOATS if form.scheme == "dense" else (torch.int8,)), (_count(form, parts),)
    if form.scheme in ("dense", "int8"):
        return (DENSE if form.scheme == "dense" else (torch.int8,)), form.shape
    count = _count(form, parts)
    if form.scheme == "ternary" and not form.mask:
        return (torch.uint8,), (bits.trit_bytes(count),)
    return (torch.uint8,), (bits.packed_bytes(count, _width(form, _centroids(parts))),)


def _count(form: Form, parts: Mapping[str, Tensor]) -> int:
    """How many codes or values are stored."""
    if form.mask:
        return int(np.unpackbits(parts["mask"].numpy()).sum())
    return form.elements // parts["codebook"].shape[1] if form.scheme in PQ else form.elements


def _width(form: Form, centroids: int) -> int:
    """Bits a code of the schemes that are stored as fields."""
    return bits.width_for(centroids) if form.scheme in PQ else 4 if form.scheme == "int4" else 1


def _centroids(parts: Mapping[str, Tensor]) -> int:
    return parts["codebook"].shape[0] if "codebook" in parts else 0


def _check_beside(key: str, form: Form, part: str, parts: Mapping[str, Tensor]) -> None:
    """Scales, levels or a codebook, by their dtype and the shapes they may have."""
    tensor = parts[part]
    if part == "codebook":
        _check(key, tensor, (torch.int8,) if form.scheme == "pq_int8" else _FLOATS)
        columns = math.prod(form.shape[1:])
        if tensor.dim() != 2 or not 1 <= tensor.shape[0] <= CENTROIDS or not tensor.shape[1]:
            raise ValueError(f"tensor {key} has shape {list(tensor.shape)}, not [centroids, block]")
        if columns % tensor.shape[1]:
            raise ValueError(f"tensor {key} has blocks of {tensor.shape[1]}, which do not divide {columns} columns")
        return
    rows = parts["codebook"].shape[0] if form.scheme == "pq_int8" else form.shape[0]
    last = (2,) if part == "levels" else ()
    _check(key, tensor, (torch.float32,), (rows, *last), (1, *last))


def _check(key: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...], *shapes: tuple[int, ...]) -> None:
    """Refuse another dtype, and a shape other than those given, if any."""
    if tensor.dtype not in dtypes:
        raise ValueError(f"tensor {key} is {short(tensor.dtype)}, not {' or '.join(map(short, dtypes))}")
    if shapes and tuple(tensor.shape) not in shapes:
        valid = " or ".join(str(list(shape)) for shape in dict.fromkeys(shapes))
        raise ValueError(f"tensor {key} has shape {list(tensor.shape)}, not {valid}")


def _unpack_mask(form: Form, mask: Tensor) -> Tensor:
    return torch.from_numpy(bits.unpack_bits(mask.numpy(), 1, form.elements)).bool()


def _scatter(values: Tensor, kept: Tensor) -> Tensor:
    full = torch.zeros(kept.shape, dtype=values.dtype)
    full[kept] = values
    return full


def _narrow(values: Tensor) -> Tensor:
    """As fp16 where that loses nothing, as fp32 otherwise."""
    values = values.float()
    half = values.half()
    return half if torch.equal(half.float(), values) else values


def _own(tensor: Tensor) -> Tensor:
    """Contiguous, and in a storage of its own, as safetensors asks."""
    tensor = tensor.contiguous()
    whole = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return tensor if whole else tensor.clone()


def short(dtype: torch.dtype) -> str:
    """The dtype's name without `torch.`."""
    return str(dtype).removeprefix("torch.")
