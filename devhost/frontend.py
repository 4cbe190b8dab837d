"""ComfyUI's real frontend in a headless Chromium: load a graph, read its API form, queue it."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, Page, Route, sync_playwright

from .answers import Prompt
from .chromium import find_chromium
from .host import SetupError
from .server import ComfyServer

SWITCHES = (
    "--no-sandbox",  # containers run as root
    "--disable-dev-shm-usage",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
# The graph can be replaced only once the start-up has put its own there.
READY = "() => window.app?.extensionManager?.workflow?.activeWorkflow && window.app.graph && window.LiteGraph"

# Newer pages mark missing files once they know the folders, which they ask for at last: then, not later.
LOAD = """async graph => {
    await window.app.loadGraphData(graph)
    await window.app.api.getFolderPaths?.() }"""
# The window that searches nodes: a list under a line of text, in newer frontends a dialog.
SEARCH = "() => window.app.extensionManager.command.execute('Workspace.SearchBox.Toggle')"
SEARCH_LINE = ".comfy-vue-node-search-box input, input[aria-controls='results-list']"
SEARCH_ROWS = "li.p-autocomplete-option, #results-list [role='option']"
SEARCH_NAMES = f"""() => [...document.querySelectorAll("{SEARCH_ROWS}")]
    .map(row => row.getAttribute('aria-label') ?? row.querySelector('.truncate')?.textContent.trim())"""
# What a click does on newer pages, which hold a new node at the pointer until then.
PUT_DOWN = """() => {
    const { canvas } = window.app
    if (canvas.state?.ghostNodeId != null) canvas.finalizeGhostPlacement(false) }"""

_SMALLEST_TEXT = "LiteGraph.Canvas.MinFontSizeForLOD"  # pixels below which the canvas leaves texts out
CLOSE_UP = """([kind, width, height]) => {
    const graph = window.app.graph, view = window.app.canvas.ds
    const node = graph.nodes.find(node => node.type === kind)
    const top = Math.min(...graph.nodes.map(node => node.pos[1])) - 110
    view.scale = Math.min(1, 0.8 * height / (node.size[1] + 40))
    view.offset[0] = width / 2 / view.scale - node.pos[0] - node.size[0] / 2
    view.offset[1] = Math.min(height / 2 / view.scale - node.pos[1] - node.size[1] / 2, -top)
    window.app.canvas.setDirty(true, true) }"""


@contextlib.contextmanager
def open_browser() -> Iterator[Browser]:
    """A headless Chromium; SetupError where there is none."""
    program = find_chromium()
    if program is None:
        raise SetupError("No Chromium was found: run `python3 dev.py test`, or name one in CHROMIUM_PATH.")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=str(program), args=list(SWITCHES))
        try:
            yield browser
        finally:
            browser.close()


class Frontend:
    """One page of the frontend. `errors` collects what it threw, `strayed` what it asked other machines for."""

    def __init__(self, browser: Browser, server: ComfyServer):
        self.server = server
        self.errors: list[str] = []
        self.strayed: list[str] = []
        self.context = browser.new_context(viewport={"width": 1600, "height": 1000})
        self.page: Page = self.context.new_page()
        self.page.route("**/*", self.keep_local)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.goto(server.url, wait_until="domcontentloaded", timeout=120_000)
        self.page.wait_for_function(READY, timeout=120_000)

    def keep_local(self, route: Route) -> None:
        """Let the page talk to its server only."""
        address = route.request.url
        if address.startswith((self.server.url, "data:", "blob:")):
            route.continue_()
        else:
            self.strayed.append(address)
            route.abort()

    def close(self) -> None:
        self.context.close()

    def node_types(self) -> list[str]:
        """Ids of every node that the frontend offers."""
        return list(self.page.evaluate("() => Object.keys(window.LiteGraph.registered_node_types)"))

    def load(self, workflow: Path | dict[str, Any]) -> None:
        """Put a UI workflow into the graph, as opening its file does."""
        graph = json.loads(workflow.read_text(encoding="utf-8")) if isinstance(workflow, Path) else workflow
        self.page.evaluate(LOAD, graph)

    def missing_nodes(self) -> list[str]:
        """Types of nodes in the graph that no pack provides."""
        script = """() => window.app.graph.nodes
            .map(node => node.type)
            .filter(type => !(type in window.LiteGraph.registered_node_types))"""
        return list(self.page.evaluate(script))

    def api(self) -> Prompt:
        """The graph in API format, as the frontend would queue it."""
        prompt: Prompt = self.both()["output"]
        return prompt

    def workflow(self) -> dict[str, Any]:
        """The graph in UI format, as the frontend would save it."""
        graph: dict[str, Any] = self.both()["workflow"]
        return graph

    def both(self) -> dict[str, Any]:
        """What the frontend sends with a queued graph. As text: playwright turns `undefined` into null on the way."""
        text = self.page.evaluate("async () => JSON.stringify(await window.app.graphToPrompt())")
        return dict(json.loads(text))

    def set_widget(self, node: int | str, widget: str, value: Any) -> None:
        """Set a widget of a node by id, with what follows from it."""
        script = """([id, name, value]) => {
            const node = window.app.graph.getNodeById(id)
            const widget = node?.widgets?.find(widget => widget.name === name)
            if (!widget) throw new Error(`node ${id} has no widget ${name}`)
            const before = widget.value
            widget.value = value
            widget.callback?.(value)
            node.onWidgetChanged?.(name, value, before, widget)
        }"""
        self.page.evaluate(script, [int(node), widget, value])

    def queue(self) -> str:
        """Queue the graph as the Run button does, and return the prompt's id. PlaywrightError where refused."""
        with self.page.expect_response(lambda answer: answer.url.endswith("/prompt") and answer.ok) as caught:
            self.page.evaluate("() => window.app.queuePrompt(0, 1)")
        return str(caught.value.json()["prompt_id"])

    def open_search(self) -> None:
        """Open the window that searches nodes."""
        self.page.evaluate(SEARCH)
        self.page.locator(SEARCH_LINE).wait_for()

    def search(self, text: str) -> list[str]:
        """Names of the nodes that the open search window finds, the best first."""
        self.page.locator(SEARCH_LINE).fill(text)
        self.page.wait_for_timeout(700)  # the list follows a moment after the last letter
        return list(self.page.evaluate(SEARCH_NAMES))

    def pick(self, name: str) -> None:
        """Search a node by its name and put it on the canvas, by a click on its row and where the pointer is."""
        count = self.page.evaluate("() => window.app.graph.nodes.length")
        self.page.locator(SEARCH_LINE).fill(name)
        self.page.wait_for_function(f"name => ({SEARCH_NAMES})().includes(name)", arg=name, timeout=20_000)
        self.page.locator(SEARCH_ROWS).nth(self.page.evaluate(SEARCH_NAMES).index(name)).click()
        self.page.wait_for_function("count => window.app.graph.nodes.length > count", arg=count, timeout=20_000)
        self.page.evaluate(PUT_DOWN)

    def fit(self) -> None:
        """Bring all of the graph into view."""
        self.page.evaluate("() => window.app.extensionManager.command.execute('Comfy.Canvas.FitView')")
        self.page.wait_for_timeout(1000)  # the view glides into place

    def screenshot(self, path: Path, size: tuple[int, int] = (1600, 1000)) -> Path:
        """Save a picture of the graph, all of it in view, without the menus around it."""
        with self.bare(size):
            self.fit()
            self.page.screenshot(path=str(path))
        return path

    def close_up(self, kind: str, path: Path, size: tuple[int, int] = (1200, 700)) -> Path:
        """Save a picture of the first node of a type amid its neighbours, the graph's top edge no lower than theirs."""
        with self.bare(size):
            self.page.evaluate(f"() => window.app.extensionManager.setting.set('{_SMALLEST_TEXT}', 0)")
            self.page.evaluate(CLOSE_UP, [kind, *size])
            self.page.wait_for_timeout(700)
            self.page.screenshot(path=str(path))
        return path

    @contextlib.contextmanager
    def bare(self, size: tuple[int, int]) -> Iterator[None]:
        """The canvas alone, at a size."""
        self.page.set_viewport_size({"width": size[0], "height": size[1]})
        for name in ("CanvasInfo", "CanvasMenu"):
            self.page.evaluate(f"() => window.app.extensionManager.setting.set('Comfy.Graph.{name}', false)")
        self.page.evaluate("() => window.app.extensionManager.command.execute('Workspace.ToggleFocusMode')")
        button = self.page.add_style_tag(content=".pi-bars { visibility: hidden }")  # the way out of focus mode
        yield
        button.evaluate("style => style.remove()")
        self.page.evaluate("() => window.app.extensionManager.command.execute('Workspace.ToggleFocusMode')")
