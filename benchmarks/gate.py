"""The measured side of `training.py`: lets a training loop run so many updates, then holds it until its next turn.

A peer process calls `Gate.pass_through` at the start of every update. Commands come on stdin, one a line, answers go
to what was stdout, one JSON object a line; everything the training prints goes to stderr. A turn's time runs from the
release of one update to the arrival at the one N later, so it holds the whole loop N times: data, logging, all.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


class Gate:
    """Takes `go N`, `stop`, and the names in `commands`.

    Args:
        commands: further commands, given their arguments as integers; each returns what to answer.
        at_end: what to answer to `stop`, after which the process ends at once.
    """

    def __init__(self, commands: dict[str, Callable[..., Any]], at_end: Callable[[], Any]) -> None:
        self._out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        self._commands, self._at_end = commands, at_end
        self._left, self._released, self._cpu = 0, 0.0, 0.0
        self.tokens = 0
        """Target tokens of this rank in this turn; the peer adds to it."""
        self.loss = 0.0
        """Label-smoothed loss of those tokens in nats, summed; the peer adds to it."""
        self.parts: defaultdict[str, float] = defaultdict(float)
        """Seconds of this turn by part of an update."""

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Count what runs inside under `part`."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.parts[part] += time.perf_counter() - begin

    def pass_through(self) -> None:
        """At the start of an update: goes on, or answers for the turn and waits for the next command."""
        if self._left == 0:
            seconds = time.perf_counter() - self._released
            cpu = time.process_time() - self._cpu
            answer = {"seconds": seconds, "cpu": cpu, "tokens": self.tokens, "loss": self.loss, "parts": self.parts}
            self._answer(answer)
            self._obey()
            self.tokens, self.loss, self.parts = 0, 0.0, defaultdict(float)
            self._released, self._cpu = time.perf_counter(), time.process_time()
        self._left -= 1

    def _obey(self) -> None:
        for line in sys.stdin:
            command, *arguments = line.split()
            if command == "go":
                self._left = int(arguments[0])
                return
            if command == "stop":
                self._answer(self._at_end())
                break
            self._answer(self._commands[command](*map(int, arguments)))
        # Threads of loaders and collectives need no farewell; an end of stdin means that training.py is gone.
        os._exit(0)

    def _answer(self, value: Any) -> None:
        print(json.dumps(value), file=self._out, flush=True)


def facts(model: torch.nn.Module) -> dict[str, Any]:
    """What `training.py` holds the contestants to: world size as torch knows it, a checksum of the weights, sizes."""
    digest = hashlib.sha256()
    for parameter in model.parameters():
        digest.update(parameter.detach().contiguous().view(torch.uint8).numpy().data)
    return {
        "world": torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1,
        "weights": digest.hexdigest(),
        "parameters": sum(p.numel() for p in model.parameters()),
        "threads": torch.get_num_threads(),
    }
