"""What makes two runs of a stage the same run: canonical JSON, code digests and the action key.

    key = sha256(canonical JSON of {stage, science settings, code, input contents})

Nothing here knows of paths, devices, hosts or time. Prior art: Bazel's action key, DVC's run cache;
what Marin's executor taught about placement leaking into hashes.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).parent
NAME = PACKAGE.name

# Layer 0 moves and describes results but computes none of their bytes: it is in no code digest, so
# that a better error message or a new setting re-addresses nothing. Settings enter keys by value.
NOT_SCIENCE = frozenset(
    f"{NAME}{module}"
    for module in (
        ".artefacts",
        ".command",
        ".durable",
        ".errors",
        ".identity",
        ".pipeline",
        ".progress",
        ".run",
        ".settings",
        ".store",
    )
)


# ---- canonical JSON and keys -----------------------------------------------------------------


def canonical_json(value: Any) -> bytes:
    """The one byte string that stands for a plain JSON value.

    raises   TypeError for anything but dict (string keys), list, tuple, str, int, bool, None and
             finite float, naming the place: what cannot be written the same way twice has no identity
    """
    _refuse_ambiguous(value, "value")
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return text.encode("ascii")


def _refuse_ambiguous(value: Any, where: str) -> None:
    if value is None or isinstance(value, str | bool | int):
        return
    if isinstance(value, float):
        if not math.isfinite(value):
            raise TypeError(f"{where} = {value} has no canonical form; use a finite number or null")
        return
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise TypeError(f"key {key!r} of {where} is no string")
            _refuse_ambiguous(item, f"{where}.{key}")
        return
    if isinstance(value, list | tuple):
        for index, item in enumerate(value):
            _refuse_ambiguous(item, f"{where}[{index}]")
        return
    raise TypeError(f"{where} is a {type(value).__name__}, which has no canonical form")


def digest(value: Any) -> str:
    """sha256 (hex) of a value's canonical JSON."""
    return hashlib.sha256(canonical_json(value)).hexdigest()


def file_digest(path: Path) -> str:
    """sha256 (hex) of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True)
class Action:
    """One stage run, as far as identity goes.

    stage     module name under snakegpt.stages
    science   the stage's science settings, plain JSON values
    code      see `code_of`
    inputs    role -> sha256 of each input file, in order
    """

    stage: str
    science: Mapping[str, Any]
    code: Mapping[str, Any]
    inputs: Mapping[str, Sequence[str]]

    @functools.cached_property
    def key(self) -> str:
        """The action's address, 64 hex digits."""
        return digest(asdict(self))


# ---- science code ----------------------------------------------------------------------------


@functools.cache
def code_of(stage: str, package: Path = PACKAGE) -> dict[str, Any]:
    """The code that decides a stage's bytes, without importing any of it.

    returns  {"revision": the stage's REVISION,
              "modules": {module: {function or class: digest, "": digest of the rest}}}
             for the modules named in the stage's SCIENCE and what they import from this package
    raises   ValueError if the stage does not declare REVISION and SCIENCE as literals
    """
    declared = _literals(_parse(f"{NAME}.stages.{stage}", package))
    if not isinstance(declared.get("REVISION"), int) or "SCIENCE" not in declared:
        raise ValueError(f"stages/{stage}.py must assign literals to REVISION and SCIENCE")
    modules: dict[str, dict[str, str]] = {}
    waiting = list(declared["SCIENCE"])
    while waiting:
        module = waiting.pop()
        if module not in modules and _counts(module):
            modules[module], imported = _module(module, package)
            waiting += imported
    return {"revision": declared["REVISION"], "modules": dict(sorted(modules.items()))}


def _counts(module: str) -> bool:
    """Whether a module may decide bytes: neither it nor a package that it is in is NOT_SCIENCE."""
    return NOT_SCIENCE.isdisjoint(itertools.accumulate(module.split("."), "{}.{}".format))


@functools.cache
def _module(module: str, package: Path) -> tuple[dict[str, str], list[str]]:
    """(digests of a module's definitions, modules of this package that it imports)."""
    tree = _parse(module, package)
    return _definitions(tree), list(_imports(tree, package))


def _module_file(module: str, package: Path) -> Path:
    path = package.joinpath(*module.split(".")[1:])
    file = path.with_suffix(".py")
    return file if file.is_file() else path / "__init__.py"


def _parse(module: str, package: Path) -> ast.Module:
    return ast.parse(_module_file(module, package).read_text(encoding="utf-8"))


def _literals(tree: ast.Module) -> dict[str, Any]:
    values = {}
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            try:
                values[node.targets[0].id] = ast.literal_eval(node.value)
            except ValueError:
                continue
    return values


def _imports(tree: ast.Module, package: Path) -> Iterator[str]:
    for node in _statements(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            # `from snakegpt import shards` names a module, `from snakegpt.shards import read` a function.
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        else:
            continue
        for name in names:
            if name.startswith(f"{NAME}.") and _module_file(name, package).is_file():
                yield name


def _statements(node: ast.AST) -> Iterator[ast.stmt]:
    """Every statement below a node, without the expressions, which are most of a tree."""
    for block in ("body", "orelse", "finalbody", "handlers", "cases"):
        for inner in getattr(node, block, ()):
            if isinstance(inner, ast.stmt):
                yield inner
            yield from _statements(inner)


def _definitions(tree: ast.Module) -> dict[str, str]:
    """Digest of each top-level function and class; under "" everything else, imports sorted."""
    named: dict[str, str] = {}
    imports, rest = [], []
    for node in _without_docstring(tree.body):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            named[node.name] = _digest([named.get(node.name), _normalised(node)])
        elif isinstance(node, ast.Import | ast.ImportFrom):
            # One entry a name: neither order nor grouping of imports counts.
            origin = getattr(node, "module", None)
            imports += [[origin, alias.name, alias.asname] for alias in node.names]
        elif not _is_typing_only(node):
            rest.append(_normalised(node))
    imports = sorted((i for i in imports if i[0] != "__future__"), key=canonical_json)
    return named | {"": _digest([imports, rest])}


def _digest(value: Any) -> str:
    """As `digest`, of lists and strings that were made here and need no check."""
    return hashlib.sha256(json.dumps(value, separators=(",", ":")).encode("ascii")).hexdigest()


def _is_typing_only(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")


def _without_docstring(body: list[ast.stmt]) -> list[ast.stmt]:
    first = body[0] if body else None
    is_docstring = (
        isinstance(first, ast.Expr)
        and isinstance(first.value, ast.Constant)
        and isinstance(first.value.value, str)
    )
    return body[1:] if is_docstring else body


# Where a node stands, how it is typed and how its literal was spelt: none of it changes what it does.
_IGNORED_FIELDS = {"annotation", "returns", "type_comment", "type_params", "ctx", "kind", "simple"}


def _normalised(node: Any) -> Any:
    """A syntax tree as nested lists; empty fields are left out, so that new Python versions agree."""
    if isinstance(node, ast.AST):
        fields: list[Any] = [type(node).__name__]
        for name, value in ast.iter_fields(node):
            if name in _IGNORED_FIELDS or (value is None and not isinstance(node, ast.Constant)):
                continue
            if name == "body" and isinstance(value, list):
                value = _without_docstring(value)
            if value != []:
                fields.append([name, _normalised(value)])
        return fields
    if isinstance(node, list):
        return [_normalised(item) for item in node]
    return [type(node).__name__, repr(node)]
