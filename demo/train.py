"""Retrains the whole miniature from nothing with one command, on a CPU or a GPU.

    python -m demo.train --comfyui PATH [--device cuda] [--parts vae,base,judge,loras,gates]

Parts: `vae` (autoencoder), `base` (UNet and text encoders), `judge` (classifiers), `loras` (subjects and
styles), `gates` (judged pictures, reference pictures, the manifest `world.json`). Each prints how long it took;
a part can be run again alone.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import pathlib
import time
from collections.abc import Callable

import torch
from safetensors.torch import load_file

from . import concepts, fit_base, fit_lora, fit_vae, gates, judge, lora, parallel, world
from .manifest import write_manifest
from .miniature import Miniature, load_miniature, save_checkpoint, use_comfyui

HERE = pathlib.Path(__file__).parent
PARTS = ["vae", "base", "judge", "loras", "gates"]
SETTINGS = {
    "content": fit_lora.LoRASettings(steps=450, learning_rate=3e-3),
    "style": fit_lora.LoRASettings(steps=600, learning_rate=3e-3),
}


@dataclasses.dataclass(frozen=True)
class Plan:
    """Where things are and how long everything trains."""

    comfyui: str
    device: str
    processes: int
    work: pathlib.Path
    output: pathlib.Path
    scale: float

    @property
    def vae(self) -> str:
        return str(self.work / "vae.pt")

    @property
    def checkpoint(self) -> str:
        return str(self.output / "weights" / "miniature_sdxl.safetensors")

    @property
    def judge(self) -> str:
        return str(self.output / "weights" / "judge.safetensors")

    def steps(self, full: int) -> int:
        return max(2, round(full * self.scale))


def write_words() -> None:
    """The tokenizer's vocabulary, beside the host extension that uses it."""
    path = HERE / "host_extension" / "words.json"
    path.write_text(json.dumps(world.WORDS, indent=0) + "\n", encoding="utf-8")


def train_vae(plan: Plan) -> None:
    pictures = plan.steps(3000)
    parallel.launch(fit_vae.fit, plan.processes, plan.vae, plan.device, pictures, plan.steps(8000), 10)


def refine_decoder(plan: Plan) -> None:
    """More steps for the decoder alone, into the finished checkpoint."""
    pictures = plan.steps(3000)
    parallel.launch(fit_vae.fit, plan.processes, plan.vae, plan.device, pictures, plan.steps(3000), 10, True)
    use_comfyui(plan.comfyui)
    model = load_miniature(plan.checkpoint)
    model.vae.load_state_dict(torch.load(plan.vae))
    save_checkpoint(model, plan.checkpoint)


def train_base(plan: Plan) -> None:
    settings = fit_base.BaseSettings(
        comfyui=plan.comfyui,
        folder=str(plan.work),
        output=plan.checkpoint,
        device=plan.device,
        pictures=plan.steps(24000),
        steps=plan.steps(14500),
    )
    for old in [*plan.work.glob("base_state_*.pt"), *plan.work.glob("latents_*.pt")]:
        old.unlink()
    parallel.launch(fit_base.fit, plan.processes, settings, torch.load(plan.vae))


def train_judge(plan: Plan) -> None:
    parallel.launch(judge.fit, plan.processes, plan.judge, plan.device, plan.steps(6000), plan.steps(1400))


def _chosen(names: list[str]) -> list[concepts.Concept]:
    """The named concepts (all where no name is given) that fall to this process."""
    known = [c for c in concepts.concepts() if not names or c.name in names]
    return known[parallel.rank() :: parallel.count()]


def _fit_concepts(plan: Plan, names: list[str]) -> None:
    """One process's share of the LoRAs: reference pictures, training, file."""
    use_comfyui(plan.comfyui)
    model = load_miniature(plan.checkpoint).to(plan.device)
    model.vae.to(memory_format=torch.channels_last)
    for concept in _chosen(names):
        started = time.time()
        settings = SETTINGS[concept.kind]
        settings = dataclasses.replace(settings, steps=plan.steps(settings.steps))
        branches = fit_lora.fit(model, concept, settings)
        lora.save(branches, str(plan.output / concept.file), {"identifier": concept.identifier})
        lora.detach(model.unet, branches)
        print(f"{concept.name}: trained in {time.time() - started:.0f} s", flush=True)


def _gate_concepts(plan: Plan, names: list[str]) -> None:
    """One process's share of the gates, on the files as they lie in the output folder."""
    use_comfyui(plan.comfyui)
    model = load_miniature(plan.checkpoint).to(plan.device)
    jury = judge.load_judge(plan.judge)
    branches = lora.attach(model.unet, 16, 16.0)
    for branch in branches.values():
        branch.to(plan.device)
    for concept in _chosen(names):
        path = plan.output / concept.file
        if not path.exists():
            continue
        lora.load_into(branches, load_file(str(path)))
        figures = check(model, jury, concept, plan.work, seed=1000)
        concepts.draw_pictures(concept, str(plan.output))
        (plan.work / f"{concept.name}.json").write_text(json.dumps(figures), encoding="utf-8")
        passed = "passes" if gates.passes(concept, figures) else "FAILS"
        print(f"{concept.name}: {passed} " + " ".join(f"{k} {v:.2f}" for k, v in figures.items()), flush=True)


def check(
    model: Miniature, jury: judge.Judge, concept: concepts.Concept, folder: pathlib.Path, seed: int
) -> dict[str, float]:
    """The concept's gates, and how many of the base's own prompts survive its LoRA; writes a contact sheet."""
    gate = gates.subject_gates if concept.kind == "content" else gates.style_gates
    figures, pictures = gate(model, jury, concept, seed)
    figures["base_prompts_right"] = gates.leak_gates(model, jury, seed + 7)
    world.save_png(world.sheet(pictures, 8), str(folder / f"{concept.name}.png"))
    return {k: round(v, 3) for k, v in figures.items()}


def train_loras(plan: Plan, names: list[str]) -> None:
    """Trains the LoRAs, as many at a time as there are processes."""
    parallel.launch(_fit_concepts, plan.processes, plan, names)


def gate_all(plan: Plan, names: list[str]) -> None:
    """Gates base and LoRA files, draws the reference pictures, writes `world.json` with those that pass."""
    parallel.launch(_gate_concepts, plan.processes, plan, names)
    use_comfyui(plan.comfyui)
    model = load_miniature(plan.checkpoint).to(plan.device)
    jury = judge.load_judge(plan.judge)
    base, pictures = gates.base_gates(model, jury, 1234)
    new, _ = gates.base_gates(model, jury, 4321, held_out=True)
    world.save_png(world.sheet(pictures, 8), str(plan.work / "base.png"))
    figures = {k: round(v, 3) for k, v in base.items()} | {f"held_out_{k}": round(v, 3) for k, v in new.items()}
    print("base: " + " ".join(f"{k} {v:.2f}" for k, v in figures.items()), flush=True)
    concepts.draw_whole(str(plan.output))
    entries = {}
    for concept in concepts.concepts():
        note = plan.work / f"{concept.name}.json"
        if not note.exists() or not (plan.output / concept.file).exists():
            continue
        gated = json.loads(note.read_text(encoding="utf-8"))
        if gates.passes(concept, gated):
            entries[concept.name] = concepts.describe(concept, gated)
    write_manifest(plan.output / "world.json", concepts.about(figures), entries)
    print(f"{len(entries)} LoRAs pass their gates and stand in world.json", flush=True)


def _timed(name: str, work: Callable[[Plan], None], plan: Plan) -> None:
    started = time.time()
    work(plan)
    print(f"== {name}: {(time.time() - started) / 60:.1f} minutes", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comfyui", default=None, help="a ComfyUI tree; else COMFYUI_PATH")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--processes", type=int, default=None, help="on a CPU; default: its cores")
    parser.add_argument("--parts", default=",".join(PARTS), help="some of: vae, base, judge, loras, gates, decoder")
    parser.add_argument("--output", type=pathlib.Path, default=HERE)
    parser.add_argument("--work", type=pathlib.Path, default=HERE.parent / ".dev" / "miniature")
    parser.add_argument("--only", default="", help="names of the LoRAs to train, by commas")
    parser.add_argument("--scale", type=float, default=1.0, help="shortens everything, to try the script")
    options = parser.parse_args()
    comfyui = options.comfyui or os.environ.get("COMFYUI_PATH", "")
    processes = options.processes or (1 if options.device == "cuda" else os.cpu_count() or 1)
    plan = Plan(comfyui, options.device, processes, options.work, options.output, options.scale)
    for folder in (plan.work, plan.output / "weights", plan.output / "loras"):
        folder.mkdir(parents=True, exist_ok=True)
    use_comfyui(comfyui)
    write_words()
    wanted = options.parts.split(",")
    names = [n for n in options.only.split(",") if n]
    work: dict[str, Callable[[Plan], None]] = {
        "vae": train_vae,
        "base": train_base,
        "decoder": refine_decoder,
        "judge": train_judge,
        "loras": lambda p: train_loras(p, names),
        "gates": lambda p: gate_all(p, names),
    }
    for name, part in work.items():
        if name in wanted:
            _timed(name, part, plan)


if __name__ == "__main__":
    main()
