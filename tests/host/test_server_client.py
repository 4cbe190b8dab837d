"""The real server, seen through the client that the other host tests use."""

from __future__ import annotations

import numpy as np
import pytest

from devhost.answers import PromptRefused
from devhost.server import ComfyServer

RED = 255 << 16


def picture(color: int, name: str) -> dict:
    """A prompt that saves one plain picture."""
    inputs = {"width": 48, "height": 32, "batch_size": 1, "color": color}
    return {
        "1": {"class_type": "EmptyImage", "inputs": inputs},
        "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": name}},
    }


def test_result_holds_pictures_and_what_was_cached(server: ComfyServer) -> None:
    first = server.run(picture(RED, "first"))
    assert np.array_equal(first.images("2")[0], np.full((32, 48, 3), (255, 0, 0), np.uint8))
    assert first.executed == ["1", "2"]
    assert first.files("2")[0].is_file()
    second = server.run(picture(RED, "second"))
    assert second.cached == {"1"}
    assert second.executed == ["2"]


def test_refused_prompt_carries_the_errors_of_its_node(server: ComfyServer) -> None:
    prompt = picture(RED, "x")
    prompt["1"]["inputs"]["width"] = 0
    with pytest.raises(PromptRefused) as caught:
        server.run(prompt)
    assert "smaller than min" in caught.value.messages("1")


def test_uploaded_picture_comes_back_unchanged(server: ComfyServer) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (16, 24, 3), np.uint8)
    name = server.upload(pixels, "noise.png")
    prompt = {
        "1": {"class_type": "LoadImage", "inputs": {"image": name}},
        "2": {"class_type": "PreviewImage", "inputs": {"images": ["1", 0]}},
    }
    assert np.array_equal(server.run(prompt).images("2")[0], pixels)
