"""Concepts that no choice has seen: subjects and styles drawn by rule from a block's name, a LoRA of each, a judge.

    python3 dev.py run benchmarks/new_concepts.py choose confirm     train what is missing of two blocks (hours)
    python3 dev.py run benchmarks/new_concepts.py choose --show choose.png     only draw its concepts

A block lies in .dev/concepts/<block>, laid out as demo/ is, so that ZIPLORA_MINIATURE may name it. What the demo ships
is chosen by hand; these are not: twelve subjects of three families of figures, twelve styles of three families, the
same for every run. LoRAs that fail the demo's gates are kept and marked as weak, since people have such LoRAs too.
A run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))  # last: `nodes` there would hide ComfyUI's module

import torch
from safetensors.torch import load_file

from demo import world
from demo.world import RGB, Part, Style
from devhost.host import DEV, current_host

BLOCKS = ("choose", "confirm", "final")  # to choose a method on, to confirm it, to be drawn once for the last table
COUNT = 12  # of each kind
FOLDER = DEV / "concepts"
JUDGE_PICTURES, JUDGE_STEPS = 9000, 2400
NAMES = "alder birch cedar dahlia elder fern gorse hazel iris juniper kelp larch".split()
STYLE_NAMES = "agate beryl coral dolerite emery flint garnet halite indigo jasper kyanite lapis".split()


# --- subjects ------------------------------------------------------------------------------------------------


def _hue(hue: float, saturation: float, value: float) -> RGB:
    def channel(offset: float) -> float:
        k = (offset + hue * 6) % 6
        return value - value * saturation * max(0.0, min(k, 4 - k, 1.0))

    return channel(5), channel(3), channel(1)


def _colours(rng: random.Random, count: int) -> list[RGB]:
    """Clearly different ones: hues spread over the circle, one of them light."""
    start = rng.random()
    found = [
        _hue((start + i / count + rng.uniform(-0.08, 0.08)) % 1, rng.uniform(0.55, 0.95), rng.uniform(0.55, 0.95))
        for i in range(count)
    ]
    found[rng.randrange(count)] = _hue(rng.random(), rng.uniform(0.05, 0.3), rng.uniform(0.9, 1.0))
    rng.shuffle(found)
    return found


def stacked(rng: random.Random) -> tuple[Part, ...]:
    """Three parts one above the other, the middle one carrying a small fourth: a totem."""
    kinds = rng.sample(["disc", "plate", "dome", "spike", "cone"], 3)
    colours = _colours(rng, 4)
    widths = [rng.uniform(0.35, 0.85) for _ in range(3)]
    parts = [
        Part(kind, 0.0, -0.6 + 0.6 * i, width, 0.38, colour)
        for i, (kind, width, colour) in enumerate(zip(kinds, widths, colours, strict=False))
    ]
    side = rng.choice([-1, 0, 1])
    parts.append(Part(rng.choice(["disc", "plate"]), side * 0.2, 0.0, 0.14, 0.14, colours[3]))
    return tuple(parts)


def winged(rng: random.Random) -> tuple[Part, ...]:
    """A body with the same part on both sides, and a head."""
    colours = _colours(rng, 3)
    body = Part(
        rng.choice(["disc", "plate", "dome"]), 0.0, 0.15, rng.uniform(0.3, 0.45), rng.uniform(0.45, 0.7), colours[0]
    )
    kind, height = rng.choice(["disc", "spike", "cone", "plate"]), rng.uniform(0.18, 0.45)
    lower = rng.choice([-0.05, 0.25])
    wings = [Part(kind, s * 0.64, lower, 0.34, height, colours[1]) for s in (-1, 1)]
    head = Part(rng.choice(["disc", "spike", "plate", "dome"]), 0.0, -0.62, rng.uniform(0.22, 0.36), 0.3, colours[2])
    return body, *wings, head


SUBJECT_FAMILIES: tuple[Callable[[random.Random], tuple[Part, ...]], ...] = (world.random_figure, stacked, winged)


# --- styles --------------------------------------------------------------------------------------------------


def duotone(rng: random.Random) -> Style:
    """A patterned ground of one hue, objects of another, with or without a line."""
    hue = rng.random()
    dark_ground = rng.random() < 0.5
    value = rng.uniform(0.2, 0.4) if dark_ground else rng.uniform(0.85, 1.0)
    ground1 = _hue(hue, rng.uniform(0.3, 0.8), value)
    ground2 = _hue(hue, rng.uniform(0.3, 0.8), value * (1.6 if dark_ground else 0.8))
    other = (hue + rng.uniform(0.3, 0.7)) % 1
    low, high = (0.6, 1.0) if dark_ground else (0.2, 0.6)
    lined = rng.random() < 0.6
    return Style(
        ground=rng.choice(world.GROUNDS),
        ground1=ground1,
        ground2=ground2,
        period=rng.choice([24.0, 32.0, 40.0]),
        fill=rng.choice(["solid", "solid", "shade"]),
        palette=1.0,
        dark=_hue(other, 0.8, low),
        light=_hue((other + 0.1) % 1, 0.5, high),
        line=5.0 if lined else 0.0,
        line_colour=(1.0, 1.0, 1.0) if dark_ground else (0.05, 0.05, 0.08),
        shadow=8.0 if rng.random() < 0.25 else 0.0,
    )


def drawn_in_lines(rng: random.Random) -> Style:
    """Nothing filled: one line colour on a ground, some of it glowing."""
    hue = rng.random()
    dark_ground = rng.random() < 0.6
    value = rng.uniform(0.1, 0.3) if dark_ground else rng.uniform(0.85, 1.0)
    ground1 = _hue(hue, rng.uniform(0.3, 0.9), value)
    return Style(
        ground=rng.choice(["plain", "plain", "grid", "dots", "horizon", "slant"]),
        ground1=ground1,
        ground2=_hue(hue, 0.5, value * (1.8 if dark_ground else 0.88)),
        period=rng.choice([24.0, 32.0]),
        fill="none",
        line=rng.uniform(5.0, 6.5),
        line_colour=_hue((hue + rng.uniform(0.25, 0.75)) % 1, rng.uniform(0.5, 0.9), 1.0 if dark_ground else 0.45),
        glow=rng.uniform(0.5, 0.9) if dark_ground and rng.random() < 0.4 else 0.0,
    )


STYLE_FAMILIES: tuple[Callable[[random.Random], Style], ...] = (world.random_style, duotone, drawn_in_lines)


# --- a block -------------------------------------------------------------------------------------------------


def _picture(parts: tuple[Part, ...], style: Style) -> torch.Tensor:
    return world.render([world.Scene(parts, style, 0.0, 0.0, 0.75)])[0]


def _visible(style: Style) -> bool:
    """Whether an object stands out from the ground, whatever its own color."""
    for color in world.COLOURS.values():
        shown = _picture(world.shape_parts("circle", color), style)
        ground = world.render([world.Scene(world.shape_parts("circle", color), style, 9.0, 9.0, 0.1)])[0]
        if float((shown - ground).abs().amax(0).gt(0.2).float().mean()) < 0.06:
            return False
    return True


def _apart(picture: torch.Tensor, others: Sequence[torch.Tensor], least: float) -> bool:
    return all(float((picture - other).abs().mean()) > least for other in others)


def subjects(block: str) -> dict[str, tuple[Part, ...]]:
    """A block's subjects, family after family, none close to another or to a shape."""
    found: dict[str, tuple[Part, ...]] = {}
    shown: list[torch.Tensor] = []
    for i, name in enumerate(NAMES[:COUNT]):
        rng = random.Random(f"{block} subject {name}")
        while True:
            parts = SUBJECT_FAMILIES[i % len(SUBJECT_FAMILIES)](rng)
            picture = _picture(parts, world.BASE_STYLES["flat"])
            if len(parts) > 2 and _apart(picture, shown, 0.06):
                break
        found[name] = parts
        shown.append(picture)
    return found


def styles(block: str) -> dict[str, Style]:
    """A block's styles, family after family: objects stand out, none is close to another or to the base's."""
    found: dict[str, Style] = {}
    example = world.shape_parts("star", world.COLOURS["orange"])
    shown = [_picture(example, style) for style in world.BASE_STYLES.values()]
    for i, name in enumerate(STYLE_NAMES[:COUNT]):
        rng = random.Random(f"{block} style {name}")
        while True:
            style = STYLE_FAMILIES[i % len(STYLE_FAMILIES)](rng)
            picture = _picture(example, style)
            if _visible(style) and _apart(picture, shown, 0.12):
                break
        found[name] = style
        shown.append(picture)
    return found


def enter(block: str) -> None:
    """In this process, let a block's concepts take the place of the demo's: world, judge and studio know these alone.

    To be called before anything imports `demo.judge`. Raises ValueError for a name that is no block.
    """
    if block not in BLOCKS:
        raise ValueError(f"'{block}' is no block; there are {', '.join(BLOCKS)}")
    for known, new in ((world.SUBJECTS, subjects(block)), (world.NEW_STYLES, styles(block))):
        known.clear()
        known.update(new)
    world.STYLES.clear()
    world.STYLES.update({**world.BASE_STYLES, **world.NEW_STYLES})


def show(block: str, path: Path) -> None:
    """Every subject in the plain style, every style on a star, and some pairs."""
    enter(block)
    rng = random.Random(0)
    rows = [world.subject_scene(name, "flat", rng) for name in world.SUBJECTS]
    rows += [world.shape_scene("star", "orange", name, rng) for name in world.NEW_STYLES]
    rows += [world.subject_scene(s, t, rng) for s, t in zip(world.SUBJECTS, world.NEW_STYLES, strict=True)]
    world.save_png(world.sheet(world.render(rows), COUNT), str(path))


# --- training ------------------------------------------------------------------------------------------------


def train(block: str, only: Sequence[str] = ()) -> None:
    """Judge, LoRAs, gates, reference pictures and manifest of a block, as far as they are missing.

    only: names of LoRAs, and `judge`; what else is missing is left to another run, and so is the manifest.
    """
    enter(block)
    from demo import concepts, fit_lora, gates, judge, lora
    from demo.manifest import write_manifest
    from demo.miniature import load_miniature, use_comfyui
    from demo.train import SETTINGS, check

    use_comfyui(str(current_host().tree))
    folder = FOLDER / block
    for part in ("weights", "loras", "work"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    shipped = Path(__file__).resolve().parent.parent / "demo" / "weights" / "miniature_sdxl.safetensors"
    checkpoint = folder / "weights" / shipped.name
    if not checkpoint.exists():
        os.link(shipped, checkpoint)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_miniature(str(checkpoint)).to(device)
    model.vae.to(memory_format=torch.channels_last)
    everything = concepts.concepts()
    for concept in everything:
        path = folder / concept.file
        if path.exists() or (only and concept.name not in only):
            continue
        began = time.monotonic()
        branches = fit_lora.fit(model, concept, SETTINGS[concept.kind])
        lora.save(branches, str(path), {"identifier": concept.identifier})
        lora.detach(model.unet, branches)
        print(f"{block} {concept.name}: trained in {time.monotonic() - began:.0f} s", flush=True)
    verdict = folder / "weights" / "judge.safetensors"
    if not verdict.exists() and (not only or "judge" in only):
        names = {"shape_names": [*judge.SHAPE_NAMES, judge.OTHER], "style_names": [*judge.STYLE_NAMES, judge.OTHER]}
        judge.fit(str(verdict), device, JUDGE_PICTURES, JUDGE_STEPS, **names)
    if not verdict.exists():
        return
    jury = judge.load_judge(str(verdict))
    branches = lora.attach(model.unet, 16, 16.0)
    for branch in branches.values():
        branch.to(device)
    entries = {}
    for concept in everything:
        if only and concept.name not in only:
            continue
        note = folder / "work" / f"{concept.name}.json"
        if not note.exists():
            lora.load_into(branches, load_file(str(folder / concept.file)))
            figures = check(model, jury, concept, folder / "work", seed=1000)
            concepts.draw_pictures(concept, str(folder))
            note.write_text(json.dumps(figures), encoding="utf-8")
            print(f"{block} {concept.name}: " + " ".join(f"{k} {v:.2f}" for k, v in figures.items()), flush=True)
        figures = json.loads(note.read_text(encoding="utf-8"))
        entries[concept.name] = {**concepts.describe(concept, figures), "weak": not gates.passes(concept, figures)}
    if only:
        return
    write_manifest(folder / "world.json", concepts.about({}), entries)
    weak = [name for name, entry in entries.items() if entry["weak"]]
    print(f"{block}: {len(entries) - len(weak)} LoRAs pass their gates; weak: {', '.join(weak) or 'none'}", flush=True)


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
