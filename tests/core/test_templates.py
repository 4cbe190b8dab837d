"""Every graph that ships, in API form: text-encoder parts of the LoRAs reach the prompts that are drawn with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from devhost.templates.graph import file_name

FOLDER = Path(__file__).resolve().parent.parent.parent / "workflows" / "api"
Prompt = dict[str, dict[str, Any]]


SOCKETS = {"KSampler": ("positive", "negative"), "TwoScaleGuider": ("positive", "negative")}


def drawn_prompts(prompt: Prompt) -> list[tuple[str, list[Any], list[Any]]]:
    """(the node that guides and its socket, its model, the clip of the text encode there) of every prompt to draw."""
    found = []
    for number, node in prompt.items():
        for socket in SOCKETS.get(node["class_type"], ()):
            encode = prompt[node["inputs"][socket][0]]
            assert encode["class_type"] == "CLIPTextEncode"
            found.append((f"{number}.{socket}", node["inputs"]["model"], encode["inputs"]["clip"]))
    return found


@pytest.mark.parametrize("file", sorted(FOLDER.glob("*.json")), ids=lambda file: file.stem)
def test_prompts_to_draw_are_encoded_with_the_clip_of_apply(file: Path) -> None:
    prompt: Prompt = json.loads(file.read_text(encoding="utf-8"))
    found = drawn_prompts(prompt)
    compared = [node["inputs"] for node in prompt.values() if node["class_type"] in ("CompareMerges", "ZipCheck")]
    assert found or compared
    for inputs in compared:  # it puts the LoRAs on by itself, each variant's own
        for slot, socket in enumerate(("model", "clip", "vae")):
            assert prompt[inputs[socket][0]]["class_type"] == "CheckpointLoaderSimple" and inputs[socket][1] == slot
    gives = {"ApplyZippedLoRA", "ZipLoRAs", "KLoRA"}  # a clip with both files' parts
    bare = {"CheckpointLoaderSimple", "LoraModelLoader"}  # models whose LoRAs have no text-encoder parts
    trained = {"TrainConceptLoRA", "MergeCustomDiffusion"}
    for where, (model, _), (node, slot) in found:
        applied, of = prompt[node], prompt[model]
        if applied["class_type"] == "CheckpointLoaderSimple":
            assert of["class_type"] in bare, f"{where}: {of['class_type']}"
            assert "lora" not in of["inputs"] or prompt[of["inputs"]["lora"][0]]["class_type"] in trained, where
            assert slot == 1
            continue
        assert slot == 1 and applied["class_type"] in gives, f"{where}: {applied['class_type']}"
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


UI = sorted(FOLDER.parent.glob("*.json"))
FILLED_IN = {  # what a graph cannot run without a user's own
    "CheckpointLoaderSimple": {"ckpt_name"},
    "ZipLoRAs": {"subject_lora", "subject_prompt", "style_lora", "style_prompt"},
    "LoadLoRAPair": {"content_lora", "style_lora"},
    "LoadImage": {"image"},
    "TrainEmbedding": {"prompt", "initial_word"},
    "TrainCustomDiffusion": {"prompt"},
}


@pytest.mark.parametrize("file", UI, ids=lambda file: file.stem)
def test_a_graph_is_a_form_in_reading_order_and_opens_on_its_note(file: Path) -> None:
    graph = json.loads(file.read_text(encoding="utf-8"))
    prompt: Prompt = json.loads((FOLDER / f"{file_name(file.stem)}.json").read_text(encoding="utf-8"))
    nodes = {node["id"]: node for node in graph["nodes"]}
    places = [tuple(node["pos"]) for _, node in sorted(nodes.items())]
    assert places == sorted(places), "the numbers are not in the order of reading"
    assert graph["extra"]["ds"]["scale"] >= 0.7
    form = graph["extra"]["linearData"]
    asked: dict[str, set[str]] = {}
    for number, widget in form["inputs"]:
        assert not isinstance(prompt[str(number)]["inputs"][widget], list), "a link is nothing to fill in"
        asked.setdefault(str(number), set()).add(widget)
    for number, node in prompt.items():
        assert asked.get(number, set()) >= FILLED_IN.get(node["class_type"], set())
        if node["class_type"] == "CLIPTextEncode":  # a text that says something is asked for, by the node's title
            words = node["inputs"]["text"]
            assert (number in asked) == bool(words and isinstance(words, str))
            (text,) = (one for one in nodes[int(number)]["inputs"] if one["name"] == "text")
            assert text["label"] in node["_meta"]["title"]
    assert len({(number, name) for number, names in asked.items() for name in names}) == len(form["inputs"])
    shown = {nodes[number]["type"] for number in form["outputs"]}
    assert {"SaveImage"} <= shown <= {"SaveImage", "PreviewAny"}
    picture = Image.open(file.with_suffix(".jpg"))
    assert picture.width == picture.height


@pytest.mark.parametrize("name", ["1 Zip two LoRAs (start here)", "2 Zipped or stacked"])
def test_the_first_graphs_are_small_and_open_large_enough_to_read(name: str) -> None:
    file = FOLDER.parent / f"{name}.json"
    graph = json.loads(file.read_text(encoding="utf-8"))
    nodes = {node["id"]: node for node in graph["nodes"]}
    assert len(nodes) <= 10
    left = min(node["pos"][0] for node in nodes.values())
    assert max(node["pos"][0] + node["size"][0] for node in nodes.values()) - left <= 2000
    for node in nodes.values():
        (x, y), (wide, high) = node["pos"], node["size"]
        inside = [
            group["title"]
            for group in graph["groups"]
            for gx, gy, gw, gh in [group["bounding"]]
            if gx <= x and x + wide <= gx + gw and gy <= y - 30 and y + high <= gy + gh
        ]
        assert len(inside) == (node["type"] != "MarkdownNote"), node["type"]
    view = graph["extra"]["ds"]
    assert view["scale"] >= 0.7
    for width, height in ((1600, 900), (1280, 720)):  # pixels, of which the menus take some at the left and the top
        for node in (nodes[1], nodes[2], nodes[3]):  # the note, the checkpoint and the LoRAs
            x, y = ((place + by) * view["scale"] for place, by in zip(node["pos"], view["offset"], strict=True))
            assert 60 <= x and x + node["size"][0] * view["scale"] <= width
            assert 60 <= y <= height / 2
