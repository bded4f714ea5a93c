"""What is said of a bad value: its place in the files, and the nearest valid one."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from snakegpt.errors import nearest
from snakegpt.settings.tree import Settings


def explain(problem: dict[str, Any], config: Mapping[str, Any], files: Sequence[str | Path]) -> str:
    """One of pydantic's complaints in words for people."""
    # Tags of discriminated unions stand in pydantic's location but not in the file.
    path: list[Any] = []
    here: Any = config
    tagged: Any = None
    for part in problem["loc"]:
        if isinstance(here, Mapping) and here is not tagged and here.get("kind") == part:
            tagged = here  # a key may have the tag's name: that comes next
            continue
        named = isinstance(here, Mapping) and part in here
        counted = isinstance(here, list) and isinstance(part, int) and part < len(here)
        if named or counted:
            here = here[part]
            path.append(part)
        elif problem["type"] == "missing" and part == problem["loc"][-1]:
            path.append(part)
    name = ".".join(str(part) for part in path)
    place = _place(path, files)
    found = problem["input"]
    if problem["type"] == "extra_forbidden":
        return (
            f"unknown setting {name}{place}.{nearest(str(path[-1]), _fields_at(path[:-1], config))}"
        )
    if problem["type"] == "missing":
        return f"setting {name} is missing{place}."
    if problem["type"] == "union_tag_invalid":
        kind = here.get("kind") if isinstance(here, Mapping) else here
        kinds = _quoted(problem["ctx"]["expected_tags"])
        return f"{name}.kind = {kind!r} is no known kind{place}.{nearest(str(kind), kinds)}"
    if problem["type"] == "literal_error" and isinstance(found, str):
        choices = _quoted(problem["ctx"]["expected"])
        hint = nearest(found, choices)
        if hint.startswith(" Nearest"):  # which for device = gpu is cpu
            hint += f" All of them: {', '.join(choices)}."
        return f"{name} = {found!r} is not valid{place}.{hint}"
    message = problem["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    return f"{name} = {found!r}{place}: {message}."


def _quoted(text: str) -> list[str]:
    """The words between quotes in a message of pydantic: "'a', 'b' or 'c'"."""
    return text.split("'")[1::2]


def _fields_at(path: Sequence[Any], config: Mapping[str, Any]) -> list[str]:
    """Valid keys of the block at a path, walking types and values side by side."""
    block: Any = Settings
    here: Any = config
    for part in path:
        here = here[part]
        if isinstance(block, type) and issubclass(block, BaseModel):
            block = block.model_fields[part].annotation
        else:
            block = getattr(block, "__args__", (None, block))[-1]
        block = _member(block, here)
    return list(getattr(block, "model_fields", ()))


def _member(annotation: Any, value: Any) -> Any:
    """The block type that a value belongs to, of an optional or discriminated annotation."""
    while hasattr(annotation, "__metadata__"):
        annotation = annotation.__origin__
    options = [a for a in getattr(annotation, "__args__", ()) if a is not type(None)]
    if getattr(annotation, "__origin__", None) is dict or not options:
        return annotation
    for option in options:
        fields = getattr(option, "model_fields", {})
        kinds = getattr(fields.get("kind"), "annotation", None)
        if isinstance(value, Mapping) and value.get("kind") in getattr(kinds, "__args__", ()):
            return option
    return options[0]


def place(path: Sequence[Any], files: Sequence[str | Path]) -> tuple[str, int] | None:
    """(file, line) of the last of some configuration files that sets a value, or None if none does."""
    for file in reversed(files):
        try:
            node = _composed(Path(file).read_text(encoding="utf-8"))
        except (OSError, yaml.YAMLError):
            continue
        line = None
        for part in path:
            if isinstance(node, yaml.MappingNode):
                pair = next((p for p in node.value if p[0].value == str(part)), None)
                if pair is None:
                    break
                line, node = pair[0].start_mark.line + 1, pair[1]
            elif isinstance(node, yaml.SequenceNode) and isinstance(part, int):
                if part >= len(node.value):
                    break
                node = node.value[part]
                line = node.start_mark.line + 1
            else:
                break
        else:
            if line:
                return str(file), line
    return None


@functools.lru_cache(maxsize=8)  # an explanation asks for many places in the same few files
def _composed(text: str) -> yaml.Node | None:
    return yaml.compose(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))


def _place(path: Sequence[Any], files: Sequence[str | Path]) -> str:
    found = place(path, files)
    return f" ({found[0]}, line {found[1]})" if found else ""


def changed_in(files: Sequence[str | Path]) -> str:
    """The line that says where to change it."""
    return f"\n  change it in {' or '.join(str(file) for file in files)}" if files else ""
