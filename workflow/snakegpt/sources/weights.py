"""Which files pretrained weights are: one config.json and safetensors, nothing that can run code."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from snakegpt.errors import UserError
from snakegpt.sources.corpora import raw_files

PICKLES = (".bin", ".ckpt", ".pkl", ".pt", ".pth")


class WeightFiles(NamedTuple):
    """Fetched weights on disk; `tensors` are one safetensors file or the parts of one."""

    config: Path
    tensors: list[Path]


def require_weights(paths: Sequence[str], what: str) -> None:
    """Stop unless files are those that training can start from, before any of them is downloaded.

    paths  as the lock has them
    what   whose they are, as `weights gpt2`
    """
    pickles = [path for path in paths if path.endswith(PICKLES)]
    configs = [path for path in paths if PurePosixPath(path).name == "config.json"]
    tensors = [path for path in paths if path.endswith(".safetensors")]
    if pickles:
        raise UserError(
            f"{what}: {pickles[0]} is a pickle, which can run code when it is loaded.\n"
            "  take safetensors files: transformers' save_pretrained writes them, and the hub has them"
        )
    if len(configs) != 1 or not tensors:
        raise UserError(
            f"{what}: one config.json and at least one safetensors file are wanted, found"
            f" {', '.join(paths[:5])}.\n"
            "  name them in its source, such as files: [config.json, model.safetensors]"
        )


def weight_files(listing: Path) -> WeightFiles:
    """The files of fetched weights, by their weights.json.

    raises   UserError if one is missing, or they are not what training can start from
    """
    files = raw_files(listing)
    require_weights([file.as_posix() for file in files], str(listing))
    [config] = [file for file in files if file.name == "config.json"]
    return WeightFiles(config, [file for file in files if file.suffix == ".safetensors"])
