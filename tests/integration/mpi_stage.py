"""A worker whose only stage does not train; for the tests of what mpirun starts.

mpirun -n 3 python mpi_stage.py RECIPE --run-dir DIR

DIR/do says what: `world` writes what each rank is into DIR/world-<rank>.json; `raise` has rank 1 fail while the others
wait for it; `wait` has all wait; `hang` has rank 1 sleep within an update, while the others wait for it.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict

import torch
import torch.distributed as dist

from tenko.launch.files import write_json_atomic
from tenko.launch.pulse import UPDATE
from tenko.launch.rundir import StageContext
from tenko.launch.worker import main


def stage(context: StageContext) -> None:
    job, do = context.job, (context.run_dir.parent / "do").read_text()
    job.init_group()
    rank = torch.tensor([float(job.world.rank)])
    dist.all_reduce(rank)
    seen = {**asdict(job.world), "sum": rank.item(), "interface": os.environ["GLOO_SOCKET_IFNAME"]}
    write_json_atomic(context.run_dir.parent / f"world-{job.world.rank}.json", seen)
    if do == "wait":
        time.sleep(120)
    if do == "hang":
        job.pulse.phase(UPDATE)
        time.sleep(120 if job.world.rank == 1 else 0)
        dist.barrier()
    if do == "raise" and job.world.rank == 1:
        raise RuntimeError("the second rank has had enough")
    if do == "raise":
        dist.barrier()
    if job.world.rank == 0:
        context.result_path.write_text(json.dumps({"seconds": 0.0}))


if __name__ == "__main__":
    main(runners={"train": stage, "quantize": stage})
