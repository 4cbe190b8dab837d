"""Every solver and objective on the miniature model, through the code that the node runs."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

SOLVERS = ("gradient", "layerwise", "layerwise, then gradient")


def pixels(path: Path) -> torch.Tensor:
    """A picture as the host's IMAGE."""
    return torch.from_numpy(np.asarray(Image.open(path).convert("RGB"), dtype=np.float32) / 255)[None]


@pytest.mark.parametrize(("solver", "objective"), [*product(SOLVERS, ["balanced"]), ("gradient", "paper")])
def test_keeps_both_better_than_the_direct_merge(
    pack: Any, miniature: Any, lora_files: dict[str, Path], solver: str, objective: str
) -> None:
    loras, optimise = pack.nodes.bridge.lora.loras, pack.nodes.bridge.optimize.zipping
    core = pack.ziplora_core
    sources = loras.LoRASources(
        tiny.of_two(
            *(
                loras.LoRASource(f"{name}.safetensors", core.files.read_lora_file(lora_files[name]), 1.0)
                for name in ("rocket", "chalk")
            )
        )
    )
    prompts = {"content": "a wix figure in flat style", "style": "a purple circle in miv style"}
    conditioning = {
        c: miniature.clip.encode_from_tokens_scheduled(miniature.clip.tokenize(p)) for c, p in prompts.items()
    }
    latents = {
        concept: {"samples": miniature.vae.encode(pixels(lora_files[name].parents[1] / "pictures" / name / "1.png"))}
        for concept, name in (("content", "rocket"), ("style", "chalk"))
    }
    settings = core.solver.Settings(steps=30, objective=core.objective.OBJECTIVES[objective], solver=solver)
    with torch.inference_mode():
        zipped, losses, report, _ = optimise.optimize(miniature.model, sources, conditioning, latents, settings)
    shares = [int(line.split("(")[1].split("%")[0]) for line in report.splitlines() if "retention loss" in line]
    assert len(shares) == 2 and sum(shares) < 180, report
    assert f"solver: {solver}, seed 0" in report
    assert (f"objective {objective}" in report) == ("gradient" in solver)
    assert ("layer by layer: " in report) == ("layerwise" in solver)
    layers = len(zipped.fitted.loras.layers)
    assert len(losses["loss"]) == (layers if solver == "layerwise" else 30)
    count = sum(m.numel() for side in zipped.coefficients.by_concept.values() for m in side.values())
    assert count == zipped.fitted.loras.coefficient_count
