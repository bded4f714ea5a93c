"""Export and import: what one store had, another one has, whole and verified, or nothing of it counts."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from snakegpt.errors import UserError
from snakegpt.store.archive import export, take_in
from store_fixtures import Checkout, contents, made, new_store

FILES = {"weights": bytes(range(256)) * 100, "empty": b"", "shards/deep/b.bin": b"5" * 900}
MANIFEST = "results/tokens/generated-generated_char/manifest.json"
STAGES = {"fetch_corpus", "build_tokenizer", "encode_tokens", "index_tokens"}


@pytest.fixture
def here(tmp_path):
    return new_store(tmp_path / "here")


@pytest.fixture
def there(tmp_path):
    return new_store(tmp_path / "there")


@pytest.fixture
def record(here):
    return made(here, FILES)


@pytest.fixture
def archive(here, record, tmp_path):
    file = tmp_path / "it's an export.tar"
    export(here, [record], (), file)
    return file


def is_untouched(store) -> bool:
    """Whether a store has no record, nothing half-done, and only objects that deserve their names."""
    contents(store)
    left = [p for folder in ("actions", "tmp") for p in (store.root / folder).rglob("*")]
    return not [path for path in left if path.is_file()]


def repacked(file: Path, change: Callable[[list[tuple[tarfile.TarInfo, bytes]]], None]) -> None:
    """Rewrite an archive with other members."""
    with tarfile.open(file) as tar:
        members = [(m, tar.extractfile(m).read() if m.isfile() else b"") for m in tar]
    change(members)
    with tarfile.open(file, "w") as tar:
        for member, content in members:
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


# ---- there and back ----------------------------------------------------------------------------


def test_what_was_exported_is_found_after_the_import(here, there, record, archive):
    assert take_in(there, archive) == [record]
    assert there.look_up(record["key"]) == record
    assert contents(there) == contents(here)
    assert (
        there.object_path(record["outputs"]["weights"]["sha256"]).stat().st_mode & 0o777
    ) == 0o444
    assert take_in(there, archive) == [record]  # once more changes nothing
    assert contents(there) == contents(here)


def test_equal_exports_have_equal_bytes(here, record, archive, tmp_path):
    export(here, [record], (), tmp_path / "again.tar")
    assert (tmp_path / "again.tar").read_bytes() == archive.read_bytes()


def test_an_archive_is_a_plain_tar_with_records_before_objects(record, archive):
    with tarfile.open(archive) as tar:
        names = tar.getnames()
        manifest = json.load(tar.extractfile("manifest.json"))
    key = record["key"]
    assert names[:2] == ["manifest.json", f"actions/{key[:2]}/{key}.json"]
    assert {name.split("/")[0] for name in names[2:]} == {"objects"}
    assert [*manifest["objects"]] == [name.rsplit("/", 1)[1] for name in names[2:]]
    assert manifest["format"] == 1 and [entry[0] for entry in manifest["actions"]] == [key]


def test_objects_of_stages_that_were_left_out_stay_away(here, there, record, tmp_path):
    export(here, [record], {"train_model"}, tmp_path / "a.tar")
    take_in(there, tmp_path / "a.tar")
    assert there.record_of(record["key"]) == record  # its provenance is known
    assert there.look_up(record["key"]) is None  # and it is a miss
    assert [*contents(there)] == [record["provenance"]["diff"]["sha256"]]
    export(here, [record], (), tmp_path / "b.tar")
    take_in(there, tmp_path / "b.tar")
    assert there.look_up(record["key"]) == record


def test_what_is_whole_here_stays(here, there, record, archive):
    mine = made(there, FILES | {"weights": b"of this machine"})
    take_in(there, archive)
    assert there.look_up(record["key"]) == mine


# ---- damage ------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["other bytes", "longer", "short", "gone"])
def test_damaged_objects_are_not_exported(damage, here, record, tmp_path):
    sha256 = record["outputs"]["weights"]["sha256"]
    path = here.object_path(sha256)
    path.chmod(0o644)
    whole = path.read_bytes()
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes({"other bytes": whole[::-1], "longer": b"+" + whole, "short": b""}[damage])
    with pytest.raises(UserError, match=rf"(?s)train_model tiny.*{sha256}.*--without train_model"):
        export(here, [record], (), tmp_path / "a.tar")
    assert not list(tmp_path.glob("*.tar*")) and not list(tmp_path.glob(".*"))


def test_an_archive_cut_anywhere_changes_nothing(there, archive, record):
    whole = archive.read_bytes()
    with tarfile.open(archive) as tar:
        members = tar.getmembers()
    # Within every header and content and between them; what follows the last one is padding.
    cuts = {0, 1} | {m.offset for m in members} | {m.offset + 100 for m in members}
    cuts |= {m.offset_data for m in members} | {m.offset_data + m.size // 2 for m in members}
    cuts -= {members[-1].offset_data + members[-1].size}
    for cut in sorted(cuts):
        archive.write_bytes(whole[:cut])
        with pytest.raises(UserError, match="damaged or no archive"):
            take_in(there, archive)
        assert is_untouched(there), cut
    archive.write_bytes(whole)
    take_in(there, archive)
    assert there.look_up(record["key"]) == record


def test_a_flipped_bit_anywhere_is_noticed_or_harms_nothing(there, archive, record, here):
    whole = archive.read_bytes()
    for place in range(0, len(whole), 397):
        archive.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        try:
            take_in(there, archive)
        except UserError:
            assert is_untouched(there), place
        else:  # a time or an owner, which nobody reads, or padding
            found = there.look_up(record["key"])
            assert found["outputs"] == record["outputs"], place
            there.action_path(record["key"]).unlink()
    contents(there)


def _member(name: str, kind: bytes = tarfile.REGTYPE, target: str = "") -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return member


_EVIL = b"evil"
_NAME = hashlib.sha256(_EVIL).hexdigest()
_OBJECT = f"objects/{_NAME[:2]}/{_NAME}"


@pytest.mark.parametrize(
    "member",
    [
        _member(_OBJECT, tarfile.SYMTYPE, "/etc/passwd"),
        _member(_OBJECT, tarfile.LNKTYPE, "manifest.json"),
        _member(_OBJECT, tarfile.CHRTYPE),
        _member(_OBJECT, tarfile.FIFOTYPE),
        _member(_OBJECT, tarfile.DIRTYPE),
        _member(_OBJECT),  # not in the manifest
        _member(f"/{_OBJECT}"),
        _member(f"../{_OBJECT}"),
        _member(f"objects/../{_OBJECT}"),
        _member(f"objects/00/{_NAME}"),
        _member(f"objects/{_NAME[:2]}/{_NAME.upper()}"),
        _member(f"actions/{_NAME[:2]}/{_NAME}.json"),
        _member(f"actions/{_NAME[:2]}/{_NAME}"),
        _member("state/x"),
        _member("manifest.json"),
        _member(""),
    ],
    ids=lambda m: f"{m.name[:24]} {m.type.decode()}",
)
def test_members_that_have_no_place_are_refused(member, there, archive):
    repacked(archive, lambda members: members.append((member, _EVIL if member.isreg() else b"")))
    with pytest.raises(UserError, match="damaged or no archive"):
        take_in(there, archive)
    assert is_untouched(there)
    assert not there.object_path(_NAME).exists()


def _manifest(change: Callable[[dict], None]) -> Callable[[list], None]:
    def repack(members: list) -> None:
        value = json.loads(members[0][1])
        change(value)
        members[0] = (members[0][0], json.dumps(value).encode())

    return repack


def _swap_object(members: list) -> None:
    index = next(i for i, (m, content) in enumerate(members) if m.name[0] == "o" and content)
    members[index] = (members[index][0], members[index][1][::-1])


def _foreign_record(in_manifest: bool) -> Callable[[list], None]:
    def repack(members: list) -> None:
        text = json.dumps(json.loads(members[1][1]) | {"science": {"steps": 99}}).encode()
        members[1] = (members[1][0], text)
        if in_manifest:
            key = members[1][0].name[-69:-5]
            entry = [key, hashlib.sha256(text).hexdigest()]
            _manifest(lambda m: m.update(actions=[entry]))(members)

    return repack


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_manifest(lambda m: m.update(format=2)), "its format is 2"),
        (_manifest(lambda m: m.update(actions=["x"])), "manifest.json is damaged"),
        (_manifest(lambda m: m.pop("objects")), "manifest.json is damaged"),
        (_manifest(lambda m: m["objects"].update({"a" * 64: 1})), "ends early: 1 "),
        (_manifest(lambda m: m["actions"].append(["a" * 64, "b" * 64])), "ends early: 1 "),
        (lambda members: members.pop(0), "begin with manifest.json"),
        (lambda members: members.append(members[1]), "names it once"),
        (lambda members: members.append(members[-1]), "does not name"),
        (_swap_object, "has other bytes"),
        (_foreign_record(in_manifest=False), "not the one of its manifest"),
        (_foreign_record(in_manifest=True), "another action's"),
    ],
)
def test_archives_that_contradict_themselves_are_refused(change, reason, there, archive):
    repacked(archive, change)
    with pytest.raises(UserError, match=reason):
        take_in(there, archive)
    assert is_untouched(there)


@pytest.mark.parametrize("content", [b"", b"text", b"\0" * 2048])
def test_what_is_no_archive_is_refused(content, there, tmp_path):
    (tmp_path / "x.tar").write_bytes(content)
    with pytest.raises(UserError, match="no archive"):
        take_in(there, tmp_path / "x.tar")
    with pytest.raises(UserError, match="there is no file"):
        take_in(there, tmp_path / "y.tar")
    assert is_untouched(there)


# ---- by hand -----------------------------------------------------------------------------------


def test_a_run_finds_on_another_machine_what_was_exported_on_this_one(tmp_path):
    first, second = Checkout(tmp_path / "first"), Checkout(tmp_path / "second")
    first.make(MANIFEST)
    file = str(tmp_path / "tokens.tar")
    told = first.call("snakegpt.store", "export", MANIFEST, file)
    assert f"{len(STAGES)} actions" in told
    told = second.call("snakegpt.store", "import", file)
    assert told.count("  is here  ") == len(STAGES)
    told = second.make(MANIFEST)
    assert "  runs  " not in told and told.count("found in the store") == len(STAGES)
    assert (second.folder / MANIFEST).read_bytes() == (first.folder / MANIFEST).read_bytes()

    third = Checkout(tmp_path / "third")
    first.call(
        "snakegpt.store", "export", MANIFEST, file, "--without", "fetch_corpus,encode_tokens"
    )
    told = third.call("snakegpt.store", "import", file)
    assert told.count("  is known, without its objects  ") == 2
    told = third.make(MANIFEST)
    assert {line.split()[0] for line in told.splitlines() if "  runs  " in line} == {
        "fetch_corpus",
        "encode_tokens",
    }


def test_export_says_what_is_not_there(tmp_path):
    checkout = Checkout(tmp_path / "first")
    told = checkout.call("snakegpt.store", "export", "train_tiny", "x.tar", status=2)
    assert "'train_tiny' has not been made yet" in told
    told = checkout.call("snakegpt.store", "export", "README.md", "x.tar", status=2)
    assert "is no result" in told
    assert not (checkout.folder / "x.tar").exists()
