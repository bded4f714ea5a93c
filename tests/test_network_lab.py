"""bench_network on wires of known rate, delay and loss, drawn at random: figures, names and advice are right.

Each run says its draw: SNAKEGPT_TEST_SEED repeats one.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time

import pytest
from network_lab import BUCKET_S, Lab, delayed_pair, missing
from train_fixtures import tokens

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(missing() is not None, reason=f"network lab: {missing()}"),
]
needs_iperf3 = pytest.mark.skipif(
    missing("iperf3") is not None, reason=f"network lab: {missing('iperf3')}"
)
needs_nft = pytest.mark.skipif(missing("nft") is not None, reason=f"network lab: {missing('nft')}")

SEED = int(os.environ.get("SNAKEGPT_TEST_SEED", time.time_ns() % 10**6))
# 4 x (50,304 x 64 + 32 x 64 + 12 x 64^2 + 13 x 64 + 2 x 64) bytes: 13 MB of gradients
MODEL = {"layers": 1, "heads": 2, "channels": 64, "context": 32}
# What Ethernet, IP and TCP with timestamps leave of the wire's rate at an MTU of 1,500.
PAYLOAD = 1448 / 1514


@pytest.fixture
def draw():
    print(f"SNAKEGPT_TEST_SEED={SEED}")
    return random.Random(SEED)


def arguments(out, **execution):
    how = {"device": "cpu", "ranks_per_node": 1, "network_test_s": 1, "threads": 1, **execution}
    return ["--settings", json.dumps({"model": MODEL}), "--execution", json.dumps(how),
            "--out", str(out)]  # fmt: skip


def measured(lab, out, **options):
    ends = lab.run_everywhere(arguments(out, **options.pop("execution", {})), **options)
    assert [status for status, _ in ends] == [0] * len(ends), ends
    return json.loads((out / "network.json").read_text(encoding="utf-8"))


@needs_iperf3
def test_rates_of_a_shaped_wire_are_found(draw, tmp_path):
    rate = draw.uniform(5e7, 1e9)
    with Lab(2) as lab:
        for node in (1, 2):
            lab.shape(node, "eth0", rate)
        found = measured(lab, tmp_path, execution={"network_test_s": 2})
    (link,) = found["links"]
    assert link["method"] == "iperf3"
    assert link["mtu"] == 1500
    for name in ("up", "down", "up_4_streams"):
        assert link[name]["bits_per_second"] == pytest.approx(PAYLOAD * rate, rel=0.1), name
    bus = 8e9 * max(row["busbw_gb_per_s"] for row in found["all_reduce"])
    assert bus == pytest.approx(PAYLOAD * rate, rel=0.15)
    assert all(row["n_wrong"] == 0 for row in found["all_reduce"])
    assert found["ranks"] == 2


@needs_iperf3
def test_the_slow_node_of_three_is_named(draw, tmp_path):
    slow = draw.randint(1, 3)
    fast_rate, slow_rate = draw.uniform(4e8, 9e8), draw.uniform(5e7, 2e8)
    with Lab(3) as lab:
        for node in (1, 2, 3):
            lab.shape(node, "eth0", slow_rate if node == slow else fast_rate)
        found = measured(lab, tmp_path)
    sends = [line for line in found["warnings"] if "is slow: it sends" in line]
    assert len(sends) == 1
    assert sends[0].startswith(f"node{slow} ")
    bus = 8e9 * max(row["busbw_gb_per_s"] for row in found["all_reduce"])
    assert bus == pytest.approx(PAYLOAD * slow_rate, rel=0.2)  # the slowest wire sets the pace


@needs_iperf3
@pytest.mark.parametrize("slower", ["eth0", "eth1"])
def test_the_slower_interface_is_not_advised(draw, tmp_path, slower):
    """The nodes' names and their meeting are on eth0, so that is what gloo takes by itself."""
    slow_rate = draw.uniform(5e7, 1.5e8)
    fast_rate = slow_rate * draw.uniform(2, 4)
    with Lab(2, networks=("eth0", "eth1")) as lab:
        for node in (1, 2):
            for network in ("eth0", "eth1"):
                lab.shape(node, network, slow_rate if network == slower else fast_rate)
        found = measured(lab, tmp_path)
    advised = found["environment"].get("GLOO_SOCKET_IFNAME")
    assert advised == ("eth1" if slower == "eth0" else None), found["trials"]
    assert {trial["name"] for trial in found["trials"]} == {
        "defaults",
        "network 10.77.0.0/24",
        "network 10.78.0.0/24",
    }


CLIENT = """
import json, sys
from snakegpt.network.links import measure_link
print(json.dumps(measure_link(sys.argv[1], 29510, False, 0.5)))
"""
SERVER = """
import sys, time
from snakegpt.network.links import serving
with serving(sys.argv[1], 29510, False):
    print("ready", flush=True)
    time.sleep(100)
"""


@pytest.mark.skipif(not os.path.exists("/dev/net/tun"), reason="network lab: no /dev/net/tun")
def test_the_delay_of_a_wire_is_found(draw):
    delay_s = draw.uniform(0.003, 0.03)
    with delayed_pair(delay_s) as (a, b):
        inside = ["ip", "netns", "exec", b, sys.executable, "-c", SERVER, "10.79.0.2"]
        with subprocess.Popen(inside, stdout=subprocess.PIPE, text=True) as server:
            try:
                assert server.stdout and server.stdout.readline() == "ready\n"
                command = ["ip", "netns", "exec", a, sys.executable, "-c", CLIENT, "10.79.0.2"]
                done = subprocess.run(command, capture_output=True, text=True, timeout=100)
            finally:
                server.kill()
    assert done.returncode == 0, done.stderr
    trip_s = json.loads(done.stdout)["latency_s"]["p50"]
    assert trip_s == pytest.approx(2 * delay_s, rel=0.15)


@needs_iperf3
@needs_nft
def test_loss_shows_in_segments_sent_again_and_in_datagrams(draw, tmp_path):
    share = draw.uniform(0.02, 0.05)
    with Lab(2) as lab:
        for node in (1, 2):
            lab.shape(node, "eth0", 2e8)
        lab.lose(2, share)
        found = measured(lab, tmp_path, execution={"network_udp_mbit": 50})
    (link,) = found["links"]
    assert any("node1 to node2" in line and "sent again" in line for line in found["warnings"])
    # Some 4,300 datagrams: a third of the share is three of its standard deviations or more.
    assert link["udp"]["lost_fraction"] == pytest.approx(share, rel=0.33)


# For a rank: computing takes the same time on any machine, however busy: 8 ms a row.
STEADY = """
import os
if "RANK" in os.environ:
    import time
    from snakegpt.updates import Updates
    losses = Updates._losses
    def steadily(self, network, ids_BT, *rest):
        time.sleep(0.008 * len(ids_BT))
        return losses(self, network, ids_BT, *rest)
    Updates._losses = steadily
"""


def test_the_verdict_follows_the_wire(draw, tmp_path):
    """Wires whose exchanges take a known multiple of the time that computing takes."""
    (tmp_path / "hook").mkdir()
    (tmp_path / "hook/sitecustomize.py").write_text(STEADY)
    paths = f"{tmp_path}/hook:{os.environ.get('PYTHONPATH', '')}"
    settings = {"model": MODEL, "training": {"batch_tokens": 512, "steps": 100, "warmup_steps": 1}}
    words = ["--tokens", str(tokens(tmp_path / "tokens")), "--settings", json.dumps(settings)]
    how = {"device": "cpu", "ranks_per_node": 1, "threads": 1}
    words += ["--execution", json.dumps(how), "--out", str(tmp_path)]

    def scaled():
        environment = {"PYTHONPATH": paths}
        ends = lab.run_everywhere(words, stage="measure_scaling", environment=environment)
        assert [status for status, _ in ends] == [0, 0], ends
        return json.loads((tmp_path / "scaling.json").read_text(encoding="utf-8"))

    with Lab(2) as lab:
        free = scaled()
        assert free["verdict"]["kind"] == "fine", free
        # A ring of two sends 2 x 1/2 of the gradients over each link.
        n_bits, compute_s = 8 * free["gradient_bytes"], free["strong"][-1]["compute_s"]
        for kind, times in (("accumulate", draw.uniform(0.2, 0.4)), ("wire", draw.uniform(1.5, 3))):
            # What the bucket has gathered while ranks computed goes at once.
            rate = n_bits / (times * compute_s + BUCKET_S) / PAYLOAD
            for node in (1, 2):
                lab.shape(node, "eth0", rate)
            found = scaled()
            assert found["verdict"]["kind"] == kind, (times, found)
            share = found["verdict"]["communication_share"]
            assert share == pytest.approx(times / (1 + times), rel=0.35)


# ---- what keeps nodes apart ------------------------------------------------------------------


def test_nodes_without_a_route_say_so(tmp_path):
    with Lab(2) as lab:
        ends = lab.run_everywhere(arguments(tmp_path), host="192.0.2.1", skip=(1,), limit_s=60)
    ((status, output),) = ends
    assert status == 2
    assert "no route leads to 192.0.2.1:29500: Network is unreachable" in output
    assert "Traceback" not in output


@needs_nft
def test_ports_blocked_between_nodes_are_named(tmp_path):
    """The meeting works, and so would nothing after it."""
    with Lab(2) as lab:
        lab.block(2, "29501-32000")  # below what the kernel gives to clients
        ends = lab.run_everywhere(arguments(tmp_path), limit_s=120)
    for status, output in ends:
        assert status == 2, output
        assert "node1 does not reach node2: 10.77.0.12:29510: timed out" in output
        assert "Traceback" not in output


def test_an_interface_that_does_not_exist_is_named(tmp_path):
    with Lab(2) as lab:
        environment = {"GLOO_SOCKET_IFNAME": "eth7"}
        ends = lab.run_everywhere(arguments(tmp_path), environment=environment, limit_s=60)
    for status, output in ends:
        assert status == 2
        assert "has no interface eth7. Nearest valid name: eth0" in output


def test_nodes_with_different_torch_are_refused(tmp_path):
    """Node 2 finds a torch that says another version of itself."""
    hook = tmp_path / "hook"
    hook.mkdir()
    (hook / "sitecustomize.py").write_text(
        "import os, socket\n"
        "if socket.gethostname() == 'node2':\n"
        "    import torch\n"
        "    torch.__version__ = '1.0.0'\n"
    )
    path = f"{hook}:{os.environ.get('PYTHONPATH', '')}"
    with Lab(2) as lab:
        ends = lab.run_everywhere(arguments(tmp_path), environment={"PYTHONPATH": path}, limit_s=90)
    for status, output in ends:
        assert status == 2
        assert "nodes differ in torch" in output
        assert "1.0.0 on node2" in output
