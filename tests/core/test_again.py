"""Files for `again` that are odd, or a stranger's: each is a sentence and exit status 2, before anything is queued."""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ziplora_batch import again, trusted
from ziplora_batch.__main__ import main

NOBODY = "127.0.0.1:1"
GRAPH = {"1": {"class_type": "EmptyImage", "inputs": {"width": 8}}}


def png(prompt: str | None, **options: bool) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        info = PngInfo()
        if prompt is not None:
            info.add_text("prompt", prompt, **options)
        Image.new("RGB", (16, 16), (9, 99, 199)).save(path, pnginfo=info)

    return write


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def with_chunk(kind: bytes, data: bytes) -> Callable[[Path], None]:
    """Before the pixels."""

    def write(path: Path) -> None:
        png(None)(path)
        whole = path.read_bytes()
        path.write_bytes(whole[:33] + chunk(kind, data) + whole[33:])

    return write


def cut(prompt: str, keep: int) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        png(prompt)(path)
        path.write_bytes(path.read_bytes()[:keep])

    return write


def huge(path: Path) -> None:
    """A picture of 60,000 x 60,000 by its own words."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b""))


def folder(path: Path) -> None:
    path.mkdir()


def data(content: bytes) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(content) and None


def tensors(header: object, numbers: bytes = b"", length: int | None = None) -> Callable[[Path], None]:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return data(struct.pack("<Q", len(text) if length is None else length) + text + numbers)


def jpeg(path: Path) -> None:
    Image.new("RGB", (16, 16)).save(path, "jpeg")


WHOLE = json.dumps(GRAPH)
DEEP = "[" * 100_000
ODD = {
    "missing.png": (lambda path: None, "is missing"),
    "folder.png": (folder, "is no file"),
    "empty.png": (data(b""), "cannot be read as a PNG"),
    "cut.png": (cut(WHOLE, 120), "cannot be read as a PNG"),
    "header only.png": (cut(WHOLE, 20), "cannot be read as a PNG"),
    "jpeg.png": (jpeg, "cannot be read as a PNG"),
    "eps.png": (data(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n"), "cannot be read as a PNG"),
    "huge.png": (huge, "cannot be read as a PNG"),
    "bomb.png": (with_chunk(b"zTXt", b"prompt\0\0" + zlib.compress(b" " * 80_000_000)), "cannot be read as a PNG"),
    "bare.png": (png(None), "carries no workflow"),
    "not utf-8.png": (with_chunk(b"iTXt", b"prompt\0\0\0\0\0\xff\xfe{}"), "carries no workflow"),
    "latin.png": (with_chunk(b"tEXt", b"prompt\0\xff\xfe\x80"), "cannot be read as JSON"),
    "broken.png": (png('{"1": '), "cannot be read as JSON"),
    "nan in.png": (png("[NaN]"), "is no workflow in API form"),
    "deep.png": (png(DEEP), "cannot be read as JSON"),
    "list.png": (png("[1, 2]"), "is no workflow in API form"),
    "text.png": (png('"a star"'), "is no workflow in API form"),
    "half a node.png": (png('{"1": {"class_type": 5, "inputs": {}}}'), "is no workflow in API form"),
    "frontend.png": (png('{"nodes": [], "links": []}'), "is a graph of the frontend"),
    "dangling.png": (png('{"1": {"class_type": "A", "inputs": {"x": ["2", 0]}}}'), "linked to node '2'"),
    "empty.safetensors": (data(b""), "is no whole safetensors file"),
    "short.safetensors": (data(b"\1\2\3"), "is no whole safetensors file"),
    "cut.safetensors": (tensors({}, length=9_999), "is no whole safetensors file"),
    "endless.safetensors": (tensors({}, length=2**63), "is no whole safetensors file"),
    "bytes.safetensors": (tensors(b"\xff\xfe\x00\x00"), "is no whole safetensors file"),
    "list.safetensors": (tensors([1]), "is no whole safetensors file"),
    "deep.safetensors": (tensors(DEEP.encode()), "is no whole safetensors file"),
    "bare.safetensors": (tensors({}), "carries no workflow"),
    "null.safetensors": (tensors({"__metadata__": None}), "carries no workflow"),
    "number.safetensors": (tensors({"__metadata__": {"prompt": 5}}), "carries no workflow"),
    "words.safetensors": (tensors({"__metadata__": "prompt"}), "is no whole safetensors file"),
    "nowhere.safetensors": (
        tensors({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}),
        "is no whole safetensors file",
    ),
    "other.txt": (data(b"x"), "is neither a .png nor a .safetensors"),
}


@pytest.mark.parametrize("name", ODD)
def test_an_odd_file_is_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    write, says = ODD[name]
    write(tmp_path / name)
    assert main(["again", str(tmp_path / name), "--server", NOBODY]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and says in said and len(said.splitlines()) == 1
    assert str(tmp_path / name) in said and said.count(str(tmp_path)) == 1, "it names the file, and no other"


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root reads everything")
@pytest.mark.parametrize("name", ["mine.png", "mine.safetensors"])
def test_a_file_that_may_not_be_read_is_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    (tmp_path / name).write_bytes(b"")
    (tmp_path / name).chmod(0)
    assert main(["again", str(tmp_path / name), "--server", NOBODY]) == 2
    assert "Permission denied" in capsys.readouterr().err


@pytest.mark.parametrize("write", [png(WHOLE), png(WHOLE, zip=True)])
@pytest.mark.parametrize("name", ["mine.png", "MINE.PNG"])
def test_a_workflow_is_read_from_every_way_to_write_it(tmp_path: Path, write: Callable, name: str) -> None:
    write(tmp_path / name)
    assert again.carried.workflow(tmp_path / name)["1"] == GRAPH["1"]


MODULES = {
    "KSampler": "nodes",
    "PreviewAny": "comfy_extras.nodes_preview_any",
    "ZipLoRAOptimize": "custom_nodes.any name of the folder",
    "RunPython": "custom_nodes.helpers",
    "OpenAIDalle3": "comfy_api_nodes.nodes_openai",
    "SaveTrainingDataset": "comfy_extras.nodes_dataset",
    "GLSLShader": "comfy_extras.nodes_glsl",
    "Nodes": "nodesque.nodes",
    "Unsaid": "",
    "StyleStrength": "comfy_extras_of_mine.x",
}


def graph(*types: str) -> dict:
    return {str(i): {"class_type": name, "inputs": {}} for i, name in enumerate(types)}


def test_only_the_hosts_and_our_own_nodes_are_run_unasked() -> None:
    assert trusted.doubts(graph("KSampler", "PreviewAny", "ZipLoRAOptimize", "KSampler"), MODULES) == []
    for name, says in (
        ("RunPython", "'RunPython' of custom_nodes.helpers"),
        ("OpenAIDalle3", "'OpenAIDalle3', which pays for a service (comfy_api_nodes.nodes_openai)"),
        ("SaveTrainingDataset", "'SaveTrainingDataset', which writes into any folder that the workflow names (comfy_e"),
        ("GLSLShader", "'GLSLShader', which runs code that the workflow carries"),
        ("Nodes", "'Nodes' of nodesque.nodes"),
        ("Unsaid", "'Unsaid' of an unknown module"),
        ("StyleStrength", "'StyleStrength' of comfy_extras_of_mine.x"),
        ("Gone", "'Gone', which the server has not"),
        ("\x1b[2J", "'\N{REPLACEMENT CHARACTER}[2J', which the server has not"),
    ):
        (found,) = trusted.doubts(graph("KSampler", name), MODULES)
        assert found.startswith(says)
    assert len(trusted.doubts(graph(*MODULES), MODULES)) == len(MODULES) - 3
