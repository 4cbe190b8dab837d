"""What the nodes plan on cards of different sizes, for the full-size SDXL and LoRAs of rank 64: nothing is run.

    python3 dev.py run benchmarks/plans.py [--size 1024] [--rank 64] [--batch-size 1] [--reserve 1.0]

The student's pass is rehearsed on a network without memory, so this needs neither a card nor the model.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))  # last: `nodes` there would hide ComfyUI's module

from devhost import full_size
from devhost.inprocess import load_pack

PACK = load_pack()

import torch  # noqa: E402
from comfy.model_patcher import ModelPatcher  # noqa: E402

CARDS = (8, 10, 12, 16, 24, 32, 48, 80)


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
    settings = PACK.ziplora_core.solver.Settings(batch_size=given.batch_size)
    weights = model.model_size()
    print(f"weights {weights / 1e9:.1f} GB, {given.size} x {given.size}, rank {given.rank}, batch {given.batch_size}\n")
    print("| card, GB | beside the weights, GB | needed, GB | references | blocks run again |")
    print("| --- | --- | --- | --- | --- |")
    for card in CARDS:
        room = max(0, int((card - given.reserve) * 1e9 - weights))
        plan = bridge.memory.plan.make(model, pair, prompts, latents, settings, room)
        together = "in one pass" if plan.together else "one at a time"
        print(
            f"| {card} | {room / 1e9:.1f} | {plan.need / 1e9:.1f} | {together} | {plan.recomputed} of {plan.blocks} |"
        )
    print("\nTrain Concept LoRA\n")
    print("| card, GB | beside the weights, GB | needed, GB | in all, GB | blocks run again |")
    print("| --- | --- | --- | --- | --- |")
    shapes = bridge.training.layers.trained_layers(model.model, "attention")
    for card in CARDS:
        room = max(0, int((card - given.reserve) * 1e9 - weights))
        plan = bridge.memory.plan.make_for_training(
            model, shapes, prompts["content"], latents["content"], given.rank, given.batch_size, room
        )
        print(
            f"| {card} | {room / 1e9:.1f} | {plan.need / 1e9:.1f} | {(plan.need + weights) / 1e9:.1f} | "
            f"{plan.recomputed} of {plan.blocks} |"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
