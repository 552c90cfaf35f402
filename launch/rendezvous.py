"""Where the agents of a run's nodes meet, and what they tell one another: one TCP store on the node that HOST is.

Agents rendezvous by torch's own rules (DynamicRendezvousHandler); what is notable is the store. It listens on one
address only (torch's listens on all of a machine's, and agents unpickle what stands in it); workers take the same one,
so that one port is to be opened; its clients learn within seconds that the way there is cut, which a TCP connection
alone would tell them after a quarter of an hour.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import socket
import threading
import time
from contextlib import suppress
from datetime import timedelta
from typing import Any

from torch.distributed import Store, TCPStore
from torch.distributed.elastic.rendezvous import (
    RendezvousError,
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
)
from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import C10dRendezvousBackend
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import RendezvousTimeout, create_handler

from .errors import RunFailed
from .failures import ROUND
from .nodes import Nodes

SILENCE_SECONDS = 10
"""A node that is not heard of for so long is lost."""
REJOIN_SECONDS = 30
"""How long nodes wait for one another when workers are started anew: all that live notice within seconds."""
LAST_CALL_SECONDS = 5
"""How long a rendezvous that has its least nodes waits for more."""
_VERDICT = "tenko/verdict"
_LEAVE_SECONDS = 5.0


class Meeting:
    """The store of this run's agents; a context manager.

    Args:
        nodes: the run's nodes, and this one.

    Raises (on entering):
        ValueError: the port is taken by another program, or nobody answers there in time.
    """

    def __init__(self, nodes: Nodes) -> None:
        self.nodes = nodes
        self.is_host = False
        """Whether the store is this process's."""
        self.port = nodes.port
        self._store: Store | None = None

    def __enter__(self) -> Meeting:
        listener = self._listen()
        self.is_host = listener is not None
        if listener is not None:
            self.port = listener.getsockname()[1]
            fd = listener.detach()
            self._store = self._open(timedelta(seconds=60), is_master=True, master_listen_fd=fd)
            self.tell("host", socket.gethostname())
        else:
            self._store = self._call()
            self._store.add("tenko/came", 1)
        return self

    def __exit__(self, *error: object) -> None:
        try:
            if not self.is_host:
                self.store.add("tenko/left", 1)
            deadline = time.monotonic() + _LEAVE_SECONDS
            while self.is_host and time.monotonic() < deadline:  # others may still read what ended the run
                if self.store.add("tenko/left", 0) >= self.store.add("tenko/came", 0):
                    break
                time.sleep(0.05)
        except RuntimeError:  # the host is gone
            pass
        self._store = None

    @property
    def store(self) -> Store:
        """The store."""
        assert self._store is not None, "the meeting is not entered"
        return self._store

    def tell(self, key: str, value: Any) -> None:
        """Leave a JSON-serializable value for the other nodes."""
        self.store.set(f"tenko/{key}", json.dumps(value))

    def ask(self, key: str, seconds: float) -> Any:
        """What another node told, or None if nobody did in time."""
        deadline = time.monotonic() + seconds
        while not self.store.check([f"tenko/{key}"]):
            if self.verdict() is not None or time.monotonic() > deadline:
                return None
            time.sleep(0.05)
        return json.loads(self.store.get(f"tenko/{key}"))

    def fail(self, error: RunFailed) -> RunFailed:
        """End the run on all nodes with one line; the first that comes counts, and is given back."""
        mine = json.dumps([str(error), error.code])
        try:
            found = self.store.compare_set(_VERDICT, "", mine).decode()
        except RuntimeError:  # the host is gone
            return error
        message, code = json.loads(found)
        return RunFailed(message, code)

    def refuse(self, error: RunFailed) -> RunFailed:
        """The same before this node has joined: nodes that wait for it are told, those that train are left alone."""
        there = Rendezvous(self)
        if there.goes_on_without_us():
            return error
        found = self.fail(error)
        with suppress(RendezvousError):
            there.set_closed()
        return found

    def verdict(self) -> RunFailed | None:
        """What a node has ended the run with."""
        try:
            if not self.store.check([_VERDICT]):
                return None
            message, code = json.loads(self.store.get(_VERDICT))
        except RuntimeError:
            return None
        return RunFailed(message, code)

    def _listen(self) -> socket.socket | None:
        """The listener, if the nodes meet here; None also when an agent of this run on this machine was first."""
        if self.nodes.bind is None:
            return None
        try:
            return socket.create_server((self.nodes.bind, self.nodes.port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                return None
            raise ValueError(f"--rendezvous: cannot listen on {self._place}: {error.strerror}") from None

    def _call(self) -> Store:
        taken = self.nodes.bind is not None
        seconds = 5.0 if taken else self.nodes.join_seconds
        try:
            store = self._open(timedelta(seconds=seconds))
            _bound_patience(self.port)
            deadline = time.monotonic() + 5.0
            while not store.check(["tenko/host"]):
                if time.monotonic() > deadline:
                    raise TimeoutError
                time.sleep(0.05)
        except (RuntimeError, TimeoutError):
            if taken:
                raise ValueError(f"--rendezvous: {self._place} is taken by another program; choose a port") from None
            raise ValueError(
                f"--rendezvous: nobody answered on {self._place} within {seconds:g} s: the same command must run on "
                "that node, and its port be open"
            ) from None
        store.set_timeout(timedelta(seconds=60))
        return store

    def _open(self, timeout: timedelta, **settings: Any) -> Store:
        """In a thread: what takes a connection but is no store would keep torch waiting for ever."""
        opened: list[Store] = []
        failed: list[RuntimeError] = []

        def try_it() -> None:
            try:
                store = TCPStore(self._address, self.port, wait_for_workers=False, timeout=timeout, **settings)
                opened.append(store)
            except RuntimeError as error:
                failed.append(error)

        thread = threading.Thread(target=try_it, name="tenko meeting", daemon=True)
        thread.start()
        thread.join(timeout.total_seconds() + 5.0)
        if failed:
            raise failed[0]
        if not opened:
            raise TimeoutError
        return opened[0]

    @property
    def _address(self) -> str:
        return self.nodes.bind or self.nodes.host

    @property
    def _place(self) -> str:
        return f"{self._address}:{self.nodes.port}"


class Rendezvous(RendezvousHandler):
    """What torchrun's agent asks who else there is: torch's rules in a meeting's store."""

    def __init__(self, meeting: Meeting) -> None:
        nodes = meeting.nodes
        self._meeting = meeting
        # Ranks follow the addresses, rank 0 is on the host: it is the one that prints.
        octets = ".".join(f"{int(part):03}" for part in nodes.address.split("."))
        backend = C10dRendezvousBackend(meeting.store, "tenko")
        self._inner = create_handler(
            meeting.store,
            backend,
            RendezvousParameters(
                backend=backend.name,
                endpoint=f"{nodes.host}:{meeting.port}",
                run_id="tenko",
                min_nodes=nodes.least,
                max_nodes=nodes.most,
                local_addr=f"{0 if meeting.is_host else 1} {octets}",
                join_timeout=max(1, round(nodes.join_seconds)),
                last_call_timeout=LAST_CALL_SECONDS,
                keep_alive_interval=2,
                keep_alive_max_attempt=SILENCE_SECONDS // 2,
            ),
        )
        self.round = -1
        """Which start of the workers it is, the same on all nodes."""

    def next_rendezvous(self) -> RendezvousInfo:
        """Wait for the other nodes. Also tells the workers to come which start it is, the same on all nodes."""
        os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # no further store, on all addresses
        if self.round >= 0:
            timeout = RendezvousTimeout(join=timedelta(seconds=REJOIN_SECONDS))
            self._inner._settings = dataclasses.replace(self._inner.settings, timeout=timeout)
        info = self._inner.next_rendezvous()
        self.round = self._inner._state_holder.state.round
        os.environ[ROUND] = str(self.round)
        where = RendezvousStoreInfo(self._meeting.nodes.host, self._meeting.port)
        return RendezvousInfo(info.store, info.rank, info.world_size, where)

    def missing(self, nodes: int) -> int:
        """How many of this round's nodes are lost, as far as this one hears."""
        try:
            self._inner.num_nodes_waiting()  # looks at the store, once a second at most
        except RendezvousError:
            return 0
        state = self._inner._state_holder.state
        return nodes - len(state.participants) if state.complete else 0

    def nodes_present(self) -> int:
        """How many nodes have come, this one with them."""
        return max(1, len(self._inner._state_holder.state.participants))

    def ranks_present(self) -> set[int]:
        """The numbers of this round's nodes that are not lost."""
        return set(self._inner._state_holder.state.participants.values())

    def goes_on_without_us(self) -> bool:
        """Whether the run has begun, and this node was never part of it: then its end is not the run's."""
        if self.round >= 0:
            return False
        try:
            self._inner._state_holder.sync()
        except RendezvousError:
            return False
        state = self._inner._state_holder.state
        return state.complete or state.round > 0

    def is_full(self) -> bool:
        """Whether the run goes on with all the nodes that it takes, of which this is none: a spare."""
        if not self.goes_on_without_us():
            return False
        state = self._inner._state_holder.state
        return state.complete and len(state.participants) >= self._meeting.nodes.most

    def leave(self) -> None:
        """Leave, and end the run for all nodes, unless it goes on without this one."""
        if self.goes_on_without_us():
            self._inner._stop_heartbeats()  # the others forget what they don't hear of
        else:
            self.shutdown()

    def get_backend(self) -> str:
        """Its name."""
        return self._inner.get_backend()

    @property
    def use_agent_store(self) -> bool:
        """Yes: workers take the meeting's store."""
        return True

    def is_closed(self) -> bool:
        """Whether a node has ended the run."""
        return self._inner.is_closed()

    def set_closed(self) -> None:
        """End the run for all nodes."""
        self._inner.set_closed()

    def num_nodes_waiting(self) -> int:
        """Nodes that want to join and have a place. Torch counts spares that have waited for one in vain as well, and
        its agents would start all workers anew for them, again and again."""
        waiting = self._inner.num_nodes_waiting()
        state = self._inner._state_holder.state
        return 0 if state.complete and len(state.participants) >= self._meeting.nodes.most else waiting

    def get_run_id(self) -> str:
        """Its name."""
        return self._inner.get_run_id()

    def shutdown(self) -> bool:
        """Leave, and end the run for all nodes."""
        return self._inner.shutdown()


def _bound_patience(port: int) -> None:
    """Let this process's connections to a port break when the way there is cut: within about 15 s."""
    options = ((socket.TCP_USER_TIMEOUT, 12_000), (socket.TCP_KEEPIDLE, 5), (socket.TCP_KEEPINTVL, 3))
    for name in os.listdir("/proc/self/fd"):
        try:
            if not os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(name))) as copy:  # an option is the connection's, not the copy's
                if copy.family in (socket.AF_INET, socket.AF_INET6) and copy.getpeername()[1] == port:
                    copy.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
                    copy.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)
                    for option, value in options:
                        copy.setsockopt(socket.IPPROTO_TCP, option, value)
        except OSError:  # gone, or not connected
            continue
