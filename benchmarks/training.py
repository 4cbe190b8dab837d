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
import dataclasses
import functools
import json
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
        return self.pack.nodes.bridge.training.pictures.Shown([images], list(concept.prompts))

    def settings(self, **changes: Any) -> Any:
        asked = {"steps": STEPS, "learning_rate": RATE, "rank": RANK, "batch_size": BATCH, **changes}
        return self.pack.ziplora_core.training.Settings(**asked)

    def train(self, concept: concepts.Concept, seed: int, **changes: Any) -> tuple[Path, float]:
        """(file, seconds)"""
        training = self.pack.nodes.bridge.training.concept
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

    @functools.cache  # noqa: B019
    def true_features(self, shape: str, style: str) -> torch.Tensor:
        """The judge's mean features of true renderings."""
        rng = random.Random(f"truth {shape} {style}")
        colours = list(world.COLOURS)
        scenes = [
            world.subject_scene(shape, style, rng)
            if shape in world.SUBJECTS
            else world.shape_scene(shape, rng.choice(colours), style, rng)
            for _ in range(gates.COUNT)
        ]
        features: torch.Tensor = self.jury.scores(world.render(scenes))["features"]
        return features.mean(0)

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
    return f"{name:40}" + "  ".join(f"{k} {v:.2f}" for k, v in figures.items())


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
    training, solver = bench.pack.nodes.bridge.training.concept, bench.pack.ziplora_core.solver
    loras, optimise = bench.pack.nodes.bridge.lora.loras, bench.pack.nodes.bridge.optimize.zipping
    asked_for = bench.pack.nodes.bridge.drawing.sampling.Asked(4, 128)
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


# --- blocks --------------------------------------------------------------------------------------------------------

# What `blocks` found, as starts of layer names (B-LoRA, arXiv 2403.14572, Sec. 4.1, finds SDXL's so).
BLOCKS = {concept: tuple(f"{name}." for name in names) for concept, names in miniature.BLOCKS.items()}


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


# --- one picture ---------------------------------------------------------------------------------------------------

RESULTS = Path(__file__).resolve().parent / "results" / "unzip.jsonl"
CASES = (("mushroom", "ember"), ("house", "mint"), ("icecream", "dusk"), ("lamp", "poster"))
ONE_STEPS, ONE_RATE = 225, 1e-3
ABLATION = {
    "UnZip": {},
    "UnZip, not trained as used": {"as_used": False},
    "UnZip, one prompt": {"prompts_apart": False},
    "UnZip, all columns": {"columns_apart": False},
    "UnZip, no blocks": {"blocks_apart": False},
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

    def __init__(self, bench: Bench, pair: str, number: int, rate: float, steps: int):
        self.bench, self.rate, self.steps = bench, rate, steps
        subject, style = pair.split("+")
        self.subject, self.style = bench.concepts[subject], bench.concepts[style]
        scene = world.subject_scene(subject, style, random.Random(f"{subject} {style} {number}"))
        self.picture = world.render([scene]).movedim(1, -1).float()
        self.prompts = {
            "full": world.prompt(f"{self.subject.identifier} figure", None, self.style.identifier),
            "content": world.prompt(f"{self.subject.identifier} figure", None, None),
            "style": world.prompt(None, None, self.style.identifier),
        }

    def dreambooth(self, seed: int, layers: str = "attention", empty: bool = False) -> dict[str, torch.Tensor]:
        """empty: a fifth of the rows has an empty prompt, as UnZip's have."""
        training = self.bench.pack.nodes.bridge.training
        settings = self.bench.settings(seed=seed, steps=self.steps, learning_rate=self.rate)
        prompts = [self.prompts["full"]] * 4 + [""] * empty
        shown = training.pictures.Shown([self.picture] * len(prompts), prompts)
        task = training.concept.Task([shown], settings, "loras/one", 128, layers, b_lora=BLOCKS)
        with torch.inference_mode():
            done = training.concept.train_concept(self.bench.model, self.bench.clip, self.bench.vae, task)
        return load_file(str(self.bench.output / done.file))

    def unzip(self, seed: int, **changes: Any) -> Any:
        unzip, core = self.bench.pack.nodes.bridge.unzip, self.bench.pack.ziplora_core.unzip
        asked = {"steps": self.steps, "learning_rate": self.rate, "rank": RANK, "batch_size": BATCH, "seed": seed}
        asked |= {name: changes.pop(name) for name in list(changes) if name in core.Settings.__dataclass_fields__}
        task = unzip.Task(
            self.picture, self.prompts, core.Settings(**asked), "loras/unzipped", 128, **{"blocks": BLOCKS, **changes}
        )
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
            right = gates.rights(jury, pictures, *wanted) | {"distance": self._distance(pictures, *wanted)}
            found |= {f"{what}/{k}": v for k, v in right.items()}
        return found

    def _distance(self, pictures: torch.Tensor, shapes: list[str], styles: list[str]) -> float:
        """From the mean of the pictures of one shape and style to that of true renderings, in the judge's features;
        the mean over what was asked for."""
        features: torch.Tensor = self.bench.jury.scores(pictures)["features"]
        asked = list(zip(shapes, styles, strict=True))
        distances = []
        for pair in sorted(set(asked)):
            mean = features[torch.tensor([found == pair for found in asked])].mean(0)
            distances.append(float((mean - self.bench.true_features(*pair)).norm()))
        return statistics.mean(distances)


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


def of_file(names: dict[str, str], tensors: dict[str, torch.Tensor], blocks: tuple[str, ...] = ("",)) -> Layers:
    """Layers by the judged model's names, of kohya's. names: `Bench.names`. blocks: starts of the former."""
    found = {}
    for key in tensors:
        name = key.removesuffix(".lora_up.weight")
        if name != key and names[name].startswith(blocks):
            found[names[name]] = (tensors[key].float(), tensors[f"{name}.lora_down.weight"].float())
    return found


def of_pair(names: dict[str, str], done: Any) -> Halves:
    """The two files: added up, they are the zipped pair."""
    return {which: of_file(names, source.tensors) for which, source in done.pair.by_concept.items()}


def one_picture(bench: Bench, asked: argparse.Namespace) -> None:
    """Every method that is asked for and not in the results file yet, seed by seed."""
    for seed in range(asked.seeds):
        for pair in asked.pairs.split(","):
            done = {r["method"] for r in records(asked.results) if (r["pair"], r["seed"]) == (pair, seed)}
            one = OnePicture(bench, pair, seed, asked.rate or ONE_RATE, asked.steps or ONE_STEPS)
            for method in asked.methods.split(";"):
                if method in done:
                    continue
                began = time.monotonic()
                taught = learned(one, seed, method)
                seconds = time.monotonic() - began
                figures = {k: round(v, 4) for k, v in one.ask(taught).items()}
                record = {"pair": pair, "seed": seed, "method": method, **figures}
                with open(asked.results, "a", encoding="utf-8") as file:
                    file.write(json.dumps(record) + "\n")
                print(line(f"{pair} {seed}: {method}, {seconds:.0f} s", figures), flush=True)
    print(table(asked.results))


def learned(one: OnePicture, seed: int, method: str) -> Taught:
    names = one.bench.names
    if method.startswith("DreamBooth"):
        whole = of_file(names, one.dreambooth(seed, empty=method != "DreamBooth"))
        return Taught(whole, whole, {"content": whole})
    if method == "B-LoRA":
        tensors = one.dreambooth(seed, "B-LoRA")
        halves = {concept: of_file(names, tensors, blocks) for concept, blocks in BLOCKS.items()}
    else:
        halves = of_pair(names, one.unzip(seed, **ABLATION[method]))
    return Taught(halves["content"], halves["style"], halves)


def records(results: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for text in results.read_text(encoding="utf-8").splitlines()] if results.exists() else []


def table(results: Path) -> str:
    """By method: shape and style right (mean, ± the standard deviation of the seeds), distance to true renderings; of
    each, how many pictures are better and worse than from one DreamBooth LoRA."""
    asked = {"content": "its subject in other styles", "style": "its style on other shapes", "both": "both together"}
    rows = [f"| from one picture | {' | '.join(asked.values())} | seeds |", "|---" * 5 + "|"]
    by_method: dict[str, dict[tuple[str, int], dict[str, Any]]] = {}
    for record in records(results):
        by_method.setdefault(record["method"], {})[record["pair"], record["seed"]] = record
    for method, found in by_method.items():
        seeds = sorted({seed for _, seed in found})
        cells = []
        for what in asked:
            of_seeds = [
                statistics.mean(r[f"{what}/both"] for (_, s), r in found.items() if s == seed) for seed in seeds
            ]
            distance = statistics.mean(r[f"{what}/distance"] for r in found.values())
            cells.append(f"{statistics.mean(of_seeds):.2f} ± {statistics.pstdev(of_seeds):.2f}, {distance:.1f}")
            plain = by_method.get("DreamBooth", {})
            if method != "DreamBooth" and plain:
                for key, sign in ((f"{what}/both", 1), (f"{what}/distance", -1)):
                    gains = [sign * (r[key] - plain[run][key]) for run, r in found.items() if run in plain]
                    cells[-1] += f" ({sum(g > 0 for g in gains)}:{sum(g < 0 for g in gains)})"
        rows.append(f"| {method} | {' | '.join(cells)} | {len(seeds)} |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["concept", "prior", "joint", "blocks", "unzip"])
    parser.add_argument("--only", default="", help="names, by commas, of concepts")
    parser.add_argument("--pairs", default=",".join(map("+".join, CASES)), help="of unzip, by commas")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--rate", type=float)
    every = ";".join(["DreamBooth", "DreamBooth, empty prompts", "B-LoRA", *ABLATION])
    parser.add_argument("--methods", default=every, help="of unzip, by semicolons")
    parser.add_argument("--results", type=Path, default=RESULTS, help="of unzip")
    parser.add_argument("--table", action="store_true", help="measure nothing, print the table of unzip")
    asked = parser.parse_args()
    if asked.table:
        print(table(asked.results))
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
        one_picture(bench, asked)


if __name__ == "__main__":
    main()
