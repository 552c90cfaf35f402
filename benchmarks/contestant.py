"""The side of `training.py` on which a contestant's processes are started, asked and ended; `gate.py` answers."""

from __future__ import annotations

import json
import os
import socket
import statistics
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

THREADS = {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
"""Environment of every process: one thread, no GPU."""


@dataclass(kw_only=True)
class Contestant:
    """One way to train: its processes, one a rank, and what its turns took."""

    name: str
    command: list[str]
    """Of every rank; `{rank}` and `{port}` are filled in."""
    ranks: int
    folder: Path
    precision: str = "fp32"
    rounds: list[dict[str, Any]] = field(default_factory=list)
    end: dict[str, Any] = field(default_factory=dict)
    processes: list[subprocess.Popen[str]] = field(default_factory=list)

    def start(self) -> None:
        """Start all ranks; they load, and wait at their first update."""
        port = _free_port()
        for rank in range(self.ranks):
            environment = {**os.environ, **THREADS}
            if self.ranks > 1:
                environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(self.ranks)}
                environment |= {"LOCAL_WORLD_SIZE": str(self.ranks), "GLOO_SOCKET_IFNAME": "lo"}
                environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            command = [part.format(rank=rank, port=port) for part in self.command]
            with self._log(rank).open("w") as log:
                self.processes.append(
                    subprocess.Popen(
                        [sys.executable, *command],
                        stdin=subprocess.PIPE,
                        stdout=subprocess.PIPE,
                        stderr=log,
                        text=True,
                        env=environment,
                    )
                )

    def _log(self, rank: int) -> Path:
        return self.folder / f"{self.name.replace(' ', '-').replace('/', '-')}-{rank}.log"

    def ask(self, command: str) -> list[Any]:
        """Send a command to every rank and wait for every answer."""
        for process in self.processes:
            assert process.stdin is not None
            process.stdin.write(command + "\n")
            process.stdin.flush()
        return self.answers()

    def answers(self) -> list[Any]:
        """The next answer of every rank."""
        found = []
        for rank, process in enumerate(self.processes):
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line:
                tail = "\n".join(self._log(rank).read_text(errors="replace").splitlines()[-25:])
                raise RuntimeError(f"{self.name}: rank {rank} ended with {process.wait()}\n{tail}")
            found.append(json.loads(line))
        return found

    def turn(self, updates: int) -> dict[str, Any]:
        """Train so many updates: time of the slowest rank, tokens and loss of all, parts of rank 0."""
        answers = self.ask(f"go {updates}")
        seconds, tokens = max(a["seconds"] for a in answers), sum(a["tokens"] for a in answers)
        return {
            "seconds": seconds,
            "tokens": tokens,
            "rate": tokens / seconds,
            "cpu_rate": tokens / sum(a["cpu"] for a in answers),
            "loss": sum(a["loss"] for a in answers) / tokens,
            "parts": answers[0]["parts"],
        }

    def finish(self) -> None:
        """End all ranks and hold them to what they claim to be."""
        ends = self.ask("stop")
        self.end = ends[0]
        assert all(e["world"] == self.ranks for e in ends), f"{self.name}: world sizes {[e['world'] for e in ends]}"
        assert len({e["weights"] for e in ends}) == 1, f"{self.name}: the ranks end with different weights"
        assert all(e["threads"] == 1 for e in ends), f"{self.name}: threads {[e['threads'] for e in ends]}"
        self.close()

    def close(self) -> None:
        """End what is left of the processes."""
        for process in self.processes:
            assert process.stdin is not None
            process.stdin.close()
            try:
                process.wait(timeout=5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def median(self, figure: str) -> float:
        """Of a figure of the turns: `rate` (target tokens a second), `cpu_rate` (of processor time), `loss`."""
        return statistics.median(r[figure] for r in self.rounds)

    def over(self, other: Contestant, figure: str = "rate") -> list[float]:
        """A figure over another's, turn by turn."""
        return [mine[figure] / theirs[figure] for mine, theirs in zip(self.rounds, other.rounds, strict=True)]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
