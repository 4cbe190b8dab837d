"""What stays on the optimise node when it is done: the references that the LoRAs drew, and the verdict."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from test_templates import FOLDER, fill_in

if TYPE_CHECKING:
    from pathlib import Path

    from devhost.frontend import Frontend
    from devhost.server import ComfyServer

NODE = "window.app.graph.nodes.find(node => node.type === 'ZipLoRAOptimize')"
# Width and height of each picture on the node.
SHOWN = f"() => {NODE}.imgs?.map(image => [image.naturalWidth, image.naturalHeight])"
SAID = f"() => {NODE}.widgets.map(widget => String(widget.value)).find(text => / kept .* stacking, style /.test(text))"


def test_references_and_verdict_are_the_last_thing_on_the_node(
    frontend: Frontend, server: ComfyServer, tmp_path: Path, kept: Callable
) -> None:
    frontend.load(FOLDER / "4 Every step.json")
    before = frontend.api()
    fill_in(frontend, before)
    filled = frontend.api()
    (node,) = (number for number, made in before.items() if made["class_type"] == "ZipLoRAOptimize")
    for widget, value in {"steps": 2, "drawn_references": 2, "seed": 81}.items():
        frontend.set_widget(node, widget, value)
    history = server.wait(frontend.queue())
    assert history["status"]["status_str"] == "success", history["status"]
    frontend.page.wait_for_function(f"() => ({SAID})()", timeout=20_000)
    said = frontend.page.evaluate(SAID)
    assert said.startswith("Zipping ") and "\nsubject kept " in said
    # One picture, higher than the loss curves (512 x 288), and not the bare references (256 x 256 each).
    frontend.page.wait_for_function(f"() => ({SHOWN})()?.some(([width, height]) => height > 400)", timeout=20_000)
    sizes = frontend.page.evaluate(SHOWN)
    assert len(sizes) == 1 and sizes[0][0] == 512, sizes
    after = frontend.api()
    assert after[node]["inputs"].keys() == filled[node]["inputs"].keys(), "what is shown became an input"
    shown = frontend.close_up("ZipLoRAOptimize", tmp_path / "verdict.png")
    kept(shown, "verdict", ".dev/reports/screens/verdict.jpg", 1200)
