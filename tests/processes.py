"""Processes that tests start or look for: which of them run, how workers end, and what `mpirun` is."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NoReturn

import psutil
import pytest

MPIRUN = Path(sys.executable).with_name("mpirun")
MPIRUN = MPIRUN if MPIRUN.exists() else Path(shutil.which("mpirun") or "mpirun")
needs_mpi = pytest.mark.skipif(
    importlib.util.find_spec("mpi4py") is None or not MPIRUN.exists(),
    reason="needs mpi4py and mpirun: pip install tenko[mpi]",
)


def alive(pids: Iterable[int], seconds: float = 3.0) -> list[int]:
    """Those that still run (zombies do not), after a moment to end."""
    deadline = time.monotonic() + seconds
    while (left := [pid for pid in pids if _runs(pid)]) and time.monotonic() < deadline:
        time.sleep(0.05)
    return left


def _runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.NoSuchProcess:
        return False


def leave() -> NoReturn:
    """End a worker that has succeeded, as tenko's own workers end.

    A thread of torch's gloo group, which a DDP model keeps behind `destroy_process_group`, now and then drops a tensor
    while the interpreter is on its way out, and aborts ("terminate called without an active exception").
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
