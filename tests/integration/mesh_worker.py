"""One rank of the mesh's tests: `torchrun mesh_worker.py SCENARIO`; fails if it does not hold."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
import time

import pytest
import torch
import torch.distributed as dist

from tenko.comm import mesh as mesh_module
from tenko.comm import mesh_setup
from tenko.comm.mesh import Mesh

RANK = int(os.environ["RANK"])
OTHERS = [rank for rank in range(int(os.environ["WORLD_SIZE"])) if rank != RANK]


def bytes_of(sender: int, receiver: int, size: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(100 * sender + receiver)
    return torch.randint(0, 256, (size,), generator=generator, dtype=torch.uint8)


def size_of(sender: int, receiver: int, tag: int) -> int:
    if tag == 3:
        return 0  # a message may be empty
    return (1 + sender + 3 * receiver) * (tag * tag * 1000 + 1) + (3_000_000 if tag == 5 else 0)


def delivers(mesh: Mesh) -> None:
    """Many messages of many sizes in flight, taken in another order than sent, known lengths and unknown."""
    handles = []
    for tag in range(12):
        outgoing = {peer: bytes_of(RANK, peer, size_of(RANK, peer, tag)) for peer in OTHERS}
        handles.append(mesh.start(2 * tag, outgoing, {}))
    for tag in reversed(range(12)):
        sizes = {peer: size_of(peer, RANK, tag) for peer in OTHERS}
        known = tag % 2 == 0
        incoming = {peer: torch.empty(size, dtype=torch.uint8) if known else None for peer, size in sizes.items()}
        handles.append(mesh.start(2 * tag, {}, incoming))
    for handle, tag in zip(handles[12:], reversed(range(12)), strict=True):
        handle.wait()
        for peer in OTHERS:
            assert torch.equal(handle.received[peer], bytes_of(peer, RANK, size_of(peer, RANK, tag))), (tag, peer)
    for handle in handles:
        handle.wait()
    called: list[int] = []
    handles[0].then(lambda: called.append(1))
    assert called == [1], "at once, when it is done"


def names_the_dead(mesh: Mesh) -> None:
    """A rank that is killed is named, with its address, at once, on all the others."""
    if RANK == 1:
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGKILL)
    # torchrun ends the others soon after the first has died, on a busy machine before they have said a word.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    began = time.monotonic()
    handle = mesh.start(1, {}, {1: torch.empty(10, dtype=torch.uint8)})
    with pytest.raises(ConnectionError, match=r"rank 1 \(127\.0\.0\.1:\d+\) is gone"):
        handle.wait()
    assert time.monotonic() - began < 5
    with pytest.raises(ConnectionError, match="rank 1"):
        mesh.start(2, {}, {1: None})
    os.write(1, f"held on rank {RANK}\n".encode())  # one call: print writes the end of the line apart
    os._exit(0)


def names_the_late(mesh: Mesh) -> None:
    """A rank that is alive and sends nothing is named after the timeout."""
    mesh.timeout = 1.0
    if RANK != 1:
        handle = mesh.start(1, {}, {1: torch.empty(10, dtype=torch.uint8)})
        with pytest.raises(ConnectionError, match=r"waited 1 s for rank 1 \(127"):
            handle.wait()
    dist.barrier()


def refuses_other_sizes(mesh: Mesh) -> None:
    """Ranks whose models differ are told so at once, instead of reading each other's bytes wrongly."""
    size = 10 + RANK
    told = threading.Event()
    handle = mesh.start(1, {}, {peer: torch.empty(size, dtype=torch.uint8) for peer in OTHERS})
    handle.then(told.set)
    dist.barrier()
    with contextlib.suppress(ConnectionError):  # another rank's message may have told already
        mesh.start(1, {peer: torch.zeros(size, dtype=torch.uint8) for peer in OTHERS}, {})
    assert told.wait(10), "those who wait by `then`, as the exchanger does, are told as well"
    with pytest.raises(ConnectionError, match=f"expected {size}: do all ranks have the same model|is gone"):
        handle.wait()
    mesh.close()  # as a rank that ends does: one that was not sent to is told by that
    dist.barrier()


def forgives_who_has_ended(mesh: Mesh) -> None:
    """A rank that has sent its last message, an empty one, and gone is missed only by who wants more of it."""
    if RANK == 1:
        mesh.start(9, {0: torch.empty(0, dtype=torch.uint8)}, {}).wait()
        mesh.close()
        with pytest.raises(ConnectionError, match="closed"):
            mesh.start(10, {}, {0: None})
    dist.barrier()
    if RANK == 0:
        time.sleep(0.2)  # by now it has hung up; the message waits for its place
        handle = mesh.start(9, {}, {1: None})
        handle.wait()
        assert handle.received[1].numel() == 0
        time.sleep(0.2)
        for peer in OTHERS[1:]:
            mesh.start(12, {peer: torch.ones(5, dtype=torch.uint8)}, {}).wait()
        with pytest.raises(ConnectionError, match=r"rank 1 \(127\.0\.0\.1:\d+\) is gone"):
            mesh.start(11, {}, {1: None}).wait()
    elif RANK > 1:
        handle = mesh.start(12, {}, {0: torch.empty(5, dtype=torch.uint8)})
        handle.wait()
        assert handle.received[0].tolist() == [1] * 5, "the others go on without it"
    dist.barrier()


def takes_what_comes_early(_: Mesh) -> None:
    """A rank that asks late is not cut off, and what lies before a message does not keep it; one tag, two turns."""
    mesh_module._CUT_OFF_SECONDS = 1.0
    mesh = Mesh(None, timeout=30.0)
    mesh_module._CUT_OFF_SECONDS = 45.0
    size = 100 << 20  # more than the kernel keeps
    peer = RANK ^ 1
    sent = [mesh.start(tag, {peer: bytes_of(RANK, peer, n)}, {}) for tag, n in ((1, size), (2, 10), (3, 7), (3, 9))]
    time.sleep(3.0)
    for tag, n in ((2, 10), (3, 7), (3, 9), (1, size)):
        handle = mesh.start(tag, {}, {peer: torch.empty(n, dtype=torch.uint8) if tag != 3 else None})
        handle.wait()
        assert torch.equal(handle.received[peer], bytes_of(peer, RANK, n)), (tag, n)
    for handle in sent:
        handle.wait()
    early = mesh.start(4, {peer: torch.zeros(3, dtype=torch.uint8)}, {})
    early.wait()
    time.sleep(0.2)  # by now it has come
    with pytest.raises(
        ConnectionError, match=r"sent 3 bytes where rank \d expected 4: do all ranks have the same model"
    ):
        mesh.start(4, {}, {peer: torch.empty(4, dtype=torch.uint8)}).wait()
    dist.barrier()
    mesh.close()


def turns_strangers_away(_: Mesh) -> None:
    """A connection without the token is closed, and the ranks still find each other."""
    call = mesh_setup._call

    def knock(rank: int, peer: int, card: mesh_setup._Card, token: bytes) -> socket.socket:
        with socket.create_connection((card.host, card.port)) as stranger:
            stranger.sendall(b"\0" * 20)
            assert stranger.recv(1) == b"", "closed"
        return call(rank, peer, card, token)

    mesh_setup._call = knock
    again = Mesh(None)
    mesh_setup._call = call
    delivers(again)
    again.close()


SCENARIOS = {
    f.__name__: f
    for f in (
        delivers,
        names_the_dead,
        names_the_late,
        refuses_other_sizes,
        forgives_who_has_ended,
        takes_what_comes_early,
        turns_strangers_away,
    )
}

if __name__ == "__main__":
    dist.init_process_group("gloo")
    for name in sys.argv[1:]:
        link = Mesh(None)
        SCENARIOS[name](link)
        dist.barrier()
        link.close()
        if RANK == 0:
            print(f"holds: {name}", flush=True)
    dist.destroy_process_group()
