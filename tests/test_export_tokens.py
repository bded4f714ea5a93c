"""Exported layouts, read back by readers written from their descriptions alone, and by the projects' own."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import struct
import subprocess
import sys
import zipfile

import numpy as np
import pytest
from data_fixtures import pinned_wheel, stage
from snakegpt.shards import ShardWriter
from snakegpt.stages import export_tokens as module

FINGERPRINT = "ab" * 32
END = 9

# Documents of each split; shards may begin inside one.
DOCUMENTS = {
    "train": [[END, 1, 2, 3], [END, 4], [END], [END, 5, 6, 7, 8, 1, 2], [END, 3, 3]],
    "val": [[END, 2, 2], [END, 1]],
}


def ids_of(split):
    return [i for document in DOCUMENTS[split] for i in document]


def token_set(folder, cuts=(5, 11), n_vocab=10, documents=None):
    """A manifest whose training split is cut into shards at `cuts`."""
    folder.mkdir(parents=True, exist_ok=True)
    splits = {}
    for split, given in (documents or DOCUMENTS).items():
        ids = [i for document in given for i in document]
        bounds = [0, *(cuts if split == "train" else ()), len(ids)]
        shards = []
        for index, (first, last) in enumerate(itertools.pairwise(bounds)):
            path = folder / f"{split}_{index:06d}.bin"
            with ShardWriter(path, FINGERPRINT, n_vocab) as writer:
                writer.add(ids[first:last])
            shards.append(
                {"name": path.name, "bytes": path.stat().st_size, "n_tokens": last - first}
            )
        splits[split] = {"n_tokens": len(ids), "n_documents": len(given), "shards": shards}
    tokenizer = {
        "fingerprint": FINGERPRINT,
        "n_vocab": n_vocab,
        "end_of_text": END,
        "kind": "char",
    }
    path = folder / "manifest.json"
    path.write_text(json.dumps({"tokenizer": tokenizer, "splits": splits}))
    return path


def export(manifest, form, out, *more):
    return stage("export_tokens", {}, out, "--tokens", manifest, "--format", form, *more)


def exported(tmp_path, form, *more, **how):
    done = export(token_set(tmp_path / "tokens", **how), form, tmp_path / "out", *more)
    assert done.returncode == 0, done.stderr
    return tmp_path / "out"


def refused(tmp_path, form, **how):
    done = export(token_set(tmp_path / "tokens", **how), form, tmp_path / "out")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    return done.stderr


def test_packed_shards_have_one_size_and_the_same_tokens(tmp_path):
    out = exported(tmp_path, "shards", "--shard-tokens", "4")
    manifest = json.loads((out / "manifest.json").read_text())
    for split in ("train", "val"):
        read, sizes = [], []
        for entry in manifest["splits"][split]["shards"]:
            content = (out / entry["name"]).read_bytes()
            assert hashlib.sha256(content).hexdigest() == entry["sha256"]
            words = np.frombuffer(content[:1024], "<i4")
            assert (words[0], words[1]) == (20240520, 1)
            read += np.frombuffer(content[1024:], "<u2").tolist()
            sizes.append(int(words[2]))
        assert read == ids_of(split)
        assert sizes[:-1] == [4] * (len(sizes) - 1) and 0 < sizes[-1] <= 4
    assert json.loads((out / "export.json").read_text())["splits"]["train"]["n_documents"] == 5


def test_packed_shards_of_more_than_a_chunk(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "CHUNK_TOKENS", 3)
    path = token_set(tmp_path / "tokens", n_vocab=70_000)
    progress = module.Progress("x", 100, "tokens", interval_s=100)
    module.export_tokens(path, "shards", tmp_path / "out", progress, 5)
    content = (tmp_path / "out/train_000001.bin").read_bytes()
    assert np.frombuffer(content[1024:], "<u4").tolist() == ids_of("train")[5:10]


# ---- readers from the descriptions ----


def read_megatron(prefix):
    """Documents of a .bin and .idx, with the width of an id."""
    index = prefix.with_suffix(".idx").read_bytes()
    assert index[:9] == b"MMIDIDX\x00\x00"
    version, code, n_sequences, n_documents = struct.unpack("<QBQQ", index[9:34])
    assert version == 1
    letter, width = {8: ("H", 2), 4: ("i", 4)}[code]
    at = 34
    arrays = []
    for kind, count in (("i", n_sequences), ("q", n_sequences), ("q", n_documents)):
        size = struct.calcsize(f"<{count}{kind}")
        arrays.append(struct.unpack(f"<{count}{kind}", index[at : at + size]))
        at += size
    assert at == len(index)
    lengths, pointers, documents = arrays
    assert documents == tuple(range(n_sequences + 1))
    content = prefix.with_suffix(".bin").read_bytes()
    assert len(content) == width * sum(lengths)
    found = [
        list(struct.unpack(f"<{n}{letter}", content[p : p + width * n]))
        for n, p in zip(lengths, pointers, strict=True)
    ]
    return found, width


def read_datatrove(path):
    """Documents of a .ds, its .index and .metadata, with the width of an id."""
    name, total, _ = path.with_name(f"{path.name}.metadata").read_text().split("\n")
    width = int(name.split("|")[1])
    content = path.read_bytes()
    ids = struct.unpack(f"<{len(content) // width}{ {2: 'H', 4: 'I'}[width] }", content)
    assert len(ids) == int(total)
    index = path.with_name(f"{path.name}.index").read_bytes()
    ends = struct.unpack(f"<{len(index) // 8}Q", index)
    return [list(ids[a:b]) for a, b in zip((0, *ends[:-1]), ends, strict=True)], width


# ---- tests ----


@pytest.mark.parametrize("cuts", [(), (5, 11), (4,), (1, 2, 3)])
def test_nanogpt_reads_ids_and_nothing_else(tmp_path, cuts):
    out = exported(tmp_path, "nanogpt", cuts=cuts)
    for split in ("train", "val"):
        assert np.memmap(out / f"{split}.bin", dtype=np.uint16, mode="r").tolist() == ids_of(split)
    assert sorted(p.name for p in out.iterdir()) == ["export.json", "train.bin", "val.bin"]


@pytest.mark.parametrize(("n_vocab", "width"), [(10, 2), (100_000, 4)])
@pytest.mark.parametrize("cuts", [(), (5, 11), (4,)])
def test_megatron_reads_the_documents(tmp_path, cuts, n_vocab, width):
    out = exported(tmp_path, "megatron", cuts=cuts, n_vocab=n_vocab)
    for split, documents in DOCUMENTS.items():
        assert read_megatron(out / split) == (documents, width)


@pytest.mark.parametrize(("n_vocab", "width"), [(10, 2), (100_000, 4)])
@pytest.mark.parametrize("cuts", [(), (5, 11), (4,)])
def test_datatrove_reads_the_documents(tmp_path, cuts, n_vocab, width):
    out = exported(tmp_path, "datatrove", cuts=cuts, n_vocab=n_vocab)
    for split, documents in DOCUMENTS.items():
        assert read_datatrove(out / f"{split}.ds") == (documents, width)


@pytest.mark.parametrize("form", ["nanogpt", "megatron", "datatrove"])
def test_chunks_of_any_size_give_the_same_files(tmp_path, monkeypatch, form):
    manifest = token_set(tmp_path / "tokens")

    class Silent:
        def update(self, *_):
            pass

    whole = module.export_tokens(manifest, form, tmp_path / "whole", Silent())
    for size in (1, 2, 3, 7):
        monkeypatch.setattr(module, "CHUNK_TOKENS", size)
        assert module.export_tokens(manifest, form, tmp_path / str(size), Silent()) == whole


@pytest.mark.parametrize("form", ["nanogpt", "megatron", "datatrove"])
def test_export_json_lists_what_stands_there(tmp_path, form):
    out = exported(tmp_path, form)
    listed = json.loads((out / "export.json").read_text())
    assert listed["format"] == form
    assert listed["tokenizer"]["fingerprint"] == FINGERPRINT
    assert listed["splits"] == {
        "train": {"n_tokens": 17, "n_documents": 5},
        "val": {"n_tokens": 5, "n_documents": 2},
    }
    for file in listed["files"]:
        content = (out / file["name"]).read_bytes()
        assert len(content) == file["bytes"]
        assert hashlib.sha256(content).hexdigest() == file["sha256"]
    names = {file["name"] for file in listed["files"]} | {"export.json"}
    assert {path.name for path in out.iterdir()} == names


def test_nanogpt_gets_no_wide_ids(tmp_path):
    message = refused(tmp_path, "nanogpt", n_vocab=100_277)
    assert "ids of 32 bits (vocabulary 100,277); nanoGPT reads uint16 alone" in message
    assert "--format megatron or datatrove" in message
    assert not (tmp_path / "out").exists()


def test_a_split_that_starts_inside_a_document_is_refused(tmp_path):
    message = refused(
        tmp_path, "datatrove", cuts=(), documents={"train": [[1, 2], [END, 3]], "val": [[END]]}
    )
    assert "the train split does not start with the end-of-text id 9" in message
    assert not list((tmp_path / "out").iterdir())


def test_a_document_too_long_for_megatron_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "LONGEST_DOCUMENT", 6)
    manifest = token_set(tmp_path / "tokens")
    with pytest.raises(module.UserError, match=r"train split has 7 tokens; .* at most 6"):
        module.export_tokens(manifest, "megatron", tmp_path / "out", module.Progress("", 1, ""))


def test_a_failed_export_leaves_the_earlier_one(tmp_path):
    out = exported(tmp_path, "nanogpt")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    shard = tmp_path / "tokens" / "train_000001.bin"
    shard.write_bytes(shard.read_bytes()[:-1])
    done = export(tmp_path / "tokens" / "manifest.json", "nanogpt", out)
    assert done.returncode == 2 and "it is damaged" in done.stderr
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_a_full_disk_leaves_no_half_file(tmp_path):
    manifest = token_set(
        tmp_path / "tokens", documents={"train": [[END] * 50_000], "val": [[END]]}, cuts=()
    )
    # A limit on the size of files stands for the disk; Python turns the signal into an error.
    limited = (
        "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (70_000,) * 2);"
    )
    limited += "runpy.run_module('snakegpt.stages.export_tokens', run_name='__main__')"
    words = ["--tokens", str(manifest), "--format", "datatrove", "--out", str(tmp_path / "out")]
    done = subprocess.run([sys.executable, "-c", limited, *words], capture_output=True, text=True)
    assert done.returncode != 0
    assert not list((tmp_path / "out").iterdir())


# ---- the projects' own readers ----


def unpacked(tmp_path, *wheel):
    with zipfile.ZipFile(pinned_wheel(*wheel)) as archive:
        archive.extractall(tmp_path / wheel[0])
    return str(tmp_path / wheel[0])


def call(code, *places):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(places)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.long
@pytest.mark.parametrize("n_vocab", [10, 100_000])
def test_megatron_core_reads_it(tmp_path, n_vocab):
    place = unpacked(
        tmp_path,
        "megatron-core==0.16.1",
        "megatron_core-0.16.1-cp311-cp311-manylinux_2_24_x86_64.manylinux_2_28_x86_64.whl",
        "38f6bef63cd4ebc4c39c1eccbaf578596accba5c47d012faffa0670913aec131",
    )
    prefix = exported(tmp_path, "megatron", n_vocab=n_vocab) / "train"
    code = f"""
import json
from megatron.core.datasets.indexed_dataset import IndexedDataset
data = IndexedDataset({str(prefix)!r})
print(json.dumps([data[i].tolist() for i in range(len(data))]))
"""
    assert call(code, place) == DOCUMENTS["train"]


@pytest.mark.long
@pytest.mark.parametrize(("n_vocab", "width"), [(10, 2), (100_000, 4)])
def test_datatrove_itself_reads_it(tmp_path, n_vocab, width):
    places = [
        unpacked(
            tmp_path,
            "datatrove==0.10.1",
            "datatrove-0.10.1-py3-none-any.whl",
            "b0846fc28482b25c9dbeaa09445066ff68266b58d762e9344c64fe5f6d92d14c",
        ),
        unpacked(
            tmp_path,
            "loguru==0.7.3",
            "loguru-0.7.3-py3-none-any.whl",
            "31a33c10c8e1e10422bfd431aeb5d351c7cf7fa671e3c4df004162264b28220c",
        ),
    ]
    path = exported(tmp_path, "datatrove", n_vocab=n_vocab) / "train.ds"
    code = f"""
import json
from datatrove.utils.dataset import DatatroveFileDataset
data = DatatroveFileDataset({str(path)!r}, seq_len=16, token_size={width}, return_positions=True)
assert len(data) == 1
row = data[0]
print(json.dumps([row["input_ids"].tolist(), row["positions"].tolist()]))
"""
    ids, positions = call(code, *places)
    assert ids == ids_of("train")
    assert positions == [i for document in DOCUMENTS["train"] for i in range(len(document))]
