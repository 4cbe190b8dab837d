"""Prompts in API format for the host tests. Node ids are words, the same in every graph, so that caching shows.

checkpoint -> pair -> optimise -> dial -> apply -> sampler -> decode -> save, with `report` beside it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from devhost.answers import Result
from devhost.base import CHECKPOINT

Prompt = dict[str, dict[str, Any]]
Link = list[Any]

SIZE = 128  # pixels: what the miniature was trained on
LAYERS = 56  # of the miniature that its LoRAs change
BASE: Link = ["checkpoint", 0]


@dataclass(frozen=True)
class Concept:
    """One LoRA of the miniature: its file, the prompt that it was trained with, and one of its pictures."""

    lora: str
    prompt: str
    picture: str


@dataclass(frozen=True)
class Report:
    """Figures that the optimise node's report gives: (direct merge, zipped) each."""

    content: tuple[float, float]
    style: tuple[float, float]
    overlap: tuple[float, float]

    @property
    def retention(self) -> tuple[float, float]:
        """Mean of content and style: (direct merge, zipped)."""
        return (self.content[0] + self.style[0]) / 2, (self.content[1] + self.style[1]) / 2


def node(class_type: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": class_type, "inputs": inputs}


def text(prompt: str) -> dict[str, Any]:
    return node("CLIPTextEncode", clip=["checkpoint", 1], text=prompt)


def picture(model: Link, prompt: str, steps: int = 6) -> Prompt:
    """The nodes that sample a model, with the checkpoint and its prompts."""
    return {
        "checkpoint": node("CheckpointLoaderSimple", ckpt_name=CHECKPOINT),
        "positive": text(prompt),
        "negative": text(""),
        "empty": node("EmptyLatentImage", width=SIZE, height=SIZE, batch_size=1),
        "sampler": node(
            "KSampler",
            model=model,
            positive=["positive", 0],
            negative=["negative", 0],
            latent_image=["empty", 0],
            seed=7,
            steps=steps,
            cfg=3.0,
            sampler_name="euler",
            scheduler="normal",
            denoise=1.0,
        ),
        "decode": node("VAEDecode", samples=["sampler", 0], vae=["checkpoint", 2]),
        "save": node("SaveImage", images=["decode", 0], filename_prefix="test"),
    }


def stock_loader(lora: str, model: Link, strength: float = 1.0) -> dict[str, Any]:
    return node("LoraLoaderModelOnly", model=model, lora_name=lora, strength_model=strength)


def marks(result: Result) -> list[str]:
    """What the optimise node said of its last layer and of each step, in order: "layer 56 of 56", "step 1 of 3"."""
    found = (re.match(r"layer (\d+) of \1\b|step \d+ of \d+", text) for text in result.said("optimise"))
    return [mark[0] for mark in found if mark is not None]


def expected_marks(done: int, steps: int) -> list[str]:
    """The same of so many layers and steps done: all layers or none come first."""
    layers, taken = divmod(done, LAYERS) if done >= LAYERS else (0, done)
    return [f"layer {LAYERS} of {LAYERS}"] * layers + [f"step {i + 1} of {steps}" for i in range(taken)]


def is_one_bar(seen: list[tuple[int, int]], ended: bool = True) -> bool:
    """Whether a node's progress events never fall, have one maximum, and reach it last and only once, if they ended."""
    values = [value for value, _ in seen]
    most = {maximum for _, maximum in seen}
    rises = bool(values) and values == sorted(values) and len(most) == 1
    return rises and values.count(most.pop()) == ended


def is_whole_run(result: Result, steps: int) -> bool:
    """Whether the optimise node told of one whole run: all of the miniature's layers, every step, on one bar."""
    return is_one_bar(result.progress("optimise")) and marks(result) == expected_marks(LAYERS + steps, steps)


def optimised(content: Concept, style: Concept, model: Link = BASE, **settings: Any) -> Prompt:
    """Everything up to the optimise node, and its report. `settings` go to whichever node has such an input.

    The solver is the one that does everything: layers, then steps.
    """
    pair = {"content_strength": 1.0, "style_strength": 1.0}
    numbers = {"steps": 3, "learning_rate": 0.01, "similarity_lambda": 0.01, "batch_size": 1, "seed": 0}
    optimise: dict[str, Any] = {**numbers, "solver": "layerwise, then gradient"}
    for name, value in settings.items():
        (pair if name in pair else optimise)[name] = value
    return {
        "checkpoint": node("CheckpointLoaderSimple", ckpt_name=CHECKPOINT),
        "pair": node("LoadLoRAPair", content_lora=content.lora, style_lora=style.lora, **pair),
        "content_prompt": text(content.prompt),
        "style_prompt": text(style.prompt),
        "content_picture": node("LoadImage", image=content.picture),
        "style_picture": node("LoadImage", image=style.picture),
        "content_latents": node("VAEEncode", pixels=["content_picture", 0], vae=["checkpoint", 2]),
        "style_latents": node("VAEEncode", pixels=["style_picture", 0], vae=["checkpoint", 2]),
        "optimise": node(
            "ZipLoRAOptimize",
            model=model,
            lora_pair=["pair", 0],
            content_positive=["content_prompt", 0],
            style_positive=["style_prompt", 0],
            content_latents=["content_latents", 0],
            style_latents=["style_latents", 0],
            **optimise,
        ),
        "report": node("PreviewAny", source=["optimise", 2]),
    }


def zipped_picture(
    content: Concept, style: Concept, model: Link = BASE, style_dial: float = 1.0, **settings: Any
) -> Prompt:
    """The whole graph: a picture of the zipped pair."""
    return {
        **optimised(content, style, model, **settings),
        **picture(["apply", 0], content.prompt),
        "dial": node("StyleStrength", zipped_lora=["optimise", 0], style_strength=style_dial, content_strength=1.0),
        "apply": node("ApplyZippedLoRA", model=model, zipped_lora=["dial", 0], strength=1.0),
    }


def read_report(report: str) -> Report:
    """The figures of a report. ValueError where a line is missing or holds no number."""

    def figures(pattern: str) -> tuple[float, float]:
        found = re.search(rf"^{pattern}: (\S+) direct merge, (\S+) zipped", report, re.MULTILINE)
        if found is None:
            raise ValueError(f"the report has no line '{pattern}':\n{report}")
        return float(found[1]), float(found[2])

    return Report(
        content=figures("content retention loss on held-out noise"),
        style=figures("style retention loss on held-out noise"),
        overlap=figures("overlap of coefficients"),
    )
