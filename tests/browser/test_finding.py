"""Finding nodes: the frontend's search, the colors of groups, and every language after a reload."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from devhost import languages
from devhost.frontend import READY
from devhost.languages import ENGLISH, TRANSLATIONS

if TYPE_CHECKING:
    from devhost.frontend import Frontend

FIRST = {  # what people type -> the node of the pack that is meant
    "zip": "ZipLoRAs",
    "merge": "ZipLoRAs",
    "merge lora": "ZipLoRAs",
    "Merge LoRAs": "ZipLoRAs",
    "combine": "ZipLoRAs",
    "style": "StyleStrength",
    "kohya": "ExportMergedLoRA",
    "export": "ExportMergedLoRA",
    "lora stack": "LoadLoRAStack",
    "lora pair": "LoadLoRAPair",
    "dreambooth": "TrainConceptLoRA",
    "textual inversion": "TrainEmbedding",
    "inspiration tree": "SplitConcept",
    "mix of show": "TrainEDLoRA",
    "mix of show fusion": "FuseTextEncoders",
    "report": "ZippedLoRAReport",
    "compare": "CompareMerges",
    "side by side": "CompareMerges",
}
# A node alone in an empty graph, under the middle of the page.
NEW = """type => {
    window.app.graph.clear()
    window.app.canvas.ds.reset()
    const node = window.LiteGraph.createNode(type)
    node.pos = [500, 300]
    window.app.graph.add(node)
    return node.id }"""
LANGUAGE = "language => window.app.extensionManager.setting.set('Comfy.Locale', language)"
SAID = """([id, name]) => {
    const node = window.app.graph.getNodeById(id), found = node.widgets.find(widget => widget.name === name)
    return [node.title, node.inputs[0].localized_name, found.label, found._displayValue] }"""
PLACE = """([id, name]) => {
    const node = window.app.graph.getNodeById(id), found = node.widgets.find(widget => widget.name === name)
    return window.app.canvasPosToClientPos([node.pos[0] + node.size[0] / 2, node.pos[1] + found.last_y + 10]) }"""
BUTTONS = """id => window.app.graph.getNodeById(id).widgets
    .filter(widget => widget.type === 'button').map(widget => widget.label)"""
PLACEHOLDER = """([id, name]) => {
    const widget = window.app.graph.getNodeById(id).widgets.find(widget => widget.name === name)
    return (widget.inputEl ?? widget.element).placeholder }"""
HELP = "[data-testid='info-button'], .help-button, .pi-info-circle"
COLORS = """() => Object.fromEntries(Object.entries(window.LGraphCanvas.node_colors).map(([k, v]) => [k, v.color]))"""


def test_the_search_window_leads_to_the_node_that_is_meant(
    frontend: Frontend, tmp_path: Path, kept: Callable[..., None]
) -> None:
    ours = {
        info["display_name"]: name
        for name, info in frontend.server.object_info().items()
        if info["category"].startswith("ZipLoRA")
    }
    found, search = {}, frontend.search
    frontend.open_search()
    for text in FIRST:
        names = search(text)
        found[text] = next((ours[name] for name in names if name in ours), None)
        if text == "merge lora":
            picture = tmp_path / "search.png"
            frontend.page.screenshot(path=str(picture))
            kept(picture, "search", ".dev/reports/screens/search.jpg", 1200)
    assert found == FIRST
    assert search("zip")[0] == "Zip LoRAs", "a blueprint is no node's rival"
    assert search("compare merges")[0] == "Compare Merges"
    # Other packs' nodes stay where their names put them.
    assert search("load image")[0] == "Load Image"
    assert search("ksampler")[0] == "KSampler"


@pytest.mark.parametrize(
    ("kind", "color"), {"ZipLoRAs": "blue", "UnZipLoRA": "green", "SaveZippedLoRA": "brown"}.items()
)
def test_a_new_node_has_its_groups_color_and_a_saved_one_its_own(frontend: Frontend, kind: str, color: str) -> None:
    colors = frontend.page.evaluate(COLORS)
    frontend.page.evaluate(NEW, kind)
    saved = frontend.workflow()
    (node,) = saved["nodes"]
    assert node["color"] == colors[color] and "bgcolor" not in node
    for own in (colors["red"], None):
        node.pop("color", None)
        node.update({} if own is None else {"color": own})
        frontend.load(saved)
        (again,) = frontend.workflow()["nodes"]
        assert again.get("color") == own
    frontend.page.evaluate(NEW, "KSampler")
    assert "color" not in frontend.workflow()["nodes"][0]


@pytest.fixture(params=TRANSLATIONS)
def translated(frontend: Frontend, request: pytest.FixtureRequest) -> Iterator[tuple[str, Frontend]]:
    """A language, and the page as it is after a reload under it."""
    frontend.page.evaluate(LANGUAGE, request.param)
    frontend.page.wait_for_timeout(1500)  # the setting is on its way to the server
    frontend.page.reload(wait_until="domcontentloaded")
    frontend.page.wait_for_function(READY, timeout=120_000)
    yield request.param, frontend
    frontend.page.evaluate(LANGUAGE, ENGLISH)
    frontend.page.wait_for_timeout(1500)


def test_nodes_are_in_the_pages_language_after_a_reload(
    translated: tuple[str, Frontend], tmp_path: Path, kept: Callable[..., None]
) -> None:
    language, frontend = translated
    page, texts, own = frontend.page, languages.node_texts(language)["ZipLoRAs"], languages.own_texts(language)
    qualities, files = own["choices"]["ZipLoRAs"]["quality"], own["choices"]["ZipLoRAs"]["subject_lora"]
    core = page.evaluate(SAID, [page.evaluate(NEW, "SaveImage"), "filename_prefix"])
    assert core[0] != "Save Image" and core[2] != "filename_prefix", "the frontend's own texts"
    node = page.evaluate(NEW, "ZipLoRAs")
    said = [texts["display_name"], *(texts["inputs"][name]["name"] for name in ("model", "quality"))]
    assert page.evaluate(SAID, [node, "quality"]) == [*said, qualities["balanced"]]
    assert page.evaluate(SAID, [node, "subject_lora"])[2:] == [texts["inputs"]["subject_lora"]["name"], files["[None]"]]
    assert page.evaluate(BUTTONS, node) == [own["words"]["More options"]]
    assert {page.evaluate(PLACEHOLDER, [node, of]) for of in ("subject_prompt", "style_prompt")} < {
        *own["words"].values()
    }
    (queued,) = frontend.api().values()
    assert (queued["inputs"]["quality"], queued["inputs"]["subject_lora"]) == ("balanced", "[None]")
    page.wait_for_timeout(500)
    page.mouse.move(*page.evaluate(PLACE, [node, "quality"]))
    page.mouse.move(*[place + 1 for place in page.evaluate(PLACE, [node, "quality"])])
    page.locator(".node-tooltip", has_text=texts["inputs"]["quality"]["tooltip"]).wait_for(timeout=10_000)
    picture = tmp_path / f"{language}.png"
    page.screenshot(path=str(picture))
    kept(picture, f"language_{language}", f".dev/reports/screens/language_{language}.jpg", 1200)
    page.mouse.click(*page.evaluate(PLACE, [node, "quality"]))
    page.locator(".litemenu-entry", has_text=qualities["fast"]).click()
    assert page.evaluate(SAID, [node, "quality"])[3] == qualities["fast"]
    (queued,) = frontend.api().values()
    assert queued["inputs"]["quality"] == "fast"
    page.evaluate("id => window.app.canvas.selectNode(window.app.graph.getNodeById(id))", node)
    page.locator(HELP).first.click(timeout=10_000)
    first = languages.help_page("ZipLoRAs", language).read_text(encoding="utf-8").splitlines()[2]
    page.get_by_text(first.split("`")[0].strip()).first.wait_for(timeout=10_000)
    help_picture = tmp_path / f"{language}_help.png"
    page.screenshot(path=str(help_picture))
    kept(help_picture, f"help_{language}", f".dev/reports/screens/help_{language}.jpg", 1200)
    frontend.open_search()
    assert texts["display_name"] in frontend.search(texts["display_name"])
