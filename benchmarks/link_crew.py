"""The side of `links.py` on which ranks are started, asked and ended; `link_rank.py` answers."""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
import time
from pathlib import Path
from typing import IO, Any

from lab import PORT, Lab

RANK = Path(__file__).with_name("link_rank.py")


class Failed(Exception):
    """A rank failed, or was silent for too long; the crew must be started anew."""


class Crew:
    """n processes that run one rank script, one on each host of a lab.

    Args:
        lab: where.
        hello: the first command.
        log: file that takes what the ranks print.
        python, script: what runs.
        number: tells crews of one lab apart.
    """

    def __init__(
        self,
        lab: Lab,
        hello: dict[str, Any],
        log: IO[str],
        *,
        python: str = sys.executable,
        script: str = str(RANK),
        number: int = 0,
    ) -> None:
        self.lab, self.hello, self.log = lab, hello, log
        self.command, self.number, self.starts = [python, script], number, 0
        self.processes: list[subprocess.Popen[str]] = []

    def start(self) -> None:
        """Starts the ranks, where they do not run yet."""
        if self.processes:
            return
        self.starts += 1
        port = {"MASTER_PORT": str(PORT + 100 * self.number + self.starts)}
        pipe = subprocess.PIPE
        for host in range(self.lab.hosts):
            self.processes.append(
                self.lab.start(host, self.command, environment=port, stdin=pipe, stdout=pipe, stderr=self.log)
            )
        self.ask({"do": "hello", **self.hello}, timeout=300)

    def ask(self, command: dict[str, Any], *, timeout: float) -> list[dict[str, Any]]:
        """Sends a command to all ranks and waits for all answers.

        Raises:
            Failed: a rank says so, ends, or does not answer in time. The ranks have been ended then.
        """
        answers: list[dict[str, Any] | None] = [None] * len(self.processes)
        until = time.monotonic() + timeout
        try:
            with selectors.DefaultSelector() as waiting:
                for rank, process in enumerate(self.processes):
                    assert process.stdin is not None
                    assert process.stdout is not None
                    print(json.dumps(command), file=process.stdin, flush=True)
                    waiting.register(process.stdout, selectors.EVENT_READ, rank)
                while None in answers:
                    ready = waiting.select(max(0.0, until - time.monotonic()))
                    if not ready:
                        late = [rank for rank, answer in enumerate(answers) if answer is None]
                        raise Failed(f"hangs: no answer in {timeout:.0f} s from ranks {late}")
                    for key, _ in ready:
                        line = key.fileobj.readline()  # type: ignore[union-attr]
                        if not line:
                            raise Failed(f"rank {key.data} ended")
                        answer = json.loads(line)
                        if "failed" in answer:
                            raise Failed(answer["failed"])
                        answers[key.data] = answer
                        waiting.unregister(key.fileobj)
        except (Failed, BrokenPipeError) as error:
            self.end()
            raise error if isinstance(error, Failed) else Failed("a rank ended") from None
        return [answer for answer in answers if answer is not None]

    def end(self) -> None:
        """Ends the ranks."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.wait()
        self.processes.clear()


def commit() -> str:
    """What is measured: the commit, with a + where files differ from it."""
    here = Path(__file__).parent
    command = ["git", "-C", str(here), "describe", "--always", "--dirty=+", "--abbrev=7", "--exclude=*"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def machine() -> dict[str, Any]:
    """What it was measured on."""
    info = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":", 1)[1].strip() for line in info if line.startswith("model name")]
    return {"cpu": names[0] if names else "", "cores": os.cpu_count(), "kernel": os.uname().release}
