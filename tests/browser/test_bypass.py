"""Ctrl+B on a node that zips draws the plain stack, as the host's own LoRA loaders do."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from test_templates import START
from test_workflow import NAME, put_in

from demo.manifest import read_manifest
from devhost.workflows import FOLDER

if TYPE_CHECKING:
    from devhost.frontend import Frontend
    from devhost.server import ComfyServer

BYPASS = """type => {
    const { app } = window, node = app.graph.nodes.find(node => node.type === type)
    app.canvas.deselectAll()
    app.canvas.select(node)
    return app.extensionManager.command.execute('Comfy.Canvas.ToggleSelectedNodes.Bypass') }"""
MODES = "type => window.app.graph.nodes.filter(node => node.type === type).map(node => node.mode)"
WRAP = """type => {
    const { app } = window, node = app.graph.nodes.find(node => node.type === type)
    const { subgraph } = app.graph.convertToSubgraph(new Set([node]))
    return String(subgraph.id) }"""
# Direct Merge LoRA, put between the pair and what the zip leads to.
INSTEAD = """() => {
    const { graph } = window.app, found = graph.nodes.find(node => node.type === 'ZipLoRAOptimize')
    const merge = window.LiteGraph.createNode('DirectMergeLoRA')
    graph.add(merge)
    for (const name of ['model', 'lora_pair']) {
        const link = graph.links.get(found.inputs.find(input => input.name === name).link)
        graph.getNodeById(link.origin_id).connect(link.origin_slot, merge, name)
    }
    for (const id of [...found.outputs[0].links]) {
        const { target_id, target_slot } = graph.links.get(id)
        merge.connect(0, graph.getNodeById(target_id), target_slot)
    }
    graph.remove(found) }"""
BYPASSED = 4


def only(prompt: dict[str, Any], kind: str) -> tuple[str, dict[str, Any]]:
    """Id and inputs of the one node of a type in an API graph."""
    ((number, node),) = ((number, node) for number, node in prompt.items() if node["class_type"] == kind)
    return number, node["inputs"]


def queued_picture(frontend: Frontend, server: ComfyServer) -> np.ndarray:
    """What the graph on the canvas saves."""
    history = server.wait(frontend.queue())
    assert history["status"]["status_str"] == "success", history["status"]
    (drawn,) = (p for out in history["outputs"].values() for p in out.get("images", []) if p["type"] == "output")
    return server.view(drawn)


def stock_picture(server: ComfyServer, prompt: dict[str, Any], number: str, files: list[str]) -> np.ndarray:
    """The same with Load LoRA nodes in a row in the place of a node that gives model and clip."""
    shown = {key: node for key, node in prompt.items() if node["class_type"] not in ("PreviewAny", "ZippedLoRAReport")}
    stock = json.loads(json.dumps(shown))
    (checkpoint, _) = only(stock, "CheckpointLoaderSimple")
    model, clip = [checkpoint, 0], [checkpoint, 1]
    for file in files:
        chosen = {"lora_name": file, "strength_model": 1.0, "strength_clip": 1.0}
        stock[file] = {"class_type": "LoraLoader", "inputs": {"model": model, "clip": clip, **chosen}}
        model, clip = [file, 0], [file, 1]
    for node in stock.values():
        for key, value in node["inputs"].items():
            if isinstance(value, list) and value[0] == number:
                node["inputs"][key] = [model, clip][value[1]]
    (image,) = server.run(stock).images(only(stock, "SaveImage")[0])
    return image


def test_bypassed_zip_loras_draws_what_load_lora_draws(frontend: Frontend, server: ComfyServer) -> None:
    world = read_manifest()
    subject, style = world.subjects[0].learned, world.styles[0].learned
    frontend.load(FOLDER / f"{START}.json")
    put_in(frontend, "CheckpointLoaderSimple", ckpt_name=world.checkpoint)
    put_in(frontend, "ZipLoRAs", subject_lora=subject.file, style_lora=style.file)
    put_in(frontend, "EmptyLatentImage", width=world.size, height=world.size)
    put_in(frontend, "KSampler", steps=3)
    before = frontend.api()
    frontend.page.evaluate(BYPASS, "ZipLoRAs")
    assert frontend.page.evaluate(MODES, "ZipLoRAs") == [BYPASSED]
    queued = frontend.both()
    number, inputs = only(queued["output"], "ZipLoRAs")
    assert inputs == {**before[number]["inputs"], "quality": "stacked"}
    assert queued["output"] == {**before, number: {**before[number], "inputs": inputs}}, "another node changes"
    (saved,) = (node for node in queued["workflow"]["nodes"] if node["type"] == "ZipLoRAs")
    assert saved["mode"] == BYPASSED and "stacked" not in saved["widgets_values"]
    assert frontend.page.evaluate(MODES, "ZipLoRAs") == [BYPASSED], "the canvas shows another mode than was chosen"

    drawn = queued_picture(frontend, server)
    assert np.array_equal(drawn, stock_picture(server, before, number, [subject.file, style.file]))
    frontend.page.evaluate(BYPASS, "ZipLoRAs")
    assert only(frontend.api(), "ZipLoRAs") == only(before, "ZipLoRAs")


def test_bypassed_inside_a_subgraph(frontend: Frontend) -> None:
    """With it, the whole subgraph is gone, as any; without it, the node in it stacks."""
    frontend.load(FOLDER / f"{START}.json")
    world = read_manifest()
    put_in(frontend, "ZipLoRAs", subject_lora=world.subjects[0].learned.file, style_lora=world.styles[0].learned.file)
    subgraph = frontend.page.evaluate(WRAP, "ZipLoRAs")
    page = frontend.page
    page.evaluate("id => { window.app.graph.subgraphs.get(id).nodes[0].mode = 4 }", subgraph)
    queued = frontend.both()
    number, inputs = only(queued["output"], "ZipLoRAs")
    assert ":" in number and inputs["quality"] == "stacked"
    assert only(queued["output"], "KSampler")[1]["model"] == [number, 0]
    (saved,) = queued["workflow"]["definitions"]["subgraphs"]
    assert [node["mode"] for node in saved["nodes"]] == [BYPASSED]
    page.evaluate("type => { window.app.graph.nodes.find(node => node.type === type).mode = 4 }", subgraph)
    prompt = frontend.api()
    assert only(prompt, "KSampler")[1]["model"] == [only(prompt, "CheckpointLoaderSimple")[0], 0]


@pytest.mark.parametrize("kind", ["ZipLoRAOptimize", "DirectMergeLoRA"])
def test_bypassed_expert_nodes_hand_on_the_pair(shared_frontend: Frontend, kind: str) -> None:
    frontend = shared_frontend
    graph = json.loads((FOLDER / f"{NAME}.json").read_text(encoding="utf-8"))
    frontend.load(graph)
    if kind == "DirectMergeLoRA":
        frontend.page.evaluate(INSTEAD)
    before = frontend.api()
    number, given = only(before, kind)
    frontend.page.evaluate(BYPASS, kind)
    after = frontend.api()
    assert number not in after and given["lora_pair"] == [only(after, "LoadLoRAPair")[0], 0]
    takers = [key for key, node in before.items() if node["inputs"].get("zipped_lora") == [number, 0]]
    assert takers and all(after[key]["inputs"]["zipped_lora"] == given["lora_pair"] for key in takers)


def test_bypassed_optimize_draws_what_load_lora_draws(frontend: Frontend, server: ComfyServer) -> None:
    """What needs a zip, as its report, is left out, and the picture is drawn all the same."""
    world = read_manifest()
    subject, style = world.subjects[0], world.styles[0]
    frontend.load(FOLDER / f"{NAME}.json")
    put_in(frontend, "CheckpointLoaderSimple", ckpt_name=world.checkpoint)
    put_in(frontend, "LoadLoRAPair", content_lora=subject.learned.file, style_lora=style.learned.file)
    put_in(frontend, "What to draw: subject in style", text=world.prompt(subject, style))
    put_in(frontend, "EmptyLatentImage", width=world.size, height=world.size)
    put_in(frontend, "KSampler", steps=3)
    frontend.page.evaluate(BYPASS, "ZipLoRAOptimize")
    prompt = frontend.api()
    drawn = queued_picture(frontend, server)
    files = [subject.learned.file, style.learned.file]
    assert np.array_equal(drawn, stock_picture(server, prompt, only(prompt, "ApplyZippedLoRA")[0], files))


MODE = "([type, mode]) => { window.app.graph.nodes.find(node => node.type === type).mode = mode }"
MUTED = 2
# Two calls at once, and a look at the graph for an undo step while each is under way.
AT_ONCE = """async () => {
    const { app } = window, tracker = app.extensionManager.workflow.activeWorkflow.changeTracker
    const widget = app.graph.nodes.find(node => node.type === 'EmptyLatentImage').widgets[0]
    const zip = app.graph.nodes.find(node => node.type === 'ZipLoRAs')
    tracker.checkState()
    const steps = tracker.undoQueue.length, seen = []
    widget.serializeValue = async () => {
        tracker.checkState()
        await new Promise(done => setTimeout(done, 100))
        seen.push(zip.mode)
        tracker.checkState()
        return widget.value
    }
    const both = await Promise.all([app.graphToPrompt(), app.graphToPrompt()])
    delete widget.serializeValue
    tracker.checkState()
    return JSON.stringify({ outputs: both.map(({ output }) => output), steps: tracker.undoQueue.length - steps,
        looked: seen.length, mode: zip.mode, open: tracker.changeCount }) }"""


@pytest.fixture
def chosen(shared_frontend: Frontend) -> Frontend:
    """The first graph with two files that are there, and a stacker on lora_stack."""
    frontend, world = shared_frontend, read_manifest()
    subject, style = world.subjects[0].learned, world.styles[0].learned
    frontend.load(FOLDER / f"{START}.json")
    put_in(frontend, "CheckpointLoaderSimple", ckpt_name=world.checkpoint)
    put_in(frontend, "ZipLoRAs", subject_lora=subject.file, style_lora=style.file)
    frontend.page.evaluate(
        """files => {
        const { graph } = window.app, zip = graph.nodes.find(node => node.type === 'ZipLoRAs')
        const pair = window.LiteGraph.createNode('LoadLoRAPair')
        graph.add(pair)
        for (const [name, value] of Object.entries(files))
            pair.widgets.find(widget => widget.name === name).value = value
        pair.connect(pair.outputs.findIndex(({ type }) => type === 'LORA_STACK'), zip, 'lora_stack') }""",
        {"content_lora": world.subjects[1].learned.file, "style_lora": world.styles[1].learned.file},
    )
    return frontend


def is_stacked(frontend: Frontend) -> bool:
    """Whether Zip LoRAs, bypassed, is queued as stacked; else it has to be gone, with its model handed on."""
    frontend.page.evaluate(MODE, ["ZipLoRAs", BYPASSED])
    queued = frontend.both()
    assert [n["mode"] for n in queued["workflow"]["nodes"] if n["type"] == "ZipLoRAs"] == [BYPASSED]
    assert frontend.page.evaluate(MODES, "ZipLoRAs") == [BYPASSED]
    prompt = queued["output"]
    if "ZipLoRAs" in [node["class_type"] for node in prompt.values()]:
        assert only(prompt, "ZipLoRAs")[1]["quality"] == "stacked"
        return True
    assert only(prompt, "KSampler")[1]["model"] == [only(prompt, "CheckpointLoaderSimple")[0], 0]
    return False


@pytest.mark.parametrize("mode", [0, MUTED, BYPASSED])
@pytest.mark.parametrize(
    ("given", "with_stack", "without"),
    [
        ({}, True, True),
        ({"subject_lora": "not there.safetensors"}, False, False),
        ({"style_lora": "[None]"}, True, False),
        ({"subject_lora": "[None]", "style_lora": "[None]"}, True, False),
        ({"stack_prompts": "a dog\na house"}, True, False),
    ],
    ids=["two files", "a missing file", "one file", "no file", "prompts of the stack"],
)
def test_only_what_can_be_stacked_is(
    chosen: Frontend, mode: int, given: dict[str, str], with_stack: bool, without: bool
) -> None:
    """A muted or bypassed stacker gives no stack. What cannot run would stop the run that a bypass is to let go on."""
    put_in(chosen, "ZipLoRAs", **given)
    chosen.page.evaluate(MODE, ["LoadLoRAPair", mode])
    assert is_stacked(chosen) == (without if mode else with_stack)


def test_one_file_twice_is_not_stacked(chosen: Frontend) -> None:
    put_in(chosen, "ZipLoRAs", style_lora=read_manifest().subjects[0].learned.file)
    chosen.page.evaluate(MODE, ["LoadLoRAPair", MUTED])
    assert not is_stacked(chosen)


@pytest.mark.parametrize("mode", [0, MUTED])
def test_a_file_that_a_node_gives_is_stacked_while_that_node_runs(chosen: Frontend, mode: int) -> None:
    """Of a muted node older frontends queue nothing, newer ones what the widget itself says: a file that is there."""
    chosen.page.evaluate(
        """() => { const { graph } = window.app, zip = graph.nodes.find(node => node.type === 'ZipLoRAs')
        const name = window.LiteGraph.createNode('PrimitiveString')
        graph.add(name)
        name.outputs[0].type = '*' // as nodes of other packs that give the name of a file
        if (!name.connect(0, zip, 'subject_lora')) throw new Error('not connected') }"""
    )
    chosen.page.evaluate(MODE, ["PrimitiveString", mode])
    prompt = chosen.api()
    file = only(prompt, "ZipLoRAs")[1].get("subject_lora")
    if mode == 0:
        assert file == [only(prompt, "PrimitiveString")[0], 0]
    else:
        assert file in (None, read_manifest().subjects[0].learned.file)
    assert is_stacked(chosen) == (file is not None)


def test_calls_at_once_give_the_same_and_no_undo_step(chosen: Frontend) -> None:
    chosen.page.evaluate(MODE, ["ZipLoRAs", BYPASSED])
    found = json.loads(chosen.page.evaluate(AT_ONCE))
    first, second = found.pop("outputs")
    assert first == second and only(first, "ZipLoRAs")[1]["quality"] == "stacked"
    assert found == {"steps": 0, "looked": 2, "mode": BYPASSED, "open": 0}


def test_a_chain_of_loaders_is_handed_on_as_it_is(shared_frontend: Frontend) -> None:
    """Where the node brings no LoRA of its own, the page's bypass is the plain stack."""
    frontend = shared_frontend
    frontend.load(FOLDER / f"{START}.json")
    put_in(frontend, "ZipLoRAs", subject_lora="[None]", style_lora="[None]")
    frontend.page.evaluate(BYPASS, "ZipLoRAs")
    prompt = frontend.api()
    assert "ZipLoRAs" not in [node["class_type"] for node in prompt.values()]
    assert only(prompt, "KSampler")[1]["model"] == [only(prompt, "CheckpointLoaderSimple")[0], 0]
