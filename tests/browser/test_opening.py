"""Graphs as they open, under both node renderers: in their groups, readable, in plain words, few actions from done."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from safetensors import safe_open
from safetensors.torch import save_file

from demo.manifest import Manifest, read_manifest
from demo.miniature import CFG
from devhost.templates import TEMPLATES
from devhost.templates.words import MODEL, MODEL_ADDRESS
from devhost.workflows import FOLDER

if TYPE_CHECKING:
    from devhost.frontend import Frontend
    from devhost.server import ComfyServer

START = TEMPLATES[0]().name
SMALLEST = 8  # pixels of a letter
SIZES = ((1600, 900), (1280, 720))
MENUS = (50, 70)  # pixels that the frontend's own take at the left and at the top
PAPER = re.compile(r"column|coefficient|lambda|ridge|retention|objective|layerwise", re.IGNORECASE)
PLAIN = {  # all that Zip LoRAs shows before more is asked for
    "sockets": ["model", "clip", "lora_stack", "subject_images", "style_images", "vae"],
    "widgets": ["subject_lora", "subject_prompt", "style_lora", "style_prompt", "quality", "seed"],
}
VUE = "on => window.app.extensionManager.setting.set('Comfy.VueNodes.Enabled', on)"
SET = "([name, value]) => window.app.extensionManager.setting.set(name, value)"
# On nodes that the page draws: our button, or the frontend's own for widgets out of sight.
MORE, FEWER = (
    f".lg-node button:is(:has-text('{text}'), [data-testid='advanced-inputs-button'])"
    for text in ("More options", "Fewer options")
)
ZIP = "window.app.graph.nodes.find(node => node.type === 'ZipLoRAs')"
# Left, top, right and bottom of each node on the canvas, as it is drawn: by the page, or by the canvas itself.
BOXES = """() => window.app.graph.nodes.map(node => {
    const drawn = document.querySelector(`.lg-node[data-node-id='${node.id}']`)?.getBoundingClientRect()
    const box = drawn
        ? [...window.app.clientPosToCanvasPos([drawn.left, drawn.top]),
           ...window.app.clientPosToCanvasPos([drawn.right, drawn.bottom])]
        : [node.pos[0], node.pos[1] - window.LiteGraph.NODE_TITLE_HEIGHT,
           node.pos[0] + node.size[0], node.pos[1] + node.size[1]]
    return [node.id, node.type, Boolean(drawn), box] })"""
GROUPS = """() => window.app.graph.groups.map(({pos, size}) => [pos[0], pos[1], pos[0] + size[0], pos[1] + size[1]])"""
VIEW = """() => ({scale: window.app.canvas.ds.scale, offset: [...window.app.canvas.ds.offset],
    canvas: Object.values(window.app.canvas.canvas.getBoundingClientRect().toJSON()).slice(0, 2),
    leavesOut: window.app.canvas.low_quality})"""
# What the canvas writes with, and every text that the page writes on nodes: [pixels, the text].
LETTERS = """() => {
    const scale = window.app.canvas.ds.scale, found = []
    if (!document.querySelector('.lg-node'))
        found.push([window.LiteGraph.NODE_SUBTEXT_SIZE * scale, 'canvas'],
                   [window.LiteGraph.NODE_TEXT_SIZE * scale, 'canvas'])
    for (const part of document.querySelectorAll('.lg-node *, .dom-widget, .dom-widget *')) {
        const own = [...part.childNodes].some(child => child.nodeType === 3 && child.textContent.trim())
        if (!part.offsetHeight || !(own || part.value)) continue
        const zoom = part.getBoundingClientRect().height / part.offsetHeight
        found.push([parseFloat(getComputedStyle(part).fontSize) * zoom, part.value || part.textContent.trim()])
    }
    return found }"""
# Every text on nodes: by the page, else titles, sockets, widgets in sight with their values, choices, placeholders.
WORDS = """() => {
    const page = [...document.querySelectorAll('.lg-node')]
    const placeholders = [...document.querySelectorAll('.lg-node textarea')].map(text => text.placeholder)
    if (page.length) return [...page.flatMap(node => node.innerText.split('\\n')), ...placeholders]
    return window.app.graph.nodes.flatMap(node => [node.title,
        ...(node.outputs ?? []).map(o => o.label ?? o.name),
        ...(node.inputs ?? []).filter(i => !i.widget).map(i => i.label ?? i.name),
        ...(node.widgets ?? []).filter(w => node.isWidgetVisible(w)).flatMap(w => [w.label ?? w.name, String(w.value),
            ...(Array.isArray(w.options?.values) ? w.options.values : []), w.element?.placeholder ?? ''])]) }"""
SEEN = f"""() => {{
    const node = {ZIP}, page = document.querySelector(`.lg-node[data-node-id='${{node.id}}']`)
    const names = page && new Set([...page.innerText.split('\\n'),
        ...[...page.querySelectorAll('textarea')].map(text => text.placeholder)])
    const isSeen = widget => names ? names.has(widget.name) : node.isWidgetVisible(widget)
    return {{
        sockets: node.inputs.filter(input => !input.widget).map(input => input.name),
        widgets: node.widgets.filter(widget => widget.name && isSeen(widget)).map(widget => widget.name) }} }}"""
LINK = """([from, slot, to, name]) => {
    const graph = window.app.graph, target = graph.getNodeById(to)
    graph.getNodeById(from).connect(slot, target, target.inputs.findIndex(input => input.name === name)) }"""
CHOICE = """([id, name]) => {
    const node = window.app.graph.getNodeById(id), found = node.widgets.find(widget => widget.name === name)
    return found.last_y > 0 && window.app.canvasPosToClientPos(
        [node.pos[0] + node.size[0] / 2, node.pos[1] + found.last_y + 10]) }"""

# The controls that a user touches, one after another, by the browser's own events: a menu belongs to the control that
# opened it; `change` says only that another control was touched.
WATCH = """() => {
    const { app } = window, widgets = () => app.graph.nodes.flatMap(node => (node.widgets ?? []).map(w => [node, w]))
    const touched = window.touched = []
    const control = ({ target, clientX, clientY }) => {
        if (target.closest('.litecontextmenu')) return touched.at(-1)
        if (target.tagName === 'CANVAS') {
            const [x, y] = app.clientPosToCanvasPos([clientX, clientY]), node = app.graph.getNodeOnPos(x, y)
            return `${node?.id} ${node?.getWidgetOnPos(x, y)?.name}`
        }
        const [node, widget] = widgets().find(([, widget]) => widget.element?.contains(target)) ?? []
        return node ? `${node.id} ${widget.name}` : (target.closest('button') ?? target).innerText?.trim()
    }
    for (const kind of ['pointerdown', 'keydown', 'input']) window.addEventListener(kind, event => {
        const name = event.isTrusted ? control(event) : touched.at(-1)
        if (name !== touched.at(-1)) touched.push(name)
    }, true) }"""


@pytest.fixture(scope="module", params=["canvas", "Vue"])
def renderer(page_of_all: Frontend, request: pytest.FixtureRequest) -> Iterator[str]:
    """The page, as it draws nodes by that renderer; as it was when the tests with it are done."""
    page = page_of_all.page
    size = page.viewport_size
    page.evaluate(VUE, request.param == "Vue")
    page.wait_for_timeout(1500)  # the setting is on its way to the server, and nodes to the page
    yield request.param
    page.evaluate(VUE, False)
    page.set_viewport_size(size)
    page.wait_for_timeout(1500)


def drawn(frontend: Frontend, renderer: str, name: str) -> list[tuple[int, str, list[float]]]:
    """The graph opened; its nodes' boxes, once they are there and have found their sizes."""
    frontend.load(FOLDER / f"{name}.json")
    vue = "() => document.querySelectorAll('.lg-node').length === window.app.graph.nodes.length"
    frontend.page.wait_for_function(vue if renderer == "Vue" else "() => !document.querySelector('.lg-node')")
    frontend.page.wait_for_timeout(1000)
    boxes = frontend.page.evaluate(BOXES)
    assert all(by_page == (renderer == "Vue") for _, _, by_page, _ in boxes)
    return [(int(number), kind, box) for number, kind, _, box in boxes]  # newer pages' ids are texts


@pytest.mark.parametrize("name", [template().name for template in TEMPLATES])
def test_a_graph_opens_readable_and_in_its_groups(
    renderer: str, shared_frontend: Frontend, name: str, tmp_path: Path, kept: Callable[..., None]
) -> None:
    page = shared_frontend.page
    for wide, high in SIZES:
        page.set_viewport_size({"width": wide, "height": high})
        boxes = drawn(shared_frontend, renderer, name)
        picture = tmp_path / "opened.png"
        page.screenshot(path=str(picture))
        kept(picture, f"opened {name} {renderer} {wide}", f".dev/reports/screens/opened_{name}.jpg", wide)
        view = page.evaluate(VIEW)
        assert view["scale"] >= 0.7 and not view["leavesOut"]
        assert [text for size, text in page.evaluate(LETTERS) if round(size, 1) < SMALLEST] == []
        for number, _, (left, top, right, _) in boxes:
            if number <= 3:  # the note and the loaders
                x, y, end = (
                    (place + view["offset"][axis]) * view["scale"] + view["canvas"][axis]
                    for place, axis in ((left, 0), (top, 1), (right, 0))
                )
                # The second loader may stand at the end of a way that leads on to the right.
                assert x >= MENUS[0] and y >= MENUS[1] and y <= high and end <= wide, (number, x, y, end)
    groups = page.evaluate(GROUPS)
    for number, kind, (left, top, right, bottom) in boxes:
        around = [g for g in groups if g[0] <= left and g[1] <= top and right <= g[2] and bottom <= g[3]]
        assert len(around) == (kind != "MarkdownNote"), f"node {number} ({kind}) is not in one group"
    for one, _, (left, top, right, bottom) in boxes:
        hidden = [n for n, _, b in boxes if n > one and left < b[2] and b[0] < right and top < b[3] and b[1] < bottom]
        assert not hidden, f"node {one} lies over {hidden}"


def test_no_word_of_the_paper_is_in_sight_and_only_what_everybody_needs(
    renderer: str, shared_frontend: Frontend
) -> None:
    boxes = drawn(shared_frontend, renderer, START)
    assert len(boxes) <= 10
    lefts, rights = zip(*((box[0], box[2]) for _, _, box in boxes), strict=True)
    # The page's own nodes are a fifth larger than the file says, the space between them too.
    assert max(rights) - min(lefts) <= (2000 * 1.2 if renderer == "Vue" else 2000)
    page = shared_frontend.page
    found = page.evaluate(WORDS)
    assert "quality" in found and "3 What to draw" in found
    assert [text for text in found if PAPER.search(text)] == []
    assert page.evaluate(SEEN) == PLAIN
    if renderer == "Vue":
        advanced = page.locator(".lg-node", has_text="drawn_size")
        shared_frontend.fit()
        page.locator(MORE).click()
        advanced.wait_for(timeout=20_000)
        page.locator(FEWER).click()
        advanced.wait_for(state="detached", timeout=20_000)
        page.locator(MORE).wait_for(timeout=20_000)
        assert page.evaluate(SEEN) == PLAIN


def test_widgets_that_are_connected_stay_in_sight(renderer: str, shared_frontend: Frontend) -> None:
    drawn(shared_frontend, renderer, START)
    page = shared_frontend.page
    node = page.evaluate(f"() => {ZIP}.id")
    before = shared_frontend.api()
    page.evaluate(f"() => {{ {ZIP}.showAdvanced = true }}")
    page.wait_for_timeout(500)
    everything = page.evaluate(SEEN)
    assert everything["sockets"] == PLAIN["sockets"]
    assert {"drawn_size", "stack_prompts"} <= set(everything["widgets"])
    assert shared_frontend.api() == before
    page.evaluate(LINK, [2, 2, node, "vae"])
    number = page.evaluate(
        """() => { const node = window.LiteGraph.createNode('PrimitiveInt')
        window.app.graph.add(node); return node.id }"""
    )
    page.evaluate(LINK, [number, 0, node, "drawn_size"])
    page.evaluate(f"() => {{ {ZIP}.showAdvanced = false }}")
    page.wait_for_timeout(500)
    linked = shared_frontend.api()
    assert (linked[str(node)]["inputs"]["vae"], linked[str(node)]["inputs"]["drawn_size"]) == (
        ["2", 2],
        [str(number), 0],
    )
    kept_in_sight = {"sockets": PLAIN["sockets"], "widgets": [*PLAIN["widgets"], "drawn_size"]}
    assert page.evaluate(SEEN) == kept_in_sight
    # What is saved opens as it was, with its links in their places.
    size = page.evaluate(f"() => [...{ZIP}.size]")
    shared_frontend.load(shared_frontend.workflow())
    page.wait_for_timeout(1000)
    assert shared_frontend.api() == linked
    assert page.evaluate(SEEN) == kept_in_sight
    assert renderer == "Vue" or page.evaluate(f"() => [...{ZIP}.size]") == size


@pytest.fixture
def world(server: ComfyServer) -> Iterator[Manifest]:
    """The miniature's checkpoint under the name in the graphs, and its LoRAs with trigger words in their headers."""
    found = read_manifest()
    models = server.base / "models"
    made = [models / "checkpoints" / MODEL]
    made[0].symlink_to((models / "checkpoints" / found.checkpoint).resolve())
    for concept in trained_of(found):
        with safe_open(models / "loras" / concept.learned.file, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        made.append(models / "loras" / f"named {concept.name}.safetensors")
        save_file(tensors, made[-1], {"modelspec.trigger_phrase": concept.learned.prompt})
    yield found
    for path in made:
        path.unlink()


def trained_of(world: Manifest) -> list[Any]:
    return [one for one in (*world.subjects, *world.styles) if one.name in world.shown.pair]


@pytest.fixture
def page_of_world(world: Manifest, frontend: Frontend) -> Frontend:
    """A page that was opened when the files were there."""
    return frontend


def choose(frontend: Frontend, node: int, widget: str, value: str) -> None:
    """As a user does: a click on the widget, a click on the file."""
    place = frontend.page.wait_for_function(CHOICE, arg=[node, widget], timeout=60_000).json_value()
    frontend.page.mouse.click(*place)
    frontend.page.locator(".litemenu-entry", has_text=value).click()


def test_four_actions_lead_from_the_template_to_the_first_picture(
    page_of_world: Frontend, world: Manifest, tmp_path: Path, kept: Callable[..., None]
) -> None:
    frontend, page = page_of_world, page_of_world.page
    page.evaluate(VUE, False)  # the page remembers the renderer of a test before
    page.wait_for_timeout(1500)
    frontend.load(FOLDER / f"{START}.json")
    kinds = {node["type"]: node["id"] for node in json.loads((FOLDER / f"{START}.json").read_text())["nodes"]}
    # What stands for SDXL is smaller than SDXL: no user does this.
    for widget in ("width", "height"):
        frontend.set_widget(kinds["EmptyLatentImage"], widget, world.size)
    for widget, value in {"steps": 4, "cfg": CFG}.items():
        frontend.set_widget(kinds["KSampler"], widget, value)
    page.wait_for_timeout(1000)
    page.evaluate(WATCH)
    subject, style = trained_of(world)
    for widget, concept in (("subject_lora", subject), ("style_lora", style)):
        choose(frontend, kinds["ZipLoRAs"], widget, f"named {concept.name}.safetensors")
    box = page.evaluate_handle(
        "() => window.app.graph.nodes.find(node => node.title === '3 What to draw').widgets[0].element"
    ).as_element()
    assert box is not None
    box.click()
    page.keyboard.press("ControlOrMeta+A")
    page.keyboard.insert_text(world.prompt(subject, style))
    with page.expect_response(lambda answer: answer.url.endswith("/prompt") and answer.ok) as sent:
        page.get_by_role("button", name="Run", exact=True).first.click()  # beside it a menu of that name
    history = frontend.server.wait(sent.value.json()["prompt_id"])
    assert history["status"]["status_str"] == "success", history["status"]
    (saved,) = history["outputs"][str(kinds["SaveImage"])]["images"]
    assert frontend.server.view(saved).std() > 5
    report = history["outputs"][str(kinds["PreviewAny"])]["text"][0]
    assert subject.learned.prompt in report and style.learned.prompt in report
    zipped = kinds["ZipLoRAs"]
    prompt = page.evaluate("() => window.app.graph.nodes.find(node => node.title === '3 What to draw').id")
    assert page.evaluate("() => window.touched") == [
        f"{zipped} subject_lora",
        f"{zipped} style_lora",
        f"{prompt} text",
        "Run",
    ]
    page.wait_for_function(
        "id => window.app.graph.getNodeById(id).imgs?.every(image => image.naturalWidth)",
        arg=kinds["SaveImage"],
        timeout=120_000,
    )
    page.wait_for_timeout(1000)
    picture = tmp_path / "first.png"
    page.screenshot(path=str(picture))
    kept(picture, "first picture", ".dev/reports/screens/first_picture.jpg", 1600)


def test_the_checkpoint_is_offered_where_it_is_missing_and_a_lora_never(frontend: Frontend) -> None:
    page = frontend.page
    page.evaluate(SET, ["Comfy.Workflow.ShowMissingModelsWarning", True])
    try:
        frontend.load(FOLDER / f"{START}.json")
        window, details = page.locator(".p-dialog", has_text=MODEL), page.get_by_text("View details")
        window.or_(details).wait_for(timeout=20_000)
        if details.is_visible():  # newer pages list all that is missing, and offer what has an address
            details.click()
            page.locator(f"button[aria-label='Download {MODEL}']").wait_for(timeout=20_000)
            assert page.get_by_test_id("missing-model-download").count() == 1
        else:
            assert ".safetensors" not in window.inner_text().replace(MODEL, "")
    finally:
        page.evaluate(SET, ["Comfy.Workflow.ShowMissingModelsWarning", False])
        page.wait_for_timeout(1000)
    for ui_file in FOLDER.glob("*.json"):
        offered = [m for n in json.loads(ui_file.read_text())["nodes"] for m in n["properties"].get("models", ())]
        assert offered == [{"name": MODEL, "url": MODEL_ADDRESS, "directory": "checkpoints"}]
