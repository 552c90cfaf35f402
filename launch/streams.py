"""Standard streams that are closed, or whose reader goes away: a run goes on without them, its logs are in files."""

from __future__ import annotations

import os
import sys


def open_closed() -> None:
    """Put /dev/null where standard input, output or errors are closed; processes started later have it, too."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            number = os.open(os.devnull, os.O_RDWR)  # the lowest that is free: the stream's own
            os.set_inheritable(number, True)
            setattr(sys, name, os.fdopen(number, mode, encoding="utf-8"))


def say(line: str) -> None:
    """Print a line at once; where the reader of stdout has gone away (`| head -1`), it and what follows go nowhere."""
    try:
        print(line, flush=True)
    except BrokenPipeError:
        forget_stdout()


def forget_stdout() -> None:
    """Let stdout lead nowhere; the interpreter would fail once more on a closed pipe when it flushes at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
