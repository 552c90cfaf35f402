"""A worker of the MPI tests: trains a small model on servers and writes what it saw into FOLDER/worker-<i>.json.

mpirun -n 3 python mpi_worker.py SCENARIO FOLDER : -n 2 python -m tenko.comm.dedicated
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tenko.comm.dedicated import DedicatedServer

SCENARIO, FOLDER = sys.argv[1], Path(sys.argv[2])
TIMEOUT = float(sys.argv[3]) if len(sys.argv) > 3 else 60.0


class Model(nn.Module):
    """Odd sizes, a vector, a frozen parameter, one that gets no gradient, and one that gets it every other update."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(37, 19)
        self.frozen = nn.Linear(19, 19)
        self.hidden = nn.Linear(19, 301)
        self.norm = nn.LayerNorm(301)
        self.never = nn.Parameter(torch.randn(70, 3))
        self.sometimes = nn.Parameter(torch.randn(5, 301))
        self.out = nn.Linear(301, 1)
        self.frozen.requires_grad_(False)

    def forward(self, tokens: Tensor, use: bool) -> Tensor:
        x = self.norm(torch.tanh(self.hidden(self.frozen(self.embedding(tokens)))))
        return self.out(x + self.sometimes.mean(0) if use else x).squeeze(-1)


def loss_of(model: nn.Module, update: int, worker: int) -> Tensor:
    """Of a batch that depends on update and worker alone; worker 0 has a shorter one."""
    generator = torch.Generator().manual_seed(1000 * update + worker)
    tokens = torch.randint(0, 30, (8 if worker == 0 else 24,), generator=generator)
    return (model(tokens, update % 2 == 0) - torch.sin(tokens.float())).square().mean()


def digest(model: nn.Module) -> str:
    return hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in model.parameters())).hexdigest()


class Run:
    """A model on the servers, and what is noted of it."""

    def __init__(self, **settings: Any) -> None:
        # Only worker 0's initial weights count.
        from mpi4py import MPI

        torch.manual_seed(MPI.COMM_WORLD.Get_rank())
        self.model = Model()
        self.optimizer = DedicatedServer(
            self.model.named_parameters(), **{"lr": 2e-3, "timeout": TIMEOUT, "weight_decay": 0.01, **settings}
        )
        self.start = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        self.worker = MPI.COMM_WORLD.Get_rank()
        self.notes: dict[str, Any] = {"digests": [digest(self.model)], "skipped": [], "losses": [], "times": []}

    def update(self, number: int, weight: float = 1.0, poison: bool = False) -> None:
        self.optimizer.zero_grad()
        loss = loss_of(self.model, number, self.worker)
        loss.backward()
        if poison:
            self.model.hidden.weight.grad[3, 4] = torch.inf  # type: ignore[index]
        self.notes["losses"].append(loss.item())
        begun = time.monotonic()
        self.notes["skipped"].append(not self.optimizer.step(weight=weight))
        self.notes["times"].append((begun, time.monotonic()))
        self.notes["digests"].append(digest(self.model))

    def write(self, **more: Any) -> None:
        meter = self.optimizer.meter.state_dict()
        (FOLDER / f"worker-{self.worker}.json").write_text(json.dumps({**self.notes, **more, "meter": meter}))


def sync() -> None:
    """With a gradient that is not finite, and a folder that cannot be made: all are told, and go on."""
    run = Run(bits=3, weight_bits=4, clip=3.0)
    for number in range(1, 13):
        run.update(number, poison=(number == 5 and run.worker == 1))
        if number == 10:
            try:
                run.optimizer.save(FOLDER / "file" / "state")
            except OSError as error:
                run.notes["error"] = str(error)
    moved = {name: not torch.equal(p, run.start[name]) for name, p in run.model.named_parameters()}
    nan = any(bool(p.isnan().any()) for p in run.model.parameters())
    run.write(moved=moved, nan=nan)


def plain() -> None:
    """Against AdamW on the mean gradient of all workers' batches, with clipping and token weights."""
    run = Run(bits=8, clip=0.0, weight_bits=32, clip_norm=0.3)
    reference = Model()
    reference.load_state_dict(run.model.state_dict())
    torchs = torch.optim.AdamW([p for p in reference.parameters() if p.requires_grad], lr=2e-3, weight_decay=0.01)
    before = [p.detach().clone() for p in reference.parameters()]
    clipped = []
    for number in range(1, 31):
        run.optimizer.param_groups[0]["lr"] = torchs.param_groups[0]["lr"] = 2e-3 / number**0.5
        run.update(number, weight=8 if run.worker == 0 else 24)
        torchs.zero_grad()
        total = sum(size * loss_of(reference, number, worker) for worker, size in enumerate((8, 24, 24)))
        (total / 56).backward()
        clipped.append(float(nn.utils.clip_grad_norm_(reference.parameters(), 0.3)) > 0.3)
        torchs.step()
    for parameter in [*reference.parameters(), *run.model.parameters()]:
        parameter.requires_grad_(False)
    way = sum(float((a - b).square().sum()) for a, b in zip(reference.parameters(), before, strict=True))
    pairs = zip(reference.parameters(), run.model.parameters(), strict=True)
    run.write(off=sum(float((a - b).square().sum()) for a, b in pairs) / way, clipped=sum(clipped))


def stale() -> None:
    run = Run(bits=3, weight_bits=4, staleness=2, clip_norm=5.0, lr=2e-3)
    for number in range(1, 41):
        if run.worker == 0:
            time.sleep(0.02)
        run.update(number, poison=(number == 7 and run.worker == 2))
    run.write()


def resume() -> None:
    """Twenty updates, saved after every 4th; slowly if a file says so, so that there is time to be killed."""
    run = Run(bits=3, weight_bits=4)
    done = run.optimizer.load(FOLDER / "state")
    for number in range(done + 1, 21):
        run.update(number)
        if number % 4 == 0:
            run.optimizer.save(FOLDER / "state")
        if (FOLDER / "slowly").exists():
            (FOLDER / f"at-{run.worker}").write_text(str(number))
            time.sleep(0.2)
    run.write(resumed=done)


def disagree() -> None:
    from mpi4py import MPI

    Run(bits=3 + (MPI.COMM_WORLD.Get_rank() == 2))


def wrong() -> None:
    Run(bits=9)


def diverge() -> None:
    """One worker saves where the others go on."""
    run = Run()
    run.update(1)
    if run.worker == 0:
        run.optimizer.save(FOLDER / "state")
    run.update(2)


def tiny() -> None:
    """Fewer spans than servers: some own nothing."""
    from mpi4py import MPI

    weight = nn.Parameter(torch.full((5,), float(MPI.COMM_WORLD.Get_rank())))
    optimizer = DedicatedServer([("weight", weight)], lr=0.1, weight_decay=0.0, timeout=TIMEOUT)
    start = weight.tolist()
    weight.grad = torch.ones(5)
    optimizer.step()
    optimizer.close()
    (FOLDER / f"worker-{MPI.COMM_WORLD.Get_rank()}.json").write_text(json.dumps([start, weight.tolist()]))


torch.set_num_threads(1)
{f.__name__: f for f in (sync, plain, stale, resume, disagree, wrong, diverge, tiny)}[SCENARIO]()
