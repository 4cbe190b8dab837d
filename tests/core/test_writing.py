"""Files are written whole or not at all, under names that one writer has for itself, and are on the disk when said."""

from __future__ import annotations

import errno
import multiprocessing
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from ziplora_core import writing
from ziplora_core.files import read_lora_file, read_metadata
from ziplora_core.writing import atomic_write, give_back, reserve, write_tensors


def test_what_is_written_is_what_the_library_reads(tmp_path: Path) -> None:
    path, g = tmp_path / "a.safetensors", torch.Generator().manual_seed(0)
    kinds = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.bool)
    tensors = {f"lora_{i}.é": torch.randn(3, 5, generator=g).mul(2).to(kind) for i, kind in enumerate(kinds)}
    tensors |= {"lora_t": torch.randn(4, 3, generator=g).T, "lora_n": torch.tensor(2.5), "lora_e": torch.empty(0, 4)}
    write_tensors(path, tensors, {"title": "é \u2028 日本"})
    with safe_open(str(path), framework="pt") as file:
        assert file.metadata() == {"title": "é \u2028 日本"} == read_metadata(path)
    for found in (load_file(path), read_lora_file(path)):
        assert found.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape
            assert torch.equal(found[name].double(), tensor.double())


def write_sixty(folder: Path, text: bytes, ready: object) -> None:
    ready.wait()  # type: ignore[attr-defined]
    for _ in range(60):
        path = reserve(folder, "zip", 1, ".txt")
        with atomic_write(path) as file:
            file.write(text)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked")
def test_two_processes_that_write_at_once_lose_no_file(tmp_path: Path) -> None:
    fork = multiprocessing.get_context("fork")
    ready = fork.Barrier(2)
    writers = [fork.Process(target=write_sixty, args=(tmp_path, text, ready)) for text in (b"one", b"two")]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0, 0]
    texts = [path.read_bytes() for path in tmp_path.iterdir()]
    assert sorted(texts) == [b"one"] * 60 + [b"two"] * 60


def test_the_mask_of_new_files_is_obeyed_and_never_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It belongs to the whole process: while it is set to be read, other threads make files that anybody may write."""
    before = os.umask(0o027)
    try:
        monkeypatch.setattr(os, "umask", lambda mask: pytest.fail("the mask was set"))
        path = reserve(tmp_path, "a", 1, ".safetensors")
        write_tensors(path, {"a": torch.ones(1)}, {})
        assert path.stat().st_mode & 0o777 == 0o640
    finally:
        monkeypatch.undo()
        os.umask(before)


@pytest.mark.parametrize("ahead", [7200, -7200])
def test_another_clock_than_the_disks_deletes_no_file_that_is_being_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ahead: int
) -> None:
    """As where a file server's is hours off: its times are compared with each other."""
    begun, left = tmp_path / ".a.safetensors.x.ziplora.part", tmp_path / ".a.safetensors.y.ziplora.part"
    begun.write_bytes(b"begun")
    left.write_bytes(b"left")
    os.utime(left, (begun.stat().st_mtime - 4000,) * 2)
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + ahead)
    write_tensors(tmp_path / "b.safetensors", {"a": torch.ones(1)}, {})
    assert begun.exists() and not left.exists()


@pytest.mark.skipif(os.name == "nt", reason="a folder cannot be synced there")
def test_a_file_is_on_the_disk_before_it_has_its_name_and_its_name_before_it_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done, sync, replace = [], os.fsync, os.replace

    def synced(handle: int) -> None:
        status = os.fstat(handle)
        done.append("folder" if status.st_ino == tmp_path.stat().st_ino else f"file of {status.st_size} bytes")
        sync(handle)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", lambda *paths: (done.append("name"), replace(*paths)))
    with atomic_write(tmp_path / "a.txt") as file:
        file.write(b"whole")
    assert done == ["file of 5 bytes", "name", "folder"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_nothing_is_left_of_a_write_that_failed(tmp_path: Path, error: BaseException) -> None:
    (tmp_path / "a.txt").write_bytes(b"before")
    with pytest.raises(type(error)), atomic_write(tmp_path / "a.txt") as file:
        file.write(b"half")
        raise error
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"a.txt": b"before"}


def test_a_reserved_name_shows_no_file_and_is_nobody_elses_until_it_is_written_or_given_back(tmp_path: Path) -> None:
    first, second = (reserve(tmp_path, "a", 1, ".txt") for _ in range(2))
    assert [path.name for path in (first, second)] == ["a_00001_.txt", "a_00002_.txt"]
    with pytest.raises(KeyError), atomic_write(first):
        raise KeyError
    assert all(path.name.endswith(".ziplora.part") and not path.stat().st_size for path in tmp_path.iterdir())
    give_back(second)
    assert reserve(tmp_path, "a", 1, ".txt") == second, "the first is still reserved"
    for path in (first, second):
        with atomic_write(path) as file:
            file.write(b"whole")
        give_back(path)
    assert sorted(tmp_path.iterdir()) == [first, second]


def test_a_reserved_name_is_kept_for_days_and_not_for_good(tmp_path: Path) -> None:
    """A training of many hours has one; who was killed needs none."""
    long, gone = reserve(tmp_path, "long", 1, ".txt"), reserve(tmp_path, "gone", 1, ".txt")
    for path, hours in ((long, 24), (gone, 24 * 8)):
        os.utime(tmp_path / f".{path.name}.ziplora.part", (time.time() - 3600 * hours,) * 2)
    write_tensors(tmp_path / "b.safetensors", {"a": torch.ones(1)}, {})
    assert {path.name for path in tmp_path.iterdir()} == {"b.safetensors", ".long_00001_.txt.ziplora.part"}
    give_back(long), give_back(gone)


def with_links(monkeypatch: pytest.MonkeyPatch) -> None:
    """The file system as it is."""


def without_links(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a memory card, and on some network disks."""

    def link(*paths: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", link)


KINDS = pytest.mark.parametrize("kind", [with_links, without_links])


@KINDS
def test_a_file_that_another_program_has_put_under_a_reserved_name_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, kind: Callable
) -> None:
    """One that reserves nothing, as the host's own save nodes; also under the name that comes next."""

    def crossed(*given: Any) -> Path:
        found = reserve(*given)
        if found.name in others:
            found.write_bytes(others[found.name])
        return found

    kind(monkeypatch)
    others = {f"a_0000{number}_.txt": f"other {number}".encode() for number in (1, 2)}
    monkeypatch.setattr(writing, "reserve", crossed)
    path = crossed(tmp_path, "a", 1, ".txt")
    with atomic_write(path) as file:
        file.write(b"mine")
    assert file.path == tmp_path / "a_00003_.txt"
    with atomic_write(file.path) as again:
        again.write(b"mine, longer")
    assert again.path == file.path
    found = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert found == {**others, "a_00003_.txt": b"mine, longer"}, "and nothing is reserved any more"
    assert "'a_00001_.txt' meanwhile, which stays; this file is 'a_00002_.txt'" in caplog.text
    assert "'a_00002_.txt' meanwhile, which stays; this file is 'a_00003_.txt'" in caplog.text


@KINDS
def test_a_name_that_is_free_is_taken_without_a_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, kind: Callable
) -> None:
    kind(monkeypatch)
    path = reserve(tmp_path, "a", 1, ".safetensors")
    assert write_tensors(path, {"a": torch.ones(1)}, {}) == path
    assert [path] == list(tmp_path.iterdir()) and not caplog.records
    assert path.stat().st_nlink == 1


@KINDS
def test_a_next_name_that_cannot_be_had_leaves_the_others_file_and_the_reservation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Callable
) -> None:
    """A second try, which a training makes, must not take the first name for its own."""
    kind(monkeypatch)
    path, real = reserve(tmp_path, "a", 1, ".txt"), writing._name_anew
    path.write_bytes(b"other")

    def full(temporary: Path, wanted: Path) -> None:
        if wanted != path:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(temporary, wanted)

    monkeypatch.setattr(writing, "_name_anew", full)
    with pytest.raises(OSError, match="No space left"), atomic_write(path) as file:
        file.write(b"mine")
    assert {p.name for p in tmp_path.iterdir()} == {path.name, f".{path.name}.ziplora.part"}
    monkeypatch.setattr(writing, "_name_anew", real)
    with atomic_write(path) as file:
        file.write(b"mine")
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {path.name: b"other", file.path.name: b"mine"}


def test_no_placeholder_is_left_where_a_file_cannot_be_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_links(monkeypatch)
    path = reserve(tmp_path, "a", 1, ".txt")

    def replace(*paths: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(OSError, match="Input/output error"), atomic_write(path) as file:
        file.write(b"mine")
    assert not path.exists()
    give_back(path)
    assert list(tmp_path.iterdir()) == []
