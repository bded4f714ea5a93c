"""What benchmarks of training share: token sets made on the spot, nanoGPT's files, and the steps of both sides."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from snakegpt.shards import ShardWriter

FINGERPRINT = "ab" * 32


def write_token_set(
    folder: Path, ids: Mapping[str, NDArray[Any]], *, n_vocab: int, end_of_text: int = 0
) -> Path:
    """One shard a split and the manifest, whose path is returned."""
    splits = {}
    for split, part in ids.items():
        with ShardWriter(folder / f"{split}_000000.bin", FINGERPRINT) as writer:
            writer.add(part)
        shards = [{"name": writer.path.name, "n_tokens": len(part)}]
        splits[split] = {"n_tokens": len(part), "shards": shards}
    tokenizer = {
        "fingerprint": FINGERPRINT,
        "n_vocab": n_vocab,
        "end_of_text": end_of_text,
        "kind": "char",
    }
    manifest = folder / "manifest.json"
    content = {"tokenizer": tokenizer, "dtype": "uint16", "splits": splits}
    manifest.write_text(json.dumps(content), encoding="utf-8")
    return manifest


def copy_nanogpt(
    checkout: Path, work: Path, changes: Mapping[str, str], more: Iterable[str] = ()
) -> None:
    """nanoGPT's train.py with some of its text replaced, and what it needs beside it."""
    for name in ("model.py", "configurator.py", *more):
        (work / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(checkout / name, work / name)
    source = (checkout / "train.py").read_text(encoding="utf-8")
    for old, new in changes.items():
        assert old in source
        source = source.replace(old, new)
    (work / "train.py").write_text(source, encoding="utf-8")


def our_steps_s(out: Path) -> list[float]:
    """Seconds of every step that train_model recorded."""
    lines = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    facts = [fact for fact in map(json.loads, lines) if fact["event"] == "train"]
    seconds: list[float] = np.diff([0.0, *(fact["elapsed_s"] for fact in facts)]).tolist()
    return seconds


def nanogpt_steps_s(said: str) -> list[float]:
    """Seconds of every step that nanoGPT's train.py printed."""
    return [float(ms) / 1e3 for ms in re.findall(r"iter \d+: loss .* time ([0-9.]+)ms", said)]
