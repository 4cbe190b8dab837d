"""A described graph, and the UI file that the frontend would save of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

ObjectInfo = Mapping[str, Any]

_WIDTH, _GAP, _LINE = 340, 60, 26
_VIEW = {"scale": 0.7, "offset": [600, 270]}  # as a graph opens: the note and the first columns, large enough to read
_WIDGETS = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}
_TALL = {  # of nodes that show something when they have run, or a picture
    "SaveImage": 460,
    "ZippedLoRAReport": 300,
    "PreviewAny": 260,
    "BlindABSheet": 560,
    "LoadImage": 340,
    "ZipLoRAOptimize": 660,
    "ZipLoRAs": 720,
    "CompareMerges": 720,
    "TrainConceptLoRA": 840,
    "UnZipLoRA": 920,
}


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
    """name: of the files. note: Markdown, shown at the left. what: of its columns, their headings."""

    name: str
    note: str
    nodes: list[Node] = field(default_factory=list)
    headings: list[str] = field(default_factory=list)
    widths: list[int] = field(default_factory=list)

    def column(self, heading: str, width: int = _WIDTH) -> None:
        self.headings.append(heading)
        self.widths.append(width)

    def _left(self, column: int) -> int:
        return sum(width + _GAP for width in self.widths[:column])

    def add(self, kind: str, title: str | None = None, **inputs: Any) -> Node:
        node = Node(len(self.nodes) + 2, kind, title, len(self.headings) - 1, inputs)
        self.nodes.append(node)
        return node

    def ui(self, info: ObjectInfo) -> dict[str, Any]:
        """The graph as the frontend saves one. info: the server's object_info, for the order of widgets."""
        nodes = [self._note()]
        links: list[list[Any]] = []
        height: dict[int, int] = {}
        targets: dict[tuple[int, int], list[int]] = {}
        for node in self.nodes:
            entry = self._node(node, info[node.kind], links, targets)
            entry["pos"] = [self._left(node.column), height.get(node.column, 0)]
            height[node.column] = entry["pos"][1] + entry["size"][1] + 70
            nodes.append(entry)
        for entry in nodes:
            for slot, output in enumerate(entry["outputs"]):
                output["links"] = targets.get((entry["id"], slot), [])
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
                    "bounding": [self._left(number) - 20, -80, self.widths[number] + 40, height.get(number, 0) + 60],
                    "color": "#3f789e" if number % 2 else "#88A",
                    "font_size": 24,
                    "flags": {},
                }
                for number, heading in enumerate(self.headings)
            ],
            "config": {},
            "extra": {"ds": _VIEW},
            "version": 0.4,
        }

    def _note(self) -> dict[str, Any]:
        return {
            "id": 1,
            "type": "MarkdownNote",
            "pos": [-500, -40],
            "size": [440, 460],
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
        tall = 0
        described = {**info["input"].get("required", {}), **info["input"].get("optional", {})}
        unknown = set(node.inputs) - set(described)
        if unknown:
            raise ValueError(f"{self.name}: {node.kind} has no input {', '.join(sorted(unknown))}")
        for name, spec in described.items():
            kind, options = spec[0], spec[1] if len(spec) > 1 else {}
            given = node.inputs.get(name)
            if isinstance(kind, list) or kind in _WIDGETS:
                widgets.append(_default(kind, options) if given is None else given)
                tall += 60 if options.get("multiline") else 0
                if options.get("control_after_generate"):
                    widgets.append("fixed")
                continue
            entry: dict[str, Any] = {"name": name, "type": kind, "link": None}
            if name in info["input"].get("optional", {}):
                entry["shape"] = 7
            if given is not None:
                entry["link"] = len(links) + 1
                links.append([entry["link"], given.node.number, given.slot, node.number, len(inputs), kind])
                targets.setdefault((given.node.number, given.slot), []).append(entry["link"])
            elif name in info["input"].get("required", {}):
                raise ValueError(f"{self.name}: {node.kind} needs {name}")
            inputs.append(entry)
        outputs = [
            {"name": name, "type": kind, "links": []}
            for name, kind in zip(info["output_name"], info["output"], strict=True)
        ]
        lines = max(len(inputs), len(outputs)) + len(widgets)
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
            "properties": {"Node name for S&R": node.kind},
            "widgets_values": widgets,
        }
        return laid_out | ({"title": node.title} if node.title else {})


def _default(kind: Any, options: Mapping[str, Any]) -> Any:
    if "default" in options:
        return options["default"]
    choices = kind if isinstance(kind, list) else options.get("options")
    return choices[0] if choices else {"INT": 0, "FLOAT": 0.0, "BOOLEAN": False}.get(kind, "")
