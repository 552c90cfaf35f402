"""`auto`: tries fp32, fp16 and quantized all-reduce in the first updates, and keeps the fastest on this link.

What counts is the time of a whole update, so codec, link and how much of both hides behind backward are all in it.
Compression pays on slow links only; where it does not, this route is plain DDP. Among routes within 2 % of the fastest
the one that loses least is taken.
"""

# No `from __future__ import annotations`: see route.py.

import logging
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from .config import CommConfig
from .hook import AllReduce, HalfAllReduce, LaneRoute, QuantizedAllReduce
from .route import Route

logger = logging.getLogger(__name__)

ROUNDS = 5
"""Turns that each candidate gets; the first is not counted: buckets are rebuilt and kernels are loaded then."""
MARGIN = 1.02


class Auto(Route):
    """Measures, chooses, and says why in the log.

    Args:
        config: of the quantized candidate; None takes the defaults.
        seed: of the stochastic rounding; must be the same on all ranks.
        timeout: seconds to wait for a rank before giving it up.
    """

    def __init__(self, config: CommConfig | None = None, *, seed: int = 0, timeout: float = 1800.0) -> None:
        super().__init__()
        c = config or CommConfig()
        quantized = QuantizedAllReduce(
            c.bits,
            c.bits_down,
            c.clip,
            c.block,
            error_feedback=c.error_feedback,
            sigma=c.sigma,
            rounding=c.rounding,
            seed=seed,
            timeout=timeout,
        )
        self.candidates: dict[str, Route] = {
            "fp32": AllReduce(),
            "fp16": HalfAllReduce(timeout=timeout),
            f"{c.bits}/{c.bits_down} bits": quantized,
        }
        """In the order of what they lose, least first."""
        self.choice: str | None = None
        """The candidate that was chosen; None while measuring."""
        self.seconds: dict[str, float] = {}
        """Median time of an update by candidate, on the slowest rank."""
        self._current = next(iter(self.candidates))
        self._times: dict[str, list[float]] = {name: [] for name in self.candidates}
        self._turn = 0
        self._began: float | None = None
        self._at_start = True

    def bind(self, model: DistributedDataParallel) -> None:
        super().bind(model)
        first: LaneRoute | None = None
        for route in reversed(self.candidates.values()):
            route.meter = self.meter
            if isinstance(route, LaneRoute) and first is not None:
                route.share(first)
            route.bind(model)
            if isinstance(route, LaneRoute) and first is None:
                first = route
        self._link = None if first is None else first._link

    def _exchange(self, buffer: Tensor, bucket: dist.GradBucket, step: int) -> torch.futures.Future[Tensor]:
        if self._at_start:
            self._begin_update(buffer.device)
        self._at_start = bucket.is_last()
        return self.candidates[self._current]._exchange(buffer, bucket, step)

    def _begin_update(self, device: torch.device) -> None:
        """The time since the last one belongs to the candidate that it ran with."""
        if self.choice is not None:
            return
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # in these few updates only
        now = time.perf_counter()
        if self._began is not None:
            self._times[self._current].append(now - self._began)
            self._turn += 1
        self._began = now
        names = list(self.candidates)
        self._current = names[self._turn % len(names)]
        if self._turn == ROUNDS * len(names):
            self._choose(device)

    def _choose(self, device: torch.device) -> None:
        medians = torch.tensor(
            [statistics.median(times[1:]) for times in self._times.values()], dtype=torch.float64, device=device
        )
        assert self._link is not None
        others = [rank for rank in range(self.world_size) if rank != self.rank]
        theirs = {rank: torch.empty_like(medians) for rank in others}
        handle = self._link.start(
            1,
            dict.fromkeys(others, medians.view(torch.uint8)),
            {rank: values.view(torch.uint8) for rank, values in theirs.items()},
        )
        handle.wait()
        slowest = torch.stack([medians, *theirs.values()]).amax(dim=0).tolist()
        self.seconds = dict(zip(self.candidates, slowest, strict=True))
        fastest = min(slowest)
        self.choice = next(name for name, seconds in self.seconds.items() if seconds <= MARGIN * fastest)
        self._current = self.choice
        if self.rank == 0:
            measured = ", ".join(f"{name} {1e3 * seconds:.3g} ms" for name, seconds in self.seconds.items())
            logger.warning("comm: an update takes %s: goes on with %s", measured, self.choice)

    def state_dict(self) -> dict[str, Any]:
        inner = {name: route.state_dict() for name, route in self.candidates.items()}
        return {**super().state_dict(), "choice": self.choice, "seconds": self.seconds, "candidates": inner}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for key in ("candidates", "choice", "seconds"):
            if key not in state:
                raise ValueError(f"comm.auto: {key} is missing in the saved state, which another route has saved")
        super().load_state_dict(state)
        for name, inner in state["candidates"].items():
            if name not in self.candidates:
                raise ValueError(f"comm.auto: measured {name} before, now there are {', '.join(self.candidates)}")
            self.candidates[name].load_state_dict(inner)
        self.meter.load_state_dict(state["meter"])
        self.choice, self.seconds = state["choice"], dict(state["seconds"])
        if self.choice is not None:
            self._current = self.choice

    def adopt(self, states: Sequence[Mapping[str, Any]]) -> None:
        """As of every route; and measures anew, as the fastest depends on the number of ranks."""
        own = self._own(states)
        for name, route in self.candidates.items():
            if all(name in state["candidates"] for state in states):
                route.adopt([state["candidates"][name] for state in states])
        Route.load_state_dict(self, own)

    def close(self) -> None:
        super().close()
        for route in self.candidates.values():
            route.close()
