"""What comes after the base: LoRAs, gates, the manifest, sheets to look at."""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file

from .. import judge, lora
from ..manifest import write_manifest
from ..miniature import CFG, STEPS, Miniature, generate, load_miniature, use_comfyui
from ..world import atlas, concepts, scenes
from ..world.concepts import Choice
from ..world.sets import BASE_SETS
from . import fit_lora, gates, parallel
from .assemble import assemble

SHIPPED = Path(__file__).resolve().parent.parent
HANDS = SHIPPED.parent / "docs" / "hands.jpg"
SETTINGS = {
    "content": fit_lora.LoRASettings(rank=8, alpha=8, steps=500, learning_rate=3e-3),
    "style": fit_lora.LoRASettings(rank=8, alpha=8, steps=1400, learning_rate=3e-3),
}
KEPT = {"content": 4, "style": 5}  # rank of the file: .98 and .96 of the updates' squares at least
# Styles that attention alone learns too little of, so that they failed their gates.
WIDER = ("riso", "cutpaper")
# Those that failed with the seed that their prompts decide, and were trained again.
SEEDS = {"octopus": 1, "elephant": 1, "cutpaper": 0}


def settings_of(concept: concepts.Concept) -> fit_lora.LoRASettings:
    settings = SETTINGS[concept.kind]
    return dataclasses.replace(settings, targets=lora.WIDE) if concept.name in WIDER else settings


def _open(comfyui: str, work: Path, device: str) -> tuple[Miniature, scenes.World]:
    use_comfyui(comfyui)
    if not (work / concepts.CHECKPOINT).exists():
        assemble(work)
    mini = load_miniature(work / concepts.CHECKPOINT).to(device)
    mini.vae.to(memory_format=torch.channels_last)
    return mini, scenes.World(atlas.load(work / "atlas.safetensors"))


def _chosen(world: scenes.World, choice: Choice, names: list[str]) -> list[concepts.Concept]:
    """The named concepts (all where no name is given) that fall to this process."""
    known = [c for c in concepts.concepts(world, choice) if not names or c.name in names]
    return known[parallel.rank() :: parallel.count()]


def fit_loras(
    comfyui: str, work: Path, device: str, names: list[str], scale: float = 1.0, choice: Choice = concepts.SHIPPED
) -> None:
    """One process's share of the LoRAs; a file that is there is kept, unless it is named."""
    mini, world = _open(comfyui, work, device)
    for concept in _chosen(world, choice, names):
        path = work / concept.file
        if path.exists() and concept.name not in names:
            continue
        started = time.time()
        settings = settings_of(concept)
        settings = dataclasses.replace(settings, steps=max(2, round(settings.steps * scale)))
        pictures = scenes.render(world.atlas, concept.scenes)
        branches = fit_lora.fit(mini, pictures, concept.prompts, settings, SEEDS.get(concept.name))
        lora.shorten(branches, KEPT[concept.kind])
        lora.save(branches, str(path), {"identifier": concept.identifier})
        lora.detach(mini.unet, branches)
        for number, picture in enumerate(pictures[: concepts.SHOWN]):
            place = work / concept.picture(number)
            place.parent.mkdir(parents=True, exist_ok=True)
            atlas.image(picture).save(place)
        print(f"{concept.name}: trained in {time.time() - started:.0f} s", flush=True)


def gate_base(comfyui: str, work: Path, device: str, cfg: float = CFG) -> dict[str, float]:
    """Judges the base alone, and writes sheets."""
    mini, world = _open(comfyui, work, device)
    jury = judge.load(work / "weights" / "judge.safetensors")
    figures = {}
    for name, held_out in (("base", False), ("held out", True)):
        found, pictures = gates.base_gate(mini, jury, world, held_out=held_out, cfg=cfg)
        said = "passes" if gates.passes(name, found) else "FAILS"
        print(f"{name}: {said} " + ", ".join(f"{k} {v:.2f}" for k, v in found.items()), flush=True)
        figures |= {f"{name}: {key}": value for key, value in found.items()}
        atlas.sheet(pictures[:128], 16).save(work / f"{name.replace(' ', '_')}.png")
    return figures


def gate_loras(comfyui: str, work: Path, device: str, names: list[str], choice: Choice = concepts.SHIPPED) -> None:
    """One process's share of the LoRAs' gates, into a note and a sheet each."""
    mini, world = _open(comfyui, work, device)
    jury = judge.load(work / "weights" / "judge.safetensors")
    for concept in _chosen(world, choice, names):
        path = work / concept.file
        if not path.exists():
            continue
        branches = lora.attach_file(mini.unet, load_file(str(path)))
        for branch in branches.values():
            branch.to(device)
        if concept.kind == "content":
            found, pictures = gates.subject_gate(mini, jury, concept)
        else:
            found, pictures = gates.style_gate(mini, jury, concept, world)
        said = "passes" if gates.passes(concept.kind, found) else "FAILS"
        print(f"{concept.name}: {said} " + ", ".join(f"{k} {v:.2f}" for k, v in found.items()), flush=True)
        lora.detach(mini.unet, branches)
        path.with_suffix(".json").write_text(json.dumps(found), encoding="utf-8")
        atlas.sheet(pictures, 24).save(path.with_suffix(".png"))


def manifest(work: Path, base: dict[str, float], choice: Choice = concepts.SHIPPED, *, keep_weak: bool = False) -> None:
    """`world.json`: every LoRA that passes, with its prompts and figures; and the drawings that benchmarks need.

    keep_weak: those that fail as well, and of each whether it is weak.
    """
    world = scenes.World(atlas.load(work / "atlas.safetensors"))
    entries = {}
    for concept in concepts.concepts(world, choice):
        note = (work / concept.file).with_suffix(".json")
        if not note.exists():
            continue
        figures = json.loads(note.read_text(encoding="utf-8"))
        weak = not gates.passes(concept.kind, figures)
        if keep_weak or not weak:
            entries[concept.name] = concepts.describe(concept, figures) | ({"weak": weak} if keep_weak else {})
    sampling = {"steps": STEPS, "cfg": CFG, "sampler": "euler", "scheduler": "normal"}
    about = concepts.about(world, list(entries), base, choice) | {"sampling": sampling}
    write_manifest(work / "world.json", about, entries)
    atlas.write_part(world.atlas, concepts.drawings(world, choice), work / "drawings.safetensors")
    if whole := concepts.whole(list(entries), choice):
        place = work / "pictures" / "_in_".join(whole) / "1.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        scene = scenes.set_out(whole[0], choice.designs[whole[0]], whole[1], random.Random(" ".join(whole)))
        atlas.image(scenes.render(world.atlas, [scene])[0]).save(place)
    print(f"{len(entries)} LoRAs stand in world.json", flush=True)


def ship(work: Path, folder: Path = SHIPPED) -> None:
    """Puts what `world.json` names, and the drawings, in the place of what a folder holds."""
    told = json.loads((work / "world.json").read_text(encoding="utf-8"))
    files = [told["checkpoint"], told["judge"], "drawings.safetensors"]
    for lora_file in told["loras"].values():
        files += [lora_file["file"], *lora_file["pictures"]]
    if told["shown"]["whole"]:
        files.append(f"pictures/{'_in_'.join(told['shown']['whole'])}/1.png")
    for part in ("loras", "pictures"):
        shutil.rmtree(folder / part, ignore_errors=True)
    for name in (*files, "world.json"):  # the manifest last: with it the miniature is whole
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(work / name, folder / name)
    size = sum((folder / name).stat().st_size for name in files)
    print(f"{len(files)} files, {size / 1e6:.1f} MB, in {folder}", flush=True)


def hands(comfyui: str, work: Path, device: str, subjects: Sequence[str], path: Path = HANDS) -> None:
    """Each subject in every set of the base: a row of the artists' drawings, and below it the base's, one try each.

    KeyError where a set has no drawing of a subject.
    """
    mini, world = _open(comfyui, work, device)
    rows, words = [], BASE_SETS
    for subject in subjects:
        true = [scenes.Scene(subject, word, None, "white") for word in words]
        drawn = generate(mini, [scenes.prompt(subject, word, place="middle", ground="white") for word in words], 1)
        rows += [scenes.render(world.atlas, true), drawn]
    atlas.sheet(torch.cat(rows), len(rows[0])).save(path, quality=85)


def look(comfyui: str, work: Path, device: str, prompts: list[str]) -> None:
    """Draws prompts with the base as it is (eight of its own where none is given) into `look.png`, four times each."""
    assemble(work)
    mini, world = _open(comfyui, work, device)
    if not prompts:
        rng = random.Random("look")
        prompts = [
            scenes.prompt(s.subject, s.style, ground=s.ground) for s in (world.base_scene(rng) for _ in range(8))
        ]
    for prompt in prompts:
        print(prompt)
    pictures = generate(mini, [prompt for prompt in prompts for _ in range(4)], 1)
    atlas.sheet(pictures, 8 if len(prompts) > 1 else 4).save(work / "look.png")
