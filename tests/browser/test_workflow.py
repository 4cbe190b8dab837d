"""The graph that ships, opened and queued in ComfyUI's own frontend as a newcomer would."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
from conftest import PUBLISH

from demo.manifest import Manifest, read_manifest
from demo.miniature import CFG
from devhost.base import PACK
from devhost.workflows import FOLDER

if TYPE_CHECKING:
    from pathlib import Path

    from devhost.frontend import Frontend
    from devhost.server import ComfyServer

NAME = "5 Every step, with pictures"
# Inputs that have no link and no widget, and inputs whose link leads nowhere.
LOOSE_INPUTS = """() => window.app.graph.nodes.flatMap(node => (node.inputs ?? [])
    .filter(input => input.link == null ? !input.widget : !window.app.graph.links.get(input.link))
    .map(input => `${node.title}: ${input.name}`))"""
RED_NODES = "() => window.app.graph.nodes.filter(node => node.has_errors).map(node => node.title)"


@pytest.fixture
def opened(frontend: Frontend) -> Frontend:
    """A page with the graph in it."""
    frontend.load(FOLDER / f"{NAME}.json")
    return frontend


@pytest.fixture
def world() -> Manifest:
    return read_manifest()


def test_graph_opens_from_the_template_browser(frontend: Frontend) -> None:
    page = frontend.page
    page.evaluate("() => window.app.extensionManager.command.execute('Comfy.BrowseTemplates')")
    page.get_by_text(PACK, exact=True).click()
    page.get_by_text(NAME, exact=True).first.click()
    page.wait_for_function("() => window.app.graph.nodes.some(node => node.type === 'ZipLoRAOptimize')")
    assert frontend.missing_nodes() == []
    thumbnail = frontend.server.session.get(f"{frontend.server.url}/api/workflow_templates/{PACK}/{NAME}.jpg")
    assert thumbnail.ok and thumbnail.content.startswith(b"\xff\xd8"), "the template has no thumbnail"


def test_graph_opens_whole(opened: Frontend) -> None:
    assert opened.missing_nodes() == []
    assert opened.page.evaluate(LOOSE_INPUTS) == ["ZipLoRA Optimize: references"], "which two LoRAs do not need"
    assert opened.page.evaluate("() => document.querySelectorAll('.comfy-missing-nodes, .p-dialog').length") == 0


def test_graph_runs_to_the_end(
    opened: Frontend, server: ComfyServer, world: Manifest, tmp_path: Path, kept: Callable
) -> None:
    subject, style = world.subjects[0], world.styles[0]
    put_in(opened, "CheckpointLoaderSimple", ckpt_name=world.checkpoint)
    put_in(opened, "LoadLoRAPair", content_lora=subject.learned.file, style_lora=style.learned.file)
    for title, trained in (("subject", subject), ("style", style)):
        put_in(opened, f"Picture of the {title}", image=trained.learned.picture)
        put_in(opened, f"Training prompt of the {title} LoRA", text=trained.learned.prompt)
    put_in(opened, "What to draw: subject in style", text=world.prompt(subject, style))
    put_in(opened, "ImageScale", width=world.size, height=world.size)
    put_in(opened, "EmptyLatentImage", width=world.size, height=world.size)
    put_in(opened, "ZipLoRAOptimize", steps=3, solver="layerwise, then gradient")
    put_in(opened, "KSampler", steps=20 if PUBLISH else 3, cfg=CFG)

    history = server.wait(opened.queue())
    assert history["status"]["status_str"] == "success", history["status"]
    pictures = [picture for output in history["outputs"].values() for picture in output.get("images", [])]
    (saved,) = (picture for picture in pictures if picture["type"] == "output")  # the loss graph's is temporary
    assert server.view(saved).shape == (world.size, world.size, 3)
    report = next(output["text"][0] for output in history["outputs"].values() if "text" in output)
    assert f"content: {subject.learned.file}" in report and "3 of 3" in report
    shows_report = (
        "text => window.app.graph.nodes.some(node => node.widgets?.some(w => String(w.value).includes(text)))"
    )
    opened.page.wait_for_function(shows_report, arg=report.splitlines()[0], timeout=10_000)
    assert opened.page.evaluate(RED_NODES) == []
    opened.page.wait_for_timeout(2000)  # the pictures come
    shown = opened.screenshot(tmp_path / "graph.png", (3600, 1240))
    assert shown.stat().st_size > 10_000
    kept(shown, "graph", "docs/graph.jpg", 1800, edges=(0.11, 0.06))  # what the view leaves free around a graph


def put_in(frontend: Frontend, which: str, **values: Any) -> None:
    """Set widgets of every node of a type, or with a title."""
    nodes = "which => window.app.graph.nodes.filter(n => n.type === which || n.title === which).map(n => n.id)"
    found = frontend.page.evaluate(nodes, which)
    assert found, f"the graph has no node '{which}'"
    for node in found:
        for name, value in values.items():
            frontend.set_widget(node, name, value)
