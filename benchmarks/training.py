"""What the pack's own training makes of the miniature's pictures, judged as the demo's LoRAs are.

python3 dev.py run benchmarks/training.py concept     Train Concept LoRA against the shipped LoRAs, three seeds
python3 dev.py run benchmarks/training.py prior       what class pictures keep of the class
python3 dev.py run benchmarks/training.py joint       one LoRA of a subject and a style, as the paper compares with
python3 dev.py run benchmarks/training.py blocks      which blocks of the miniature draw shape, which draw style
python3 dev.py run benchmarks/training.py unzip       UnZip LoRA and its ablation, B-LoRA, Inspiration Tree, one
                                                      DreamBooth LoRA, all from the same single picture; adds
                                                      to its results file, so it can be stopped and continued;
                                                      --table only prints what is there

Figures are shares of 32 pictures that the judges call right; each line says which seed. With ZIPLORA_TEST_DEVICE=auto
all of it is on the GPU that ComfyUI finds.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent.parent))

import torch
from safetensors.torch import load_file

from benchmarks import one_picture
from benchmarks.training_bench import (
    COUNT,
    RATE,
    STEPS,
    Bench,
    Halves,
    attached,
    line,
    of_file,
    spread,
)
from demo.manifest import Asked, Trained
from demo.miniature import generate
from demo.truth import rights, shares


def concept(bench: Bench, names: list[str], seeds: int, steps: int, rate: float) -> None:
    for name in names:
        taught = bench.concepts[name]
        print(line(f"{name}: shipped", bench.gates(taught, bench.folder / "loras" / taught.learned.file)), flush=True)
        found = []
        for seed in range(seeds):
            file, seconds = bench.train(taught, seed, steps=steps, learning_rate=rate)
            found.append(bench.gates(taught, file))
            print(line(f"{name}: trained here, seed {seed}, {seconds:.0f} s", found[-1]), flush=True)
        print(f"{name}: mean ± sd  {spread(found)}", flush=True)


def prior(bench: Bench, names: list[str], seeds: int) -> None:
    """drift: share of pictures of the class's prompt in which the judge sees the subject; base: of the base's own
    prompts, those that still come out right."""
    for name in names:
        taught = bench.concepts[name]
        print(line(f"{name}: base model", {"drift": bench.drift(taught, None)}), flush=True)
        for said, changes in (("no class pictures", {}), ("32 class pictures", {"class_prompt": taught.of_class})):
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
    asked_for = bench.pack.nodes.bridge.drawing.sampling.ReferenceRequest(4, bench.manifest.size)
    for names in bench.cases[:2]:
        subject, style = (bench.concepts[name] for name in names)
        found: dict[str, list[dict[str, float]]] = {"joint training": [], "zipped": []}
        for seed in range(seeds):
            settings = bench.settings(seed=seed, steps=2 * STEPS)
            task = training.Task(
                [bench.shown(subject), bench.shown(style)], settings, "loras/joint", bench.manifest.size
            )
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


def pair_right(bench: Bench, subject: Trained, style: Trained, halves: Halves) -> dict[str, float]:
    with attached(bench, halves):
        return bench.ask([Asked(bench.manifest.prompt(subject, style), subject.name, style.name)] * COUNT, 1000)


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
    """Asked for one subject in one style (A), with cross-attention of some blocks seeing a prompt of another subject in
    another style (B): in what share of the pictures the judge sees whose subject and whose style. Base's own words."""
    every = [name for name, part in bench.judged.unet.named_modules() if hasattr(part, "transformer_blocks")]
    groups = [every[i : i + length] for length in (1, 2) for i in range(len(every) - length + 1)]
    one, other = _two_prompts(bench.manifest.known, COUNT, random.Random(seed))
    for group in [[], *groups, every]:
        with told(bench, group, [asked.prompt for asked in other]):
            pictures = generate(bench.judged, [asked.prompt for asked in one], seed)
        figures = {}
        for side, wanted in zip("AB", (one, other), strict=True):
            right = shares(rights(bench.truth, pictures, wanted))
            figures |= {f"{side}'s {what}": right[what] for what in ("subject", "style")}
        print(line(" and ".join(group if len(group) < 3 else ["all"]) or "none", figures), flush=True)


def _two_prompts(known: Sequence[Asked], count: int, rng: random.Random) -> tuple[list[Asked], list[Asked]]:
    """Side by side, prompts of other subjects in other styles."""
    found: tuple[list[Asked], list[Asked]] = ([], [])
    while len(found[0]) < count:
        pair = rng.sample(known, 2)
        if pair[0].subject != pair[1].subject and pair[0].style != pair[1].style:
            for side, asked in zip(found, pair, strict=True):
                side.append(asked)
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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["concept", "prior", "joint", "blocks", "unzip"])
    parser.add_argument("--only", default="", help="names, by commas, of concepts")
    parser.add_argument("--pairs", default="", help="of unzip, by commas; default: four, or all that there are")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--rate", type=float)
    every = ";".join(["DreamBooth", "DreamBooth, empty prompts", "B-LoRA", one_picture.TREE, *one_picture.ABLATION])
    parser.add_argument("--methods", default=every, help="of unzip, by semicolons")
    parser.add_argument("--results", type=Path, default=one_picture.RESULTS, help="of unzip")
    parser.add_argument("--table", action="store_true", help="measure nothing, print the table of unzip")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="of unzip")
    asked = parser.parse_args()
    if asked.part == "unzip":
        whole = asked.table or one_picture.run(asked)
        print(one_picture.table(asked.results))
        return not whole
    bench = Bench()
    if asked.part == "concept":
        names = asked.only.split(",") if asked.only else [n for pair in bench.cases[:2] for n in pair]
        concept(bench, names, asked.seeds, asked.steps or STEPS, asked.rate or RATE)
    elif asked.part == "joint":
        joint(bench, asked.seeds)
    elif asked.part == "prior":
        prior(bench, asked.only.split(",") if asked.only else [pair[0] for pair in bench.cases[:2]], asked.seeds)
    else:
        blocks(bench)
    return 0


if __name__ == "__main__":
    sys.exit(main())
