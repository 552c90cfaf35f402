"""The command line: help, usage errors and the reading of stdin; commands that need a model are tested elsewhere."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tenko.launch import cli, commands
from tenko.launch.errors import RunFailed, Terminated, one_line
from tenko.launch.recipe import load
from tenko.launch.rundir import RunDirectory, RunLock


def tenko(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as caught:
        cli.main(list(arguments))
    output = capsys.readouterr()
    assert isinstance(caught.value.code, int)
    return caught.value.code, output.out, output.err


@pytest.mark.parametrize("command", ["run", "translate", "evaluate", "export", "inspect", "report", "watch"])
def test_every_command_explains_itself_with_an_example(capsys: pytest.CaptureFixture[str], command: str) -> None:
    code, out, _ = tenko(capsys, command, "--help")
    assert code == 0
    assert out.startswith(f"Usage: tenko {command}")
    assert command == "report" or f"tenko {command} " in out.split("\n", 1)[1]


def test_help_is_quick() -> None:
    before = time.monotonic()
    code = "import sys; from tenko.launch import cli\n"
    code += "try: cli.main(['--help'])\nfinally: assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "translate" in done.stdout
    assert time.monotonic() - before < 3, "0.1 s when the machine is idle"


@pytest.mark.parametrize("ignored", [False, True])
def test_ctrl_c_while_it_still_imports_leaves_no_traceback(ignored: bool) -> None:
    """As typer, the first large import, begins; SIGINT that a shell has set to be ignored stays so."""
    code = (
        "import builtins, os, signal, sys\n"
        f"signal.signal(signal.SIGINT, signal.SIG_IGN if {ignored} else signal.default_int_handler)\n"
        "before, real = signal.getsignal(signal.SIGINT), builtins.__import__\n"
        "def interrupted(name, *rest):\n"
        "    if name == 'typer' and 'now' in sys.argv: os.kill(os.getpid(), signal.SIGINT)\n"
        "    return real(name, *rest)\n"
        "builtins.__import__ = interrupted\n"
        "import tenko.launch.cli\n"
        "assert signal.getsignal(signal.SIGINT) is before\n"
    )
    for arguments, wanted in ((["now"], 0 if ignored else -signal.SIGINT), ([], 0)):
        done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout, done.stderr) == (wanted, "", "")


@pytest.mark.parametrize("arguments", ["--help", "watch --once run"])
def test_a_reader_that_goes_away_ends_a_command_quietly(arguments: str, tmp_path: Path) -> None:
    with RunLock(tmp_path / "run"):
        RunDirectory.create(tmp_path / "run", load("tiny"))
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "tenko.launch.cli", *arguments.split()]
    done = subprocess.run(command, cwd=tmp_path, stdout=write, stderr=subprocess.PIPE, check=False)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, b"")


def test_closed_streams_are_as_devnull() -> None:
    code = "from tenko.launch import cli, progress; import sys\n"
    code += "try: cli.main(['--help'])\nfinally: progress.Reporter().log('x'); assert sys.stdin.buffer.read() == b''"
    command = 'exec "$0" -c "$1" <&- >&-'
    done = subprocess.run(["sh", "-c", command, sys.executable, code], stderr=subprocess.PIPE, check=False)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run"], "Missing argument 'RECIPE'. (see tenko run --help)"),
        (["run", "nix"], "nix: no such recipe; give a YAML file or one of "),
        (["run", "tiny", "a=3"], "override a=3: a: unknown key; valid: name, direction"),
        (["fly"], "No such command 'fly'. (see tenko --help)"),
        (["report", "nix"], "nix: does not exist; give the run directory of a `tenko run`"),
        (["translate", "--run", "nix"], "nix: does not exist"),
        (["translate"], "give MODEL ("),
        (["translate", "en-cs", "--run", "nix"], "give MODEL ("),
        (["translate", "en-de"], "en-de: no such model; valid: "),
        (["translate", "en-cs", "--stage", "train"], "--stage: needs --run"),
        (["translate", "--run", "nix", "--engine", "marian"], "Invalid value for '--engine'"),
        (["translate", "--run", "nix", "--beam", "0"], "Invalid value for '--beam'"),
        (["translate", "en-cs", "--length-penalty", "long"], "Invalid value for '--length-penalty'"),
        (["translate", "en-cs", "--length-penalty", "inf"], "length_penalty: must be a finite number, is inf"),
        (["evaluate", "--run", "nix", "--test", "no.tsv"], "--test: no such file: no.tsv"),
        (["watch", "nix", "--interval", "inf"], "--interval: must be at most 86400 s, is inf"),
        (
            ["run", "tiny", "--nodes", "2", "--join-timeout", "inf"],
            "--join-timeout: must be at most 604800 s, is inf",
        ),
        (["export", "en-cs", "--format", "ctranslate2", "--out", "."], "--out: . is the folder that you are in"),
        (
            ["export", "--run", "nix", "--format", "onnx", "--out", "x"],
            "Invalid value for '--format': 'onnx' is not one of",
        ),
        (["translate", "en-cs", "--device", "tpu"], "Invalid value for '--device': 'tpu' is not one of 'cpu', 'cuda'"),
        (
            ["bench", "scaling", "--ranks", "1"],
            "Option '--ranks' requires 2 arguments. (see tenko bench scaling --help)",
        ),
    ],
)
def test_bad_usage_is_one_line_and_exit_2(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, error = tenko(capsys, *arguments)
    assert (code, out, error.count("\n")) == (2, "", 1)
    assert error.startswith(f"tenko: error: {message}")


@pytest.mark.parametrize(
    ("raised", "code", "line"),
    [
        (ValueError("a\nb"), 2, "tenko: error: a b"),
        (OSError(28, "No space left on device", "f.bin"), 2, "tenko: error: f.bin: no space left on device"),
        (RunFailed("worker 1 was ended", 2), 2, "tenko: error: worker 1 was ended"),
        (KeyboardInterrupt(), 130, "tenko: interrupted"),
        (Terminated(15), 143, "tenko: ended by SIGTERM"),
        (KeyError("x"), 1, "tenko: error: internal error: KeyError: 'x'; --debug shows the traceback"),
    ],
)
def test_every_failure_is_one_line_with_its_code(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, raised: BaseException, code: int, line: str
) -> None:
    def fail(*_: object) -> None:
        raise raised

    monkeypatch.setattr(commands, "report", fail)
    monkeypatch.delenv("TENKO_DEBUG", raising=False)
    assert tenko(capsys, "report", "x") == (code, "", line + "\n")
    if isinstance(raised, Exception) and not isinstance(raised, RunFailed):
        monkeypatch.setenv("TENKO_DEBUG", "1")
        assert "Traceback" in tenko(capsys, "report", "x")[2]


def test_an_error_without_a_message_is_named_by_its_type() -> None:
    assert one_line(ValueError()) == "ValueError"


def test_stdin_comes_in_chunks_with_its_empty_lines() -> None:
    data = "a\r\n\nč\n".encode() + b"last"
    assert [line for chunk in commands.read_chunks(io.BytesIO(data)) for line in chunk] == ["a", "", "č", "last"]
    assert list(commands.read_chunks(io.BytesIO(b""))) == []


def test_a_line_is_translated_when_it_arrives() -> None:
    read, write = os.pipe()
    with open(read, "rb") as stream:
        chunks = commands.read_chunks(stream)
        os.write(write, b"one\ntw")
        assert next(chunks) == ["one"]
        os.write(write, b"o\nthree")
        assert next(chunks) == ["two"]
        os.close(write)
        assert list(chunks) == [["three"]]


class Cuts:
    """An engine that cuts the lines that say `long`."""

    direction = "en-cs"

    def translate(self, lines: list[str], **_: object) -> list[str]:
        self.cut = [index for index, line in enumerate(lines) if line == "long"]
        return lines


def test_lines_that_were_cut_are_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(commands, "_engine", lambda *_: Cuts())
    monkeypatch.setattr(commands, "CHUNK", 8)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a\nb\nlong\n\nc\nd\nlong\nlong\n")))
    code, out, error = tenko(capsys, "translate", "en-cs")
    assert (code, out) == (0, "a\nb\nlong\n\nc\nd\nlong\nlong\n")
    assert error == "tenko: warning: stdin: line 3: cut after 1,000 subwords (so were 2 others)\n"


def test_invalid_utf8_on_stdin_names_the_line_after_the_good_ones() -> None:
    chunks = commands.read_chunks(io.BytesIO(b"ok\nb\xff\nok\n"))
    assert next(chunks) == ["ok"]
    with pytest.raises(ValueError, match="stdin: line 2: invalid UTF-8"):
        next(chunks)
