"""Trains the base: UNet and both text encoders together, from nothing, on latents made before.

One state file holds everything, so a stopped run goes on where it was, on however many processes; the numbers that
a step draws depend on its own number alone.
"""

from __future__ import annotations

import dataclasses
import math
import random
import re
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from ..miniature import FIRST_STAGE, Miniature, checkpoint, stratified_steps, use_comfyui, write_safetensors
from ..world import atlas, scenes
from . import latents, parallel
from .averages import Averages
from .fit_vae import save
from .optimizers import Optimizers


@dataclasses.dataclass(frozen=True)
class BaseSettings:
    """steps of `batch` latents (over all processes) out of `shards` files of them.

    fused: the UNet through torch.compile, which needs a C++ compiler and some minutes, and is 1.4 times as fast on a
    processor that multiplies in bfloat16. workers: processes that draw the captions of the next batches.
    """

    shards: int = 60
    steps: int = 14000
    batch: int = 96
    fused: bool = False
    workers: int = 0
    learning_rate: float = 3e-3  # of matrices, by Muon
    adam_rate: float = 1e-3  # of all else
    warm: int = 100
    decay_from: float = 0.3  # the rate is constant up to this part of the run, then falls along a cosine
    ema: float = 0.999
    drop: float = 0.1
    # The pooled text is that of no text in this share: what is to be drawn must also come through attention, which is
    # all that a LoRA changes.
    pooled_drop: float = 0.4
    gamma: float = 5.0  # signal-to-noise ratio above which steps count less


ON_A_GPU = BaseSettings(shards=150, steps=6000, batch=2048, workers=6, learning_rate=5e-3, adam_rate=1.5e-3)


class Tokens:
    """Prompts to rows of token numbers, as the tokenizer of `host_extension` gives them, only faster."""

    def __init__(self, mini: Miniature) -> None:
        from ..host_extension import text

        self.words = mini.tokenizer.clip_l.tokenizer.get_vocab()
        self.length, self.start, self.end, self.unknown = text.MAX_TOKENS, text.START, text.END, text.UNKNOWN

    def __call__(self, prompts: list[str]) -> Tensor:
        """B x 16. ValueError where a prompt is longer than one section."""
        rows = []
        for prompt in prompts:
            row = [self.words.get(word, self.unknown) for word in re.findall(r"[a-z]+", prompt)]
            if len(row) > self.length - 2:
                raise ValueError(f"'{prompt}' has {len(row)} words, more than the {self.length - 2} of one section")
            rows.append([self.start, *row, self.end] + [0] * (self.length - 2 - len(row)))
        return torch.tensor(rows)


class Batches(Dataset[tuple[Tensor, Tensor]]):
    """By the number of a step: the numbers of its scenes and their captions' tokens (B x 16), always the same."""

    def __init__(self, every: Sequence[scenes.Scene], tokens: Tokens, count: int, drop: float) -> None:
        self.every, self.tokens, self.count, self.drop = every, tokens, count, drop
        self.rank = parallel.rank()

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor]:
        rng = random.Random(f"base {self.rank} {step}")
        chosen = [rng.randrange(len(self.every)) for _ in range(self.count)]
        prompts = ["" if rng.random() < self.drop else scenes.caption(self.every[i], rng) for i in chosen]
        return torch.tensor(chosen), self.tokens(prompts)


def pace(step: int, done: float, settings: BaseSettings) -> float:
    """What part of the learning rates a step has, where `done` (0..1) of the training is behind it."""
    warm = min(1.0, (step + 1) / settings.warm)
    late = min(1.0, max(0.0, (done - settings.decay_from) / (1 - settings.decay_from)))
    return warm * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * late)))


def optimizers_of(mini: Miniature, settings: BaseSettings) -> Optimizers:
    """Embeddings, the UNet's first layer and its last are AdamW's."""
    embeddings = [module for module in mini.clip.modules() if isinstance(module, nn.Embedding)]
    ends = [mini.unet.input_blocks[0], mini.unet.out, *embeddings]
    return Optimizers(mini.trained_parameters(), ends, settings.learning_rate, settings.adam_rate, 0.01)


def weights(mini: Miniature, steps: Tensor, gamma: float) -> Tensor:
    """(min(SNR, gamma) + 1) / (SNR + 1) per sample, over its mean for uniform steps: of about one.

    Clipped as min-SNR (arXiv 2303.09556) clips, so that nearly clean latents, which teach little, do not take the
    most; but noisy ones keep their full weight in v, since what is drawn is decided there, by the prompt alone.
    """
    snr = mini.sigmas.square().reciprocal()
    every = (snr.clamp(max=gamma) + 1) / (snr + 1)
    return every[steps] / every.mean()


def loss(mini: Miniature, clean: Tensor, tokens: Tensor, nothing: Tensor, settings: BaseSettings) -> Tensor:
    """Mean weighted error of v. tokens: B x 16; nothing: 1 x 16, the empty prompt's."""
    context, pooled = mini.encode_tokens(tokens)
    _, empty = mini.encode_tokens(nothing)
    without = torch.rand(len(tokens), 1, device=tokens.device) < settings.pooled_drop
    vector = mini.vector(torch.where(without, empty, pooled))
    steps = stratified_steps(len(clean), clean.device)
    with parallel.half(clean.device):
        errors = mini.diffusion_loss(clean, context, vector, steps)
    return (errors * weights(mini, steps, settings.gamma)).mean()


def fit(comfyui: str, work: Path, device: str, settings: BaseSettings, seconds: float, save_seconds: float) -> None:
    """One process's part; it ends after `seconds`, by when its rate has fallen. The first one writes the files."""
    use_comfyui(comfyui)
    torch.set_float32_matmul_precision("high")
    rank, count = parallel.rank(), parallel.count()
    world = scenes.World(atlas.load(work / "atlas.safetensors"))
    told = {name: value for name, value in dataclasses.asdict(settings).items() if name not in ("fused", "workers")}
    data = latents.digest(world, told)
    every = [scene for number in range(settings.shards) for scene in latents.shard_scenes(world, number)]
    clean = latents.read(work, settings.shards).to(device)
    torch.manual_seed(0)
    mini = Miniature(torch.load(work / "weights" / "vae.pt")).to(device)
    mini.unet.to(memory_format=torch.channels_last)
    trained = mini.trained_parameters()
    averages = Averages(trained, settings.ema)
    optimizers = optimizers_of(mini, settings)
    if settings.fused:
        mini.unet.compile(dynamic=False)
    state_file, begin = work / "weights" / "base.state", 0
    if state_file.exists():
        state = torch.load(state_file, map_location=device)
        begin = state["step"]
        averages.load(state)
        optimizers.load(state["optimizers"])
    tokens = Tokens(mini)
    nothing = tokens([""]).to(device)
    batches = Batches(every, tokens, settings.batch // count, settings.drop)
    loader = DataLoader(batches, None, sampler=range(begin, settings.steps), num_workers=settings.workers)
    if rank == 0:
        size = sum(p.numel() for p in mini.unet.parameters()) / 1e6
        print(f"base: UNet {size:.2f} M, data and settings {data[:16]}, from step {begin}", flush=True)
    started, saved, total = time.time(), time.time(), torch.zeros((), device=device)
    for step, (chosen, captions) in enumerate(loader, begin):
        torch.manual_seed(1_000_003 * (rank + 1) + step)
        error = loss(mini, clean[chosen.to(device)].float(), captions.to(device), nothing, settings)
        for p in trained:
            p.grad = None
        error.backward()
        parallel.average_gradients(trained)
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        done = max(step / settings.steps, (time.time() - started) / seconds)
        optimizers.step(pace(step, done, settings))
        averages.follow(step)
        total += error.detach()
        last = step + 1 == settings.steps
        over = parallel.agreed(time.time() - started > seconds)
        if rank == 0 and (step + 1) % 100 == 0:
            print(f"base step {step + 1} loss {float(total) / 100:.4f} {time.time() - started:.0f} s", flush=True)
            total.zero_()
        if rank == 0 and (time.time() - saved > save_seconds or last or over):
            save({"step": step + 1, **averages.state(), "optimizers": optimizers.state()}, state_file)
            write(mini, averages, work / "weights" / "base.safetensors", data, step + 1)
            saved = time.time()
        if over:
            break


def write(mini: Miniature, averages: Averages, path: Path, data: str, step: int) -> None:
    """UNet and text encoders, with the averaged weights in the place of the latest; the metadata says what they saw."""
    with averages.in_place():
        state = {key: value for key, value in checkpoint(mini).items() if not key.startswith(FIRST_STAGE)}
        write_safetensors(state, str(path), {"data": data, "step": str(step)})
