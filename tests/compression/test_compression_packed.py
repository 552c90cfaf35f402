"""The artefact file: lossless, ties once, honest about bytes, atomic, and strict about what it reads."""

from __future__ import annotations

import hashlib
import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from packed_files import METADATA, Document, Parts, every_scheme, example, rewrite
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tenko.compression import artefact_bytes, read_artefact, write_artefact
from tenko.compression.schemes import decode_pq, dequantize


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


def test_memory_seen_in_two_shapes_is_stored_for_each(tmp_path: Path) -> None:
    whole = torch.randn(2, 3)
    state = {"matrix": whole, "vector": whole.view(6), "deep": whole.view(1, 2, 3), "tied": whole}
    write_artefact(tmp_path, state, metadata={})
    back, metadata = read_artefact(tmp_path)
    assert metadata["tied"] == {"tied": "matrix"}
    assert all(torch.equal(back[name], value) for name, value in state.items())


@pytest.mark.parametrize("name", ["", "model.safetensors", "other.safetensors.zst"])
def test_the_file_of_the_other_compression_goes_so_that_nobody_reads_the_old_model(tmp_path: Path, name: str) -> None:
    for value, zstd in enumerate((None, 3, None)):
        file = write_artefact(tmp_path / name, {"w": torch.full((3,), float(value))}, metadata={}, zstd=zstd)
        assert file.name.endswith(".zst") == (zstd is not None)
        assert list(tmp_path.iterdir()) == [file]
        assert bool((read_artefact(file)[0]["w"] == value).all())


@pytest.mark.parametrize("shape", [(1,) * 9, (0, 2**29)])
def test_a_shape_that_would_be_refused_is_not_written(tmp_path: Path, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"has 9 dimensions; a file takes at most 8|would be refused when read"):
        write_artefact(tmp_path, {"w": torch.zeros(shape), "rest": torch.ones(3)}, metadata={})
    assert not list(tmp_path.iterdir())


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


def test_a_file_of_format_1_still_loads(tmp_path: Path) -> None:
    """Its bytes by hand, as the first release wrote them: the sha256 leaves the document out."""
    codes, scale, bias = bytes([1, 0xFF, 127, 0x81, 0, 2]), struct.pack("<2f", 0.5, 2.0), struct.pack("<2f", 1.5, -3.0)
    digest = hashlib.sha256()
    digest.update(b"b float32 [2]\n" + bias + b"w.codes int8 [2, 3]\n" + codes + b"w.scale float32 [2]\n" + scale)
    tensors = {"b": {"scheme": "dense", "shape": [2]}, "w": {"scheme": "int8", "shape": [2, 3]}}
    document = {"format": 1, "technique": "int8", "direction": "en-cs", "tensors": tensors, "tied": {"v": "w"}}
    document["sha256"] = digest.hexdigest()
    header = {
        "__metadata__": {"tenko": json.dumps(document, sort_keys=True)},
        "b": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
        "w.scale": {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]},
        "w.codes": {"dtype": "I8", "shape": [2, 3], "data_offsets": [16, 22]},
    }
    text = json.dumps(header).encode()
    (tmp_path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bias + scale + codes)
    state, metadata = read_artefact(tmp_path)
    assert state["w"].tolist() == [[0.5, -0.5, 63.5], [-254.0, 0.0, 4.0]]
    assert state["v"] is state["w"]
    assert state["b"].tolist() == [1.5, -3.0]
    assert metadata == document


def test_a_small_file_can_not_claim_a_huge_tensor(tmp_path: Path) -> None:
    """pq with one code of 2^30 weights: every check of bytes holds, but for the bound on what a byte may mean."""
    file, _ = example(tmp_path)

    def change(parts: Parts, document: Document) -> None:
        for part in ("codes", "scale"):
            del parts[f"0.weight.{part}"]
        rows = 1 << 20
        parts["0.weight.codes"] = torch.zeros(rows // 8, dtype=torch.uint8)
        parts["0.weight.codebook"] = torch.zeros(1, 1024)
        document["tensors"]["0.weight"] = {"scheme": "pq", "shape": [rows, 1024]}

    rewrite(file, change, sealed=True)
    with pytest.raises(ValueError, match=r"0\.weight claims shape \[1048576, 1024\], too much for the file's size"):
        read_artefact(tmp_path)


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


def _poke(key: str, value: float, place: int = 0) -> Callable[[Parts, Document], None]:
    return lambda parts, document: parts[key].view(-1).__setitem__(place, value)


OUT_OF_RANGE = {
    "int8 -128": (_poke("int8.codes", -128), r"int8\.codes: holds a code out of range; int8 has -127 to 127"),
    "nibble -8": (_poke("int4.codes", 0x18), r"int4\.codes: holds a code out of range; int4 has -7 to 7"),
    "sparse nibble -8": (_poke("sparse_int4.codes", 0x18), r"sparse_int4\.codes: holds a code out of range"),
    "no trits": (_poke("ternary.codes", 243), r"ternary\.codes: byte 243 holds no 5 trits"),
    "filling of nibbles": (_poke("int4.codes", 0x10, -1), r"int4\.codes: the bits after its last value are not zero"),
    "filling of bits": (_poke("binary.codes", 0x80, -1), r"binary\.codes: the bits after its last value are not zero"),
    "pq code 5 of 5": (_poke("pq.codes", 0b101), r"pq\.codes: holds a code out of range; pq has 0 to 4"),
    "pq_int8 code 7 of 5": (
        _poke("pq_int8.codes", 7),
        r"pq_int8\.codes: holds a code out of range; pq_int8 has 0 to 4",
    ),
    "scale NaN": (_poke("int8.scale", float("nan")), r"int8\.scale holds inf or NaN"),
    "level inf": (_poke("binary.levels", float("inf")), r"binary\.levels holds inf or NaN"),
    "centroid NaN": (_poke("pq.codebook", float("nan")), r"pq\.codebook holds inf or NaN"),
    "scale of centroids": (_poke("pq_int8.scale", float("-inf")), r"pq_int8\.scale holds inf or NaN"),
    "mask with one too many": (
        lambda parts, document: parts["sparse_int8.mask"].__setitem__(0, parts["sparse_int8.mask"][0] ^ 1),
        r"sparse_int8\.codes has shape \[\d+\], not \[\d+\]",
    ),
    "mask of values": (
        lambda parts, document: parts["sparse_dense.mask"].fill_(255),
        r"sparse_dense\.values has shape \[\d+\], not \[240\]",
    ),
    "short mask": (_part("sparse_int4.mask", lambda t: t[:-1]), r"sparse_int4\.mask has shape \[300\], not \[301\]"),
    "filling of the mask": (
        lambda parts, document: parts["sparse_ternary.mask"].copy_(_moved_up(parts["sparse_ternary.mask"])),
        r"sparse_ternary\.mask: the bits after its last value are not zero",
    ),
    "mask under pq": (_entry("mask", True, "pq"), "tensor pq has a mask under pq, whose code 0 is no zero weight"),
    "odd block": (_entry("shape", [4, 3], "pq"), r"pq\.codebook has blocks of 2, which do not divide 3 columns"),
    "flat codebook": (_part("pq.codebook", lambda t: t.reshape(-1)), r"has shape \[10\], not \[centroids, block\]"),
    "empty codebook": (_part("pq.codebook", lambda t: t[:0]), r"has shape \[0, 2\], not \[centroids, block\]"),
    "dense codebook of ints": (_part("pq.codebook", lambda t: t.int()), "pq.codebook is int32, not float32 or float16"),
    "pq_int8's scale": (_part("pq_int8.scale", lambda t: t.repeat(3)), r"scale has shape \[3\], not \[5\] or \[1\]"),
    "levels": (_part("binary.levels", lambda t: t[:2]), r"levels has shape \[2, 2\], not \[3, 2\] or \[1, 2\]"),
    "no dimension": (_entry("shape", [], "int4"), "int4 has no dimension, so it can't be int4"),
    "more rows than codes": (_entry("shape", [3, 803], "int4"), r"int4\.codes has shape \[1202\], not \[1205\]"),
}


def _moved_up(mask: Tensor) -> Tensor:
    """The mask with one of its bits moved to the last place, which belongs to no element."""
    mask = mask.clone()
    place = int(mask.nonzero()[0])
    mask[place] &= mask[place] - 1  # the lowest bit that is set
    mask[-1] |= 0x80
    return mask


@pytest.mark.parametrize("case", OUT_OF_RANGE)
def test_wrong_values_are_refused_even_with_a_right_sha256(tmp_path: Path, case: str) -> None:
    state, technique = every_scheme()
    file = write_artefact(tmp_path, state, metadata=METADATA, technique=technique)
    change, message = OUT_OF_RANGE[case]
    rewrite(file, change, sealed=True)
    with pytest.raises(ValueError, match=message) as caught:
        read_artefact(tmp_path)
    assert str(caught.value).startswith(f"{file}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["[" * 5000 + "]" * 5000, "9" * 5000, '{"format": 2' + "0" * 5000 + "}"])
def test_metadata_that_no_parser_likes_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(safetensors.torch.save({"w": torch.ones(2)}, {"tenko": text}))
    with pytest.raises(ValueError, match=r"model\.safetensors: ") as caught:
        read_artefact(tmp_path)
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


class Made(TorchDispatchMode):
    """Bytes of the tensors that operations give, views and what is written in place left out."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.untyped_storage()._cdata not in self._seen:
            self._seen.add(out.untyped_storage()._cdata)
            self.sizes.append(out.untyped_storage().nbytes())
        return out


def test_decoding_takes_little_more_than_what_it_gives() -> None:
    """A few bytes of zstd may claim a whole GiB of weights: two or three times that must not be needed on the way."""
    codes = torch.zeros(1 << 11, 1 << 11, dtype=torch.uint8)
    with Made() as made:
        weight = decode_pq(codes, torch.ones(2, 1), codes.shape)
    assert weight.shape == codes.shape
    assert max(made.sizes) == weight.nbytes
    assert sum(size > weight.nbytes // 3 for size in made.sizes) == 1, "numbers of all codes at once are as many bytes"
    with Made() as made:
        dequantize(codes, torch.ones(1))
    assert made.sizes.count(weight.nbytes) == 1


def test_settings_import_without_torch() -> None:
    code = "import sys, tenko.compression.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16, torch.complex64])
def test_a_type_that_would_not_be_read_is_not_written(tmp_path: Path, dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match=rf"^tensor counts is {dtype}, which has no place in an artefact; valid: "):
        write_artefact(tmp_path, {"counts": torch.zeros(3, dtype=dtype)}, metadata={})
    assert not list(tmp_path.iterdir())
