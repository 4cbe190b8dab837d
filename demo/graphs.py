"""Graphs in API format, all made from the one that ships: names, prompts and sizes are put in, nothing else."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

Prompt = dict[str, dict[str, Any]]

SHIPPED = Path(__file__).resolve().parent.parent / "workflows" / "api" / "every_step_with_pictures.json"


@dataclasses.dataclass(frozen=True)
class Learned:
    """What a graph needs to know of one LoRA: its file, a reference picture and the prompt that it goes with."""

    file: str
    picture: str
    prompt: str


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Steps of the sampler and strength of the guidance; None: as shipped."""

    steps: int | None = None
    cfg: float | None = None


@dataclasses.dataclass(frozen=True)
class Drawing:
    """What to draw, how often, from which noise, and how."""

    prompt: str
    count: int
    seed: int
    sampling: Sampling = Sampling()


class Graphs:
    """Prompts for one checkpoint at one picture size, from the shipped file.

    Nodes are found by their type and by what they are connected to, so the file may be edited and renumbered.
    `optimise`, `report` and `save` are the ids of the nodes whose outputs are read.
    """

    def __init__(self, checkpoint: str, size: int, shipped: Path = SHIPPED):
        self.shipped: Prompt = json.loads(shipped.read_text(encoding="utf-8"))
        self.optimise = self.only("ZipLoRAOptimize")
        self.pair = self.only("LoadLoRAPair")
        self.dial = self.only("StyleStrength")
        self.apply = self.only("ApplyZippedLoRA")
        self.sampler = self.only("KSampler")
        self.report = self.only("PreviewAny")
        self.save = self.only("SaveImage")
        self.shipped[self.only("CheckpointLoaderSimple")]["inputs"]["ckpt_name"] = checkpoint
        for node in self.shipped.values():
            if node["class_type"] in ("ImageScale", "EmptyLatentImage"):
                node["inputs"].update(width=size, height=size)

    def only(self, kind: str) -> str:
        """Id of the one node of a type. ValueError where there is none, or more."""
        found = [key for key, node in self.shipped.items() if node["class_type"] == kind]
        if len(found) != 1:
            raise ValueError(f"the shipped graph has {len(found)} nodes of type {kind}; expected one")
        return found[0]

    def before(self, node: str, name: str, kind: str) -> str:
        """Id of the nearest node of a type up the chain that ends in an input."""
        link = self.shipped[node]["inputs"][name]
        while isinstance(link, list):
            inputs = self.shipped[link[0]]["inputs"]
            if self.shipped[link[0]]["class_type"] == kind:
                return str(link[0])
            link = inputs.get("pixels") or inputs.get("image")
        raise ValueError(f"no {kind} leads to {name} of node {node} in the shipped graph")

    def zipped(self, content: Learned, style: Learned, drawing: Drawing, style_strength: float = 1.0) -> Prompt:
        """The shipped graph itself."""
        prompt = self.drawn(drawing)
        prompt[self.pair]["inputs"].update(content_lora=content.file, style_lora=style.file)
        for concept, learned in (("content", content), ("style", style)):
            picture = self.before(self.optimise, f"{concept}_latents", "LoadImage")
            words = self.before(self.optimise, f"{concept}_positive", "CLIPTextEncode")
            prompt[picture]["inputs"]["image"] = learned.picture
            prompt[words]["inputs"]["text"] = learned.prompt
        prompt[self.dial]["inputs"]["style_strength"] = style_strength
        return prompt

    def plain(self, loras: list[str], drawing: Drawing) -> Prompt:
        """The shipped graph with stock LoRA loaders in a row in place of the zipped pair: none, one, or two."""
        prompt = self.drawn(drawing)
        applied = prompt.pop(self.apply)["inputs"]
        ends = {0: applied["model"], 1: applied["clip"]}
        for number, lora in enumerate(loras):
            key = f"{self.apply}{number:03}"
            prompt[key] = {
                "class_type": "LoraLoader",
                "inputs": {
                    "model": ends[0],
                    "clip": ends[1],
                    "lora_name": lora,
                    "strength_model": 1.0,
                    "strength_clip": 1.0,
                },
            }
            ends = {0: [key, 0], 1: [key, 1]}
        for node in prompt.values():
            for name, value in node["inputs"].items():
                if isinstance(value, list) and value[0] == self.apply:
                    node["inputs"][name] = ends[value[1]]
        return self.needed(prompt)

    def drawn(self, drawing: Drawing) -> Prompt:
        """A copy of the shipped graph that draws what is asked for."""
        prompt = copy.deepcopy(self.shipped)
        inputs = prompt[self.sampler]["inputs"]
        prompt[inputs["positive"][0]]["inputs"]["text"] = drawing.prompt
        prompt[inputs["latent_image"][0]]["inputs"]["batch_size"] = drawing.count
        inputs["seed"] = drawing.seed
        wanted = dataclasses.asdict(drawing.sampling)
        inputs.update({name: value for name, value in wanted.items() if value is not None})
        return prompt

    def needed(self, prompt: Prompt) -> Prompt:
        """Only the nodes that the saved picture comes from."""
        kept: Prompt = {}
        waiting = [self.save]
        while waiting:
            key = waiting.pop()
            if key not in kept:
                kept[key] = prompt[key]
                waiting += [value[0] for value in prompt[key]["inputs"].values() if isinstance(value, list)]
        return kept
