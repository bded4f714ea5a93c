"""Hosts on wires of known rate, loss and delay: network namespaces of this test's own, nothing else touched.

Rate by tbf, loss by nftables, delay by a relay between two TUN devices (many kernels lack netem). Needs
root, iproute2 and, for loss, nft; `missing` says what is not there.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NETWORKS = {"eth0": "10.77.0", "eth1": "10.78.0"}
BUCKET_S = 0.008  # of the rate: what tbf may send at once after its timer came late

RELAY = """
import fcntl, heapq, os, select, struct, subprocess, sys, time
def tun(namespace, address):
    descriptor = os.open("/dev/net/tun", os.O_RDWR)
    name = f"tun{os.getpid() % 1000000}"
    fcntl.ioctl(descriptor, 0x400454CA, struct.pack("16sH", name.encode(), 0x1001))
    for words in (["link", "set", name, "netns", namespace],):
        subprocess.run(["ip", *words], check=True)
    inside = ["ip", "-n", namespace]
    subprocess.run([*inside, "link", "set", name, "name", "eth0"], check=True)
    subprocess.run([*inside, "addr", "add", address, "dev", "eth0"], check=True)
    subprocess.run([*inside, "link", "set", "eth0", "up"], check=True)
    return descriptor
delay_s = float(sys.argv[1])
ends = [tun(sys.argv[2], sys.argv[3]), tun(sys.argv[4], sys.argv[5])]
print("ready", flush=True)
waiting = []
while True:
    left = max(0, waiting[0][0] - time.monotonic()) if waiting else None
    for end in select.select(ends, [], [], left)[0]:
        heapq.heappush(waiting, (time.monotonic() + delay_s, len(waiting), ends[end == ends[0]], os.read(end, 65536)))
    while waiting and waiting[0][0] <= time.monotonic():
        _, _, out, packet = heapq.heappop(waiting)
        os.write(out, packet)
"""


def missing(*tools: str) -> str | None:
    """Why there is no lab here, or None."""
    if os.geteuid():
        return "needs root, for network namespaces"
    absent = [tool for tool in ("ip", "tc", "unshare", *tools) if shutil.which(tool) is None]
    if absent:
        return f"not installed: {', '.join(absent)}"
    probe = f"sgprobe{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True)
    subprocess.run(["ip", "netns", "del", probe], capture_output=True)
    return f"no network namespaces: {made.stderr.strip()}" if made.returncode else None


class Lab:
    """Nodes 1 to n on a bridge for each network, in a namespace and with a host name each."""

    def __init__(self, n_nodes: int, networks: tuple[str, ...] = ("eth0",)) -> None:
        self.prefix = f"sg{os.getpid()}"
        self.n_nodes, self.networks = n_nodes, networks
        self.processes: list[subprocess.Popen[str]] = []

    def name(self, node: int) -> str:
        return f"{self.prefix}-n{node}"

    def address(self, node: int, network: str = "eth0") -> str:
        return f"{NETWORKS[network]}.{10 + node}"

    def __enter__(self) -> Lab:
        hub = self.name(0)
        for node in range(self.n_nodes + 1):
            self._make(node)
        for number, network in enumerate(self.networks):
            ip("-n", hub, "link", "add", f"br{number}", "type", "bridge")
            ip("-n", hub, "link", "set", f"br{number}", "up")
            for node in range(1, self.n_nodes + 1):
                port, inside = f"p{number}-{node}", self.name(node)
                ip("-n", hub, "link", "add", port, "type", "veth",
                   "peer", "name", network, "netns", inside)  # fmt: skip
                ip("-n", hub, "link", "set", port, "master", f"br{number}", "up")
                ip("-n", inside, "addr", "add", f"{self.address(node, network)}/24", "dev", network)
                ip("-n", inside, "link", "set", network, "up")
        return self

    def _make(self, node: int) -> None:
        name = self.name(node)
        folder = Path("/etc/netns") / name
        folder.mkdir(parents=True)  # `ip netns exec` mounts its files over those of /etc
        lines = [f"{self.address(k)} node{k}" for k in range(1, self.n_nodes + 1)]
        (folder / "hosts").write_text("\n".join(["127.0.0.1 localhost", *lines, ""]))
        ip("netns", "add", name)
        ip("-n", name, "link", "set", "lo", "up")

    def __exit__(self, *failure: object) -> None:
        for node in range(self.n_nodes + 1):
            # Whatever still runs in a namespace of ours is ours, also what daemons have started.
            for pid in self.pids(node):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, 9)
        for process in self.processes:
            process.wait()
        for node in range(self.n_nodes + 1):
            subprocess.run(["ip", "netns", "del", self.name(node)], capture_output=True)
            shutil.rmtree(Path("/etc/netns") / self.name(node), ignore_errors=True)

    def pids(self, node: int) -> list[int]:
        """What runs on a node."""
        command = ["ip", "netns", "pids", self.name(node)]
        return [*map(int, subprocess.run(command, capture_output=True, text=True).stdout.split())]

    def unshape(self, node: int, network: str) -> None:
        command = ["tc", "-n", self.name(node), "qdisc", "del", "dev", network, "root"]
        subprocess.run(command, check=True)

    def shape(self, node: int, network: str, bit_per_s: float) -> None:
        """What the node sends, at most this fast."""
        burst = f"{max(bit_per_s * BUCKET_S / 8, 4000):.0f}"  # what is longer than it never passes
        subprocess.run(
            ["tc", "-n", self.name(node), "qdisc", "replace", "dev", network, "root", "tbf",
             "rate", f"{bit_per_s:.0f}bit", "burst", burst, "latency", "50ms"],
            check=True,
        )  # fmt: skip

    def lose(self, node: int, share: float) -> None:
        """Drop this share of the packets that arrive at a node, at random."""
        rules = (
            "table inet lossy { chain input { type filter hook input priority 0;"
            f' iifname "eth0" numgen random mod 10000 < {round(share * 10000)} drop\n }}\n }}'
        )
        command = ["ip", "netns", "exec", self.name(node), "nft", "-f", "-"]
        subprocess.run(command, input=rules, text=True, check=True)

    def block(self, node: int, ports: str) -> None:
        """Swallow what arrives for some TCP ports, as a firewall does."""
        rules = (
            "table inet wall { chain input { type filter hook input priority 0;"
            f" tcp dport {ports} drop\n }}\n }}"
        )
        command = ["ip", "netns", "exec", self.name(node), "nft", "-f", "-"]
        subprocess.run(command, input=rules, text=True, check=True)

    def start(
        self, node: int, command: list[str], environment: dict[str, str] | None = None
    ) -> subprocess.Popen[str]:
        """A command on a node, whose host name it sees."""
        script = 'hostname "$0"; exec "$@"'
        process = subprocess.Popen(
            ["ip", "netns", "exec", self.name(node), "unshare", "--uts",
             "bash", "-c", script, f"node{node}", *command],
            env={**os.environ, **(environment or {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )  # fmt: skip
        self.processes.append(process)
        return process

    def run_everywhere(
        self,
        arguments: list[str],
        *,
        host: str | None = None,
        skip: tuple[int, ...] = (),
        environment: dict[str, str] | None = None,
        limit_s: float = 200,
        stage: str = "bench_network",
    ) -> list[tuple[int, str]]:
        """A stage on all nodes, node 1 being node 0 of the meeting; returns (status, output) of each."""
        rendezvous = f"{host or self.address(1)}:29500"
        running = []
        for node in range(1, self.n_nodes + 1):
            if node in skip:
                continue
            place = {
                "SNAKEGPT_NODE": f"{node - 1}/{self.n_nodes}",
                "SNAKEGPT_RENDEZVOUS": rendezvous,
                "OMP_NUM_THREADS": "1",
            }
            command = [sys.executable, "-m", f"snakegpt.stages.{stage}", *arguments]
            running.append(self.start(node, command, place | (environment or {})))
        deadline = time.monotonic() + limit_s
        return [
            (process.returncode, output)
            for process in running
            for output, _ in [process.communicate(timeout=max(1, deadline - time.monotonic()))]
        ]


@contextlib.contextmanager
def delayed_pair(delay_s: float) -> Iterator[tuple[str, str]]:
    """Two namespaces, 10.79.0.1 and 10.79.0.2, whose packets take delay_s to the other."""
    names = f"sg{os.getpid()}-a", f"sg{os.getpid()}-b"
    for name in names:
        ip("netns", "add", name)
        ip("-n", name, "link", "set", "lo", "up")
    words: list[Any] = [delay_s, names[0], "10.79.0.1/24", names[1], "10.79.0.2/24"]
    command = [sys.executable, "-c", RELAY, *map(str, words)]
    relay = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert relay.stdout and relay.stdout.readline() == "ready\n"
        yield names
    finally:
        relay.kill()
        relay.wait()
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)
