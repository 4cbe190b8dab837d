"""A LoRA of the content and one of the style of a single picture, learned in several ways: training.py's `unzip`."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
import random
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from benchmarks.quality_table import refuse_another_world
from benchmarks.training_bench import BATCH, COUNT, RANK, Bench, Halves, Layers, attached, cases, line, of_file
from benchmarks.workers import share_out
from demo.manifest import Asked, read_manifest
from demo.miniature import generate
from demo.truth import rights, shares

RESULTS = Path(__file__).resolve().parent / "results" / "unzip_drawn.jsonl"
ONE_STEPS, ONE_RATE = 225, 1e-3
TREE = "Inspiration Tree"  # one split; which word is the subject's is chosen by the judge, which no user has
SPLIT_STEPS, SPLIT_RATE = 200, 1e-2  # ten times the paper's rate, for words of 48 and 80 numbers
ABLATION = {
    "UnZip": {},
    "UnZip, not trained as used": {"as_used": False},
    "UnZip, one prompt": {"prompts_apart": False},
    "UnZip, all columns": {"columns_apart": False},
    "UnZip, no blocks": {"blocks_apart": False},
    "UnZip, nothing apart": {"prompts_apart": False, "columns_apart": False, "blocks_apart": False},
}


@dataclasses.dataclass(frozen=True)
class Taught:
    """What draws the content, what draws the style, and what is added up to draw both.

    words: of the two identifiers, where vectors of words were learned and no layers.
    """

    content: Layers
    style: Layers
    both: Halves
    words: tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]] | None = None


class OnePicture:
    """A subject in a style, rendered once: trained on in several ways, each asked for content, style and both."""

    def __init__(self, bench: Bench, pair: str, number: int, rate: float, steps: int):
        self.bench, self.rate, self.steps = bench, rate, steps
        subject, style = pair.split("+")
        self.subject, self.style = bench.concepts[subject], bench.concepts[style]
        rng = random.Random(f"{subject} {style} {number}")
        self.picture = bench.truth.pictures(subject, style, 1, rng).movedim(1, -1).float()
        # What `blocks` found, as starts of layer names (B-LoRA, arXiv 2403.14572, Sec. 4.1, finds SDXL's so).
        self.blocks = {c: tuple(f"{name}." for name in names) for c, names in bench.manifest.blocks.items()}
        self.prompts = {
            "full": bench.manifest.prompt(self.subject, self.style),
            "content": self.subject.words,
            "style": self.style.words,
        }

    def dreambooth(self, seed: int, layers: str = "attention", empty: bool = False) -> dict[str, torch.Tensor]:
        """empty: a fifth of the rows has an empty prompt, as UnZip's have."""
        training = self.bench.pack.nodes.bridge.training
        settings = self.bench.settings(seed=seed, steps=self.steps, learning_rate=self.rate)
        prompts = [self.prompts["full"]] * 4 + [""] * empty
        shown = training.pictures.TrainingImages([self.picture] * len(prompts), prompts)
        task = training.concept.Task(
            [shown], settings, "loras/one", self.bench.manifest.size, layers, b_lora=self.blocks
        )
        with torch.inference_mode():
            done = training.concept.train_concept(self.bench.model, self.bench.clip, self.bench.vae, task)
        return load_file(str(self.bench.output / done.file))

    def unzip(self, seed: int, **changes: Any) -> Any:
        unzip, core = self.bench.pack.nodes.bridge.unzip, self.bench.pack.ziplora_core.unzip
        asked = {"steps": self.steps, "learning_rate": self.rate, "rank": RANK, "batch_size": BATCH, "seed": seed}
        asked |= {name: changes.pop(name) for name in list(changes) if name in core.Settings.__dataclass_fields__}
        task = unzip.Task(
            self.picture,
            self.prompts,
            core.Settings(**asked),
            "loras/unzipped",
            128,
            **{"blocks": self.blocks, **changes},
        )
        with torch.inference_mode():
            return unzip.unzip_picture(self.bench.model, self.bench.clip, self.bench.vae, task)

    def split(self, seed: int) -> list[dict[str, torch.Tensor]]:
        """Both words of Inspiration Tree; the seed among four by the judge's features in the place of CLIP's."""
        split, core = self.bench.pack.nodes.bridge.training.split, self.bench.pack.ziplora_core.split
        settings = core.Settings(steps=SPLIT_STEPS, learning_rate=SPLIT_RATE, batch_size=BATCH, seed=4 * seed)
        class_word = self.style.of_class.split()[-1]
        task = split.Task(
            [self.picture],
            ["a *"],
            settings,
            initial=class_word,
            resolution=self.bench.manifest.size,
            clip_vision=JudgeVision(self.bench),
        )
        with torch.inference_mode():
            done = split.split_concept(self.bench.model, self.bench.clip, self.bench.vae, task)
        return [load_file(str(self.bench.words / file)) for file in done.files]

    def ask(self, taught: Taught, seed: int = 1000) -> dict[str, float]:
        """content: the subject in known styles, by the content half alone; style: known subjects in the style, by the
        style half alone; together: the subject in the style, by both."""
        world = self.bench.manifest
        known = [world.other_styles[i % len(world.other_styles)] for i in range(COUNT)]
        both = Asked(self.prompts["full"], self.subject.name, self.style.name)
        asked = {
            "content": [world.restyled(self.subject, style) for style in known],
            "style": [world.on_unseen(self.style, i) for i in range(COUNT)],
            "both": [both] * COUNT,
        }
        found: dict[str, float] = {}
        loras = {"content": {"content": taught.content}, "style": {"style": taught.style}, "both": taught.both}
        said = dict(zip((self.subject.identifier, self.style.identifier), taught.words or (), strict=False))
        for what, questions in asked.items():
            with attached(self.bench, loras[what]), self.bench.said(said):
                pictures = generate(self.bench.judged, [one.prompt for one in questions], seed)
            right = shares(rights(self.bench.truth, pictures, questions))
            found |= {f"{what}/{k}": v for k, v in right.items()}
            found[f"{what}/distance"] = self._distance(pictures, questions)
        return found

    def _distance(self, pictures: torch.Tensor, asked: Sequence[Asked]) -> float:
        """From the mean of the pictures of one subject and style to that of true ones, in the judge's features; the
        mean over what was asked for."""
        features = self.bench.truth.features(pictures)
        pairs = [(one.subject, one.style) for one in asked]
        distances = []
        for subject, style in sorted({(str(a), str(b)) for a, b in pairs}):
            mean = features[torch.tensor([found == (subject, style) for found in pairs])].mean(0)
            distances.append(float((mean - self.bench.true_features(subject, style)).norm()))
        return statistics.mean(distances)


class JudgeVision:
    """The judge's features as the host's CLIP_VISION gives its own."""

    def __init__(self, bench: Bench) -> None:
        self.truth = bench.truth

    def encode_image(self, pictures: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"image_embeds": self.truth.features(pictures.movedim(-1, 1).cpu())}


def of_pair(names: dict[str, str], done: Any) -> Halves:
    """The two files: added up, they are the zipped pair."""
    return {which: of_file(names, source.tensors) for which, source in done.pair.by_concept.items()}


@dataclasses.dataclass(frozen=True)
class Job:
    """One picture, and one way to learn from it."""

    pair: str
    seed: int
    method: str
    rate: float
    steps: int


def run(asked: argparse.Namespace) -> bool:
    """Every method that is asked for and not in the results file yet, seed by seed; whether none failed."""
    world = read_manifest()
    pairs = asked.pairs.split(",") if asked.pairs else ["+".join(pair) for pair in cases(world)]
    done = {(r["pair"], r["seed"], r["method"]) for r in records(asked.results)}
    refuse_another_world(asked.results, (pair for pair, *_ in done), world.trained())
    given = (asked.rate or ONE_RATE, asked.steps or ONE_STEPS)
    runs = itertools.product(pairs, range(asked.seeds), asked.methods.split(";"))
    jobs = [Job(*one, *given) for one in sorted(runs, key=lambda one: one[1]) if one not in done]
    return share_out(run_job, jobs, asked.results, asked.processes)


@functools.cache
def bench() -> Bench:
    """The one of this process."""
    return Bench()


def run_job(job: Job) -> list[dict[str, Any]]:
    one = OnePicture(bench(), job.pair, job.seed, job.rate, job.steps)
    began = time.monotonic()
    taught = learned(one, job.seed, job.method)
    seconds = time.monotonic() - began
    figures = {k: round(v, 4) for k, v in one.ask(taught).items()}
    print(line(f"{job.pair} {job.seed}: {job.method}, {seconds:.0f} s", figures), flush=True)
    return [{"pair": job.pair, "seed": job.seed, "method": job.method, **figures}]


def learned(one: OnePicture, seed: int, method: str) -> Taught:
    names = one.bench.names
    if method.startswith("DreamBooth"):
        whole = of_file(names, one.dreambooth(seed, empty=method != "DreamBooth"))
        return Taught(whole, whole, {"content": whole})
    if method == TREE:
        left, right = one.split(seed)
        ways = [Taught({}, {}, {}, words) for words in ((left, right), (right, left))]
        return max(ways, key=lambda way: sum(v for k, v in one.ask(way, 500).items() if k.endswith("/both")))
    if method == "B-LoRA":
        tensors = one.dreambooth(seed, "B-LoRA")
        halves = {concept: of_file(names, tensors, blocks) for concept, blocks in one.blocks.items()}
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
