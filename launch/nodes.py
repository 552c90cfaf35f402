"""The nodes of a run as `tenko run` is told, and this node among them: its interface, and whether the others meet here.

Nothing here imports torch or opens a port.
"""

from __future__ import annotations

import socket
from dataclasses import dataclass

from .world import address_of, interface_to, interfaces

JOIN_SECONDS = 300.0
"""How long a node waits for the others at the start, unless --join-timeout says otherwise."""
JOIN_MOST = 604_800.0
"""A week."""
LOOPBACK = "127.0.0.1"


@dataclass(frozen=True, kw_only=True)
class Nodes:
    """Which nodes run, and how this one reaches the others. One node by default."""

    least: int = 1
    """Nodes without which the run does not go on."""
    most: int = 1
    """Nodes it takes at most."""
    host: str = LOOPBACK
    """Where they meet: name or address of one of them."""
    port: int = 0
    """Its TCP port; 0 is any, for one node."""
    interface: str = "lo"
    """This node's network interface, for everything that workers exchange."""
    address: str = LOOPBACK
    """This node's IPv4 address on it."""
    bind: str | None = LOOPBACK
    """The address to listen on, if the nodes meet on this machine; else None."""
    join_seconds: float = JOIN_SECONDS
    """How long to wait for the others at the start."""

    @property
    def several(self) -> bool:
        """Whether there may be more than one."""
        return self.most > 1

    @classmethod
    def parse(
        cls, nodes: str | None, rendezvous: str | None, interface: str | None, join_seconds: float | None
    ) -> Nodes:
        """From the options of `tenko run`.

        Args:
            nodes: `3`, or `1:3` for as many as there are of at least 1 and at most 3.
            rendezvous: `HOST:PORT`.
            interface: its name; None takes the one that leads to HOST.
            join_seconds: see the field.

        Raises:
            ValueError: an option is malformed or missing, HOST does not resolve, an interface does not exist.
        """
        least, most = _range(nodes)
        if most == 1:
            for name, given in (("--rendezvous", rendezvous), ("--interface", interface)):
                if given is not None:
                    raise ValueError(f"{name}: needs --nodes with more than one node, for instance --nodes 2")
            return cls()
        if join_seconds is not None and not 0 < join_seconds <= JOIN_MOST:
            raise ValueError(f"--join-timeout: must be at most {JOIN_MOST:g} s, is {join_seconds:g}")
        if rendezvous is None:
            raise ValueError(f"--nodes {nodes}: needs --rendezvous HOST:PORT, the same on every node")
        host, _, port = rendezvous.rpartition(":")
        if not host or not port.isascii() or not port.isdigit() or not 1 <= int(port) <= 65535:
            raise ValueError(f"--rendezvous: must be HOST:PORT with a port of 1 to 65535, is {rendezvous!r}")
        resolved = _resolve(host)
        here = resolved.startswith("127.") or resolved in interfaces().values()
        name, address = (interface, address_of(interface)) if interface else _way_to(host, resolved)
        bind = None
        if here:  # a name that means this machine itself may resolve to loopback, where no other node gets
            bind = address if resolved.startswith("127.") else resolved
        return cls(
            least=least,
            most=most,
            host=address if here and resolved.startswith("127.") else resolved,
            port=int(port),
            interface=name,
            address=address,
            bind=bind,
            join_seconds=JOIN_SECONDS if join_seconds is None else join_seconds,
        )


def _range(nodes: str | None) -> tuple[int, int]:
    first, _, last = (nodes or "1").partition(":")
    try:
        least, most = int(first), int(last or first)
    except ValueError:
        least = most = 0
    if not 1 <= least <= most <= 4096:
        raise ValueError(f"--nodes: must be a number or MIN:MAX, for instance 2 or 1:3, is {nodes!r}")
    return least, most


def _resolve(host: str) -> str:
    try:
        return str(socket.getaddrinfo(host, None, family=socket.AF_INET, type=socket.SOCK_STREAM)[0][4][0])
    except OSError:
        raise ValueError(f"--rendezvous: {host}: this name does not resolve to an IPv4 address") from None


def _way_to(host: str, resolved: str) -> tuple[str, str]:
    """This machine's interface to the others: the one that leads to HOST, or where HOST is this machine and its name
    only means loopback, the only other one there is."""
    if not resolved.startswith("127.") or host == resolved or host == "localhost":
        return interface_to(resolved)
    others = {name: address for name, address in interfaces().items() if not address.startswith("127.")}
    if len(others) != 1:
        known = ", ".join(f"{name} ({address})" for name, address in others.items()) or "none"
        raise ValueError(
            f"--rendezvous: {host} is {resolved} on this machine itself; give its address in the network, or "
            f"--interface (there are: {known})"
        )
    return next(iter(others.items()))
