"""The whole measurement as one node sees it: inventory, links, each node's speed, trials of settings."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from snakegpt.errors import UserError
from snakegpt.launching import run_ranks
from snakegpt.network import advice, collectives, iperf, links, nodes
from snakegpt.network.advice import Candidate
from snakegpt.network.interfaces import (
    address_of,
    interface_towards,
    interface_with,
    require_known,
)
from snakegpt.network.meeting import Meeting, told_to_all
from snakegpt.nodes import Place
from snakegpt.progress import say

RESULT = "SNAKEGPT_TRIAL"  # the file that rank 0 of a trial writes to
LOOPBACK = "127.0.0.1"
SLOWEST_TRIAL_S = 240.0  # beyond what bounds a rank
WAIT_FOR_SPEED_S = 300.0  # of a node whose disk is slow


@dataclass(frozen=True)
class Task:
    """What to measure.

    module, arguments   the command that torchrun starts as ranks
    ranks               of this node
    seconds             of each throughput test of a link
    """

    module: str
    arguments: list[str]
    label: str
    device: str
    ranks: int
    threads: int
    gradient_bytes: int
    folder: Path
    seconds: float
    udp_bit_per_s: float | None
    wait_s: float = 60.0

    @property
    def backend(self) -> str:
        return "nccl" if self.device == "cuda" else "gloo"


def measure(task: Task, place: Place) -> dict[str, Any]:
    """Measure together with the other nodes.

    returns  what network.json holds, without the machine; the same on every node
    raises   UserError if nodes do not meet, may not run together, or do not reach each other
    """
    require_known(os.environ)
    meeting = Meeting(place, task.wait_s)
    with told_to_all(meeting):
        return _measure(task, meeting)


def _measure(task: Task, meeting: Meeting) -> dict[str, Any]:
    place, label = meeting.place, task.label
    alone = place.nodes == 1
    tell: Callable[[str], None] = (lambda text: say(f"{label}  {text}")) if place.leads else _silent
    interface = interface_with(_own_address(meeting))
    mine = {**nodes.inventory(interface), "ranks": task.ranks}
    inventories = meeting.share("inventory", mine)
    warnings = _refuse_differences(inventories)
    for warning in warnings:
        tell(f"warning: {warning}")
    measured: list[dict[str, Any]] = []
    reason: dict[str, str] = {}
    tcp = None
    if alone:
        tcp, why = iperf.loopback(LOOPBACK, seconds=task.seconds)
        if why:
            reason["iperf3"] = why
    else:
        tell(f"meets {', '.join(meeting.names[1:])}; measures the links")
        addresses = [node["address"] for node in inventories]
        measured = links.measure_links(
            meeting, addresses, seconds=task.seconds, udp_bit_per_s=task.udp_bit_per_s
        )
        _require_connections(inventories, measured)
        speed = nodes.speed(task.folder, task.device, task.threads)
        for node, found in zip(
            inventories, meeting.share("speed", speed, wait_s=WAIT_FOR_SPEED_S), strict=True
        ):
            node["speed"] = found
    trials = Trials(task, meeting, inventories, measured, tell)
    chosen, why_chosen = trials.run()
    found = trials.best(chosen)
    if task.ranks * place.nodes == 1:
        reason["all_reduce"] = "training uses one process here, so there is nothing to sum"
        why_chosen = ["Training uses one process, so nothing is sent and there is nothing to set."]
    common, by_host = _environments(chosen, inventories)
    if task.backend == "nccl" and not alone:
        common["NCCL_DEBUG"] = "WARN"
        why_chosen.append("NCCL_DEBUG=WARN: NCCL says why it fails; it costs nothing.")
    standing_out = [] if alone else advice.slow_nodes(inventories, measured)
    return {
        "interface": asdict(interface),
        "backend": task.backend,
        "ranks": task.ranks * place.nodes,
        "nodes": inventories,
        "links": measured,
        "gradient_bytes": task.gradient_bytes,
        **found,
        "time": "mean of the iterations, of the slowest rank",
        "iperf3": tcp,
        "trials": trials.rows(),
        "reason": reason,
        "warnings": [*warnings, *standing_out, *advice.link_findings(inventories, measured)],
        "environment": common,
        "environment_by_host": by_host,
        "advice": why_chosen
        + advice.findings(task.gradient_bytes, found["all_reduce"], found["latency_s"]),
    }


def _silent(text: str) -> None:
    """Nodes other than 0 say nothing: what they find, node 0 writes down."""


def _own_address(meeting: Meeting) -> str:
    """This node's address as the others reach it: the one that its route to node 0 leaves from.

    Node 0 is told by the others: its name often stands for 127.0.1.1 on itself, Debian's habit.
    """
    place = meeting.place
    if place.nodes == 1:
        return LOOPBACK
    reached = meeting.share("address", "" if place.leads else address_of(place.host))
    return reached[1] if place.leads else interface_towards(place.host).address


def _refuse_differences(inventories: list[dict[str, Any]]) -> list[str]:
    """Warnings about what differs between nodes; UserError if it keeps ranks from running together."""
    found = advice.differences(inventories)
    ranks = {name: str(node["ranks"]) for name, node in advice.by_name(inventories).items()}
    if len(set(ranks.values())) > 1:
        counts = ", ".join(f"{n} on {host}" for host, n in ranks.items())
        text = (
            f"nodes would start different numbers of ranks: {counts}; set execution.ranks_per_node"
        )
        found.append(("error", text))
    errors = [text for kind, text in found if kind == "error"]
    if errors:
        raise UserError(
            "\n".join(errors)
            + "\n  make the nodes' environments the same (envs/, or one container)"
        )
    return [text for _, text in found]


def _require_connections(inventories: list[dict[str, Any]], measured: list[dict[str, Any]]) -> None:
    cut = [
        f"{inventories[link['from']]['host']} does not reach {inventories[link['to']]['host']}:"
        f" {link['reason']['latency']}"
        for link in measured
        if "latency" in link["reason"]
    ]
    if cut:
        raise UserError(
            "\n".join(cut) + "\n  ranks connect to each other directly, at ports that the kernel"
            " chooses: nodes need a route and open ports between them"
        )


class Trials:
    """Runs of the collectives under the defaults and under settings that may beat them, in turn."""

    def __init__(
        self,
        task: Task,
        meeting: Meeting,
        inventories: list[dict[str, Any]],
        measured: list[dict[str, Any]],
        tell: Callable[[str], None],
    ) -> None:
        self.task, self.meeting, self.tell = task, meeting, tell
        self.inventories, self.measured = inventories, measured
        self.found: dict[str, list[dict[str, Any]]] = {}  # candidate's name -> what its runs gave
        self.failures: dict[str, str] = {}
        self.tried: list[Candidate | None] = []
        self._launches = 0

    def run(self) -> tuple[Candidate | None, list[str]]:
        task = self.task
        if task.ranks * self.meeting.place.nodes == 1:
            return None, []
        self._try(None)
        if self.meeting.place.nodes == 1:
            # On one machine there is no other way to try, unless the defaults do not work.
            others = advice.alone_candidate(task.backend, self._loopback(), task.ranks)
            others = [] if self.found[""] else others
        else:
            others = advice.candidates(task.backend, self.inventories, self.measured)
        for candidate in others:
            self._try(candidate)
        best, reasons = advice.choose(self._scores())
        if best and self.found[""]:  # A B A B: it has to win again
            self._try(None)
            self._try(best)
            best, reasons = advice.choose(self._scores())
        if not best and not self.found[""]:
            failed = "; ".join(self.failures.values())
            raise UserError(f"ranks on these nodes cannot exchange anything: {failed}")
        for name, why in self.failures.items():
            reasons.append(f"A trial of {name or 'the defaults'} failed: {why}")
        return best, reasons or ["The defaults work, and there is nothing to set."]

    def best(self, chosen: Candidate | None) -> dict[str, Any]:
        """The collectives of the run that the advice rests on."""
        runs = self.found.get(chosen.name if chosen else "")
        empty: dict[str, Any] = {
            "latency_s": None,
            "all_reduce": [],
            "reduce_scatter": [],
            "all_gather": [],
        }
        return max(runs, key=_score) if runs else empty

    def rows(self) -> list[dict[str, Any]]:
        """What was tried, for network.json."""
        return [
            {
                "name": candidate.name if candidate else "defaults",
                "variables": advice.spelled(candidate) if candidate else "",
                "busbw_gb_per_s": [_score(run) for run in self._runs(candidate)],
                "failure": self.failures.get(candidate.name if candidate else ""),
            }
            for candidate in self.tried
        ]

    def _runs(self, candidate: Candidate | None) -> list[dict[str, Any]]:
        return self.found[candidate.name if candidate else ""]

    def _scores(self) -> list[tuple[Candidate | None, list[float]]]:
        return [(each, [_score(run) for run in self._runs(each)]) for each in self.tried]

    def _loopback(self) -> str:
        return interface_with(LOOPBACK).name

    def _try(self, candidate: Candidate | None) -> None:
        task, place = self.task, self.meeting.place
        name = candidate.name if candidate else ""
        self._launches += 1
        if candidate not in self.tried:
            self.tried.append(candidate)
            self.found[name] = []
        with tempfile.TemporaryDirectory(prefix="snakegpt-") as scratch:
            result = Path(scratch) / "collectives.json"
            environment = dict(candidate.environments[place.node]) if candidate else {}
            outcome = run_ranks(
                task.module,
                task.arguments,
                place,
                ranks=task.ranks,
                threads=task.threads,
                launch=self._launches,
                environment={**environment, RESULT: str(result)},
                start_timeout_s=collectives.CONNECT_S,  # nodes have just met
            )
            mine: dict[str, Any] = {"status": outcome.status, "text": outcome.text}
            if place.leads and not outcome.status:
                mine["run"] = json.loads(result.read_text(encoding="utf-8"))
        everyone = self.meeting.share(f"trial-{self._launches}", mine, wait_s=SLOWEST_TRIAL_S)
        failed = [each["text"] for each in everyone if each["status"]]
        if failed:
            self.failures[name] = failed[0].strip().splitlines()[-1]
            self.tell(f"{name or 'the defaults'}: {self.failures[name]}")
        else:
            self.found[name].append(everyone[0]["run"])


def _score(run: dict[str, Any]) -> float:
    """Bus bandwidth at the size of the gradients, which training feels."""
    return float(run["all_reduce"][-1]["busbw_gb_per_s"])


def _environments(
    chosen: Candidate | None, inventories: list[dict[str, Any]]
) -> tuple[dict[str, str], dict[str, dict[str, str]]]:
    """Variables for all nodes, and for each host what differs from that."""
    if chosen is None:
        return {}, {}
    first = chosen.environments[0]
    same = all(each == first for each in chosen.environments)
    if same:
        return dict(first), {}
    hosts = [node["host"] for node in inventories]
    return {}, dict(zip(hosts, chosen.environments, strict=True))
