"""What a zip takes on the full-size SDXL structure, counted on torch's meta device: no weight has any memory."""

from __future__ import annotations

import pytest
import tiny
import torch
from torch.utils.flop_counter import FlopCounterMode

SIDE = 128  # of latents: pictures of 1024 x 1024


@pytest.fixture(scope="module")
def sdxl(pack):
    """(model, pair of two attention LoRAs of rank 64 on it, a copy of both without memory)"""
    from comfy.model_patcher import ModelPatcher

    bridge, cpu = pack.nodes.bridge, torch.device("cpu")
    model = ModelPatcher(tiny.full_size.sdxl_model(torch.float16, device="meta"), cpu, cpu)
    sources = bridge.lora.loras.LoRASources(
        {
            concept: bridge.lora.loras.LoRASource(concept, tiny.full_size.attention_lora(model.model, 64, seed), 1.0)
            for seed, concept in enumerate(("content", "style"))
        }
    )
    pair = bridge.lora.fitting.fit(sources, model.model).loras
    prompts = {c: tiny.full_size.random_prompt(0) for c in ("content", "style")}
    latents = {c: tiny.full_size.random_latents(SIDE, 0)["samples"] for c in prompts}
    return model, pair, bridge.memory.rehearsal.MetaSet(model, pair, prompts, latents)


def operations(work) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        work()
    return counter.get_total_flops()


def test_a_layer_wise_zip_is_at_most_twenty_passes_and_three_hundred_megabytes(pack, sdxl):
    _, pair, meta = sdxl
    core = pack.ziplora_core
    batch, activity = meta.batch("content", "style"), core.layerwise.Activity()
    with meta.injected():
        plain = operations(lambda: meta.predict(meta.batch("content"), meta.joined.teacher(torch.tensor([0]))))
        recording = core.layerwise.RecordingBranch(meta.joined, batch.concept_index, activity)
        recorded = operations(lambda: meta.predict(batch, recording))

    def grams() -> None:
        for layer in meta.joined.loras.layers.values():
            core.lora_set.column_grams(list(layer.values()))

    solve = operations(grams)
    assert 5e12 < plain < 8e12, "about six million million operations for a pass at 1024 x 1024"
    assert core.layerwise.DRAWS * recorded + solve < 17 * plain
    assert solve < plain / 4
    kept = sum(sums.numel() * 4 for sums in activity.sums.values())
    assert kept == 4 * pair.coefficient_count < 7e6


def test_its_plan_asks_for_what_sampling_takes_and_the_loras(pack, sdxl):
    """Beside two rows' workspace, which sampling with a negative prompt has too: factors, coefficients, little else."""
    model, pair, meta = sdxl
    settings = pack.ziplora_core.solver.Settings()
    prompts = {c: tiny.full_size.random_prompt(0) for c in ("content", "style")}
    latents = {c: tiny.full_size.random_latents(SIDE, 0)["samples"] for c in prompts}
    plan = pack.nodes.bridge.memory.plan.make(model, pair, prompts, latents, settings, 10**12)
    factors = 2 * sum(f.up.numel() + f.down.numel() for layer in pair.layers.values() for f in layer.values())
    workspace = 2 * pack.nodes.bridge.memory.plan._workspace(model.model, torch.float16, SIDE * SIDE)
    assert plan.need - workspace - factors < 300e6
