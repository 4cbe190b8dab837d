"""Every described graph in ComfyUI's own frontend: opened, filled in with the miniature's files, queued, finished."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest

from demo.manifest import read_manifest
from demo.templates import on_the_miniature
from devhost.templates import TEMPLATES
from devhost.workflows import FOLDER

if TYPE_CHECKING:
    from pathlib import Path

    from devhost.frontend import Frontend
    from devhost.server import ComfyServer, Prompt

OPTIONAL = {"content_latents", "style_latents", "loss_map", "clip"}  # may stay unconnected
NAMES = [template().name for template in TEMPLATES]
LOOSE_INPUTS = """() => window.app.graph.nodes.flatMap(node => (node.inputs ?? [])
    .filter(input => input.link == null && !input.widget).map(input => input.name))"""
RED_NODES = "() => window.app.graph.nodes.filter(node => node.has_errors).map(node => node.title)"
# What the frontend shows of a node's progress, gathered while a graph runs.
WATCH = """() => { window.seenProgress = []; window.app.api.addEventListener('progress_state', event => {
    for (const state of Object.values(event.detail.nodes ?? {}))
        window.seenProgress.push([state.display_node_id ?? state.node_id, state.value, state.max]) }) }"""


def fill_in(frontend: Frontend, shipped: Prompt) -> None:
    """Put the miniature's files, words and sizes where the graph has placeholders."""
    for node, filled in on_the_miniature(shipped, read_manifest(), steps=2).items():
        for widget, value in filled["inputs"].items():
            if value != shipped[node]["inputs"][widget]:
                frontend.set_widget(node, widget, value)


@pytest.mark.parametrize("name", NAMES)
def test_template_runs_to_the_end(
    frontend: Frontend, server: ComfyServer, name: str, tmp_path: Path, kept: Callable
) -> None:
    frontend.load(FOLDER / f"{name}.json")
    assert frontend.missing_nodes() == []
    assert set(frontend.page.evaluate(LOOSE_INPUTS)) <= OPTIONAL
    shipped = frontend.api()
    fill_in(frontend, shipped)
    for node, made in shipped.items():
        if made["class_type"] == "ZipLoRAOptimize":
            frontend.set_widget(node, "steps", 2)
            frontend.set_widget(node, "drawn_references", 1)
            frontend.set_widget(node, "seed", NAMES.index(name) + 1)  # or the server answers from its cache
    frontend.page.evaluate(WATCH)
    history = server.wait(frontend.queue())
    assert history["status"]["status_str"] == "success", history["status"]
    assert frontend.page.evaluate(RED_NODES) == []
    (saver,) = (node for node, made in shipped.items() if made["class_type"] == "SaveImage")
    (saved,) = history["outputs"][saver]["images"]
    assert server.view(saved).std() > 5
    optimise = {node for node, made in shipped.items() if made["class_type"] == "ZipLoRAOptimize"}
    events = frontend.page.evaluate("() => window.seenProgress")
    seen = {(value, most) for node, value, most in events if node in optimise}
    assert len(seen) > 10, "the optimise node's progress did not move"
    shown = frontend.screenshot(tmp_path / f"{name}.png", (3000, 1200))
    assert shown.stat().st_size > 10_000
    kept(shown, name)


def test_the_reports_picture_appears_in_the_graph(frontend: Frontend, server: ComfyServer) -> None:
    """On the node itself, drawn by the page."""
    frontend.load(FOLDER / "ziplora_no_pictures.json")
    shipped = frontend.api()
    fill_in(frontend, shipped)
    server.wait(frontend.queue())
    script = """() => window.app.graph.nodes.some(node => node.type === 'ZippedLoRAReport'
        && node.imgs?.some(image => image.naturalWidth > 1000))"""
    frontend.page.wait_for_function(script, timeout=20_000)


def test_a_help_page_opens(frontend: Frontend) -> None:
    """As a user opens it: the node selected, then the i above it."""
    frontend.load(FOLDER / "ziplora_no_pictures.json")
    page = frontend.page
    select = """() => { const node = window.app.graph.nodes.find(n => n.type === 'ZipLoRAOptimize')
        window.app.canvas.centerOnNode(node); window.app.canvas.selectNode(node) }"""
    page.evaluate(select)
    page.locator("[data-testid='info-button'], .help-button, .pi-info-circle").first.click(timeout=10_000)
    page.get_by_text("Learns one coefficient for each column").first.wait_for(timeout=10_000)
