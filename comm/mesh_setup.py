"""A TCP connection from each rank of a group to every other, for `mesh.py`.

The listener is bound to one address, the one that reaches the master (`MASTER_ADDR`), so loopback for a job on one
machine; `TENKO_ADDRESS` or GLOO_SOCKET_IFNAME's interface decide otherwise. It takes only peers that know a token,
drawn by rank 0 and handed out through the process group, and is closed as soon as all peers are there.
"""

from __future__ import annotations

import json
import secrets
import socket
import struct
import time
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from .address import own_address

_HELLO = struct.Struct("<16sI")  # token, rank
_CONNECT_SECONDS = 60.0
_UNSENT = 256 << 10  # bytes that may wait in a socket: short queues, which matters under BBR and at 10 Gbit/s


@dataclass(frozen=True)
class _Card:
    """What a rank tells the others, through the process group."""

    host: str
    port: int
    token: str
    """32 hexadecimal digits; rank 0's is the group's."""

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


def connect(group: dist.ProcessGroup | None) -> tuple[dict[int, socket.socket], dict[int, str]]:
    """Connects this rank to all others; called on all ranks of the group together.

    Returns:
        The sockets by rank, blocking, and every rank's "host:port".

    Raises:
        ConnectionError: a peer could not be reached, or did not come within a minute.
        ValueError: an address or an interface that this machine does not have.
    """
    rank, world_size = dist.get_rank(group), dist.get_world_size(group)
    address, family = own_address()
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.bind((address, 0))
        listener.listen(world_size)
        cards = _exchanged(_Card(address, listener.getsockname()[1], secrets.token_hex(16)), group)
        token = bytes.fromhex(cards[0].token)
        sockets: dict[int, socket.socket] = {}
        try:
            for peer in range(rank):
                sockets[peer] = _call(rank, peer, cards[peer], token)
            _accept(listener, rank, cards, token, sockets)
        except BaseException:
            for sock in sockets.values():
                sock.close()
            raise
    return sockets, {peer: str(card) for peer, card in enumerate(cards)}


def tune(sock: socket.socket, cut_off_seconds: float) -> None:
    """No waiting for small messages; a peer cut off from the network is found within about a minute.

    Args:
        sock: made non-blocking.
        cut_off_seconds: how long bytes may stay unacknowledged.
    """
    sock.settimeout(None)
    sock.setblocking(False)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    options = (
        ("TCP_NOTSENT_LOWAT", _UNSENT),
        ("TCP_KEEPIDLE", 15),
        ("TCP_KEEPINTVL", 5),
        ("TCP_KEEPCNT", 6),
        ("TCP_USER_TIMEOUT", round(cut_off_seconds * 1000)),
    )
    for option, value in options:
        if hasattr(socket, option):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)


def _call(rank: int, peer: int, card: _Card, token: bytes) -> socket.socket:
    try:
        sock = socket.create_connection((card.host, card.port), timeout=_CONNECT_SECONDS)
        sock.sendall(_HELLO.pack(token, rank))
        return sock
    except OSError as error:
        raise ConnectionError(
            f"rank {peer} ({card}) cannot be reached from rank {rank}: {error}; set TENKO_ADDRESS on each machine to "
            "the address that the others reach"
        ) from None


def _accept(
    listener: socket.socket, rank: int, cards: list[_Card], token: bytes, sockets: dict[int, socket.socket]
) -> None:
    """Fills in the sockets of the ranks after this one."""
    deadline = time.monotonic() + _CONNECT_SECONDS
    while missing := [peer for peer in range(rank + 1, len(cards)) if peer not in sockets]:
        listener.settimeout(max(deadline - time.monotonic(), 0.01))
        try:
            sock, _ = listener.accept()
            sock.settimeout(5.0)
            hello = sock.recv(_HELLO.size, socket.MSG_WAITALL)
        except TimeoutError:
            if time.monotonic() >= deadline:
                names = ", ".join(f"rank {peer} ({cards[peer]})" for peer in missing)
                raise ConnectionError(
                    f"{names} did not connect within {_CONNECT_SECONDS:g} s to rank {rank}; set TENKO_ADDRESS on each "
                    "machine to the address that the others reach"
                ) from None
            continue
        except OSError:
            continue
        if len(hello) == _HELLO.size:
            known, peer = _HELLO.unpack(hello)
            if secrets.compare_digest(known, token) and peer in missing:
                sockets[peer] = sock
                continue
        sock.close()  # not one of ours


def _exchanged(mine: _Card, group: dist.ProcessGroup | None, room: int = 256) -> list[_Card]:
    """Every rank's card, by rank."""
    text = json.dumps(vars(mine)).encode()
    assert len(text) <= room, text
    own = torch.from_numpy(np.frombuffer(text.ljust(room), dtype=np.uint8).copy())
    everybody = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(everybody, own, group=group)
    return [_Card(**json.loads(bytes(other.tolist()))) for other in everybody]
