"""What of the MPI link needs no MPI: the end of a process that waits for others in vain."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import ctypes, sys
from tenko.comm.mpi_link import ended_unless_done

with ended_unless_done(float(sys.argv[1]), "not all ranks joined"):
    ctypes.PyDLL(None).usleep(int(float(sys.argv[2]) * 1e6))  # keeps the interpreter's lock, as MPI_Init does
print("done")
"""


def run(limit: float, seconds: float) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", PROGRAM, str(limit), str(seconds)]
    return subprocess.run(command, capture_output=True, text=True, timeout=100)


def test_a_process_that_waits_too_long_in_c_code_is_ended_with_one_line() -> None:
    ended = run(0.5, 60)
    assert (ended.returncode, ended.stdout, ended.stderr) == (-9, "", "not all ranks joined\n")


def test_one_that_is_done_in_time_goes_on() -> None:
    done = run(60, 0.1)
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")
