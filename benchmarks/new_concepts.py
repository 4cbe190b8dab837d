"""Concepts that no choice has seen: subjects by lot and styles by rule from a block's name, a LoRA of each, a judge.

    python3 dev.py run -m demo.training.train draw             first: the atlas of all drawings (minutes)
    python3 dev.py run benchmarks/new_concepts.py choose confirm     train what is missing of two blocks (hours)
    python3 dev.py run benchmarks/new_concepts.py choose --show choose.png     only draw its concepts

A block lies in .dev/concepts/<block>, laid out as demo/ is, so that ZIPLORA_MINIATURE may name it. What the demo ships
is chosen by hand; these are not: seven subjects, each one drawing that the base was never shown, and nine styles of
three families, other ones in each block. LoRAs that fail the demo's gates are kept and marked as weak, since people
have such LoRAs too. A run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import colorsys
import dataclasses
import json
import os
import random
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))  # last: `nodes` there would hide ComfyUI's module

import torch
from torch import Tensor

from demo.world import atlas, concepts, scenes, sets, subjects, techniques
from demo.world.techniques import Layers, Technique
from devhost.host import DEV, current_host

BLOCKS = ("choose", "confirm", "final")  # to choose a method on, to confirm it, to be drawn once for the last table
SUBJECTS, STYLES = 7, 9
FOLDER = DEV / "concepts"
STYLE_NAMES = "agate beryl coral dolerite emery flint garnet halite indigo".split()


# --- styles --------------------------------------------------------------------------------------------------


def _hex(hue: float, saturation: float, value: float) -> str:
    return "#" + "".join(f"{round(255 * part):02x}" for part in colorsys.hsv_to_rgb(hue % 1, saturation, value))


def _sheet_and_ink(rng: random.Random) -> tuple[str, str, bool]:
    """Colors of a ground and of what is drawn on it, far from each other; and whether the ground is dark."""
    hue, dark = rng.random(), rng.random() < 0.5
    other = hue + rng.uniform(0.3, 0.7)
    sheet = _hex(hue, rng.uniform(0.4, 0.9), rng.uniform(0.2, 0.35) if dark else rng.uniform(0.9, 1.0))
    return sheet, _hex(other, rng.uniform(0.5, 0.9), 1.0 if dark else 0.4), dark


def toned(rng: random.Random) -> Technique:
    """A palette by brightness on one sheet, with lines around what is drawn or without."""
    sheet, ink, dark = _sheet_and_ink(rng)
    start, turn = rng.random(), rng.choice((-1, 1)) * rng.uniform(0.15, 0.4)
    tones = [_hex(start + turn * i / 3, rng.uniform(0.5, 0.9), 0.25 + 0.25 * i) for i in range(4)]
    lined = rng.choice((0.0, 0.9))

    def draw(layers: Layers) -> Tensor:
        tone = techniques.palette(techniques.brightness(layers.on("#ffffff")), *tones)
        tone = techniques.blend(tone, techniques.rgb(ink, tone), lined * techniques.outlines(layers))
        return techniques.blend(techniques.rgb(sheet, tone).expand_as(tone), tone, layers.alpha)

    return draw


def lined(rng: random.Random) -> Technique:
    """Lines of one ink, and ruled strokes where it is dark."""
    sheet, ink, dark = _sheet_and_ink(rng)
    across, down = rng.choice(((1, 0), (0, 1), (1, 1), (1, -1)))
    period, least = rng.choice((4, 8)), rng.uniform(0.15, 0.4)

    def draw(layers: Layers) -> Tensor:
        light = techniques.brightness(layers.on("#000000" if dark else "#ffffff"))
        strength = light if dark else 1 - light
        columns, rows = techniques.coordinates(light)
        away = ((across * columns + down * rows) % period - period / 2).abs()
        width = ((strength - least) * 4).clamp(0, 1) * period / 5
        strokes = (width + 0.5 - away).clamp(0, 1) * (width > 0.05) * layers.alpha
        drawn = torch.maximum(techniques.outlines(layers), strokes)
        return techniques.blend(techniques.rgb(sheet, drawn), techniques.rgb(ink, drawn), drawn)

    return draw


MARKS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {  # on -1..1 across and down a cell
    "dot": lambda x, y: (x.square() + y.square()) < 0.7,
    "diamond": lambda x, y: x.abs() + y.abs() < 0.9,
    "bar": lambda x, y: y.abs() < 0.55,
    "tile": lambda x, y: torch.maximum(x.abs(), y.abs()) < 0.8,
}


def tiled(rng: random.Random) -> Technique:
    """A mark in each cell of eight pixels, in the object's own colors or in one ink, on a sheet."""
    sheet, ink, dark = _sheet_and_ink(rng)
    shape, own = MARKS[rng.choice(list(MARKS))], rng.random() < 0.5

    def draw(layers: Layers) -> Tensor:
        columns, rows = techniques.coordinates(layers.picture)
        mark = shape((columns % 8 - 3.5) / 4, (rows % 8 - 3.5) / 4).to(layers.picture.dtype)
        cells = techniques.mosaic(layers.on(sheet), 8)
        light = techniques.mosaic(techniques.brightness(layers.on("#000000" if dark else "#ffffff")), 8)
        strength = 0.35 + 0.65 * (light if dark else 1 - light)
        colored = cells if own else techniques.blend(techniques.rgb(sheet, light), techniques.rgb(ink, light), strength)
        inside = (techniques.mosaic(layers.alpha, 8) > 0.35).to(mark.dtype)
        return techniques.blend(techniques.rgb(sheet, mark).expand_as(cells), colored, mark * inside)

    return draw


FAMILIES: tuple[Callable[[random.Random], Technique], ...] = (toned, lined, tiled)


# --- a block -------------------------------------------------------------------------------------------------


def _example(style: Technique) -> Tensor:
    """A light disc with a dark ring on blue, in a style."""
    side = torch.linspace(-1, 1, atlas.SIZE)
    x, y = torch.meshgrid(side, side, indexing="xy")
    alpha = ((x.square() + y.square()) < 0.5).float()[None, None]
    ring = ((x.square() + y.square()) > 0.2).float()[None, None]
    own = torch.tensor([0.9, 0.7, 0.3]).view(1, 3, 1, 1) * (1 - 0.7 * ring)
    ground = torch.tensor([0.5, 0.7, 1.0]).view(1, 3, 1, 1)
    return style(Layers(own * alpha + ground * (1 - alpha), alpha, ground))


def designs(block: str, world: scenes.World) -> dict[str, str]:
    """A block's subjects: drawings that were held out from the base, each in one block alone."""
    left = [(s, word) for s, word in sorted(world.held_out) if s not in subjects.DESIGNS]
    left = [(s, word) for s, word in left if not sets.SETS[word].one_color]
    random.Random("blocks").shuffle(left)
    place = BLOCKS.index(block) * SUBJECTS
    return dict(left[place : place + SUBJECTS])


def styles(block: str) -> dict[str, Technique]:
    """A block's styles, family after family, none close to another or to those that have a name."""
    found: dict[str, Technique] = {}
    shown = [_example(style) for style in (*techniques.BASE_TECHNIQUES.values(), *techniques.NEW_TECHNIQUES.values())]
    for i, name in enumerate(STYLE_NAMES[:STYLES]):
        rng = random.Random(f"{block} style {name}")
        while True:
            style = FAMILIES[i % len(FAMILIES)](rng)
            picture = _example(style)
            if all(float((picture - other).abs().mean()) > 0.1 for other in shown):
                break
        found[name] = style
        shown.append(picture)
    return found


def choice(block: str, world: scenes.World) -> concepts.Choice:
    return concepts.Choice(designs(block, world), tuple(styles(block)))


def enter(block: str) -> None:
    """Makes a block's styles known in this process, to what draws true pictures. ValueError for no block."""
    if block not in BLOCKS:
        raise ValueError(f"'{block}' is no block; there are {', '.join(BLOCKS)}")
    techniques.TECHNIQUES.update(styles(block))


def show(block: str, path: Path) -> None:
    """Every design plain, every style on one of them, and some pairs."""
    enter(block)
    world = scenes.World(atlas.load())
    chosen = choice(block, world)
    set_out = partial(scenes.Scene, ground="blue", size=100.0)
    taught = list(chosen.designs.items())
    rows = [set_out(*design, None) for design in taught]
    rows += [set_out(*taught[i % len(taught)], style) for style in chosen.styles for i in range(len(taught))]
    atlas.sheet(scenes.render(world.atlas, rows), len(taught)).save(path)


# --- training ------------------------------------------------------------------------------------------------


def train(block: str, only: Sequence[str] = ()) -> None:
    """Judge, LoRAs, gates, reference pictures and manifest of a block, as far as they are missing.

    only: names of LoRAs, and `judge`; what else is missing is left to another run, and so is the manifest.
    """
    enter(block)
    from demo.training import finish, fit_judge

    folder, device = FOLDER / block, "cuda" if torch.cuda.is_available() else "cpu"
    shipped = Path(__file__).resolve().parent.parent / "demo" / concepts.CHECKPOINT
    for source in (shipped, atlas.PATH):
        place = folder / (source.name if source == atlas.PATH else concepts.CHECKPOINT)
        place.parent.mkdir(parents=True, exist_ok=True)
        if not place.exists():
            os.link(source, place)
    host, world = str(current_host().tree), scenes.World(atlas.load())
    chosen = choice(block, world)
    names = [name for name in only if name != "judge"]
    if names or not only:
        finish.fit_loras(host, folder, device, names, choice=chosen)
    if not (folder / "weights" / "judge.safetensors").exists() and (not only or "judge" in only):
        settings = fit_judge.ON_A_GPU if device == "cuda" else fit_judge.JudgeSettings()
        fit_judge.fit(folder, device, dataclasses.replace(settings, designs=chosen.designs))
    if only:
        return
    finish.gate_loras(host, folder, device, [], choice=chosen)
    finish.manifest(folder, {}, choice=chosen, keep_weak=True)
    entries = json.loads((folder / "world.json").read_text(encoding="utf-8"))["loras"]
    weak = [name for name, entry in entries.items() if entry["weak"]]
    print(f"{block}: {len(entries) - len(weak)} LoRAs pass their gates; weak: {', '.join(weak) or 'none'}", flush=True)


def strong(block: str) -> tuple[list[str], list[str]]:
    """Subjects and styles whose LoRAs hold alone. FileNotFoundError where the block is not trained to the end."""
    entries = json.loads((FOLDER / block / "world.json").read_text(encoding="utf-8"))["loras"]
    of = {kind: [n for n, e in entries.items() if e["kind"] == kind and not e["weak"]] for kind in ("content", "style")}
    return of["content"], of["style"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("blocks", nargs="+", choices=BLOCKS)
    parser.add_argument("--only", nargs="+", default=[], help="LoRAs by name, or judge: train no more than these")
    parser.add_argument("--show", type=Path, help="draw the first block's concepts into this picture, train nothing")
    given = parser.parse_args()
    if given.show:
        show(given.blocks[0], given.show)
        return 0
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    for block in given.blocks:
        train(block, given.only)
    return 0


if __name__ == "__main__":
    sys.exit(main())
