"""Join the parts of a token set into its manifest, on which everything that reads tokens depends.

Reads: part_*.json of all parts, in order. Writes: manifest.json: tokenizer, splits with their shards
(name, sha256, bytes, tokens), documents and text bytes. By hand:

    python -m snakegpt.stages.index_tokens \\
        --parts results/tokens/shakespeare-gpt2/part_000000.json --out /tmp/tokens

Of a mixture: reads the manifests of several token sets, with the shards beside them. Writes one that
lists all their shards, names those links to them, and adds `sets`: of each its weight and splits. By hand:

    python -m snakegpt.stages.index_tokens --settings '{"weights": [3, 1]}' \\
        --sets results/tokens/web-gpt2/manifest.json results/tokens/code-gpt2/manifest.json --out /tmp/mix
"""

from __future__ import annotations

import base64
import errno
import json
import os
import shutil
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from snakegpt.command import only_path, stage_parser, write_json
from snakegpt.errors import UserError, reports_errors
from snakegpt.shards import token_bytes
from snakegpt.tokens import open_split, read_manifest, require_same_tokenizer

REVISION = 3  # 3: several shards a part
SCIENCE = ("snakegpt.shards",)

SUMS = ("n_documents", "n_text_bytes", "n_characters")

MOST_COMMON = 20  # ids that the manifest names


def index_tokens(parts: list[Path], drops: Path | None = None) -> dict[str, Any]:
    """The content of manifest.json.

    drops    drops.json of screen_documents, if the corpus was screened
    raises   UserError if the parts are of several tokenizers, or a split has no document
    """
    if not parts:
        raise UserError("--parts wants at least one part_*.json.")
    contents = [_read(path) for path in parts]
    tokenizer = contents[0]["tokenizer"]
    for path, content in zip(parts, contents, strict=True):
        if content["tokenizer"]["fingerprint"] != tokenizer["fingerprint"]:
            raise UserError(
                f"{parts[0]} was encoded by tokenizer {tokenizer['fingerprint']},\n"
                f"  {path} by tokenizer {content['tokenizer']['fingerprint']}.\n"
                "  encode all parts with one tokenizer"
            )
    splits = {}
    for split in ("train", "val"):
        found = [content["splits"][split] for content in contents]
        shards = [shard for part in found for shard in part["shards"]]
        splits[split] = {**_sum(found, shards), "most_common_ids": _most_common(found)}
    if not any(split["n_documents"] for split in splits.values()):
        raise UserError("the corpus is empty: none of its files holds a document with text.")
    for split, other in (("train", "lower"), ("val", "raise")):
        if not splits[split]["n_documents"]:
            name = {"train": "training", "val": "validation"}[split]
            raise UserError(
                f"the {name} split has no document.\n  {other} validation.fraction of the corpus,"
                " or set validation.by: position to take the tail of every document"
            )
    screening = {}
    if drops:
        content = json.loads(drops.read_text(encoding="utf-8"))
        names = ("n_documents", "n_duplicates", "n_overlapping", "overlaps")
        screening = {"screening": {name: content[name] for name in names}}
    return {
        **screening,
        "tokenizer": tokenizer,
        "dtype": f"uint{8 * token_bytes(tokenizer['n_vocab'])}",
        "splits": splits,
        **_left_out(contents),
    }


def mix_tokens(sets: list[Path], weights: list[float], out: Path) -> dict[str, Any]:
    """The manifest of a mixture, whose shards are linked into `out`: the k-th set's as train_<k>_000000.bin.

    sets     manifests, one a corpus, in the order of the weights
    raises   UserError if they are of several tokenizers, or a shard is not what its manifest says
    """
    if len(sets) != len(weights):
        raise UserError(f"--sets has {len(sets)} manifests, but there are {len(weights)} weights.")
    contents = [read_manifest(path) for path in sets]
    tokenizer = contents[0]["tokenizer"]
    for path, content in zip(sets, contents, strict=True):
        found = content["tokenizer"]["fingerprint"]
        require_same_tokenizer(tokenizer["fingerprint"], str(sets[0]), found, str(path))
    described: list[dict[str, Any]] = [{"weight": weight} for weight in weights]
    splits: dict[str, Any] = {}
    for split in ("train", "val"):
        shards: list[dict[str, Any]] = []
        for number, (path, content) in enumerate(zip(sets, contents, strict=True)):
            open_split(path, content, split)  # what is linked has been looked at
            first = len(shards)
            for index, shard in enumerate(content["splits"][split]["shards"]):
                name = f"{split}_{number:03d}_{index:06d}.bin"
                _link(path.parent / shard["name"], out / name)
                shards.append({**shard, "name": name})
            n_tokens = content["splits"][split]["n_tokens"]
            described[number][split] = {
                "n_tokens": n_tokens,
                "shards": [first, len(shards)],
                **{name: content["splits"][split][name] for name in SUMS},
            }
        found = [content["splits"][split] for content in contents]
        splits[split] = _sum(found, shards)
    return {
        "sets": described,
        "tokenizer": tokenizer,
        "dtype": contents[0]["dtype"],
        "splits": splits,
        **_left_out(contents),
    }


def _sum(found: list[dict[str, Any]], shards: list[dict[str, Any]]) -> dict[str, Any]:
    """A split of parts or of token sets: their shards that hold something, and their totals."""
    n_tokens = sum(shard["n_tokens"] for shard in shards)
    sums = {name: sum(part[name] for part in found) for name in SUMS}
    return {
        "n_tokens": n_tokens,
        "shards": [shard for shard in shards if shard["n_tokens"]],
        **sums,
        "lengths": _lengths(found),
        "bytes_per_token": round(sums["n_text_bytes"] / n_tokens, 4) if n_tokens else None,
    }


def _left_out(contents: list[dict[str, Any]]) -> dict[str, Any]:
    """What was dropped, by reason, and replaced."""
    dropped: Counter[str] = Counter()
    for content in contents:
        dropped.update(content["dropped"])
    replaced = sum(content["replaced_bytes"] for content in contents)
    return {"dropped": dict(dropped), "replaced_bytes": replaced}


def _link(source: Path, link: Path) -> None:
    """Another name for the bytes of a file, which costs no disk; a copy where that is not possible.

    Of a file that may be written to it is a copy too: its bytes would change with it.
    """
    if not source.stat().st_mode & 0o222:
        try:
            os.link(source.resolve(), link)
            return
        except OSError as error:
            if error.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP):
                raise
    shutil.copyfile(source, link)


def _lengths(parts: list[dict[str, Any]]) -> dict[str, int]:
    """Documents by length: the largest power of two that is not above their tokens -> how many."""
    total: Counter[int] = Counter()
    for part in parts:
        total.update({int(length): n for length, n in part["lengths"].items()})
    return {str(length): n for length, n in sorted(total.items())}


def _most_common(parts: list[dict[str, Any]]) -> list[list[int]]:
    """[id, how often it occurs] of the most common ids, the commonest first."""
    total = sum(
        np.frombuffer(zlib.decompress(base64.b64decode(part["id_counts"])), "<i8") for part in parts
    )
    counts = np.asarray(total)
    order = np.argsort(-counts, kind="stable")[:MOST_COMMON]
    return [[int(index), int(counts[index])] for index in order if counts[index]]


def _read(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if not {"tokenizer", "splits", "dropped", "replaced_bytes"} <= content.keys():
            raise ValueError("it lacks the fields of one")
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{path} is no description of a part: {error}.") from None
    return content


@reports_errors
def main(argv: list[str] | None = None) -> None:
    roles = {
        "parts": "part_*.json of all parts, in order",
        "drops": "drops.json, if there is one",
        "sets": "manifest.json of each token set of a mixture, instead of parts",
    }
    args = stage_parser(__doc__, roles).parse_args(argv)
    if args.sets:
        args.out.mkdir(parents=True, exist_ok=True)
        manifest = mix_tokens(args.sets, args.settings.get("weights", []), args.out)
    else:
        manifest = index_tokens(args.parts, only_path(args.drops, "drops") if args.drops else None)
    args.out.mkdir(parents=True, exist_ok=True)
    write_json(args.out / "manifest.json", manifest)


if __name__ == "__main__":
    main()
