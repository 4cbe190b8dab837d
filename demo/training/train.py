"""Trains the miniature, part by part; every part goes on where it stopped. `demo/README.md` says what each part does.

    python3 dev.py train                            everything, from nothing
    python3 dev.py train judge decoder loras gates  some parts

On a GPU (`--device cuda`) the base takes large batches and more scenes, drawn and encoded there; all it needs besides
the checkout and a ComfyUI tree is the folder of `--work` with `atlas.safetensors` (32 MB) and, where it is trained
already, `weights/vae.pt` (5 MB). `--minutes` ends the base's training earlier, by when its rate has fallen.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
from pathlib import Path

import torch

from ..miniature import CFG
from ..world import atlas, contact
from ..world.sets import CACHE, DEV
from . import figures, finish, fit_base, fit_decoder, fit_judge, fit_vae, latents, parallel
from .assemble import assemble, write_words

ALL = ("draw", "vae", "latents", "base", "judge", "decoder", "loras", "gates", "ship")
PARTS = (*ALL, "gate-base", "sheets", "figures", "look", "hands")


@dataclasses.dataclass(frozen=True)
class Plan:
    """Where things are, on what, and how long."""

    comfyui: str
    work: Path
    device: str
    processes: int
    minutes: float
    only: list[str]
    prompts: list[str]
    scale: float
    base: fit_base.BaseSettings
    guidance: float

    def short(self, settings: object) -> object:
        """Settings with fewer steps, where `scale` says so."""
        return dataclasses.replace(settings, steps=max(2, round(settings.steps * self.scale)))  # type: ignore


def run(part: str, plan: Plan) -> None:
    """One part, in all its processes."""
    host, work, device = plan.comfyui, plan.work, plan.device
    if part == "draw":
        atlas.draw(work / "atlas.safetensors")
    elif part == "sheets":
        contact.drawings(work)
        contact.techniques(work)
    elif part == "vae":
        large = fit_vae.ON_A_GPU if device == "cuda" else {}
        parallel.launch(fit_vae.fit, plan.processes, plan.short(fit_vae.VaeSettings(work, device, **large)))
    elif part == "latents":
        parallel.launch(latents.make, plan.processes, work, plan.base.shards, device)
    elif part == "base":
        write_words()
        arguments = (host, work, device, plan.short(plan.base), 60 * plan.minutes, 180.0)
        parallel.launch(fit_base.fit, plan.processes, *arguments)
        assemble(work)
    elif part == "judge":
        judging = fit_judge.ON_A_GPU if device == "cuda" else fit_judge.JudgeSettings()
        parallel.launch(fit_judge.fit, plan.processes, work, device, plan.short(judging))
    elif part == "decoder":
        sharpening = fit_decoder.ON_A_GPU if device == "cuda" else fit_decoder.DecoderSettings()
        parallel.launch(fit_decoder.fit, plan.processes, work, device, plan.short(sharpening))
        if (work / "weights" / "base.safetensors").exists():
            assemble(work)
    elif part == "loras":
        parallel.launch(finish.fit_loras, plan.processes, host, work, device, plan.only, plan.scale)
    elif part == "gate-base":
        finish.gate_base(host, work, device, plan.guidance)
    elif part == "gates":
        base = finish.gate_base(host, work, device, plan.guidance)
        parallel.launch(finish.gate_loras, plan.processes, host, work, device, plan.only)
        finish.manifest(work, base)
    elif part == "ship":
        finish.ship(work)
    elif part == "figures":
        figures.report(work)
    elif part == "hands":
        finish.hands(host, work, device, plan.prompts or ("octopus", "elephant"))
    elif part == "look":
        finish.look(host, work, device, plan.prompts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=ALL, help=", ".join(PARTS))
    parser.add_argument("--comfyui", default=os.environ.get("COMFYUI_PATH") or str(DEV / "comfyui"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--processes", type=int, default=None, help="on a CPU; default: its cores")
    parser.add_argument("--work", type=Path, default=CACHE, help="atlas, latents, training states, weights")
    parser.add_argument("--minutes", type=float, default=1e6, help="of the base's training, at most")
    parser.add_argument("--only", nargs="+", default=[], help="LoRAs by name: train these again, gate these")
    parser.add_argument("--prompt", nargs="+", default=[], help="to look at; of hands, the subjects")
    parser.add_argument("--scale", type=float, default=1.0, help="shortens every training, to try the script")
    parser.add_argument("--guidance", type=float, default=CFG, help="of the base's gates")
    for setting in ("shards", "steps", "batch"):
        parser.add_argument(f"--{setting}", type=int, default=None, help="of the base")
    parser.add_argument("--fused", action="store_true", help="the base's UNet through torch.compile")
    given = parser.parse_args()
    unknown = [part for part in given.parts if part not in PARTS]
    if unknown:
        parser.error(f"there is no part '{unknown[0]}'; there are {', '.join(PARTS)}")
    on_gpu = given.device == "cuda"
    changed = {name: getattr(given, name) for name in ("shards", "steps", "batch") if getattr(given, name)}
    changed["fused"] = given.fused
    base = dataclasses.replace(fit_base.ON_A_GPU if on_gpu else fit_base.BaseSettings(), **changed)
    processes = given.processes or (1 if on_gpu else os.cpu_count() or 1)
    work = given.work.resolve()
    more = (given.minutes, given.only, given.prompt, given.scale, base, given.guidance)
    plan = Plan(given.comfyui, work, given.device, processes, *more)
    for part in given.parts:
        run(part, plan)


if __name__ == "__main__":
    main()
