"""Open the tokens that a manifest lists, after checking that they are the ones it means."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from snakegpt.batches import Mixture, TokenStream, TrainingBatches
from snakegpt.errors import UserError
from snakegpt.shards import read_shard


def read_manifest(path: Path) -> dict[str, Any]:
    """The content of a manifest.json.

    raises  UserError if it is none
    """
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path} is no readable manifest: {error}.") from None
    if not isinstance(manifest, dict) or not {"tokenizer", "splits"} <= manifest.keys():
        raise UserError(f"{path} is no manifest of tokens: it lacks `tokenizer` or `splits`.")
    return manifest


def open_split(path: Path, manifest: dict[str, Any], split: str) -> TokenStream:
    """The tokens of a split, memory-mapped from the shards beside its manifest.

    raises  UserError that names the shard which is missing, cut short or of another tokenizer
    """
    return _open(path, manifest, manifest["splits"][split]["shards"])


class TokenSet(NamedTuple):
    """One corpus of a mixture: its share of the rows, and its tokens."""

    weight: float
    stream: TokenStream


def open_sets(path: Path, manifest: dict[str, Any], split: str) -> list[TokenSet]:
    """The tokens of a split, corpus by corpus: several for a mixture, else one.

    raises  what `open_split` raises
    """
    if "sets" not in manifest:
        return [TokenSet(1.0, open_split(path, manifest, split))]
    shards = manifest["splits"][split]["shards"]
    return [
        TokenSet(part["weight"], _open(path, manifest, shards[slice(*part[split]["shards"])]))
        for part in manifest["sets"]
    ]


def training_batches(sets: list[TokenSet], context: int, rows: int, seed: int) -> TrainingBatches:
    """What is trained on at each step: one corpus in random order, or each at its share of the rows."""
    if len(sets) == 1:
        return TrainingBatches(sets[0].stream, context, rows, seed)
    weights, streams = zip(*sets, strict=True)
    return Mixture(streams, weights, context, rows, seed)


def _open(path: Path, manifest: dict[str, Any], entries: list[dict[str, Any]]) -> TokenStream:
    shards = []
    for entry in entries:
        file = path.parent / entry["name"]
        if not file.exists():
            raise UserError(
                f"{file} is missing, which {path} lists.\n"
                "  make it again: snakemake --forcerun index_tokens, or restore results/ from the store"
            )
        shard = read_shard(file, fingerprint=manifest["tokenizer"]["fingerprint"])
        if len(shard) != entry["n_tokens"]:
            raise UserError(
                f"{file} holds {len(shard):,} tokens, {path} expects {entry['n_tokens']:,}."
            )
        shards.append(shard)
    return TokenStream(shards)


def require_same_tokenizer(wanted: str, wanted_by: str, found: str, found_in: str) -> None:
    """UserError naming both sides unless two artefacts belong to one tokenizer."""
    if wanted != found:
        raise UserError(
            f"{wanted_by} belongs to tokenizer {wanted},\n  {found_in} to tokenizer {found}.\n"
            "  make both with the same tokenizer"
        )
