"""Network figures: nccl-tests' conventions, iperf3's answers, routes, rounds of pairs, advice."""

from __future__ import annotations

import itertools
import json
import shutil
import socket
import stat
import threading
from itertools import pairwise
from types import SimpleNamespace

import psutil
import pytest
import torch
import torch.distributed as dist
from snakegpt.errors import UserError
from snakegpt.network import advice, bench, collectives, iperf, links, nodes
from snakegpt.network.advice import Candidate
from snakegpt.network.interfaces import (
    devices,
    interface_towards,
    interface_with,
    rdma_ports,
    require_known,
)
from snakegpt.nodes import Place
from snakegpt.outcomes import Outcome


@pytest.fixture
def alone(tmp_path):
    """A process group of one: enough to see what is sent and that it comes back right."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


# ---- collectives -----------------------------------------------------------------------------


def test_bandwidths_are_those_of_nccl_tests():
    # doc/PERFORMANCE.md: 1 GB in 0.1 s is 10 GB/s; on 4 ranks a ring sends 2 x 3/4 of it on every link,
    # and half of that where data goes round once
    for name, on_four in (("all_reduce", 15), ("reduce_scatter", 7.5), ("all_gather", 7.5)):
        found = collectives.bandwidths(name, 10**9, 0.1, 4)
        assert found["algbw_gb_per_s"] == pytest.approx(10)
        assert found["busbw_gb_per_s"] == pytest.approx(on_four)
    assert collectives.bandwidths("all_reduce", 10**9, 0.1, 2)["busbw_gb_per_s"] == pytest.approx(
        10
    )


@pytest.mark.parametrize("ranks", [1, 3, 7, 1000])
@pytest.mark.parametrize("largest", [1, 1024, 1025, 4096, 29_000_003])
def test_sizes_double_up_to_the_gradients_themselves(largest, ranks):
    sizes = collectives.message_sizes(largest, ranks)
    unit = 4 * ranks
    least = -(-1024 // unit) * unit
    assert sizes[-1] == max(least, largest - largest % unit)
    assert sizes[0] == min(least, sizes[-1])
    assert all(size % unit == 0 for size in sizes)
    assert all(b == 2 * a for a, b in pairwise(sizes[:-1]))
    assert len(sizes) < 2 or sizes[-2] < sizes[-1] <= 2 * sizes[-2]


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("collective", ["all_reduce", "reduce_scatter", "all_gather"])
def test_a_curve_has_every_size_and_its_sums_are_checked(collective):
    rows = collectives.curve(collective, "cpu", 100_000, limit_s=2)
    assert [row["bytes"] for row in rows] == collectives.message_sizes(100_000)
    assert all(row.get("n_wrong", 0) == 0 and row["time_s"] > 0 for row in rows)


@pytest.mark.usefixtures("alone")
def test_a_spent_limit_leaves_the_gradients_measured_once():
    rows = collectives.curve("all_reduce", "cpu", 100_000, limit_s=-1)
    assert [(row["bytes"], row["iterations"]) for row in rows] == [(100_000, 1)]


@pytest.mark.usefixtures("alone")
def test_a_sum_that_comes_out_wrong_is_counted(monkeypatch):
    real = dist.all_reduce

    def faulty(tensor, *arguments, **named):
        real(tensor, *arguments, **named)
        if tensor.is_floating_point():
            tensor[3] += 1

    message = torch.empty(10)
    assert collectives._wrong_sums(message) == 0
    monkeypatch.setattr(dist, "all_reduce", faulty)
    assert collectives._wrong_sums(message) == 1


# ---- interfaces ------------------------------------------------------------------------------


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


def test_a_name_that_is_only_this_machine_to_itself_is_left_to_what_others_know_it_by(monkeypatch):
    """Debian's /etc/hosts: on node 0 its own name is 127.0.1.1, which leads nowhere from elsewhere."""
    found = interface_with("127.0.1.1")
    assert (found.name, found.loopback) == (interface_with("127.0.0.1").name, True)
    own = {a.address for addresses in psutil.net_if_addrs().values() for a in addresses}
    real = socket.getaddrinfo
    monkeypatch.setattr(
        socket, "getaddrinfo", lambda h, *a, **k: real("127.0.1.1" if h == "debian" else h, *a, **k)
    )
    others = sorted(a for a in own if a.count(".") == 3 and not a.startswith("127."))
    told = (others or ["127.0.0.1"])[0]
    said = []

    def share(name, value):
        said.append(value)
        return ["", told]

    meeting = SimpleNamespace(place=Place(0, 2, "debian", 1), share=share)
    assert interface_with(bench._own_address(meeting)).address == told
    meeting.place = Place(1, 2, "debian", 1)  # of the same machine
    assert bench._own_address(meeting) == "127.0.0.1"
    assert said == ["", "127.0.1.1"]


def test_a_name_that_does_not_resolve_is_named():
    with pytest.raises(UserError, match=r"no-such-host\.invalid does not resolve"):
        interface_towards("no-such-host.invalid")


def test_an_address_of_no_interface_is_named():
    with pytest.raises(UserError, match=r"203\.0\.113\.9"):
        interface_with("203.0.113.9")


# ---- iperf3 ----------------------------------------------------------------------------------


def test_without_iperf3_there_is_a_reason(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    assert iperf.loopback("127.0.0.1") == (None, "iperf3 is not installed")


@pytest.mark.skipif(shutil.which("iperf3") is None, reason="iperf3 is not installed")
def test_iperf3_measures_loopback():
    figures, reason = iperf.loopback("127.0.0.1", seconds=1)
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
        '#!/bin/sh\nif [ "$1" = --server ]; then shift 4; exec python3 -c '
        f'"{serve}" "$1"; fi\n{client}\n'
    )
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    figures, found = iperf.loopback("127.0.0.1", seconds=0, wait_s=3)
    assert figures is None
    assert reason in found


def test_figures_of_iperf3_are_read_from_its_json():
    answer = json.loads("""{"start": {"version": "iperf 3.12"}, "end": {
      "streams": [{"sender": {"mean_rtt": 1500}}], "sender_tcp_congestion": "cubic",
      "sum_sent": {"retransmits": 7}, "sum_received": {"seconds": 2.0, "bits_per_second": 8e9}}}""")
    found = iperf.tcp_figures(answer)
    assert found["gb_per_s"] == pytest.approx(1.0)
    assert found["mean_rtt_s"] == pytest.approx(0.0015)
    assert found["retransmits"] == 7


def test_findings_are_written_out():
    row = {"bytes": 498_000_000, "time_s": 1.3149, "busbw_gb_per_s": 0.378736}
    takes, best = advice.findings(498_000_000, [row], 0.00131)
    assert "(498.0 MB) takes 1,310 ms" in takes
    assert "the smallest message takes 1,310 µs" in takes
    assert "0.379 GB/s, at messages of 498,000,000 bytes" in best


# ---- interfaces as sysfs has them ------------------------------------------------------------


def test_rdma_ports_are_read_from_sysfs_and_named_as_nccl_wants_them(tmp_path):
    for device, port, state in (("mlx5_0", 1, "4: ACTIVE"), ("mlx5_10", 2, "1: DOWN")):
        folder = tmp_path / "class/infiniband" / device / "ports" / str(port)
        folder.mkdir(parents=True)
        for name, text in {"state": state, "link_layer": "Ethernet", "rate": "100 Gb/sec"}.items():
            (folder / name).write_text(f"{text}\n")
    (tmp_path / "class/infiniband/mlx5_0/device/net/ens1").mkdir(parents=True)
    first, second = rdma_ports(tmp_path)
    assert first == {
        "name": "mlx5_0:1",
        "state": "ACTIVE",
        "link_layer": "Ethernet",
        "rate": "100 Gb/sec",
        "interface": "ens1",
    }
    assert (second["name"], second["state"], second["interface"]) == ("mlx5_10:2", "DOWN", None)
    assert rdma_ports(tmp_path / "nowhere") == []


def test_devices_carry_their_networks():
    lo = next(device for device in devices() if "127.0.0.1/8" in device.networks)
    assert lo.kind == "loopback"
    assert lo.up


@pytest.mark.parametrize(
    ("variable", "value", "known"),
    [
        ("GLOO_SOCKET_IFNAME", "{lo}", True),
        ("GLOO_SOCKET_IFNAME", "{lo},nope0", False),
        ("NCCL_SOCKET_IFNAME", "={lo}x", False),
        ("NCCL_SOCKET_IFNAME", "^nope0", True),  # what is to be left out need not be there
        ("NCCL_SOCKET_IFNAME", "nope", False),
        ("NCCL_SOCKET_IFNAME", "", True),
    ],
)
def test_interfaces_that_do_not_exist_are_refused(variable, value, known):
    value = value.format(lo=interface_towards("127.0.0.1").name)
    if known:
        require_known({variable: value})
    else:
        with pytest.raises(UserError, match=variable):
            require_known({variable: value})


# ---- links -----------------------------------------------------------------------------------


@pytest.mark.parametrize("n", range(2, 13))
def test_rounds_measure_every_pair_once_and_no_node_twice_at_a_time(n):
    rounds = links.rounds(n)
    for pairs in rounds:
        ends = [node for pair in pairs for node in pair]
        assert len(ends) == len(set(ends))
    found = [frozenset(pair) for pairs in rounds for pair in pairs]
    if n <= links.ALL_PAIRS_UP_TO:
        expected = {frozenset(pair) for pair in itertools.combinations(range(n), 2)}
        assert len(rounds) == n - 1 + n % 2
    else:
        expected = {frozenset((k, (k + 1) % n)) for k in range(n)}
        assert len(rounds) == 2 + n % 2
    assert len(found) == len(expected)
    assert set(found) == expected


HAS_IPV6 = any(a.address == "::1" for of in psutil.net_if_addrs().values() for a in of)


@pytest.mark.parametrize(
    "address",
    ["127.0.0.1", pytest.param("::1", marks=pytest.mark.skipif(not HAS_IPV6, reason="no IPv6"))],
)
def test_without_iperf3_plain_tcp_measures_and_says_so(address):
    port = free_port(address)
    with links.serving(address, port, by_iperf3=False):
        row = links.measure_link(address, port, by_iperf3=False, seconds=0.5)
    assert "plain TCP" in row["method"]
    assert row["reason"] == {}
    assert row["up"]["bits_per_second"] > 1e7
    assert row["down"]["bits_per_second"] > 1e7
    trips = row["latency_s"]
    assert 0 < trips["min"] <= trips["p50"] <= trips["p90"] <= trips["p99"] <= trips["max"]
    if address == "127.0.0.1":
        loopback = interface_towards("127.0.0.1").mtu
        assert row["mtu"] == min(loopback, 65_535)  # which is all that an IPv4 packet can be


def free_port(address="127.0.0.1"):
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family) as probe:
        probe.bind((address, 0))
        return probe.getsockname()[1]


def test_datagrams_that_were_asked_for_are_not_left_out_silently():
    port = free_port()
    with links.serving("127.0.0.1", port, by_iperf3=False):
        row = links.measure_link("127.0.0.1", port, False, 0.3, udp_bit_per_s=1e6)
    assert row["reason"] == {"udp": "iperf3 is not installed on both nodes"}


@pytest.mark.parametrize(("failures", "told"), [(2, None), (3, "unable to read from stream")])
def test_datagrams_are_tried_again_since_the_first_may_be_lost(monkeypatch, failures, told):
    tried = []

    def measure(program, address, port, *, seconds, udp_bit_per_s=None, **options):
        tried.append(udp_bit_per_s)
        if udp_bit_per_s and tried.count(udp_bit_per_s) <= failures:
            return None, "iperf3 failed: unable to read from stream"
        return {"bits_per_second": udp_bit_per_s}, None

    monkeypatch.setattr(links.iperf, "measure", measure)
    monkeypatch.setattr(links.iperf, "program", lambda: "iperf3")
    port = free_port()
    with links.serving("127.0.0.1", port, by_iperf3=False):
        row = links.measure_link("127.0.0.1", port, True, 0.3, udp_bit_per_s=1e6)
    assert tried.count(1e6) == 3
    assert tried.count(None) == 3  # TCP sends again by itself
    assert (row["udp"] is None) == bool(told)
    assert told is None or told in row["reason"]["udp"]


def test_a_rate_that_cannot_be_counted_is_missing_with_its_reason(monkeypatch):
    monkeypatch.setattr(links, "_send_for", lambda connection, seconds: None)
    port = free_port()
    with links.serving("127.0.0.1", port, by_iperf3=False):
        row = links.measure_link("127.0.0.1", port, by_iperf3=False, seconds=0.2)
    assert row["up"] is row["down"] is None
    assert all("too little arrived" in row["reason"][way] for way in ("up", "down"))
    json.dumps(row, allow_nan=False)


def test_a_port_that_is_taken_is_named():
    port = free_port()
    with (
        socket.create_server(("127.0.0.1", port)),
        pytest.raises(
            UserError, match=rf"cannot listen at 127.0.0.1, port {port}(.|\n)*another port"
        ),
        links.serving("127.0.0.1", port, by_iperf3=False),
    ):
        pass


def test_plain_tcp_counts_what_arrives(monkeypatch):
    """The sender sends 40 chunks of 1 MiB, one every 25 ms: 42 MB/s, whatever the machine can do."""

    def slowly(connection, seconds):
        for _ in range(40):
            connection.sendall(links.CHUNK)
            threading.Event().wait(0.025)

    monkeypatch.setattr(links, "_send_for", slowly)
    a, b = socket.socketpair()
    sender = threading.Thread(target=lambda: (slowly(a, 1), a.close()))
    sender.start()
    rate = links._receive_rate(b, 1.0)
    sender.join()
    assert 8 * 5 * len(links.CHUNK) < rate < 8 * 60 * len(links.CHUNK)  # a busy machine is late


def test_a_link_that_nobody_serves_gives_its_reason():
    port = free_port()
    row = links.measure_link("127.0.0.1", port, by_iperf3=False, seconds=0.5)
    assert "refused" in row["reason"]["latency"]
    assert "up" not in row


# ---- advice ----------------------------------------------------------------------------------


def candidate(name="eth0"):
    return Candidate(name, [{"GLOO_SOCKET_IFNAME": name}], "the route leads through it")


@pytest.mark.parametrize(
    ("default", "other", "wins"),
    [
        ([1.0], [1.04], False),
        ([1.0], [1.06], True),
        ([1.0, 1.2], [1.1, 1.3], False),  # its worst against the defaults' best
        ([1.0, 1.01], [1.2, 1.1], True),
        ([], [0.1], True),  # the defaults failed
        ([1.0], [], False),
    ],
)
def test_a_setting_is_advised_only_when_it_wins(default, other, wins):
    chosen, reasons = advice.choose([(None, default), (candidate(), other)])
    assert (chosen is not None) == wins
    assert bool(reasons) == bool(other)
    assert all("GLOO_SOCKET_IFNAME=eth0" in reason for reason in reasons)


def test_the_better_of_two_settings_is_advised():
    chosen, reasons = advice.choose(
        [(None, [1.0]), (candidate("slow0"), [1.2]), (candidate("fast0"), [2.0])]
    )
    assert chosen and chosen.name == "fast0"
    assert "2 times" in reasons[0] or "2.00 times" in reasons[0]


def node(host, networks, interface="eth0", **more):
    """An inventory with interfaces as {name: address with prefix}."""
    described = [
        {"name": name, "up": True, "kind": "ethernet", "networks": [text]}
        for name, text in networks.items()
    ]
    return {
        "host": host,
        "devices": described,
        "interface": {"name": interface, "mtu": 1500, "speed_mbit_per_s": 1000},
        "rdma_ports": [],
        "gpus": [],
        "gpu_topology": None,
        "cores": 64,
        "numa_nodes": 2,
        "locked_memory_bytes": None,
        "versions": dict.fromkeys(advice.VERSIONS, "1"),
        "speed": {
            "matmul_flops_per_s": 1e12,
            "host_to_device_gb_per_s": None,
            "disk_read_gb_per_s": 1.0,
        },
        **more,
    }


def test_only_networks_that_all_nodes_share_are_tried():
    nodes_of = [
        node("a", {"eth0": "10.0.0.1/24", "eth1": "10.1.0.1/24", "docker0": "172.17.0.1/16"}),
        node("b", {"ens5": "10.0.0.2/24", "docker0": "172.17.0.1/16"}, interface="ens5"),
    ]
    (found,) = advice.candidates("nccl", nodes_of, [])
    assert found.environments == [
        {"GLOO_SOCKET_IFNAME": "eth0", "NCCL_SOCKET_IFNAME": "=eth0"},
        {"GLOO_SOCKET_IFNAME": "ens5", "NCCL_SOCKET_IFNAME": "=ens5"},
    ]
    assert "route" in found.reason


def test_socket_threads_are_tried_only_where_streams_gain_and_there_is_no_rdma():
    pair = [node("a", {"e": "10.0.0.1/24"}), node("b", {"e": "10.0.0.2/24"})]

    def names(gain, nodes_of, backend="nccl"):
        link = {"up": {"bits_per_second": 1e9}, "up_4_streams": {"bits_per_second": gain * 1e9}}
        return [c.name for c in advice.candidates(backend, nodes_of, [link])]

    assert "socket threads" in names(1.5, pair)
    assert "socket threads" not in names(1.1, pair)
    assert "socket threads" not in names(1.5, pair, "gloo")
    for each in pair:
        each["rdma_ports"] = [
            {"name": "mlx5_0:1", "state": "ACTIVE"},
            {"name": "mlx5_1:1", "state": "DOWN"},
        ]
    assert "socket threads" not in names(1.5, pair)
    assert "active RDMA ports" in names(1.5, pair)
    found = advice.candidates("nccl", pair, [])[-1]
    assert found.environments[0] == {"NCCL_IB_HCA": "=mlx5_0:1"}


def test_sockets_are_tried_against_rdma_where_there_is_any():
    """On some nodes alone RDMA may keep all of them from talking."""
    pair = [node("a", {"e": "10.0.0.1/24"}), node("b", {"f": "10.0.0.2/24"}, interface="f")]
    disabling = [c for c in advice.candidates("nccl", pair, []) if "IB_DISABLE" in str(c)]
    assert disabling == []
    pair[1]["rdma_ports"] = [{"name": "mlx5_0:1", "state": "ACTIVE"}]
    (found,) = (c for c in advice.candidates("nccl", pair, []) if "IB_DISABLE" in str(c))
    assert found.environments == [
        {"GLOO_SOCKET_IFNAME": name, "NCCL_SOCKET_IFNAME": f"={name}", "NCCL_IB_DISABLE": "1"}
        for name in ("eth0", "f")
    ]
    assert "active on b" in found.reason
    assert not any("IB_DISABLE" in str(c) for c in advice.candidates("gloo", pair, []))


def test_versions_that_differ_are_errors_or_warnings_by_kind():
    same = [node(host, {}) for host in "ab"]
    assert advice.differences(same) == []
    for what, kind in advice.VERSIONS.items():
        other = node("b", {})
        other["versions"][what] = "2"
        ((found, text),) = advice.differences([node("a", {}), other])
        assert found == kind
        assert text == f"nodes differ in {what}: 1 on a; 2 on b"


def test_machines_of_one_name_are_told_apart():
    other = node("localhost", {})
    other["versions"]["torch"] = "2"
    ((kind, text),) = advice.differences([node("localhost", {}), other])
    assert kind == "error"
    assert text == "nodes differ in torch: 1 on node 0 (localhost); 2 on node 1 (localhost)"


IB = {"name": "mlx5_0:1", "state": "ACTIVE", "link_layer": "InfiniBand", "rate": "400 Gb/sec"}


@pytest.mark.parametrize(
    ("more", "text"),
    [
        ({"cores": 32}, "cores: 64 on a, c; 32 on b"),
        ({"numa_nodes": 1}, "NUMA nodes: 2 on a, c; 1 on b"),
        ({"gpu_topology": "NV18"}, "GPU topology (nvidia-smi topo -m): none on a, c; kind 2 on b"),
        (
            {"rdma_ports": [IB, IB | {"name": "mlx5_1:1"}, IB | {"state": "DOWN"}]},
            "RDMA ports: none active on a, c; 2 x InfiniBand 400 Gb/sec on b",
        ),
        (
            {"interface": {"name": "eth0", "mtu": 1500, "speed_mbit_per_s": 100}},
            "speed of the interface towards node 0: 1Gbit/s on a, c; 100Mbit/s on b",
        ),
        (
            {"interface": {"name": "eth0", "mtu": 9000, "speed_mbit_per_s": 1000}},
            "MTU towards node 0: 1500 on a, c; 9000 on b",
        ),
    ],
)
def test_nodes_that_are_built_differently_are_a_warning(more, text):
    three = [node("a", {}), node("b", {}) | more, node("c", {})]
    assert advice.differences(three) == [("warning", f"nodes differ in {text}")]


def link(a, b, up, down, rtt=1e-4, **more):
    return {
        "from": a,
        "to": b,
        "up": {"bits_per_second": up, "retransmits": 0, "time_s": 2},
        "down": {"bits_per_second": down, "retransmits": 0, "time_s": 2},
        "latency_s": {"p50": rtt},
        "reason": {},
        **more,
    }


def test_a_node_that_stands_out_is_named_and_its_peers_are_not():
    three = [node(host, {}) for host in "abc"]
    fast = [link(0, 1, 1e9, 1e9), link(0, 2, 1e9, 1e9), link(1, 2, 1e9, 1e9)]
    assert advice.slow_nodes(three, fast) == []
    slow = [link(0, 1, 1e9, 1e9), link(0, 2, 1e9, 2e8), link(1, 2, 1e9, 2e8)]
    (line,) = advice.slow_nodes(three, slow)
    assert line.startswith("c is slow: it sends 200Mbit/s, the others 1Gbit/s")
    far = [link(0, 1, 1e9, 1e9), link(0, 2, 1e9, 1e9, 5e-3), link(1, 2, 1e9, 1e9, 5e-3)]
    (line,) = advice.slow_nodes(three, far)
    assert line.startswith("c is far: a round trip takes 5 ms")
    three[1]["speed"]["matmul_flops_per_s"] = 5e11
    (line,) = advice.slow_nodes(three, fast)
    assert line.startswith("b is slow: it multiplies matrices at 500GFLOP/s, the others 1TFLOP/s")


def test_loss_and_unkept_promises_are_found():
    pair = [node(host, {}) for host in "ab"]
    assert advice.link_findings(pair, [link(0, 1, 9e8, 9e8)]) == []
    lossy = link(0, 1, 9e8, 9e8)
    lossy["down"]["retransmits"] = 100
    (line,) = advice.link_findings(pair, [lossy])
    assert line.startswith("b to a: 50 segments a second sent again")
    (line,) = advice.link_findings(pair, [link(0, 1, 9e8, 1e8)])
    assert "1 of 2 directions" in line
    assert "b to a 100Mbit/s of eth0's 1Gbit/s" in line


# ---- nodes -----------------------------------------------------------------------------------


def test_an_inventory_says_what_this_machine_has(tmp_path):
    found = nodes.inventory(interface_towards("127.0.0.1"), tmp_path)
    assert found["versions"]["torch"] == torch.__version__
    assert found["cores"] == psutil.cpu_count()
    assert found["numa_nodes"] == 1
    assert json.loads(json.dumps(found))["address"] == "127.0.0.1"  # plain JSON


def test_the_disk_is_read_whole_and_left_clean(tmp_path):
    rate = nodes.disk_read(tmp_path, 8 << 20)
    assert rate is None or rate > 0.001
    assert list(tmp_path.iterdir()) == []
    assert nodes.disk_read(tmp_path / "nowhere", 8 << 20) is None


# ---- trials ----------------------------------------------------------------------------------


def test_a_node_that_hangs_before_a_trial_is_not_waited_for_as_torchrun_would(
    monkeypatch, tmp_path
):
    """Its 15 minutes are more than a bench_network job may take."""
    bounds = []

    def run_ranks(*arguments, start_timeout_s, **named):
        bounds.append(start_timeout_s)
        return Outcome(1, "node 0 (a): timed out")

    monkeypatch.setattr(bench, "run_ranks", run_ranks)
    pair = [node("a", {}), node("b", {})]
    task = SimpleNamespace(ranks=1, threads=1, module="m", arguments=[], backend="gloo")
    meeting = SimpleNamespace(place=Place(0, 2, "a", 1), share=lambda name, mine, wait_s: [mine])
    with pytest.raises(UserError, match="cannot exchange anything: node 0"):
        bench.Trials(task, meeting, pair, [], lambda text: None).run()
    assert bounds and max(bounds) < bench.SLOWEST_TRIAL_S / 2
