"""The artefact file: lossless, ties once, honest about bytes, atomic, and strict about what it reads."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor

from tenko.compression import Int8PerChannel, QuantizeConfig, artefact_bytes, read_artefact, write_artefact

METADATA = {"direction": "en-cs", "model": {"arch": "transformer", "embed_dim": 8}}
Parts = dict[str, Tensor]
Document = dict[str, Any]


def example(folder: Path) -> tuple[Path, dict[str, Tensor]]:
    """A file with an int8 weight, a tied one, a dense vector and an integer; returns it with the state written."""
    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Linear(6, 4), torch.nn.Linear(6, 4, bias=False))
    model[1].weight = model[0].weight
    model.register_buffer("steps", torch.tensor(7))
    technique = Int8PerChannel(QuantizeConfig())
    technique.attach(model)
    technique.bake(model)
    return write_artefact(folder, model.state_dict(), metadata=METADATA, technique=technique), model.state_dict()


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


def test_reading_gives_back_what_was_written(tmp_path: Path) -> None:
    file, state = example(tmp_path / "artefact")
    assert file == tmp_path / "artefact" / "model.safetensors"
    for path in (file, file.parent):
        back, metadata = read_artefact(path)
        assert set(back) == set(state)
        assert all(torch.equal(back[name], state[name]) for name in state)
        assert back["0.weight"] is back["1.weight"]
        assert {key: metadata[key] for key in METADATA} == METADATA
        assert metadata["technique"] == "int8"
        assert metadata["tied"] == {"1.weight": "0.weight"}
        assert metadata["tensors"]["0.weight"] == {"scheme": "int8", "shape": [4, 6]}


def test_file_holds_one_byte_a_weight_and_tied_tensors_once(tmp_path: Path) -> None:
    file, _ = example(tmp_path)
    parts = safetensors.torch.load(file.read_bytes())
    assert {name: (p.dtype, tuple(p.shape)) for name, p in parts.items()} == {
        "0.weight.codes": (torch.int8, (4, 6)),
        "0.weight.scale": (torch.float32, (4,)),
        "0.bias": (torch.float32, (4,)),
        "steps": (torch.int64, ()),
    }


def test_reported_bytes_are_the_files_size(tmp_path: Path) -> None:
    file, _ = example(tmp_path)
    assert artefact_bytes(tmp_path) == artefact_bytes(file) == len(file.read_bytes())
    big = torch.randn(300, 200)
    dense = artefact_bytes(write_artefact(tmp_path / "dense", {"w": big}, metadata={}))
    assert 240_000 < dense < 242_000


def test_dense_floats_are_stored_as_fp32_and_views_apart_from_their_base(tmp_path: Path) -> None:
    base = torch.randn(6, 4)
    state = {"half": base.half(), "top": base[:3], "column": base[:, 1], "turned": base.t()}
    state["empty"], state["also_empty"] = torch.zeros(0), torch.zeros(0)
    write_artefact(tmp_path, state, metadata={})
    back, metadata = read_artefact(tmp_path)
    assert metadata["tied"] == {}
    assert metadata["technique"] == "dense"
    assert all(value.dtype == torch.float32 for value in back.values())
    assert all(torch.equal(back[name], value.float()) for name, value in state.items())


def test_equal_states_give_equal_files(tmp_path: Path) -> None:
    assert example(tmp_path / "a")[0].read_bytes() == example(tmp_path / "b")[0].read_bytes()


def test_state_does_not_change_when_the_file_is_replaced(tmp_path: Path) -> None:
    write_artefact(tmp_path, {"w": torch.ones(5000)}, metadata={})
    back, _ = read_artefact(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert bool((back["w"] == 1).all())


def test_failed_writing_leaves_the_old_file_and_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, _ = example(tmp_path)
    old = file.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*model\.safetensors'"):
        write_artefact(tmp_path, {"w": torch.ones(3)}, metadata={})
    assert file.read_bytes() == old
    assert os.listdir(tmp_path) == ["model.safetensors"]


def _drop(key: str) -> Callable[[Parts, Document], None]:
    return lambda parts, document: parts.__delitem__(key)


def _entry(key: str, value: Any, name: str = "0.weight") -> Callable[[Parts, Document], None]:
    return lambda parts, document: document["tensors"][name].__setitem__(key, value)


def _part(key: str, change: Callable[[Tensor], Tensor]) -> Callable[[Parts, Document], None]:
    return lambda parts, document: parts.__setitem__(key, change(parts[key]).contiguous())


def _set(key: str, value: Any) -> Callable[[Parts, Document], None]:
    return lambda parts, document: document.__setitem__(key, value)


MALFORMED = {
    "newer": (_set("format", 3), r"format 3 is newer than this tenko reads \(2\)"),
    "no version": (_set("format", "1"), "no format version"),
    "no list of tensors": (_set("tensors", [1]), "metadata has no 'tensors'"),
    "no sha256": (lambda parts, document: document.__delitem__("sha256"), "metadata has no 'sha256'"),
    "missing codes": (_drop("0.weight.codes"), r"tensor 0\.weight\.codes is missing"),
    "missing scale": (_drop("0.weight.scale"), r"tensor 0\.weight\.scale is missing"),
    "missing dense": (_drop("0.bias"), r"tensor 0\.bias is missing"),
    "wrong dtype": (_part("0.weight.codes", lambda t: t.byte()), r"0\.weight\.codes is uint8, not int8"),
    "foreign dtype": (_part("0.weight.codes", lambda t: t.short()), r"0\.weight\.codes has dtype I16; valid are F32, "),
    "wrong dense dtype": (_part("0.bias", lambda t: t.to(torch.int8)), r"0\.bias is int8, not float32 or float16 or "),
    "wrong shape": (_part("0.weight.codes", lambda t: t.t()), r"codes has shape \[6, 4\], not \[4, 6\]"),
    "wrong scale": (_part("0.weight.scale", lambda t: t[:2]), r"scale has shape \[2\], not \[4\] or \[1\]"),
    "unknown scheme": (_entry("scheme", "int5"), r"unknown scheme 'int5'; valid are dense, int8, int4, ternary, "),
    "no scheme": (_entry("scheme", None), "names no scheme"),
    "no shape": (_entry("shape", [-4, "x"]), "has no shape"),
    "left over": (lambda parts, document: parts.__setitem__("x", torch.ones(1)), "tensor x is in no list"),
    "tied to nothing": (_set("tied", {"1.weight": "9.weight"}), r"1\.weight is tied to '9\.weight', which is missing"),
    "tied to a list": (_set("tied", {"1.weight": [1]}), "which is missing"),
    "tied and stored": (_set("tied", {"0.bias": "0.weight"}), r"0\.bias is both stored and tied"),
    "changed codes": (_part("0.weight.codes", lambda t: t + 1), "damaged: the tensors or the metadata differ"),
    "changed metadata": (_set("direction", "cs-en"), "damaged: the tensors or the metadata differ"),
    "sane shape": (_entry("shape", [0, 2**70]), r"0\.weight claims shape \[0, 1180591620717411303424\], too much"),
    "no mask": (_entry("mask", 1), "0\\.weight has mask 1, which is neither true nor false"),
    "a name of two lines": (lambda parts, document: parts.__setitem__("x\ny", torch.ones(1)), r"x\\ny is in no list"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_content_is_refused_in_one_line(tmp_path: Path, case: str) -> None:
    file, _ = example(tmp_path)
    change, message = MALFORMED[case]
    rewrite(file, change)
    with pytest.raises(ValueError, match=message) as caught:
        read_artefact(tmp_path)
    assert str(caught.value).startswith(f"{file}: ")
    assert "\n" not in str(caught.value)


def test_rewriting_without_a_change_is_accepted(tmp_path: Path) -> None:
    file, state = example(tmp_path)
    rewrite(file, lambda parts, document: None)
    assert set(read_artefact(file)[0]) == set(state)


@pytest.mark.parametrize("cut", [0, 5, 100, -1])
def test_truncated_and_foreign_files_are_refused(tmp_path: Path, cut: int) -> None:
    file, _ = example(tmp_path)
    file.write_bytes(file.read_bytes()[:cut])
    with pytest.raises(ValueError, match="damaged or not a safetensors file"):
        read_artefact(tmp_path)


def test_every_flipped_byte_of_the_tensors_is_noticed(tmp_path: Path) -> None:
    file, _ = example(tmp_path)
    data = file.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    for position in range(start, len(data)):
        file.write_bytes(data[:position] + bytes([data[position] ^ 16]) + data[position + 1 :])
        with pytest.raises(ValueError, match="damaged"):
            read_artefact(tmp_path)


def test_files_of_others_and_missing_ones_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model\.safetensors: missing"):
        read_artefact(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(safetensors.torch.save({"w": torch.ones(2)}))
    with pytest.raises(ValueError, match="has no 'tenko' metadata"):
        read_artefact(tmp_path)
    file.write_bytes(safetensors.torch.save({"w": torch.ones(2)}, {"tenko": "{"}))
    with pytest.raises(ValueError, match="metadata is no JSON"):
        read_artefact(tmp_path)
    file.write_bytes(safetensors.torch.save({"w": torch.ones(2)}, {"tenko": "[]"}))
    with pytest.raises(ValueError, match="no format version"):
        read_artefact(tmp_path)


def test_settings_import_without_torch() -> None:
    code = "import sys, tenko.compression.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
