"""Every graph that ships, in API form: text-encoder parts of the LoRAs reach the prompts that are drawn with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).resolve().parent.parent.parent / "workflows" / "api"
Prompt = dict[str, dict[str, Any]]


def drawn_prompts(prompt: Prompt) -> list[tuple[str, list[Any]]]:
    """(the sampler and its socket, the clip of the text encode there) of every prompt that a picture is drawn with."""
    found = []
    for number, node in prompt.items():
        for socket in ("positive", "negative") if node["class_type"] == "KSampler" else ():
            encode = prompt[node["inputs"][socket][0]]
            assert encode["class_type"] == "CLIPTextEncode"
            found.append((f"{number}.{socket}", encode["inputs"]["clip"]))
    return found


@pytest.mark.parametrize("file", sorted(FOLDER.glob("*.json")), ids=lambda file: file.stem)
def test_prompts_to_draw_are_encoded_with_the_clip_of_apply(file: Path) -> None:
    prompt: Prompt = json.loads(file.read_text(encoding="utf-8"))
    found = drawn_prompts(prompt)
    assert found
    gives = {("ApplyZippedLoRA", 1), ("ZipLoRAs", 1)}  # a clip with both files' parts
    for where, (node, slot) in found:
        applied = prompt[node]
        assert (applied["class_type"], slot) in gives, f"{where}: {applied['class_type']}"
        checkpoint, clip = applied["inputs"]["clip"]
        assert (prompt[checkpoint]["class_type"], clip) == ("CheckpointLoaderSimple", 1)


@pytest.mark.parametrize("file", sorted(FOLDER.glob("*.json")), ids=lambda file: file.stem)
def test_each_picture_has_the_clip_of_its_own_dials(file: Path) -> None:
    """A pair turned down for the model is turned down for the text encoder too."""
    prompt: Prompt = json.loads(file.read_text(encoding="utf-8"))

    def dials(node: str) -> dict[str, Any]:
        before = prompt[prompt[node]["inputs"]["zipped_lora"][0]]
        return {
            k: v for k, v in before["inputs"].items() if before["class_type"] == "StyleStrength" and k != "zipped_lora"
        }

    for node in prompt.values():
        if node["class_type"] == "KSampler" and prompt[node["inputs"]["model"][0]]["class_type"] == "ApplyZippedLoRA":
            encode = prompt[node["inputs"]["positive"][0]]
            assert dials(encode["inputs"]["clip"][0]) == dials(node["inputs"]["model"][0])
