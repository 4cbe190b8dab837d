"""The gates: what share of 32 generated pictures the judges call right."""

from __future__ import annotations

import random

import torch
from torch import Tensor

from . import world
from .concepts import KNOWN_STYLES, PLAIN, UNSEEN_SHAPES, Concept, style_prompt, subject_prompt
from .judge import Judge
from .miniature import Miniature, half_is_fast

COUNT = 32
STEPS = 20
CFG = 3.0


def generate(model: Miniature, prompts: list[str], seed: int, steps: int = STEPS, cfg: float = CFG) -> Tensor:
    """B3HW pictures in 0..1 on the CPU."""
    with torch.autocast(model.device.type, torch.bfloat16, enabled=half_is_fast(model.device.type)):
        latents = model.sample(prompts, seed, steps, cfg)
    return model.pictures(latents).cpu()


def rights(judge: Judge, pictures: Tensor, shapes: list[str], styles: list[str]) -> dict[str, float]:
    found = judge.scores(pictures)
    shape = found["shape"].argmax(-1) == torch.tensor([judge.shape_names.index(s) for s in shapes])  # type: ignore
    style = found["style"].argmax(-1) == torch.tensor([judge.style_names.index(s) for s in styles])  # type: ignore
    return {
        "shape": float(shape.float().mean()),
        "style": float(style.float().mean()),
        "both": float((shape & style).float().mean()),
    }


def base_gates(model: Miniature, judge: Judge, seed: int, held_out: bool = False) -> tuple[dict[str, float], Tensor]:
    """Shape and style right on prompts of the base's own words (or on the pairs it never saw)."""
    rng = random.Random(seed)
    pairs = [
        (shape, style)
        for shape in world.SHAPES
        for style in world.BASE_STYLES
        if ((shape, style) in world.HELD_OUT) == held_out
    ]
    chosen = [rng.choice(pairs) for _ in range(COUNT)]
    prompts = [world.prompt(shape, rng.choice(list(world.COLOURS)), style) for shape, style in chosen]
    pictures = generate(model, prompts, seed)
    return rights(judge, pictures, [c[0] for c in chosen], [c[1] for c in chosen]), pictures


def subject_gates(model: Miniature, judge: Judge, concept: Concept, seed: int) -> tuple[dict[str, float], Tensor]:
    """With the subject's LoRA on the model: its subject in the plain style, and in known styles without a picture."""
    plain = generate(model, [subject_prompt(concept.identifier)] * COUNT, seed)
    styles = [KNOWN_STYLES[i % len(KNOWN_STYLES)] for i in range(COUNT)]
    styled = generate(model, [subject_prompt(concept.identifier, s) for s in styles], seed + 1)
    alone = rights(judge, plain, [concept.name] * COUNT, [PLAIN] * COUNT)
    known = rights(judge, styled, [concept.name] * COUNT, styles)
    figures = {
        "subject": alone["shape"],
        "subject_in_known_style": known["shape"],
        "known_style": known["style"],
        "both_in_known_style": known["both"],
    }
    return figures, torch.cat([plain[:8], styled[:16]])


def style_gates(model: Miniature, judge: Judge, concept: Concept, seed: int) -> tuple[dict[str, float], Tensor]:
    """With the style's LoRA on the model: style, and style and shape, on shapes that its pictures lack."""
    rng = random.Random(seed)
    shapes = [UNSEEN_SHAPES[i % len(UNSEEN_SHAPES)] for i in range(COUNT)]
    prompts = [style_prompt(concept.identifier, s, rng.choice(list(world.COLOURS))) for s in shapes]
    pictures = generate(model, prompts, seed)
    right = rights(judge, pictures, shapes, [concept.name] * COUNT)
    return {"style": right["style"], "shape": right["shape"], "both": right["both"]}, pictures[:24]


def leak_gates(model: Miniature, judge: Judge, seed: int) -> float:
    """With any LoRA on the model: share of the base's own prompts that still come out right in both."""
    return base_gates(model, judge, seed)[0]["both"]


def passes(concept: Concept, figures: dict[str, float]) -> bool:
    if concept.kind == "content":
        return figures["subject"] >= 0.8 and figures["subject_in_known_style"] >= 0.5
    return figures["style"] >= 0.8 and figures["both"] >= 0.6
