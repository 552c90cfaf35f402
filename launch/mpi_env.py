"""A run under mpirun: who is worker and who is server, where workers meet, and how one that fails ends all the others.

    mpirun -n 4 python -m tenko.launch.worker RECIPE --run-dir DIR
    mpirun -n 4 python -m tenko.launch.worker RECIPE --run-dir DIR : -n 2 python -m tenko.comm.dedicated

MPI itself says who shares a node, so that any MPI will do. Workers then form torch.distributed's world, without the
servers; what they tell each other here is JSON in buffers of bytes, nothing is pickled.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

from tenko.comm.config import CommConfig

from .notice import SIGNALS
from .world import Launcher, World, address_of, interface_to

if TYPE_CHECKING:
    from tenko.comm.mpi_link import Link

COMMAND = "mpirun -n W python -m tenko.launch.worker RECIPE : -n S python -m tenko.comm.dedicated"
INTERFACE = "TENKO_INTERFACE"
"""Environment variable: the network interface that workers reach each other by."""
_RANKS = ("OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK")
"""A rank's number among all, servers included, as Open MPI, srun --mpi=pmix, and MPICH say it."""
_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
HEARD_SECONDS = 2.0
"""How long another rank gives the one that failed first to say why, and to end them all."""


def rank_of(environ: Mapping[str, str] = os.environ) -> int | None:
    """This process's number among all of an MPI job; None if it is in none."""
    return next((int(environ[name]) for name in _RANKS if environ.get(name, "").isdigit()), None)


def is_needed(world: World, comm: CommConfig) -> bool:
    """Whether a run is bootstrapped by MPI: mpirun has started it, or srun has and it wants parameter servers."""
    return world.launcher == "mpirun" or (comm.servers == "dedicated" and rank_of() is not None)


@dataclass(frozen=True, kw_only=True)
class Mpi:
    """This process in an MPI job."""

    world: World
    """Who it is among the workers."""
    link: Link
    """To the servers; there may be none."""
    listener: socket.socket | None
    """Rank 0's: bound to MASTER_ADDR and MASTER_PORT, so that nobody takes the port before the store does."""

    @classmethod
    def start(cls, launcher: Launcher) -> Mpi:
        """Meet all ranks, and set MASTER_ADDR and MASTER_PORT.

        Args:
            launcher: what started them.

        Raises:
            ValueError: mpi4py is not installed, or the hosts cannot reach each other; one line.
        """
        # MPI starts threads, which inherit the mask: a notice must not end the process by way of one of them.
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        try:
            from mpi4py import MPI
        except (ImportError, RuntimeError) as error:  # RuntimeError: there is no MPI library
            raise ValueError(f"mpirun: mpi4py is needed (pip install tenko[mpi]): {error}") from None
        from tenko.comm.mpi_link import WORKER, end_with_parent, meet

        end_with_parent()
        link = meet(WORKER)
        ranks = MPI.COMM_WORLD.Get_group().Incl(link.workers)
        workers = MPI.COMM_WORLD.Create_group(ranks)
        world = _world(MPI, workers, launcher)
        for size in _SIZES:  # accelerate reads these: servers are not of its world
            if size in os.environ:
                os.environ[size] = str(world.size)
        listener = None
        if name := os.environ.get(INTERFACE):
            address_of(name, INTERFACE)
            os.environ["GLOO_SOCKET_IFNAME"] = name
        if world.size > 1:
            hosts = [link.hosts[rank] for rank in link.workers]
            if world.rank == 0:
                listener = socket.create_server((_address(world, hosts), 0), backlog=world.size)
            place = listener.getsockname()[:2] if listener is not None else None
            met = _from_rank0(MPI, workers, place)
            os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = met[0], str(met[1])
            if world.nodes == 1:
                os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        return cls(world=world, link=link, listener=listener)

    def servers(self) -> str:
        """Who and where the servers are, in words; empty if there are none."""
        return ", ".join(f"{self.link.name(rank)} on {self.link.hosts[rank]}" for rank in self.link.servers)

    def leave(self, code: int, *, clean: bool) -> NoReturn:
        """End this process, and with `clean` False all others of the job."""
        from mpi4py import MPI

        if not clean:
            MPI.COMM_WORLD.Abort(code)
        from tenko.comm.dedicated_worker import goodbye

        goodbye(self.link, 60.0, last=True)
        MPI.Finalize()
        os._exit(code)


def check_servers(comm: CommConfig, mpi: Mpi | None) -> None:
    """Hold a recipe to the servers that were started.

    Raises:
        ValueError: it wants servers and there are none, or the other way round; says the command.
    """
    wanted, launcher = comm.servers == "dedicated", mpi.world.launcher if mpi is not None else None
    there = mpi is not None and bool(mpi.link.servers)
    if wanted and not there:
        started = f"{launcher} has started none" if launcher else "only mpirun or srun --mpi=pmix starts them"
        raise ValueError(f"comm.servers: dedicated needs parameter servers, and {started}: {COMMAND}")
    if there and not wanted:
        raise ValueError(
            f"comm.servers: is {comm.servers} (route {comm.route}), but {launcher} has started parameter servers "
            "(tenko.comm.dedicated); leave them out, or set comm.route=server comm.servers=dedicated"
        )


def wait_to_be_heard(*, echo: bool) -> None:
    """Called before a rank of an MPI job says why it fails: gives the cause, or rank 0, the first word.

    Whoever speaks ends all others: those that wait here say nothing then.

    Args:
        echo: the failure looks like the end of another rank.
    """
    rank = rank_of()
    if rank is None or (rank == 0 and not echo):
        return
    time.sleep(HEARD_SECONDS * (5 if echo else 1))


def _world(MPI: Any, workers: Any, launcher: Launcher) -> World:
    rank, size = workers.Get_rank(), workers.Get_size()
    node = workers.Split_type(MPI.COMM_TYPE_SHARED, key=rank)
    first = bytearray(8)
    if node.Get_rank() == 0:
        first[:] = rank.to_bytes(8, sys.byteorder)
    node.Bcast([first, MPI.BYTE], root=0)
    firsts = bytearray(8 * size)
    workers.Allgather([first, MPI.BYTE], [firsts, MPI.BYTE])
    numbers = [int.from_bytes(firsts[at : at + 8], sys.byteorder) for at in range(0, len(firsts), 8)]
    nodes = sorted(set(numbers))
    return World(
        launcher=launcher,
        rank=rank,
        size=size,
        local_rank=node.Get_rank(),
        local_size=node.Get_size(),
        node=nodes.index(numbers[rank]),
        nodes=len(nodes),
    )


def _address(world: World, hosts: list[str]) -> str:
    """Where rank 0 listens: at the interface that was named, else where the others' hosts reach this one."""
    if name := os.environ.get("GLOO_SOCKET_IFNAME"):
        return address_of(name, "GLOO_SOCKET_IFNAME")
    if world.nodes == 1:
        return "127.0.0.1"
    other = next((host for host in hosts if host != hosts[0]), hosts[0])
    try:
        return interface_to(other)[1]
    except ValueError as error:
        raise ValueError(f"{error}; name the interface, on all of them: {INTERFACE}=eth0 (mpirun -x)") from None


def _from_rank0(MPI: Any, workers: Any, value: Any) -> Any:
    """Rank 0's JSON-serializable value, on every worker."""
    buffer = bytearray(json.dumps(value).encode().ljust(512)) if workers.Get_rank() == 0 else bytearray(512)
    workers.Bcast([buffer, MPI.BYTE], root=0)
    return json.loads(buffer)
