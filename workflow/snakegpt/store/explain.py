"""What would happen if a result were asked for now, and why: the pipeline's settings against the store."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from snakegpt.identity import Action, code_of
from snakegpt.pipeline import Pipeline, Request
from snakegpt.store import differences, provenance
from snakegpt.store.differences import Difference
from snakegpt.store.links import digest_of, maker
from snakegpt.store.objects import Store
from snakegpt.store.origins import locate

Status = Literal["up to date", "look-up", "may run", "runs"]


@dataclass(frozen=True)
class Verdict:
    """What would happen to one action.

    status       up to date: results/ shows what the settings ask for;
                 look-up: it does not, but the store has it;
                 may run: an input will be made anew; if it comes out the same, a look-up is enough;
                 runs
    key          of the action that the settings ask for; None while an input's content is unknown
    record       of the action that made the present result; None if nothing did
    differences  of the wanted action from that one
    notes        reasons that are no difference, as "nothing has made it yet"
    awaited      inputs that may change yet: role -> what makes them anew
    outputs      path -> sha256 of what it will leave there, as far as can be foreseen
    upstream     what makes its inputs
    """

    request: Request
    status: Status
    key: str | None
    record: Mapping[str, Any] | None
    differences: list[Difference] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    awaited: dict[str, str] = field(default_factory=dict)
    outputs: dict[str, str] = field(default_factory=dict)
    upstream: list[Verdict] = field(default_factory=list)

    @property
    def label(self) -> str:
        return f"{self.request.stage} {self.request.name}"

    @property
    def settled(self) -> bool:
        """Whether it is known what it will leave."""
        return self.status in ("up to date", "look-up")

    @property
    def adopted(self) -> Mapping[str, str] | None:
        """Who declared the present result valid, if somebody did."""
        return self.record.get("adopted") if self.record else None

    def reasons(self) -> list[str]:
        """Why it is not up to date, one line each, its own differences first."""
        return [
            *(difference.line() for difference in self.differences),
            *self.notes,
            *(f"input {role}: made anew by {label}" for role, label in self.awaited.items()),
        ]

    def reason(self) -> str:
        """The same in one line."""
        own = [difference.line() for difference in self.differences] + self.notes
        if self.awaited and (self.status == "may run" or not own):
            roles = list(self.awaited)
            several = " or ".join([", ".join(roles[:-1]), roles[-1]] if roles[1:] else roles)
            return f"only on a change of {several}"
        if not own:
            return "nothing differs"
        return own[0] + (f", and {len(own) - 1:,} more" if len(own) > 1 else "")

    def chain(self) -> Iterator[Verdict]:
        """This and everything above it, each once, sources first."""
        return ordered([self])


def ordered(verdicts: Iterable[Verdict]) -> Iterator[Verdict]:
    """Some verdicts and all above them, each once, sources first."""
    seen: set[tuple[str, str]] = set()

    def visit(verdict: Verdict) -> Iterator[Verdict]:
        identity = verdict.request.stage, verdict.request.name
        if identity not in seen:
            seen.add(identity)
            for source in verdict.upstream:
                yield from visit(source)
            yield verdict

    for verdict in verdicts:
        yield from visit(verdict)


class Explainer:
    """Verdicts on the actions of a pipeline, each found once.

    files  the configuration files, last one wins; only to say where a setting stands
    """

    def __init__(self, store: Store, pipeline: Pipeline, files: Sequence[str | Path] = ()) -> None:
        self.store, self.pipeline, self.files = store, pipeline, list(files)
        self._verdicts: dict[tuple[str, str], Verdict] = {}
        self._requests: dict[str, Request | None] = {}

    def of(self, request: Request) -> Verdict:
        """What would happen to an action, everything above it considered."""
        identity = request.stage, request.name
        if identity not in self._verdicts:
            self._verdicts[identity] = self._judge(request)
        return self._verdicts[identity]

    def maker_of(self, path: str) -> Request | None:
        """The request that makes a file."""
        if path not in self._requests:
            request = self.pipeline.find(path)
            outputs = request.outputs if request else [path]
            self._requests |= dict.fromkeys(outputs, request)
            self._requests[path] = request
        return self._requests[path]

    # ---- judging ----

    def _judge(self, request: Request) -> Verdict:
        record = maker(Path(request.outputs[0]))
        inputs, awaited = self._inputs(request, record)
        science, code = differences.plain(self._science(request)), code_of(request.stage)
        digests = {role: [entry["sha256"] for entry in group] for role, group in inputs.items()}
        known = all(sha256 for group in digests.values() for sha256 in group)
        key = Action(request.stage, science, code, digests).key if known else None
        there = self.store.look_up(key) if key else None
        wanted = {"science": science, "code": code, "inputs": inputs}
        verdict = Verdict(
            request,
            "runs",
            None if awaited else key,
            record,
            # The same key is the same action.
            self._explained(request, record, wanted) if record and record["key"] != key else [],
            awaited=awaited,
            outputs=_shown(request, there or record),
            upstream=[self.of(source) for source in self._sources(request)],
        )
        if there and awaited:
            return replace(verdict, status="may run")
        missing = self._not_shown(request, there) if there else []
        if there and record and record["key"] == key and not missing:
            return replace(verdict, status="up to date")
        if record is None:
            notes = ["not in results/"] if there else [self._never_made(request)]
        elif verdict.differences:
            notes = []
        elif there:
            notes = missing
        elif record["key"] == key:
            notes = self._damage(record)
        else:
            notes = [f"{path} is not there" for path in self._absent(inputs)]
            notes = notes or ["its record was written by another version of snakegpt"]
        if there:
            return replace(verdict, status="look-up", notes=notes)
        if verdict.key and self.store.state_path(verdict.key).is_dir():
            notes = [*notes, "goes on from its saved state"]
        return replace(verdict, notes=notes)

    def _science(self, request: Request) -> dict[str, Any]:
        return provenance.told(self.store, request.stage, request.settings, request.inputs)

    def _inputs(
        self, request: Request, record: Mapping[str, Any] | None
    ) -> tuple[dict[str, list[dict[str, Any]]], dict[str, str]]:
        """Input entries as a record has them, with the contents foreseen, and which may change yet.

        What will be made anew is taken to come out as it is now, or as this action's record read it.
        """
        found: dict[str, list[dict[str, Any]]] = {}
        open_roles: dict[str, str] = {}
        for role, paths in request.inputs.items():
            before = (
                {e["path"]: e["sha256"] for e in record["inputs"].get(role, ())} if record else {}
            )
            found[role] = []
            for path in paths:
                source = self.maker_of(path)
                if source:
                    verdict = self.of(source)
                    sha256 = verdict.outputs.get(path) or before.get(path)
                    if not verdict.settled:
                        open_roles.setdefault(role, verdict.label)
                else:
                    sha256 = self._digest(path)
                found[role].append({"path": path, "sha256": sha256})
        return found, open_roles

    def _digest(self, path: str) -> str | None:
        try:
            return digest_of(self.store, Path(path))
        except FileNotFoundError:
            return None

    def _sources(self, request: Request) -> list[Request]:
        """What makes the input files, those outside the key included, each once."""
        groups = (*request.inputs.values(), *request.unhashed.values())
        found = (self.maker_of(path) for paths in groups for path in paths)
        return list({(r.stage, r.name): r for r in found if r}.values())

    def _explained(
        self, request: Request, record: Mapping[str, Any], wanted: Mapping[str, Any]
    ) -> list[Difference]:
        """Differences of the wanted action from a recorded one, with places and makers."""
        return [
            self._placed(request, difference, record)
            for difference in differences.actions(record, wanted)
            # Content that is not known yet is awaited; it is no difference.
            if not (difference.kind == "input" and difference.new is None)
        ]

    def _placed(
        self, request: Request, difference: Difference, record: Mapping[str, Any]
    ) -> Difference:
        if difference.kind == "setting":
            config, place = locate(self.pipeline, request, difference.name, self.files)
            return replace(difference, config=config, place=place)
        if difference.kind == "input":
            role, _, path = difference.name.partition(" ")
            source = self.maker_of(path)
            new = f"{source.stage} {source.name}" if source else None
            keys = [e.get("action") for e in record["inputs"].get(role, ()) if e["path"] == path]
            made = self.store.record_of(keys[0]) if keys and keys[0] else None
            old = f"{made['stage']} {made['name']}" if made else None
            return replace(difference, makers=(old, new))
        return difference

    # ---- reasons that are no difference ----

    def _never_made(self, request: Request) -> str:
        if Path(request.outputs[0]).exists():
            return "no record says what made it"
        if "files" in request.settings and not request.settings["files"]:
            return "nothing has made it yet, and its files are not locked"
        return "nothing has made it yet"

    def _not_shown(self, request: Request, record: Mapping[str, Any]) -> list[str]:
        """Results that are gone, or are other files than the action made."""
        notes = []
        shown = _shown(request, record)
        for path in request.outputs:
            found = self._digest(path)
            if found is None:
                notes.append(f"{path} is gone from results/")
            elif found != shown.get(path):
                notes.append(f"{path} is not what the action made; remove it to get that back")
        return notes

    def _damage(self, record: Mapping[str, Any]) -> list[str]:
        """Which objects of a record are gone or damaged, as far as the store's check looks."""
        if self.store.record_of(record["key"]) is None:
            return ["the record of its action is gone from the store"]
        notes = []
        for name, output in record["outputs"].items():
            try:
                objects = list(self.store.objects_of({name: output}))
            except FileNotFoundError:
                notes.append(f"the list of files in {name} is gone or damaged")
                continue
            for sha256, n_bytes in objects:
                path = self.store.object_path(sha256)
                if not path.exists():
                    notes.append(f"object {sha256[:12]} of {name} is gone")
                elif not self.store.holds(sha256, n_bytes):
                    size = path.stat().st_size
                    what = "its bytes changed" if size == n_bytes else f"{size:,} of {n_bytes:,} B"
                    notes.append(f"object {sha256[:12]} of {name} is damaged: {what}")
        return notes

    def _absent(self, inputs: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
        return [e["path"] for group in inputs.values() for e in group if e["sha256"] is None]


def _shown(request: Request, record: Mapping[str, Any] | None) -> dict[str, str]:
    """The digests that a record gives the files of a request."""
    if record is None:
        return {}
    names = {path: Path(path).relative_to(request.folder).as_posix() for path in request.outputs}
    outputs = record["outputs"]
    return {path: outputs[name]["sha256"] for path, name in names.items() if name in outputs}
