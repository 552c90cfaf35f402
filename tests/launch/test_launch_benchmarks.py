"""The benchmarks refuse bad input with one line that names the option, before they measure anything."""

from __future__ import annotations

import importlib
import shlex
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

REFUSED = {
    "links --extra foo": "--extra: must be NAME=PYTHON:SCRIPT, is 'foo'",
    "links --extra a=/no/python:benchmarks/onebit_adam.py": "--extra: a: /no/python is no program",
    "links --hosts 0": "--hosts: must be an integer from 2 to 64, is '0'",
    "links --hosts 2 1": "--hosts: must be an integer from 2 to 64, is '1'",
    "links --peers foo --estimate": "--peers: invalid choice: 'foo' (choose from",
    "links --count 0": "--count: must be an integer of at least 1, is '0'",
    "links --out /no/folder/links.json": "--out: must be a file in a folder that exists",
    "speedup --rate foo": "--rate: must be a number with kbit, mbit, gbit, or none, is 'foo'",
    "speedup --peers foo --estimate": "--peers: invalid choice: 'foo' (choose from",
    "speedup --draw --out no.json": "--draw: no.json is not there",
    "duplex --rate foo": "--rate: must be a number with kbit, mbit, gbit, or none, is 'foo'",
    "duplex --rate none": "--rate: none has no floor; give a rate such as 1gbit",
    "duplex --hosts 1": "--hosts: must be an integer from 2 to 64, is '1'",
    "duplex --megabytes 0": "--megabytes: must be a number above 0, is '0'",
    "auto --hosts 0": "--hosts: must be an integer from 2 to 64, is '0'",
    "kernels --repetitions 0": "--repetitions: must be an integer of at least 1, is '0'",
    "kernels --megabytes 0": "--megabytes: must be an integer of at least 1, is '0'",
    "kernels --block 7": "--block: must be a multiple of 8, or 0 for the default, is 7",
    "decoding --run no/run": "no/run: does not exist; give the run directory",
    "decoding --model no/model --corpus no/corpus": "no/model/model.safetensors: missing",
    "gradients --run no/run": "--run: no/run: does not exist; give the run directory",
    "quality --seeds one": "--seeds: must be an integer of at least 0, is 'one'",
    "quality --recipe nope": "--recipe nope, route fp32:",
    "quality --recipe demo": "--recipe demo: its first stage must be train, is pretrained",
    "startup --times 0": "--times: must be an integer of at least 1, is '0'",
    "faults --ranks 1": "--ranks: must be an integer of at least 2, is '1'",
}


def refusal(command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """What a benchmark says on its last line; it must end with status 2."""
    script, *arguments = shlex.split(command)
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *arguments])
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(script).main()
    assert ended.value.code == 2
    said = capsys.readouterr()
    assert said.out == ""
    return said.err.splitlines()[-1]


@pytest.mark.parametrize("command", REFUSED)
def test_bad_input_is_refused_in_one_line(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert REFUSED[command] in refusal(command, monkeypatch, capsys)
    assert not list(tmp_path.iterdir())


def test_a_run_that_does_not_fit_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from tenko.launch.recipe import dump, load

    recipes = {"demo": "demo", "tiny": "tiny"}
    overrides = {"tiny": ["comm.route=server"]}
    for name, recipe in recipes.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text(dump(load(recipe, overrides.get(name, []))), encoding="utf-8")
    said = refusal(f"gradients --run {tmp_path / 'demo'}", monkeypatch, capsys)
    assert "its first stage is pretrained; needed is a run whose first stage is train" in said
    said = refusal(f"gradients --run {tmp_path / 'tiny'}", monkeypatch, capsys)
    assert "trained with comm.route server; valid: all_reduce, fp32" in said
    said = refusal(f"decoding --run {tmp_path / 'demo'} --stage nope", monkeypatch, capsys)
    assert "no stage is finished yet" in said


def test_t_quantiles_beyond_the_table() -> None:
    quality = importlib.import_module("quality")
    wanted = {1: 12.706, 9: 2.262, 10: 2.228, 11: 2.201, 20: 2.086, 30: 2.042, 100: 1.984}
    assert {freedom: round(quality.t975(freedom), 3) for freedom in wanted} == wanted
    mean, half = quality.interval([float(i) for i in range(12)])
    assert (mean, round(half, 2)) == (5.5, 2.29)
