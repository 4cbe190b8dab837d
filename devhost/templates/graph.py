"""A described graph, and the UI file that the frontend would save of it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .words import MODEL, MODEL_ADDRESS

ObjectInfo = Mapping[str, Any]

OUTSIDE = object()  # in the place of a link: from a node that is not in the graph
_WIDTH, _GAP, _LINE = 340, 60, 30
_BELOW = 70  # from a node to the next one's top edge, its title bar included
_VIEW = {"scale": 0.8, "offset": [645, 215]}  # as a graph opens: the note and the first columns, large enough to read
_WIDGETS = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}
_TALL = {  # of nodes that show something when they have run, or a picture
    "SaveImage": 460,
    "ZippedLoRAReport": 300,
    "PreviewAny": 260,
    "BlindABSheet": 560,
    "LoadImage": 340,
    "ZipLoRAOptimize": 660,
    "ZipLoRAs": 480,
    "ZipCheck": 560,
    "CompareMerges": 560,
    "TrainConceptLoRA": 840,
    "TrainEmbedding": 840,
    "SplitConcept": 840,
    "TrainCustomDiffusion": 840,
    "MergeCustomDiffusion": 480,
    "TrainEDLoRA": 880,
    "FuseTextEncoders": 360,
    "UnZipLoRA": 920,
}
_FORM = {  # what App mode asks for: the widgets that a user fills in, by node
    "CheckpointLoaderSimple": ("ckpt_name",),
    "LoadLoRAPair": ("content_lora", "style_lora"),
    "ZipLoRAs": ("subject_lora", "subject_prompt", "style_lora", "style_prompt"),
    "ZipCheck": ("subject_lora", "subject_prompt", "style_lora", "style_prompt"),
    "LoraLoader": ("lora_name",),
    "ConceptStrengths": ("strengths",),
    "LoadImage": ("image",),
    "CLIPTextEncode": ("text",),
    "StringReplace": ("string",),
    "TrainConceptLoRA": ("prompt",),
    "TrainEmbedding": ("prompt", "initial_word"),
    "TrainCustomDiffusion": ("prompt",),
    "TrainEDLoRA": ("prompt", "class_word"),
    "SplitConcept": ("prompt", "initial_word"),
    "TwoScaleGuider": ("text_scale", "style_scale"),
    "UnZipLoRA": ("prompt", "content_prompt", "style_prompt"),
    "StyleStrength": ("style_strength",),
    "CompareMerges": ("prompts",),
}
_LABELED = {"CheckpointLoaderSimple", "CLIPTextEncode", "LoadImage", "StringReplace"}  # asked for by the node's title
_SHOWN = ("SaveImage", "PreviewAny")  # and what it shows
_LABELS = {  # of the host's own nodes that have no title of their own
    "CheckpointLoaderSimple": "Checkpoint",
    "EmptyLatentImage": "Size of the picture",
    "SaveImage": "Picture",
    "LoraModelLoader": "Exported LoRA on the model",
}


def file_name(title: str) -> str:
    """A graph's name for programs: "5 Every step, with pictures" -> "every_step_with_pictures"."""
    words = re.sub(r"^\d+ |\(.*\)", "", title).strip().lower()
    return re.sub(r"\W+", "_", words)


@dataclass(frozen=True)
class Link:
    """An output of a node."""

    node: Node
    slot: int


@dataclass
class Node:
    number: int
    kind: str
    title: str | None
    column: int
    inputs: dict[str, Any]

    def __getitem__(self, slot: int) -> Link:
        return Link(self, slot)


@dataclass
class Graph:
    """name: of the files. note: Markdown, shown at the left. headings, widths: of its columns."""

    name: str
    note: str
    nodes: list[Node] = field(default_factory=list)
    headings: list[str] = field(default_factory=list)
    widths: list[int] = field(default_factory=list)
    lists_widgets: bool = False  # among the inputs: what is inside of a subgraph is linked by their numbers

    def column(self, heading: str, width: int = _WIDTH) -> None:
        self.headings.append(heading)
        self.widths.append(width)

    def left(self, column: int) -> int:
        return sum(width + _GAP for width in self.widths[:column])

    def add(self, kind: str, title: str | None = None, **inputs: Any) -> Node:
        node = Node(len(self.nodes) + 2, kind, title or _LABELS.get(kind), len(self.headings) - 1, inputs)
        self.nodes.append(node)
        return node

    def form(self) -> dict[str, Any]:
        """What App mode shows: [node, widget] of what is asked for, prompts that stay empty left out, and outputs."""
        asked = [
            [node.number, name]
            for node in self.nodes
            for name in _FORM.get(node.kind, ())
            if not isinstance(node.inputs.get(name), Link)
            if node.inputs.get(name) or node.kind != "CLIPTextEncode"
        ]
        return {"inputs": asked, "outputs": [node.number for node in self.nodes if node.kind in _SHOWN]}

    def ui(self, info: ObjectInfo) -> dict[str, Any]:
        """The graph as the frontend saves one. info: the server's object_info, for the order of widgets."""
        links: list[list[Any]] = []
        height: dict[int, int] = {}
        nodes = [self._note(), *self.laid_out(info, links, height)]
        return {
            "id": "00000000-0000-0000-0000-000000000000",
            "revision": 0,
            "last_node_id": len(self.nodes) + 1,
            "last_link_id": len(links),
            "nodes": nodes,
            "links": links,
            "groups": [
                {
                    "id": number + 1,
                    "title": heading,
                    "bounding": [self.left(number) - 20, -80, self.widths[number] + 40, max(height.values()) + 60],
                    "color": "#3f789e" if number % 2 else "#88A",
                    "font_size": 24,
                    "flags": {},
                }
                for number, heading in enumerate(self.headings)
            ],
            "config": {},
            "extra": {"ds": _VIEW, "linearData": self.form()},
            "version": 0.4,
        }

    def laid_out(self, info: ObjectInfo, links: list[list[Any]], height: dict[int, int]) -> list[dict[str, Any]]:
        """Its nodes; their links are added to `links`, and what each column takes to `height`."""
        nodes = []
        targets: dict[tuple[int, int], list[int]] = {}
        for node in self.nodes:
            entry = self._node(node, info[node.kind], links, targets)
            entry["pos"] = [self.left(node.column), height.get(node.column, 0)]
            height[node.column] = entry["pos"][1] + entry["size"][1] + _BELOW
            nodes.append(entry)
        for entry in nodes:
            for slot, output in enumerate(entry["outputs"]):
                output["links"] = targets.get((entry["id"], slot), [])
        return nodes

    def _note(self) -> dict[str, Any]:
        return {
            "id": 1,
            "type": "MarkdownNote",
            "pos": [-460, 0],
            "size": [400, 480],
            "flags": {},
            "order": 0,
            "mode": 0,
            "inputs": [],
            "outputs": [],
            "title": "Read me first",
            "properties": {},
            "widgets_values": [self.note],
            "color": "#432",
            "bgcolor": "#653",
        }

    def _node(
        self, node: Node, info: Mapping[str, Any], links: list[list[Any]], targets: dict[tuple[int, int], list[int]]
    ) -> dict[str, Any]:
        inputs: list[dict[str, Any]] = []
        widgets: list[Any] = []
        lines = tall = sockets = 0
        described = {**info["input"].get("required", {}), **info["input"].get("optional", {})}
        unknown = set(node.inputs) - set(described)
        if unknown:
            raise ValueError(f"{self.name}: {node.kind} has no input {', '.join(sorted(unknown))}")
        for name, spec in sorted(described.items(), key=lambda one: _has_widget(one[1])):  # as the frontend has them
            kind, options = spec[0], spec[1] if len(spec) > 1 else {}
            given = node.inputs.get(name)
            is_linked = isinstance(given, Link)
            entry: dict[str, Any] = {"name": name, "type": kind, "link": None}
            if _has_widget(spec):
                widgets.append(_default(kind, options) if given is None or is_linked else given)
                if not options.get("advanced"):
                    lines += 1
                    tall += 60 if options.get("multiline") else 0
                if options.get("control_after_generate"):
                    widgets.append("fixed")
                    lines += 1
                named = node.kind in _LABELED and name in _FORM[node.kind]
                label = named and not self.lists_widgets and node.title
                if not (is_linked or self.lists_widgets or label):
                    continue
                if label:
                    entry["label"] = label.lstrip("0123456789 ")
                entry |= {"type": kind if isinstance(kind, str) else "COMBO", "widget": {"name": name}}
            else:
                sockets += 1
            if name in info["input"].get("optional", {}):
                entry["shape"] = 7
            if isinstance(given, Link):
                entry["link"] = len(links) + 1
                links.append([entry["link"], given.node.number, given.slot, node.number, len(inputs), entry["type"]])
                targets.setdefault((given.node.number, given.slot), []).append(entry["link"])
            elif name in info["input"].get("required", {}) and "widget" not in entry and given is not OUTSIDE:
                raise ValueError(f"{self.name}: {node.kind} needs {name}")
            inputs.append(entry)
        outputs = [
            {"name": name, "type": kind, "links": []}
            for name, kind in zip(info["output_name"], info["output"], strict=True)
        ]
        lines += max(sockets, len(outputs))
        laid_out = {
            "id": node.number,
            "type": node.kind,
            "pos": [0, 0],
            "size": [self.widths[node.column], max(_TALL.get(node.kind, 0), 20 + _LINE * lines + tall)],
            "flags": {},
            "order": node.number - 1,
            "mode": 0,
            "inputs": inputs,
            "outputs": outputs,
            "properties": {"Node name for S&R": node.kind} | _offered(widgets),
            "widgets_values": widgets,
        }
        return laid_out | ({"title": node.title} if node.title else {})


def _has_widget(spec: Any) -> bool:
    return isinstance(spec[0], list) or spec[0] in _WIDGETS


def _offered(widgets: list[Any]) -> dict[str, Any]:
    """Models that the frontend offers to download, where they are not there yet."""
    found = {"name": MODEL, "url": MODEL_ADDRESS, "directory": "checkpoints"}
    return {"models": [found]} if MODEL in widgets else {}


def _default(kind: Any, options: Mapping[str, Any]) -> Any:
    if "default" in options:
        return options["default"]
    choices = kind if isinstance(kind, list) else options.get("options")
    return choices[0] if choices else {"INT": 0, "FLOAT": 0.0, "BOOLEAN": False}.get(kind, "")
