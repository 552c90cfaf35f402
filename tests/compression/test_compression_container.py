"""The file itself: zstd or plain, one of them a folder, no larger in memory than its size allows."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import zstandard
from packed_files import METADATA, every_scheme

from tenko.compression import artefact_bytes, container, read_artefact, write_artefact
from tenko.compression.layout import SCHEMES


def test_zstd_keeps_every_bit_and_is_deterministic(tmp_path: Path) -> None:
    state, technique = every_scheme()
    plain = write_artefact(tmp_path / "plain", state, metadata=METADATA, technique=technique)
    small = write_artefact(tmp_path / "small", state, metadata=METADATA, technique=technique, zstd=19)
    again = write_artefact(tmp_path / "again.safetensors", state, metadata=METADATA, technique=technique, zstd=19)
    assert small == tmp_path / "small" / "model.safetensors.zst"
    assert again == tmp_path / "again.safetensors.zst"
    assert small.read_bytes() == again.read_bytes()
    assert zstandard.ZstdDecompressor().decompress(small.read_bytes()) == plain.read_bytes()
    assert artefact_bytes(small.parent) == artefact_bytes(small) == len(small.read_bytes()) < artefact_bytes(plain)
    for path in (plain, plain.parent, small, small.parent):
        back, metadata = read_artefact(path)
        assert set(back) == set(state)
        assert all(torch.equal(back[name], state[name]) for name in state)
        assert {entry["scheme"] for entry in metadata["tensors"].values()} == set(SCHEMES)


def test_a_folder_holds_one_kind_of_file(tmp_path: Path) -> None:
    state = {"w": torch.ones(3)}
    plain = write_artefact(tmp_path, state, metadata={})
    data = plain.read_bytes()
    assert write_artefact(tmp_path, state, metadata={}, zstd=3).name == "model.safetensors.zst"
    assert os.listdir(tmp_path) == ["model.safetensors.zst"]
    plain.write_bytes(data)
    for read in (read_artefact, artefact_bytes):
        with pytest.raises(ValueError, match=r"holds model\.safetensors and model\.safetensors\.zst; delete the one"):
            read(tmp_path)
    write_artefact(tmp_path, state, metadata={})
    assert os.listdir(tmp_path) == ["model.safetensors"]


@pytest.mark.parametrize("level", [0, 23, -1])
def test_zstd_levels_are_checked_before_anything_is_written(tmp_path: Path, level: int) -> None:
    with pytest.raises(ValueError, match=f"zstd: {level} is no level; valid are 1 to 22"):
        write_artefact(tmp_path, {"w": torch.ones(3)}, metadata={}, zstd=level)
    assert os.listdir(tmp_path) == []


def test_a_zstd_bomb_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors.zst"
    bomb = zstandard.ZstdCompressor(level=1).compress(bytes(1 << 20))
    assert zstandard.frame_content_size(bomb) == 1 << 20
    claim = bomb.replace((1 << 20).to_bytes(4, "little"), (0xF0000000).to_bytes(4, "little"), 1)
    file.write_bytes(claim)
    with pytest.raises(ValueError, match=r"zstd frame claims 4,026,531,840 bytes; read are 1,073,741,824 at most"):
        read_artefact(tmp_path)
    file.write_bytes(bomb.replace((1 << 20).to_bytes(4, "little"), (1 << 19).to_bytes(4, "little"), 1))
    with pytest.raises(ValueError, match="damaged or not a zstd file"):
        read_artefact(tmp_path)
    stream = zstandard.ZstdCompressor(level=1).compressobj()
    file.write_bytes(stream.compress(bytes(1 << 20)) + stream.flush())
    with pytest.raises(ValueError, match="zstd frame does not tell its size"):
        read_artefact(tmp_path)
    whole = zstandard.ZstdCompressor().compress(write_artefact(tmp_path / "x", {}, metadata={}).read_bytes())
    file.write_bytes(whole + whole)
    with pytest.raises(ValueError, match="damaged or not a zstd file"):
        read_artefact(tmp_path)


def test_what_could_not_be_read_back_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(container, "_FREE_ELEMENTS", 1000)
    state = {"w": torch.full((100_000,), 1 / 3)}
    write_artefact(tmp_path, state, metadata={})
    with pytest.raises(ValueError, match=r"model\.safetensors\.zst: 100,\d+ elements in \d+ bytes would be refused"):
        write_artefact(tmp_path, state, metadata={}, zstd=3)
    assert os.listdir(tmp_path) == ["model.safetensors"]
