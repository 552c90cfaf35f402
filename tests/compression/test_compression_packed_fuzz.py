"""Damage and malice: whatever a file holds, it is refused in one line or read as it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_files import METADATA, every_scheme, seal
from safetensors import safe_open
from torch import Tensor

from tenko.compression import read_artefact, write_artefact
from tenko.compression.layout import SCHEMES

Read = tuple[dict[str, Tensor], dict[str, Any]]


@pytest.fixture(scope="module", params=[None, 3], ids=["plain", "zstd"])
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes, Read]:
    """A file with every scheme, its bytes, and what is read of it."""
    state, technique = every_scheme()
    folder = tmp_path_factory.mktemp("whole")
    file = write_artefact(folder, state, metadata=METADATA, technique=technique, zstd=request.param)
    return file, file.read_bytes(), read_artefact(file)


def read_or_refuse(file: Path) -> Read | None:
    """What is read, None if the file is refused as it should be; anything else fails the test."""
    try:
        return read_artefact(file)
    except ValueError as error:
        message = str(error)
    assert message.startswith(f"{file}: ")
    assert "\n" not in message
    return None


@settings(max_examples=400, deadline=None)
@given(data=st.data())
def test_random_damage_is_refused_or_changes_nothing(whole: tuple[Path, bytes, Read], data: st.DataObject) -> None:
    file, content, wanted = whole
    damaged = bytearray(content)
    for _ in range(data.draw(st.integers(1, 3))):
        # Half of the places are in the first bytes, where lengths and headers are.
        start = data.draw(st.one_of(st.integers(0, min(len(damaged), 600)), st.integers(0, len(damaged))))
        removed = data.draw(st.sampled_from([0, 1, 1, 1, 8, 100_000]))
        damaged[start : start + removed] = data.draw(st.binary(max_size=9))
    file.write_bytes(damaged)
    back = read_or_refuse(file)
    if back is not None:
        assert back[1] == wanted[1]
        assert back[0].keys() == wanted[0].keys()
        assert all(torch.equal(back[0][name], value) for name, value in wanted[0].items())


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Tensor], str]:
    """The parts of a file with every scheme, and its document."""
    state, technique = every_scheme()
    file = write_artefact(tmp_path_factory.mktemp("stored"), state, metadata=METADATA, technique=technique)
    with safe_open(str(file), "pt") as opened:
        document = opened.metadata()["tenko"]
    return safetensors.torch.load(file.read_bytes()), document


SIZES = st.one_of(st.integers(0, 9), st.sampled_from([801, 2403, 2**20, 2**31, 2**63, 2**70]))


@settings(max_examples=400, deadline=None)
@given(data=st.data())
def test_any_change_under_a_right_sha256_is_refused_or_read(
    stored: tuple[dict[str, Tensor], str], tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    parts, document = {key: part.clone() for key, part in stored[0].items()}, json.loads(stored[1])
    name = data.draw(st.sampled_from(sorted(document["tensors"])))
    entry = document["tensors"][name]
    keys = sorted(key for key in parts if key == name or key.startswith(f"{name}."))
    for _ in range(data.draw(st.integers(1, 3))):
        key = data.draw(st.sampled_from(keys))
        match data.draw(st.sampled_from(["poke", "poke", "cut", "retype", "shape", "scheme", "mask", "swap"])):
            case "poke" if parts[key].nbytes and parts[key].dtype != torch.bool:
                flat = parts[key].reshape(-1).view(torch.uint8)
                flat[data.draw(st.integers(0, len(flat) - 1))] = data.draw(st.integers(0, 255))
            case "cut":
                parts[key] = parts[key].reshape(-1)[data.draw(st.integers(0, 3)) :].clone()
            case "retype":
                kinds = [torch.float32, torch.float16, torch.int64, torch.int32, torch.int8, torch.uint8, torch.bool]
                parts[key] = parts[key].to(data.draw(st.sampled_from(kinds)))
            case "shape":
                entry["shape"] = data.draw(st.lists(SIZES, max_size=4))
            case "scheme":
                entry["scheme"] = data.draw(st.sampled_from([*SCHEMES, "int5"]))
            case "mask":
                entry["mask"] = data.draw(st.sampled_from([True, False, None]))
            case "swap":
                other = data.draw(st.sampled_from(sorted(parts)))
                parts[key], parts[other] = parts[other], parts[key]
    document["sha256"] = seal(parts, document)
    file = tmp_path_factory.getbasetemp() / "changed.safetensors"
    file.write_bytes(safetensors.torch.save(parts, {"tenko": json.dumps(document)}))
    back = read_or_refuse(file)
    if back is not None:
        assert {key: list(value.shape) for key, value in back[0].items() if key in document["tensors"]} == {
            key: value["shape"] for key, value in document["tensors"].items()
        }
