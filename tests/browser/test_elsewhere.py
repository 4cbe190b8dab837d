"""Graphs that another frontend saved: opened here, they have the nodes, values and links that they had there.

`data/` holds one as each of two frontends saved it, with the prompt that it made of it; with ZIPLORA_PUBLISH set, the
frontend at hand writes its own.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from conftest import PUBLISH
from test_blueprints import ADD, FACE, LINK
from test_frontend import taken

from demo.manifest import read_manifest
from devhost.workflows import FOLDER

if TYPE_CHECKING:
    from devhost.answers import Prompt
    from devhost.frontend import Frontend

DATA = Path(__file__).parent / "data"
START, BLUEPRINT = "3 Style dial", "Zip two LoRAs"
MUTED, BYPASSED = 2, 4
FIRST = "type => window.app.graph.nodes.find(node => node.type === type).id"
STATE = """([id, mode, color]) => {
    const node = window.app.graph.getNodeById(id)
    Object.assign(node, { mode, color }) }"""
VERSION = "() => window.__COMFYUI_FRONTEND_VERSION__"


def build(frontend: Frontend) -> None:
    """A graph with links to advanced inputs, a blueprint that is filled in, a muted, a bypassed and a red node."""
    page, world = frontend.page, read_manifest()
    frontend.load(FOLDER / f"{START}.json")
    ids = {kind: page.evaluate(FIRST, kind) for kind in ("CheckpointLoaderSimple", "ZipLoRAs", "PreviewAny")}
    zipped, checkpoint = ids["ZipLoRAs"], ids["CheckpointLoaderSimple"]
    frontend.set_widget(checkpoint, "ckpt_name", world.checkpoint)
    page.evaluate("id => { window.app.graph.getNodeById(id).showAdvanced = true }", zipped)
    pair = {"content_lora": world.subjects[1].learned.file, "style_lora": world.styles[1].learned.file}
    stack, size = (
        page.evaluate(ADD, [kind, values]) for kind, values in (("LoadLoRAPair", pair), ("PrimitiveInt", {}))
    )
    page.evaluate(LINK, [stack, 1, zipped, "lora_stack"])
    page.evaluate(LINK, [size, 0, zipped, "drawn_size"])
    page.evaluate(LINK, [checkpoint, 2, zipped, "vae"])
    for widget, value in {"quality": "fast", "subject_strength": 0.75, "stack_prompts": "one\ntwo", "seed": 7}.items():
        frontend.set_widget(zipped, widget, value)
    page.evaluate(STATE, [ids["PreviewAny"], MUTED, "#322"])
    page.evaluate(STATE, [page.evaluate(FIRST, "StyleStrength"), BYPASSED, None])
    before = set(page.evaluate("() => window.app.graph.nodes.map(node => node.id)"))
    frontend.open_search()
    frontend.pick(BLUEPRINT)
    (node,) = set(page.evaluate("() => window.app.graph.nodes.map(node => node.id)")) - before
    for output, name in enumerate(("model", "clip")):
        page.evaluate(LINK, [checkpoint, output, node, name])
    chosen = {"subject_lora": world.subjects[0].learned.file, "style_lora": world.styles[0].learned.file}
    chosen |= {f"{role}_prompt": f"words of the {role}" for role in ("subject", "style")}
    assert {*chosen, "style_strength"} <= set(page.evaluate(FACE, node)[1])
    for widget, value in {**chosen, "style_strength": 1.25}.items():
        frontend.set_widget(node, widget, value)


def canvas(workflow: dict[str, Any]) -> list[tuple[Any, ...]]:
    """What a file says of its nodes and groups beside their values and links, without numbers in subgraphs."""

    def shown(number: str, node: dict[str, Any]) -> tuple[Any, ...]:
        return number, node["type"], node["mode"], node.get("title"), node.get("color"), [*map(round, node["pos"])]

    inside = [node for graph in workflow["definitions"]["subgraphs"] for node in graph["nodes"]]
    nodes = [shown(str(node["id"]), node) for node in workflow["nodes"]] + [shown("", node) for node in inside]
    return [*sorted(nodes, key=str), *sorted((group["title"],) for group in workflow["groups"])]


def prompt(made: dict[str, Any], info: dict[str, Any]) -> Prompt:
    """What the server takes of it; nodes of a subgraph by their types, as some frontends number them anew."""
    titled = {str(node["id"]) for node in made["workflow"]["nodes"] if "title" in node}
    nodes = taken(made["output"], info, titled)
    names = {n: f"{n.split(':')[0]}:{node['class_type']}" if ":" in n else n for n, node in nodes.items()}
    assert len(set(names.values())) == len(names)
    for node in nodes.values():
        links = {key: value for key, value in node["inputs"].items() if isinstance(value, list)}
        node["inputs"] |= {key: [names[number], slot] for key, (number, slot) in links.items()}
    return {names[number]: node for number, node in nodes.items()}


def test_a_graph_is_saved_and_opens_as_it_was(frontend: Frontend) -> None:
    build(frontend)
    made = frontend.both()
    if PUBLISH:
        path = DATA / f"saved_by_{frontend.page.evaluate(VERSION)}.json"
        path.write_text(json.dumps(made, ensure_ascii=False) + "\n", encoding="utf-8")
    assert {node["class_type"] for node in made["output"].values()} >= {"ZipLoRAs", "LoadLoRAPair", "PrimitiveInt"}
    frontend.load(made["workflow"])
    again = frontend.both()
    info = frontend.server.object_info()
    assert prompt(again, info) == prompt(made, info) and canvas(again["workflow"]) == canvas(made["workflow"])


@pytest.mark.parametrize("path", sorted(DATA.glob("*.json")), ids=lambda path: path.stem)
def test_what_another_frontend_saved_opens_as_it_was_there(shared_frontend: Frontend, path: Path) -> None:
    saved = json.loads(path.read_text(encoding="utf-8"))
    shared_frontend.load(saved["workflow"])
    assert shared_frontend.missing_nodes() == []
    opened = shared_frontend.both()
    assert canvas(opened["workflow"]) == canvas(saved["workflow"])
    info = shared_frontend.server.object_info()
    assert prompt(opened, info) == prompt(saved, info)
