"""Sources: what they find, what they refuse, and that no wrong byte passes."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import io
import json
import os
import shutil
import subprocess
import tarfile
import time
import zipfile
from collections import namedtuple
from pathlib import Path
from urllib.parse import quote

import pytest
from data_fixtures import Faults, FileServer, serving
from snakegpt import locks
from snakegpt.errors import UserError
from snakegpt.settings import HttpSource, LocalSource, RegistrySource
from snakegpt.sources import downloads, kinds, npm, transfers
from snakegpt.sources.archives import read_members

BIG = bytes(range(256)) * 12_000  # three pieces


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(downloads, "BACK_OFF_S", 0.001)


def lock(source):
    return kinds.lock("corpus mine", source, workers=2, label="test")


def fetch(source, entry, folder):
    state = folder.with_name(f"{folder.name}-state")
    kinds.fetch("corpus mine", source, entry, folder, state, workers=2, label="test")
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


def test_a_name_that_no_lock_can_hold_is_refused(tmp_path):
    try:
        open(os.fsencode(tmp_path) + b"/caf\xe9.txt", "wb").close()
    except OSError:
        pytest.skip("this filesystem has UTF-8 names alone")
    with pytest.raises(UserError, match=r"'caf\\udce9\.txt' is not UTF-8"):
        lock(LocalSource(kind="local", paths=[f"{tmp_path}/*.txt"]))


def test_a_file_too_many_is_left_out_and_said(tmp_path, capfd):
    (tmp_path / "a.txt").write_bytes(b"one")
    source = LocalSource(kind="local", paths=[f"{tmp_path}/*.txt"])
    entry = lock(source)
    (tmp_path / "b.txt").write_bytes(b"two")
    assert fetch(source, entry, tmp_path / "out") == {"a.txt": b"one"}
    assert "1 files there are not locked and stay out (b.txt)" in capfd.readouterr().err


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


@pytest.fixture
def waits(monkeypatch):
    """How long the downloads wait between attempts; no time passes."""
    waited = []
    monkeypatch.setattr(downloads.time, "sleep", waited.append)
    return waited


def test_a_server_is_given_the_time_it_asks_for(waits):
    past = "Wed, 21 Oct 2015 07:28:00 GMT"
    asks = [
        (429, {"Retry-After": "7"}),
        (503, {"Retry-After": past}),
        (429, {"RateLimit": '"x";r=0;t=9'}),
    ]
    with serving(FileServer({"a.txt": b"one"}, faults=Faults(statuses=asks))) as server:
        assert pins(lock(web(server, "a.txt"))) == expected({"a.txt": b"one"})
    assert waits == [7, 0, 9]


def test_a_server_that_asks_for_hours_is_told_of_at_once(waits):
    faults = Faults(statuses=[(429, {"Retry-After": "7200"})])
    server = FileServer({"a.txt": b"one"}, faults=faults)
    with serving(server), pytest.raises(UserError, match=r"answers 429 .* asks to wait 7200 s"):
        lock(web(server, "a.txt"))
    assert waits == []


def test_a_host_that_was_reached_once_is_waited_for_and_another_is_not(waits):
    lost = downloads.Trouble("no route", unreachable=True)
    answers = [downloads.Trouble("dropped"), lost, lost]

    def attempt():
        if answers:
            raise answers.pop(0)
        return "done"

    assert downloads.persistently(attempt, "host") == "done"
    assert waits == [downloads.BACK_OFF_S * factor for factor in (1, 2, 4)]
    answers.append(lost)
    with pytest.raises(downloads.Trouble, match="no route"):
        downloads.persistently(attempt, "host")
    assert len(waits) == 3


def test_a_file_that_changes_while_it_is_read_is_read_again_from_its_beginning():
    class Changing(FileServer):
        def answer(self, handler):
            super().answer(handler)
            self.files["a.txt"] = BIG[::-1]

    server = Changing({"a.txt": BIG}, has_tags=True, faults=Faults(drops=[100_000]))
    with serving(server):
        assert pins(lock(web(server, "a.txt"))) == expected({"a.txt": BIG[::-1]})
    assert server.asked == ["", "bytes=100000-"]


def locked(server, files):
    source = web(server, *map(quote, files))
    return source, locks.Entry(source.model_dump(), tuple(locks.File(*f) for f in expected(files)))


def test_what_an_earlier_fetch_left_is_not_asked_for_again(tmp_path):
    files = {"finished.txt": b"one" * 99, "begun.txt": BIG, "all of it.txt": BIG[::-1]}
    state = tmp_path / "out-state"
    with serving(FileServer(files)) as server:
        source, entry = locked(server, files)
        whole, begun, _ = entry.files
        for path, content in {
            state / "files" / "finished.txt": files["finished.txt"],
            downloads.part_of(begun, state): BIG[:1_000_000],
            downloads.part_of(whole, state): BIG[::-1],
            state / "files" / "stranger.txt": b"not locked",
        }.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        assert fetch(source, entry, tmp_path / "out") == files
    assert server.asked == ["bytes=1000000-"]


@pytest.mark.parametrize("damage", ["part", "finished", "too long"])
def test_what_an_earlier_fetch_left_damaged_is_brought_anew(tmp_path, damage):
    state = tmp_path / "out-state"
    with serving(FileServer({"a.txt": BIG})) as server:
        source, entry = locked(server, {"a.txt": BIG})
        finished, part = state / "files" / "a.txt", downloads.part_of(entry.files[0], state)
        path = finished if damage == "finished" else part
        path.parent.mkdir(parents=True)
        path.write_bytes(BIG + b"more" if damage == "too long" else b"?" + BIG[1:900_000])
        assert fetch(source, entry, tmp_path / "out") == {"a.txt": BIG}
    assert server.asked == (["bytes=900000-", ""] if damage == "part" else [""])


def test_every_file_that_changed_is_shown_and_the_others_are_kept(tmp_path):
    old = {f"{i}.txt": f"text {i}".encode() for i in range(4)}
    with serving(FileServer(dict(old))) as server:
        source, entry = locked(server, old)
        new = {"1.txt": b"longer text 1", "3.txt": b"text 4"}
        server.files.update(new)
        with pytest.raises(UserError) as caught:
            fetch(source, entry, tmp_path / "out")
    message = str(caught.value)
    for name in old:
        lines = f"{name} is not the file that was locked"
        assert (lines in message) == (name in new)
    for name, content in new.items():
        for which, what in (("expected: ", old[name]), ("found:    ", content)):
            assert f"{which}sha256 {hashlib.sha256(what).hexdigest()}, {len(what)} bytes" in message
    kept = tmp_path / "out-state" / "files"
    assert {path.name for path in kept.iterdir()} == {"0.txt", "2.txt"}
    assert not list((tmp_path / "out-state" / "parts").iterdir())  # wrong bytes are not continued


def test_a_disk_that_fills_up_on_the_way_is_a_message(tmp_path):
    with serving(FileServer({"a.txt": BIG})) as server:
        source, entry = locked(server, {"a.txt": BIG})
        part = downloads.part_of(entry.files[0], tmp_path / "out-state")
        part.parent.mkdir(parents=True)
        part.symlink_to("/dev/full")  # takes no byte
        with pytest.raises(
            UserError, match=r"the disk is full: a\.txt needs 3,072,000 bytes"
        ) as caught:
            fetch(source, entry, tmp_path / "out")
        assert "run the same command again" in str(caught.value)
        part.unlink()  # there is room again
        assert fetch(source, entry, tmp_path / "out") == {"a.txt": BIG}


def test_a_proxy_is_used_except_where_it_is_not_to_be(tmp_path, monkeypatch):
    for name in ("HTTP_PROXY", "NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    with (
        serving(FileServer({"a.txt": b"by proxy"})) as proxy,
        serving(FileServer({"a.txt": b"direct"})) as server,
    ):
        monkeypatch.setenv("http_proxy", proxy.url)
        far = HttpSource(kind="http", urls=["http://texts.invalid/a.txt"])
        assert pins(lock(far)) == expected({"a.txt": b"by proxy"})
        assert proxy.hosts == ["texts.invalid"]
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        assert pins(lock(web(server, "a.txt"))) == expected({"a.txt": b"direct"})


NAMES = {"two words.txt": b"1", "\u00fcn\u00ef\u00e7\u00f8d\u00e9 \u6587.txt": b"2", "100%? #1.txt": b"3", "empty.txt": b"", "l" * 251 + ".txt": b"4"}  # fmt: skip


def test_names_with_spaces_and_unicode_are_kept_and_empty_files_are_files(tmp_path):
    with serving(FileServer(dict(NAMES))) as server:
        source = web(server, *map(quote, NAMES))
        entry = lock(source)
        assert pins(entry) == expected(NAMES)
        assert fetch(source, entry, tmp_path / "web") == NAMES
    (tmp_path / "in").mkdir()
    for name, content in NAMES.items():
        (tmp_path / "in" / name).write_bytes(content)
    source = LocalSource(kind="local", paths=[f"{tmp_path}/in/*"])
    entry = lock(source)
    assert pins(entry) == expected(NAMES)
    assert fetch(source, entry, tmp_path / "out") == NAMES


def test_a_server_that_never_ends_a_file_is_given_up():
    server = FileServer({"a.txt": BIG}, has_ranges=False, faults=Faults(drops=[10] * 99))
    with serving(server), pytest.raises(UserError, match="drops the connection"):
        lock(web(server, "a.txt"))
    assert len(server.asked) == downloads.ATTEMPTS


def test_a_server_that_stays_broken_is_given_up():
    server = FileServer({"a.txt": b"one"}, faults=Faults(statuses=[500] * 99))
    with serving(server), pytest.raises(UserError, match="the server answers 500"):
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


@pytest.fixture
def npm_registry(tmp_path, monkeypatch):
    """A registry with @some/texts 1.0.0, which npm and we are configured to use."""
    archive = tar(
        tmp_path / "made.tgz",
        {
            "package/package.json": b'{"name": "@some/texts", "version": "1.0.0"}',
            "package/data/one.txt": b"first",
            "package/index.js": b"process.exit(1)",
        },
    ).read_bytes()
    with serving(FileServer({"texts.tgz": archive})) as server:
        digest = base64.b64encode(hashlib.sha512(archive).digest()).decode()
        version = {
            "name": "@some/texts",
            "version": "1.0.0",
            "dist": {"tarball": f"{server.url}/texts.tgz", "integrity": f"sha512-{digest}"},
        }
        every = {
            "name": "@some/texts",
            "versions": {"1.0.0": version},
            "dist-tags": {"latest": "1.0.0"},
        }
        server.files["@some/texts"] = json.dumps(every).encode()
        server.files["@some/texts/1.0.0"] = json.dumps(version).encode()
        (tmp_path / "npmrc").write_text(f"# mine\nregistry = {server.url}/\n")
        monkeypatch.setenv("NPM_CONFIG_USERCONFIG", str(tmp_path / "npmrc"))
        monkeypatch.setenv("npm_config_cache", str(tmp_path / "npm-cache"))
        monkeypatch.delenv("NPM_CONFIG_REGISTRY", raising=False)
        monkeypatch.delenv("npm_config_registry", raising=False)
        server.archive = archive
        yield server


def npm_texts(version="1.0.0"):
    return RegistrySource(
        kind="registry", registry="npm", package=f"@some/texts=={version}", members=["*/data/*"]
    )


@pytest.fixture(params=["npm", "no npm"])
def npm_or_not(request, monkeypatch):
    if request.param == "no npm":
        monkeypatch.setattr(npm.shutil, "which", lambda program: None)
    elif not shutil.which("npm"):
        pytest.skip("this machine has no npm")


def test_an_npm_package_is_locked_and_fetched_with_npm_and_without(
    npm_or_not, npm_registry, tmp_path
):
    entry = lock(npm_texts())
    assert pins(entry) == expected({"package/data/one.txt": b"first"})
    archive = npm_registry.archive
    sha256 = hashlib.sha256(archive).hexdigest()
    assert entry.archive == locks.Archive("some-texts-1.0.0.tgz", sha256, len(archive))
    assert fetch(npm_texts(), entry, tmp_path / "out") == {"package/data/one.txt": b"first"}
    n_asked = len(npm_registry.asked)
    fetch(npm_texts(), entry, tmp_path / "out")  # the state folder has the archive
    assert len(npm_registry.asked) == n_asked
    other = dataclasses.replace(entry, archive=dataclasses.replace(entry.archive, sha256="0" * 64))
    with pytest.raises(UserError, match=r"some-texts-1\.0\.0\.tgz is not the file that was locked"):
        fetch(npm_texts(), other, tmp_path / "other")


def test_an_npm_version_that_is_not_there_is_named(npm_or_not, npm_registry):
    with pytest.raises(UserError, match=r"@some/texts==2\.0\.0.* no such package or version"):
        lock(npm_texts("2.0.0"))


def test_an_unreachable_npm_registry_is_one_message(npm_or_not, npm_registry, monkeypatch):
    monkeypatch.setenv("NPM_CONFIG_REGISTRY", "http://127.0.0.1:9")
    with pytest.raises(UserError, match="the package registry cannot be reached"):
        lock(npm_texts())


needs_apt = pytest.mark.skipif(
    not (shutil.which("apt-get") and shutil.which("dpkg-deb")), reason="no Debian"
)


def deb(folder, name, files, links=None):
    """A Debian package, built by dpkg-deb."""
    root = folder / f"{name}-root"
    for path, content in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(content)
    for path, target in (links or {}).items():
        (root / path).symlink_to(target)
    (root / "DEBIAN").mkdir()
    about = f"Package: {name}\nVersion: 1.0+a~1-2\nArchitecture: all\nMaintainer: me <a@b>\nDescription: texts\n"
    (root / "DEBIAN" / "control").write_text(about)
    path = folder / f"{name}.deb"
    subprocess.run(
        ["dpkg-deb", "--root-owner-group", "--build", root, path], check=True, capture_output=True
    )
    shutil.rmtree(root)
    return path


@pytest.fixture
def apt_repository(tmp_path, monkeypatch):
    """apt with a folder of packages instead of a mirror."""
    folder = tmp_path / "mirror"
    folder.mkdir()
    archive = deb(folder, "some-texts", {"usr/share/texts/one.txt": b"first", "usr/share/texts/b b.txt": b"second"}, {"usr/share/texts/link.txt": "one.txt"})  # fmt: skip
    content = archive.read_bytes()
    (folder / "Packages").write_text(
        "Package: some-texts\nVersion: 1.0+a~1-2\nArchitecture: all\nFilename: ./some-texts.deb\n"
        f"Size: {len(content)}\nSHA256: {hashlib.sha256(content).hexdigest()}\nDescription: texts\n"
    )
    for part in ("state/lists/partial", "cache/archives/partial", "parts"):
        (tmp_path / "apt" / part).mkdir(parents=True)
    (tmp_path / "apt" / "status").touch()
    (tmp_path / "apt" / "sources.list").write_text(f"deb [trusted=yes] copy:{folder} ./\n")
    (tmp_path / "apt.conf").write_text(
        f'Dir::State "{tmp_path}/apt/state"; Dir::State::status "{tmp_path}/apt/status";'
        f'Dir::Cache "{tmp_path}/apt/cache"; Dir::Etc::sourcelist "{tmp_path}/apt/sources.list";'
        f'Dir::Etc::sourceparts "{tmp_path}/apt/parts"; APT::Sandbox::User "root";'
    )
    monkeypatch.setenv("APT_CONFIG", str(tmp_path / "apt.conf"))
    subprocess.run(["apt-get", "-qq", "update"], check=True, capture_output=True)
    return archive


def apt_texts(package="some-texts==1.0+a~1-2"):
    return RegistrySource(
        kind="registry", registry="apt", package=package, members=["usr/share/texts/*"]
    )


@needs_apt
def test_a_debian_package_is_locked_and_its_texts_are_fetched(apt_repository, tmp_path):
    texts = {"usr/share/texts/b b.txt": b"second", "usr/share/texts/one.txt": b"first"}
    entry = lock(apt_texts())
    assert pins(entry) == expected(texts)  # the link is left out
    content = apt_repository.read_bytes()
    assert (entry.archive.sha256, entry.archive.bytes) == (
        hashlib.sha256(content).hexdigest(),
        len(content),
    )
    assert fetch(apt_texts(), entry, tmp_path / "out") == texts


@needs_apt
def test_a_debian_package_or_version_that_is_gone_is_named_with_what_there_is(apt_repository):
    with pytest.raises(
        UserError, match=r"version 0\.9 is gone from the mirror(.|\n)*there now: 1\.0\+a~1-2"
    ):
        lock(apt_texts("some-texts==0.9"))
    with pytest.raises(UserError, match="knows no such package"):
        lock(apt_texts("no-texts==0.9"))
    apt_repository.unlink()
    with pytest.raises(UserError, match="cannot download some-texts==1"):
        lock(apt_texts())


def test_a_machine_without_apt_says_so(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="this machine has no apt-get"):
        lock(apt_texts())


@needs_apt
@pytest.mark.parametrize("keep", [0.5, 0.9, 0.02])
def test_a_damaged_debian_package_is_named(tmp_path, keep):
    path = deb(tmp_path, "some-texts", {"a.txt": os.urandom(200_000)})
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])
    with pytest.raises(UserError, match=r"archive some-texts\.deb is damaged"):
        members(path)


# ---- shared ----------------------------------------------------------------------------------


def test_a_rate_holds_for_all_workers_together():
    now = [0.0]

    def sleep(seconds):
        assert seconds >= 0
        now[0] += seconds

    throttle = transfers.Throttle(1000, clock=lambda: now[0], sleep=sleep)
    for _ in range(50):
        throttle.take(100)
    assert now[0] == pytest.approx(5.0)
    now[0] += 100  # idle: nothing is saved up
    throttle.take(100)
    assert now[0] == pytest.approx(105.1)
    transfers.Throttle(None, sleep=lambda _: pytest.fail("waits")).take(10**12)


def test_downloads_keep_to_the_rate(monkeypatch):
    waited = []
    monkeypatch.setattr(transfers.Throttle, "take", lambda self, n: waited.append((self.rate, n)))
    with serving(FileServer({"a.txt": BIG, "b.txt": BIG})) as server:
        kinds.lock(
            "corpus mine", web(server, "a.txt", "b.txt"), workers=2, label="test", rate=10**6
        )
    assert {rate for rate, _ in waited} == {10**6}
    assert sum(n for _, n in waited) == 2 * len(BIG)


def test_a_progress_line_has_rate_and_time_left(monkeypatch, capfd):
    now = [0.0]
    monkeypatch.setattr(transfers.time, "monotonic", lambda: now[0])
    meter = transfers.Meter("fetch_corpus web", 5000, interval_s=2)
    meter.add(1000, fresh=False)  # left by an earlier run: done, but not downloaded now
    assert capfd.readouterr().err == ""
    now[0] = 4.0
    meter.add(800)
    assert capfd.readouterr().err == "fetch_corpus web  1.8kB/5kB  36%  200B/s  left 0:16\n"


def test_parallel_work_keeps_order_and_passes_errors_on():
    assert transfers.in_parallel(lambda n: n * n, range(20), 4) == [n * n for n in range(20)]
    with pytest.raises(ZeroDivisionError):
        transfers.in_parallel(lambda n: 1 // n, [1, 0, 1], 2)
