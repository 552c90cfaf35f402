"""Artefact files to test with: one of each scheme, and files rewritten as another writer might."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor

from tenko.compression import Packed, QuantizeConfig, QuantNoise, write_artefact
from tenko.compression.layout import LINEAR
from tenko.compression.schemes import decode_binary, decode_pq, dequantize

METADATA = {"direction": "en-cs", "model": {"arch": "transformer", "embed_dim": 8}}
Parts = dict[str, Tensor]
Document = dict[str, Any]


def example(folder: Path) -> tuple[Path, dict[str, Tensor]]:
    """A file with an int8 weight, a tied one, a dense vector and an integer; returns it with the state written."""
    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Linear(6, 4), torch.nn.Linear(6, 4, bias=False))
    model[1].weight = model[0].weight
    model.register_buffer("steps", torch.tensor(7))
    technique = QuantNoise(QuantizeConfig())
    technique.attach(model)
    technique.bake(model)
    return write_artefact(folder, model.state_dict(), metadata=METADATA, technique=technique), model.state_dict()


class Given:
    """A technique that has been baked: it packs what it is given."""

    def __init__(self, packed: dict[str, Packed]) -> None:
        self.name, self._packed = "given", packed

    def pack(self, name: str) -> Packed | None:
        return self._packed.get(name)


def every_scheme() -> tuple[dict[str, Tensor], Any]:
    """A state with a tensor of each scheme, plain and, named `sparse_`, under a mask; and what packs it."""
    rng = torch.Generator().manual_seed(3)
    packed: dict[str, Packed] = {}
    state: dict[str, Tensor] = {"dense": torch.randn(9, generator=rng), "steps": torch.tensor([3])}
    state["flags"] = torch.tensor([True, False])
    state["sparse_dense"] = torch.randn(4, 60, generator=rng) * (torch.rand(4, 60, generator=rng) < 0.2)
    state["half"] = torch.randn(5, generator=rng).half().float()
    for scheme, limit in LINEAR.items():
        for prefix, kept in (("", 2.0), ("sparse_", 0.1)):
            codes = torch.randint(-limit, limit + 1, (3, 801), generator=rng, dtype=torch.int8)
            codes[torch.rand(codes.shape, generator=rng) >= kept] = 0
            scale = torch.rand(1 if prefix else 3, generator=rng) + 0.1
            packed[prefix + scheme] = Packed(scheme, {"codes": codes, "scale": scale})
            state[prefix + scheme] = dequantize(codes, scale)
    codes, levels = torch.randint(0, 2, (3, 7), generator=rng, dtype=torch.int8), torch.randn(3, 2, generator=rng)
    packed["binary"] = Packed("binary", {"codes": codes, "levels": levels})
    state["binary"] = decode_binary(codes, levels)
    codes, codebook = torch.randint(0, 5, (3, 4), generator=rng, dtype=torch.uint8), torch.randn(5, 2, generator=rng)
    packed["pq"] = Packed("pq", {"codes": codes, "codebook": codebook})
    state["pq"] = decode_pq(codes, codebook, (3, 8))
    small, scale = (codebook * 50).to(torch.int8), torch.tensor([0.25])
    packed["pq_int8"] = Packed("pq_int8", {"codes": codes, "codebook": small, "scale": scale})
    state["pq_int8"] = decode_pq(codes, small, (3, 8), scale)
    state["tied"] = state["int4"]
    return state, Given(packed)


def seal(parts: Parts, document: Document) -> str:
    """The sha256 that docs/packed_file.md describes."""
    digest = hashlib.sha256()
    if document["format"] != 1:
        rest = {key: value for key, value in document.items() if key != "sha256"}
        digest.update((json.dumps(rest, sort_keys=True) + "\n").encode())
    for name in sorted(parts):
        part = parts[name]
        digest.update(f"{name} {str(part.dtype).split('.')[1]} {list(part.shape)}\n".encode())
        digest.update(part.numpy().tobytes())
    return digest.hexdigest()


def rewrite(file: Path, change: Callable[[Parts, Document], None], *, sealed: bool = False) -> None:
    """Write the file anew with `change` applied to its tensors and its metadata; sealed: with their true sha256."""
    with safe_open(str(file), "pt") as opened:
        document = json.loads(opened.metadata()["tenko"])
    parts = safetensors.torch.load(file.read_bytes())
    change(parts, document)
    if sealed:
        document["sha256"] = seal(parts, document)
    file.write_bytes(safetensors.torch.save(parts, {"tenko": json.dumps(document)}))


def flipped(file: Path) -> bytes:
    """The file's content with one bit in the middle turned over."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 64
    return bytes(content)
