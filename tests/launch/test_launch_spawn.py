"""Real `tenko run` processes with a stand-in for what the stages do: every way a run can end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from processes import alive

from tenko.launch.spawn import last_update

pytestmark = pytest.mark.torchrun

# `train` makes an all-reduce an update and writes its checkpoints like a real one; FAKE says what befalls which rank.
WORKER = """
import json, os, sys, time
from tenko.launch import worker
from tenko.launch.files import write_json_atomic
from tenko.launch.metrics import MetricsLog

rank = int(os.environ["RANK"])

def train(context):
    import torch, torch.distributed as dist
    dist.init_process_group("gloo")
    (context.run_dir / f"pid-{rank}").write_text(str(os.getpid()))
    fake, _, where = os.environ.get("FAKE", "").partition(":")
    done = sorted(context.checkpoints.glob("update-*")) if context.resume else []
    start = int(done[-1].name[7:]) if done else 0
    assert context.resume == bool(done)
    metrics = MetricsLog(context.metrics_path) if rank == 0 else None
    if metrics:
        metrics.truncate_after(start)
    total = context.stage.config.max_update
    context.reporter.start("train", total, start)
    for update in range(start + 1, total + 1):
        value = torch.tensor([float(rank + 1)])
        dist.all_reduce(value)
        assert value.item() == 3 and dist.get_world_size() == 2
        context.reporter.advance(update, loss=4.0 / update)
        if metrics:
            metrics.append({"update": update, "loss": 4.0 / update, "kind": "train",
                "threads": torch.get_num_threads(), "primitives": os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"]})
            (context.checkpoints / f"update-{update:08d}").mkdir(parents=True, exist_ok=True)
        if fake and rank == int(where) and update == 4:
            if fake == "value":
                raise ValueError("data.train: the corpus is empty\\nafter cleaning")
            if fake == "disk":
                raise OSError(28, "No space left on device", "model.safetensors")
            if fake == "internal":
                raise KeyError("a surprise")
            if fake == "hang":
                time.sleep(600)
    dist.barrier()
    if rank == 0:
        write_json_atomic(context.result_path, {"stage": "train", "bleu": 12.5, "resumed": context.resume,
            "samples": [{"source": "a <b>", "reference": "c", "hypothesis": "d"}], "start": start})

def quantize(context):
    assert (context.previous / "result.json").exists() or rank
    if rank == 0:
        write_json_atomic(context.result_path, {"stage": "quantize", "bleu": 12.0, "artefact_bytes": 1_000_000})

if __name__ == "__main__":
    worker.main(runners={"train": train, "quantize": quantize})
"""
DRIVER = """
import functools
from tenko.launch import cli, run_command
run_command.run_workers = functools.partial(run_command.run_workers, module="fake_worker")
cli.main()
"""


class Run:
    """A `tenko run tiny` in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "fake_worker.py").write_text(WORKER)
        (folder / "driver.py").write_text(DRIVER)
        self.directory = folder / "runs" / "tiny"

    def start(self, fake: str = "", *extra: str) -> subprocess.Popen[str]:
        path = os.pathsep.join([str(self.folder), os.environ.get("PYTHONPATH", "")])
        environment = {**os.environ, "FAKE": fake, "PYTHONPATH": path}
        for key in ("RANK", "WORLD_SIZE"):
            environment.pop(key, None)
        command = [sys.executable, "driver.py", "run", "tiny", "train.max_update=6", *extra]
        return subprocess.Popen(
            command, cwd=self.folder, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )

    def pids(self) -> list[int]:
        return [int((self.directory / f"pid-{rank}").read_text()) for rank in range(2)]

    def wait_for_update(self, process: subprocess.Popen[str], update: int) -> None:
        path = self.directory / "1-train" / "checkpoints" / f"update-{update:08d}"
        deadline = time.monotonic() + 60
        while not path.exists() or not all((self.directory / f"pid-{rank}").exists() for rank in range(2)):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        time.sleep(0.3)

    def result(self, stage: str) -> dict[str, object]:
        return json.loads((self.directory / stage / "result.json").read_text())


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path)


def finish(process: subprocess.Popen[str]) -> tuple[int, str, list[str]]:
    out, error = process.communicate(timeout=60)
    return process.returncode, out, error.splitlines()


def test_two_workers_run_all_stages_and_print_the_outcome(run: Run) -> None:
    code, out, errors = finish(run.start())
    assert (code, errors) == (0, [])
    assert run.result("1-train")["resumed"] is False
    assert "train 6/6  loss 0.667" in out
    assert "12.50" in out
    assert "12.00" in out
    assert "1.00 MB" in out
    lines = [json.loads(line) for line in (run.directory / "1-train" / "metrics.jsonl").read_text().splitlines()]
    assert [line["update"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert {line["threads"] for line in lines} == {1}, "the recipe's threads"
    assert {line["primitives"] for line in lines} == {"128"}, "memory stays bounded"
    page = (run.directory / "report.html").read_text()
    assert "a &lt;b&gt;" in page
    assert "<svg" in page
    assert not list((run.directory / "logs").glob("error-*"))
    # once more: nothing runs, the outcome is printed again
    code, out, errors = finish(run.start())
    assert (code, errors) == (0, [])
    assert "nothing to do" in out
    assert "12.50" in out


def test_a_users_error_in_a_worker_is_one_line(run: Run) -> None:
    code, _, errors = finish(run.start("value:1"))
    assert code == 2
    assert errors == [
        "tenko: error: data.train: the corpus is empty after cleaning; the same command goes on from update 4"
    ]
    assert not alive(run.pids())
    assert not (run.directory / "1-train" / "result.json").exists()


def test_a_full_disk_names_the_file(run: Run) -> None:
    code, _, errors = finish(run.start("disk:0"))
    assert code == 2
    assert len(errors) == 1
    assert errors[0].startswith("tenko: error: model.safetensors: no space left on device; the same command goes on")


def test_an_error_of_ours_names_the_log_with_its_traceback(run: Run) -> None:
    code, _, errors = finish(run.start("internal:1"))
    assert code == 1
    assert len(errors) == 1
    assert "internal error: KeyError: 'a surprise'" in errors[0]
    assert "worker-1.log" in errors[0]
    assert "Traceback" in (run.directory / "logs" / "worker-1.log").read_text()
    assert not alive(run.pids())


def test_a_killed_worker_is_named_and_the_run_goes_on(run: Run) -> None:
    process = run.start("hang:0")
    run.wait_for_update(process, 4)
    pids = run.pids()
    os.kill(pids[1], signal.SIGKILL)
    code, _, errors = finish(process)
    assert code == 2
    assert len(errors) == 1
    assert f"worker 1 (process {pids[1]}) was ended by SIGKILL" in errors[0]
    assert "goes on from update 4" in errors[0]
    assert not alive(pids)
    with (run.directory / "1-train" / "metrics.jsonl").open("a") as file:
        file.write('{"update": 9}\n{"upd')  # beyond the checkpoint, and torn
    code, out, errors = finish(run.start())
    assert (code, errors) == (0, [])
    assert "stage 1/2 train: goes on" in out
    assert run.result("1-train")["start"] == 4
    lines = [json.loads(line) for line in (run.directory / "1-train" / "metrics.jsonl").read_text().splitlines()]
    assert [line["update"] for line in lines] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_all_workers_at_once(run: Run, number: int, code: int) -> None:
    process = run.start("hang:1")
    run.wait_for_update(process, 4)
    before = time.monotonic()
    process.send_signal(number)
    found, _, errors = finish(process)
    assert found == code, errors
    assert len(errors) == 1, errors
    assert time.monotonic() - before < 5
    assert not alive(run.pids())
    assert not (run.directory / "1-train" / "result.json").exists()


def test_workers_end_with_a_killed_parent_and_the_lock_is_free(run: Run) -> None:
    process = run.start("hang:1")
    run.wait_for_update(process, 4)
    second = run.start()
    code, _, errors = finish(second)
    assert code == 2
    assert len(errors) == 1
    assert f"process {process.pid} is running it" in errors[0]
    process.kill()
    process.communicate(timeout=10)
    assert not alive(run.pids())
    code, _, errors = finish(run.start())
    assert (code, errors) == (0, [])
    assert run.result("1-train")["resumed"] is True


def test_an_outer_torchrun_runs_the_same_stages(run: Run) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(run.folder), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d"]
    command += ["--rdzv-endpoint", "127.0.0.1:0", "--local-addr", "127.0.0.1", "-m", "fake_worker", "tiny"]
    command += ["train.max_update=3", "train.warmup_updates=1", "--run-dir", str(run.directory)]
    done = subprocess.run(command, cwd=run.folder, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert run.result("1-train")["bleu"] == 12.5
    assert run.result("2-quantize")["bleu"] == 12.0


def test_a_run_goes_on_from_the_newest_save_of_the_training_that_it_is_in(tmp_path: Path) -> None:
    def save(training: str, update: int) -> None:
        (tmp_path / training / "checkpoints" / f"update-{update:08d}").mkdir(parents=True)

    assert last_update(tmp_path) is None
    save("1-train", 400)
    save("1-train", 500)
    (tmp_path / "1-train" / "checkpoints" / "update-00000600.damaged").mkdir()
    assert last_update(tmp_path) == 500
    (tmp_path / "1-train" / "result.json").touch()
    assert last_update(tmp_path) == 500
    (tmp_path / "2-lottery" / "round-01").mkdir(parents=True)
    assert last_update(tmp_path) is None, "nothing of this stage or round was saved yet"
    save("2-lottery/round-01", 80)
    save("2-lottery/round-02", 20)
    assert last_update(tmp_path) == 20
    (tmp_path / "2-lottery" / "result.json").touch()
    save("3-ipq/group-9-ffn", 8)
    save("3-ipq/group-10-attention", 4)
    assert last_update(tmp_path) == 4
