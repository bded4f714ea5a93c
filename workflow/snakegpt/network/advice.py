"""Launch settings and findings that follow from measurements, each with its evidence.

A setting is advised only if a trial of it beat the defaults by GAIN or they failed; NVIDIA's guide
discourages tuning in production, and lists NCCL_P2P_DISABLE and its like under debugging, so those are
never advised. NCCL_IB_DISABLE, of the same list, is: where RDMA is there and sockets are yet better, which
is a defect of the fabric. Without RDMA it is not tried, since NCCL takes sockets by itself then.
"""

from __future__ import annotations

import ipaddress
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from snakegpt.progress import quantity

GAIN = 1.05
SLOW = 0.75  # of the median of the others: a node below is named
SLOW_DISK = 0.5  # caches make disks vary more
LATE = 1.5  # times the median of the others' round trips: a node above is named ...
LATE_S = 2e-4  # ... if it is also this much later, which no scheduling noise is
LOSSY = 10  # retransmitted segments a second of one stream that say that packets get lost
MORE_STREAMS = 1.2  # gain of several streams over one that sockets' threads are tried for

# Per variable of `versions`: whether ranks that differ in it may run together.
VERSIONS = {
    "torch": "error",  # its collectives' wire protocol is its own
    "cuda": "error",
    "nccl": "error",  # refuses to talk to another version
    "python": "warning",
    "kernel": "warning",
}


# ---- candidates ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Candidate:
    """Variables to try against the defaults; on each node its own, since names of interfaces may differ."""

    name: str
    environments: list[dict[str, str]]
    reason: str


def candidates(
    backend: str, nodes: Sequence[Mapping[str, Any]], links: Sequence[Mapping[str, Any]]
) -> list[Candidate]:
    """What is worth a trial: each network that all nodes share, and more socket threads.

    nodes    inventories, node 0 first; its interface is the one that the others' routes lead to
    links    rows of `links.measure_links`
    """
    found = []
    for network, names in shared_networks(nodes).items():
        routed = all(
            name == node["interface"]["name"] for name, node in zip(names, nodes, strict=True)
        )
        why = "the route to node 0 leads" if routed else "another way"
        reason = f"{', '.join(dict.fromkeys(names))} ({network}): {why} through it"
        environments = [_interface_variables(backend, name) for name in names]
        found.append(Candidate(f"network {network}", environments, reason))
    gain = _gain_of_streams(links)
    if backend == "nccl" and gain > MORE_STREAMS and not any(map(_active_rdma, nodes)):
        # The guide's own example for 100 Gbit Ethernet; the product may be at most 64.
        threads = {"NCCL_SOCKET_NTHREADS": "4", "NCCL_NSOCKS_PERTHREAD": "4"}
        reason = (
            f"several TCP streams carry {gain:.2f} times what one does, and there is no RDMA port"
        )
        found.append(Candidate("socket threads", [threads] * len(nodes), reason))
    with_rdma = [node["host"] for node in nodes if _active_rdma(node)]
    if backend == "nccl" and with_rdma:
        reason = f"sockets, although RDMA ports are active on {', '.join(with_rdma)}: look at those"
        environments = [
            _interface_variables(backend, node["interface"]["name"]) | {"NCCL_IB_DISABLE": "1"}
            for node in nodes
        ]
        found.append(Candidate("sockets instead of RDMA", environments, reason))
    inactive = [_inactive_rdma(node) for node in nodes]
    if backend == "nccl" and any(inactive) and all(map(_active_rdma, nodes)):
        ports = [{"NCCL_IB_HCA": "=" + ",".join(_active_rdma(node))} for node in nodes]
        down = ", ".join(sorted({name for ports_of in inactive for name in ports_of}))
        found.append(Candidate("active RDMA ports", ports, f"{down} are not active"))
    return found


def alone_candidate(backend: str, loopback: str, ranks: int) -> list[Candidate]:
    """What to try on one machine where the defaults failed."""
    if backend != "gloo" or ranks == 1:
        return []
    reason = (
        "all ranks are on this machine; without it gloo looks the machine's own name up, which does"
        f" not lead back here over {loopback}"
    )
    return [Candidate("loopback", [{"GLOO_SOCKET_IFNAME": loopback}], reason)]


def _interface_variables(backend: str, name: str) -> dict[str, str]:
    """gloo wants the name itself; NCCL takes a prefix unless it begins with =."""
    variables = {"GLOO_SOCKET_IFNAME": name}
    # NCCL meets over sockets also where it then uses InfiniBand.
    return variables | ({"NCCL_SOCKET_IFNAME": f"={name}"} if backend == "nccl" else {})


def shared_networks(nodes: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """Network -> each node's interface on it, for the IPv4 networks that every node is in.

    Loopback is left out, and so is what many containers have alike: an address that two nodes share.
    """
    found: dict[str, list[str]] = {}
    first = _networks(nodes[0])
    for network in first:
        on_it = [_networks(node).get(network) for node in nodes]
        addresses = {place[1] for place in on_it if place}
        if all(on_it) and len(addresses) == len(nodes):
            found[network] = [place[0] for place in on_it if place]
    return found


def _networks(node: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    found = {}
    for device in node["devices"]:
        if device["up"] and device["kind"] != "loopback":
            for text in device["networks"]:
                address = ipaddress.IPv4Interface(text)
                found[str(address.network)] = (str(device["name"]), str(address.ip))
    return found


def _gain_of_streams(links: Sequence[Mapping[str, Any]]) -> float:
    gains = [
        several["bits_per_second"] / one["bits_per_second"]
        for link in links
        if (one := link.get("up")) and (several := link.get("up_4_streams"))
    ]
    return median(gains) if gains else 1.0


def _active_rdma(node: Mapping[str, Any]) -> list[str]:
    return [port["name"] for port in node["rdma_ports"] if port["state"] == "ACTIVE"]


def _inactive_rdma(node: Mapping[str, Any]) -> list[str]:
    return [port["name"] for port in node["rdma_ports"] if port["state"] != "ACTIVE"]


# ---- choice ----------------------------------------------------------------------------------


def choose(
    scores: Sequence[tuple[Candidate | None, list[float]]],
) -> tuple[Candidate | None, list[str]]:
    """The candidate to advise, or None for the defaults, and why.

    scores   bus bandwidth of each trial of a candidate, GB/s, the defaults' (None) first; no trial that
             counts: it failed
    returns  a candidate only if its worst trial beats the defaults' best by GAIN, or they failed
    """
    (_, default), *tried = scores
    working = [(candidate, got) for candidate, got in tried if candidate and got]
    if not working:
        return None, [] if default else ["Neither the defaults nor another setting worked."]
    best, got = max(working, key=lambda pair: min(pair[1]))
    variables = spelled(best)
    if not default:
        return best, [f"{variables}: {best.reason}. The defaults failed."]
    gain = min(got) / max(default)
    figures = f"{digits(min(got))} against {digits(max(default))} GB/s"
    if gain >= GAIN:
        return best, [
            f"{variables}: {best.reason}. It carries {gain:.2f} times the defaults', {figures}."
        ]
    return None, [
        f"No setting beats the defaults: {variables} carries {figures}, so nothing is set."
    ]


def spelled(candidate: Candidate) -> str:
    """The variables of a candidate in words, once where nodes have the same."""
    texts = (" ".join(f"{n}={v}" for n, v in each.items()) for each in candidate.environments)
    return " or ".join(dict.fromkeys(texts))


# ---- findings --------------------------------------------------------------------------------


def differences(nodes: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """(error or warning, what differs between nodes and where)."""
    found = []
    named = by_name(nodes)
    for what, kind in VERSIONS.items():
        values = {name: node["versions"][what] or "none" for name, node in named.items()}
        if len(set(values.values())) > 1:
            found.append((kind, f"nodes differ in {what}: {_by_value(values)}"))
    for what, kind, of in (
        ("GPUs", "warning", lambda n: ", ".join(gpu["name"] for gpu in n["gpus"]) or "none"),
        ("driver", "warning", lambda n: n["gpus"][0]["driver_version"] if n["gpus"] else "none"),
        ("GPU topology (nvidia-smi topo -m)", "warning", _numbered(nodes, "gpu_topology")),
        ("cores", "warning", lambda n: str(n["cores"])),
        ("NUMA nodes", "warning", lambda n: str(n["numa_nodes"])),
        ("RDMA ports", "warning", _rdma),
        ("MTU towards node 0", "warning", lambda n: str(n["interface"]["mtu"])),
        ("speed of the interface towards node 0", "warning", _advertised),
        ("lockable memory", "warning", _lockable),
    ):
        values = {name: of(node) for name, node in named.items()}
        if len(set(values.values())) > 1:
            found.append((kind, f"nodes differ in {what}: {_by_value(values)}"))
    for node in nodes:
        if node["rdma_ports"] and node["locked_memory_bytes"] is not None:
            text = f"{node['host']} may lock {_lockable(node)} of memory: RDMA wants ulimit -l unlimited"
            found.append(("warning", text))
    return found


def by_name(nodes: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """Inventories by host name, which many machines have alike that nobody has named."""
    hosts = [node["host"] for node in nodes]
    return {
        host if hosts.count(host) == 1 else f"node {k} ({host})": node
        for k, (host, node) in enumerate(zip(hosts, nodes, strict=True))
    }


def _numbered(nodes: Sequence[Mapping[str, Any]], key: str) -> Callable[[Mapping[str, Any]], str]:
    """Says which of the different values a node has, where they are too long to show."""
    known = list(dict.fromkeys(node[key] for node in nodes))
    return lambda node: f"kind {known.index(node[key]) + 1}" if node[key] else "none"


def _rdma(node: Mapping[str, Any]) -> str:
    """Active ports by what they are: 8 x InfiniBand 400 Gb/sec (4X NDR)."""
    active = [port for port in node["rdma_ports"] if port["state"] == "ACTIVE"]
    kinds = Counter(f"{port['link_layer']} {port['rate']}" for port in active)
    return ", ".join(f"{n} x {kind}" for kind, n in sorted(kinds.items())) or "none active"


def _advertised(node: Mapping[str, Any]) -> str:
    speed = node["interface"]["speed_mbit_per_s"]
    return quantity(1e6 * speed, "bit/s") if speed else "unknown"


def _lockable(node: Mapping[str, Any]) -> str:
    limit = node["locked_memory_bytes"]
    return "unlimited" if limit is None else quantity(limit, "B")


def _by_value(values: Mapping[str, str]) -> str:
    by_value: dict[str, list[str]] = {}
    for host, value in values.items():
        by_value.setdefault(value, []).append(host)
    return "; ".join(f"{value} on {', '.join(hosts)}" for value, hosts in by_value.items())


def slow_nodes(nodes: Sequence[Mapping[str, Any]], links: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line for each node that stands out among the others, by its links and by itself.

    A link says nothing about which of its ends is slow, so a node is judged by the best of its links;
    with two nodes there is no telling, and the link is named.
    """
    lines = []
    hosts = [node["host"] for node in nodes]
    figures: list[tuple[str, str, list[float | None]]] = []
    if len(nodes) > 2:
        for what, way in (("sends", 0), ("receives", 1)):
            best = [_best_rate(links, k, way) for k in range(len(nodes))]
            figures.append((f"{what}", "bit/s", best))
    for key, what, unit in (
        ("matmul_flops_per_s", "multiplies matrices at", "FLOP/s"),
        ("host_to_device_gb_per_s", "copies to its GPU at", " GB/s"),
        ("disk_read_gb_per_s", "reads from disk at", " GB/s"),
    ):
        figures.append((what, unit, [node["speed"][key] for node in nodes]))
    for what, unit, values in figures:
        for k, value in enumerate(values):
            others = [v for j, v in enumerate(values) if j != k and v is not None]
            limit = SLOW_DISK if "disk" in what else SLOW
            if value is not None and others and value < limit * median(others):
                lines.append(
                    f"{hosts[k]} is slow: it {what} {quantity(value, unit)},"
                    f" the others {quantity(median(others), unit)}."
                )
    late = [_best_latency(links, k) for k in range(len(nodes))]
    for k, value in enumerate(late):
        others = [v for j, v in enumerate(late) if j != k and v is not None]
        if len(nodes) > 2 and value is not None and others:
            usual = median(others)
            if value > LATE * usual and value > usual + LATE_S:
                lines.append(
                    f"{hosts[k]} is far: a round trip takes {digits(value * 1e3)} ms, the others'"
                    f" {digits(usual * 1e3)} ms."
                )
    return lines


def link_findings(
    nodes: Sequence[Mapping[str, Any]], links: Sequence[Mapping[str, Any]]
) -> list[str]:
    """What links say by themselves: loss, and less than was advertised."""
    lines = []
    below: list[tuple[float, str, str, float]] = []
    for link in links:
        a, b = nodes[link["from"]], nodes[link["to"]]
        for way, (source, target) in (("up", (a, b)), ("down", (b, a))):
            got = link.get(way)
            if not got:
                continue
            arrow = f"{source['host']} to {target['host']}"
            lost = (got.get("retransmits") or 0) / (got.get("time_s") or 1)
            if lost > LOSSY:
                lines.append(
                    f"{arrow}: {lost:,.0f} segments a second sent again, so packets get lost."
                )
            advertised = 1e6 * (source["interface"]["speed_mbit_per_s"] or 0)
            if got["bits_per_second"] < advertised / 2:
                below.append(
                    (got["bits_per_second"], arrow, source["interface"]["name"], advertised)
                )
        for what, why in link["reason"].items():
            lines.append(f"{a['host']} to {b['host']}: {what} was not measured: {why}.")
    if below:
        rate, arrow, name, advertised = min(below)
        lines.append(
            f"{len(below)} of {2 * len(links)} directions carry less than half of what their interface"
            f" advertises, at worst {arrow} {quantity(rate, 'bit/s')} of {name}'s"
            f" {quantity(advertised, 'bit/s')}, in one stream."
        )
    return lines


def _best_rate(links: Sequence[Mapping[str, Any]], node: int, way: int) -> float | None:
    """The highest rate at which a node sends (way 0) or receives (1)."""
    rates = [
        got["bits_per_second"]
        for link in links
        for name, ends in (("up", ("from", "to")), ("down", ("to", "from")))
        if link[ends[way]] == node and (got := link.get(name))
    ]
    return max(rates, default=None)


def _best_latency(links: Sequence[Mapping[str, Any]], node: int) -> float | None:
    found = [
        link["latency_s"]["p50"]
        for link in links
        if node in (link["from"], link["to"]) and link.get("latency_s")
    ]
    return min(found, default=None)


def findings(
    gradient_bytes: int, curve: Sequence[Mapping[str, Any]], latency_s: float | None
) -> list[str]:
    """What the all-reduces say about training, in words."""
    if not curve or latency_s is None:
        return []
    whole = curve[-1]
    best = max(curve, key=lambda row: float(row["busbw_gb_per_s"]))
    return [
        f"Summing all gradients ({gradient_bytes / 1e6:,.1f} MB) takes"
        f" {digits(whole['time_s'] * 1e3)} ms a step where it does not overlap with the backward pass;"
        f" the smallest message takes {digits(latency_s * 1e6)} µs.",
        f"The bus bandwidth is highest, {digits(best['busbw_gb_per_s'])} GB/s, at messages of"
        f" {best['bytes']:,} bytes.",
    ]


def digits(number: float) -> str:
    """Three significant digits, where `.3g` alone would write 1,310 as 1.31e+03."""
    return f"{float(f'{number:.3g}'):,g}"
