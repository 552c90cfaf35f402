"""How a failure becomes one line and an exit code.

2: what the user can mend (ValueError, OSError), a worker that was killed. 1: an error of ours, with a traceback in the
run's logs. 130 and 143: ended by Ctrl-C or SIGTERM. 141: nobody reads what a command says. 75: stopped on notice and
saved, or a node was lost: the same command goes on, and SLURM's script types it.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

BAD_INPUT, INTERNAL, INTERRUPTED = 2, 1, 130
STOPPED = 75
"""EX_TEMPFAIL of sysexits.h: what the same command goes on with."""

_PEER_WORDS = ("gloo", "nccl", "connection", "peer", "socket", "tcpstore", "process group", "broken pipe")
_CONNECTION_ERRORS = {"ConnectionError", *(kind.__name__ for kind in ConnectionError.__subclasses__())}


class RunFailed(Exception):
    """A run ended early; the message is the whole line for the user.

    Args:
        message: one line.
        code: the exit code.
    """

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


class Halted(RunFailed):
    """A run was stopped on notice: no error."""


class NotBegun(RunFailed):
    """The nodes of a run did not come together: there is nothing to go on with."""


class Terminated(BaseException):
    """A signal asked this process to end (SIGTERM, SIGHUP); like KeyboardInterrupt no `except Exception` stops it."""

    def __init__(self, number: int) -> None:
        super().__init__(f"ended by {signal.Signals(number).name}")
        self.code = 128 + number


class Stopped(Exception):
    """A notice ended the training after an update that was saved.

    Args:
        update: the update.
    """

    def __init__(self, update: int) -> None:
        super().__init__(f"stopped on notice, saved at update {update}; the same command goes on from there")
        self.update = update


def is_users(error: BaseException) -> bool:
    """Whether the user can mend it: a one-line message is enough, the exit code is 2."""
    return isinstance(error, ValueError | OSError) and not isinstance(error, ConnectionError)


def is_lost_peer(error: BaseException) -> bool:
    """Whether it looks like the echo of another worker's end rather than a cause."""
    if isinstance(error, ConnectionError):
        return True
    return isinstance(error, RuntimeError) and _names_a_peer(str(error))


def is_echo(line: str) -> bool:
    """`is_lost_peer` of the last line of a traceback, `TYPE: message`."""
    kind, _, message = line.partition(": ")
    return kind in _CONNECTION_ERRORS or (kind == "RuntimeError" and _names_a_peer(message))


def _names_a_peer(text: str) -> bool:
    return any(word in text.lower() for word in _PEER_WORDS)


def one_line(error: BaseException) -> str:
    """What is wrong in one line: `FILE: no space left on device`, or the message with its line breaks folded."""
    if isinstance(error, OSError) and error.strerror:
        reason = error.strerror[:1].lower() + error.strerror[1:]
        names = [os.fsdecode(name) for name in (error.filename, error.filename2) if isinstance(name, str | bytes)]
        return f"{' -> '.join(names)}: {reason}" if names else reason
    text = " ".join(line.strip() for line in str(error).splitlines() if line.strip())
    return text or type(error).__name__


def internal(error: BaseException, log: Path | None) -> str:
    """The line for an error of ours: its type and where the traceback is."""
    text = one_line(error)
    text = text if len(text) <= 300 else text[:297] + "..."
    where = f"; traceback in {log}" if log is not None else "; --debug shows the traceback"
    return f"internal error: {type(error).__name__}: {text}{where}"
