"""One host's rank of the lab's tests: `python lab_worker.py SCENARIO JSON`, started by `Lab.run` on every host.

The model is the demo's small Transformer, its gradients are replayed (benchmarks/link_model.py).
"""

from __future__ import annotations

import json
import sys
import time
import zlib
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from link_model import MODELS, Replay

from tenko.comm import CommConfig, Route, SplitRule, make_route, register

STEPS = 10
TRANSMITTED = Path("/sys/class/net/e0/statistics/tx_bytes")


class Trained:
    """A replayed model on a route, with the optimizer that goes with it."""

    def __init__(self, settings: dict[str, Any], timeout: float = 60.0) -> None:
        rules = tuple(SplitRule(**{**rule, "match": tuple(rule["match"])}) for rule in settings.pop("split", ()))
        self.model = Replay(MODELS["small"], dist.get_rank())
        self.ddp = DistributedDataParallel(self.model, gradient_as_bucket_view=True, init_sync=False)
        self.route: Route = register(self.ddp, make_route(CommConfig(split=rules, **settings), 3, timeout))
        self.optimizer = self.route.optimizer(self.model.named_parameters(), lr=1e-3)
        self.steps = 0

    def step(self) -> None:
        self.model.hand_out = self.steps < 2  # by then DDP has rebuilt its buckets, and gradients live in them
        if self.model.hand_out:
            self.model.zero_grad()
        else:
            self.model.refill()
        self.ddp().backward()
        self.optimizer.step()
        self.steps += 1

    def checksum(self) -> int:
        check = 0
        for parameter in self.model.parameters():
            check = zlib.crc32(parameter.detach().numpy().tobytes(), check)
        return check


def wire(routes: dict[str, dict[str, Any]]) -> None:
    """Prints, of every route: what the kernel sent in STEPS updates, what the meter counted, and the weights' sum."""
    for name, settings in routes.items():
        trained = Trained(settings)
        for _ in range(3):
            trained.step()
        meter = trained.route.meter
        dist.barrier()
        sent, metered, ring = int(TRANSMITTED.read_text()), meter.bytes_sent, meter.fp32_bytes
        for _ in range(STEPS):
            trained.step()
        dist.barrier()  # what has left the program may still be in the kernel's queue
        found = {
            "route": name,
            "sent": int(TRANSMITTED.read_text()) - sent,
            "metered": meter.bytes_sent - metered,
            "ring": meter.fp32_bytes - ring,
            "weights": trained.checksum(),
            "moved": bool(trained.model.order[0].detach().any()),
        }
        print(json.dumps(found), flush=True)
        trained.route.close()


def cut(options: dict[str, Any]) -> None:
    """Trains until an exchange fails, at most a minute; says when it begins."""
    trained = Trained({"route": "all_reduce"}, options["timeout"])
    for _ in range(3):
        trained.step()
    dist.barrier()
    print("training", flush=True)
    until = time.monotonic() + 60
    while time.monotonic() < until:
        trained.step()
        time.sleep(0.05)


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    {"wire": wire, "cut": cut}[sys.argv[1]](json.loads(sys.argv[2]))
    dist.destroy_process_group()
