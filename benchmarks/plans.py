"""What the nodes plan on cards of different sizes, for the full-size SDXL and LoRAs of rank 64: nothing is run.

    python3 dev.py run benchmarks/plans.py [--size 1024] [--rank 64] [--batch-size 1] [--reserve 1.0]

The student's pass is rehearsed on a network without memory, so this needs neither a card nor the model. First zipping,
by default and by gradient, then the nodes that train, at their own defaults, and two of them one picture at a time.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent.parent))  # last: `nodes` there would hide ComfyUI's module

from devhost import full_size
from devhost.inprocess import load_pack

PACK = load_pack()

import torch  # noqa: E402
from comfy.model_patcher import ModelPatcher  # noqa: E402

CARDS = (8, 10, 12, 16, 24, 32, 48, 80)
TRAINED_ON = (8, 12, 16, 24, 32, 48)
TEXT_ENCODERS = 1_640_000_000  # bytes of SDXL's two in half precision, 818 M numbers


@dataclass(frozen=True)
class Training:
    """What a node asks of `make_for_training`. beside: bytes that a step runs beside the model."""

    title: str
    shapes: dict[str, tuple[int, int]]
    rank: int
    rows: int
    is_whole: bool = False
    beside: int = 0


def trainings(base: Any) -> Iterator[Training]:
    """base: the host's BaseModel."""
    core, layers = PACK.ziplora_core, PACK.nodes.bridge.training.layers
    attention, readers = layers.trained_layers(base, "attention"), layers.prompt_readers(base)
    plain, apart, ed = core.training.Settings(), core.unzip.Settings(), core.trained_ed_lora.Settings()
    custom, word, split = core.trained_weights.Settings(), core.trained_embedding.Settings(), core.split.Settings()
    yield Training("Train Concept LoRA", attention, plain.rank, plain.batch_size)
    yield Training("UnZip LoRA", attention, 2 * apart.rank, apart.batch_size)
    yield Training("Train Embedding", {}, word.rank, word.batch_size, beside=TEXT_ENCODERS)
    yield Training("Split Concept", {}, split.rank, split.batch_size, beside=TEXT_ENCODERS)
    for rows, said in ((ed.batch_size, ""), (1, ", batch_size 1")):
        yield Training(f"Train ED-LoRA{said}", attention, ed.rank, rows, beside=TEXT_ENCODERS)
    batches = ((custom.batch_size, ""), (2 * custom.batch_size, ", with class_prompt"), (1, ", batch_size 1"))
    for rows, said in batches:
        yield Training(f"Train Custom Diffusion{said}", readers, custom.rank, rows, is_whole=True, beside=TEXT_ENCODERS)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=1024, help="pixels of a side")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--reserve", type=float, default=1.0, help="GB of a card that others take")
    given = parser.parse_args()
    bridge, cpu = PACK.nodes.bridge, torch.device("cpu")
    model = ModelPatcher(full_size.sdxl_model(torch.float16, device="meta"), cpu, cpu)
    loras = [full_size.attention_lora(model.model, given.rank, seed) for seed in (0, 1)]
    sources = bridge.lora.loras.LoRASources(
        {c: bridge.lora.loras.LoRASource(c, lora, 1.0) for c, lora in zip(("content", "style"), loras, strict=True)}
    )
    pair = bridge.lora.fitting.fit(sources, model.model).loras
    prompts = {c: full_size.random_prompt(0) for c in ("content", "style")}
    latents = {c: full_size.random_latents(given.size // 8, 0)["samples"] for c in prompts}
    core, latent = PACK.ziplora_core.solver, latents["content"]
    weights = model.model_size()
    print(f"weights {weights / 1e9:.1f} GB, {given.size} x {given.size}, rank {given.rank}, batch {given.batch_size}")
    default = bridge.memory.plan.make(model, pair, prompts, latents, core.Settings(batch_size=given.batch_size), 0)
    print(f"\nZipping by default: {default.need / 1e9:.1f} GB beside the weights\n\nZipping by gradient\n")
    settings = core.Settings(batch_size=given.batch_size, solver="gradient")
    print("| card, GB | beside the weights, GB | needed, GB | references | blocks run again |")
    print("| --- | --- | --- | --- | --- |")
    for card in CARDS:
        room = max(0, int((card - given.reserve) * 1e9 - weights))
        plan = bridge.memory.plan.make(model, pair, prompts, latents, settings, room)
        together = "in one pass" if plan.together else "one at a time"
        print(
            f"| {card} | {room / 1e9:.1f} | {plan.need / 1e9:.1f} | {together} | {plan.recomputed} of {plan.blocks} |",
            flush=True,
        )
    print("\nTraining: GB in all, with the weights, and blocks run again\n")
    print(f"| node | {' | '.join(f'{card} GB' for card in TRAINED_ON)} |")
    print(f"| --- |{' --- |' * len(TRAINED_ON)}")
    for training in trainings(model.model):
        there = weights + training.beside
        cells = []
        for card in TRAINED_ON:
            plan = bridge.memory.plan.make_for_training(
                model,
                training.shapes,
                prompts["content"],
                latent,
                training.rank,
                training.rows,
                max(0, int((card - given.reserve) * 1e9 - there)),
                training.is_whole,
            )
            cells.append(f"{(plan.need + there) / 1e9:.1f}, {plan.recomputed} of {plan.blocks}")
        print(f"| {training.title} | {' | '.join(cells)} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
