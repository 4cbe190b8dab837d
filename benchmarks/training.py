"""What the pack's own training makes of the miniature's pictures, judged as the demo's LoRAs are.

python3 dev.py run benchmarks/training.py concept     Train Concept LoRA against the shipped LoRAs, three seeds
python3 dev.py run benchmarks/training.py prior       what class pictures keep of the class
python3 dev.py run benchmarks/training.py joint       one LoRA of a subject and a style, as the paper compares with
python3 dev.py run benchmarks/training.py unzip       UnZip LoRA and its ablation, B-LoRA and one DreamBooth LoRA,
                                                      all from the same single picture

Figures are shares of 32 pictures that the judges call right; each line says which seed.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent.parent))

import torch
from PIL import Image
from safetensors.torch import load_file

from demo import concepts, gates, judge, lora, miniature, world
from devhost.base import find_miniature
from devhost.inprocess import load_miniature_extension, load_pack

STEPS, RATE, RANK, BATCH = 450, 2e-3, 16, 8


class Bench:
    """The miniature twice: as ComfyUI loads it, to train on, and as the demo loads it, to be judged."""

    def __init__(self) -> None:
        self.pack = load_pack()
        load_miniature_extension()
        import comfy.sd
        import folder_paths

        found = find_miniature()
        self.folder = found.checkpoint.parent.parent
        self.output = Path(tempfile.mkdtemp())
        folder_paths.set_output_directory(str(self.output))
        with torch.inference_mode():
            self.model, self.clip, self.vae, _ = comfy.sd.load_checkpoint_guess_config(str(found.checkpoint))
        self.judged = miniature.load_miniature(str(found.checkpoint))
        self.names = {lora.file_name(name): name for name, _ in self.judged.unet.named_modules()}
        self.jury = judge.load_judge(str(self.folder / "weights" / "judge.safetensors"))
        self.concepts = {concept.name: concept for concept in concepts.concepts()}

    def shown(self, concept: concepts.Concept) -> Any:
        files = [self.folder / concept.picture(i) for i in range(len(concept.scenes))]
        frames = [torch.frombuffer(bytearray(Image.open(f).convert("RGB").tobytes()), dtype=torch.uint8) for f in files]
        images = torch.stack(frames).reshape(len(frames), 128, 128, 3) / 255
        return self.pack.nodes.bridge.training.Shown([images], list(concept.prompts))

    def settings(self, **changes: Any) -> Any:
        asked = {"steps": STEPS, "learning_rate": RATE, "rank": RANK, "batch_size": BATCH, **changes}
        return self.pack.ziplora_core.training.Settings(**asked)

    def train(self, concept: concepts.Concept, seed: int, **changes: Any) -> tuple[Path, float]:
        """(file, seconds)"""
        training = self.pack.nodes.bridge.training
        settings = self.settings(seed=seed, **{k: changes.pop(k) for k in list(changes) if k in _SETTINGS})
        task = training.Task([self.shown(concept)], settings, f"loras/{concept.name}", 128, **changes)
        began = time.monotonic()
        with torch.inference_mode():
            done = training.train_concept(self.model, self.clip, self.vae, task)
        return self.output / done.file, time.monotonic() - began

    def gates(self, concept: concepts.Concept, file: Path, seed: int = 1000) -> dict[str, float]:
        """As `demo.train --parts gates` judges a LoRA file."""
        with self.file(file):
            gate = gates.subject_gates if concept.kind == "content" else gates.style_gates
            figures, _ = gate(self.judged, self.jury, concept, seed)
            return {**figures, "base": gates.leak_gates(self.judged, self.jury, seed + 7)}

    def drift(self, concept: concepts.Concept, file: Path | None, seed: int = 2000) -> float:
        """Share of pictures of the class in which the judge sees the subject."""
        with contextlib.nullcontext() if file is None else self.file(file):
            pictures = gates.generate(self.judged, [CLASS_PROMPT] * gates.COUNT, seed)
        return float(self.jury.right(pictures, shape=concept.name).float().mean())

    @contextlib.contextmanager
    def file(self, file: Path) -> Iterator[None]:
        """A LoRA file on the judged model."""
        tensors = load_file(str(file))
        rank = next(t.shape[0] for k, t in tensors.items() if k.endswith("lora_down.weight"))
        branches = lora.attach(self.judged.unet, rank, float(rank))
        try:
            lora.load_into(branches, tensors)
            yield
        finally:
            lora.detach(self.judged.unet, branches)


_SETTINGS = ("steps", "learning_rate", "rank", "batch_size", "prior_weight")


def line(name: str, figures: dict[str, float]) -> str:
    return f"{name:34}" + "  ".join(f"{k} {v:.2f}" for k, v in figures.items())


def spread(several: list[dict[str, float]]) -> str:
    spreads = {k: (statistics.mean(v), statistics.pstdev(v)) for k in several[0] for v in [[f[k] for f in several]]}
    return "  ".join(f"{k} {mean:.2f} ± {sd:.2f}" for k, (mean, sd) in spreads.items())


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


CLASS_PROMPT = "a figure in flat style"


def joint(bench: Bench, seeds: int) -> None:
    """A subject and a style in one LoRA, twice as many steps, against two LoRAs trained here and zipped with the
    defaults on the references that they draw: share of 32 pictures of the subject in the style with both right."""
    training, solver = bench.pack.nodes.bridge.training, bench.pack.ziplora_core.solver
    loras, optimise = bench.pack.nodes.bridge.loras, bench.pack.nodes.bridge.optimise
    asked_for = bench.pack.nodes.bridge.references.Asked(4, 128)
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
                zipped, *_ = optimise.optimise(
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
    for key, layer in zipped.fitted.pair.layers.items():
        for which, f in layer.halves():
            m = getattr(zipped.coefficients, which)[key]
            name = key.removeprefix("diffusion_model.").removesuffix(".weight")
            halves[which][name] = (f.scale * f.up.float(), f.down.float() * m)
    return halves


# --- one picture ---------------------------------------------------------------------------------------------------

CASES = (("mushroom", "ember"), ("house", "mint"), ("icecream", "dusk"), ("lamp", "poster"))
ONE_STEPS, ONE_RATE, MERGER_RATE = 450, 1e-3, 5e-3
ABLATION = {
    "UnZip": {},
    "UnZip, one prompt": {"prompts_apart": False},
    "UnZip, all columns": {"columns_apart": False},
    "UnZip, no blocks": {"blocks_apart": False},
    "UnZip, no blocks, one prompt": {"blocks_apart": False, "prompts_apart": False},
    "UnZip, no blocks, all columns": {"blocks_apart": False, "columns_apart": False},
    "UnZip, nothing apart": {"prompts_apart": False, "columns_apart": False, "blocks_apart": False},
}
Layers = dict[str, tuple[torch.Tensor, torch.Tensor]]  # layer -> (up, down)
Halves = dict[str, Layers]


@dataclasses.dataclass(frozen=True)
class Taught:
    """What draws the content, what draws the style, and what is added up to draw both."""

    content: Layers
    style: Layers
    both: Halves


class OnePicture:
    """A subject in a style, rendered once: trained on in several ways, each asked for content, style and both."""

    def __init__(self, bench: Bench, subject: str, style: str, number: int, rate: float, steps: int):
        self.bench, self.rate, self.steps = bench, rate, steps
        self.subject, self.style = bench.concepts[subject], bench.concepts[style]
        scene = world.subject_scene(subject, style, random.Random(f"{subject} {style} {number}"))
        self.picture = world.render([scene]).movedim(1, -1).float()
        self.prompts = {
            "full": world.prompt(f"{self.subject.identifier} figure", None, self.style.identifier),
            "content": world.prompt(f"{self.subject.identifier} figure", None, None),
            "style": world.prompt(None, None, self.style.identifier),
        }

    def dreambooth(self, seed: int, prompt: str, layers: str = "attention") -> dict[str, torch.Tensor]:
        training = self.bench.pack.nodes.bridge.training
        settings = self.bench.settings(seed=seed, steps=self.steps, learning_rate=self.rate)
        task = training.Task([training.Shown([self.picture], [prompt])], settings, "loras/one", 128, layers)
        with torch.inference_mode():
            done = training.train_concept(self.bench.model, self.bench.clip, self.bench.vae, task)
        return load_file(str(self.bench.output / done.file))

    def unzip(self, seed: int, **apart: bool) -> Any:
        unzip, core = self.bench.pack.nodes.bridge.unzip, self.bench.pack.ziplora_core.unzip
        settings = core.Settings(
            steps=self.steps, learning_rate=self.rate, rank=RANK, batch_size=BATCH, seed=seed, merger_rate=MERGER_RATE
        )
        task = unzip.Task(self.picture, self.prompts, settings, "loras/unzipped", 128, **apart)
        with torch.inference_mode():
            return unzip.unzip_picture(self.bench.model, self.bench.clip, self.bench.vae, task)

    def ask(self, taught: Taught, seed: int = 1000) -> dict[str, float]:
        """content: the subject in known styles, by the content half alone; style: known shapes in the style, by the
        style half alone; together: the subject in the style, by both."""
        count, jury = gates.COUNT, self.bench.jury
        known = [concepts.KNOWN_STYLES[i % len(concepts.KNOWN_STYLES)] for i in range(count)]
        shapes = [concepts.UNSEEN_SHAPES[i % len(concepts.UNSEEN_SHAPES)] for i in range(count)]
        asked = {
            "content": ([concepts.subject_prompt(self.subject.identifier, s) for s in known], self.subject.name, known),
            "style": ([concepts.style_prompt(self.style.identifier, s) for s in shapes], shapes, self.style.name),
            "both": ([self.prompts["full"]] * count, self.subject.name, self.style.name),
        }
        found: dict[str, float] = {}
        loras = {"content": {"content": taught.content}, "style": {"style": taught.style}, "both": taught.both}
        for what, (prompts, shape, style) in asked.items():
            with attached(self.bench, loras[what]):
                pictures = gates.generate(self.bench.judged, prompts, seed)
            wanted = [[name] * count if isinstance(name, str) else name for name in (shape, style)]
            right = gates.rights(jury, pictures, *wanted)
            found |= {f"{what}/{k}": v for k, v in right.items()}
        return found


@contextlib.contextmanager
def attached(bench: Bench, halves: Halves) -> Iterator[None]:
    """These LoRAs added up on the judged model."""
    rank = sum(max(up.shape[1] for up, _ in layers.values()) for layers in halves.values())
    branches = lora.attach(bench.judged.unet, rank, float(rank))
    try:
        with torch.no_grad():
            for name, branch in branches.items():
                branch.up.zero_(), branch.down.zero_()
                start = 0
                for up, down in (layers[name] for layers in halves.values() if name in layers):
                    end = start + up.shape[1]
                    branch.up[:, start:end], branch.down[start:end] = up, down
                    start = end
        yield
    finally:
        lora.detach(bench.judged.unet, branches)


def of_file(names: dict[str, str], tensors: dict[str, torch.Tensor], only: str = "") -> Layers:
    """Layers by the judged model's names, of kohya's. names: `Bench.names`. only: a part of the name."""
    found = {}
    for key in tensors:
        name = key.removesuffix(".lora_up.weight")
        if name != key and only in name:
            found[name] = (tensors[key].float(), tensors[f"{name}.lora_down.weight"].float())
    return {names[name]: factors for name, factors in found.items()}


def of_pair(names: dict[str, str], done: Any) -> Halves:
    """The two files: added up, they are the zipped pair."""
    return {which: of_file(names, source.tensors) for which, source in done.pair.by_concept().items()}


def one_picture(
    bench: Bench, cases: list[tuple[str, str]], seeds: int, methods: list[str], rate: float, steps: int
) -> None:
    totals: dict[str, list[dict[str, float]]] = {}
    for subject, style in cases:
        for seed in range(seeds):
            one = OnePicture(bench, subject, style, seed, rate, steps)
            for method, taught in one_each(one, seed, methods):
                figures = one.ask(taught)
                totals.setdefault(method, []).append(figures)
                print(line(f"{subject} + {style} {seed}: {method}", figures), flush=True)
    for method, figures in totals.items():
        print(f"{method:34}{spread(figures)}", flush=True)


def one_each(one: OnePicture, seed: int, methods: list[str]) -> Iterator[tuple[str, Taught]]:
    if "DreamBooth" in methods:
        whole = of_file(one.bench.names, one.dreambooth(seed, one.prompts["full"]))
        yield "DreamBooth", Taught(whole, whole, {"content": whole})
    if "B-LoRA" in methods:
        tensors = one.dreambooth(seed, one.prompts["full"], "B-LoRA")
        content, style = (
            of_file(one.bench.names, tensors, block) for block in ("output_blocks_0_1_", "output_blocks_1_1_")
        )
        yield "B-LoRA", Taught(content, style, {"content": content, "style": style})
    for method, apart in ABLATION.items():
        if method in methods:
            done = one.unzip(seed, **apart)
            halves = of_pair(one.bench.names, done)
            yield method, Taught(halves["content"], halves["style"], halves)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["concept", "prior", "joint", "unzip"])
    parser.add_argument("--only", default="", help="names, by commas")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--rate", type=float)
    parser.add_argument("--methods", default=";".join(["DreamBooth", "B-LoRA", *ABLATION]), help="by semicolons")
    asked = parser.parse_args()
    bench = Bench()
    if asked.part == "concept":
        names = (asked.only or "house,mushroom,ember,candy").split(",")
        concept(bench, names, asked.seeds, asked.steps or STEPS, asked.rate or RATE)
    elif asked.part == "joint":
        joint(bench, asked.seeds)
    elif asked.part == "prior":
        prior(bench, (asked.only or "mushroom,house").split(","), asked.seeds)
    else:
        cases = [(a, b) for a, b in CASES if not asked.only or a in asked.only.split(",")]
        methods = asked.methods.split(";")
        one_picture(bench, cases, asked.seeds, methods, asked.rate or ONE_RATE, asked.steps or ONE_STEPS)


if __name__ == "__main__":
    main()
