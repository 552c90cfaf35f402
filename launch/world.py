"""Who this process is among the processes of a run, as whatever started it says: torchrun, srun, mpirun, or nobody.

Everything after this module reads torchrun's variables (RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, GROUP_RANK):
`World.export` sets them under the other launchers, so that torch, accelerate and tenko.comm see one and the same world.
"""

from __future__ import annotations

import fcntl
import os
import socket
import struct
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from typing import Literal

Launcher = Literal["torchrun", "srun", "mpirun", "alone"]

_SIOCGIFADDR = 0x8915
"""ioctl of Linux: an interface's IPv4 address."""


@dataclass(frozen=True, kw_only=True)
class World:
    """This process among the others."""

    launcher: Launcher = "alone"
    """What started it."""
    rank: int = 0
    """Its number among all, from 0."""
    size: int = 1
    """Processes in all."""
    local_rank: int = 0
    """Its number among those of its node; picks the GPU."""
    local_size: int = 1
    """Processes on its node."""
    node: int = 0
    """Number of its node."""
    nodes: int = 1
    """Nodes in all."""
    restart: int = 0
    """How often the launcher has started the processes anew within this launch."""

    @classmethod
    def detect(cls, environ: Mapping[str, str] = os.environ) -> World:
        """Read the launcher's variables.

        Raises:
            ValueError: one is missing or no number; names it.
        """
        if "RANK" in environ and "WORLD_SIZE" in environ:
            return _torchrun(environ)
        # Open MPI's variable, and that of MPICH's Hydra. In a SLURM job they start their daemons with srun, whose
        # variables the ranks then have as well.
        if "OMPI_COMM_WORLD_RANK" in environ or "MPI_LOCALRANKID" in environ:
            return cls(launcher="mpirun")  # the rest MPI itself says: mpi_env.py
        if "SLURM_STEP_ID" in environ and "SLURM_PROCID" in environ:
            return _srun(environ)
        return cls()

    def export(self, environ: MutableMapping[str, str] = os.environ) -> None:
        """Set torchrun's variables, where there is more than one process; under srun also where they meet.

        Raises:
            ValueError: under srun: a node's name does not resolve.
        """
        if self.size > 1:
            environ["RANK"], environ["WORLD_SIZE"] = str(self.rank), str(self.size)
            environ["LOCAL_RANK"], environ["LOCAL_WORLD_SIZE"] = str(self.local_rank), str(self.local_size)
            environ["GROUP_RANK"] = str(self.node)
            if self.launcher == "srun" and not ("MASTER_ADDR" in environ and "MASTER_PORT" in environ):
                from .slurm_env import meeting_point

                host, port = meeting_point(environ)
                environ.setdefault("MASTER_ADDR", host)
                environ.setdefault("MASTER_PORT", str(port))

    def __str__(self) -> str:
        if self.size == 1:
            return "1 worker"
        nodes = "1 node" if self.nodes == 1 else f"{self.nodes} nodes"
        restart = f", restart {self.restart}" if self.restart else ""
        return f"{self.size} workers on {nodes}, started by {self.launcher}{restart}"


def _torchrun(environ: Mapping[str, str]) -> World:
    size = _number(environ, "WORLD_SIZE")
    local_size = _number(environ, "LOCAL_WORLD_SIZE", 1)
    return World(
        launcher="torchrun" if size > 1 or "TORCHELASTIC_RUN_ID" in environ else "alone",
        rank=_number(environ, "RANK"),
        size=size,
        local_rank=_number(environ, "LOCAL_RANK", 0),
        local_size=local_size,
        node=_number(environ, "GROUP_RANK", 0),
        nodes=_number(environ, "GROUP_WORLD_SIZE", max(1, size // local_size)),
        restart=_number(environ, "TORCHELASTIC_RESTART_COUNT", 0),
    )


def _srun(environ: Mapping[str, str]) -> World:
    """Of a job step; SLURM gives the tasks of each node as `4(x3),2`."""
    nodes = _number(environ, "SLURM_STEP_NUM_NODES", 1)
    node = _number(environ, "SLURM_NODEID", 0)
    tasks = _tasks_per_node(environ.get("SLURM_STEP_TASKS_PER_NODE", "1"))
    return World(
        launcher="srun",
        rank=_number(environ, "SLURM_PROCID"),
        size=_number(environ, "SLURM_STEP_NUM_TASKS", 1),
        local_rank=_number(environ, "SLURM_LOCALID", 0),
        local_size=tasks[node] if node < len(tasks) else 1,
        node=node,
        nodes=nodes,
        # A requeued job is a launch of its own: its processes share no store with those before.
        restart=0,
    )


def _tasks_per_node(text: str) -> list[int]:
    """`4(x3),2` is [4, 4, 4, 2]."""
    counts: list[int] = []
    for part in text.split(","):
        number, _, times = part.partition("(x")
        try:
            counts += [int(number)] * int(times.rstrip(")") or 1)
        except ValueError:
            raise ValueError(f"SLURM_STEP_TASKS_PER_NODE: not as SLURM writes it: {text!r}") from None
    return counts


def _number(environ: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environ.get(name, "")
    if not text and default is not None:
        return default
    try:
        return int(text)
    except ValueError:
        what = f"is {text!r}" if text else "is missing"
        raise ValueError(f"{name}: must be a whole number from the launcher, {what}") from None


def interfaces() -> dict[str, str]:
    """The IPv4 addresses of this machine's network interfaces, by name; those without one are left out."""
    found = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
            except OSError:
                continue
            found[name] = socket.inet_ntoa(answer[20:24])
    return found


def interface_to(host: str) -> tuple[str, str]:
    """The interface by which this machine reaches `host`, and its own address there.

    Nothing is sent. A host name that means this machine itself (Debian gives it 127.0.1.1) is reached by loopback.

    Raises:
        ValueError: the name does not resolve, or there is no way to it.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((host, 9))
        except socket.gaierror:
            raise ValueError(f"{host}: this name does not resolve to an IPv4 address") from None
        except OSError as error:
            raise ValueError(f"{host}: no way there from this machine ({error.strerror})") from None
        address = probe.getsockname()[0]
    if address.startswith("127."):
        return "lo", address
    for name, own in interfaces().items():
        if own == address:
            return name, address
    raise ValueError(f"{host}: is reached from {address}, which no interface here has")


def address_of(interface: str, named_by: str = "--interface") -> str:
    """The IPv4 address of an interface of this machine.

    Args:
        interface: its name.
        named_by: the option or variable that gave it, for the error.

    Raises:
        ValueError: there is none of that name with an address; names those there are.
    """
    found = interfaces()
    if interface not in found:
        valid = ", ".join(f"{name} ({address})" for name, address in found.items())
        raise ValueError(f"{named_by}: {interface}: no interface of this name with an address; valid: {valid}")
    return found[interface]
