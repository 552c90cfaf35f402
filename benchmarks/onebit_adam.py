"""DeepSpeed's 1-bit Adam as a peer of `links.py`: one rank, in an environment of its own.

    python benchmarks/onebit_adam.py --environment build/onebit       # makes it: torch 2.13.0, DeepSpeed 0.19.6, 1 GB
    python benchmarks/links.py --extra "1-bit Adam=build/onebit/bin/python:benchmarks/onebit_adam.py"
    RANK=0 WORLD_SIZE=2 MASTER_ADDR=... MASTER_PORT=... build/onebit/bin/python benchmarks/onebit_adam.py --alone

0.19.6 is the last DeepSpeed that has it. Of its back ends, nccl and mpi want cupy; `compressed` runs on gloo once the
op that packs bits, which DeepSpeed has for one vendor's GPUs only, is given in numpy, and scalars are gathered as
vectors of one.

- It exchanges the momentum instead of the gradient, from within `step`, tensor by tensor, so nothing overlaps with the
  backward pass. The seconds answered are those of the backward pass and of the exchanges with their compression;
  Adam's own arithmetic is left out, as it is for hooks (`--alone` gives the whole step as well).
- Until `freeze_step` it is Adam in full precision. What is measured comes after.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

TRANSMITTED = Path("/sys/class/net/e0/statistics/tx_bytes")
FREEZE_STEP = 3


def environment(folder: Path) -> None:
    """Makes the virtual environment, torch first so that nothing drags in another build of it."""
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
    pip = [str(folder / "bin" / "python"), "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    constraints = ["--constraint", str(Path(__file__).parents[1] / "constraints.txt")]
    for packages in (["torch==2.13.0"], ["setuptools", "wheel"], ["--no-build-isolation", "deepspeed==0.19.6"]):
        subprocess.run([*pip, *constraints, *packages], check=True, env={**os.environ, "DS_BUILD_OPS": "0"})
    print(folder / "bin" / "python")


class SignBits:
    """Packs a bit for each element, 1 where it is not negative; unpacks them to 1.0 and -1.0."""

    def load(self) -> SignBits:
        return self

    def packbits(self, values: Any, numel: int, rank: int) -> Any:
        return torch.from_numpy(np.packbits(values.view(-1).numpy() >= 0))

    def unpackbits(self, packed: Any, numel: int, rank: int) -> Any:
        return torch.from_numpy(np.unpackbits(packed.numpy())).float().mul_(2).sub_(1)


class Gloo:
    """Stands for `deepspeed.comm` in the back end: gloo gathers no scalar into a vector."""

    def __getattr__(self, name: str) -> Any:
        return getattr(dist, name)

    def all_gather(self, outputs: list[Any], value: Any, group: Any) -> None:
        dist.all_gather(outputs, value.reshape(-1), group=group)


class Rank:
    """This rank's model and its 1-bit Adam."""

    def __init__(self, model: str, signal: float) -> None:
        import deepspeed
        from deepspeed.ops import op_builder

        op_builder.PackbitsBuilder = SignBits  # before the back end imports it
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # for inference; would be compiled here
        from link_model import MODELS, Replay

        torch.set_num_threads(1)
        dist.init_process_group("gloo")
        deepspeed.comm.init_distributed("gloo", verbose=False)
        self.model = Replay(MODELS[model], dist.get_rank(), signal=signal)
        self.model.hand_out = False
        self.adam: Any = None
        self.exchange = 0.0

    def setup(self) -> dict[str, Any]:
        """Adam in full precision up to the step where it freezes its variance, then compressed until it is warm."""
        from deepspeed.runtime.comm import compressed as back_end
        from deepspeed.runtime.fp16.onebit.adam import OnebitAdam

        back_end.dist = Gloo()
        engine = SimpleNamespace(mpu=None, local_rank=0, enable_backward_allreduce=True)  # what it asks of DeepSpeed's
        self.adam = OnebitAdam(
            self.model.parameters(), engine, lr=1e-4, freeze_step=FREEZE_STEP, comm_backend_name="compressed"
        )
        backend = self.adam.comm_backend_handle
        compressed = backend.compressed_allreduce

        def timed(*arguments: Any) -> Any:
            begin = time.perf_counter()
            result = compressed(*arguments)
            self.exchange += time.perf_counter() - begin
            return result

        backend.compressed_allreduce = timed
        for parameter in self.model.order:
            parameter.grad = torch.zeros_like(parameter)
        while not self.adam.adam_freeze_key:
            self.model.refill()
            for parameter in self.model.order:
                dist.all_reduce(parameter.grad)
                parameter.grad /= dist.get_world_size()
            self.adam.step()
        assert not engine.enable_backward_allreduce, "from here on only momenta travel"
        self.step(0.0)
        self.step(0.0)
        check = 0
        for parameter in self.model.order:
            momentum = self.adam.state[parameter]["exp_avg"]
            check = zlib.crc32(memoryview(momentum.contiguous().view(-1).numpy()).cast("B"), check)
        return {"agree": check, "error": None, "once": None}

    def step(self, compute: float) -> tuple[float, float, int]:
        """One update: seconds of backward pass and exchanges, of everything, and bytes sent."""
        self.model.compute = compute
        self.model.refill()
        dist.barrier()
        sent, begin, self.exchange = _transmitted(), time.perf_counter(), 0.0
        self.model.begin()
        self.model().backward()
        backward = time.perf_counter() - begin
        self.adam.step()
        whole = time.perf_counter() - begin
        dist.barrier()
        return backward + self.exchange, whole, _transmitted() - sent

    def measure(self, count: int, compute: float) -> dict[str, list[Any]]:
        found: dict[str, list[Any]] = {"seconds": [], "whole": [], "sent": [], "metered": [], "cpu": []}
        for _ in range(count):
            cpu = time.process_time()
            seconds, whole, sent = self.step(compute)
            for key, value in zip(found, (seconds, whole, sent, None, time.process_time() - cpu), strict=True):
                found[key].append(value)
        return found


def _transmitted() -> int:
    return int(TRANSMITTED.read_text()) if TRANSMITTED.exists() else 0


def alone(model: str, steps: int) -> dict[str, Any]:
    """One JSON object: medians over the steps after warm-up; bytes are None where there is no device e0."""
    rank = Rank(model, 0.0)
    agree = rank.setup()["agree"]
    found = rank.measure(steps, 0.0)
    return {
        "rank": dist.get_rank(),
        "world": dist.get_world_size(),
        "elements": sum(parameter.numel() for parameter in rank.model.order),
        "agree": agree,
        "step_seconds": statistics.median(found["whole"]),
        "exchange_seconds": statistics.median(found["seconds"]),
        "bytes": statistics.median(found["sent"]) if TRANSMITTED.exists() else None,
    }


def obey(out: Any) -> None:
    """The commands of `link_rank.py`, until stdin ends."""
    rank: Rank | None = None
    for line in sys.stdin:
        command = json.loads(line)
        answer: dict[str, Any] = {}
        try:
            if command["do"] == "hello":
                rank = Rank(command["model"], command["signal"])
            else:
                assert rank is not None
                if command["do"] == "setup":
                    answer = rank.setup()
                elif command["do"] == "measure":
                    answer = dict(rank.measure(command["count"], command["compute"]))
                else:
                    rank.adam = None
        except Exception as error:  # whatever it raises is its result
            answer = {"failed": f"{type(error).__name__}: {error}".splitlines()[0]}
        print(json.dumps(answer), file=out, flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--environment", type=Path, metavar="FOLDER", help="make the virtual environment, and end")
    parser.add_argument(
        "--alone", action="store_true", help="measure and print one JSON line, instead of obeying stdin"
    )
    parser.add_argument("--model", default="base", help="with --alone: base or small")
    parser.add_argument("--steps", type=int, default=5, help="with --alone")
    options = parser.parse_args()
    if options.environment:
        environment(options.environment)
        sys.exit()
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import numpy as np
    import torch
    import torch.distributed as dist

    stdout = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # DeepSpeed prints
    if options.alone:
        print(json.dumps(alone(options.model, options.steps)), file=stdout, flush=True)
    else:
        obey(stdout)
    os._exit(0)
