"""Which address of this machine the other ranks reach."""

from __future__ import annotations

import fcntl
import os
import socket
import struct


def own_address() -> tuple[str, socket.AddressFamily]:
    """The address that this rank's peers reach it at: TENKO_ADDRESS, else the interface that GLOO_SOCKET_IFNAME names,
    else the one that leads to MASTER_ADDR, else loopback.

    Raises:
        ValueError: an address or an interface that this machine does not have.
    """
    interface = os.environ.get("GLOO_SOCKET_IFNAME", "").split(",")[0]
    if address := os.environ.get("TENKO_ADDRESS"):
        name = "TENKO_ADDRESS"
    elif interface:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            try:  # SIOCGIFADDR
                answer = fcntl.ioctl(probe, 0x8915, struct.pack("256s", interface.encode()[:15]))
            except OSError:
                known = ", ".join(name for _, name in socket.if_nameindex())
                raise ValueError(
                    f"GLOO_SOCKET_IFNAME: must be an interface with an IPv4 address, is {interface}; there are {known}"
                ) from None
        return socket.inet_ntoa(answer[20:24]), socket.AF_INET
    else:
        name, address = "MASTER_ADDR", os.environ.get("MASTER_ADDR", "127.0.0.1")
    try:
        family, _, _, _, where = socket.getaddrinfo(address, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(where)  # sends nothing: asks the routing table
            own: str = probe.getsockname()[0]
        if name == "TENKO_ADDRESS" and own != where[0]:
            raise OSError("not an address of this machine")
        return own, family
    except OSError as error:
        raise ValueError(f"{name}: must be a host name or an address, is {address} ({error})") from None
