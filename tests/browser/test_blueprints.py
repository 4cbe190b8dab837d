"""The pack's subgraph blueprints: told by the server, put on the canvas by the search window, run to the end."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from demo.manifest import read_manifest
from demo.miniature import CFG
from devhost.base import PACK
from devhost.frontend import Frontend
from devhost.templates import BLUEPRINTS
from devhost.workflows import BLUEPRINTS_FOLDER

if TYPE_CHECKING:
    from playwright.sync_api import Browser

    from devhost.server import ComfyServer

STACKER = """
class Stacker:
    RETURN_TYPES, FUNCTION, CATEGORY = ("LORA_STACK",), "stack", "tests"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"names": ("STRING", {})}}

    def stack(self, names):
        return ([(name, 1.0, 1.0) for name in names.split(",")],)


NODE_CLASS_MAPPINGS = {"TestLoRAStacker": Stacker}
"""
NAMES = [blueprint().name for blueprint in BLUEPRINTS]
ADD = """([kind, values]) => {
    const node = window.LiteGraph.createNode(kind)
    window.app.graph.add(node)
    for (const [name, value] of Object.entries(values)) {
        const widget = node.widgets.find(widget => widget.name === name)
        if (!widget) throw new Error(`no widget ${name}`)
        widget.value = value
        widget.callback?.(value)
    }
    return node.id }"""
LINK = """([from, output, to, input]) => {
    const graph = window.app.graph, source = graph.getNodeById(from), target = graph.getNodeById(to)
    const slot = typeof output === 'number' ? output : source.outputs.findIndex(({name}) => name === output)
    source.connect(slot, target, target.inputs.findIndex(({name}) => name === input)) }"""
FACE = """id => { const node = window.app.graph.getNodeById(id)
    return [node.inputs, node.widgets, node.outputs].map(parts => parts.map(({name}) => name)) }"""


@pytest.fixture(scope="module")
def stacked(make_server: Callable[..., ComfyServer], tmp_path_factory: pytest.TempPathFactory) -> ComfyServer:
    """A server with another pack's LoRA stacker."""
    pack = tmp_path_factory.mktemp("packs") / "stacker"
    pack.mkdir()
    (pack / "__init__.py").write_text(STACKER, encoding="utf-8")
    return make_server("--fp32-text-enc", packs=[pack])


@pytest.fixture
def page_of_stacked(browser: Browser, stacked: ComfyServer) -> Iterator[Frontend]:
    opened = Frontend(browser, stacked)
    yield opened
    opened.close()
    assert not opened.errors, f"the page threw: {opened.errors}"


def test_the_server_tells_of_each_as_it_is_in_the_checkout(stacked: ComfyServer) -> None:
    told = {key: entry for key, entry in stacked.get("global_subgraphs").items() if PACK in entry["info"]["node_pack"]}
    assert sorted(entry["name"] for entry in told.values()) == sorted(NAMES)
    for key, entry in told.items():
        text = (BLUEPRINTS_FOLDER / f"{entry['name']}.json").read_text(encoding="utf-8")
        assert json.loads(stacked.get(f"global_subgraphs/{key}")["data"]) == json.loads(text)


def placed(frontend: Frontend, name: str) -> int:
    """Its node on an empty canvas, put there as a user does."""
    page = frontend.page
    page.evaluate("() => window.app.graph.clear()")
    frontend.open_search()
    frontend.pick(name)
    assert page.evaluate("() => window.app.graph.nodes.length") == 1
    node, title = page.evaluate("() => [window.app.graph.nodes[0].id, window.app.graph.nodes[0].title]")
    assert title == name
    return int(node)


@pytest.mark.parametrize("name", NAMES)
def test_a_blueprint_runs(page_of_stacked: Frontend, name: str, tmp_path: Path, kept: Callable[..., None]) -> None:
    frontend, server, world = page_of_stacked, page_of_stacked.server, read_manifest()
    page = frontend.page
    subject, style = (one for one in (*world.subjects, *world.styles) if one.name in world.shown.pair)
    node = placed(frontend, name)
    inputs, widgets, outputs = page.evaluate(FACE, node)

    def add(kind: str, **values: Any) -> int:
        return int(page.evaluate(ADD, [kind, values]))

    def link(*ends: Any) -> None:
        page.evaluate(LINK, list(ends))

    checkpoint = add("CheckpointLoaderSimple", ckpt_name=world.checkpoint)
    link(checkpoint, 0, node, "model")
    link(checkpoint, 1, node, "clip")
    given = {"quality": "fast"} if "quality" in widgets else {}
    if "lora_stack" in inputs:
        stack = add("TestLoRAStacker", names=f"{subject.learned.file},{style.learned.file}")
        link(stack, 0, node, "lora_stack")
        given["stack_prompts"] = f"{subject.learned.prompt}\n{style.learned.prompt}"
    else:
        for role, concept in (("subject", subject), ("style", style)):
            given |= {f"{role}_lora": concept.learned.file, f"{role}_prompt": concept.learned.prompt}
    wanted = world.prompt(subject, style)
    if "vae" in inputs:
        link(checkpoint, 2, node, "vae")
        given["what_to_draw"] = wanted
    for widget, value in given.items():
        frontend.set_widget(node, widget, value)
    if "images" in outputs:
        pictures = (node, "images")
    else:
        latent = add("EmptyLatentImage", width=world.size, height=world.size)
        sampler = add("KSampler", steps=4, cfg=CFG)
        for side, text in (("positive", wanted), ("negative", "")):
            encode = add("CLIPTextEncode", text=text)
            link(node, "clip", encode, "clip")
            link(encode, 0, sampler, side)
        link(node, "model", sampler, "model")
        link(latent, 0, sampler, "latent_image")
        decode = add("VAEDecode")
        link(sampler, 0, decode, "samples")
        link(checkpoint, 2, decode, "vae")
        pictures = (decode, 0)
    save = add("SaveImage")
    link(*pictures, save, "images")
    report = add("PreviewAny")
    link(node, "report", report, "source")
    queued = frontend.api()
    inner = next(made["inputs"] for made in queued.values() if made["class_type"] == "ZipLoRAs")
    assert {widget: inner[widget] for widget in given if widget in inner} == {
        widget: value for widget, value in given.items() if widget != "what_to_draw"
    }
    history = server.wait(frontend.queue())
    assert history["status"]["status_str"] == "success", history["status"]
    (saved,) = history["outputs"][str(save)]["images"]
    assert server.view(saved).std() > 5
    said = history["outputs"][str(report)]["text"][0]
    assert subject.learned.file in said and style.learned.file in said
    page.evaluate("id => window.app.canvas.centerOnNode(window.app.graph.getNodeById(id))", node)
    page.wait_for_timeout(1000)
    picture = tmp_path / "blueprint.png"
    page.screenshot(path=str(picture))
    kept(picture, f"blueprint {name}", f".dev/reports/screens/blueprint_{name}.jpg", 1600)
