"""Nodes that meet: what each says arrives, and whoever does not come or answer is named in bounded time."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
from snakegpt.errors import UserError
from snakegpt.network import meeting as meetings
from snakegpt.network.meeting import Meeting, require_reachable, told_to_all
from snakegpt.nodes import Place, place_of


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def each_in_a_thread(nodes, work, wait_s=10.0, absent=()):
    """`work(meeting)` on all nodes but the absent; returns what each gave or raised."""
    port = free_port()
    found = {}

    def run(node):
        try:
            met = Meeting(Place(node, nodes, "127.0.0.1", port), wait_s)
            found[node] = work(met)
            met.close()
        except UserError as error:
            found[node] = error

    threads = [threading.Thread(target=run, args=(k,)) for k in range(nodes) if k not in absent]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return found


def test_what_each_node_says_reaches_all():
    found = each_in_a_thread(3, lambda met: met.share("square", met.place.node**2))
    assert found == {node: [0, 1, 4] for node in range(3)}


def test_a_meeting_of_one_needs_no_port():
    met = Meeting(Place(0, 1, "nowhere.invalid", 1))
    assert met.share("x", {"a": 1}) == [{"a": 1}]


def test_a_node_that_does_not_come_is_named():
    started = time.monotonic()
    found = each_in_a_thread(3, lambda met: None, wait_s=1.0, absent=(2,))
    assert time.monotonic() - started < 20
    for node in (0, 1):
        assert "no answer from node 2 within 1 s (name)" in str(found[node])


def test_a_node_that_hangs_is_named_with_its_host():
    def work(met):
        if met.place.node == 1:
            time.sleep(3)
            return None
        return met.share("disk", met.place.node, wait_s=1)

    found = each_in_a_thread(2, work)
    assert f"no answer from node 1 ({socket.gethostname()}) within 1 s (disk)" in str(found[0])


LEADS = """
import sys, time
from snakegpt.nodes import Place
from snakegpt.network.meeting import Meeting
met = Meeting(Place(0, 2, "127.0.0.1", int(sys.argv[1])), 60)
print("met", flush=True)
time.sleep(100)
"""


@pytest.fixture
def node_0():
    """A process that is node 0 of two, and its port."""
    port = free_port()
    command = [sys.executable, "-c", LEADS, str(port)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        yield process, port
        process.kill()


def test_a_first_node_that_hangs_is_named_as_well(node_0):
    """The meeting is in its process, whose host goes on accepting connections and bytes."""
    process, port = node_0
    met = Meeting(Place(1, 2, "127.0.0.1", port), 60)  # imports torch there first
    assert process.stdout and process.stdout.readline() == "met\n"
    met.wait_s = 2
    os.kill(process.pid, signal.SIGSTOP)
    started = time.monotonic()
    with (
        pytest.raises(UserError, match=rf"no answer from node 0 \({socket.gethostname()}\) within"),
        told_to_all(met),
    ):
        met.share("disk", 1, wait_s=1)
    with pytest.raises(UserError, match=r"no answer from node 0 within 2 s(.|\n)*hang there"):
        Meeting(Place(1, 2, "127.0.0.1", port), 2)
    assert time.monotonic() - started < 10


def test_what_fails_on_one_node_ends_the_others_with_its_words():
    def work(met):
        with told_to_all(met):
            if met.place.node == 1:
                raise UserError("no room on the disk of this node")
            met.share("disk", 0, wait_s=20)

    started = time.monotonic()
    found = each_in_a_thread(3, work)
    assert time.monotonic() - started < 15
    assert {str(error) for error in found.values()} == {"no room on the disk of this node"}


# ---- how node 0 is reached -------------------------------------------------------------------


def test_a_name_that_does_not_resolve_is_named():
    with pytest.raises(UserError, match=r"rendezvous host no-such-host\.invalid does not resolve"):
        require_reachable("no-such-host.invalid", 29500, 1)


def test_a_port_that_nothing_listens_on_is_named():
    port = free_port()
    with pytest.raises(
        UserError, match=rf"nothing listens at 127.0.0.1:{port}: node 0 is not there"
    ):
        require_reachable("127.0.0.1", port, 0.3)


def test_a_port_that_swallows_packets_is_told_apart():
    """A listener whose backlog is full answers no more, as a firewall that drops does not."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        port = listener.getsockname()[1]
        waiting = []
        for _ in range(4):
            client = socket.socket()
            client.setblocking(False)
            client.connect_ex(("127.0.0.1", port))
            waiting.append(client)
        with pytest.raises(UserError, match=rf"127.0.0.1:{port} does not answer: a firewall"):
            require_reachable("127.0.0.1", port, 0.5)
        for client in waiting:
            client.close()


def test_a_missing_route_is_told_apart(monkeypatch):
    def unreachable(*arguments, **named):
        raise OSError(101, "Network is unreachable")

    monkeypatch.setattr(meetings.socket, "create_connection", unreachable)
    with pytest.raises(UserError, match=r"no route leads to 10.9.9.9:1: Network is unreachable"):
        require_reachable("10.9.9.9", 1, 5)


@pytest.mark.parametrize(
    ("node", "rendezvous", "wanted"),
    [
        ("1/3", "10.0.0.1:29500", Place(1, 3, "10.0.0.1", 29500)),
        ("0/1", "[fe80::1]:5", Place(0, 1, "fe80::1", 5)),
        (None, None, None),
    ],
)
def test_a_place_is_read_from_two_variables(node, rendezvous, wanted):
    given = {"SNAKEGPT_NODE": node, "SNAKEGPT_RENDEZVOUS": rendezvous}
    assert place_of({name: value for name, value in given.items() if value}) == wanted


@pytest.mark.parametrize(
    ("node", "rendezvous"),
    [("3/3", "a:1"), ("1", "a:1"), ("1/3", "a"), ("1/3", ":1"), ("1/3", None), (None, "a:1")],
)
def test_a_malformed_place_is_refused(node, rendezvous):
    given = {"SNAKEGPT_NODE": node, "SNAKEGPT_RENDEZVOUS": rendezvous}
    with pytest.raises(UserError, match="wanted on each node"):
        place_of({name: value for name, value in given.items() if value})
