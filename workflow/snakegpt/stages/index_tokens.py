"""Join the parts of a token set into its manifest, on which everything that reads tokens depends.

Reads: part_*.json of all parts, in order. Writes: manifest.json: tokenizer, splits with their shards
(name, sha256, bytes, tokens), documents and text bytes. By hand:

    python -m snakegpt.stages.index_tokens \\
        --parts results/tokens/shakespeare-gpt2/part_000000.json --out /tmp/tokens
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from snakegpt.command import stage_parser, write_json
from snakegpt.errors import UserError, reports_errors
from snakegpt.shards import token_bytes

REVISION = 1
SCIENCE = ("snakegpt.shards",)

SUMS = ("n_documents", "n_text_bytes", "n_characters")


def index_tokens(parts: list[Path]) -> dict[str, Any]:
    """The content of manifest.json.

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
        splits[split] = {
            "n_tokens": sum(part["shard"]["n_tokens"] for part in found),
            "shards": [part["shard"] for part in found if part["shard"]["n_tokens"]],
            **{name: sum(part[name] for part in found) for name in SUMS},
        }
    if not any(split["n_documents"] for split in splits.values()):
        raise UserError("the corpus is empty: none of its files holds a document with text.")
    for split, other in (("train", "lower"), ("val", "raise")):
        if not splits[split]["n_documents"]:
            name = {"train": "training", "val": "validation"}[split]
            raise UserError(
                f"the {name} split has no document.\n  {other} validation.fraction of the corpus,"
                " or set validation.by: position to take the tail of every document"
            )
    dropped: Counter[str] = Counter()
    for content in contents:
        dropped.update(content["dropped"])
    return {
        "tokenizer": tokenizer,
        "dtype": f"uint{8 * token_bytes(tokenizer['n_vocab'])}",
        "splits": splits,
        "dropped": dict(dropped),
        "replaced_bytes": sum(content["replaced_bytes"] for content in contents),
    }


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
    args = stage_parser(__doc__, {"parts": "part_*.json of all parts, in order"}).parse_args(argv)
    manifest = index_tokens(args.parts)
    args.out.mkdir(parents=True, exist_ok=True)
    write_json(args.out / "manifest.json", manifest)


if __name__ == "__main__":
    main()
