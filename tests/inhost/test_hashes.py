"""Hashes of files: of the file as it is, and not computed again, whatever becomes of the file that keeps them."""

from __future__ import annotations

import hashlib
import json
import os
import shutil

import pytest


@pytest.fixture
def hashes(pack, monkeypatch):
    """The module, which trusts the times of files that were made just now too."""
    monkeypatch.setattr(pack.nodes.bridge.lora.hashes, "_SETTLED", -1.0)
    return pack.nodes.bridge.lora.hashes


@pytest.fixture
def reads(hashes, monkeypatch):
    """Names of the files whose bytes were read for a hash."""
    seen, sha256 = [], hashes.sha256
    monkeypatch.setattr(hashes, "sha256", lambda path: (seen.append(os.path.basename(path)), sha256(path))[1])
    return seen


def true_hash(path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def later_than(path, other) -> None:
    """Write a file until the file system's clock says another time than it said of the other one."""
    while True:
        path.write_bytes(b"tick")
        if path.stat().st_ctime_ns > other.stat().st_ctime_ns:
            return


@pytest.mark.parametrize("put", [shutil.copy2, shutil.move])
def test_another_file_of_the_same_size_and_time_has_its_own_hash(hashes, tmp_path, put):
    """`cp -p` over a file, and `mv`."""
    one, two = tmp_path / "one", tmp_path / "two"
    for path in (one, two):
        path.write_bytes(path.name.encode() * 1000)
        os.utime(path, (1e9, 1e9))
    kept = hashes.Hashes(lambda: str(tmp_path / "kept.json"))
    before, first = hashes.version(str(one)), kept.of(str(one))
    assert first == true_hash(one)
    later_than(tmp_path / "clock", one)
    put(two, one)
    assert one.stat().st_mtime == 1e9
    assert hashes.version(str(one)) != before
    assert kept.of(str(one)) == true_hash(one) != first


def test_they_are_kept_when_the_host_starts_again(hashes, reads, tmp_path):
    path = tmp_path / "a \udcff"  # a name that is no text
    path.write_bytes(b"a")
    for _ in range(3):
        assert hashes.Hashes(lambda: str(tmp_path / "kept.json")).of(str(path)) == true_hash(path)
    assert len(reads) == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["kept.json", path.name])


def test_two_hosts_share_them(hashes, reads, tmp_path):
    for name in "abc":
        (tmp_path / name).write_bytes(name.encode())
    one, two = (hashes.Hashes(lambda: str(tmp_path / "kept.json")) for _ in range(2))
    one.of(str(tmp_path / "a"))
    two.of(str(tmp_path / "b"))
    one.of(str(tmp_path / "c"))
    third = hashes.Hashes(lambda: str(tmp_path / "kept.json"))
    for name in "abc":
        assert third.of(str(tmp_path / name)) == true_hash(tmp_path / name)
    assert reads == ["a", "b", "c"]


@pytest.mark.parametrize(
    "text",
    [b"", b"{", b"[]", b"\xff\xfe", b"[" * 9000, b'{"format": 1}', b'{"format": 1, "files": [1, [], [[]], "x", null]}',
     b'{"format": 1, "files": [["PATH", 1, 2, 3, 4, "no hash"], ["PATH", 1, 2, 3, [], 5]]}', b"9" * 5000],
    ids=lambda text: ascii(text[:40]),
)  # fmt: skip
def test_a_damaged_file_is_written_anew(hashes, tmp_path, text):
    kept, path = tmp_path / "kept.json", tmp_path / "a"
    path.write_bytes(b"a")
    kept.write_bytes(text)
    assert hashes.Hashes(lambda: str(kept)).of(str(path)) == true_hash(path)
    assert [entry[0] for entry in json.loads(kept.read_text())["files"]] == [str(path)]


def test_where_it_cannot_be_written_hashes_are_still_right(hashes, reads, tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"a")
    kept = hashes.Hashes(lambda: str(tmp_path / "nowhere" / "kept.json"))
    assert kept.of(str(path)) == kept.of(str(path)) == true_hash(path)
    assert reads == ["a"] and [p.name for p in tmp_path.iterdir()] == ["a"]


def test_the_last_ones_are_kept(hashes, reads, tmp_path, monkeypatch):
    monkeypatch.setattr(hashes, "_MOST", 3)
    for name in "abcde":
        (tmp_path / name).write_bytes(b"x")
        hashes.Hashes(lambda: str(tmp_path / "kept.json")).of(str(tmp_path / name))
    entries = json.loads((tmp_path / "kept.json").read_text())["files"]
    assert [os.path.basename(entry[0]) for entry in entries] == ["c", "d", "e"]


def test_a_file_that_may_change_within_the_same_tick_is_read_again(pack, tmp_path):
    """Where times are coarse, a file of just now can become another one without another time."""
    path, kept = tmp_path / "a", tmp_path / "kept.json"
    path.write_bytes(b"a")
    pack.nodes.bridge.lora.hashes.Hashes(lambda: str(kept)).of(str(path))
    assert not kept.exists()


def test_a_version_is_read_only_where_its_time_of_change_alone_is_new(hashes, reads, tmp_path):
    """And then once: its bytes are the ones that are known, or are not."""
    path, kept = tmp_path / "a", hashes.Hashes(lambda: str(tmp_path / "kept.json"))
    path.write_bytes(b"a")
    os.utime(path, (1e9, 1e9))
    first = kept.version(str(path))
    assert reads == [] and first == hashes.version(str(path))
    kept.of(str(path))
    later_than(tmp_path / "clock", path)
    path.chmod(0o600)
    assert [kept.version(str(path)) for _ in range(3)] == [first] * 3 and reads == ["a", "a"]
    later_than(tmp_path / "clock", path)
    path.write_bytes(b"b")
    os.utime(path, (1e9, 1e9))
    other = kept.version(str(path))
    assert other == hashes.version(str(path)) != first and kept.version(str(path)) == other and len(reads) == 3
    again = hashes.Hashes(lambda: str(tmp_path / "kept.json"))
    assert again.version(str(path)) == other and len(reads) == 3


def test_a_version_of_a_file_that_cannot_be_read_is_a_sentence(hashes, tmp_path, monkeypatch):
    path, kept = tmp_path / "a", hashes.Hashes(lambda: str(tmp_path / "kept.json"))
    path.write_bytes(b"a")
    kept.of(str(path))
    later_than(tmp_path / "clock", path)
    path.chmod(0o600)

    def read(path):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(hashes, "sha256", read)
    with pytest.raises(hashes.LoRAFileError, match="'a' cannot be read .*Input/output error"):
        kept.version(str(path))
