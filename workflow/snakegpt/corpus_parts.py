"""A corpus divided into the parts that are encoded one by one, known from its lock alone."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from typing import Any

from snakegpt.formats import can_be_divided
from snakegpt.locks import File

MOST_FILES = 50_000  # of a part: a job holds the name and digest of each


def divide(
    files: Sequence[File], part_bytes: int, separator: str | None
) -> dict[str, list[dict[str, Any]]]:
    """Part id -> its files or byte ranges of one, in order.

    part_bytes  most of a part; only a file that cannot be divided is larger, in a part of its own
    separator   between the documents of a text, see `formats.can_be_divided`
    """
    parts: list[list[dict[str, Any]]] = []
    whole: list[File] = []  # files since the last one that was divided
    for file in files:
        if file.bytes > part_bytes and can_be_divided(file.path, separator):
            parts += _filled(whole, part_bytes)
            whole = []
            for start in range(0, file.bytes, part_bytes):
                stop = min(start + part_bytes, file.bytes)
                parts.append([{**vars(file), "from": start, "to": stop}])
        else:
            whole.append(file)
    parts += _filled(whole, part_bytes)
    return {f"{index:06d}": part for index, part in enumerate(parts)}


def _filled(files: Sequence[File], most: int) -> Iterator[list[dict[str, Any]]]:
    """Consecutive files in parts of half to all of `most` bytes or of MOST_FILES, as their sizes allow.

    The next part begins, of the files where it could, with the one whose path has the least checksum.
    Were parts merely filled, a file that is added, removed or grown would move the bounds of all parts
    behind it; so they soon fall on the same files again, and what lies behind is not encoded anew.
    """
    start = 0
    while start < len(files):
        n_bytes, stop = 0, start
        end = min(start + MOST_FILES, len(files))
        bounds = []
        while stop < end and (stop == start or n_bytes + files[stop].bytes <= most):
            n_bytes += files[stop].bytes
            stop += 1
            if 2 * n_bytes >= most or 2 * (stop - start) >= MOST_FILES:
                bounds.append(stop)
        if bounds and stop < len(files):
            stop = min(bounds, key=lambda bound: zlib.crc32(files[bound].path.encode("utf-8")))
        yield [dict(vars(file)) for file in files[start:stop]]
        start = stop
