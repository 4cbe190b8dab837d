"""Zip LoRAs on the canvas: what a newcomer sees of it, and what only who asks for more sees."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import pytest
from test_templates import START

from devhost.workflows import FOLDER

if TYPE_CHECKING:
    from devhost.frontend import Frontend

NODE = "window.app.graph.nodes.find(node => node.type === 'ZipLoRAs')"
PAPER = re.compile(r"column|coefficient|lambda|ridge|retention|objective|layerwise", re.IGNORECASE)
ADVANCED = {"subject_strength", "style_strength", "stack_prompts", "drawn_size"}
VISIBLE = f"() => {{ const node = {NODE}; return node.widgets.filter(w => node.isWidgetVisible(w)).map(w => w.name) }}"
# Every text on the canvas: titles, sockets, widgets that are in sight with their values, choices and placeholders.
WORDS = """() => window.app.graph.nodes.flatMap(node => [node.title,
    ...(node.outputs ?? []).map(o => o.label ?? o.name),
    ...(node.inputs ?? []).filter(i => !i.widget).map(i => i.label ?? i.name),
    ...(node.widgets ?? []).filter(w => node.isWidgetVisible(w)).flatMap(w => [w.label ?? w.name, String(w.value),
        ...(Array.isArray(w.options?.values) ? w.options.values : []), w.element?.placeholder ?? ''])])"""


@pytest.fixture
def opened(shared_frontend: Frontend) -> Frontend:
    shared_frontend.load(FOLDER / f"{START}.json")
    return shared_frontend


def saved(frontend: Frontend) -> dict[str, Any]:
    (node,) = (node for node in frontend.workflow()["nodes"] if node["type"] == "ZipLoRAs")
    return dict(node)


def test_no_word_of_the_paper_is_in_sight(opened: Frontend) -> None:
    found = opened.page.evaluate(WORDS)
    assert "quality" in found and "3 What to draw" in found
    assert [text for text in found if PAPER.search(text)] == []


def test_advanced_inputs_are_there_for_who_asks(opened: Frontend) -> None:
    """By the button and by the menu; nothing of it is in a file or in a queue, and the values stay."""
    page = opened.page
    before, values = opened.api(), saved(opened)["widgets_values"]
    seen = set(page.evaluate(VISIBLE))
    assert not seen & ADVANCED
    assert {"subject_lora", "subject_prompt", "style_lora", "style_prompt", "quality", "seed"} <= seen
    height = page.evaluate(f"() => {NODE}.size[1]")
    page.evaluate(f"() => {NODE}.widgets.find(w => w.label === 'More options').callback()")
    assert set(page.evaluate(VISIBLE)) >= ADVANCED
    assert opened.api() == before and saved(opened)["widgets_values"] == values
    open_graph = opened.workflow()
    opened.load(open_graph)
    assert set(page.evaluate(VISIBLE)) >= ADVANCED, "what was open is closed after a reload"
    page.evaluate(f"() => {NODE}.widgets.find(w => w.label === 'Fewer options').callback()")
    assert set(page.evaluate(VISIBLE)) == seen
    assert page.evaluate(f"() => {NODE}.size[1]") <= height
    assert opened.api() == before and saved(opened)["widgets_values"] == values
