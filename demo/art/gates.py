"""The gates of the second world: what share of 64 generated pictures, of three seeds each, the judges call right."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from torch import Tensor

from ..gates import CFG, generate
from ..miniature import Miniature
from . import scenes
from .concepts import OTHER_TECHNIQUES, Concept, style_subjects
from .judge import Judge
from .techniques import BASE_TECHNIQUES

COUNT = 64
SEEDS = (1000, 2000, 3000)
WANTED = {
    "base": {"subject": 0.85, "style": 0.90},
    "held out": {"subject and style": 0.60},
    "content": {"design": 0.85, "design in other techniques": 0.60},
    "style": {"style": 0.80, "subject": 0.65},
}


def rights(judge: Judge, pictures: Tensor, **wanted: Sequence[str]) -> dict[str, float]:
    """Share right by head, and of all these heads at once, as 'subject and style'."""
    said = judge.answers(pictures)
    right = {
        head: torch.tensor([a == b for a, b in zip(said[head], names, strict=True)]) for head, names in wanted.items()
    }
    out = {head: float(values.float().mean()) for head, values in right.items()}
    if len(right) > 1:
        out[" and ".join(right)] = float(torch.stack(list(right.values())).all(0).float().mean())
    return out


def _mean(parts: Sequence[dict[str, float]]) -> dict[str, float]:
    return {key: round(sum(part[key] for part in parts) / len(parts), 3) for key in parts[0]}


def base_gate(
    mini: Miniature,
    judge: Judge,
    world: scenes.World,
    *,
    held_out: bool = False,
    seeds: Sequence[int] = SEEDS,
    cfg: float = CFG,
) -> tuple[dict[str, float], Tensor]:
    """The base's own words: sets and techniques alike; or pairs of subject and set that it never saw."""
    found, shown = [], []
    for seed in seeds:
        rng = random.Random(seed)
        wanted = []
        for _ in range(COUNT):
            if held_out:
                wanted.append(rng.choice(sorted(world.held_out)))
                continue
            subject = rng.choice(world.subjects)
            technique = rng.random() < scenes.TECHNIQUE_SHARE
            wanted.append((subject, rng.choice(list(BASE_TECHNIQUES) if technique else world.sets_of[subject])))
        prompts = [scenes.prompt(subject, style) for subject, style in wanted]
        pictures = generate(mini, prompts, seed, cfg=cfg)
        found.append(rights(judge, pictures, subject=[w[0] for w in wanted], style=[w[1] for w in wanted]))
        shown.append(pictures)
    return _mean(found), torch.cat(shown)


def subject_gate(
    mini: Miniature, judge: Judge, concept: Concept, seeds: Sequence[int] = SEEDS
) -> tuple[dict[str, float], Tensor]:
    """With the subject's LoRA on the model: its design, plain, and in techniques that its pictures lack."""
    found, shown = [], []
    techniques = [OTHER_TECHNIQUES[i % len(OTHER_TECHNIQUES)] for i in range(COUNT)]
    for seed in seeds:
        grounds = random.Random(seed).choices([g for g in scenes.GROUNDS if g not in scenes.DARK_GROUNDS], k=COUNT)
        plain = [scenes.prompt(concept.noun, design=concept.identifier, ground=ground) for ground in grounds]
        alone = generate(mini, plain, seed)
        styled = generate(mini, [concept.prompt(technique) for technique in techniques], seed + 1)
        names = [concept.name] * COUNT
        first = rights(judge, alone, design=names)
        other = rights(judge, styled, design=names, style=techniques)
        keys = {
            "design": "design in other techniques",
            "style": "technique",
            "design and style": "design and technique",
        }
        found.append(first | {keys[key]: value for key, value in other.items()})
        shown.append(torch.cat([alone[:8], styled[:16]]))
    return _mean(found), torch.cat(shown)


def style_gate(
    mini: Miniature, judge: Judge, concept: Concept, world: scenes.World, seeds: Sequence[int] = SEEDS
) -> tuple[dict[str, float], Tensor]:
    """With the style's LoRA on the model: style and subject, on subjects that its pictures lack."""
    found, shown = [], []
    unseen = style_subjects(world)[1]
    nouns = [unseen[i % len(unseen)] for i in range(COUNT)]
    for seed in seeds:
        pictures = generate(mini, [concept.prompt(noun) for noun in nouns], seed)
        found.append(rights(judge, pictures, subject=nouns, style=[concept.name] * COUNT))
        shown.append(pictures[: len(unseen)])
    return _mean(found), torch.cat(shown)


def passes(kind: str, figures: dict[str, float]) -> bool:
    """Whether every figure that is wanted of the kind is reached."""
    return all(figures[name] >= least for name, least in WANTED[kind].items())
