"""Trains the judges on true renderings, drawn anew all the time; resumable."""

from __future__ import annotations

import dataclasses
import random
import time
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import parallel
from ..judge import _worsen
from . import atlas, judge, scenes
from .fit_vae import save
from .optimizers import Optimizers


@dataclasses.dataclass(frozen=True)
class JudgeSettings:
    """kept: pictures drawn at a time (over all processes); each batch replaces `fresh` of them."""

    steps: int = 12000
    batch: int = 64
    kept: int = 8000
    fresh: int = 12
    learning_rate: float = 3e-3  # of matrices, by Muon
    adam_rate: float = 2e-3  # of all else
    save_seconds: float = 120.0


ON_A_GPU = JudgeSettings(steps=3000, batch=256, kept=60000, fresh=100)


class Drawn:
    """A store of renderings, some of which are always replaced by new ones."""

    def __init__(self, world: scenes.World, count: int, seed: str, device: str):
        self.world, self.device = world, device
        self.rng = random.Random(seed)
        self.pictures = torch.zeros(count, 3, atlas.SIZE, atlas.SIZE, dtype=torch.uint8, device=device)
        self.truth = {head: torch.full((count,), -1, device=device) for head in judge.NAMES}
        self.next = 0
        chunk = 16 if device == "cpu" else 250
        for _ in range(0, count, chunk):
            self.renew(min(chunk, count))

    def renew(self, count: int) -> None:
        """Replaces the oldest `count` pictures."""
        found = [judge.any_scene(self.world, self.rng) for _ in range(count)]
        places = (torch.arange(count, device=self.device) + self.next) % len(self.pictures)
        self.next = (self.next + count) % len(self.pictures)
        self.pictures[places] = (scenes.render(self.world.atlas, found, self.device) * 255).round().byte()
        for head, values in judge.numbers(found).items():
            self.truth[head][places] = values.to(self.device)

    def batch(self, count: int) -> tuple[Tensor, dict[str, Tensor]]:
        chosen = torch.randint(len(self.pictures), (count,), device=self.device)
        view = _worsen(self.pictures[chosen].float() / 255).contiguous(memory_format=torch.channels_last)
        return view, {head: values[chosen] for head, values in self.truth.items()}


def fit(work: Path, device: str, settings: JudgeSettings) -> None:
    """One process's part; the first one writes the weights."""
    rank, count = parallel.rank(), parallel.count()
    world = scenes.World(atlas.load(work / "atlas.safetensors"))
    torch.manual_seed(7)
    model = judge.Judge().to(device).to(memory_format=torch.channels_last)
    params = list(model.parameters())
    ends = [model.stem, model.heads]
    optimizers = Optimizers(params, ends, settings.learning_rate, settings.adam_rate, 0.02)
    state_file, output, begin = work / "weights" / "judge.state", work / "weights" / "judge.safetensors", 0
    if state_file.exists():
        state = torch.load(state_file, map_location=device)
        model.load_state_dict(state["model"])
        optimizers.load(state["optimizers"])
        begin = state["step"]
    torch.manual_seed(70 + rank + 101 * begin)
    random.seed(50 + rank + 101 * begin)
    drawn = Drawn(world, settings.kept // count, f"judge {rank} {begin}", device)
    started, saved = time.time(), time.time()
    for step in range(begin, settings.steps):
        drawn.renew(max(1, settings.fresh // count))
        view, right = drawn.batch(settings.batch // count)
        with parallel.half(device):
            said = model(view)
        losses = {h: F.cross_entropy(said[h].float(), right[h], ignore_index=-1) for h in said if (right[h] >= 0).any()}
        loss = torch.stack(list(losses.values())).sum()
        for p in params:
            p.grad = None
        loss.backward()
        parallel.average_gradients(params)
        optimizers.step(min(1.0, (step + 1) / 100) * (1 - step / settings.steps))
        last = step + 1 == settings.steps
        if rank == 0 and (step + 1) % 100 == 0:
            parts = " ".join(f"{h} {value.item():.3f}" for h, value in losses.items())
            print(f"judge step {step + 1} {parts} {time.time() - started:.0f} s", flush=True)
        if rank == 0 and (time.time() - saved > settings.save_seconds or last):
            save({"model": model.state_dict(), "optimizers": optimizers.state(), "step": step + 1}, state_file)
            judge.save(model, output)
            saved = time.time()
    if rank == 0:
        figures = judge.accuracy(judge.load(output), judge.unseen(world))
        print("judge: " + " ".join(f"{h} {share:.3f}" for h, share in figures.items()), flush=True)
