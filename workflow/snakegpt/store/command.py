"""What the commands of `python -m snakegpt.store` share: the settings, the store and the results in question."""

from __future__ import annotations

import argparse
import json
import re
from typing import Any

import yaml

from snakegpt.errors import UserError
from snakegpt.locks import read as read_locks
from snakegpt.pipeline import TARGETS, Pipeline, Request
from snakegpt.settings import load_files
from snakegpt.store.objects import Store


def add_settings(parser: argparse.ArgumentParser) -> None:
    """The flags that name the settings, as Snakemake spells them."""
    parser.add_argument("--configfile", nargs="+", default=["config.yaml"], metavar="FILE")
    parser.add_argument("--config", nargs="+", default=[], metavar="NAME=VALUE")


def pipeline_of(args: argparse.Namespace) -> Pipeline:
    """The pipeline under the settings that a command line names."""
    settings = load_files(args.configfile, _overrides(args.config))
    return Pipeline(settings, read_locks("corpora.lock.json"))


def store_of(pipeline: Pipeline) -> Store:
    """The store that the settings name."""
    chosen = pipeline.settings.store
    return Store.locate(chosen.path, check=chosen.check, link=chosen.link)


def requested(pipeline: Pipeline, target: str) -> Request:
    """The request behind a file in results/ or a target such as train_gpt2.

    raises   UserError for anything else
    """
    prefix, _, name = target.partition("_")
    path = TARGETS[prefix].format(experiment=name) if prefix in TARGETS else target
    request = pipeline.find(path)
    if request is None:
        raise UserError(
            f"'{target}' is no result of this pipeline.\n"
            "  name a file below results/ or a target such as train_gpt2"
        )
    return request


def age_s(text: str) -> float:
    """Seconds in an age as people write it: 90s, 45m, 12h, 30d, 2w."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smhdw])", text)
    if not found:
        raise argparse.ArgumentTypeError(f"'{text}' is no age such as 90s, 45m, 12h, 30d or 2w")
    return float(found[1]) * {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}[found[2]]


def print_json(value: Any) -> None:
    """For programs: one indented JSON value on standard output."""
    print(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False))


def _overrides(pairs: list[str]) -> dict[str, Any]:
    values = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise UserError(f"--config wants NAME=VALUE, found '{pair}'.")
        values[key] = yaml.safe_load(value)
    return values
