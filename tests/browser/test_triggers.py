"""Trigger words on the canvas: placeholders, the button, pictures, and nothing of them in files and queues."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

if TYPE_CHECKING:
    from devhost.frontend import Frontend
    from devhost.server import ComfyServer

SUBJECT, STYLE, BARE = "trigger_dog.safetensors", "trigger_oil.safetensors", "trigger_none.safetensors"
BUTTON = "Use trigger words"
# As the server describes a node of this shape, for a checkout without it.
STAND_IN = {
    "name": "ZipLoRAs",
    "display_name": "ZipLoRAs",
    "category": "ZipLoRA",
    "description": "",
    "python_module": "custom_nodes.ComfyUI-ZipLoRA",
    "output": [],
    "output_name": [],
    "output_is_list": [],
    "output_node": False,
    "input": {
        "required": {
            **{name: [[SUBJECT, STYLE, BARE], {}] for name in ("subject_lora", "style_lora")},
            **{name: ["STRING", {"multiline": True, "default": ""}] for name in ("subject_prompt", "style_prompt")},
        }
    },
}
ADD = """([type, values]) => {
    const node = window.LiteGraph.createNode(type)
    window.app.graph.add(node)
    for (const [name, value] of Object.entries(values)) {
        const widget = node.widgets.find(widget => widget.name === name)
        widget.value = value
        widget.callback?.(value)
    }
    return node.id }"""
WIDGETS = "id => window.app.graph.getNodeById(id).widgets.map(widget => widget.name)"
TEXTS = """([id, names]) => names.map(name => {
    const widget = window.app.graph.getNodeById(id).widgets.find(widget => widget.name === name)
    return [widget.value, (widget.inputEl ?? widget.element).placeholder] })"""
PRESS = f"""id => {{
    const node = window.app.graph.getNodeById(id)
    node.widgets.find(widget => widget.name === '{BUTTON}').callback() }}"""


@pytest.fixture(scope="module")
def files(session_server: ComfyServer) -> Iterator[Path]:
    """A subject LoRA with a header as kohya's scripts write it, a style LoRA with files beside it, one with nothing."""
    folder = session_server.base / "models" / "loras"
    tensors = {"lora_unet_x.lora_up.weight": torch.zeros(4, 2), "lora_unet_x.lora_down.weight": torch.zeros(2, 4)}
    save_file(tensors, folder / SUBJECT, {"ss_tag_frequency": json.dumps({"10_sks dog": {"sks dog": 5}})})
    save_file(tensors, folder / STYLE)
    save_file(tensors, folder / BARE)
    (folder / STYLE).with_suffix(".civitai.info").write_text('{"trainedWords": ["szn style"]}', encoding="utf-8")
    Image.new("RGB", (300, 200), "red").save((folder / STYLE).with_suffix(".preview.png"))
    yield folder
    for path in folder.glob("trigger_*"):
        path.unlink()


@pytest.fixture
def page(files: Path, frontend: Frontend) -> Frontend:
    frontend.page.evaluate("() => window.app.graph.clear()")
    if "ZipLoRAs" not in frontend.node_types():
        frontend.page.evaluate("def => window.app.registerNodeDef(def.name, def)", STAND_IN)
    return frontend


def add(page: Frontend, kind: str, **values: Any) -> int:
    return int(page.page.evaluate(ADD, [kind, values]))


def has(page: Frontend, node: int, name: str, there: bool = True) -> None:
    page.page.wait_for_function(
        f"([id, name, there]) => ({WIDGETS})(id).includes(name) === there", arg=[node, name, there], timeout=20_000
    )


def texts(page: Frontend, node: int, *names: str) -> list[list[str]]:
    found: list[list[str]] = page.page.evaluate(TEXTS, [node, list(names)])
    return found


def test_placeholders_button_and_picture_of_a_node_with_prompts(
    page: Frontend, tmp_path: Path, kept: Callable[..., None]
) -> None:
    node = add(page, "ZipLoRAs", subject_lora=SUBJECT, style_lora=STYLE)
    has(page, node, BUTTON)
    prompts = ("subject_prompt", "style_prompt")
    assert texts(page, node, *prompts) == [["", "sks dog"], ["", "szn style"]]
    picture = page.page.locator(f"img[alt='{STYLE}']")
    picture.wait_for(state="attached", timeout=20_000)
    page.page.wait_for_function(f"() => document.querySelector(\"img[alt='{STYLE}']\").naturalWidth > 0")
    assert picture.evaluate("image => [image.naturalWidth, image.naturalHeight]") == [256, 171]
    assert page.page.locator(f"img[alt='{SUBJECT}']").count() == 0
    shown = page.close_up("ZipLoRAs", tmp_path / "triggers.png")
    kept(shown, "triggers", ".dev/reports/screens/triggers.jpg", 1200)
    # What is shown is no input, and no file remembers it.
    (queued,) = page.api().values()
    assert not {BUTTON, "ziplora_pictures"} & set(queued["inputs"])
    (saved,) = page.workflow()["nodes"]
    assert BUTTON not in json.dumps(saved) and len([v for v in saved["widgets_values"] if v in (SUBJECT, STYLE)]) == 2
    page.page.evaluate(PRESS, node)
    assert [value for value, _ in texts(page, node, *prompts)] == ["sks dog", "szn style"]
    page.page.evaluate(PRESS, node)
    assert [value for value, _ in texts(page, node, *prompts)] == ["sks dog", "szn style"]


def test_a_prompt_that_a_user_wrote_is_kept(page: Frontend) -> None:
    written = {"subject_prompt": "on a beach", "style_prompt": "a house in SZN style"}
    node = add(page, "ZipLoRAs", subject_lora=SUBJECT, style_lora=STYLE, **written)
    has(page, node, BUTTON)
    assert [value for value, _ in texts(page, node, *written)] == list(written.values())
    page.page.evaluate(PRESS, node)
    assert [value for value, _ in texts(page, node, *written)] == ["sks dog, on a beach", "a house in SZN style"]


def test_other_files_take_everything_back(page: Frontend) -> None:
    node = add(page, "ZipLoRAs", subject_lora=BARE, style_lora=STYLE)
    before = "subject_prompt"
    has(page, node, BUTTON)
    ordinary = texts(page, node, before)[0][1]
    page.set_widget(node, "subject_lora", SUBJECT)
    page.page.wait_for_function(f"([id, name]) => ({TEXTS})([id, [name]])[0][1] === 'sks dog'", arg=[node, before])
    for name in ("subject_lora", "style_lora"):
        page.set_widget(node, name, BARE)
    has(page, node, BUTTON, there=False)
    has(page, node, "ziplora_pictures", there=False)
    assert texts(page, node, before)[0][1] == ordinary


def test_the_pairs_button_fills_the_prompts_that_its_zip_is_given(page: Frontend) -> None:
    pair = add(page, "LoadLoRAPair", content_lora=SUBJECT, style_lora=STYLE)
    zip_ = add(page, "ZipLoRAOptimize")
    prompts = {name: add(page, "CLIPTextEncode") for name in ("content_positive", "style_positive")}
    ordinary = texts(page, prompts["content_positive"], "text")[0][1]
    link = """([from, to, name]) => {
        const graph = window.app.graph, target = graph.getNodeById(to)
        graph.getNodeById(from).connect(0, target, target.inputs.findIndex(input => input.name === name)) }"""
    page.page.evaluate(link, [pair, zip_, "lora_pair"])
    for name, node in prompts.items():
        page.page.evaluate(link, [node, zip_, name])
    has(page, pair, BUTTON)
    # An empty CLIP Text Encode encodes nothing: no placeholder may look as if it encoded the words.
    assert all(texts(page, node, "text") == [["", ordinary]] for node in prompts.values())
    page.page.evaluate(PRESS, pair)
    said = [texts(page, node, "text")[0][0] for node in prompts.values()]
    assert said == ["sks dog", "szn style"]


def test_a_graph_that_is_opened_shows_it_too_and_other_nodes_stay_as_they_are(page: Frontend) -> None:
    other = add(page, "LoadLoRAPair", content_lora=BARE, style_lora=BARE)
    node = add(page, "LoadLoRAPair", content_lora=SUBJECT, style_lora=BARE)
    has(page, node, BUTTON)
    saved = page.workflow()
    page.load(saved)
    has(page, node, BUTTON)
    assert page.workflow()["nodes"] == saved["nodes"]
    assert BUTTON not in page.page.evaluate(WIDGETS, other)
