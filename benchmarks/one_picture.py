"""A LoRA of the content and one of the style of a single picture, learned in several ways: training.py's `unzip`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from benchmarks.training_bench import BATCH, RANK, Bench, Halves, Layers, attached, line, of_file
from demo import concepts, gates, miniature, world

RESULTS = Path(__file__).resolve().parent / "results" / "unzip.jsonl"
ONE_STEPS, ONE_RATE = 225, 1e-3
ABLATION = {
    "UnZip": {},
    "UnZip, not trained as used": {"as_used": False},
    "UnZip, one prompt": {"prompts_apart": False},
    "UnZip, all columns": {"columns_apart": False},
    "UnZip, no blocks": {"blocks_apart": False},
    "UnZip, nothing apart": {"prompts_apart": False, "columns_apart": False, "blocks_apart": False},
}
# What `blocks` found, as starts of layer names (B-LoRA, arXiv 2403.14572, Sec. 4.1, finds SDXL's so).
BLOCKS = {concept: tuple(f"{name}." for name in names) for concept, names in miniature.BLOCKS.items()}


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
        shown = training.pictures.TrainingImages([self.picture] * len(prompts), prompts)
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


def of_pair(names: dict[str, str], done: Any) -> Halves:
    """The two files: added up, they are the zipped pair."""
    return {which: of_file(names, source.tensors) for which, source in done.pair.by_concept.items()}


def run(bench: Bench, asked: argparse.Namespace) -> None:
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
