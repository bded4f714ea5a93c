"""TCP and UDP throughput by iperf3, whose JSON says all that is kept here.

A server takes one test after the other for as long as it lives; a test that is refused or hangs gives its
reason instead of figures.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from typing import Any

import psutil

# One more second than is measured: it leaves TCP's slow start out.
OMITTED_S = 1
# Debian 12 has iperf3 3.12, which sends all streams from one thread (threads came with 3.16): beyond some
# 20 Gbit/s its figure is that of a core.
ONE_CORE_BIT_PER_S = 20e9


def program() -> str | None:
    """The iperf3 of this machine."""
    return shutil.which("iperf3")


@contextlib.contextmanager
def server(iperf3: str, address: str, port: int = 0, wait_s: float = 15.0) -> Iterator[int]:
    """A server at an address of this machine; yields its port once it listens."""
    if not port:
        with socket.socket() as probe:
            probe.bind((address, 0))
            port = int(probe.getsockname()[1])
    command = [iperf3, "--server", "--bind", address, "--port", str(port)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            deadline = time.monotonic() + wait_s
            while not _listens(process.pid):  # connecting would be taken for a client
                if process.poll() is not None:
                    raise OSError(f"its server left with status {process.returncode}")
                if time.monotonic() > deadline:
                    raise TimeoutError
                time.sleep(0.02)
            yield port
        finally:
            process.kill()


def _listens(pid: int) -> bool:
    try:
        connections = psutil.Process(pid).net_connections(kind="tcp")
    except psutil.Error:
        return False
    return any(connection.status == psutil.CONN_LISTEN for connection in connections)


def measure(
    iperf3: str,
    address: str,
    port: int,
    *,
    seconds: float,
    streams: int = 1,
    reverse: bool = False,
    udp_bit_per_s: float | None = None,
    wait_s: float = 15.0,
) -> tuple[dict[str, Any] | None, str | None]:
    """One test against a server.

    seconds        measured, of TCP after OMITTED_S more
    reverse        the server sends
    udp_bit_per_s  datagrams at this rate instead of TCP
    returns        (figures, None), or (None, the reason why there are none)
    """
    command = [iperf3, "--client", address, "--port", str(port), "--json"]
    # Whole seconds: iperf3 takes 0.5 for 0, which is no end.
    command += ["--time", str(max(1, round(seconds))), "--parallel", str(streams)]
    command += ["--reverse"] if reverse else []
    if udp_bit_per_s:  # nothing omitted: 3.12 counts what was lost in that time all the same
        command += ["--udp", "--bitrate", f"{udp_bit_per_s:.0f}"]
    else:
        command += ["--omit", str(OMITTED_S)]
    limit_s = seconds + OMITTED_S + wait_s
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit_s)
        answer = json.loads(done.stdout)
        return (udp_figures if udp_bit_per_s else tcp_figures)(answer), None
    except subprocess.TimeoutExpired:
        return None, f"iperf3 did not finish within {limit_s:.0f} s"
    except (OSError, ValueError, KeyError, IndexError) as error:
        return None, f"iperf3 failed: {error}"


def loopback(
    address: str, *, seconds: float = 2, wait_s: float = 15.0
) -> tuple[dict[str, Any] | None, str | None]:
    """TCP throughput from this machine to an address of its own, or the reason why there is none."""
    iperf3 = program()
    if iperf3 is None:
        return None, "iperf3 is not installed"
    try:
        with server(iperf3, address, wait_s=wait_s) as port:
            return measure(iperf3, address, port, seconds=seconds, wait_s=wait_s)
    except TimeoutError:
        return None, f"iperf3 did not finish within {wait_s:.0f} s"
    except OSError as error:
        return None, f"iperf3 failed: {error}"


def tcp_figures(answer: dict[str, Any]) -> dict[str, Any]:
    """What counts of iperf3's JSON; ValueError with its own words if it failed."""
    if "error" in answer:
        raise ValueError(answer["error"])
    end = answer["end"]
    sender = end["streams"][0]["sender"]
    return {
        "version": answer["start"]["version"],
        "streams": len(end["streams"]),
        "time_s": end["sum_received"]["seconds"],
        "bits_per_second": end["sum_received"]["bits_per_second"],
        "gb_per_s": end["sum_received"]["bits_per_second"] / 8e9,
        "retransmits": end["sum_sent"].get("retransmits"),
        "mean_rtt_s": sender["mean_rtt"] / 1e6 if sender.get("mean_rtt") else None,
        "congestion_control": end.get("sender_tcp_congestion"),
    }


def udp_figures(answer: dict[str, Any]) -> dict[str, Any]:
    """Loss and jitter (RFC 1889, smoothed) as the receiver saw them."""
    if "error" in answer:
        raise ValueError(answer["error"])
    end = answer["end"]["sum"]
    return {
        "bits_per_second": end["bits_per_second"],
        "lost_fraction": end["lost_percent"] / 100,
        "jitter_s": end["jitter_ms"] / 1e3,
        "datagrams": end["packets"],
    }
