"""Small token sets written from the format's description alone, and runs of the stages on them."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

CHARACTERS = "abcdefgh \n"
SETTINGS: dict[str, Any] = {
    "model": {
        "layers": 2,
        "heads": 2,
        "channels": 16,
        "context": 8,
        "bias": False,
        "vocabulary_multiple": 4,
    },
    "training": {
        "batch_tokens": 64,
        "steps": 12,
        "learning_rate": 1e-2,
        "min_learning_rate": 1e-3,
        "warmup_steps": 2,
        "precision": "float32",
        "validation_interval": 5,
        "validation_tokens": None,
    },
}


def tokenizer(folder: Path, characters: str = CHARACTERS) -> Path:
    """tokenizer.json of the char kind: id 0 ends a text, character i has the id i + 1."""
    from snakegpt.tokenizers import char_tokenizer

    path = folder / "tokenizer.json"
    path.write_text(char_tokenizer(set(characters)).to_json(), encoding="utf-8")
    return path


def tokens(
    folder: Path, *, n_train: int = 2000, n_val: int = 300, fingerprint: str = "ab" * 32
) -> Path:
    """A manifest and its shards (two of train, one of val) of learnable pseudo-text."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = np.random.default_rng(0)
    steps = draw.integers(1, 3, n_train + n_val)
    ids = (np.cumsum(steps) % (len(CHARACTERS) - 1) + 1).astype(np.uint16)
    ids[::100] = 0
    half = n_train // 3
    pieces = {
        "train": [ids[:half], ids[half:n_train]],
        "val": [ids[n_train:]],
    }
    splits = {
        split: {
            "n_tokens": sum(map(len, shards)),
            "n_documents": 1,
            "n_text_bytes": sum(map(len, shards)),
            "shards": [
                shard(folder / f"{split}_{index:06d}.bin", piece, fingerprint)
                for index, piece in enumerate(shards)
            ],
        }
        for split, shards in pieces.items()
    }
    manifest = {
        "tokenizer": {
            "fingerprint": fingerprint,
            "n_vocab": len(CHARACTERS) + 1,
            "end_of_text": 0,
            "kind": "char",
        },
        "dtype": "uint16",
        "splits": splits,
        "dropped": {"empty": 0},
        "replaced_bytes": 0,
    }
    path = folder / "manifest.json"
    path.write_text(json.dumps(manifest), encoding="utf-8")
    return path


def shard(path: Path, ids: np.ndarray, fingerprint: str) -> dict[str, Any]:
    """256 int32 of header, then uint16 ids, all little-endian."""
    header = np.zeros(256, dtype="<i4")
    header[:3] = 20240520, 1, len(ids)
    header[8:16] = np.frombuffer(bytes.fromhex(fingerprint), dtype="<i4")
    header[16] = 2
    content = header.tobytes() + ids.astype("<u2").tobytes()
    path.write_bytes(content)
    return {
        "name": path.name,
        "sha256": hashlib.sha256(content).hexdigest(),
        "bytes": len(content),
        "n_tokens": len(ids),
    }


def changed(**training: Any) -> dict[str, Any]:
    """SETTINGS with other training settings."""
    return {**SETTINGS, "training": {**SETTINGS["training"], **training}}


def train_command(
    manifest: Path, out: Path, settings: dict[str, Any], execution: dict[str, Any], state: Path
) -> list[str]:
    # One thread a rank: on a machine as busy as tests make it, OpenMP's barriers spin for minutes.
    how = {"device": "cpu", "threads": execution.get("ranks", 1), **execution}
    return [
        *(sys.executable, "-m", "snakegpt.stages.train_model"),
        *("--settings", json.dumps(settings), "--execution", json.dumps(how)),
        *("--tokens", str(manifest), "--out", str(out), "--state", str(state)),
    ]


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def train(
    manifest: Path, out: Path, settings: dict[str, Any] = SETTINGS, **execution: Any
) -> subprocess.CompletedProcess[str]:
    """Run the stage by its command line, state beside `out`."""
    state = out.with_name(f"{out.name}.state")
    command = train_command(manifest, out, settings, execution, state)
    return subprocess.run(command, capture_output=True, text=True, timeout=240, env=ENVIRONMENT)


def metrics(out: Path, event: str) -> list[dict[str, Any]]:
    lines = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [fact for fact in map(json.loads, lines) if fact["event"] == event]
