"""In what two actions differ: setting by setting, function by function, input by input."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

ABSENT: Any = type("Absent", (), {"__repr__": lambda self: "(not set)"})()

Kind = Literal["setting", "code", "input"]
Entries = Mapping[str, Sequence[Mapping[str, Any]]]  # role -> [{"path", "sha256", ...}]


@dataclass(frozen=True)
class Difference:
    """One thing in which a new action differs from an old one.

    name        training.learning_rate; snakegpt.model.Block, REVISION; tokens results/.../manifest.json
    old, new    plain values, or digests of code and inputs; ABSENT where there is none
    config      what config.yaml calls a setting, as experiments.gpt2.laptop.training.learning_rate
    place       where that stands, as "config.yaml, line 97"
    makers      of an input: what made the old content and what the new, as "index_tokens shakespeare-gpt2"
    """

    kind: Kind
    name: str
    old: Any
    new: Any
    config: str | None = None
    place: str | None = None
    makers: tuple[str | None, str | None] = (None, None)

    def line(self) -> str:
        """For a terminal."""
        if self.kind == "code" and self.name != "REVISION":
            added, removed = self.old is ABSENT, self.new is ABSENT
            what = "added" if added else "removed" if removed else "changed"
            return f"code {self.name}: {what}"
        text = f"{self.kind} {self.name}: {_text(self, self.old)} -> {_text(self, self.new)}"
        if self.place or self.config:
            text += f"  ({self.place or f'{self.config}, its default'})"
        old, new = self.makers
        if new:
            text += f"  (made by {new}{f', before by {old}' if old and old != new else ''})"
        return text

    def as_json(self) -> dict[str, Any]:
        """For programs: what does not apply is left out."""
        values = {
            "kind": self.kind,
            "name": self.name,
            "old": self.old,
            "new": self.new,
            "config": self.config or ABSENT,
            "place": self.place or ABSENT,
            "old_maker": self.makers[0] or ABSENT,
            "new_maker": self.makers[1] or ABSENT,
        }
        return {key: value for key, value in values.items() if value is not ABSENT}


def _text(difference: Difference, value: Any) -> str:
    if value is ABSENT:
        return "(none)" if difference.kind == "input" else "(not set)"
    if difference.kind == "input":
        return str(value)[:12]
    if difference.name == "adopted":
        return f"{len(value):,} adopted behind it"
    text = repr(value) if isinstance(value, str) else "null" if value is None else str(value)
    return text if len(text) <= 72 else f"{text[:69]}..."


# ---- comparing -------------------------------------------------------------------------------


def settings(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Difference]:
    """Every science setting in which two actions differ."""
    return [Difference("setting", name, *pair) for name, *pair in _leaves(plain(old), plain(new))]


def code(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Difference]:
    """REVISION, and every function and class whose code differs; what stands outside them is one more."""
    found = []
    if old["revision"] != new["revision"]:
        found.append(Difference("code", "REVISION", old["revision"], new["revision"]))
    for module in sorted(old["modules"].keys() | new["modules"].keys()):
        before, after = (side["modules"].get(module) for side in (old, new))
        if before is None or after is None:
            sides = (ABSENT if side is None else side for side in (before, after))
            found.append(Difference("code", module, *sides))
            continue
        for name in sorted(before.keys() | after.keys()):
            pair = before.get(name, ABSENT), after.get(name, ABSENT)
            if pair[0] != pair[1]:
                place = f"{module}.{name}" if name else f"{module}, outside functions and classes"
                found.append(Difference("code", place, *pair))
    return found


def inputs(old: Entries, new: Entries) -> list[Difference]:
    """Every input file whose content differs, by role and path."""
    found = []
    for role in sorted(old.keys() | new.keys()):
        before, after = (
            {e["path"]: e["sha256"] for e in side.get(role, ())} for side in (old, new)
        )
        if before.keys() != after.keys() and len(before) == len(after) == 1:
            # The same file under another name, as where two experiments are compared.
            ((path, sha256),) = after.items()
            before = {path: next(iter(before.values()))}
            after = {path: sha256}
        for path in sorted(before.keys() | after.keys()):
            pair = before.get(path, ABSENT), after.get(path, ABSENT)
            if pair[0] != pair[1]:
                found.append(Difference("input", f"{role} {path}", *pair))
    return found


def actions(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Difference]:
    """Everything in which two records of actions differ, as far as identity goes."""
    return [
        *settings(old["science"], new["science"]),
        *code(old["code"], new["code"]),
        *inputs(old["inputs"], new["inputs"]),
    ]


def plain(value: Any) -> Any:
    """As it reads back from JSON, so that a tuple equals the list it was recorded as."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value


def _leaves(old: Any, new: Any, where: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(name, old, new) of every value that differs."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            place = f"{where}.{key}" if where else str(key)
            yield from _leaves(old.get(key, ABSENT), new.get(key, ABSENT), place)
    elif isinstance(old, list) and isinstance(new, list) and _are_files(old + new):
        # Pinned files: by path, so that one that is inserted does not shift all others.
        before, after = ({file["path"]: file for file in side} for side in (old, new))
        for path in sorted(before.keys() | after.keys()):
            pair = before.get(path, ABSENT), after.get(path, ABSENT)
            if ABSENT in pair:
                yield f"{where}[{path}]", *(v if v is ABSENT else v["sha256"] for v in pair)
            else:
                yield from _leaves(*pair, f"{where}[{path}]")
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for index, pair in enumerate(zip(old, new, strict=True)):
            yield from _leaves(*pair, f"{where}[{index}]")
    elif type(old) is not type(new) or old != new:  # 1, 1.0 and true are three keys
        yield where, old, new


def _are_files(values: Sequence[Any]) -> bool:
    return bool(values) and all(
        isinstance(v, dict) and v.keys() >= {"path", "sha256"} for v in values
    )
