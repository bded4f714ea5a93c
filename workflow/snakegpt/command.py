"""The command line that every stage has, so that the runner and a person call it the same way."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from pydantic import BaseModel, ValidationError

from snakegpt.errors import UserError, nearest
from snakegpt.pipeline import usable_threads
from snakegpt.settings import Closed, Execution, meaningless

Block = TypeVar("Block", bound=BaseModel)


def stage_parser(
    doc: str | None, inputs: Mapping[str, str] | None = None, *, state: bool = False
) -> argparse.ArgumentParser:
    """The parser of a stage.

    doc     the stage module's docstring: its first line is the description, the rest the epilogue
    inputs  input role -> help; each becomes a flag `--role PATH...` and arrives as a list of paths
    state   whether the stage resumes: adds `--state DIR`
    """
    summary, _, rest = (doc or "").strip().partition("\n")
    parser = argparse.ArgumentParser(
        description=summary,
        epilog=rest.strip(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--settings",
        type=_json_object,
        default={},
        metavar="JSON",
        help="science settings: a JSON object or @FILE; what is left out takes its default",
    )
    parser.add_argument(
        "--execution",
        type=_json_object,
        default={},
        metavar="JSON",
        help="execution settings (devices, workers, ...): a JSON object or @FILE; change no result",
    )
    for role, text in (inputs or {}).items():
        parser.add_argument(
            f"--{role}", type=Path, nargs="+", default=[], metavar="PATH", help=text
        )
    if state:
        parser.add_argument(
            "--state",
            type=Path,
            metavar="DIR",
            help="folder that an interrupted run resumes from; default: OUT/.state",
        )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder to write the results to"
    )
    return parser


def _json_object(text: str) -> dict[str, Any]:
    try:
        source = Path(text[1:]).read_text(encoding="utf-8") if text.startswith("@") else text
        value = json.loads(source)
    except OSError as error:
        raise argparse.ArgumentTypeError(f"cannot read {text[1:]}: {error.strerror}") from None
    except ValueError as error:  # also bytes that are no UTF-8
        raise argparse.ArgumentTypeError(f"not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError("a JSON object is wanted")
    return value


def only_path(paths: list[Path], role: str) -> Path:
    """The single path of an input role, which must exist."""
    if len(paths) != 1:
        raise UserError(f"--{role} wants one file, {len(paths)} were given.")
    if not paths[0].exists():
        raise UserError(f"--{role} {paths[0]}: no such file.")
    return paths[0]


def block(model: type[Block], values: Mapping[str, Any] | None, where: str) -> Block:
    """A typed settings block from JSON values; a mistake is a UserError that names `where`."""
    try:
        made = model.model_validate(values or {})
    except ValidationError as error:
        lines = []
        for problem in error.errors():
            name = ".".join([where, *(str(part) for part in problem["loc"])])
            if problem["type"] == "extra_forbidden":
                known = nearest(str(problem["loc"][-1]), model.model_fields)
                lines.append(f"unknown setting {name}.{known}")
            else:
                lines.append(f"{name}: {problem['msg']} (found {problem['input']!r})")
        raise UserError("\n".join(lines)) from None
    if isinstance(made, Closed) and (problems := meaningless(made, where)):
        raise UserError("\n".join(problems))
    return made


def read_json(path: Path, *keys: str) -> Any:
    """What a JSON file holds, an object with `keys` if there are any.

    raises   UserError that names the file
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not valid JSON: {error}.") from None
    lacking = [key for key in keys if not isinstance(value, dict) or key not in value]
    if lacking:
        raise UserError(
            f"{path} has no {' and no '.join(lacking)}: it is not what it is taken for."
        )
    return value


def write_json(path: Path, value: Any) -> None:
    """Write an artefact's JSON in the one form that equal values have equal bytes in."""
    text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    path.write_text(text, encoding="utf-8")


class How(NamedTuple):
    """How a stage is to run: its execution settings, and what the runner and the rule add to them.

    label    what its progress lines begin with
    threads  cores it may use
    extras   facts of this stage alone, such as a file that it may read
    """

    settings: Execution
    label: str
    threads: int
    extras: dict[str, Any]


def how_to_run(args: argparse.Namespace, stage: str, *extras: str) -> How:
    """The execution settings of a stage's command line; `extras` names what else it knows."""
    given = dict(args.execution)
    label = given.pop("label", stage)
    threads = min(int(given.pop("threads", usable_threads())), usable_threads())
    found = {name: given.pop(name, None) for name in extras}
    return How(block(Execution, given, "execution"), label, max(1, threads), found)
