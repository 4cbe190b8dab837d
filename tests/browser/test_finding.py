"""Finding nodes: the frontend's search, the colors of groups, and Chinese after a reload."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from devhost.frontend import READY

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
    "report": "ZippedLoRAReport",
    "compare": "CompareMerges",
    "side by side": "CompareMerges",
}
OPEN = "() => window.app.extensionManager.command.execute('Workspace.SearchBox.Toggle')"
BOX = ".comfy-vue-node-search-box input"
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
COLORS = """() => Object.fromEntries(Object.entries(window.LGraphCanvas.node_colors).map(([k, v]) => [k, v.color]))"""


@pytest.fixture
def search(frontend: Frontend) -> Callable[[str], list[str]]:
    frontend.page.evaluate(OPEN)
    frontend.page.locator(BOX).wait_for()

    def names(text: str) -> list[str]:
        frontend.page.locator(BOX).fill(text)
        frontend.page.wait_for_timeout(700)  # the list follows a moment after the last letter
        rows = frontend.page.locator("li.p-autocomplete-option").all()
        return [str(row.get_attribute("aria-label")) for row in rows]

    return names


def test_the_search_window_leads_to_the_node_that_is_meant(
    frontend: Frontend, search: Callable[[str], list[str]], tmp_path: Path, kept: Callable[..., None]
) -> None:
    ours = {
        info["display_name"]: name
        for name, info in frontend.server.object_info().items()
        if info["category"].startswith("ZipLoRA")
    }
    found = {}
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


@pytest.fixture
def chinese(frontend: Frontend) -> Iterator[Frontend]:
    """The page as it is after a reload under zh."""
    frontend.page.evaluate(LANGUAGE, "zh")
    frontend.page.wait_for_timeout(1500)  # the setting is on its way to the server
    frontend.page.reload(wait_until="domcontentloaded")
    frontend.page.wait_for_function(READY, timeout=120_000)
    yield frontend
    frontend.page.evaluate(LANGUAGE, "en")
    frontend.page.wait_for_timeout(1500)


def test_nodes_are_chinese_after_a_reload(chinese: Frontend, tmp_path: Path, kept: Callable[..., None]) -> None:
    page = chinese.page
    core = page.evaluate(NEW, "KSampler")
    sampler = page.evaluate(SAID, [core, "seed"])
    assert sampler[0] == "K采样器", "the frontend's own texts"
    node = page.evaluate(NEW, "ZipLoRAs")
    assert page.evaluate(SAID, [node, "quality"]) == ["合并 LoRA", "模型", "质量", "均衡（balanced）"]
    assert page.evaluate(SAID, [node, "subject_lora"])[2:] == ["主体 LoRA", "[无]"]
    (queued,) = chinese.api().values()
    assert (queued["inputs"]["quality"], queued["inputs"]["subject_lora"]) == ("balanced", "[None]")
    page.wait_for_timeout(500)
    page.mouse.move(*page.evaluate(PLACE, [node, "quality"]))
    page.mouse.move(*[place + 1 for place in page.evaluate(PLACE, [node, "quality"])])
    page.locator(".node-tooltip", has_text="只看文件，几秒完成").wait_for(timeout=10_000)
    picture = tmp_path / "chinese.png"
    page.screenshot(path=str(picture))
    kept(picture, "chinese", ".dev/reports/screens/chinese.jpg", 1200)
    page.mouse.click(*page.evaluate(PLACE, [node, "quality"]))
    page.locator(".litemenu-entry", has_text="快速（fast）").click()
    assert page.evaluate(SAID, [node, "quality"])[3] == "快速（fast）"
    (queued,) = chinese.api().values()
    assert queued["inputs"]["quality"] == "fast"
    page.evaluate(OPEN)
    page.locator(BOX).fill("合并")
    page.locator("li.p-autocomplete-option[aria-label='合并 LoRA']").wait_for(timeout=10_000)
