"""Every described graph in ComfyUI's own frontend: opened, filled in with the miniature's files, queued, finished."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest
from PIL import Image

from demo import encoders
from demo.manifest import read_manifest
from demo.templates import on_the_miniature
from devhost.base import NODES
from devhost.languages import LANGUAGES, help_page
from devhost.templates import SKETCHES, TEMPLATES
from devhost.templates.words import CLIP
from devhost.workflows import FOLDER

if TYPE_CHECKING:
    from pathlib import Path

    from devhost.answers import Prompt
    from devhost.frontend import Frontend
    from devhost.server import ComfyServer

# Graph: the nodes whose help pages show a picture taken in it.
START = "1 Zip two LoRAs (start here)"
CLOSE_UPS = {
    "0 Check two LoRAs": ("ZipCheck",),
    START: ("ZipLoRAs",),
    "2 Zipped or stacked": ("CompareMerges",),
    "4 Every step": ("LoadLoRAPair", "ZipLoRAOptimize", "ZippedLoRAReport", "ApplyZippedLoRA"),
    "3 Style dial": ("StyleStrength",),
    "6 Save and export": ("SaveZippedLoRA", "ExportMergedLoRA"),
    "Scores": ("ZipLoRAScores", "BlindABSheet"),
    "7 LoRAs from pictures": ("TrainConceptLoRA", "PairLoRAs"),
    "8 One picture taken apart": ("UnZipLoRA",),
    "load_zipped": ("LoadZippedLoRA",),
    "sparsify": ("SparsifyLoRA",),
    "9 More than two LoRAs": ("ConceptStrengths",),
    "direct_merge": ("DirectMergeLoRA",),
    "stack": ("LoadLoRAStack", "ZipLoRAReference"),
    "A concept split in two": ("SplitConcept",),
    "Mix-of-Show": ("TrainEDLoRA", "FuseTextEncoders"),
    "Style of one picture (two scales)": ("TwoScaleGuider",),
    "K-LoRA": ("KLoRA",),
    "An embedding from pictures": ("TrainEmbedding",),
    "Custom Diffusion": ("TrainCustomDiffusion", "MergeCustomDiffusion"),
}
ON_A_HELP_PAGE = 60  # quality: letters can be read at a help panel's width, and the archive stays small
PUBLISH = bool(os.environ.get("ZIPLORA_PUBLISH"))  # with the defaults, as a help page should show them
ALL = bool(os.environ.get("ZIPLORA_ALL"))
TRAINS = ("TrainConceptLoRA", "UnZipLoRA", "TrainEmbedding", "TrainCustomDiffusion", "TrainEDLoRA", "SplitConcept")
ZIPS = ("ZipLoRAs", "ZipLoRAOptimize")
OPTIONAL = {
    "references",
    "content_latents",
    "style_latents",
    "loss_map",
    "clip",
    "class_images",
    "clip_vision",
    "second_images",
    "adapted_positive",
    "lora_stack",
    "subject_images",
    "style_images",
    "vae",
}  # may stay unconnected
NAMES = [template().name for template in TEMPLATES]
LOOSE_INPUTS = """() => window.app.graph.nodes.flatMap(node => (node.inputs ?? [])
    .filter(input => input.link == null && !input.widget).map(input => input.name))"""
RED_NODES = "() => window.app.graph.nodes.filter(node => node.has_errors).map(node => node.title)"
SHOWN = "id => window.app.graph.getNodeById(id).imgs?.every(image => image.naturalWidth)"
# What the frontend shows of a node's progress, gathered while a graph runs.
WATCH = """() => { window.seenProgress = []; window.app.api.addEventListener('progress_state', event => {
    for (const state of Object.values(event.detail.nodes ?? {}))
        window.seenProgress.push([state.display_node_id ?? state.node_id, state.value, state.max]) }) }"""


def fill_in(frontend: Frontend, shipped: Prompt) -> None:
    """Put the miniature's files, words and sizes where the graph has placeholders."""
    for node, filled in on_the_miniature(shipped, read_manifest(), steps=20 if PUBLISH else 2).items():
        for widget, value in filled["inputs"].items():
            if value != shipped[node]["inputs"][widget]:
                frontend.set_widget(node, widget, value)


@pytest.mark.parametrize("name", NAMES)
def test_template_runs_to_the_end(
    frontend: Frontend, server: ComfyServer, name: str, tmp_path: Path, kept: Callable
) -> None:
    if name == "Scores":
        encoders.provide(server.base, *(encoders.EVERY if ALL else (CLIP,)))
        frontend.page.evaluate("() => window.app.refreshComboInNodes()")  # files that the page has not seen
    frontend.load(FOLDER / f"{name}.json")
    assert frontend.missing_nodes() == []
    assert set(frontend.page.evaluate(LOOSE_INPUTS)) <= OPTIONAL
    shipped = frontend.api()
    fill_in(frontend, shipped)
    if name == "Scores":  # before it runs: here the scores are those of random encoders
        for kind in CLOSE_UPS[name]:
            close_up(frontend, kind, tmp_path, kept)
    for node, made in shipped.items():
        if made["class_type"] == "CLIPVisionLoader" and not ALL:
            frontend.set_widget(node, "clip_name", CLIP)  # DINOv2 looks at 518 pixels: half a minute a picture here
        if made["class_type"] == "EmptyLatentImage":
            frontend.set_widget(node, "batch_size", 1)
        if made["class_type"] in TRAINS and not PUBLISH:
            frontend.set_widget(node, "steps", 12)
        if made["class_type"] == "ZipLoRAOptimize":
            if not PUBLISH:
                frontend.set_widget(node, "steps", 2)
                frontend.set_widget(node, "drawn_references", 1)
        if made["class_type"] in ZIPS:
            frontend.set_widget(node, "seed", NAMES.index(name) + 1)  # or the server answers from its cache
    frontend.page.evaluate(WATCH)
    history = server.wait(frontend.queue())
    assert history["status"]["status_str"] == "success", history["status"]
    assert frontend.page.evaluate(RED_NODES) == []
    (saver,) = (node for node, made in shipped.items() if made["class_type"] == "SaveImage")
    (saved,) = history["outputs"][saver]["images"]
    assert server.view(saved).std() > 5
    long = {
        node for node, made in shipped.items() if made["class_type"] in (*ZIPS, *TRAINS, "CompareMerges", "ZipCheck")
    }
    events = frontend.page.evaluate("() => window.seenProgress")
    seen = {(value, most) for node, value, most in events if node in long}
    assert len(seen) > 10, "the progress of the long work did not move"
    if name != "Scores":  # whose encoders keep this machine so busy that the page gives up on the picture
        frontend.fit()  # the page fetches the pictures of the nodes that it draws
        frontend.page.wait_for_function(SHOWN, arg=int(saver), timeout=120_000)
    shown = frontend.screenshot(tmp_path / f"{name}.png", (3000, 1200))
    assert shown.stat().st_size > 10_000
    kept(shown, name, f".dev/reports/screens/{name}.jpg", 1800)
    for kind in CLOSE_UPS.get(name, ()) if name != "Scores" else ():
        close_up(frontend, kind, tmp_path, kept)


def close_up(frontend: Frontend, kind: str, folder: Path, kept: Callable) -> None:
    """The picture of a node on its help page."""
    shown = frontend.close_up(kind, folder / f"{kind}.png")
    assert shown.stat().st_size > 10_000
    kept(shown, kind, f"web/docs/pictures/{kind}.webp", 700, quality=ON_A_HELP_PAGE)


@pytest.mark.parametrize("sketch", SKETCHES, ids=lambda sketch: sketch.__name__)
def test_sketch_for_a_help_page(
    frontend: Frontend, server: ComfyServer, sketch: Callable, tmp_path: Path, kept: Callable
) -> None:
    made = sketch()
    graph = made.ui(server.object_info())
    del graph["nodes"][0]  # the note
    frontend.load(graph)
    assert frontend.missing_nodes() == []
    for kind in CLOSE_UPS[made.name]:
        close_up(frontend, kind, tmp_path, kept)


def test_every_node_has_a_picture_on_its_help_pages(root: Path) -> None:
    pictured = {kind for kinds in CLOSE_UPS.values() for kind in kinds}
    assert pictured == set(NODES)
    for kind in pictured:
        assert (root / "web" / "docs" / "pictures" / f"{kind}.webp").is_file()
        for page in (help_page(kind, language) for language in LANGUAGES):
            assert f"](pictures/{kind}.webp)" in page.read_text(encoding="utf-8"), page


def test_the_reports_picture_appears_in_the_graph(
    frontend: Frontend, server: ComfyServer, tmp_path: Path, kept: Callable
) -> None:
    """On the node itself, drawn by the page."""
    frontend.load(FOLDER / "4 Every step.json")
    shipped = frontend.api()
    fill_in(frontend, shipped)
    outputs = server.wait(frontend.queue())["outputs"]
    script = """() => window.app.graph.nodes.some(node => node.type === 'ZippedLoRAReport'
        && node.imgs?.some(image => image.naturalWidth > 1000))"""
    frontend.page.wait_for_function(script, timeout=20_000)
    (node,) = (node for node, made in shipped.items() if made["class_type"] == "ZippedLoRAReport")
    Image.fromarray(server.view(outputs[node]["images"][0])).save(tmp_path / "report.png")
    kept(tmp_path / "report.png", "report", "web/docs/pictures/report.webp", 740, quality=ON_A_HELP_PAGE)


def test_a_help_page_opens(frontend: Frontend) -> None:
    """As a user opens it: the node selected, then the i above it."""
    frontend.load(FOLDER / "4 Every step.json")
    page = frontend.page
    select = """() => { const node = window.app.graph.nodes.find(n => n.type === 'ZipLoRAOptimize')
        window.app.canvas.centerOnNode(node); window.app.canvas.selectNode(node) }"""
    page.evaluate(select)
    page.locator("[data-testid='info-button'], .help-button, .pi-info-circle").first.click(timeout=10_000)
    page.get_by_text("Learns one coefficient for each column").first.wait_for(timeout=10_000)
    page.wait_for_function(
        "() => [...document.images].some(i => i.src.includes('pictures/ZipLoRAOptimize') && i.naturalWidth > 500)",
        timeout=10_000,
    )
