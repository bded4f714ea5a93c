"""What a raw file is, by its name alone: plain text, JSON lines or parquet, compressed or not."""

from __future__ import annotations

from pathlib import PurePath

PARQUET, JSON_LINES, TEXT = "parquet", "JSON lines", "text"
COMPRESSED = (".gz", ".zst")

_KINDS = {".parquet": PARQUET, ".jsonl": JSON_LINES, ".ndjson": JSON_LINES}


def kind_of(name: str) -> str:
    """PARQUET, JSON_LINES or TEXT, which is everything else; capitals count for nothing."""
    path = PurePath(name.lower())
    inner = path if path.suffix not in COMPRESSED else PurePath(path.stem)
    return _KINDS.get(inner.suffix, TEXT)


def can_be_divided(name: str, separator: str | None) -> bool:
    """Whether the documents that begin in a byte range of a file are found without what is before it.

    separator  string between documents of a text file; None: the file is one document
    """
    if name.lower().endswith(COMPRESSED):
        return False
    if kind_of(name) != TEXT:
        return kind_of(name) == JSON_LINES
    # In "a\n\n\nb" it depends on what came before where the separator "\n\n" is.
    return separator is not None and not any(
        separator.startswith(separator[size:]) for size in range(1, len(separator))
    )
