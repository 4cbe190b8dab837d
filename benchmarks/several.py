"""What any number of LoRAs costs: FLOP and bytes on SDXL's structure, without memory; seconds on a small network.

    python3 dev.py run benchmarks/several.py [--counts 2,3,5,8] [--rank 64] [--size 1024] [--small-only]

SDXL: a step (teacher, student, backward) with a row for each LoRA, counted on torch's meta device; bytes of the joined
factors in half precision, of coefficients in float32 and Adam's two, of what one row of the student keeps, and of the
matrices that routing adds up (in the processor's memory) and of those that come of it. Small:
SDXL in every joint and 32 channels wide, random weights, latents of 16 x 16, on this machine's CPU.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))  # last: `nodes` there would hide ComfyUI's module

from devhost import full_size
from devhost.inprocess import load_pack

PACK = load_pack()

import torch  # noqa: E402
from comfy.model_patcher import ModelPatcher  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

BRIDGE, CORE = PACK.nodes.bridge, PACK.ziplora_core
SMALL = {
    "model_channels": 32, "channel_mult": [1, 2, 2], "transformer_depth": [0, 0, 1, 1, 1, 1],
    "transformer_depth_middle": 1, "transformer_depth_output": [0, 0, 0, 1, 1, 1, 1, 1, 1], "context_dim": 96,
    "num_head_channels": 16,
}  # fmt: skip


def fitted(model, count: int, rank: int):
    """So many random LoRAs on a model's attention."""
    names = BRIDGE.lora.stack.concepts("subject, style", count)
    files = {c: full_size.attention_lora(model.model, rank, seed) for seed, c in enumerate(names)}
    sources = BRIDGE.lora.loras.LoRASources({c: BRIDGE.lora.loras.LoRASource(c, f, 1.0) for c, f in files.items()})
    return BRIDGE.lora.fitting.fit(sources, model.model).loras


def of_sdxl(model, count: int, rank: int, size: int) -> list[float]:
    """TFLOP of a step; MB of the factors, of coefficients with Adam's, of what one row keeps, of routing's sums and of
    its matrices."""
    loras = fitted(model, count, rank)
    prompts = {c: full_size.random_prompt(i) for i, c in enumerate(loras.concepts)}
    latents = {c: full_size.random_latents(size // 8, i)["samples"] for i, c in enumerate(loras.concepts)}
    stage = BRIDGE.memory.rehearsal.MetaSet(model, loras, prompts, latents)
    batch = stage.batch(*loras.concepts)
    with stage.injected(), FlopCounterMode(display=False) as counter:
        with torch.no_grad():
            teacher = stage.predict(batch, stage.joined.teacher(batch.concept_index))
        with torch.enable_grad():
            student = stage.predict(batch, stage.joined.student(stage.coefficients()))
            (student - teacher).norm().backward()
    kept = BRIDGE.memory.rehearsal.rehearse(model, loras, prompts, latents).kept(0)
    factors = sum(2 * (layer.up.numel() + layer.down.numel()) for layer in stage.joined.layers.values())
    routed = [loras.layers[name] for name in (CORE.routing.routable(loras) if count > 2 else ())]
    matrices = sum(4 * sum(f.rank for f in layer.values()) ** 2 for layer in routed)
    sizes = (factors, 3 * 4 * loras.coefficient_count, kept, count * matrices, matrices)
    return [counter.get_total_flops() / 1e12, *(size / 1e6 for size in sizes)]


def of_small(model, count: int) -> list[float]:
    """Seconds of a gradient step, of the default solve (columns of two, routing of more), of shared columns."""
    loras = fitted(model, count, 16)
    prompts = {c: full_size.random_prompt(i, width=96) for i, c in enumerate(loras.concepts)}
    latents = {c: full_size.random_latents(16, i)["samples"] for i, c in enumerate(loras.concepts)}

    def work(predict, joined, references) -> list[float]:
        marks: list[float] = []
        settings = CORE.solver.Settings(solver="gradient", steps=6, objective=CORE.objective.PAPER)
        CORE.gradient.optimize(joined, predict, references, settings, lambda _: marks.append(time.monotonic()))
        began = time.monotonic()
        CORE.zipper.solve(joined, predict, references, CORE.solver.Settings())
        solved = time.monotonic()
        CORE.shares.merge(loras)
        steps = sorted(b - a for a, b in zip(marks, marks[1:], strict=False))
        return [steps[len(steps) // 2], solved - began, time.monotonic() - solved]

    with torch.inference_mode():
        return BRIDGE.network.predictor.with_predictor(model, loras, prompts, latents, work)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", default="2,3,5,8")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--size", type=int, default=1024, help="pixels of a side")
    parser.add_argument("--small-only", action="store_true", help="leave SDXL out")
    given = parser.parse_args()
    counts, cpu = [int(count) for count in given.counts.split(",")], torch.device("cpu")
    with torch.inference_mode():
        small = full_size.sdxl_patcher(torch.float32, **SMALL)
    print("| LoRAs | a step, s | layer-wise, s | shared columns, s |\n|---|---|---|---|")
    for count in counts:
        print(f"| {count} | " + " | ".join(f"{seconds:.3f}" for seconds in of_small(small, count)) + " |", flush=True)
    if not given.small_only:
        sdxl = ModelPatcher(full_size.sdxl_model(torch.float16, device="meta"), cpu, cpu)
        print(
            "\n| LoRAs | TFLOP of a step | factors, MB | coefficients and Adam, MB | kept for a row, MB "
            "| routing's sums, MB | its matrices, MB |"
        )
        print("|---|---|---|---|---|---|---|")
        for count in counts:
            figures = of_sdxl(sdxl, count, given.rank, given.size)
            print(f"| {count} | " + " | ".join(f"{figure:.1f}" for figure in figures) + " |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
