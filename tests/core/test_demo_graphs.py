"""The demo draws with the graph that ships: names, prompts, sizes and noise are put in, and nothing else."""

from __future__ import annotations

import json
from typing import Any

import pytest

from demo.graphs import SHIPPED, Drawing, Graphs, Learned

CONTENT = Learned("subject.safetensors", "subject/1.png", "a zub figure")
STYLE = Learned("style.safetensors", "style/1.png", "a star in vorp style")
DRAWING = Drawing("a zub figure in vorp style", count=4, seed=7)
NAMES = {"ckpt_name", "content_lora", "style_lora", "image", "text"}
SIZES = {"width", "height", "batch_size"}


@pytest.fixture
def graphs() -> Graphs:
    return Graphs("miniature.safetensors", 128)


def changed(prompt: dict[str, Any]) -> set[str]:
    """Inputs of a prompt that differ from the shipped file's."""
    shipped = json.loads(SHIPPED.read_text(encoding="utf-8"))
    return {
        name
        for key, node in prompt.items()
        for name, value in node["inputs"].items()
        if shipped[key]["inputs"][name] != value
    }


def test_zipped_graph_is_the_shipped_one_with_names_and_sizes(graphs: Graphs) -> None:
    prompt = graphs.zipped(CONTENT, STYLE, DRAWING)
    assert changed(prompt) == NAMES | SIZES | {"seed"}
    assert {key: node["class_type"] for key, node in prompt.items()} == {
        key: node["class_type"] for key, node in graphs.shipped.items()
    }


def test_each_reference_goes_with_its_own_prompt_and_side(graphs: Graphs) -> None:
    prompt = graphs.zipped(CONTENT, STYLE, DRAWING)
    optimise = prompt[graphs.optimise]["inputs"]
    for learned, side in ((CONTENT, "content"), (STYLE, "style")):
        encoded = prompt[optimise[f"{side}_latents"][0]]
        scaled = prompt[encoded["inputs"]["pixels"][0]]
        assert prompt[scaled["inputs"]["image"][0]]["inputs"]["image"] == learned.picture
        assert prompt[optimise[f"{side}_positive"][0]]["inputs"]["text"] == learned.prompt
        assert prompt[graphs.pair]["inputs"][f"{side}_lora"] == learned.file


def test_style_strength_changes_the_dial_alone(graphs: Graphs) -> None:
    full, half = (graphs.zipped(CONTENT, STYLE, DRAWING, strength) for strength in (1.0, 0.5))
    half[graphs.dial]["inputs"]["style_strength"] = full[graphs.dial]["inputs"]["style_strength"]
    assert half == full


@pytest.mark.parametrize("files", [[], ["one"], ["one", "two"]], ids=len)
def test_stock_loaders_stand_in_a_row_in_place_of_the_zipped_pair(graphs: Graphs, files: list[str]) -> None:
    prompt = graphs.plain(files, DRAWING)
    model = prompt[graphs.sampler]["inputs"]["model"]
    clip = prompt[prompt[graphs.sampler]["inputs"]["positive"][0]]["inputs"]["clip"]
    found = []
    while prompt[model[0]]["class_type"] == "LoraLoader":
        assert model[0] == clip[0] and (model[1], clip[1]) == (0, 1)
        found.insert(0, prompt[model[0]]["inputs"]["lora_name"])
        model, clip = prompt[model[0]]["inputs"]["model"], prompt[model[0]]["inputs"]["clip"]
    assert found == files
    assert prompt[model[0]]["class_type"] == "CheckpointLoaderSimple" and (model[1], clip[1]) == (0, 1)
    ours = {"LoadLoRAPair", "ZipLoRAOptimize", "StyleStrength", "ApplyZippedLoRA"}
    assert not ours & {node["class_type"] for node in prompt.values()}


def test_shipped_file_is_left_alone(graphs: Graphs) -> None:
    before = graphs.zipped(CONTENT, STYLE, DRAWING)
    graphs.zipped(STYLE, CONTENT, Drawing("something else", 1, 1))
    graphs.plain(["one"], Drawing("something else", 1, 1))
    assert graphs.zipped(CONTENT, STYLE, DRAWING) == before
