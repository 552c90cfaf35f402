"""What a file is said to hold: bytes that add up to its size, and a Transformer-base in the bytes it must fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from packed_files import METADATA, Given, every_scheme
from torch import Tensor

from tenko.compression import Packed, artefact_bytes, read_artefact, write_artefact
from tenko.compression.contents import VECTORS, grouped, read_contents
from tenko.compression.layout import LINEAR, SCHEMES
from tenko.compression.schemes import decode_pq, dequantize


@pytest.mark.parametrize("zstd", [None, 5])
def test_bytes_add_up_to_the_files_size(tmp_path: Path, zstd: int | None) -> None:
    state, technique = every_scheme()
    file = write_artefact(tmp_path, state, metadata=METADATA, technique=technique, zstd=zstd)
    contents = read_contents(tmp_path)
    assert contents.file == file
    assert contents.file_bytes == len(file.read_bytes())
    assert sum(row.bytes for row in contents.rows) + contents.header_bytes + contents.zstd_bytes == contents.file_bytes
    assert (contents.zstd_bytes < 0) == (zstd is not None)
    assert contents.metadata == {**METADATA, "technique": "given"}
    by_name = {row.name: row for row in contents.rows}
    assert set(by_name) == set(state) - {"tied"}
    assert by_name["int4"].tied == ("tied",)
    assert {name: row.scheme for name, row in by_name.items()} == {
        **{name: name for name in SCHEMES if name != "dense"},
        **{f"sparse_{name}": f"{name} + mask" for name in LINEAR},
        "dense": "fp32",
        "sparse_dense": "fp32 + mask",
        "half": "fp16",
        "steps": "int64",
        "flags": "bool",
    }
    assert by_name["int8"].bytes == 3 * 801 + 3 * 4
    assert by_name["int4"].bits == 8 * (1202 + 12) / (3 * 801)
    assert by_name["binary"].bytes == 3 + 3 * 2 * 4  # 21 bits and two levels a row
    assert contents.fp32_bytes == sum(back.nbytes for name, back in read_artefact(file)[0].items() if name != "tied")
    assert contents.factor == contents.fp32_bytes / contents.file_bytes


def test_layers_alike_are_grouped_and_lose_no_byte(tmp_path: Path) -> None:
    state = {f"decoder.layers.{i}.fc1.weight": torch.randn(4, 6) for i in range(3)}
    state |= {"decoder.layers.3.fc1.weight": torch.randn(4, 7), "0.bias": torch.randn(2), "1.bias": torch.randn(3)}
    write_artefact(tmp_path, state, metadata={})
    rows = read_contents(tmp_path).rows
    groups = grouped(rows)
    assert [(row.name, row.shape, row.tensors, row.bytes) for row in groups] == [
        ("decoder.layers.*.fc1.weight", (4, 6), 3, 288),
        ("decoder.layers.3.fc1.weight", (4, 7), 1, 112),
        (VECTORS, None, 2, 20),
    ]
    assert sum(row.elements for row in groups) == sum(row.elements for row in rows)
    assert sum(row.fp32_bytes for row in groups) == sum(row.fp32_bytes for row in rows)


def base_shapes() -> dict[str, tuple[int, ...]]:
    """Transformer-base (Vaswani et al. 2017) over a joint vocabulary of 32,000 by fairseq's names; biases in one."""
    shapes: dict[str, tuple[int, ...]] = {"encoder.embed_tokens.weight": (32_000, 512)}
    for side, attentions in (("encoder", ("self_attn",)), ("decoder", ("self_attn", "encoder_attn"))):
        for layer in range(6):
            name = f"{side}.layers.{layer}"
            for attention in attentions:
                for projection in ("k", "v", "q", "out"):
                    shapes[f"{name}.{attention}.{projection}_proj.weight"] = (512, 512)
            shapes |= {f"{name}.fc1.weight": (2048, 512), f"{name}.fc2.weight": (512, 2048)}
            shapes[f"{name}.vectors"] = (len(attentions) * (4 * 512 + 2 * 512) + 2048 + 512 + 2 * 512,)
    return shapes


def base_model(scheme: str) -> tuple[dict[str, Tensor], Any]:
    """Transformer-base with random codes, and what packs it."""
    rng = torch.Generator().manual_seed(1)
    state: dict[str, Tensor] = {}
    packed: dict[str, Packed] = {}
    for name, shape in base_shapes().items():
        if len(shape) == 1:
            state[name] = torch.randn(shape, generator=rng)
        elif scheme == "pq":
            block = 4 if "attn" in name else 8
            codes = torch.randint(0, 256, (shape[0], shape[1] // block), generator=rng, dtype=torch.uint8)
            codebook = torch.randn(256, block, generator=rng)
            packed[name] = Packed(scheme, {"codes": codes, "codebook": codebook})
            state[name] = decode_pq(codes, codebook, shape)
        else:
            limit = LINEAR[scheme]
            codes = torch.randint(-limit, limit + 1, shape, generator=rng, dtype=torch.int8)
            scale = torch.rand(shape[0], generator=rng) + 0.1
            packed[name] = Packed(scheme, {"codes": codes, "scale": scale})
            state[name] = dequantize(codes, scale)
    state["decoder.embed_tokens.weight"] = state["decoder.output_projection.weight"] = state[
        "encoder.embed_tokens.weight"
    ]
    return state, Given(packed)


# In MB: what is demanded. Ternary codes take 1.6 bits each, not 2.
@pytest.mark.parametrize(("scheme", "limit"), [("int8", 62.0), ("int4", 31.5), ("ternary", 16.0), ("pq", 11.0)])
def test_a_transformer_base_fits_its_bytes(tmp_path: Path, scheme: str, limit: float) -> None:
    state, technique = base_model(scheme)
    file = write_artefact(tmp_path, state, metadata=METADATA, technique=technique)
    assert artefact_bytes(tmp_path) == file.stat().st_size < limit * 1e6
    contents = read_contents(file)
    assert contents.file_bytes == file.stat().st_size
    assert 60.4e6 < contents.elements < 60.6e6
    assert contents.elements * 4 == contents.fp32_bytes
