"""Network interfaces: which one leads to a peer, by the kernel's own routing, and all that there are."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from snakegpt.errors import UserError, nearest


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


def address_of(host: str) -> str:
    """What a name stands for on this machine; UserError if it does not resolve."""
    return str(_resolved(host)[1][0])


def _resolved(host: str) -> tuple[socket.AddressFamily, tuple[Any, ...]]:
    try:
        family, _, _, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
    except OSError as error:
        raise UserError(f"host {host} does not resolve: {error.strerror or error}.") from None
    return family, address


def interface_towards(peer: str) -> Interface:
    """The interface that packets to a host leave through.

    The route decides, never "the first one that is up", which may be a container bridge. Connecting a
    UDP socket makes the kernel choose a route and sends nothing.

    raises   UserError if the name does not resolve, no route leads there, or the route's address
             belongs to no interface
    """
    family, address = _resolved(peer)
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
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
            here = ipaddress.ip_interface(f"{found.address.partition('%')[0]}/{_prefix(found)}")
            # All of 127.0.0.0/8 is this machine, also what Debian has its own name stand for: 127.0.1.1.
            if wanted == here.ip or (wanted.is_loopback and wanted in here.network):
                state = psutil.net_if_stats()[name]
                return Interface(
                    name=name,
                    address=address,
                    mtu=state.mtu,
                    speed_mbit_per_s=state.speed or None,
                    loopback=wanted.is_loopback,
                )
    raise UserError(f"no network interface of this machine has the address {address}.")


def _prefix(found: Any) -> str:
    """Of an address as psutil has it: IPv4's mask; of IPv6 the address alone, whose masks differ in form."""
    return str(found.netmask or 32) if found.family == socket.AF_INET else "128"


@dataclass(frozen=True)
class Device:
    """A network device as sysfs describes it, with this machine's IPv4 addresses on it.

    kind    ethernet, infiniband (IPoIB), loopback or other
    driver  kernel module behind it; None for virtual ones
    """

    name: str
    kind: str
    up: bool
    mtu: int
    speed_mbit_per_s: int | None
    driver: str | None
    networks: tuple[str, ...]


# Linux ARP hardware types, include/uapi/linux/if_arp.h.
KINDS = {"1": "ethernet", "32": "infiniband", "772": "loopback"}


def devices(sysfs: Path = Path("/sys")) -> list[Device]:
    """Every network device of this machine. `networks` are its addresses as `10.0.0.1/24`."""
    state = psutil.net_if_stats()
    found = []
    for name, addresses in sorted(psutil.net_if_addrs().items()):
        folder = sysfs / "class/net" / name
        networks = tuple(
            str(ipaddress.IPv4Interface(f"{a.address}/{a.netmask}"))
            for a in addresses
            if a.family == socket.AF_INET and a.netmask
        )
        described = state.get(name)
        found.append(
            Device(
                name=name,
                kind=KINDS.get(_read(folder / "type"), "other"),
                up=bool(described and described.isup),
                mtu=described.mtu if described else 0,
                speed_mbit_per_s=(described.speed or None) if described else None,
                driver=_link_name(folder / "device/driver"),
                networks=networks,
            )
        )
    return found


def rdma_ports(sysfs: Path = Path("/sys")) -> list[dict[str, str | None]]:
    """InfiniBand and RoCE ports, read where ibv_devinfo reads them, so that no tool is needed.

    returns  for each: name as NCCL_IB_HCA wants it (mlx5_0:1), state (ACTIVE, ...), link_layer
             (InfiniBand or Ethernet), rate in words, and the network device it shares its port with
    """
    found = []
    for port in sorted((sysfs / "class/infiniband").glob("*/ports/*")):
        device = port.parent.parent
        netdev = next(iter(sorted((device / "device/net").glob("*"))), None)
        found.append(
            {
                "name": f"{device.name}:{port.name}",
                "state": _read(port / "state").partition(": ")[2] or None,
                "link_layer": _read(port / "link_layer") or None,
                "rate": _read(port / "rate") or None,
                "interface": netdev.name if netdev else None,
            }
        )
    return found


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8").strip()
    except OSError:  # absent, or a driver that answers EINVAL
        return ""


def _link_name(link: Path) -> str | None:
    return link.resolve().name if link.exists() else None


def require_known(environment: Mapping[str, str]) -> None:
    """Refuse interfaces that somebody set for gloo or NCCL and that this machine does not have.

    gloo takes exact names; NCCL prefixes, names after =, and after ^ what it shall not take.
    """
    names = sorted(psutil.net_if_addrs())
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        value = environment.get(variable, "")
        exact = variable.startswith("GLOO") or value.startswith("=")
        for word in [] if value[:1] in ("", "^") else value.lstrip("=").split(","):
            known = word in names if exact else any(name.startswith(word) for name in names)
            if not known:
                raise UserError(
                    f"{variable} = {value} in the environment, but {socket.gethostname()} has no interface"
                    f" {word}.{nearest(word, names)}"
                )
