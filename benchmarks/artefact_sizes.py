"""Bytes on disk of a Transformer-base (32,000 tied subwords) in every scheme: `python benchmarks/artefact_sizes.py`.

The model is not trained; its weights are a bell curve's, quantized by the techniques' own functions (product
quantization: random codes and centroids, whose bytes do not depend on their values). Every file is written to disk,
read back and compared, and the bytes are those of the file. Ends with 1 if a file is larger than is promised.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tenko.compression import Packed, artefact_bytes, read_artefact, write_artefact
from tenko.compression.contents import read_contents
from tenko.compression.scalar import Linear
from tenko.compression.scalar import decode as decode_scalar
from tenko.compression.schemes import decode_pq
from tenko.compression.ternary import Twn, TwoMeans
from tenko.nmt.config import ModelConfig
from tenko.nmt.fairseq_bridge import build_model

VOCABULARY = 32_000
CENTROIDS = 256
LIMITS = {"int8": 62.0, "int4": 31.5, "ternary": 16.0, "iPQ 8/8/4": 11.0}
"""MB that a file may take."""


class Given:
    """A baked technique that packs what it is given."""

    def __init__(self, name: str, packed: dict[str, Packed]) -> None:
        self.name, self._packed = name, packed

    def pack(self, name: str) -> Packed | None:
        return self._packed.get(name)


def transformer_base(folder: Path) -> dict[str, Tensor]:
    """The state of an untrained Transformer-base; normal, with the deviation of its initialisation."""
    dictionary = folder / "dict.txt"
    dictionary.write_text("".join(f"▁{number} 1\n" for number in range(VOCABULARY - 4)))  # and fairseq's own four
    torch.manual_seed(1)
    state = build_model(ModelConfig(arch="transformer_wmt_en_de"), dictionary).state_dict()
    rng = torch.Generator().manual_seed(1)
    for tensor in {id(tensor): tensor for tensor in state.values()}.values():
        if tensor.numel() > 1:  # norms and biases too: fresh ones are zeros and ones, which take fewer bytes
            tensor.copy_(torch.randn(tensor.shape, generator=rng) * (tensor.std() + 0.01))
    return state


def linear(quantize: Callable[[Tensor], Packed], sparsity: float = 0.0) -> Callable[[str, Tensor], Packed]:
    """A scheme of codes, after the smallest weights of each matrix are pruned."""

    def pack(name: str, weight: Tensor) -> Packed:
        threshold = weight.abs().flatten().kthvalue(max(1, int(sparsity * weight.numel()))).values if sparsity else -1
        return quantize(torch.where(weight.abs() > threshold, weight, 0.0))

    return pack


def product(scheme: str) -> Callable[[str, Tensor], Packed]:
    """Product quantization with blocks of 8 in FFN and embeddings, 4 in attention."""

    def pack(name: str, weight: Tensor) -> Packed:
        block = 4 if "attn" in name else 8
        rng = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        shape = (weight.shape[0], weight.shape[1] // block)
        parts = {"codes": torch.randint(0, CENTROIDS, shape, generator=rng, dtype=torch.uint8)}
        if scheme == "pq":
            return Packed(scheme, {**parts, "codebook": torch.randn(CENTROIDS, block, generator=rng).half()})
        codebook = torch.randint(-127, 128, (CENTROIDS, block), generator=rng, dtype=torch.int8)
        return Packed(scheme, {**parts, "codebook": codebook, "scale": torch.tensor([0.01])})

    return pack


def decode(packed: Packed, shape: torch.Size) -> Tensor:
    parts = packed.parts
    if "codebook" in parts:
        return decode_pq(parts["codes"], parts["codebook"], shape, parts.get("scale"))
    return decode_scalar(packed)


SCHEMES: dict[str, Callable[[str, Tensor], Packed] | None] = {
    "fp32": None,
    "int8": linear(Linear(bits=8).quantize),
    "50 % sparse, int8": linear(Linear(bits=8).quantize, 0.5),
    "int4": linear(Linear(bits=4).quantize),
    "80 % sparse, int8": linear(Linear(bits=8).quantize, 0.8),
    "80 % sparse, int4": linear(Linear(bits=4).quantize, 0.8),
    "ternary": linear(Twn().quantize),
    "binary": linear(TwoMeans().quantize),
    "iPQ 8/8/4": product("pq"),
    "iPQ 8/8/4, int8 centroids": product("pq_int8"),
}


def measure(name: str, state: dict[str, Tensor], folder: Path, level: int) -> dict[str, Any]:
    """Write the model in a scheme, plain and compressed, read both back, and count."""
    pack = SCHEMES[name]
    packed: dict[str, Packed] = {}
    baked: dict[str, Tensor] = {}
    seen: dict[int, str] = {}
    for key, tensor in state.items():
        first = seen.setdefault(tensor.data_ptr(), key)
        if first != key:
            baked[key] = baked[first]
        elif pack is None or tensor.dim() < 2:
            baked[key] = tensor
        else:
            packed[key] = pack(key, tensor)
            baked[key] = decode(packed[key], tensor.shape)
    sizes = []
    for zstd in (None, level):
        file = write_artefact(folder, baked, metadata={}, technique=Given(name, packed), zstd=zstd)  # type: ignore[arg-type]
        back, _ = read_artefact(file)
        assert all(torch.equal(back[key], tensor) for key, tensor in baked.items()), f"{name} reads back otherwise"
        contents = read_contents(file)
        counted = sum(row.bytes for row in contents.rows) + contents.header_bytes + contents.zstd_bytes
        assert counted == artefact_bytes(folder) == file.stat().st_size, f"{name} does not add up"
        sizes.append(file.stat().st_size)
    return {
        "scheme": name,
        "bytes": sizes[0],
        "zstd_bytes": sizes[1],
        "elements": contents.elements,
        "fp32_bytes": contents.fp32_bytes,
        "limit_mb": LIMITS.get(name),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--level", type=int, default=10, help="zstd's, 1 to 22 (default: 10)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        state = transformer_base(folder)
        print("| scheme | bytes | MB | factor | promised MB | MB with zstd |\n|---|---|---|---|---|---|")
        for scheme in SCHEMES:
            rows.append(row := measure(scheme, state, folder / "artefact", options.level))
            size, small, limit = row["bytes"], row["zstd_bytes"], row["limit_mb"] or ""
            factor = row["fp32_bytes"] / size
            print(
                f"| {scheme} | {size:,} | {size / 1e6:.2f} | {factor:.1f} | {limit} | {small / 1e6:.2f} |", flush=True
            )
    print(f"\n{rows[0]['elements']:,} parameters, {rows[0]['fp32_bytes']:,} bytes of fp32")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    sys.exit(any(row["limit_mb"] and row["bytes"] > row["limit_mb"] * 1e6 for row in rows))


if __name__ == "__main__":
    main()
