"""`tenko watch`: what it says of a real run while it works, hangs, is killed and is finished; it only looks."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from rich.console import Console

from tenko.launch import watch_state
from tenko.launch.metrics import read_metrics
from tenko.launch.pulse import UPDATE, Beat, Pulse, path_of
from tenko.launch.recipe import load, loads
from tenko.launch.rundir import LOCK, LOGS, RunDirectory, RunLock
from tenko.launch.watch import RANKS, duration, frame, sparkline
from tenko.launch.watch_logs import Tail, Troubles
from tenko.launch.watch_state import RunView, Training, Watcher, _silent, lock_holder
from tests.integration.tenko_run import environment, finish, run_arguments, start, tenko, workers

ENDLESS = {
    "train.max_update": "1000000",
    "train.max_tokens": "300",
    "train.log_interval": "5",
    "train.valid_interval": "50",
    "train.valid_sentences": "2",
    "train.save_interval": "1000",
}


def picture(view: RunView) -> str:
    console = Console(width=150, file=open(os.devnull, "w"), record=True, markup=False, highlight=False)  # noqa: SIM115
    console.print(frame(view))
    return console.export_text()


def look_until(watcher: Watcher, wanted: Callable[[RunView], bool], seconds: float = 60) -> RunView:
    deadline = time.monotonic() + seconds
    while not wanted(view := watcher.look()):
        assert time.monotonic() < deadline, picture(view)
        time.sleep(0.1)
    return view


@pytest.fixture
def endless(tmp_path: Path, small_tsv: Path) -> Iterator[tuple[Path, subprocess.Popen[bytes]]]:
    """A run of two workers in its first updates, killed at the end."""
    process = start(*run_arguments(tmp_path / "run", small_tsv, **ENDLESS))
    try:
        deadline = time.monotonic() + 90
        while not read_metrics(tmp_path / "run" / "1-train" / "metrics.jsonl"):
            assert process.poll() is None, finish(process)
            assert time.monotonic() < deadline
            time.sleep(0.1)
        yield tmp_path / "run", process
    finally:
        process.kill()
        finish(process)


@pytest.mark.torchrun
def test_a_run_is_seen_running_stalled_and_killed(
    endless: tuple[Path, subprocess.Popen[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, process = endless
    watcher = Watcher(directory)

    view = look_until(watcher, lambda view: len(view.beats) == 2 and bool(view.current.training.bleus))  # type: ignore[union-attr]
    assert view.state == "running"
    assert str(process.pid) in view.detail
    first = view.current.update
    view = look_until(watcher, lambda view: view.current.update > first)
    training = view.current.training
    assert training is not None
    lines = read_metrics(directory / "1-train" / "metrics.jsonl")
    assert training.last in lines
    assert training.losses == [line["loss"] for line in lines if line["kind"] == "train"][: len(training.losses)]
    text = picture(view)
    assert re.search(r"1\s+train\s+running .* update [\d,]+ of 1,000,000 .* of updates left", text), text
    assert re.search(r"2\s+quantize\s+waiting", text), text
    for wanted in ("loss ", "perplexity ", "target tokens/s", "gradient norm", "sent by a worker, fp32", "best "):
        assert wanted in text, text
    assert re.search(r"\n *0 .* ago", text), text
    assert re.search(r"\n *1 .* ago", text), text

    _leaves_the_terminal_whole(directory)
    assert workers(directory), "watching ends nothing"

    monkeypatch.setattr(watch_state, "SILENT", 2.0)
    stopped = next(beat for beat in view.beats if beat.rank == 1)
    os.kill(stopped.pid, signal.SIGSTOP)
    try:
        view = look_until(watcher, lambda view: view.state == "stalled")
    finally:
        os.kill(stopped.pid, signal.SIGCONT)
    assert re.search(r"stalled  rank [01] on .* has given no sign of life for \d+ s", picture(view)), picture(view)
    look_until(watcher, lambda view: view.state == "running")

    process.kill()
    view = look_until(watcher, lambda view: view.state == "not running")
    assert view.current.state == "stopped"
    assert not view.beats
    assert "goes on with it" in picture(view)


def _leaves_the_terminal_whole(directory: Path) -> None:
    """On a terminal of its own: frames follow each other on the alternate screen, and Ctrl-C gives back the first."""
    ours, its = pty.openpty()
    command = [sys.executable, "-m", "tenko.launch.cli", "watch", str(directory), "--interval", "0.2"]
    env = {**environment(), "TERM": "xterm", "COLUMNS": "150", "LINES": "40"}
    process = subprocess.Popen(command, stdin=its, stdout=its, stderr=its, env=env, start_new_session=True)
    os.close(its)
    shown, deadline = b"", time.monotonic() + 60
    while shown.count(b"tokens/s") < 3:
        assert time.monotonic() < deadline, shown.decode(errors="replace")
        shown += os.read(ours, 1 << 16)
    os.kill(process.pid, signal.SIGINT)
    while True:
        assert select.select([ours], [], [], 30)[0], "it goes on after Ctrl-C, or is stuck"
        assert time.monotonic() < deadline, "it goes on after Ctrl-C"
        try:
            block = os.read(ours, 1 << 16)
        except OSError:  # Linux: the last other end was closed
            break
        if not block:
            break
        shown += block
    os.close(ours)
    assert process.wait(timeout=30) == 0
    before, left, after = shown.rpartition(b"\x1b[?1049l")
    assert left, "it did not leave the alternate screen"
    assert b"\x1b[?1049h" in before
    assert shown.rindex(b"\x1b[?25h") > shown.rindex(b"\x1b[?25l"), "the cursor is not shown again"
    assert b"tokens/s" in after, "the last frame does not stay"
    assert b"Traceback" not in shown


@pytest.mark.torchrun
def test_a_finished_run_and_its_troubles_are_one_frame(tmp_path: Path, small_tsv: Path) -> None:
    arguments = run_arguments(tmp_path / "run", small_tsv, workers="1", **{"train.max_update": "4"})
    assert tenko(*arguments).code == 0
    (tmp_path / "run" / "logs" / "worker-1.log").write_text(
        "2026-01-01 10:00:00,000 tenko.comm WARNING: the [link] is slow\nnothing\n"
        "ValueError: no\nlast ERROR: half a line"
    )
    started = time.monotonic()
    done = tenko("watch", tmp_path / "run")
    assert time.monotonic() - started < 5, "0.3 s when the machine is idle"
    assert done.code == 0
    assert done.out.startswith("finished"), done.out
    assert f"{tmp_path / 'run'}: tiny, en-cs, 1 worker" in done.out.replace("\n", ""), done.out
    assert re.search(r"1\s+train\s+finished\s+BLEU [\d.]+ +0.\d+ MB", done.out), done.out
    assert re.search(r"2\s+quantize\s+finished\s+BLEU", done.out), done.out
    assert "worker-1.log: WARNING: the [link] is slow" in done.out
    assert "worker-1.log: ValueError: no" in done.out
    assert "nothing" not in done.out
    assert "half a line" not in done.out


def test_what_is_no_run_is_one_line_and_torch_is_not_imported(tmp_path: Path) -> None:
    done = tenko("watch", tmp_path / "nix")
    assert done.code == 2
    assert done.out == ""
    assert done.errors == [
        f"tenko: error: {tmp_path}/nix: does not exist; give the run directory of a `tenko run`, for instance runs/demo"
    ]
    code = "import sys, tenko.launch.watch; assert 'torch' not in sys.modules and 'matplotlib' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_tail_reads_what_was_appended_and_begins_a_replaced_file_anew(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    tail = Tail(path)
    assert tail.read() == (False, [])
    path.write_bytes(b"one\ntw")
    assert tail.read() == (True, [b"one"])
    assert tail.read() == (False, [])
    with open(path, "ab") as file:
        file.write(b"o\nthree\n")
    assert tail.read() == (False, [b"two", b"three"])
    beside = tmp_path / "new"
    beside.write_bytes(b"one\nother\nlines\n")
    beside.replace(path)
    assert tail.read() == (True, [b"one", b"other", b"lines"])
    assert Tail(path, start=8).read()[1][-1:] == [b"lines"]


def test_a_lock_is_seen_without_touching_it(tmp_path: Path) -> None:
    assert lock_holder(tmp_path / "run") is None
    with RunLock(tmp_path / "run"):
        holder = lock_holder(tmp_path / "run")
        assert holder is not None
        assert holder.seen
        assert str(os.getpid()) in holder.name
    assert lock_holder(tmp_path / "run") is None


def test_a_run_of_another_machine_is_told_by_its_signs_of_life(tmp_path: Path) -> None:
    with RunLock(tmp_path):
        run = RunDirectory.create(tmp_path, load("tiny"))
    (tmp_path / LOCK).write_text("4711 elsewhere 0123456789abcdef\n")
    assert Watcher(run.path).look().state == "not running", "no sign of life"
    logs = tmp_path / LOGS
    logs.mkdir()
    for rank in range(20):
        pulse = Pulse(path_of(logs, rank), rank=rank, node=rank // 10)
        pulse.phase(UPDATE)
        pulse.update(7)
        pulse.close()
    view = Watcher(run.path).look()
    assert (view.state, view.detail) == ("running", "process 4711 on elsewhere")
    text = picture(view)
    assert "20 workers on 2 nodes" in text
    assert len(re.findall(r"update +7 +\d+\.\d s ago", text)) == RANKS
    assert "and 4 that were heard of since" in text
    (tmp_path / LOCK).write_text(f"4711 {socket.gethostname()} 0123456789abcdef\n")
    assert Watcher(run.path).look().state == "not running", "killed: the lock of this machine is free"


def test_sparklines_and_durations() -> None:
    assert sparkline([1, 2, 3]) == "▁▅█"
    assert sparkline([5.0, 5.0]) == "▁▁"
    assert sparkline([*range(80)], width=8) == "▁▂▃▄▅▆▇█"
    assert len(sparkline([*range(1001)])) == 40
    assert [duration(s) for s in (0.4, 59.6, 185, 7800)] == ["0 s", "1:00 min", "3:05 min", "2:10 h"]


def test_damaged_lines_of_metrics_do_not_end_the_watch(tmp_path: Path, small_tsv: Path) -> None:
    with RunLock(tmp_path / "run"):
        run = RunDirectory.create(tmp_path / "run", load("tiny"))
    stage = run.stage_directory(0)
    stage.mkdir()
    good = {
        "kind": "train",
        "update": 2,
        "loss": 7.5,
        "seconds": 1.0,
        "share_compute": 0.7,
        "share_exchange": 0.25,
        "share_data": 0.05,
        "scale": 128.0,
        "ppl": None,
    }
    (stage / "metrics.jsonl").write_text(f'{json.dumps(good)}\n{{"kind": tr\n[1]\n{{"update": null}}\n')
    view = Watcher(run.path).look()
    assert view.state == "not running"
    assert view.current.state == "stopped"
    text = picture(view)
    assert "compute 70%  exchange 25%  data 5%" in text
    assert "loss 7.500" in text
    assert "loss scale 128" in text
    assert "perplexity" not in text


RESET = "RuntimeError: [pair.cc:537] Read error [127.0.0.1]:8918: Connection reset by peer. Check the logs of gloo"
AGENT = "2026-11-22 21:14:38,368 torch.distributed.elastic.agent.server.api WARNING: Received 2 death signal"
FAILED = "2026-11-22 21:14:37,000 root ERROR: the run failed\nTraceback\nValueError: data.train: no such file: nope\n"


def test_what_a_worker_says_itself_stands_before_its_echoes(tmp_path: Path) -> None:
    logs = tmp_path / "logs"
    (logs / "earlier").mkdir(parents=True)
    troubles = Troubles(logs)
    assert troubles.look() == ()
    (logs / "earlier" / "worker-0.1.log").write_text("ValueError: of an earlier start\n")
    assert troubles.look() == ("earlier/worker-0.1.log: ValueError: of an earlier start",)
    (logs / "torchrun.log").write_text(f"{AGENT}\n")
    assert troubles.look() == ("torchrun.log: WARNING: Received 2 death signal",), "this start's alone"
    (logs / "worker-1.log").write_text(f"{RESET}\n")
    assert troubles.look() == ("torchrun.log: WARNING: Received 2 death signal", f"worker-1.log: {RESET}")
    (logs / "worker-0.log").write_text(FAILED + FAILED)
    assert troubles.look() == ("worker-0.log: ValueError: data.train: no such file: nope",)
    with open(logs / "worker-1.log", "a") as file:
        file.write("tenko.comm WARNING: slow\nConnectionResetError: gone\n")
    assert troubles.look() == (
        "worker-0.log: ValueError: data.train: no such file: nope",
        "worker-1.log: WARNING: slow",
    )
    (logs / "worker-0.log").rename(logs / "earlier" / "worker-0.2.log")
    (logs / "worker-0.log").write_text("Error: other\n")
    assert troubles.look() == ("worker-1.log: WARNING: slow", "worker-0.log: Error: other")


def test_the_best_validation_is_the_trainers(tmp_path: Path) -> None:
    lines = [(3, 0.0, 7.5), (6, 0.0, 7.1), (9, 0.0, 7.3), (12, 0.0, 7.1), (15, 4.0, 8.0), (18, 4.0, None)]
    for best_by, count, best in (
        ("bleu", 2, (6, 0.0)),
        ("bleu", 4, (6, 0.0)),
        ("bleu", 6, (15, 4.0)),
        ("perplexity", 6, (6, 0.0)),
    ):
        path = tmp_path / f"{best_by}-{count}"
        with RunLock(path):
            run = RunDirectory.create(path, load("tiny", [f"train.best_by={best_by}"]))
        run.stage_directory(0).mkdir()
        text = [json.dumps({"kind": "valid", "update": u, "bleu": b, "nll": n}) + "\n" for u, b, n in lines[:count]]
        (run.stage_directory(0) / "metrics.jsonl").write_text("".join(text))
        view = Watcher(path).look()
        assert view.current.training is not None
        assert view.current.training.best == best
        by = " by perplexity" if best_by == "perplexity" else ""
        assert f"best{by} {best[1]:.2f} at update {best[0]}" in picture(view)


def test_a_rank_is_silent_when_others_would_have_made_ten_updates() -> None:
    slow, beats = Training(Path()), [Beat(rank=0, phase=UPDATE, time=10.0), Beat(rank=1, phase=UPDATE, time=0.0)]
    for update in (10, 20):
        slow.add({"kind": "train", "update": update, "seconds": 30.0 * update})
    assert _silent(beats, None, 69.0) is None
    assert _silent(beats, None, 71.0) == beats[1], "the one that has been silent for longest"
    assert _silent(beats, slow, 309.0) is None, "30 s an update"
    assert _silent(beats, slow, 311.0) == beats[1]


def test_the_round_that_is_trained_now_is_shown(tmp_path: Path) -> None:
    text = "{name: x, stages: [train: {max_update: 9, keep_updates: [0]}, lottery: {rounds: 2}]}"
    with RunLock(tmp_path):
        run = RunDirectory.create(tmp_path, loads(text, "x"))
    run.stage_directory(0).mkdir()
    (run.stage_directory(0) / "result.json").write_text('{"stage": "train", "bleu": 1.0}')
    for number, update in ((1, 9), (2, 4)):
        folder = run.stage_directory(1) / f"round-{number:02d}"
        folder.mkdir(parents=True)
        (folder / "metrics.jsonl").write_text(json.dumps({"kind": "train", "update": update}) + "\n")
        os.utime(folder / "metrics.jsonl", (number, number))
    training = Watcher(tmp_path).look().current.training
    assert training is not None
    assert (training.folder.name, training.update, training.max_update) == ("round-02", 4, 9)


def test_signs_of_life_of_an_earlier_run_with_more_ranks_do_not_count(tmp_path: Path) -> None:
    with RunLock(tmp_path):
        RunDirectory.create(tmp_path, load("tiny"))
    (tmp_path / LOGS).mkdir()
    for rank in range(3):
        pulse = Pulse(path_of(tmp_path / LOGS, rank), rank=rank)
        pulse.update(7)
        pulse.close()
    (tmp_path / LOCK).write_text("4711 elsewhere 0123456789abcdef\n")
    assert len(Watcher(tmp_path).look().beats) == 3
    later = (tmp_path / LOCK).stat().st_mtime + 3600
    os.utime(tmp_path / LOCK, (later, later))
    assert Watcher(tmp_path)._beats(later) == []


def test_a_tail_begins_a_file_anew_that_was_cut(tmp_path: Path) -> None:
    path = tmp_path / "worker-0.log"
    path.write_bytes(b"one\ntwo\n")
    tail = Tail(path)
    tail.read()
    path.write_bytes(b"new\n")
    assert tail.read() == (True, [b"new"])
