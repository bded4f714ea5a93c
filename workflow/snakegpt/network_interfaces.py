"""Which network interface leads to a peer, by the kernel's own routing, on Linux and macOS alike."""

from __future__ import annotations

import ipaddress
import socket
from dataclasses import dataclass

import psutil

from snakegpt.errors import UserError


@dataclass(frozen=True)
class Interface:
    """A network interface as the system describes it.

    address               this machine's address on it, as used towards the peer
    speed_mbit_per_s      what the driver advertises, not what was measured; None where it says nothing
                          (loopback, most virtual ones)
    """

    name: str
    address: str
    mtu: int
    speed_mbit_per_s: int | None
    loopback: bool


def interface_towards(peer: str) -> Interface:
    """The interface that packets to a host leave through.

    The route decides, never "the first one that is up", which may be a container bridge. Connecting a
    UDP socket makes the kernel choose a route and sends nothing.

    raises   UserError if the name does not resolve, no route leads there, or the route's address
             belongs to no interface
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(peer, 9, type=socket.SOCK_DGRAM)[0]
    except OSError as error:
        raise UserError(f"host {peer} does not resolve: {error.strerror or error}.") from None
    with socket.socket(family, kind, protocol) as probe:
        try:
            probe.connect(address)
        except OSError as error:
            raise UserError(f"no route leads to {peer} ({address[0]}): {error.strerror}.") from None
        source = probe.getsockname()[0]
    if source == address[0]:  # a host's own addresses are reached without leaving it
        source = "127.0.0.1" if family == socket.AF_INET else "::1"
    return interface_with(source)


def interface_with(address: str) -> Interface:
    """The interface that has an address of this machine."""
    wanted = ipaddress.ip_address(address.partition("%")[0])
    for name, addresses in psutil.net_if_addrs().items():
        for found in addresses:
            if found.family not in (socket.AF_INET, socket.AF_INET6):
                continue
            if ipaddress.ip_address(found.address.partition("%")[0]) == wanted:
                state = psutil.net_if_stats()[name]
                return Interface(
                    name=name,
                    address=address,
                    mtu=state.mtu,
                    speed_mbit_per_s=state.speed or None,
                    loopback=wanted.is_loopback,
                )
    raise UserError(f"no network interface of this machine has the address {address}.")
