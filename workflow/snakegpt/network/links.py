"""The link between two nodes: throughput each way, round trips, MTU.

Each pair is measured alone on its two nodes: in a round of the tournament every node is in one pair at
most, and disjoint pairs run at once, as a switch lets them. iperf3 measures throughput; where one of the
two nodes lacks it, plain TCP sockets do, and the figures say so.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from snakegpt.errors import UserError
from snakegpt.network import iperf
from snakegpt.network.meeting import Meeting
from snakegpt.nodes import MEASURING_PORT, RENDEZVOUS

ROUND_TRIPS = 300
# iperf3 sends its first datagram once, and a wire that loses some may lose that one.
UDP_ATTEMPTS = 3
STREAMS = 4  # of the test that shows whether one stream fills the wire
ALL_PAIRS_UP_TO = 8  # nodes; a ring of pairs beyond, whose time does not grow with their number
IP_MTU = 14  # <linux/in.h>; Python's socket module does not name it
PING, SEND, RECEIVE = b"p", b"s", b"r"
CHUNK = bytes(1 << 20)


def rounds(nodes: int) -> list[list[tuple[int, int]]]:
    """Pairs to measure, in rounds whose pairs share no node.

    All pairs by the circle method up to ALL_PAIRS_UP_TO nodes; beyond, each node with the next one.
    """
    if nodes < 2:
        return []
    if nodes > ALL_PAIRS_UP_TO:
        ring = [(k, (k + 1) % nodes) for k in range(nodes)]
        last = [ring[-1]] if nodes % 2 else []
        return [r for r in (ring[: nodes - nodes % 2 : 2], ring[1::2], last) if r]
    seats: list[int | None] = [*range(nodes), *([None] if nodes % 2 else [])]
    half = len(seats) // 2
    found = []
    for _ in range(len(seats) - 1):
        pairs = zip(seats[:half], reversed(seats[half:]), strict=True)
        found.append([(min(a, b), max(a, b)) for a, b in pairs if a is not None and b is not None])
        seats = [seats[0], seats[-1], *seats[1:-1]]
    return found


def measure_links(
    meeting: Meeting,
    addresses: list[str],
    *,
    seconds: float,
    udp_bit_per_s: float | None = None,
) -> list[dict[str, Any]]:
    """Measure all pairs, together with the other nodes; returns a row a pair, on every node.

    addresses  of each node, as the others reach it
    seconds    of each throughput test
    """
    place = meeting.place
    has_iperf3 = meeting.share("iperf3", bool(iperf.program()))
    mine = []
    for number, pairs in enumerate(rounds(place.nodes)):
        for pair in pairs:
            if place.node not in pair:
                continue
            client, host = pair
            by_iperf3 = has_iperf3[client] and has_iperf3[host]
            ready, done = (f"{word}/{number}/{pair[0]}" for word in ("pair-ready", "pair-done"))
            # The tests of a pair, with room for a wire that stalls.
            wait_s = meeting.wait_s + 6 * (seconds + 5)
            if place.node == host:
                with serving(addresses[host], place.port + MEASURING_PORT, by_iperf3):
                    meeting.tell(f"{ready}/{host}")
                    meeting.wait_for([f"{done}/{client}"], wait_s=wait_s)
            else:
                meeting.wait_for([f"{ready}/{host}"], wait_s=wait_s)
                port = place.port + MEASURING_PORT
                row = measure_link(addresses[host], port, by_iperf3, seconds, udp_bit_per_s)
                mine.append({"from": client, "to": host, **row})
                meeting.tell(f"{done}/{client}")
    n_rounds = max(1, len(rounds(place.nodes)))
    everyone = meeting.share("links", mine, wait_s=n_rounds * (meeting.wait_s + 6 * (seconds + 5)))
    return sorted(itertools.chain(*everyone), key=lambda row: (row["from"], row["to"]))


def measure_link(
    address: str, port: int, by_iperf3: bool, seconds: float, udp_bit_per_s: float | None = None
) -> dict[str, Any]:
    """What one pair's link does, from the client's side; the other side is `serving`.

    returns  method, mtu, latency_s, and for up (client sends), down and several streams the figures of
             iperf3 or of plain TCP; `reason` for what is missing
    """
    reason: dict[str, str] = {}
    row: dict[str, Any] = {"reason": reason}
    try:
        row["mtu"] = path_mtu(address, port)
        row["latency_s"] = round_trips(address, port)
    except OSError as error:
        return {"method": None, "reason": {"latency": f"{address}:{port}: {error}"}}
    program = iperf.program() if by_iperf3 else None
    if program:
        row["method"] = "iperf3"
        tests: dict[str, dict[str, Any]] = {
            "up": {},
            "down": {"reverse": True},
            f"up_{STREAMS}_streams": {"streams": STREAMS},
        }
        if udp_bit_per_s:
            tests["udp"] = {"udp_bit_per_s": udp_bit_per_s}
        for name, options in tests.items():
            for _ in range(UDP_ATTEMPTS if name == "udp" else 1):
                row[name], why = iperf.measure(
                    program, address, port + 1, seconds=seconds, **options
                )
                if why is None:
                    break
            if why:
                reason[name] = why
    else:
        row["method"] = "plain TCP, since iperf3 is not installed on both nodes"
        if udp_bit_per_s:
            reason["udp"] = "iperf3 is not installed on both nodes"
        for name, way in (("up", SEND), ("down", RECEIVE)):
            try:
                rate = plain_tcp(address, port, way, seconds)
                if math.isnan(rate):  # which JSON does not know
                    raise OSError("too little arrived to count")
                row[name] = {"streams": 1, "bits_per_second": rate, "gb_per_s": rate / 8e9}
            except OSError as error:
                row[name], reason[name] = None, f"{address}:{port}: {error}"
    return row


def path_mtu(address: str, port: int) -> int | None:
    """The largest packet, bytes, that the kernel would send this way; None where it does not tell."""
    with socket.create_connection((address, port), timeout=10) as connection:
        try:
            return connection.getsockopt(socket.IPPROTO_IP, IP_MTU)
        except OSError:  # macOS, IPv6
            return None


def round_trips(address: str, port: int, n: int = ROUND_TRIPS) -> dict[str, float]:
    """Percentiles of the seconds that one byte takes there and back over an open TCP connection."""
    with socket.create_connection((address, port), timeout=10) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.sendall(PING)
        times: list[float] = []
        deadline = time.monotonic() + 10  # a slow wire gives fewer
        while len(times) < n and (time.monotonic() < deadline or len(times) < 3):
            started = time.perf_counter()
            connection.sendall(PING)
            if not connection.recv(1):
                raise ConnectionError("the other side closed the connection")
            times.append(time.perf_counter() - started)
    named = {"min": 0, "p50": 50, "p90": 90, "p99": 99, "max": 100}
    return {name: float(np.percentile(times, share)) for name, share in named.items()}


def plain_tcp(address: str, port: int, way: bytes, seconds: float) -> float:
    """Bits per second of one stream, as the receiving side counts them after the first fifth."""
    with socket.create_connection((address, port), timeout=10) as connection:
        connection.settimeout(seconds + 20)
        connection.sendall(way + f"{seconds:08.3f}".encode())
        if way == SEND:
            _send_for(connection, seconds)
            connection.shutdown(socket.SHUT_WR)
            return float(connection.recv(64) or b"nan")
        return _receive_rate(connection, seconds)


def _send_for(connection: socket.socket, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        connection.sendall(CHUNK)


def _receive_rate(connection: socket.socket, seconds: float) -> float:
    buffer = bytearray(1 << 20)
    first = time.monotonic()
    counted, started, ended = 0, 0.0, 0.0
    while n := connection.recv_into(buffer):
        ended = time.monotonic()
        if not started and ended - first > seconds / 5:
            started = ended
        elif started:
            counted += n
    return 8 * counted / (ended - started) if ended > started else float("nan")


@contextlib.contextmanager
def serving(address: str, port: int, by_iperf3: bool) -> Iterator[None]:
    """The other side of `measure_link`, for as long as the block lasts.

    raises   UserError if this node cannot listen there
    """
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with contextlib.ExitStack() as stack:
        program = iperf.program() if by_iperf3 else None
        try:
            if program:
                stack.enter_context(iperf.server(program, address, port + 1))
            listener = stack.enter_context(socket.create_server((address, port), family=family))
        except OSError as error:
            what = "iperf3 did not start listening" if isinstance(error, TimeoutError) else error
            raise UserError(
                f"{socket.gethostname()} cannot listen at {address}, port {port} or {port + 1}: {what}.\n"
                f"  choose another port in {RENDEZVOUS}; this is {MEASURING_PORT} above it"
            ) from None
        threading.Thread(target=_serve, args=(listener,), daemon=True).start()
        yield
        # Wakes accept, which closing the descriptor alone does not.
        with contextlib.suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)


def _serve(listener: socket.socket) -> None:
    """One connection after the other, until the listener is closed."""
    while True:
        try:
            connection, _ = listener.accept()
        except OSError:
            return
        with connection, contextlib.suppress(OSError, ValueError):
            connection.settimeout(60)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            way = connection.recv(1)
            if way == PING:
                while byte := connection.recv(1):
                    connection.sendall(byte)
            elif way:
                seconds = float(connection.recv(8, socket.MSG_WAITALL))
                if way == SEND:
                    connection.sendall(str(_receive_rate(connection, seconds)).encode())
                else:
                    _send_for(connection, seconds)
