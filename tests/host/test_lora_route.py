"""What the page is told of a LoRA file, by a real server: JSON and a small picture, and nothing from outside."""

from __future__ import annotations

import io
import json
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from devhost.server import ComfyServer

NAME = "sub/route dog+1 ü.safetensors"


@pytest.fixture(scope="module")
def lora(session_server: ComfyServer) -> Iterator[Path]:
    path = session_server.base / "models" / "loras" / NAME
    path.parent.mkdir()
    tensors = {"lora_unet_x.lora_up.weight": torch.zeros(4, 2), "lora_unet_x.lora_down.weight": torch.zeros(2, 4)}
    save_file(tensors, path, {"ss_base_model_version": "sdxl_base_v1-0"})
    about = {"trainedWords": ["sks dog"], "baseModel": "Pony"}
    path.with_suffix(".civitai.info").write_text(json.dumps(about), encoding="utf-8")
    path.with_suffix(".metadata.json").write_text("{", encoding="utf-8")
    path.with_suffix(".json").write_text('{"preferred weight": 0.8}', encoding="utf-8")
    Image.new("RGB", (1000, 500), "red").save(path.with_suffix(".preview.png"))
    yield path
    for beside in path.parent.iterdir():
        beside.unlink()
    path.parent.rmdir()


def ask(server: ComfyServer, name: str | None, what: str = ""):
    params = {} if name is None else {"name": name}
    return server.session.get(f"{server.url}/ziplora/lora{what}", params=params, timeout=60)


def test_what_is_known_is_json_without_a_path(server: ComfyServer, lora: Path) -> None:
    answer = ask(server, NAME)
    said = answer.json()
    assert answer.ok and {key: said[key] for key in said if key != "notes"} == {
        "prompt": "sks dog",
        "source": "civitai.info",
        "base_model": "Pony",
        "family": "SDXL",
        "line": "Pony",
        "strength": 0.8,
        "has_thumbnail": True,
    }
    (note,) = said["notes"]
    assert "route dog+1 ü.metadata.json" in note
    assert str(server.base) not in answer.text
    assert ask(server, NAME).text == server.session.get(f"{server.url}/api/ziplora/lora", params={"name": NAME}).text


def test_the_picture_is_a_small_jpeg(server: ComfyServer, lora: Path) -> None:
    answer = ask(server, NAME, "/thumbnail")
    assert answer.ok and answer.headers["Content-Type"] == "image/jpeg" and len(answer.content) < 20_000
    assert Image.open(io.BytesIO(answer.content)).size == (256, 128)


@pytest.mark.parametrize(
    "name",
    [
        None,
        "",
        "../checkpoints/miniature_sdxl.safetensors",
        "/etc/passwd",
        "%2e%2e%2fx",
        "nowhere.safetensors",
        "x" * 7000,
    ]
    + ["sub/route dog+1 ü.preview.png", "sub/../" + NAME, "..\\..\\x", "a\x00b", "file:///etc/passwd"],
)
@pytest.mark.parametrize("what", ["", "/thumbnail"])
def test_no_other_name_is_answered(server: ComfyServer, lora: Path, name: str | None, what: str) -> None:
    answer = ask(server, name, what)
    assert answer.status_code == 404 and set(answer.json()) == {"error"}
    assert "passwd" not in answer.text and str(server.base) not in answer.text


def test_a_file_that_only_has_a_pictures_name_is_not_sent(server: ComfyServer, lora: Path) -> None:
    """Also where it is a link to a picture outside."""
    folder = lora.parent
    outside = server.base / "output" / "outside.png"
    Image.new("RGB", (9, 9)).save(outside)
    for name in ("text", "link"):
        save_file({"lora_unet_x.lora_up.weight": torch.zeros(2, 2)}, folder / f"{name}.safetensors")
    (folder / "text.png").write_text("secret", encoding="utf-8")
    (folder / "link.png").symlink_to(outside)
    for name in ("text", "link"):
        answer = ask(server, f"sub/{name}.safetensors", "/thumbnail")
        assert answer.status_code == 404 and b"secret" not in answer.content


def test_hostile_files_are_answered_at_once_and_the_server_lives(server: ComfyServer, lora: Path) -> None:
    deep, huge = lora.parent / "deep.safetensors", lora.parent / "huge.safetensors"
    header = b'{"a":' * 1_000_000
    deep.write_bytes(struct.pack("<Q", len(header)) + header)
    deep.with_suffix(".json").write_bytes(b"[" * 3_000_000)
    huge.write_bytes(struct.pack("<Q", 90 * 2**20))
    with open(huge, "ab") as file:
        file.truncate(100 * 2**20)  # sparse
    for path in (deep, huge):
        answer = ask(server, f"sub/{path.name}")
        assert answer.ok and answer.json()["prompt"] == "" and answer.json()["notes"]
    server.check_alive()
