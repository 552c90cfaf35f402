"""A worker whose training is a sum over ranks, for tests of what befalls workers: no model, the real launcher.

Each update adds one and the same number whatever the number of ranks is, so every run of a recipe ends with the same
weights. FAULT=KIND:RANK:UPDATE says what befalls which rank in which update, once a run directory; FAULT=KIND:RANK:
UPDATE:always, in every start.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time

from tenko.launch import job, worker
from tenko.launch.errors import Stopped
from tenko.launch.files import write_json_atomic, write_text_atomic
from tenko.launch.pulse import IDLE, SAVE, UPDATE
from tenko.launch.rundir import StageContext

SAVE_EVERY = 5
ITEMS = 12


def train(context: StageContext) -> None:
    import torch
    import torch.distributed as dist

    this = context.job
    this.init_group()
    rank, size = this.world.rank, this.world.size
    if size > 1:  # where stderr is a log of its own, which is kept only if something is in it
        print(f"rank {rank} begins", file=sys.stderr, flush=True)
    done = sorted(context.checkpoints.glob("update-*")) if context.resume else []
    start, weights = (int(done[-1].name[7:]), float(done[-1].read_text())) if done else (0, 0.0)
    total = context.stage.config.max_update
    context.checkpoints.mkdir(parents=True, exist_ok=True)
    context.reporter.log(f"world {size} from {start}")
    this.notice.begin()
    this.pulse.update(start)
    for update in range(start + 1, total + 1):
        this.pulse.phase(UPDATE)
        befall(context, rank, update)
        mine = sum((item + 1) * update % 7 for item in range(rank, ITEMS, size))
        value = torch.tensor([float(mine)], dtype=torch.float64)
        if size > 1:
            dist.all_reduce(value)
        weights = (weights * 31 + value.item()) % 1_000_003
        time.sleep(float(os.environ.get("PACE", "0.05")))
        this.pulse.update(update)
        stop = update < total and this.notice.due(update)
        if update % SAVE_EVERY == 0 or stop:
            this.pulse.phase(SAVE)
            if rank == 0:
                write_text_atomic(context.checkpoints / f"update-{update:08d}", str(weights))
        if stop:
            raise Stopped(update)
    this.pulse.phase(IDLE)
    if size > 1:
        dist.barrier()
    if rank == 0:
        write_json_atomic(
            context.result_path,
            {"stage": "train", "weights": weights, "world": size, "interface": os.environ.get("GLOO_SOCKET_IFNAME")},
        )


def befall(context: StageContext, rank: int, update: int) -> None:
    kind, *where = os.environ.get("FAULT", "").split(":")
    if not kind or [rank, update] != [int(where[0]), int(where[1])]:
        return
    mark = context.run_dir / "fault"
    if mark.exists() and "always" not in where:
        return
    mark.write_text(json.dumps({"time": time.time(), "pid": os.getpid()}))
    if kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif kind == "kill-node":
        os.kill(os.getppid(), signal.SIGKILL)
    elif kind == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif kind == "sleep":
        time.sleep(600)
    elif kind == "value":
        raise ValueError("data.train: the corpus is empty")
    elif kind == "internal":
        raise KeyError("a surprise")
    elif kind == "memory":
        raise MemoryError("no room for the batch")
    elif kind == "wait":
        time.sleep(float(os.environ["WAIT"]))
    else:
        raise AssertionError(kind)


def quantize(context: StageContext) -> None:
    """Does nothing for IDLE seconds, or until there is a file `enough`."""
    (context.run_dir / "idle").touch()
    end = time.monotonic() + float(os.environ.get("IDLE", "0"))
    while time.monotonic() < end and not (context.run_dir / "enough").exists():
        time.sleep(0.05)
    if context.job.world.rank == 0:
        write_json_atomic(context.result_path, {"stage": "quantize"})


RUNNERS = {"train": train, "quantize": quantize}

if __name__ == "__main__":
    if "CODE" in os.environ:
        job.code_digest = lambda: os.environ["CODE"]
    worker.main(runners=RUNNERS)
