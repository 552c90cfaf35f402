"""Messages between workers and servers over MPI: buffers of bytes, nothing pickled, no wait without an end.

Notable:
- A message is 64 bytes of header and a body. Its receiver probes for it, so that it need not know the size beforehand.
- MPI's blocking calls cannot be given up. So every wait here is a loop over tests, which notices a peer that has been
  silent for too long, and sleeps a little between tests: Open MPI's own waits spin, a core for each rank.
- Whoever answers late says so: it sends WAIT now and then. Silence means that the process hangs.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from types import TracebackType

HEADER = 64
_LAYOUT = struct.Struct("<4sHHQddQ")  # magic, kind, flags, update, lr, weight, bytes of the body
_MAGIC = b"tnk1"
_TAG = 7
LIMIT = 1 << 34
"""Larger bodies are refused."""
JOIN_TIMEOUT = 600.0
"""Seconds for all ranks to start, kernels compiled."""

HELLO, INIT, PUSH, PULL, SAVE, LOAD, BYE, WEIGHTS, DONE, FAILED, WAIT, NORM, FETCH, STATE, PUT = range(1, 16)
NAMES = (
    *("?", "hello", "init", "push", "pull", "save", "load", "bye"),
    *("weights", "done", "failed", "wait", "norm", "fetch", "state", "put"),
)
WORKER, SERVER = 1, 2
APPLIED, FINITE, LAST = 1, 1, 1
"""Flags: of WEIGHTS, the update was made; of PUSH, the gradient is finite; of BYE, no other training follows."""
_CARD = struct.Struct("<i252s")
"""What a rank tells all others at first: its role, its host's name."""


_ALONE = (
    f"{{}}: MPI_Init waited {JOIN_TIMEOUT:g} s for ranks of this job that have not joined MPI; "
    "workers of a recipe join with comm.servers: dedicated"
)


class Silence(RuntimeError):
    """A peer has not been heard of for too long."""


@dataclass
class Message:
    """A message that has arrived; its body is overwritten by the sender's next one."""

    kind: int
    flags: int
    update: int
    lr: float
    weight: float
    body: Tensor

    @property
    def text(self) -> str:
        return bytes(self.body.numpy()).decode("utf-8", "replace")


def packet(numel: int) -> Tensor:
    """A buffer for a header and a body of so many bytes."""
    return torch.empty(HEADER + numel, dtype=torch.uint8)


def sealed(
    buffer: Tensor, kind: int, *, flags: int = 0, update: int = 0, lr: float = 0.0, weight: float = 0.0
) -> Tensor:
    """Writes the header of a buffer, whose body is the rest, and returns the buffer."""
    head = _LAYOUT.pack(_MAGIC, kind, flags, update, lr, weight, buffer.numel() - HEADER)
    buffer[:HEADER] = torch.from_numpy(np.frombuffer(head.ljust(HEADER, b"\0"), dtype=np.uint8).copy())
    return buffer


def note(kind: int, text: str | bytes = "", **figures: Any) -> Tensor:
    """A message with a body of text, or of other bytes."""
    data = np.frombuffer(text.encode() if isinstance(text, str) else text, dtype=np.uint8)
    buffer = packet(len(data))
    buffer[HEADER:] = torch.from_numpy(data.copy())
    return sealed(buffer, kind, **figures)


Taker = Callable[[int, Message], bool]


class Link:
    """This rank's messages. `join` makes one.

    Args:
        comm: a communicator of its own, nobody else's messages in it.
        roles: WORKER or SERVER of every rank.
        hosts: the name of every rank's host.
    """

    def __init__(self, comm: Any, roles: Sequence[int], hosts: Sequence[str]) -> None:
        from mpi4py import MPI

        self._mpi, self._comm, self.hosts = MPI, comm, list(hosts)
        self.rank: int = comm.Get_rank()
        self.workers = [rank for rank, role in enumerate(roles) if role == WORKER]
        self.servers = [rank for rank, role in enumerate(roles) if role == SERVER]
        self._inbox: dict[int, Tensor] = {}
        self._arriving: dict[int, tuple[Any, int]] = {}
        self._leaving: list[tuple[Any, Tensor]] = []
        self._idle = 0

    def name(self, rank: int) -> str:
        """Who a rank is, as people count: "server 1 of 2 (rank 5)"."""
        kind, ranks = ("server", self.servers) if rank in self.servers else ("worker", self.workers)
        return f"{kind} {ranks.index(rank)} of {len(ranks)} (rank {rank})"

    def send(self, peer: int, buffer: Tensor) -> None:
        """Starts sending; the buffer must not change until the peer has answered."""
        self._leaving.append((self._comm.Isend([buffer.numpy(), buffer.numel(), self._mpi.BYTE], peer, _TAG), buffer))

    def poll(self, peer: int) -> Message | None:
        """A whole message of a peer, if one is there."""
        if peer not in self._arriving:
            status = self._mpi.Status()
            found = self._comm.Improbe(source=peer, tag=_TAG, status=status)
            if found is None:
                return None
            size = status.Get_count(self._mpi.BYTE)
            if not HEADER <= size <= LIMIT:
                raise RuntimeError(f"{self.name(peer)} sent {size} bytes, which is no message")
            if peer not in self._inbox or self._inbox[peer].numel() < size:
                self._inbox[peer] = torch.empty(size, dtype=torch.uint8)
            self._arriving[peer] = found.Irecv([self._inbox[peer].numpy(), size, self._mpi.BYTE]), size
        request, size = self._arriving[peer]
        if not request.Test():
            return None
        del self._arriving[peer]
        buffer = self._inbox[peer][:size]
        magic, kind, flags, update, lr, weight, body = _LAYOUT.unpack_from(bytes(buffer[:HEADER].numpy()))
        if magic != _MAGIC or body != size - HEADER or not 0 < kind < len(NAMES):
            raise RuntimeError(f"{self.name(peer)} sent what is no message of this version")
        self._idle = 0
        return Message(kind, flags, update, lr, weight, buffer[HEADER:])

    def receiving(self, peer: int) -> int:
        """Bytes of a message of a peer that is arriving; 0 if none is."""
        return self._arriving[peer][1] if peer in self._arriving else 0

    def rest(self) -> None:
        """Between tests: forget what has left, sleep a moment."""
        self._leaving = [item for item in self._leaving if not item[0].Test()]
        self._idle += 1
        if self._arriving or self._leaving:
            time.sleep(2e-5)
        elif self._idle > 20:
            time.sleep(2e-4 if self._idle < 2000 else 2e-3)

    def wait(
        self,
        peers: Iterable[int],
        take: Taker,
        timeout: float,
        idle: Callable[[], None] | None = None,
    ) -> None:
        """Until `take` has been true of a message of every peer.

        Args:
            peers: ranks.
            take: handles a message; whether it was the one waited for.
            timeout: seconds of silence.
            idle: called again and again meanwhile.

        Raises:
            Silence: a peer said nothing for so long; the message names all such.
        """
        now = time.monotonic()
        heard = dict.fromkeys(peers, now)
        while heard:
            for peer in list(heard):
                message = self.poll(peer)
                if message is not None:
                    heard[peer] = time.monotonic()
                    if message.kind != WAIT and take(peer, message):
                        del heard[peer]
            now = time.monotonic()
            # What is arriving may take its time: 1 MB/s.
            silent = [p for p, since in heard.items() if now - since > timeout + self.receiving(p) / 1e6]
            if silent:
                raise Silence(
                    f"{', '.join(map(self.name, silent))} said nothing for {timeout:g} s; it is dead or hangs"
                )
            if idle is not None:
                idle()
            self.rest()

    def flush(self, timeout: float) -> None:
        """Until all that was sent has left."""
        limit = time.monotonic() + timeout
        while self._leaving and time.monotonic() < limit:
            self.rest()

    def abort(self, code: int) -> None:
        """Ends the whole job, the other ranks too."""
        sys.stdout.flush()
        sys.stderr.flush()
        self._comm.Abort(code)


def meet(role: int, comm: Any = None) -> Link:
    """Meets all ranks of the job, and learns who is what, and where. Nobody need be a server.

    Args:
        role: WORKER or SERVER.
        comm: an mpi4py communicator; default COMM_WORLD.

    Raises:
        ValueError: there is no mpi4py.
        Silence: not all ranks came.
    """
    try:
        with ended_unless_done(JOIN_TIMEOUT, _ALONE.format("server" if role == SERVER else "worker")):
            from mpi4py import MPI
    except ImportError as error:
        raise ValueError(f"comm: dedicated servers need mpi4py and an MPI (pip install tenko[mpi]): {error}") from None
    comm = MPI.COMM_WORLD if comm is None else comm
    limit = time.monotonic() + JOIN_TIMEOUT
    cards = np.zeros((comm.Get_size(), _CARD.size), dtype=np.uint8)
    mine = np.frombuffer(_CARD.pack(role, socket.gethostname().encode()[:252]), dtype=np.uint8).copy()

    def finish(request: Any) -> None:
        while not request.Test():
            if time.monotonic() > limit:
                raise Silence(f"not all {len(cards)} ranks were there within {JOIN_TIMEOUT:g} s")
            time.sleep(1e-3)

    finish(comm.Iallgather([mine, MPI.BYTE], [cards, MPI.BYTE]))
    own, request = comm.Idup()
    finish(request)
    told = [_CARD.unpack(card.tobytes()) for card in cards]
    return Link(own, [role for role, _ in told], [host.rstrip(b"\0").decode("utf-8", "replace") for _, host in told])


def join(role: int, comm: Any = None) -> Link:
    """`meet`, for a job that must have servers.

    Args:
        role: WORKER or SERVER.
        comm: an mpi4py communicator; default COMM_WORLD.

    Raises:
        ValueError: there is no mpi4py, or no server or no worker among the ranks.
        Silence: not all ranks came.
    """
    link = meet(role, comm)
    if not link.servers or not link.workers:
        raise ValueError(
            f"comm: {len(link.workers)} workers and {len(link.servers)} servers; start both: "
            "mpirun -n W python worker.py : -n S python -m tenko.comm.dedicated"
        )
    return link


def end_with_parent() -> None:
    """From now on this process ends when MPI's daemon, which has started it, is gone.

    A daemon that is cut off from mpirun may leave without ending its ranks. (The kernel's PR_SET_PDEATHSIG would take
    the end of the daemon's thread that has started this process for the daemon's.)
    """
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True, name="tenko parent").start()


_WATCH = """
import os, select, sys
seconds, program, text = float(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
if not select.select([0], [], [], seconds)[0]:
    print(text, file=sys.stderr, flush=True)
    os.kill(program, 9)
"""


@contextlib.contextmanager
def ended_unless_done(seconds: float, text: str) -> Iterator[None]:
    """Kill this process, with a line on stderr, if the block takes longer.

    For MPI_Init, which under `srun --mpi=pmix` waits for all processes of the step, those too that never call it. It
    keeps the interpreter's lock meanwhile, so that no thread and no signal handler could do this: a process does.
    """
    command = [sys.executable, "-S", "-c", _WATCH, str(seconds), str(os.getpid()), text]
    # Leaving closes stdin, which ends it; Ctrl-C is not for it.
    with subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True):
        yield


def abort_on_exceptions(comm: Any = None) -> Callable[[], None]:
    """From now on an exception that nobody catches ends the whole job; returns what undoes this.

    Without it the rank would wait in MPI_Finalize for the others, and they for it.
    """
    before = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, where: TracebackType | None) -> None:
        before(kind, error, where)
        if "mpi4py.MPI" in sys.modules:
            from mpi4py import MPI

            sys.stdout.flush()
            sys.stderr.flush()
            (MPI.COMM_WORLD if comm is None else comm).Abort(1)

    sys.excepthook = hook

    def undo() -> None:
        if sys.excepthook is hook:
            sys.excepthook = before

    return undo
