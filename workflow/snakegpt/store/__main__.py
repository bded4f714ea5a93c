"""Questions about the store.

python -m snakegpt.store why results/models/gpt2/weights.safetensors
python -m snakegpt.store why train_gpt2 --config scale=full
"""

from __future__ import annotations

import argparse
from typing import Any

import yaml

from snakegpt.errors import UserError, reports_errors
from snakegpt.locks import read as read_locks
from snakegpt.pipeline import TARGETS, Pipeline, Request
from snakegpt.settings import load_files
from snakegpt.store.explain import Reason, find, why
from snakegpt.store.objects import Store


def _requested(pipeline: Pipeline, target: str) -> Request:
    """The request behind a file in results/ or a target such as train_gpt2."""
    prefix, _, name = target.partition("_")
    path = TARGETS[prefix].format(experiment=name) if prefix in TARGETS else target
    request = find(pipeline, path)
    if request is None:
        raise UserError(
            f"'{target}' is no result of this pipeline.\n"
            "  name a file below results/ or a target such as train_gpt2"
        )
    return request


def _print(reason: Reason) -> None:
    first = reason.first()
    if first is not reason:
        print("\n".join(first.lines()))
        print("which everything below it follows from, down to")
    print("\n".join(reason.lines()))


def _overrides(pairs: list[str]) -> dict[str, Any]:
    values = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise UserError(f"--config wants NAME=VALUE, found '{pair}'.")
        values[key] = yaml.safe_load(value)
    return values


@reports_errors
def main(argv: list[str] | None = None) -> None:
    summary, _, rest = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    explain = commands.add_parser("why", help="what differs from the action that made a result")
    explain.add_argument("target", help="a file below results/ or a target such as train_gpt2")
    explain.add_argument("--configfile", nargs="+", default=["config.yaml"], metavar="FILE")
    explain.add_argument("--config", nargs="+", default=[], metavar="NAME=VALUE")
    args = parser.parse_args(argv)
    settings = load_files(args.configfile, _overrides(args.config))
    pipeline = Pipeline(settings, read_locks("corpora.lock.json"))
    _print(why(Store.locate(settings.store), pipeline, _requested(pipeline, args.target)))


if __name__ == "__main__":
    main()
