"""Where the ranks of a SLURM job meet, by its variables: nobody sets MASTER_ADDR and MASTER_PORT by hand.

    srun --ntasks 4 python -m tenko.launch.worker recipes/scratch.yaml --run-dir runs/scratch

`python -m tenko.launch.slurm_env` prints HOST:PORT; slurm/train.sbatch gives that to `tenko run --rendezvous`.
"""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from collections.abc import Mapping

from .world import interface_to

FIRST_PORT, PORTS = 20000, 12000
"""Below the ports that Linux hands out by itself (32768 on)."""
STEPS = 37
"""Ports a job: one for each of its first steps, the last for its batch script. Prime to PORTS, so that jobs of one node
share a port only when their ids lie 12,000 apart."""


def meeting_point(environ: Mapping[str, str] = os.environ) -> tuple[str, int]:
    """Address and port of rank 0, the same in every task of a job step, or for its batch script.

    The address is that of the step's first node as SLURM knows it (NodeAddr), the port a number made of the ids of job
    and step: two jobs on one node don't collide.

    Raises:
        ValueError: not in a job, or a node's name resolves nowhere.
    """
    nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST", "")
    if not nodes or "SLURM_JOB_ID" not in environ:
        raise ValueError("SLURM_JOB_ID and SLURM_JOB_NODELIST: not set; this works inside a job of SLURM only")
    names = first_names(nodes)
    address = _address(names[0])
    if len(names) > 1 and _is_loopback(address) and environ.get("SLURM_NODEID", "0") == "0":
        # Debian gives a machine's own name 127.0.1.1: take the address by which it reaches the second node.
        address = interface_to(_address(names[1]))[1]
    return address, port(int(environ["SLURM_JOB_ID"]), environ.get("SLURM_STEP_ID", ""))


def port(job: int, step: str) -> int:
    """The port of a job's step; of its batch script where the step's number is none."""
    number = int(step) % (STEPS - 1) if step.isdigit() else STEPS - 1
    return FIRST_PORT + (job * STEPS + number) % PORTS


def first_names(nodes: str) -> list[str]:
    """The first one or two names of a node list as SLURM writes it: of `n[01-03,7],gpu2` n01 and n02."""
    found: list[str] = []
    for item in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", nodes):
        prefix, _, rest = item.partition("[")
        ranges, _, suffix = rest.partition("]")
        for part in ranges.split(","):
            first, _, last = part.partition("-")
            tail = suffix and first_names(suffix)[0]
            found.append(f"{prefix}{first}{tail}")
            if last and int(last) > int(first):
                found.append(f"{prefix}{int(first) + 1:0{len(first)}d}{tail}")
            if len(found) > 1:
                return found[:2]
    return found


def _address(name: str) -> str:
    """NodeAddr of a node, as slurmctld says, or the node's name where there is nobody to ask; as an IPv4 address."""
    try:
        shown = subprocess.run(
            ["scontrol", "show", "node", "--oneliner", name], capture_output=True, text=True, timeout=60, check=False
        ).stdout
    except (OSError, subprocess.TimeoutExpired):  # a container without SLURM's programs, for instance
        shown = ""
    match = re.search(r"\bNodeAddr=(\S+)", shown)
    address = match[1] if match else name
    try:
        return socket.gethostbyname(address)
    except OSError:
        raise ValueError(f"{address}: the address of SLURM's node {name} does not resolve; set MASTER_ADDR") from None


def _is_loopback(address: str) -> bool:
    return address.startswith("127.")


def main() -> None:
    """Print HOST:PORT."""
    try:
        print("{}:{}".format(*meeting_point()))
    except ValueError as error:
        sys.exit(f"tenko: error: {error}")


if __name__ == "__main__":
    main()
