"""Plain TCP sockets between all ranks of a group, both directions busy at once: the link on CPUs.

gloo's exchanges often run half-duplex (docs/results/gloo_duplex.md), which alone doubles the time of an exchange. Here
one thread a rank waits on all sockets and moves whatever can be moved, in and out, beside the threads that compute.
Nothing that comes in is interpreted beyond a header of two integers. What comes before anybody asked for it is kept: if
it stayed in the socket, a message behind it that somebody waits for would never arrive, and the kernel would take a
rank that is a minute late for one that is cut off.

How the connections come about is in `mesh_setup.py`.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from .mesh_setup import connect, tune

_HEADER = struct.Struct("<QQ")  # tag, bytes
_TURN = 1 << 20  # bytes moved for one peer before the next one has its turn
_EARLY = 1 << 30  # bytes of one peer that are kept before they are asked for; beyond it waits as long as need be
_CUT_OFF_SECONDS = 45.0  # that bytes may stay unacknowledged, which a peer's thread takes in whatever else it does


class MeshHandle:
    """See `link.Handle`."""

    def __init__(self, mesh: Mesh, received: dict[int, Tensor]) -> None:
        self._mesh, self.received = mesh, received
        self._left = 0
        self._calls: list[Callable[[], None]] = []
        self.pending: set[int] = set()
        """Peers that something is still expected of."""

    def wait(self) -> None:
        deadline = time.monotonic() + self._mesh.timeout
        with self._mesh.changed:
            while self._left and self._mesh.failure is None:
                if not self._mesh.changed.wait(max(deadline - time.monotonic(), 0)) and time.monotonic() >= deadline:
                    raise ConnectionError(self.overdue())
        self.check()

    def overdue(self) -> str:
        """Who is late, for an error."""
        late = ", ".join(self._mesh.name(peer) for peer in sorted(self.pending)) or "its own sends"
        return f"exchange between ranks: waited {self._mesh.timeout:g} s for {late}"

    def then(self, call: Callable[[], None]) -> None:
        with self._mesh.changed:
            if self._left and self._mesh.failure is None:
                self._calls.append(call)
                return
        call()

    def check(self) -> None:
        if self._left and self._mesh.failure is not None:
            raise ConnectionError(self._mesh.failure)


class _Peer:
    """One connection: what goes out, what is expected, what is coming in. Owned by the mesh's thread once it runs."""

    def __init__(self, rank: int, sock: socket.socket) -> None:
        self.rank, self.sock = rank, sock
        self.outgoing: deque[tuple[list[memoryview], MeshHandle]] = deque()
        self.expected: dict[int, tuple[memoryview | None, MeshHandle]] = {}
        self.header = bytearray(_HEADER.size)
        self.target: memoryview | None = memoryview(self.header)
        self.handle: MeshHandle | None = None
        """Of the message whose body is coming in; None while a header or an early body is."""
        self.spare: Tensor | None = None
        """Where an early body is coming in."""
        self.early: dict[int, Tensor] = {}
        """Whole messages by tag that nobody has asked for yet."""
        self.events = select.EPOLLIN
        self.closed = False


_Match = tuple[Tensor, memoryview | None, MeshHandle]
"""A message that came early, the place where it is wanted (None: itself), and the handle that waits for it."""


class Mesh:
    """Connections from this rank to all others of a group.

    Args:
        group: a gloo group of CPU ranks, over which addresses are told; called on all of its ranks together.
        timeout: seconds to wait for a peer before giving it up.

    Raises:
        ConnectionError: a peer could not be reached.
    """

    def __init__(self, group: dist.ProcessGroup | None, timeout: float = 1800.0) -> None:
        self.rank, self.world_size, self.timeout = dist.get_rank(group), dist.get_world_size(group), timeout
        self.changed = threading.Condition()
        self.failure: str | None = None
        sockets, self._names = connect(group)
        for sock in sockets.values():
            tune(sock, _CUT_OFF_SECONDS)
        self._peers = {rank: _Peer(rank, sock) for rank, sock in sockets.items()}
        self._epoll = select.epoll()
        self._by_fd = {peer.sock.fileno(): peer for peer in self._peers.values()}
        for fd in self._by_fd:
            self._epoll.register(fd, select.EPOLLIN)
        self._wake_in, self._wake_out = os.pipe()
        os.set_blocking(self._wake_in, False)
        os.set_blocking(self._wake_out, False)
        self._epoll.register(self._wake_in, select.EPOLLIN)
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="tenko-mesh", daemon=True)
        self._thread.start()

    def name(self, peer: int) -> str:
        """How an error calls a peer."""
        return f"rank {peer} ({self._names[peer]})"

    def start(self, tag: int, outgoing: Mapping[int, Tensor], incoming: Mapping[int, Tensor | None]) -> MeshHandle:
        """See `link.Link`. Thread-safe; returns at once."""
        handle = MeshHandle(self, {peer: buffer for peer, buffer in incoming.items() if buffer is not None})
        with self.changed:
            if self.failure is not None:
                raise ConnectionError(self.failure)
            for peer in {*incoming, *outgoing}:
                if self._peers[peer].closed and (peer in outgoing or tag not in self._peers[peer].early):
                    self._fail(f"{self.name(peer)} is gone: it closed the connection")
                    raise ConnectionError(self.failure)
            came: list[tuple[_Peer, _Match | None]] = []
            handle._left = len(incoming) + len(outgoing)
            handle.pending = set(incoming)
            for peer, buffer in incoming.items():
                other = self._peers[peer]
                assert tag not in other.expected, (tag, peer)
                other.expected[tag] = (None if buffer is None else _bytes(buffer), handle)
                came.append((other, self._match(other, tag)))
            # Each rank begins with another peer: all sending to one at a time would queue up there.
            for peer in sorted(outgoing, key=lambda p: (p - self.rank) % self.world_size):
                body = _bytes(outgoing[peer])
                views = [memoryview(_HEADER.pack(tag, len(body))), body]
                self._peers[peer].outgoing.append((views, handle))
        self._wake()
        for other, match in came:
            self._hand_over(other, match)
        return handle

    def close(self) -> None:
        """Closes the connections, once what is queued has left (for 5 seconds at most)."""
        self._stopping = True
        self._wake()
        self._thread.join(5.0)

    # The thread that moves bytes

    def _wake(self) -> None:
        # Under the lock: the pipe's number must not have become another file's meanwhile.
        with self.changed, contextlib.suppress(BlockingIOError):  # full: it will wake anyhow
            if self._wake_out >= 0:
                os.write(self._wake_out, b"x")

    def _run(self) -> None:
        try:
            self._loop()
        except BaseException as error:  # nobody must wait for ever
            with self.changed:
                self._fail(f"the link of rank {self.rank} failed: {error}")
        finally:
            with self.changed:
                self._fail(f"the link of rank {self.rank} is closed")
                os.close(self._wake_out)
                self._wake_out = -1
            for peer in self._peers.values():
                peer.sock.close()
            self._epoll.close()
            os.close(self._wake_in)

    def _loop(self) -> None:
        stop_at = None
        while True:
            if self._stopping:
                stop_at = stop_at or time.monotonic() + 5.0
                if time.monotonic() > stop_at or not any(p.outgoing and not p.closed for p in self._peers.values()):
                    return
            with self.changed:
                for peer in self._peers.values():
                    self._watch(peer)
            for fd, events in self._epoll.poll(0.5 if self._stopping else -1):
                if fd == self._wake_in:
                    with contextlib.suppress(BlockingIOError):
                        os.read(fd, 4096)
                    continue
                peer = self._by_fd[fd]
                if peer.target is None and events & (select.EPOLLHUP | select.EPOLLERR):
                    time.sleep(0.001)  # it hung up after a message that has no place yet
                try:
                    if events & (select.EPOLLIN | select.EPOLLHUP | select.EPOLLERR):
                        self._receive(peer)
                    if events & select.EPOLLOUT and not peer.closed:
                        self._send(peer)
                except OSError as error:
                    self._gone(peer, str(error))

    def _watch(self, peer: _Peer) -> None:
        """Waits for room only while something goes out, and for bytes only while there is a place for them."""
        if peer.closed:
            return
        if peer.target is None:  # a body whose place was not known yet
            self._find_target(peer)
            if peer.target is not None and not len(peer.target):
                self._receive(peer)  # an empty body is complete, and no byte will come that says so
                if peer.closed:
                    return
        wanted = (select.EPOLLIN if peer.target is not None else 0) | (select.EPOLLOUT if peer.outgoing else 0)
        if wanted != peer.events:
            self._epoll.modify(peer.sock.fileno(), wanted)
            peer.events = wanted

    def _send(self, peer: _Peer) -> None:
        moved = 0
        while peer.outgoing and moved < _TURN:
            views, handle = peer.outgoing[0]
            try:
                count = peer.sock.sendmsg(views)
            except BlockingIOError:
                return
            moved += count
            while views and count >= len(views[0]):
                count -= len(views.pop(0))
            if views:
                views[0] = views[0][count:]
                return  # the socket is full
            with self.changed:
                peer.outgoing.popleft()
            self._progress(handle, None)

    def _receive(self, peer: _Peer) -> None:
        moved = 0
        while peer.target is not None and moved < _TURN:
            if len(peer.target):
                try:
                    count = peer.sock.recv_into(peer.target)
                except BlockingIOError:
                    return
                except OSError as error:
                    self._gone(peer, str(error))
                    return
                if count == 0:
                    self._gone(peer, "it closed the connection")
                    return
                moved += count
                peer.target = peer.target[count:]
                if len(peer.target):
                    continue
            if peer.spare is not None:
                tag, _ = _HEADER.unpack(peer.header)
                with self.changed:
                    peer.early[tag], peer.spare = peer.spare, None
                    match = self._match(peer, tag)
                peer.target = memoryview(peer.header)
                self._hand_over(peer, match)
            elif peer.handle is None:
                peer.target = None
                with self.changed:
                    self._find_target(peer)
            else:
                handle, peer.handle = peer.handle, None
                peer.target = memoryview(peer.header)
                self._progress(handle, peer.rank)

    def _find_target(self, peer: _Peer) -> None:
        """The header is complete: where does its body go? Called with the lock held."""
        tag, size = _HEADER.unpack(peer.header)
        if peer.handle is not None or tag in peer.early:
            return  # a message that did not fit ended the link; or one under the same tag has its turn first
        if tag not in peer.expected:
            if sum(body.numel() for body in peer.early.values()) + size <= _EARLY:
                peer.spare = torch.empty(size, dtype=torch.uint8)
                peer.target = _bytes(peer.spare)
            return
        view, handle = peer.expected.pop(tag)
        if view is None:
            buffer = torch.empty(size, dtype=torch.uint8)
            handle.received[peer.rank] = buffer
            view = _bytes(buffer)
        elif len(view) != size:
            peer.handle = handle  # still waiting, so that it is told
            self._fail(self._misfit(peer, size, len(view)))
            return
        peer.target, peer.handle = view, handle

    def _match(self, peer: _Peer, tag: int) -> _Match | None:
        """An early message and who expects it, if both are there. Called with the lock held."""
        if tag not in peer.early or tag not in peer.expected:
            return None
        body, (view, handle) = peer.early[tag], peer.expected[tag]
        if view is not None and len(view) != body.numel():
            self._fail(self._misfit(peer, body.numel(), len(view)))
            return None
        del peer.early[tag], peer.expected[tag]
        if view is None:
            handle.received[peer.rank] = body
        return body, view, handle

    def _hand_over(self, peer: _Peer, match: _Match | None) -> None:
        """Called without the lock: a copy of megabytes must not hold up the others."""
        if match is None:
            return
        body, view, handle = match
        if view:
            np.frombuffer(view, np.uint8)[:] = body.numpy()
        self._progress(handle, peer.rank)

    def _misfit(self, peer: _Peer, size: int, expected: int) -> str:
        return (
            f"{self.name(peer.rank)} sent {size} bytes where rank {self.rank} expected {expected}: do all ranks have "
            "the same model and the same settings of comm?"
        )

    def _progress(self, handle: MeshHandle, peer: int | None) -> None:
        calls: list[Callable[[], None]] = []
        with self.changed:
            handle._left -= 1
            handle.pending.discard(-1 if peer is None else peer)
            if not handle._left:
                calls, handle._calls = handle._calls, []
                self.changed.notify_all()
        for call in calls:
            call()

    def _gone(self, peer: _Peer, why: str) -> None:
        with self.changed:
            peer.closed = True
            self._epoll.unregister(peer.sock.fileno())
            # A peer that has ended is no failure as long as nobody needs it.
            if peer.expected or peer.outgoing or peer.handle is not None:
                self._fail(f"{self.name(peer.rank)} is gone: {why}")

    def _fail(self, why: str) -> None:
        """Called with the lock held."""
        if self.failure is None:
            self.failure = why
        waiting = {id(h): h for p in self._peers.values() for _, h in [*p.expected.values(), *p.outgoing]}
        waiting |= {id(p.handle): p.handle for p in self._peers.values() if p.handle is not None}
        calls = [call for handle in waiting.values() for call in handle._calls]
        for handle in waiting.values():
            handle._calls = []
        self.changed.notify_all()
        for call in calls:
            call()


def _bytes(buffer: Tensor) -> memoryview:
    assert buffer.dtype == torch.uint8, buffer.dtype
    assert buffer.is_contiguous()
    return memoryview(buffer.numpy().data).cast("B") if buffer.numel() else memoryview(b"")
