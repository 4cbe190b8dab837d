"""The miniature, to train on with the pack's own nodes and to judge what comes of it: for training.py."""

from __future__ import annotations

import contextlib
import functools
import random
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file

from demo import concepts, gates, judge, lora, miniature, world
from devhost.base import find_miniature
from devhost.inprocess import load_miniature_extension, load_pack

STEPS, RATE, RANK, BATCH = 450, 2e-3, 16, 8
CLASS_PROMPT = "a figure in flat style"
CASES = (("mushroom", "ember"), ("house", "mint"), ("icecream", "dusk"), ("lamp", "poster"))
_SETTINGS = ("steps", "learning_rate", "rank", "batch_size", "prior_weight")
Layers = dict[str, tuple[torch.Tensor, torch.Tensor]]  # layer -> (up, down)
Halves = dict[str, Layers]


class Bench:
    """The miniature twice: as ComfyUI loads it, to train on, and as the demo loads it, to be judged."""

    def __init__(self) -> None:
        self.pack = load_pack()
        load_miniature_extension()
        import comfy.sd
        import folder_paths

        found = find_miniature()
        self.folder = found.checkpoint.parent.parent
        self.output = Path(tempfile.mkdtemp())
        folder_paths.set_output_directory(str(self.output))
        with torch.inference_mode():
            self.model, self.clip, self.vae, _ = comfy.sd.load_checkpoint_guess_config(str(found.checkpoint))
        self.judged = miniature.load_miniature(str(found.checkpoint))
        self.names = {lora.file_name(name): name for name, _ in self.judged.unet.named_modules()}
        self.jury = judge.load_judge(str(self.folder / "weights" / "judge.safetensors"))
        self.concepts = {concept.name: concept for concept in concepts.concepts()}

    def shown(self, concept: concepts.Concept) -> Any:
        files = [self.folder / concept.picture(i) for i in range(len(concept.scenes))]
        frames = [torch.frombuffer(bytearray(Image.open(f).convert("RGB").tobytes()), dtype=torch.uint8) for f in files]
        images = torch.stack(frames).reshape(len(frames), 128, 128, 3) / 255
        return self.pack.nodes.bridge.training.pictures.TrainingImages([images], list(concept.prompts))

    def settings(self, **changes: Any) -> Any:
        asked = {"steps": STEPS, "learning_rate": RATE, "rank": RANK, "batch_size": BATCH, **changes}
        return self.pack.ziplora_core.training.Settings(**asked)

    def train(self, concept: concepts.Concept, seed: int, **changes: Any) -> tuple[Path, float]:
        """(file, seconds)"""
        training = self.pack.nodes.bridge.training.concept
        settings = self.settings(seed=seed, **{k: changes.pop(k) for k in list(changes) if k in _SETTINGS})
        task = training.Task([self.shown(concept)], settings, f"loras/{concept.name}", 128, **changes)
        began = time.monotonic()
        with torch.inference_mode():
            done = training.train_concept(self.model, self.clip, self.vae, task)
        return self.output / done.file, time.monotonic() - began

    def gates(self, concept: concepts.Concept, file: Path, seed: int = 1000) -> dict[str, float]:
        """As `demo.train --parts gates` judges a LoRA file."""
        with self.file(file):
            gate = gates.subject_gates if concept.kind == "content" else gates.style_gates
            figures, _ = gate(self.judged, self.jury, concept, seed)
            return {**figures, "base": gates.leak_gates(self.judged, self.jury, seed + 7)}

    @functools.cache  # noqa: B019
    def true_features(self, shape: str, style: str) -> torch.Tensor:
        """The judge's mean features of true renderings."""
        rng = random.Random(f"truth {shape} {style}")
        colours = list(world.COLOURS)
        scenes = [
            world.subject_scene(shape, style, rng)
            if shape in world.SUBJECTS
            else world.shape_scene(shape, rng.choice(colours), style, rng)
            for _ in range(gates.COUNT)
        ]
        features: torch.Tensor = self.jury.scores(world.render(scenes))["features"]
        return features.mean(0)

    def drift(self, concept: concepts.Concept, file: Path | None, seed: int = 2000) -> float:
        """Share of pictures of the class in which the judge sees the subject."""
        with contextlib.nullcontext() if file is None else self.file(file):
            pictures = gates.generate(self.judged, [CLASS_PROMPT] * gates.COUNT, seed)
        return float(self.jury.right(pictures, shape=concept.name).float().mean())

    @contextlib.contextmanager
    def file(self, file: Path) -> Iterator[None]:
        """A LoRA file on the judged model."""
        tensors = load_file(str(file))
        rank = next(t.shape[0] for k, t in tensors.items() if k.endswith("lora_down.weight"))
        branches = lora.attach(self.judged.unet, rank, float(rank))
        try:
            lora.load_into(branches, tensors)
            yield
        finally:
            lora.detach(self.judged.unet, branches)


def line(name: str, figures: dict[str, float]) -> str:
    return f"{name:40}" + "  ".join(f"{k} {v:.2f}" for k, v in figures.items())


def spread(several: list[dict[str, float]]) -> str:
    spreads = {k: (statistics.mean(v), statistics.pstdev(v)) for k in several[0] for v in [[f[k] for f in several]]}
    return "  ".join(f"{k} {mean:.2f} ± {sd:.2f}" for k, (mean, sd) in spreads.items())


@contextlib.contextmanager
def attached(bench: Bench, halves: Halves) -> Iterator[None]:
    """These LoRAs added up on the judged model."""
    rank = sum(max(up.shape[1] for up, _ in layers.values()) for layers in halves.values())
    branches = lora.attach(bench.judged.unet, rank, float(rank))
    try:
        with torch.no_grad():
            for name, branch in branches.items():
                branch.up.zero_(), branch.down.zero_()
                start = 0
                for up, down in (layers[name] for layers in halves.values() if name in layers):
                    end = start + up.shape[1]
                    branch.up[:, start:end], branch.down[start:end] = up, down
                    start = end
        yield
    finally:
        lora.detach(bench.judged.unet, branches)


def of_file(names: dict[str, str], tensors: dict[str, torch.Tensor], blocks: tuple[str, ...] = ("",)) -> Layers:
    """Layers by the judged model's names, of kohya's. names: `Bench.names`. blocks: starts of the former."""
    found = {}
    for key in tensors:
        name = key.removesuffix(".lora_up.weight")
        if name != key and names[name].startswith(blocks):
            found[names[name]] = (tensors[key].float(), tensors[f"{name}.lora_down.weight"].float())
    return found
