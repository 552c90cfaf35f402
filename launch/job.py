"""This process among the others of its run: how they find one another, what they must agree on, how they end together.

Ranks meet at a TCPStore: that of torchrun's agent, or one that rank 0 opens. Everything goes under a prefix of this
start (session.py). This is the cure for torch's own `env://`, where after a restart on gloo a rank may connect to an
address that a dead one left in the store, and wait for ever.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import pulse
from .errors import one_line
from .notice import Notice
from .pulse import Pulse
from .recipe import Recipe, to_dict
from .rundir import first_difference
from .session import share
from .world import World, interface_to

if TYPE_CHECKING:
    from torch.distributed import Store

    from .mpi_env import Mpi

logger = logging.getLogger(__name__)

JOIN_SECONDS = 300.0
"""How long the ranks that are there wait for the others at the start, unless TENKO_JOIN_SECONDS says otherwise."""
PATIENCE = timedelta(hours=6)
"""How long ranks wait for rank 0 while it prepares a corpus or translates a test set."""


@dataclass
class Job:
    """One process of a run. Alone by default."""

    world: World = field(default_factory=World)
    """Who it is."""
    store: Store | None = None
    """Keys and values shared by the ranks of this launch and restart; None alone."""
    notice: Notice = field(default_factory=Notice)
    """Whether to stop."""
    pulse: Pulse = field(default_factory=Pulse)
    """Its sign of life."""
    mpi: Mpi | None = None
    """Under mpirun: its place in the MPI job, and the way to parameter servers."""

    @classmethod
    def join(
        cls,
        world: World,
        log_dir: Path | None = None,
        *,
        mpi: Mpi | None = None,
        listen: bool = False,
        ends_at_once: int | None = None,
    ) -> Job:
        """Meet the other ranks.

        Args:
            world: who this is; MASTER_ADDR and MASTER_PORT say where the others are.
            log_dir: folder for the rank's pulse.
            mpi: under mpirun.
            listen: whether to take the signals of a notice; from before the store begins threads of its own, one of
                which would get them, and end the process.
            ends_at_once: as of `Notice.listen`.

        Raises:
            ValueError: they are not all there in time, or there is no way to them; one line.
        """
        world.export()
        beats = Pulse(None if log_dir is None else pulse.path_of(log_dir, world.rank), rank=world.rank, node=world.node)
        notice = Notice()
        if listen:
            notice.listen(training=lambda: beats.training, ends_at_once=ends_at_once)
        if world.size == 1:
            return cls(world=world, notice=notice, pulse=beats, mpi=mpi)
        host, port = _master()
        if "GLOO_SOCKET_IFNAME" not in os.environ:
            # gloo's own guess is the host name's address, which Debian makes 127.0.1.1.
            os.environ["GLOO_SOCKET_IFNAME"] = interface_to(host)[0]
        notice.store = store = _open_store(world, host, port, None if mpi is None else mpi.listener)
        return cls(world=world, store=store, notice=notice, pulse=beats, mpi=mpi)

    def init_group(self) -> None:
        """Make torch's process group of all ranks; does nothing alone, or when there is one.

        Raises:
            RuntimeError: another rank is gone.
        """
        if self.store is None:
            return
        import torch
        import torch.distributed as dist

        if dist.is_initialized():
            return
        backend = "gloo"
        if torch.cuda.is_available():
            torch.cuda.set_device(self.world.local_rank % torch.cuda.device_count())
            backend = "nccl"
        dist.init_process_group(
            backend,
            store=dist.PrefixStore("group", self.store),
            rank=self.world.rank,
            world_size=self.world.size,
            timeout=PATIENCE,
        )

    def from_rank0(self, key: str, value: Any) -> Any:
        """Rank 0's JSON-serializable `value`, on every rank; a key is used once."""
        if self.store is None:
            return value
        if self.world.rank == 0:
            self.store.set(key, json.dumps(value))
            return value
        return json.loads(self.store.get(key))

    def check_agreement(self, recipe: Recipe) -> None:
        """Hold every rank's recipe and program to rank 0's.

        Raises:
            ValueError: the same line on all ranks: which rank on which host differs, in what.
        """
        if self.store is None:
            return
        mine = {"host": socket.gethostname(), "recipe": to_dict(recipe), "versions": versions()}
        self.store.set(f"agree/{self.world.rank}", json.dumps(mine))
        verdict = ""
        if self.world.rank == 0:
            for rank in range(1, self.world.size):
                other = json.loads(self.store.get(f"agree/{rank}"))
                if difference := _difference(mine, other):
                    verdict = f"rank {rank} ({other['host']}) {difference}"
                    break
        if verdict := self.from_rank0("agree", verdict):
            raise ValueError(verdict)

    def describe(self) -> str:
        """What rank 0 logs once: the world, its devices, back end and network interface; called on every rank."""
        if self.store is None:
            return ""
        import torch

        device = "cpu"
        if torch.cuda.is_available():
            device = f"cuda:{self.world.local_rank} ({torch.cuda.get_device_name(self.world.local_rank)})"
        name = os.environ.get("GLOO_SOCKET_IFNAME", "")
        self.store.set(f"place/{self.world.rank}", json.dumps([socket.gethostname(), device]))
        if self.world.rank:
            return ""
        places = [json.loads(self.store.get(f"place/{rank}")) for rank in range(self.world.size)]
        back_end = "nccl" if device.startswith("cuda") else "gloo"
        ranks = ", ".join(f"{rank} {host} {where}" for rank, (host, where) in enumerate(places))
        servers = f"; parameter servers: {there}" if self.mpi is not None and (there := self.mpi.servers()) else ""
        return f"{self.world}; {back_end} over {name}, met at {':'.join(map(str, _master()))}; ranks: {ranks}{servers}"


def _master() -> tuple[str, int]:
    host, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    if not host or not port.isdigit():
        raise ValueError("MASTER_ADDR and MASTER_PORT: must say where rank 0 listens; torchrun sets them")
    return host, int(port)


def _open_store(world: World, host: str, port: int, listener: socket.socket | None = None) -> Store:
    from torch.distributed import TCPStore

    seconds = float(os.environ.get("TENKO_JOIN_SECONDS", JOIN_SECONDS))
    settings: dict[str, Any] = {"timeout": timedelta(seconds=seconds), "wait_for_workers": False}
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" and world.rank == 0:
        # Given a port alone, the store would listen on every address of the machine.
        listener = listener or socket.create_server((host, port), backlog=world.size)
        settings |= {"is_master": True, "master_listen_fd": listener.detach()}
    try:
        tcp = TCPStore(host, port, **settings)
        store = share(tcp, rank=world.rank, size=world.size, seconds=seconds)
    except Exception as error:  # torch's DistStoreError and friends are RuntimeErrors of several names
        raise ValueError(
            f"{host}:{port}: not all {world.size} ranks met there within {seconds:g} s ({one_line(error)[:120]})"
        ) from error
    store.set_timeout(PATIENCE)
    return store


def versions() -> dict[str, str]:
    """What must be the same on all ranks: tenko's code, Python, torch and fairseq."""
    from importlib.metadata import PackageNotFoundError, version

    found = {"tenko": code_digest(), "python": ".".join(map(str, sys.version_info[:2]))}
    for name in ("torch", "ve-fairseq"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "none"
    return found


def other_program(first: Mapping[str, str], other: Mapping[str, str], where: str) -> str:
    """How `other` versions differ from the `first` ones, which are those of `where`; empty if they are the same."""
    for name, version in first.items():
        if other.get(name) != version:
            return f"runs {name} {other.get(name)}, {where} {version}; install the same"
    return ""


def code_digest() -> str:
    """The first 12 digits of SHA-256 over tenko's Python files."""
    import tenko.comm
    import tenko.compression
    import tenko.nmt

    digest = hashlib.sha256()
    folders = [Path(package.__path__[0]) for package in (tenko.comm, tenko.compression, tenko.nmt)]
    for folder in [*folders, Path(__file__).parent]:
        for path in sorted(folder.glob("*.py")):
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def _difference(mine: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    found = first_difference(mine["recipe"], other["recipe"])
    if found is not None:
        return f"was started with {found[0]}: {found[2]}, rank 0 ({mine['host']}) with {found[1]}; give all the same"
    return other_program(mine["versions"], other["versions"], f"rank 0 ({mine['host']})")
