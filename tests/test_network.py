"""Network figures: nccl-tests' conventions, iperf3's answers, routes."""

from __future__ import annotations

import json
import shutil
import socket
import stat
from itertools import pairwise

import psutil
import pytest
import torch
import torch.distributed as dist
from snakegpt import network
from snakegpt.errors import UserError
from snakegpt.network_interfaces import interface_towards, interface_with


@pytest.fixture
def alone(tmp_path):
    """A process group of one: enough to see what is sent and that it comes back right."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_bandwidths_are_those_of_nccl_tests():
    # doc/PERFORMANCE.md: 1 GB in 0.1 s is 10 GB/s; on 4 ranks a ring sends 2 x 3/4 of it on every link
    found = network.bandwidths(10**9, 0.1, 4)
    assert found["algbw_gb_per_s"] == pytest.approx(10)
    assert found["busbw_gb_per_s"] == pytest.approx(15)
    assert network.bandwidths(10**9, 0.1, 2)["busbw_gb_per_s"] == pytest.approx(10)


@pytest.mark.parametrize("largest", [1, 1024, 1025, 4096, 29_000_003])
def test_sizes_double_up_to_the_gradients_themselves(largest):
    sizes = network.message_sizes(largest)
    assert sizes[0] == 1024
    assert sizes[-1] == max(1024, largest - largest % 4)
    assert all(size % 4 == 0 for size in sizes)
    assert all(b == 2 * a for a, b in pairwise(sizes[:-1]))
    assert len(sizes) < 3 or sizes[-2] < sizes[-1] <= 2 * sizes[-2]


@pytest.mark.usefixtures("alone")
def test_a_curve_has_every_size_and_its_sums_are_checked():
    rows = network.all_reduce_curve("cpu", 100_000, limit_s=2)
    assert [row["bytes"] for row in rows] == network.message_sizes(100_000)
    assert all(row["n_wrong"] == 0 and row["time_s"] > 0 for row in rows)


@pytest.mark.usefixtures("alone")
def test_a_spent_limit_leaves_the_gradients_measured_once():
    rows = network.all_reduce_curve("cpu", 100_000, limit_s=-1)
    assert [(row["bytes"], row["iterations"]) for row in rows] == [(100_000, 1)]


@pytest.mark.usefixtures("alone")
def test_a_sum_that_comes_out_wrong_is_counted(monkeypatch):
    real = dist.all_reduce

    def faulty(tensor, *arguments, **named):
        real(tensor, *arguments, **named)
        if tensor.is_floating_point():
            tensor[3] += 1

    message = torch.empty(10)
    assert network._wrong_sums(message) == 0
    monkeypatch.setattr(dist, "all_reduce", faulty)
    assert network._wrong_sums(message) == 1


def test_only_what_has_a_reason_is_recommended():
    lo = interface_towards("127.0.0.1")
    environment, advice = network.recommend("gloo", 2, lo)
    assert environment == {"GLOO_SOCKET_IFNAME": lo.name}
    assert len(advice) == 1
    for backend, ranks in (("nccl", 8), ("gloo", 1)):
        environment, advice = network.recommend(backend, ranks, lo)
        assert environment == {}
        assert advice


def test_the_route_decides_the_interface():
    found = interface_towards("localhost")
    assert found.loopback
    addresses = {a.address for a in psutil.net_if_addrs()[found.name]}
    assert "127.0.0.1" in addresses
    assert found.mtu == psutil.net_if_stats()[found.name].mtu


def test_own_addresses_are_reached_over_loopback():
    own = [
        a.address
        for addresses in psutil.net_if_addrs().values()
        for a in addresses
        if a.family == socket.AF_INET and not a.address.startswith("127.")
    ]
    for address in own:
        assert interface_towards(address).loopback
        assert not interface_with(address).loopback


def test_a_name_that_does_not_resolve_is_named():
    with pytest.raises(UserError, match=r"no-such-host\.invalid does not resolve"):
        interface_towards("no-such-host.invalid")


def test_an_address_of_no_interface_is_named():
    with pytest.raises(UserError, match=r"203\.0\.113\.9"):
        interface_with("203.0.113.9")


# ---- iperf3 ----------------------------------------------------------------------------------


def test_without_iperf3_there_is_a_reason(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    assert network.iperf3("127.0.0.1") == (None, "iperf3 is not installed")


@pytest.mark.skipif(shutil.which("iperf3") is None, reason="iperf3 is not installed")
def test_iperf3_measures_loopback():
    figures, reason = network.iperf3("127.0.0.1", seconds=1)
    assert reason is None
    assert figures["gb_per_s"] * 8e9 == pytest.approx(figures["bits_per_second"])
    assert figures["bits_per_second"] > 1e8
    assert figures["time_s"] == pytest.approx(1, abs=0.3)


@pytest.mark.parametrize(
    ("client", "reason"),
    [
        ("echo not json", "iperf3 failed"),
        ('echo \'{"error": "unable to connect"}\'', "unable to connect"),
        ("sleep 30", "did not finish"),
    ],
)
def test_an_iperf3_that_fails_gives_its_reason(tmp_path, monkeypatch, client, reason):
    program = tmp_path / "iperf3"
    # A server that listens, so that the client is started.
    serve = "import socket, sys, time; s = socket.create_server(('127.0.0.1', int(sys.argv[1]))); time.sleep(30)"
    program.write_text(
        '#!/bin/sh\nif [ "$1" = --server ]; then shift 5; exec python3 -c '
        f'"{serve}" "$1"; fi\n{client}\n'
    )
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    figures, found = network.iperf3("127.0.0.1", seconds=0, wait_s=3)
    assert figures is None
    assert reason in found


def test_figures_of_iperf3_are_read_from_its_json():
    answer = json.loads("""{"start": {"version": "iperf 3.12"}, "end": {
      "streams": [{"sender": {"mean_rtt": 1500}}], "sender_tcp_congestion": "cubic",
      "sum_sent": {"retransmits": 7}, "sum_received": {"seconds": 2.0, "bits_per_second": 8e9}}}""")
    found = network._iperf3_figures(answer)
    assert found["gb_per_s"] == pytest.approx(1.0)
    assert found["mean_rtt_s"] == pytest.approx(0.0015)
    assert found["retransmits"] == 7


def test_findings_are_written_out():
    row = {"bytes": 498_000_000, "time_s": 1.3149, "busbw_gb_per_s": 0.378736}
    takes, best = network.findings(498_000_000, [row], 0.00131)
    assert "(498.0 MB) takes 1,310 ms" in takes
    assert "the smallest message takes 1,310 µs" in takes
    assert "0.379 GB/s, at messages of 498,000,000 bytes" in best
