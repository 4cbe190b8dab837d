"""Subgraphs that ship: several nodes as one, in the frontend's list of nodes under *Subgraph Blueprints*."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from .graph import Graph, Link, Node, ObjectInfo

_ENTRY, _EXIT = -10, -20  # the frontend's ids of what stands for a subgraph's inputs and outputs
_WIDTH = 180  # of those two


@dataclass
class Blueprint(Graph):
    """words: that it is found by. entries: (name, type) of its inputs. exits: (name, what it gives)."""

    lists_widgets: bool = True
    words: tuple[str, ...] = ()
    entries: list[tuple[str, str]] = field(default_factory=list)
    exits: list[tuple[str, Link]] = field(default_factory=list)

    def enter(self, name: str, kind: str) -> Link:
        """An input; where a widget takes it, the widget is on the subgraph's own face."""
        self.entries.append((name, kind))
        return Link(Node(_ENTRY, "", None, 0, {}), len(self.entries) - 1)

    def leave(self, **outputs: Link) -> Blueprint:
        self.exits += outputs.items()
        return self

    def _id(self, *of: str) -> str:
        return str(uuid.uuid5(uuid.NAMESPACE_URL, "/".join(("ziplora", self.name, *of))))

    def ui(self, info: ObjectInfo) -> dict[str, Any]:
        """The one node that a blueprint's file holds, and its subgraph."""
        links: list[list[Any]] = []
        height: dict[int, int] = {}
        nodes = self.laid_out(info, links, height)
        given: list[dict[str, Any]] = [
            {"id": self._id("in", name), "name": name, "type": kind, "linkIds": []} for name, kind in self.entries
        ]
        for number, origin, slot, *_ in links:
            if origin == _ENTRY:
                given[slot]["linkIds"].append(number)
        made: list[dict[str, Any]] = []
        for slot, (name, link) in enumerate(self.exits):
            (node,) = (node for node in nodes if node["id"] == link.node.number)
            output = node["outputs"][link.slot]
            number = len(links) + 1
            output["links"].append(number)
            links.append([number, link.node.number, link.slot, _EXIT, slot, output["type"]])
            made.append({"id": self._id("out", name), "name": name, "type": output["type"], "linkIds": [number]})
        by_link = {entry["link"]: entry for node in nodes for entry in node["inputs"] if entry["link"]}
        names = ("id", "origin_id", "origin_slot", "target_id", "target_slot", "type")
        return {
            "revision": 0,
            "last_node_id": 1,
            "last_link_id": 0,
            "nodes": [self._face(given, made, by_link)],
            "links": [],
            "version": 0.4,
            "definitions": {
                "subgraphs": [
                    {
                        "id": self._id(),
                        "version": 1,
                        "state": {
                            "lastGroupId": 0,
                            "lastNodeId": len(self.nodes) + 1,
                            "lastLinkId": len(links),
                            "lastRerouteId": 0,
                        },
                        "revision": 0,
                        "config": {},
                        "name": self.name,
                        "description": self.note,
                        "inputNode": {"id": _ENTRY, "bounding": [-_WIDTH - 60, 0, _WIDTH, 40 + 20 * len(given)]},
                        "outputNode": {
                            "id": _EXIT,
                            "bounding": [self.left(len(self.widths)), 0, _WIDTH, 40 + 20 * len(made)],
                        },
                        "inputs": given,
                        "outputs": made,
                        "widgets": [],
                        "nodes": nodes,
                        "groups": [],
                        "links": [dict(zip(names, link, strict=True)) for link in links],
                        "extra": {},
                    }
                ]
            },
            "extra": {"BlueprintDescription": self.note, "BlueprintSearchAliases": list(self.words)},
        }

    def _face(
        self, given: list[dict[str, Any]], made: list[dict[str, Any]], by_link: dict[int, dict[str, Any]]
    ) -> dict[str, Any]:
        inputs: list[dict[str, Any]] = []
        for entry in given:
            shown = {"name": entry["name"], "type": entry["type"], "link": None}
            if "widget" in by_link[entry["linkIds"][0]]:
                shown["widget"] = {"name": entry["name"]}
            inputs.append(shown)
        tall = sum(30 if "widget" in entry else 0 for entry in inputs) + 80 * sum(
            entry["type"] == "STRING" for entry in inputs
        )
        return {
            "id": 1,
            "type": self._id(),
            "pos": [0, 0],
            "size": [340, 140 + tall],
            "flags": {},
            "order": 0,
            "mode": 0,
            "inputs": inputs,
            "outputs": [{"name": entry["name"], "type": entry["type"], "links": []} for entry in made],
            "properties": {},
            "widgets_values": [],
            "title": self.name,
        }


def _zipped(blueprint: Blueprint) -> Node:
    """Zip LoRAs with the two files and their prompts on the face."""
    blueprint.column("Zip")
    return blueprint.add(
        "ZipLoRAs",
        model=blueprint.enter("model", "MODEL"),
        clip=blueprint.enter("clip", "CLIP"),
        subject_lora=blueprint.enter("subject_lora", "COMBO"),
        subject_prompt=blueprint.enter("subject_prompt", "STRING"),
        style_lora=blueprint.enter("style_lora", "COMBO"),
        style_prompt=blueprint.enter("style_prompt", "STRING"),
    )


def zip_two() -> Blueprint:
    made = Blueprint(
        "Zip two LoRAs",
        "Zips a subject LoRA and a style LoRA, with a dial for the style. It goes between the checkpoint and KSampler.",
        words=("zip", "merge lora", "style strength"),
    )
    zipped = _zipped(made)
    made.column("Dial")
    dial = made.add("StyleStrength", zipped_lora=zipped[2], style_strength=made.enter("style_strength", "FLOAT"))
    applied = made.add(
        "ApplyZippedLoRA",
        model=zipped.inputs["model"],
        zipped_lora=dial[0],
        clip=zipped.inputs["clip"],
    )
    return made.leave(model=applied[0], clip=applied[1], report=zipped[3])


def zip_stack() -> Blueprint:
    made = Blueprint(
        "Zip my stack",
        "Zips the LoRAs of a stack, from any pack's LoRA stacker: where the stack would be applied. A prompt for each "
        "in a line of stack_prompts; an empty line for the trigger words that the file names.",
        words=("zip", "lora stack", "merge lora"),
    )
    made.column("Zip")
    zipped = made.add(
        "ZipLoRAs",
        model=made.enter("model", "MODEL"),
        clip=made.enter("clip", "CLIP"),
        lora_stack=made.enter("lora_stack", "LORA_STACK"),
        stack_prompts=made.enter("stack_prompts", "STRING"),
        quality=made.enter("quality", "COMBO"),
    )
    return made.leave(model=zipped[0], clip=zipped[1], report=zipped[3])


def compare() -> Blueprint:
    made = Blueprint(
        "Compare two LoRAs",
        "One labelled strip with one seed: each LoRA alone, both stacked, and zipped with less and more style; a row "
        "for each line of what_to_draw.",
        words=("compare merges", "compare loras"),
    )
    zipped = _zipped(made)
    made.column("Compare")
    compared = made.add(
        "CompareMerges",
        model=zipped.inputs["model"],
        clip=zipped.inputs["clip"],
        vae=made.enter("vae", "VAE"),
        zipped_lora=zipped[2],
        prompts=made.enter("what_to_draw", "STRING"),
    )
    return made.leave(images=compared[0], report=zipped[3])


BLUEPRINTS: tuple[Callable[[], Blueprint], ...] = (zip_two, zip_stack, compare)
