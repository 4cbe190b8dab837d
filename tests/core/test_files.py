"""Files are read, or refused with a sentence that names the file and what to do."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import re
import struct
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from toys import of_two

from ziplora_core import files, saved
from ziplora_core.coefficients import Coefficients
from ziplora_core.files import LoRAFileError, check_lora_file, read_lora_file
from ziplora_core.writing import write_tensors


def good(path):
    save_file({"lora_unet_x.lora_up.weight": torch.ones(2, 1), "lora_unet_x.lora_down.weight": torch.ones(1, 2)}, path)
    return path


def test_reads_what_was_written(tmp_path):
    path = tmp_path / "ok.safetensors"
    tensors = {f"lora_unet_x.lora_{half}.weight": torch.randn(2, 2).bfloat16() for half in ("up", "down")}
    tensors["a.alpha"] = torch.tensor(4.0)
    save_file(tensors, path)
    read = read_lora_file(path)
    assert read.keys() == tensors.keys() and all(torch.equal(read[k], tensors[k]) for k in tensors)


def truncated(path):
    path.write_bytes(good(path).read_bytes()[:-3])


def short_header(path):
    path.write_bytes(good(path).read_bytes()[:20])


def huge_claim(path):
    path.write_bytes(struct.pack("<Q", 2**62) + b"{}")


def broken_offsets(path):
    header = json.dumps({"lora_up": {"dtype": "F32", "shape": [1], "data_offsets": "no"}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header)


def nan(path):
    save_file({"a.lora_up.weight": torch.tensor([[float("nan")]])}, path)


def infinite(path):
    save_file({"a.lora_up.weight": torch.tensor([[float("inf")]], dtype=torch.float16)}, path)


def complex_numbers(path):
    save_file({"a.lora_up.weight": torch.ones(2, 1, dtype=torch.complex64)}, path)


def half_a_layer(path):
    save_file({"a.lora_up.weight": torch.ones(2, 1)}, path)


def two_alphas(path):
    save_file({"lora_a.alpha": torch.ones(2)}, path)


def deep(path):
    path.write_bytes(struct.pack("<Q", 100_000) + b"[" * 100_000)


def endless(path):
    header = b'{"a":[' + b"0," * 600_000 + b"0]}"
    path.write_bytes(struct.pack("<Q", len(header)) + header)


def offset_without_end(path):
    header = b'{"lora_up":{"dtype":"F32","shape":[1],"data_offsets":[0,1e999]}}'
    path.write_bytes(struct.pack("<Q", len(header)) + header)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda path: None, "missing"),
        (lambda path: path.write_bytes(b""), "not a safetensors file"),
        (lambda path: path.write_bytes(b"PK\x03\x04" + b"\0" * 100), "not a safetensors file"),
        (lambda path: path.write_bytes(struct.pack("<Q", 4) + b"nope"), "not JSON"),
        (lambda path: path.write_bytes(struct.pack("<Q", 2) + b"[]"), "no table"),
        (truncated, "cut off"),
        (short_header, "cut off"),
        (huge_claim, "cut off"),
        (broken_offsets, "broken"),
        (lambda path: save_file({"model.diffusion_model.out.2.weight": torch.ones(1)}, path), "holds no LoRA"),
        (lambda path: save_file({}, path), "holds no LoRA"),
        (nan, "NaN"),
        (infinite, "NaN or infinite"),
        (complex_numbers, "holds complex64"),
        (half_a_layer, "without a '.lora_down.weight' beside it"),
        (two_alphas, "shape .2,., expected one number"),
        (deep, "not JSON"),
        (endless, "lists too much"),
        (offset_without_end, "broken"),
    ],
)
def test_refuses(tmp_path, spoil, says):
    path = tmp_path / "spoiled.safetensors"
    spoil(path)
    with pytest.raises(LoRAFileError, match=says) as caught:
        read_lora_file(path)
    message = str(caught.value)
    assert "spoiled.safetensors" in message and str(tmp_path) not in message and "\n" not in message


def test_the_header_check_reads_no_data(tmp_path):
    path = tmp_path / "nan.safetensors"
    nan(path)
    check_lora_file(path)  # only the numbers are wrong


def test_what_was_read_stays_when_the_file_is_written_over(tmp_path):
    """In place, as a download that begins anew: the same file, other numbers."""
    path = good(tmp_path / "ok.safetensors")
    read = read_lora_file(path)
    with path.open("r+b") as file:
        file.seek(-16, 2)
        file.write(b"\0" * 16)
    assert all(bool((t == 1).all()) for t in read.values())


def test_what_a_killed_writer_left_is_cleared_away_when_it_is_old(tmp_path):
    old, young = tmp_path / ".a.safetensors.x.ziplora.part", tmp_path / ".a.safetensors.y.ziplora.part"
    others = [tmp_path / ".a.part", tmp_path / "a.safetensors"]
    for path in (old, young, *others):
        path.write_bytes(b"begun")
        os.utime(path, (time.time() - 7200,) * 2)
    young.touch()
    write_tensors(tmp_path / "b.safetensors", {"a": torch.ones(1)}, {})
    assert set(tmp_path.iterdir()) == {young, *others, tmp_path / "b.safetensors"}


def test_a_folder_that_cannot_be_written_into_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(
        OSError, match=r"'b.safetensors' could not be written into the folder '.*file' \(.+\); see that"
    ):
        write_tensors(tmp_path / "file" / "b.safetensors", {"a": torch.ones(1)}, {})


def cut_off_while_read(path: Path, read: Callable[[Path], object], looks: str, before: int) -> str:
    """What is said of a file that another thread cuts off once `before` of its tensors have been looked at.

    By a process of its own: through a memory map it would end without a word. looks: the function that looks at one.
    """

    def work() -> None:
        torch.set_num_threads(1)  # those of the process that was forked are gone
        module, name = (torch, looks) if hasattr(torch, looks) else (files, looks)
        look, seen = getattr(module, name), []

        def look_and_cut(*given: object) -> object:
            seen.append(given)
            if len(seen) == before:
                cut = threading.Thread(target=os.truncate, args=(path, 4096))
                cut.start()
                cut.join()
            return look(*given)

        setattr(module, name, look_and_cut)
        try:
            read(path)
        except LoRAFileError as error:
            answer.put(str(error))

    fork = multiprocessing.get_context("fork")
    answer = fork.SimpleQueue()
    reader = fork.Process(target=work)
    reader.start()
    reader.join()
    assert reader.exitcode == 0, "the reader was killed"
    assert not answer.empty(), "it was read as if it were whole"
    return str(answer.get())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the reader is forked")
@pytest.mark.parametrize("before", [1, 3])
def test_a_file_that_is_cut_off_while_it_is_read_is_a_sentence(tmp_path, before):
    path = tmp_path / "shrinking.safetensors"
    save_file({f"l{i}.lora_{half}.weight": torch.ones(256, 256) for i in range(4) for half in ("up", "down")}, path)
    said = cut_off_while_read(path, read_lora_file, "_check_numbers", before)
    assert said.startswith("'shrinking.safetensors' has become shorter while it was read") and "\n" not in said


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the reader is forked")
def test_a_saved_pair_that_is_cut_off_while_it_is_read_is_a_sentence(tmp_path):
    path = tmp_path / "pair.safetensors"
    file = saved.SavedLoRA("a", "0" * 64, 1, 1.0)
    vectors = {f"layer {i}": torch.ones(2**16) for i in range(4)}
    about = saved.SavedZip(of_two(file, file), of_two(1.0, 1.0), "zipped", {}, {})
    saved.write(path, Coefficients(of_two(vectors, vectors)), about)
    said = cut_off_while_read(path, saved.read, "isfinite", 2)
    assert said.startswith("'pair.safetensors' has become shorter while it was read") and "\n" not in said


def test_a_disk_that_fails_is_a_sentence(tmp_path, monkeypatch):
    path = good(tmp_path / "far away.safetensors")
    for error, says in (
        (OSError(5, "Input/output error"), "'far away.safetensors' cannot be read .Input/output error"),
        (PermissionError(13, "Permission denied"), "'far away.safetensors' cannot be read .Permission denied"),
        (FileNotFoundError(2, "No such file"), "'far away.safetensors' is missing"),
    ):

        def fail(*_: object, error: OSError = error, **__: object) -> None:
            raise error

        for place in ("fstat", "stat"):
            with monkeypatch.context() as patch, pytest.raises(LoRAFileError, match=says):
                patch.setattr(os, place, fail)
                read_lora_file(path)


def test_the_hash_is_of_the_bytes_that_were_read(tmp_path):
    """In one pass: small files at once, large ones in a thread beside the reading."""
    for rows in (3, 2200):
        path, digest = tmp_path / f"{rows}.safetensors", hashlib.sha256()
        g = torch.Generator().manual_seed(rows)
        tensors = {f"l.lora_{half}.weight": torch.randn(rows, 1000, generator=g) for half in ("up", "down")}
        save_file(tensors, path, {"about": "it"})
        read = read_lora_file(path, digest)
        assert digest.hexdigest() == hashlib.sha256(path.read_bytes()).hexdigest()
        assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())


def test_nothing_is_mapped_into_memory():
    """Of what the library offers, these map files, and so does Python's own module."""
    root = Path(__file__).resolve().parent.parent.parent
    for path in [*root.glob("ziplora_core/*.py"), *root.glob("nodes/**/*.py")]:
        if path.name == "csd.py":
            continue  # a network's weights, read and copied as the host reads all of those
        mapped = re.search(r"\b(safe_open|load_file|load_torch_file|import mmap|from_file)\b", path.read_text("utf-8"))
        assert mapped is None, f"{path.name} uses {mapped}"
