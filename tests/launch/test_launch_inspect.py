"""`tenko inspect`: a table that fits 100 columns and adds up, JSON that says the same, one line for what is wrong."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from packed_files import METADATA, every_scheme

from tenko.compression import write_artefact
from tenko.compression.container import artefact_file
from tenko.launch import cli
from tenko.launch.recipe import load
from tenko.launch.rundir import RunDirectory, RunLock
from tenko.nmt import pretrained


def tenko(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as caught:
        cli.main(list(arguments))
    output = capsys.readouterr()
    assert isinstance(caught.value.code, int)
    return caught.value.code, output.out, output.err


@pytest.fixture(params=[None, 3], ids=["plain", "zstd"])
def file(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A file with every scheme, and some layers."""
    state, technique = every_scheme()
    for layer in range(12):
        state[f"decoder.layers.{layer}.encoder_attn.out_proj.weight"] = torch.randn(8, 8)
    return write_artefact(tmp_path, state, metadata=METADATA, technique=technique, zstd=request.param)


def byte_column(table: str) -> list[int]:
    """The last column below the table's head; a long path may break the headline above it after `format 2`."""
    lines = table.splitlines()
    head = next(index for index, line in enumerate(lines) if line.split()[:2] == ["tensor", "scheme"])
    return [int(line.split()[-1].replace(",", "")) for line in lines[head:] if re.search(r"\s-?[\d,]+$", line)]


@pytest.mark.parametrize("every", [False, True])
def test_the_table_adds_up_to_the_files_size(capsys: pytest.CaptureFixture[str], file: Path, every: bool) -> None:
    code, out, err = tenko(capsys, "inspect", str(file), *(["--all"] if every else []))
    assert (code, err) == (0, "")
    assert max(map(len, out.splitlines()[1:])) <= 100
    *parts, total = byte_column(out)
    assert sum(parts) == total == file.stat().st_size
    assert ("zstd" in out.split("header")[1]) == (file.suffix == ".zst")
    assert out.count("encoder_attn.out_proj.weight") == (12 if every else 1)
    assert ("decoder.layers.*.encoder_attn" in out) is not every
    assert "ternary + mask" in out
    assert "technique given, direction en-cs" in " ".join(out.split())
    assert "times as many" in out


def test_json_says_the_same(capsys: pytest.CaptureFixture[str], file: Path) -> None:
    code, out, _ = tenko(capsys, "inspect", str(file.parent), "--json")
    assert code == 0
    document = json.loads(out)
    assert document["file"] == str(file)
    assert document["file_bytes"] == file.stat().st_size
    counted = sum(tensor["bytes"] for tensor in document["tensors"])
    assert counted + document["header_bytes"] + document["zstd_bytes"] == document["file_bytes"]
    by_name = {tensor["name"]: tensor for tensor in document["tensors"]}
    assert by_name["int4"] == {
        "name": "int4",
        "scheme": "int4",
        "shape": [3, 801],
        "elements": 2403,
        "bytes": 1214,
        "bits": 8 * 1214 / 2403,
        "fp32_bytes": 4 * 2403,
        "tied": ["tied"],
    }
    assert document["metadata"] == {**METADATA, "technique": "given"}


def test_names_out_of_a_file_do_not_steer_the_terminal(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    write_artefact(tmp_path, {"[red]w\x1b[31m": torch.ones(2)}, metadata={"direction": "\x1b]0;x\x07"})
    code, out, _ = tenko(capsys, "inspect", str(tmp_path))
    assert code == 0
    assert "\x1b" not in out
    assert "[red]w\\x1b[31m" in out


def test_bad_usage_and_bad_files_are_one_line_and_exit_2(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"no model")
    for arguments, message in (
        ((), "give MODEL ("),
        ((str(tmp_path), "--run", str(tmp_path)), "give MODEL ("),
        ((str(tmp_path), "--stage", "train"), "--stage: needs --run"),
        ((str(tmp_path),), "model.safetensors: damaged or not a safetensors file"),
        (("--run", str(tmp_path / "nix")), "nix: does not exist"),
    ):
        code, out, err = tenko(capsys, "inspect", *arguments)
        assert (code, out) == (2, "")
        assert message in err
        assert len(err.splitlines()) == 1


def test_what_is_no_model_is_told_apart(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no model")
    with RunLock(tmp_path / "run"):
        RunDirectory.create(tmp_path / "run", load("tiny"))
    (tmp_path / "run/1-train/artefact").mkdir(parents=True)
    for name, message in (
        ("nix", "no such file; valid: en-cs, cs-en, a model file, the folder of an artefact"),
        ("nix/model.safetensors", "no such file; valid: "),
        ("notes.txt", "a file, not a model; a model's is named model.safetensors or model.safetensors.zst"),
        ("run", f"is a run directory; give it as --run {tmp_path}/run"),
        ("run/1-train", f"is the folder of a stage; give its artefact, {tmp_path}/run/1-train/artefact"),
    ):
        code, out, err = tenko(capsys, "inspect", str(tmp_path / name))
        assert (code, out, len(err.splitlines())) == (2, "", 1)
        assert err.startswith(f"tenko: error: {tmp_path / name}: {message}"), err


def test_a_model_that_ships_is_inspected_by_its_name(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = tenko(capsys, "inspect", "en-cs", "--json")
    assert code == 0
    assert json.loads(out)["file_bytes"] == artefact_file(pretrained.path("en-cs")).stat().st_size
