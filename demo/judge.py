"""Judges of pictures: one trunk, five heads. They learn from true renderings only.

Heads: the subject; the style (a technique, else a set); the place; the ground; and the drawing: whether it is the
very design that a LoRA teaches, another drawing of its subject, or anything else.
"""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import functional as F

from .miniature import write_safetensors
from .world import scenes
from .world.sets import SETS
from .world.subjects import DESIGNS, ICONS
from .world.techniques import KEEP_GROUND, TECHNIQUES

OTHER = "other"
ANOTHER = "another "  # before a subject: one of its drawings, but not the design
WIDTHS = (24, 48, 96, 128)  # at 64, 32, 16 and 8 pixels
GRID = 4
Designs = Mapping[str, str]  # subject -> the set whose drawing of it a LoRA teaches


def kinds(designs: Designs) -> list[str]:
    """What the head for drawings says of a subject that has a design: that design, or another drawing."""
    return [*designs, *(ANOTHER + subject for subject in designs)]


def names(designs: Designs = DESIGNS) -> dict[str, list[str]]:
    """What each head may say."""
    return {
        "subject": list(ICONS),
        "style": [*SETS, *TECHNIQUES],
        "place": list(scenes.PLACES),
        "ground": list(scenes.GROUNDS),
        "design": [*kinds(designs), OTHER],
    }


def truth(scene: scenes.Scene, designs: Designs = DESIGNS) -> dict[str, str | None]:
    """What each head should say; None where a scene has no answer (a place in between, a technique's own ground)."""
    design = OTHER
    if scene.subject in designs:
        design = scene.subject if designs[scene.subject] == scene.set else ANOTHER + scene.subject
    keeps = scene.technique is None or scene.technique in KEEP_GROUND
    return {
        "subject": scene.subject,
        "style": scene.style,
        "place": scenes.place(scene),
        "ground": scene.ground if keeps else None,
        "design": design,
    }


def numbers(found: Sequence[scenes.Scene], designs: Designs = DESIGNS) -> dict[str, Tensor]:
    """Class numbers by head, -1 where there is no answer."""
    truths = [truth(scene, designs) for scene in found]
    return {
        head: torch.tensor([-1 if t[head] is None else known.index(t[head]) for t in truths])  # type: ignore[arg-type]
        for head, known in names(designs).items()
    }


def any_scene(world: scenes.World, rng: random.Random, designs: Designs = DESIGNS) -> scenes.Scene:
    """Any drawing in any technique; every fourth of a subject that has a design, half of these the design itself."""
    if rng.random() < 0.25:
        subject = rng.choice(list(designs))
        word = designs[subject] if rng.random() < 0.5 else rng.choice(world.atlas.sets_of(subject))
    else:
        subject = rng.choice(list(ICONS))
        word = rng.choice(world.atlas.sets_of(subject))
    technique = None if SETS[word].one_color or rng.random() < 0.45 else rng.choice(list(TECHNIQUES))
    return scenes.set_out(subject, word, technique, rng)


class Layer(nn.Module):
    """A convolution that may halve the size, and a residual one."""

    def __init__(self, before: int, width: int, stride: int):
        super().__init__()
        self.first = nn.Conv2d(before, width, 3, stride=stride, padding=1)
        self.norm = nn.GroupNorm(8, width)
        self.second = nn.Conv2d(width, width, 3, padding=1)
        self.norm_second = nn.GroupNorm(8, width)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.first(x)))
        return F.relu(x + self.norm_second(self.second(x)))


class Judge(nn.Module):
    """B x 3 x H x W in 0..1 -> answers by head."""

    def __init__(self, known: dict[str, list[str]] | None = None) -> None:
        super().__init__()
        self.names = known or names()
        a, b, c, d = WIDTHS
        self.stem = nn.Conv2d(3, a, 5, stride=2, padding=2)
        self.layers = nn.ModuleList([Layer(a, b, 2), Layer(b, c, 2), Layer(c, d, 2)])
        pooled, texture = 2 * d, a + b + c + d
        inputs = {"place": d * (GRID * GRID + 1), "style": pooled + texture, "ground": pooled + texture}
        self.heads = nn.ModuleDict(
            {name: nn.Linear(inputs.get(name, pooled), len(n)) for name, n in self.names.items()}
        )

    def features(self, pictures: Tensor) -> list[Tensor]:
        """Maps at 64, 32, 16 and 8 pixels (of 128)."""
        x = F.relu(self.stem(pictures * 2 - 1))
        out = [x]
        for layer in self.layers:
            x = layer(x)
            out.append(x)
        return out

    def forward(self, pictures: Tensor) -> dict[str, Tensor]:
        """Logits by head."""
        maps = self.features(pictures)
        last = maps[-1]
        top = last.amax((2, 3))
        pooled = torch.cat([last.mean((2, 3)), top], dim=1)
        texture = torch.cat([m.mean((2, 3)) for m in maps], dim=1)
        views = {"place": torch.cat([F.adaptive_avg_pool2d(last, GRID).flatten(1), top], dim=1)}
        views["style"] = views["ground"] = torch.cat([pooled, texture], dim=1)
        return {name: head(views.get(name, pooled)) for name, head in self.heads.items()}

    @torch.no_grad()
    def answers(self, pictures: Tensor) -> dict[str, list[str]]:
        """The likeliest name by head, per picture."""
        logits = [self(part.float()) for part in pictures.split(64)]
        return {
            head: [self.names[head][i] for part in logits for i in part[head].argmax(1).tolist()] for head in self.names
        }


def save(judge: Judge, path: Path) -> None:
    """Half precision, with the names."""
    state = {k: v.detach().cpu().half().contiguous() for k, v in judge.state_dict().items()}
    write_safetensors(state, str(path), {"names": json.dumps(judge.names)})


def load(path: Path) -> Judge:
    """Reads what `save` wrote. FileNotFoundError where there is none."""
    with safe_open(str(path), framework="pt") as file:
        known = json.loads(file.metadata()["names"])
        state = {key: file.get_tensor(key).float() for key in file.keys()}
    judge = Judge(known)
    judge.load_state_dict(state)
    return judge.eval()


def worsen(pictures: Tensor) -> Tensor:
    """Blurs, noise and small color changes, so that a soft or speckled picture is still judged by its content."""
    count = pictures.shape[0]
    if random.random() < 0.5:
        small = random.choice([48, 64, 80])
        pictures = F.interpolate(
            F.interpolate(pictures, size=(small, small), mode="area"), size=(128, 128), mode="bilinear"
        )
    gain = 1 + 0.08 * torch.randn(count, 3, 1, 1, device=pictures.device)
    noise = 0.04 * torch.rand(count, 1, 1, 1, device=pictures.device) * torch.randn_like(pictures)
    return (pictures * gain + noise).clamp(0, 1)


UNSEEN = 1024


@dataclasses.dataclass(frozen=True)
class Unseen:
    """True renderings that no training drew, and what is right of them."""

    pictures: Tensor  # bytes
    scenes: list[scenes.Scene]


def unseen(world: scenes.World, designs: Designs = DESIGNS, count: int = UNSEEN) -> Unseen:
    rng = random.Random("unseen")
    found = [any_scene(world, rng, designs) for _ in range(count)]
    parts = [scenes.render(world.atlas, found[i : i + 16]) for i in range(0, count, 16)]
    return Unseen(torch.cat([(part * 255).round().byte() for part in parts]), found)


def accuracy(judge: Judge, given: Unseen, designs: Designs = DESIGNS) -> dict[str, float]:
    """Share right by head, of the pictures that have an answer."""
    said = judge.answers(given.pictures.float() / 255)
    truths = [truth(scene, designs) for scene in given.scenes]
    out = {}
    for head, answers in said.items():
        right = [answer == t[head] for answer, t in zip(answers, truths, strict=True) if t[head]]
        out[head] = sum(right) / max(1, len(right))
    return out
