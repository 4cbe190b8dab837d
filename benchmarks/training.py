"""What the pack's own training makes of the miniature's pictures, judged as the demo's LoRAs are.

python3 dev.py run benchmarks/training.py concept     Train Concept LoRA against the shipped LoRAs, three seeds
python3 dev.py run benchmarks/training.py prior       what class pictures keep of the class
python3 dev.py run benchmarks/training.py joint       one LoRA of a subject and a style, as the paper compares with
python3 dev.py run benchmarks/training.py blocks      which blocks of the miniature draw shape, which draw style
python3 dev.py run benchmarks/training.py unzip       UnZip LoRA and its ablation, B-LoRA and one DreamBooth LoRA,
                                                      all from the same single picture; adds to its results file, so
                                                      it can be stopped and continued; --table only prints what is there

Figures are shares of 32 pictures that the judges call right; each line says which seed.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent.parent))

import torch
from safetensors.torch import load_file

from benchmarks import one_picture
from benchmarks.training_bench import (
    CASES,
    CLASS_PROMPT,
    RATE,
    STEPS,
    Bench,
    Halves,
    attached,
    line,
    of_file,
    spread,
)
from demo import concepts, gates, world


def concept(bench: Bench, names: list[str], seeds: int, steps: int, rate: float) -> None:
    for name in names:
        taught = bench.concepts[name]
        print(line(f"{name}: shipped", bench.gates(taught, bench.folder / taught.file)), flush=True)
        found = []
        for seed in range(seeds):
            file, seconds = bench.train(taught, seed, steps=steps, learning_rate=rate)
            found.append(bench.gates(taught, file))
            print(line(f"{name}: trained here, seed {seed}, {seconds:.0f} s", found[-1]), flush=True)
        print(f"{name}: mean ± sd  {spread(found)}", flush=True)


def prior(bench: Bench, names: list[str], seeds: int) -> None:
    """The class of a subject here is "a figure": one that has no name. drift: share of pictures of that prompt in which
    the judge sees the subject; base: of the base's own prompts, those that still come out right."""
    for name in names:
        taught = bench.concepts[name]
        print(line(f"{name}: base model", {"drift": bench.drift(taught, None)}), flush=True)
        for said, changes in (("no class pictures", {}), ("32 class pictures", {"class_prompt": CLASS_PROMPT})):
            found = []
            for seed in range(seeds):
                file, _ = bench.train(taught, seed, **changes)
                found.append({**bench.gates(taught, file), "drift": bench.drift(taught, file)})
            print(f"{name}: {said:28}{spread(found)}", flush=True)


def joint(bench: Bench, seeds: int) -> None:
    """A subject and a style in one LoRA, twice as many steps, against two LoRAs trained here and zipped with the
    defaults on the references that they draw: share of 32 pictures of the subject in the style with both right."""
    training, solver = bench.pack.nodes.bridge.training.concept, bench.pack.ziplora_core.solver
    loras, optimise = bench.pack.nodes.bridge.lora.loras, bench.pack.nodes.bridge.optimize.zipping
    asked_for = bench.pack.nodes.bridge.drawing.sampling.ReferenceRequest(4, 128)
    for names in CASES[:2]:
        subject, style = (bench.concepts[name] for name in names)
        found: dict[str, list[dict[str, float]]] = {"joint training": [], "zipped": []}
        for seed in range(seeds):
            settings = bench.settings(seed=seed, steps=2 * STEPS)
            task = training.Task([bench.shown(subject), bench.shown(style)], settings, "loras/joint", 128)
            with torch.inference_mode():
                done = training.train_concept(bench.model, bench.clip, bench.vae, task)
            found["joint training"].append(
                pair_right(bench, subject, style, {"content": of_file(bench.names, done.lora_model)})
            )
            parts = [load_file(str(bench.train(c, seed + 10 * i)[0])) for i, c in enumerate((subject, style))]
            prompts = {"content": subject.prompts[0], "style": style.prompts[0]}
            with torch.inference_mode():
                encoded = {
                    c: bench.clip.encode_from_tokens_scheduled(bench.clip.tokenize(p)) for c, p in prompts.items()
                }
                zipped, *_ = optimise.optimize(
                    bench.model,
                    loras.pair(*parts, 1.0, 1.0),
                    encoded,
                    dict.fromkeys(prompts),
                    solver.Settings(seed=seed),
                    asked_for,
                )
            found["zipped"].append(pair_right(bench, subject, style, of_zipped(zipped)))
        for method, figures in found.items():
            print(f"{subject.name} + {style.name}: {method:20}{spread(figures)}", flush=True)


def pair_right(bench: Bench, subject: concepts.Concept, style: concepts.Concept, halves: Halves) -> dict[str, float]:
    count = gates.COUNT
    with attached(bench, halves):
        pictures = gates.generate(
            bench.judged, [concepts.pair_prompt(subject.identifier, style.identifier)] * count, 1000
        )
    return gates.rights(bench.jury, pictures, [subject.name] * count, [style.name] * count)


def of_zipped(zipped: Any) -> Halves:
    """A zipped pair's two halves, coefficients in them."""
    halves: Halves = {"content": {}, "style": {}}
    for key, layer in zipped.fitted.loras.layers.items():
        for which, f in layer.items():
            m = zipped.coefficients[which][key]
            name = key.removeprefix("diffusion_model.").removesuffix(".weight")
            halves[which][name] = (f.scale * f.up.float(), f.down.float() * m)
    return halves


def blocks(bench: Bench, seed: int = 3000) -> None:
    """Asked for one shape in one style (A), with cross-attention of some blocks seeing a prompt of another shape in
    another style (B): in what share of the pictures the judge sees whose shape and whose style. Base's own words."""
    every = [name for name, part in bench.judged.unet.named_modules() if hasattr(part, "transformer_blocks")]
    groups = [every[i : i + length] for length in (1, 2) for i in range(len(every) - length + 1)]
    asked = _two_prompts(gates.COUNT, random.Random(seed))
    prompts = [[world.prompt(shape, colour, style) for shape, colour, style in side] for side in asked]
    for group in [[], *groups, every]:
        with told(bench, group, prompts[1]):
            pictures = gates.generate(bench.judged, prompts[0], seed)
        figures = {}
        for side, wanted in zip("AB", asked, strict=True):
            right = gates.rights(bench.jury, pictures, [w[0] for w in wanted], [w[2] for w in wanted])
            figures |= {f"{side}'s {what}": right[what] for what in ("shape", "style")}
        print(line(" and ".join(group if len(group) < 3 else ["all"]) or "none", figures), flush=True)


def _two_prompts(count: int, rng: random.Random) -> list[list[tuple[str, str, str]]]:
    """Two lists of (shape, colour, style): side by side, other shapes, other styles, the same colour."""
    found: list[list[tuple[str, str, str]]] = [[], []]
    while len(found[0]) < count:
        colour = rng.choice(list(world.COLOURS))
        one, other = ((rng.choice(world.SHAPES), rng.choice(list(world.BASE_STYLES))) for _ in range(2))
        if one[0] != other[0] and one[1] != other[1] and not {one, other} & world.HELD_OUT:
            for side, (shape, style) in zip(found, (one, other), strict=True):
                side.append((shape, colour, style))
    return found


@contextlib.contextmanager
def told(bench: Bench, group: list[str], prompts: list[str]) -> Iterator[None]:
    """These prompts, one a picture, in the cross-attention of some blocks of the judged model."""
    with_text, without = (bench.judged.conditions(p)[0] for p in (prompts, [""]))
    context = torch.cat([with_text, without.expand(len(prompts), -1, -1)])  # as `Miniature.sample` guides

    def instead(module: torch.nn.Module, args: Any, given: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {**given, "context": context}

    parts = [part for name in group for part in bench.judged.unet.get_submodule(name).transformer_blocks]
    hooks = [part.attn2.register_forward_pre_hook(instead, with_kwargs=True) for part in parts]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["concept", "prior", "joint", "blocks", "unzip"])
    parser.add_argument("--only", default="", help="names, by commas, of concepts")
    parser.add_argument("--pairs", default=",".join(map("+".join, CASES)), help="of unzip, by commas")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--rate", type=float)
    every = ";".join(["DreamBooth", "DreamBooth, empty prompts", "B-LoRA", *one_picture.ABLATION])
    parser.add_argument("--methods", default=every, help="of unzip, by semicolons")
    parser.add_argument("--results", type=Path, default=one_picture.RESULTS, help="of unzip")
    parser.add_argument("--table", action="store_true", help="measure nothing, print the table of unzip")
    asked = parser.parse_args()
    if asked.table:
        print(one_picture.table(asked.results))
        return
    bench = Bench()
    if asked.part == "concept":
        names = (asked.only or "house,mushroom,ember,candy").split(",")
        concept(bench, names, asked.seeds, asked.steps or STEPS, asked.rate or RATE)
    elif asked.part == "joint":
        joint(bench, asked.seeds)
    elif asked.part == "prior":
        prior(bench, (asked.only or "mushroom,house").split(","), asked.seeds)
    elif asked.part == "blocks":
        blocks(bench)
    else:
        one_picture.run(bench, asked)


if __name__ == "__main__":
    main()
