"""The miniature, to train on with the pack's own nodes and to judge what comes of it: for training.py."""

from __future__ import annotations

import contextlib
import functools
import random
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

from demo import lora, miniature
from demo.manifest import Asked, Manifest, Trained, read_manifest
from demo.truth import Truth, rights, shares
from devhost.base import find_miniature
from devhost.inprocess import load_miniature_extension, load_pack

STEPS, RATE, RANK, BATCH = 300, 1e-3, 16, 8
COUNT = 32
_SETTINGS = ("steps", "learning_rate", "rank", "batch_size", "prior_weight")
Layers = dict[str, tuple[torch.Tensor, torch.Tensor]]  # layer -> (up, down)
Halves = dict[str, Layers]


def own_folders() -> tuple[Path, Path]:
    """A new folder for the host's outputs, and one for its embeddings, in the place of the host's own."""
    import folder_paths

    output = Path(tempfile.mkdtemp())
    words = output / "embeddings"
    words.mkdir()
    folder_paths.set_output_directory(str(output))
    endings = folder_paths.folder_names_and_paths["embeddings"][1]
    folder_paths.folder_names_and_paths["embeddings"] = ([str(words)], endings)
    return output, words


def pictures_of(world: Manifest, concept: Trained, count: int | None = None) -> torch.Tensor:
    """IMAGE of a concept's pictures of reference, all or the first ones."""
    frames = [np.asarray(Image.open(world.folder / file).convert("RGB")) for file in concept.pictures[:count]]
    return torch.from_numpy(np.stack(frames)).float() / 255


def cases(world: Manifest) -> list[tuple[str, str]]:
    """Four pairs of a subject and a style that share none, or as many as there are."""
    pairs = zip(world.subjects, world.styles, strict=False)
    return [(subject.name, style.name) for subject, style in pairs][:4]


class Bench:
    """The miniature twice: as ComfyUI loads it, to train on, and as the demo loads it, to be judged."""

    def __init__(self) -> None:
        self.pack = load_pack()
        load_miniature_extension()
        import comfy.sd

        found = find_miniature()
        self.folder = found.checkpoint.parent.parent
        self.output, self.words = own_folders()
        with torch.inference_mode():
            self.model, self.clip, self.vae, _ = comfy.sd.load_checkpoint_guess_config(
                str(found.checkpoint), embedding_directory=[str(self.words)]
            )
        self.manifest = read_manifest()
        self.truth = Truth(self.manifest)
        self.judged = miniature.load_miniature(str(found.checkpoint)).to(self.model.load_device)
        self.names = {lora.file_name(name): name for name, _ in self.judged.unet.named_modules()}
        self.concepts = self.manifest.trained()

    @property
    def cases(self) -> list[tuple[str, str]]:
        return cases(self.manifest)

    def shown(self, concept: Trained) -> Any:
        images = pictures_of(self.manifest, concept)
        return self.pack.nodes.bridge.training.pictures.TrainingImages([images], list(concept.prompts))

    def settings(self, **changes: Any) -> Any:
        asked = {"steps": STEPS, "learning_rate": RATE, "rank": RANK, "batch_size": BATCH, **changes}
        return self.pack.ziplora_core.training.Settings(**asked)

    def train(self, concept: Trained, seed: int, **changes: Any) -> tuple[Path, float]:
        """(file, seconds)"""
        training = self.pack.nodes.bridge.training.concept
        settings = self.settings(seed=seed, **{k: changes.pop(k) for k in list(changes) if k in _SETTINGS})
        shown = [self.shown(concept)]
        task = training.Task(shown, settings, f"loras/{concept.name}", self.manifest.size, **changes)
        began = time.monotonic()
        with torch.inference_mode():
            done = training.train_concept(self.model, self.clip, self.vae, task)
        return self.output / done.file, time.monotonic() - began

    def ask(self, asked: Sequence[Asked], seed: int) -> dict[str, float]:
        """Shares of what is right in pictures of these prompts, by the judged model as it is."""
        pictures = miniature.generate(self.judged, [one.prompt for one in asked], seed)
        return shares(rights(self.truth, pictures, asked))

    def gates(self, concept: Trained, file: Path, seed: int = 1000) -> dict[str, float]:
        """What a LoRA file draws of its own, and of the base's words ("base")."""
        world, count = self.manifest, range(COUNT)
        with self.file(file):
            if concept.kind == "content":
                styles = [world.other_styles[i % len(world.other_styles)] for i in count]
                alone = self.ask([world.alone(concept)] * COUNT, seed)
                other = self.ask([world.restyled(concept, style) for style in styles], seed + 1)
                figures = {"alone": alone["subject"], "in other styles": other["subject"], "both": other["both"]}
            else:
                figures = self.ask([world.on_unseen(concept, i) for i in count], seed)
            figures["base"] = self.ask([world.known[i % len(world.known)] for i in count], seed + 7)["both"]
        return figures

    @functools.cache  # noqa: B019
    def true_features(self, subject: str, style: str) -> torch.Tensor:
        """The judge's mean features of true pictures."""
        rng = random.Random(f"truth {subject} {style}")
        return self.truth.features(self.truth.pictures(subject, style, COUNT, rng)).mean(0)

    def drift(self, concept: Trained, file: Path | None, seed: int = 2000) -> float:
        """Share of pictures of the class in which the judge sees the subject."""
        with contextlib.nullcontext() if file is None else self.file(file):
            return self.ask([Asked(concept.of_class, concept.name, None)] * COUNT, seed)["subject"]

    @contextlib.contextmanager
    def file(self, file: Path) -> Iterator[None]:
        """A LoRA file on the judged model."""
        branches = lora.attach_file(self.judged.unet, load_file(str(file)))
        try:
            yield
        finally:
            lora.detach(self.judged.unet, branches)

    @contextlib.contextmanager
    def said(self, words: dict[str, dict[str, torch.Tensor]]) -> Iterator[None]:
        """Vectors of an embedding's file in the place of words that the judged model's text encoders know."""
        clip, kept = self.judged.clip, []
        vocabulary = self.judged.tokenizer.clip_l.tokenizer.get_vocab()
        try:
            with torch.no_grad():
                for word, rows in words.items():
                    for key, found in rows.items():
                        table = getattr(clip, key).transformer.text_model.embeddings.token_embedding.weight
                        kept.append((table, vocabulary[word], table[vocabulary[word]].clone()))
                        table[vocabulary[word]] = found[0].to(table)
            yield
        finally:
            with torch.no_grad():
                for table, number, before in kept:
                    table[number] = before


def line(name: str, figures: dict[str, float]) -> str:
    return f"{name:38}  " + "  ".join(f"{k} {v:.2f}" for k, v in figures.items())


def spread(several: list[dict[str, float]]) -> str:
    spreads = {k: (statistics.mean(v), statistics.pstdev(v)) for k in several[0] for v in [[f[k] for f in several]]}
    return "  ".join(f"{k} {mean:.2f} ± {sd:.2f}" for k, (mean, sd) in spreads.items())


@contextlib.contextmanager
def attached(bench: Bench, halves: Halves) -> Iterator[None]:
    """These LoRAs added up on the judged model; those of no layers leave it as it is."""
    halves = {concept: layers for concept, layers in halves.items() if layers}
    if not halves:
        yield
        return
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
