"""Links to advanced inputs after a file is opened again, a copy, an API file, a subgraph: none moves, none is lost."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from test_blueprints import ADD, FACE, LINK, NAMES, placed
from test_templates import START

from demo.manifest import read_manifest
from devhost.workflows import FOLDER

if TYPE_CHECKING:
    from devhost.answers import Prompt
    from devhost.frontend import Frontend

ZIP = "window.app.graph.nodes.find(node => node.type === 'ZipLoRAs')"
SAVED = "() => JSON.parse(JSON.stringify(window.app.graph.serialize()))"
VALUES = "id => window.app.graph.getNodeById(id).widgets.map(({ name, value }) => [name, value])"
COPIED = """ids => {
    const { canvas, graph } = window.app, old = new Set(graph.nodes.map(node => node.id))
    canvas.deselectAll()
    canvas.selectItems(ids.map(id => graph.getNodeById(id)))
    canvas.copyToClipboard()
    canvas.pasteFromClipboard()
    return graph.nodes.map(node => node.id).filter(id => !old.has(id)) }"""
THERE_AND_BACK = f"""() => {{
    const {{ graph }} = window.app
    const {{ node }} = graph.convertToSubgraph(new Set([{ZIP}]))
    graph.unpackSubgraph(node) }}"""


def add(frontend: Frontend, kind: str, **values: Any) -> int:
    return int(frontend.page.evaluate(ADD, [kind, values]))


def by_title(prompt: Prompt) -> dict[str, dict[str, Any]]:
    """A prompt without numbers: those of nodes that were made again are others."""
    names = {number: node["_meta"]["title"] for number, node in prompt.items()}
    assert len(set(names.values())) == len(names)

    def said(value: Any) -> Any:
        return [names[value[0]], value[1]] if isinstance(value, list) else value

    return {names[n]: {name: said(v) for name, v in node["inputs"].items()} for n, node in prompt.items()}


@pytest.fixture
def linked(shared_frontend: Frontend) -> tuple[Frontend, dict[str, int]]:
    """The first graph with links to advanced sockets, an advanced widget and a prompt; the nodes that they join."""
    frontend = shared_frontend
    frontend.load(FOLDER / f"{START}.json")
    page = frontend.page
    zipped = page.evaluate(f"() => {ZIP}.id")
    checkpoint = page.evaluate("() => window.app.graph.nodes.find(({type}) => type === 'CheckpointLoaderSimple').id")
    stack, text, size = add(frontend, "LoadLoRAPair"), add(frontend, "PrimitiveString"), add(frontend, "PrimitiveInt")
    slot = "id => window.app.graph.getNodeById(id).outputs.findIndex(({type}) => type === 'LORA_STACK')"
    ends = [
        (checkpoint, 2, "vae"),
        (stack, page.evaluate(slot, stack), "lora_stack"),
        (text, 0, "subject_prompt"),
        (size, 0, "drawn_size"),
    ]
    for source, output, name in ends:
        page.evaluate(LINK, [source, output, zipped, name])
    inputs = frontend.api()[str(zipped)]["inputs"]
    assert {name: inputs[name] for _, _, name in ends} == {name: [str(n), output] for n, output, name in ends}
    return frontend, {"zip": zipped, "checkpoint": checkpoint, "stack": stack, "text": text, "size": size}


def test_a_file_opens_as_it_was_saved(linked: tuple[Frontend, dict[str, int]]) -> None:
    frontend, _ = linked
    before = frontend.api()
    for _ in range(2):
        frontend.load(frontend.page.evaluate(SAVED))
        assert frontend.api() == before


def test_a_copy_has_the_links_of_what_was_copied(linked: tuple[Frontend, dict[str, int]]) -> None:
    frontend, nodes = linked
    before = frontend.api()
    made = frontend.page.evaluate(COPIED, list(nodes.values()))
    after = frontend.api()
    assert {number: after[number] for number in before} == before
    copies = {number: after[str(number)] for number in made}
    assert len(copies) == len(nodes)

    def alone(prompt: Prompt) -> dict[str, dict[str, Any]]:
        return by_title({str(number): node for number, node in prompt.items()})

    assert alone(copies) == alone({str(number): before[str(number)] for number in nodes.values()})


def test_an_api_file_opens_with_its_links(linked: tuple[Frontend, dict[str, int]]) -> None:
    frontend, _ = linked
    before = frontend.api()
    frontend.page.evaluate("text => window.app.loadApiJson(JSON.parse(text), 'opened')", json.dumps(before))
    assert frontend.api() == before


def test_a_subgraph_unpacked_has_the_links_that_went_into_it(linked: tuple[Frontend, dict[str, int]]) -> None:
    frontend, _ = linked
    before = by_title(frontend.api())
    frontend.page.evaluate(THERE_AND_BACK)
    assert by_title(frontend.api()) == before


@pytest.mark.parametrize("name", NAMES)
def test_a_blueprint_opens_again_as_it_was_filled_in(frontend: Frontend, name: str) -> None:
    world = read_manifest()
    page = frontend.page
    node = placed(frontend, name)
    inputs, widgets, _ = page.evaluate(FACE, node)
    checkpoint = add(frontend, "CheckpointLoaderSimple", ckpt_name=world.checkpoint)
    for slot, input_name in enumerate(("model", "clip", "vae")):
        if input_name in inputs:
            page.evaluate(LINK, [checkpoint, slot, node, input_name])
    if "lora_stack" in inputs:
        stack = add(frontend, "LoadLoRAPair")
        page.evaluate(LINK, [stack, 1, node, "lora_stack"])
    values = {
        "subject_lora": world.subjects[0].learned.file,
        "style_lora": world.styles[0].learned.file,
        "quality": "fast",
        "style_strength": 1.25,
    }
    filled = {widget: values.get(widget, f"words of {widget}") for widget in widgets}
    assert filled
    for widget, value in filled.items():
        frontend.set_widget(node, widget, value)
    face, said, before = page.evaluate(FACE, node), page.evaluate(VALUES, node), frontend.api()
    assert dict(said) == filled
    for _ in range(2):
        frontend.load(page.evaluate(SAVED))
        assert page.evaluate(FACE, node) == face
        assert page.evaluate(VALUES, node) == said
        assert frontend.api() == before
