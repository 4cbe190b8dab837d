"""Trains the second world's miniature, part by part; every part goes on where it stopped.

    python3 dev.py run -m demo.art.train draw              fetch the emoji sets, draw the atlas (minutes)
    python3 dev.py run -m demo.art.train vae latents base  autoencoder; scenes as latents; UNet and text encoders

On a GPU (`--device cuda`) the base takes large batches and more scenes, drawn and encoded there; all it needs besides
the checkout and a ComfyUI tree is the folder of `--work` with the atlas and, where it is trained already, the
autoencoder. `--minutes` ends the base's training early, with everything saved.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
from pathlib import Path

import torch

from .. import parallel
from . import atlas, fit_base, fit_vae, latents, model
from .sets import CACHE, DEV

PARTS = ("draw", "vae", "latents", "base")


@dataclasses.dataclass(frozen=True)
class Plan:
    """Where things are, on what, and how long."""

    comfyui: str
    work: Path
    device: str
    processes: int
    minutes: float
    base: fit_base.BaseSettings
    vae: fit_vae.VaeSettings


def run(part: str, plan: Plan) -> None:
    """One part, in all its processes."""
    if part == "draw":
        atlas.draw(plan.work / "atlas.safetensors")
    elif part == "vae":
        parallel.launch(fit_vae.fit, plan.processes, plan.vae)
    elif part == "latents":
        parallel.launch(latents.make, plan.processes, plan.work, plan.base.shards, plan.device)
    elif part == "base":
        model.write_words()
        arguments = (plan.comfyui, plan.work, plan.device, plan.base, 60 * plan.minutes, 180.0)
        parallel.launch(fit_base.fit, plan.processes, *arguments)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=PARTS)
    parser.add_argument("--comfyui", default=os.environ.get("COMFYUI_PATH") or str(DEV / "comfyui"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--processes", type=int, default=None, help="on a CPU; default: its cores")
    parser.add_argument("--work", type=Path, default=CACHE, help="atlas, latents, training states, weights")
    parser.add_argument("--minutes", type=float, default=1e6, help="of the base's training, at most")
    for setting in ("shards", "steps", "batch"):
        parser.add_argument(f"--{setting}", type=int, default=None, help="of the base")
    parser.add_argument("--vae-steps", type=int, default=None)
    given = parser.parse_args()
    on_gpu = given.device == "cuda"
    base = fit_base.ON_A_GPU if on_gpu else fit_base.BaseSettings()
    changed = {name: getattr(given, name) for name in ("shards", "steps", "batch") if getattr(given, name)}
    vae = fit_vae.VaeSettings(given.work, given.device)
    if given.vae_steps:
        vae = dataclasses.replace(vae, steps=given.vae_steps)
    processes = given.processes or (1 if on_gpu else os.cpu_count() or 1)
    base = dataclasses.replace(base, **changed)
    plan = Plan(given.comfyui, given.work, given.device, processes, given.minutes, base, vae)
    for part in given.parts:
        run(part, plan)


if __name__ == "__main__":
    main()
