"""Parts of a corpus: every byte once and in order, none too large, and little moves when a file is added."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from snakegpt import corpus_parts
from snakegpt.corpus_parts import divide
from snakegpt.locks import File

SHA = "0" * 64


def files(sizes, name="part-{:05d}.parquet"):
    return [File(name.format(index), SHA, size) for index, size in enumerate(sizes)]


@given(st.lists(st.integers(0, 40), max_size=60), st.integers(1, 30), st.booleans())
def test_parts_hold_every_byte_once_and_in_order(sizes, most, divisible):
    given_files = files(sizes, "a{:05d}.jsonl" if divisible else "a{:05d}.parquet")
    parts = divide(given_files, most, None)
    assert list(parts) == [f"{index:06d}" for index in range(len(parts))]
    found = [
        (entry["path"], *((entry["from"], entry["to"]) if "from" in entry else (0, entry["bytes"])))
        for part in parts.values()
        for entry in part
    ]
    covered = {}
    for path, start, stop in found:
        assert start == covered.get(path, 0)
        covered[path] = stop
    assert covered == {file.path: file.bytes for file in given_files}
    assert [path for path, *_ in found] == sorted(path for path, *_ in found)
    for part in parts.values():
        n_bytes = sum(entry.get("to", entry["bytes"]) - entry.get("from", 0) for entry in part)
        assert n_bytes <= most or (len(part) == 1 and not divisible)


def test_no_part_has_more_files_than_a_job_can_hold(monkeypatch):
    monkeypatch.setattr(corpus_parts, "MOST_FILES", 10)
    parts = divide(files([1] * 1000), 10_000, None)
    assert all(5 <= len(part) <= 10 for part in list(parts.values())[:-1])
    assert sum(len(part) for part in parts.values()) == 1000


@pytest.mark.parametrize("same_size", [True, False])
def test_a_file_more_leaves_most_parts_as_they_are(same_size):
    changed, n_parts = [], []
    for seed in range(20):
        draw = random.Random(seed)
        before = files([1000 if same_size else draw.randrange(1, 2000) for _ in range(1000)])
        place = draw.randrange(1000)
        added = File(before[place].path + "b", SHA, draw.randrange(1, 2000))
        old = list(divide(before, 25_000, None).values())
        new = list(
            divide([*before[: place + 1], added, *before[place + 1 :]], 25_000, None).values()
        )
        changed.append(sum(part not in old for part in new))
        n_parts.append(len(new))
    assert min(n_parts) > 40
    assert sorted(changed)[10] <= 2  # filled to the brim, parts of equal files change up to the end
    assert sum(changed) / len(changed) < 4
