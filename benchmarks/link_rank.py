"""One rank of `links.py`. Commands come on stdin, answers go to stdout, one JSON object a line each.

A script of another environment (`links.py --extra NAME=PYTHON:SCRIPT`) must understand the same commands:

- {"do": "hello", "model", "signal"}: load everything, join the others.
- {"do": "setup", "peer"}: put the peer on the model, exchange until it is warm. Answers agree (checksum of the result),
  error (relative squared error of the mean), once (that of quantizing once and adding exactly), each null if unknown.
- {"do": "measure", "count", "compute"}: so many steps with so many seconds of computation. Answers seconds, sent
  (kernel's tx_bytes), metered (null without meter) and cpu (seconds of this process), a list each.
- {"do": "close"}: take the peer off. End of stdin: end.

Whatever goes wrong is answered as {"failed": reason}; the rank is restarted then.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
import zlib
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).parent))
from link_model import MODELS, Replay
from link_peers import PEERS, Peer

SAMPLED = (
    "encoder.embed_tokens.weight",
    "encoder.layers.0.fc1.weight",
    "encoder.layers.1.self_attn.q_proj.weight",
    "decoder.layers.0.encoder_attn.out_proj.weight",
    "decoder.layers.1.fc2.weight",
)
SAMPLE = 1 << 18
"""Elements of each of these tensors whose error is looked at."""
TRANSMITTED = Path("/sys/class/net/e0/statistics/tx_bytes")


class Rank:
    """This rank's model, and the peer that is on it."""

    def __init__(self, model: str, signal: float) -> None:
        torch.set_num_threads(1)
        dist.init_process_group("gloo")
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.model = Replay(MODELS[model], self.rank, signal=signal)
        names = [name for name, _ in self.model.named_parameters()]
        self.sampled = [names.index(name) for name in SAMPLED]
        self._theirs: list[list[Tensor]] = []
        self.ddp: DistributedDataParallel | None = None
        self.route: Any = None
        self.close()

    def step(self, *, refill: bool) -> None:
        """One forward and backward pass, gradients exchanged at its end."""
        assert self.ddp is not None
        self.model.hand_out = not refill
        self.model.begin()
        self.ddp().backward()
        finish = getattr(self.route, "finish", None)
        if finish is not None:
            finish()

    def setup(self, peer: Peer) -> dict[str, Any]:
        first = dist._DEFAULT_FIRST_BUCKET_BYTES
        dist._DEFAULT_FIRST_BUCKET_BYTES = 1 << 30 if peer.one_bucket else first
        cap = {"bucket_cap_mb": 1000} if peer.one_bucket else {}
        self.ddp = DistributedDataParallel(self.model, init_sync=False, gradient_as_bucket_view=True, **cap)
        dist._DEFAULT_FIRST_BUCKET_BYTES = first
        self.route = peer.attach(self.ddp)
        self.model.compute = 0.0
        answer: dict[str, Any] = {"once": None}
        for number in range(peer.error_at + 3):
            if number < 2:  # DDP rebuilds its buckets after the first; from then on gradients live in them
                for parameter in self.model.order:
                    parameter.grad = None
            else:
                self.model.refill()
            self.step(refill=number >= 2)
            if number == peer.error_at and peer.gradients:
                answer |= self.errors(peer)
        check = 0
        for parameter in self.model.order:
            result = parameter.grad if peer.gradients else parameter.detach()
            assert result is not None
            check = zlib.crc32(memoryview(result.reshape(-1).numpy()).cast("B"), check)
        return {**answer, "agree": check}

    def errors(self, peer: Peer) -> dict[str, Any]:
        """Relative squared errors, each a mean over the sampled tensors; rank 0 knows all ranks' gradients."""
        if self.rank:
            return {}
        if not self._theirs:
            pools = [self.model.pool(rank) for rank in range(self.world)]
            for index in self.sampled:
                cuts = [list(self.model.cut(index, pool, SAMPLE)) for pool in pools]
                values = [torch.cat([piece for _, piece in pieces]) for pieces in cuts]
                self._theirs.append([value * self.model.scale(index) for value in values])
        got, once = [], []
        for index, theirs in zip(self.sampled, self._theirs, strict=True):
            mean = torch.stack(theirs).mean(dim=0)
            gradient = self.model.order[index].grad
            assert gradient is not None
            got.append(_relative(gradient.view(-1)[: mean.numel()], mean))
            if peer.bits:
                once.append(_relative(_quantized_once(theirs, peer.bits), mean))
        return {"error": sum(got) / len(got), "once": sum(once) / len(once) if once else None}

    def measure(self, count: int, compute: float) -> dict[str, list[Any]]:
        self.model.compute = compute
        found: dict[str, list[Any]] = {"seconds": [], "sent": [], "metered": [], "cpu": []}
        for _ in range(count):
            self.model.refill()
            dist.barrier()
            sent, metered, cpu = _transmitted(), self._metered(), time.process_time()
            begin = time.perf_counter()
            self.step(refill=True)
            found["seconds"].append(time.perf_counter() - begin)
            found["cpu"].append(time.process_time() - cpu)
            dist.barrier()  # what has left this program may still be in the kernel's queue
            found["sent"].append(_transmitted() - sent)
            now = self._metered()
            found["metered"].append(None if now is None else now - metered)
        return found

    def _metered(self) -> Any:
        meter = getattr(self.route, "meter", None)
        return None if meter is None else meter.bytes_sent

    def close(self) -> None:
        if self.route is not None:
            self.route.close()
            # DDP's C++ side holds the hook, the hook its route, the route the model: no collector sees that circle.
            for held in (getattr(self.route, "route", None), self.route):
                if held is not None:
                    vars(held).clear()
        self.route = self.ddp = None
        for parameter in self.model.order:
            parameter.grad = None
        gc.collect()


def _relative(got: Tensor, exact: Tensor) -> float:
    return float((got - exact).square().sum() / exact.square().sum())


def _quantized_once(gradients: list[Tensor], bits: int) -> Tensor:
    """The mean of gradients that were quantized on the way up only."""
    from tenko.comm import Quantizer

    quantizer = Quantizer(bits=bits, clip=3.0, block=128)
    decoded = [quantizer.decode(quantizer.encode(g, (1, i)), g.numel()) for i, g in enumerate(gradients)]
    return torch.stack(decoded).mean(dim=0)


def _transmitted() -> int:
    return int(TRANSMITTED.read_text())


def main() -> None:
    """Obeys until stdin ends."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
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
                    answer = rank.setup(PEERS[command["peer"]])
                elif command["do"] == "measure":
                    answer = dict(rank.measure(command["count"], command["compute"]))
                else:
                    rank.close()
        except Exception as error:  # whatever a peer raises is its result
            answer = {"failed": f"{type(error).__name__}: {error}".splitlines()[0]}
        print(json.dumps(answer), file=out, flush=True)
    os._exit(0)  # threads of exchanges that failed need no farewell


if __name__ == "__main__":
    main()
