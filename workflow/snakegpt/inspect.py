"""Print what a token shard or a manifest.json holds.

A shard is read as far as it goes, also a damaged one and one that another program wrote: llm.c's and
modded-nanogpt's, uint16 or uint32. The tokenizer is the one below results/tokenizers with the shard's
fingerprint, or the one given; without any there are ids and no text. Status 1: a size does not fit.

    python -m snakegpt.inspect results/tokens/shakespeare-gpt2/train_000000.bin
    python -m snakegpt.inspect results/tokens/shakespeare-gpt2/manifest.json --documents 1
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from snakegpt.command import read_json
from snakegpt.errors import UserError, reports_errors
from snakegpt.shards import FINGERPRINT_WORDS, FORMATS, HEADER_BYTES, HEADER_WORDS
from snakegpt.tokenizers import Tokenizer, load

CHUNK_TOKENS = 1 << 22

# What else people may take for a shard, by its first bytes, and what to do with it.
KNOWN = {
    b"PAR1": "a parquet file",
    b"\x93NUMPY": "a numpy array, as build-nanogpt writes its shards",
    b"MMIDIDX\0\0": "an index of Megatron; the ids are in the .bin beside it, which says nothing of itself",
    b"PK\x03\x04": "a zip archive",
    b"\x1f\x8b": "a gzip file",
    b"\x28\xb5\x2f\xfd": "a zstandard file",
}


def inspect(
    path: Path, tokenizer_path: Path | None = None, n_documents: int = 3, n_tokens: int = 64
) -> dict[str, Any]:
    """What a shard or a manifest holds, as JSON values.

    tokenizer_path  tokenizer.json; None: looked for by fingerprint
    n_documents     of those at the start to show; without a tokenizer only the first ids are shown
    n_tokens        of each document
    raises          UserError for anything else, and for a tokenizer that is not the shard's
    """
    if path.is_dir():
        raise UserError(f"{path} is a folder.\n  name a shard in it, or its manifest.json")
    try:
        with path.open("rb") as file:
            begin = file.read(HEADER_BYTES)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from None
    if begin.lstrip()[:1] == b"{":
        return _manifest(path, tokenizer_path, n_documents, n_tokens)
    return _shard(path, begin, tokenizer_path, n_documents, n_tokens)


def _shard(
    path: Path, begin: bytes, tokenizer_path: Path | None, n_documents: int, n_tokens: int
) -> dict[str, Any]:
    facts = _header(path, begin)
    tokenizer, place = _tokenizer(path, facts["fingerprint"], tokenizer_path)
    there = min(facts["n_tokens"], (facts["bytes"] - HEADER_BYTES) // facts["token_bytes"])
    ids = _ids(path, facts, there)
    end_of_text = tokenizer.end_of_text if tokenizer else None
    n_found, least, most = 0, None, None
    for first in range(0, len(ids), CHUNK_TOKENS):
        chunk = ids[first : first + CHUNK_TOKENS]
        least = min(int(chunk.min()), least if least is not None else int(chunk[0]))
        most = max(int(chunk.max()), most or 0)
        n_found += int(np.count_nonzero(chunk == end_of_text)) if tokenizer else 0
    return {
        "path": str(path),
        **facts,
        "tokenizer": str(place) if place else None,
        "n_vocab": tokenizer.n_vocab if tokenizer else None,
        "n_documents": n_found if tokenizer else None,
        "min_id": least,
        "max_id": most,
        "first": _first(ids, tokenizer, n_documents, n_tokens),
    }


def _header(path: Path, begin: bytes) -> dict[str, Any]:
    found = next((text for magic, text in KNOWN.items() if begin.startswith(magic)), None)
    if found:
        raise UserError(f"{path} is no shard but {found}.")
    if len(begin) < HEADER_BYTES:
        raise UserError(
            f"{path} is no shard: {len(begin):,} bytes, shorter than the header of {HEADER_BYTES:,}."
        )
    words = np.frombuffer(begin, dtype="<i4", count=HEADER_WORDS)
    magic, version, n_tokens = (int(word) for word in words[:3])
    width = next((width for width, form in FORMATS.items() if form == (magic, version)), None)
    if width is None or n_tokens < 0:
        forms = " or ".join(f"{m}, {v} (uint{8 * w})" for w, (m, v) in FORMATS.items())
        raise UserError(
            f"{path} is no shard: it begins with the numbers {magic}, {version}, {n_tokens} instead of"
            f" {forms} and a number of tokens.\n"
            "  a file of ids alone, such as nanoGPT's train.bin or datatrove's .ds, says nothing of itself"
        )
    size, fingerprint = path.stat().st_size, words[FINGERPRINT_WORDS].tobytes().hex()
    return {
        "magic": magic,
        "version": version,
        "dtype": f"uint{8 * width}",
        "token_bytes": width,
        "n_tokens": n_tokens,
        "fingerprint": fingerprint if fingerprint.strip("0") else None,
        "bytes": size,
        "expected_bytes": HEADER_BYTES + width * n_tokens,
        "fits": size == HEADER_BYTES + width * n_tokens,
    }


def _ids(path: Path, facts: dict[str, Any], n_tokens: int) -> NDArray[np.unsignedinteger]:
    dtype = f"<u{facts['token_bytes']}"
    if not n_tokens:
        return np.empty(0, dtype=dtype)
    ids = np.memmap(path, dtype=dtype, mode="r", offset=HEADER_BYTES, shape=(n_tokens,))
    return np.asarray(ids)


def _first(
    ids: NDArray[np.unsignedinteger], tokenizer: Tokenizer | None, n_documents: int, n_tokens: int
) -> list[dict[str, Any]]:
    """The begin of the first documents: their place, ids and text; the first ids if they are unknown."""
    if tokenizer is None:
        return [{"place": 0, "ids": ids[:n_tokens].tolist(), "text": None}] if len(ids) else []
    shown: list[dict[str, Any]] = []
    place = 0
    while place < len(ids) and len(shown) < n_documents:
        end = _next(ids, tokenizer.end_of_text, place + 1)
        some = ids[place : min(end, place + n_tokens)].tolist()
        known = [i for i in some if i < tokenizer.n_vocab]
        shown.append({"place": place, "ids": some, "text": tokenizer.decode(known)})
        place = end
    return shown


def _next(ids: NDArray[np.unsignedinteger], end_of_text: int, place: int) -> int:
    """Where the next document starts; the end of the ids if there is none."""
    for first in range(place, len(ids), CHUNK_TOKENS):
        found = np.flatnonzero(ids[first : first + CHUNK_TOKENS] == end_of_text)
        if len(found):
            return first + int(found[0])
    return len(ids)


def _manifest(
    path: Path, tokenizer_path: Path | None, n_documents: int, n_tokens: int
) -> dict[str, Any]:
    manifest = read_json(path, "tokenizer", "splits")
    try:
        fingerprint = manifest["tokenizer"]["fingerprint"]
        shards = {name: split["shards"] for name, split in manifest["splits"].items()}
    except (KeyError, TypeError, AttributeError):
        raise UserError(f"{path} is no manifest of tokens: it lists no shards.") from None
    _, place = _tokenizer(path, fingerprint, tokenizer_path)
    splits = {}
    for name, split in manifest["splits"].items():
        problems = []
        for shard in shards[name]:
            file = path.parent / shard["name"]
            if not file.exists():
                problems.append(f"{shard['name']} is missing")
            elif file.stat().st_size != shard["bytes"]:
                problems.append(
                    f"{shard['name']} has {file.stat().st_size:,} bytes, {shard['bytes']:,} are listed"
                )
        first = None
        if shards[name] and not problems:
            first = inspect(path.parent / shards[name][0]["name"], place, n_documents, n_tokens)[
                "first"
            ]
        counts = {key: value for key, value in split.items() if key.startswith("n_")}
        splits[name] = {
            **counts,
            "n_shards": len(shards[name]),
            "fits": not problems,
            "problems": problems,
            "first": first,
        }
    return {
        "path": str(path),
        "dtype": manifest.get("dtype"),
        **manifest["tokenizer"],
        "tokenizer": str(place) if place else None,
        "fits": all(split["fits"] for split in splits.values()),
        "splits": splits,
    }


def _tokenizer(
    path: Path, fingerprint: str | None, given: Path | None
) -> tuple[Tokenizer | None, Path | None]:
    """The tokenizer of a shard and its file, if one is known."""
    if given:
        tokenizer = load(given)
        if fingerprint not in (None, tokenizer.fingerprint):
            raise UserError(
                f"{given} is tokenizer {tokenizer.fingerprint},\n  {path} was encoded by {fingerprint}."
                "\n  name its own, or leave --tokenizer out"
            )
        return tokenizer, given
    if fingerprint:
        # In the working directory, then in the project that the shard lies in.
        for folder in (Path("results"), *path.absolute().parents):
            for file in sorted(folder.glob("tokenizers/*/tokenizer.json")):
                with contextlib.suppress(UserError):
                    if read_json(file, "fingerprint")["fingerprint"] == fingerprint:
                        return load(file), file
    return None, None


# ---- for people ----


def _lines(facts: dict[str, Any]) -> list[str]:
    if "splits" in facts:
        lines = [
            f"{facts['path']}: manifest of {facts['dtype']} shards",
            *_about_tokenizer(facts),
        ]
        for name, split in facts["splits"].items():
            counts = ", ".join(
                f"{split[key]:,} {key.removeprefix('n_').replace('_', ' ')}"
                for key in split
                if key.startswith("n_")
            )
            lines += [f"{name:12} {counts}", *(f"  DAMAGED: {text}" for text in split["problems"])]
            lines += _begins(split["first"] or [])
        return lines
    by = "snakegpt" if facts["fingerprint"] else "llm.c or modded-nanogpt, no fingerprint"
    size = f"{facts['bytes']:,} bytes, as the header means"
    if not facts["fits"]:
        size = f"{facts['bytes']:,} bytes, the header means {facts['expected_bytes']:,}: DAMAGED"
    documents = facts["n_documents"]
    ids = "none" if facts["max_id"] is None else f"{facts['min_id']:,} to {facts['max_id']:,}"
    if facts["n_vocab"] is not None and (facts["max_id"] or 0) >= facts["n_vocab"]:
        ids += f": BEYOND the tokenizer's {facts['n_vocab']:,}"
    return [
        f"{facts['path']}: shard of {by}",
        f"{'header':12} magic {facts['magic']}, version {facts['version']}, {facts['dtype']}",
        f"{'size':12} {size}",
        f"{'tokens':12} {facts['n_tokens']:,}",
        *_about_tokenizer(facts),
        f"{'documents':12} {'unknown without a tokenizer' if documents is None else f'{documents:,}'}",
        f"{'ids':12} {ids}",
        *_begins(facts["first"]),
    ]


def _about_tokenizer(facts: dict[str, Any]) -> list[str]:
    fingerprint = facts["fingerprint"] or "unknown"
    place = facts["tokenizer"] or "found nowhere below results/; name it with --tokenizer"
    return [f"{'fingerprint':12} {fingerprint}", f"{'tokenizer':12} {place}"]


def _begins(first: list[dict[str, Any]]) -> list[str]:
    lines = []
    for begin in first:
        lines.append(f"{'at ' + format(begin['place'], ','):12} {' '.join(map(str, begin['ids']))}")
        if begin["text"] is not None:
            lines.append(f"{'':12} {json.dumps(begin['text'], ensure_ascii=False)}")
    return lines


@reports_errors
def main(argv: list[str] | None = None) -> None:
    summary, _, rest = (__doc__ or "").strip().partition("\n")
    parser = argparse.ArgumentParser(
        prog="python -m snakegpt.inspect",
        description=summary,
        epilog=rest.strip(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("path", type=Path, metavar="SHARD|manifest.json")
    parser.add_argument("--tokenizer", type=Path, metavar="FILE", help="tokenizer.json")
    parser.add_argument(
        "--documents", type=int, default=3, help="documents to show; default: 3", metavar="N"
    )
    parser.add_argument(
        "--tokens", type=int, default=64, help="tokens of each to show; default: 64", metavar="N"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    args = parser.parse_args(argv)
    if min(args.documents, args.tokens) < 0:
        parser.error("--documents and --tokens are numbers from 0 on")
    facts = inspect(args.path, args.tokenizer, args.documents, args.tokens)
    print(
        json.dumps(facts, indent=2, ensure_ascii=False) if args.json else "\n".join(_lines(facts))
    )
    sys.exit(0 if facts["fits"] else 1)


if __name__ == "__main__":
    main()
