"""What the commands of `python -m snakegpt.store` share: the settings, the store and the results in question."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from snakegpt.errors import UserError, nearest
from snakegpt.locks import read as read_locks
from snakegpt.pipeline import OUTPUTS, TARGETS, Pipeline, Request
from snakegpt.settings import load_files
from snakegpt.store.links import maker
from snakegpt.store.objects import Store
from snakegpt.store.provenance import chain


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
    """The request behind a file in results/ or a target such as train_gpt2 or all.

    raises   UserError for anything else
    """
    prefix, _, name = target.partition("_")
    path = TARGETS[prefix].format(experiment=name) if prefix in TARGETS else target
    if target == "all":
        path = OUTPUTS["build_index"][0]
    path = os.path.relpath(path)
    request = pipeline.find(path) or _beside(pipeline, Path(path))
    if request is None:
        raise UserError(
            f"'{target}' is no result of this pipeline.\n"
            "  name a file below results/ or a target such as train_gpt2"
        )
    return request


def _beside(pipeline: Pipeline, path: Path) -> Request | None:
    """The request behind a file that is published beside those the rules name."""
    record = maker(path)
    for parent in path.parents if record else ():
        for name in record["outputs"] if record else ():
            request = pipeline.find((parent / name).as_posix())
            if request:
                return request
    return None


def print_lines(lines: Iterable[str]) -> None:
    """For people, on standard output; who reads it may stop at any line, as `head` does."""
    try:
        print("\n".join(lines), flush=True)
    except BrokenPipeError:
        # Python flushes once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def age_s(text: str) -> float:
    """Seconds in an age as people write it: 90s, 45m, 12h, 30d, 2w."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smhdw])", text)
    if not found:
        raise argparse.ArgumentTypeError(f"'{text}' is no age such as 90s, 45m, 12h, 30d or 2w")
    return float(found[1]) * {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}[found[2]]


def print_json(value: Any) -> None:
    """For programs: one indented JSON value on standard output."""
    print_lines([json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False)])


def _overrides(pairs: list[str]) -> dict[str, Any]:
    values = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise UserError(f"--config wants NAME=VALUE, found '{pair}'.")
        values[key] = yaml.safe_load(value)
    return values


def add_without(parser: argparse.ArgumentParser) -> None:
    """The flag that leaves stages out, as `args.without`."""
    parser.add_argument(
        "--without",
        type=_stages,
        default=frozenset(),
        metavar="STAGE,...",
        help="stages whose objects are left out, such as fetch_corpus,encode_tokens",
    )


def _stages(text: str) -> frozenset[str]:
    stages = frozenset(filter(None, text.split(",")))
    for stage in sorted(stages - OUTPUTS.keys()):
        raise UserError(f"--without: unknown stage '{stage}'.{nearest(stage, OUTPUTS)}")
    return stages


def chain_behind(store: Store, pipeline: Pipeline, targets: list[str]) -> list[dict[str, Any]]:
    """The records behind what results/ shows of some targets, with all they follow from; sources first.

    raises   UserError if a target is no result or is not there
    """
    paths = [Path(requested(pipeline, target).outputs[0]) for target in targets]
    for target, path in zip(targets, paths, strict=True):
        if maker(path) is None:
            raise UserError(f"'{target}' has not been made yet.\n  make it: snakemake {target}")
    return chain(store, paths)
