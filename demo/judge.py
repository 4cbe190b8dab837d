"""Three small classifiers that score pictures: what is drawn, in which style, and where.

They learn from true renderings only, never from a generated picture: every base shape and every subject in
every style, base and new. So they can say whether a generated "subject in style" is right.
"""

from __future__ import annotations

import dataclasses
import random
import time
from collections.abc import Sequence

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import functional as F

from . import parallel, world
from .miniature import write_safetensors

SHAPE_NAMES = [*world.SHAPES, *world.SUBJECTS]
STYLE_NAMES = list(world.STYLES)
OTHER = "other"  # a class that a judge may have besides: any figure, or any style, that has no name here
VIEW = 64  # the judges look at half size
GRID = 4  # cells across, for the judge of places


class Classifier(nn.Module):
    """A small convolutional network on 64 x 64 pictures; `grid` x `grid` cells tell it where things are."""

    def __init__(self, classes: int, widths: tuple[int, ...] = (16, 24, 40, 64), grid: int = 1):
        super().__init__()
        self.grid = grid
        layers: list[nn.Module] = []
        before = 3
        for width in widths:
            layers += [
                nn.Conv2d(before, width, 3, stride=2 if before != 3 else 1, padding=1),
                nn.GroupNorm(8, width),
                nn.ReLU(),
                nn.Conv2d(width, width, 3, padding=1, groups=8),
                nn.GroupNorm(8, width),
                nn.ReLU(),
            ]
            before = width
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(before * (grid * grid + 1), classes)

    def features(self, pictures: Tensor) -> Tensor:
        """B3HW in 0..1 -> B x 128 (for a grid of one)."""
        x = self.body(F.interpolate(pictures, size=(VIEW, VIEW), mode="area") * 2 - 1)
        return torch.cat([F.adaptive_avg_pool2d(x, self.grid).flatten(1), x.amax((2, 3))], dim=1)

    def forward(self, pictures: Tensor) -> Tensor:
        return self.head(self.features(pictures))


@dataclasses.dataclass
class Judge:
    """The classifiers, and the names of the classes of the first two (places: `world.PLACES`)."""

    shape: Classifier
    style: Classifier
    place: Classifier
    shape_names: list[str]
    style_names: list[str]

    @torch.no_grad()
    def scores(self, pictures: Tensor) -> dict[str, Tensor | list[str]]:
        """pictures: B3HW in 0..1, any size.

        Returns "shape", "style" and "place" (probabilities, B x names), their "shape_names" and "style_names", and
        "features" (B x 256, the last layers of shape and style) for distances.
        """
        pictures = pictures.float()
        return {
            "shape": self.shape(pictures).softmax(-1),
            "style": self.style(pictures).softmax(-1),
            "place": self.place(pictures).softmax(-1),
            "shape_names": self.shape_names,
            "style_names": self.style_names,
            "features": torch.cat([self.shape.features(pictures), self.style.features(pictures)], dim=1),
        }

    def right(self, pictures: Tensor, shape: str | None = None, style: str | None = None) -> Tensor:
        """B booleans: the named shape and style are both the most likely ones (None is always right)."""
        found = self.scores(pictures)
        good = torch.ones(pictures.shape[0], dtype=torch.bool)
        for name, names, key in ((shape, self.shape_names, "shape"), (style, self.style_names, "style")):
            if name is not None:
                good &= found[key].argmax(-1).cpu() == names.index(name)  # type: ignore[union-attr]
        return good


def load_judge(path: str) -> Judge:
    """Reads the classifiers written by `fit`. Raises FileNotFoundError or KeyError where something is missing."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        tensors = {key: file.get_tensor(key).float() for key in file.keys()}
    shape_names, style_names = metadata["shapes"].split(), metadata["styles"].split()
    where = Classifier(len(world.PLACES), grid=GRID)
    judge = Judge(Classifier(len(shape_names)), Classifier(len(style_names)), where, shape_names, style_names)
    for name in ("shape", "style", "place"):
        part = {k.split(".", 1)[1]: v for k, v in tensors.items() if k.startswith(name + ".")}
        getattr(judge, name).load_state_dict(part)
        getattr(judge, name).eval()
    return judge


def draw(
    count: int,
    rng: random.Random,
    device: str = "cpu",
    shape_names: Sequence[str] = SHAPE_NAMES,
    style_names: Sequence[str] = STYLE_NAMES,
) -> tuple[Tensor, dict[str, Tensor]]:
    """True renderings: (pictures as bytes, class numbers by judge), all pairs of shape and style equally likely.

    An object near the middle has no place: -1.
    """
    scenes, shapes, styles = [], [], []
    for _ in range(count):
        shape, style = rng.randrange(len(shape_names)), rng.randrange(len(style_names))
        name = shape_names[shape]
        known = style_names[style] if style_names[style] != OTHER else "flat"
        if name in world.SUBJECTS:
            scene = world.subject_scene(name, known, rng)
        elif name == OTHER:
            scene = dataclasses.replace(world.shape_scene("circle", "red", known, rng), parts=world.random_figure(rng))
        else:
            scene = world.shape_scene(name, rng.choice(list(world.COLOURS)), known, rng)
        if style_names[style] == OTHER:
            scene = dataclasses.replace(scene, style=world.random_style(rng))
        scenes.append(scene)
        shapes.append(shape)
        styles.append(style)
    chunk = 4 if device == "cpu" else 256
    pictures = [(world.render(scenes[i : i + chunk], device) * 255).round().byte() for i in range(0, count, chunk)]
    places = [world.PLACES.index(where) if (where := world.place(scene)) else -1 for scene in scenes]
    truth = {"shape": shapes, "style": styles, "place": places}
    return torch.cat(pictures), {name: torch.tensor(numbers, device=device) for name, numbers in truth.items()}


def _worsen(pictures: Tensor) -> Tensor:
    """Blurs, noise and small colour changes, so that a soft or speckled picture is still judged by its content."""
    count = pictures.shape[0]
    if random.random() < 0.5:
        small = random.choice([48, 64, 80])
        pictures = F.interpolate(
            F.interpolate(pictures, size=(small, small), mode="area"), size=(128, 128), mode="bilinear"
        )
    gain = 1 + 0.08 * torch.randn(count, 3, 1, 1, device=pictures.device)
    noise = 0.04 * torch.rand(count, 1, 1, 1, device=pictures.device) * torch.randn_like(pictures)
    return (pictures * gain + noise).clamp(0, 1)


def fit(
    path: str,
    device: str,
    pictures: int,
    steps: int,
    batch: int = 32,
    shape_names: Sequence[str] = SHAPE_NAMES,
    style_names: Sequence[str] = STYLE_NAMES,
) -> None:
    """Trains the classifiers on `pictures` renderings, prints their accuracy on unseen ones, writes the file."""
    started = time.time()
    random.seed(50 + parallel.rank())
    torch.manual_seed(7)
    share = pictures // parallel.count()
    images, truth = draw(share, random.Random(50 + parallel.rank()), device, shape_names, style_names)
    judges = {
        "shape": Classifier(len(shape_names)).to(device),
        "style": Classifier(len(style_names)).to(device),
        "place": Classifier(len(world.PLACES), grid=GRID).to(device),
    }
    torch.manual_seed(70 + parallel.rank())
    params = [p for judge in judges.values() for p in judge.parameters()]
    optimiser = torch.optim.AdamW(params, 3e-3, weight_decay=0.02)
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = 3e-3 * min(1.0, (step + 1) / 50) * (1 - step / steps)
        chosen = torch.randint(share, (batch // parallel.count(),), device=device)
        view = _worsen(images[chosen].float() / 255)
        losses = [F.cross_entropy(judge(view), truth[name][chosen], ignore_index=-1) for name, judge in judges.items()]
        loss = torch.stack(losses).sum()
        optimiser.zero_grad()
        loss.backward()
        parallel.average_gradients(params)
        optimiser.step()
        if parallel.rank() == 0 and (step + 1) % 200 == 0:
            print(f"judge step {step + 1} loss {loss.item():.3f} {time.time() - started:.0f} s", flush=True)
    if parallel.rank() != 0:
        return
    state = {f"{name}.{k}": v for name, judge in judges.items() for k, v in judge.state_dict().items()}
    names = {"shapes": " ".join(shape_names), "styles": " ".join(style_names)}
    write_safetensors({k: v.cpu().half().contiguous() for k, v in state.items()}, path, names)
    for name, accuracy in unseen_accuracy(load_judge(path)).items():
        print(f"judge of {name}: {accuracy:.3f} of {UNSEEN} unseen renderings", flush=True)


UNSEEN = 512


def unseen_accuracy(judge: Judge, seed: int = 999) -> dict[str, float]:
    """Share right of true renderings that no training saw, by judge; places of those that have one."""
    pictures, truth = draw(UNSEEN, random.Random(seed), "cpu", judge.shape_names, judge.style_names)
    found = [judge.scores(part.float() / 255) for part in pictures.split(64)]
    accuracy = {}
    for name, numbers in truth.items():
        guess = torch.cat([f[name] for f in found]).argmax(-1)  # type: ignore[misc]
        known = numbers >= 0
        accuracy[name] = float((guess == numbers)[known].float().mean())
    return accuracy
