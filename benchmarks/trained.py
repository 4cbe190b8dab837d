"""Systems that train instead of merging LoRAs, on the questions of quality.py: the rest of the paper's Table 2.

    python3 dev.py run benchmarks/trained.py                  disjoint pairs, three seeds: hours; it can be continued
    python3 dev.py run benchmarks/trained.py --quick          a few steps of everything, only to see that it runs
    python3 dev.py run benchmarks/trained.py --table          only print what the results file holds

Every system learns from the pictures that ship with the LoRAs (of a style the first 16 of the 96 that its LoRA was
taught with), by the pack's own nodes' code, and draws through the host. A pair shares no LoRA with another one, so
pairs are independent cases; each seed trains anew. Merges of LoRAs on the same pairs and seeds: `quality.py --pairs
...`, into the same results file. `seconds` are those of the training of both concepts and the merge, `peak` the most
memory (GB) of the process meanwhile beyond what it had before, `stored` the bytes of what has to be kept. With
ZIPLORA_TEST_DEVICE=auto all of it is on the GPU that ComfyUI finds, and `peak` is the GPU's.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch

sys.path.append(str(Path(__file__).resolve().parent.parent))  # last: `nodes` there would hide ComfyUI's module

from benchmarks.meters import Peak
from benchmarks.quality_table import Record, kept_folder, read_records, refuse_another_world, report
from benchmarks.training_bench import BATCH, RANK, RATE, STEPS, own_folders, pictures_of
from benchmarks.workers import share_out
from demo.manifest import read_manifest

RESULTS = Path(__file__).resolve().parent / "results" / "trained.jsonl"
PAIRS, SEEDS, PICTURES = 8, (0, 1, 2), 12
LORA = {"steps": STEPS, "learning_rate": RATE, "rank": RANK, "batch_size": BATCH}  # as training.py's
CUSTOM = {"steps": 250, "learning_rate": 1e-4, "batch_size": 8}  # of each picture of a step; the paper's is 1e-5
ED = {**LORA, "text_encoder_rate": RATE / 10, "word_rate": 10 * RATE, "rank": 4}  # the paper's rank, and its ratios
ROUND_TWO = 8  # pictures of StyleDrop's first round, of which it goes on with the best half
SCALES = (3.0, 3.0)  # of text and style
CLASS_PICTURES = 32
NEW_WORD = "*"


@dataclasses.dataclass(frozen=True)
class Job:
    """One pair and seed, and one system."""

    subject: str
    style: str
    seed: int
    method: str
    pictures: int
    scale: float  # of the steps, to try it out
    keep: Path

    @property
    def content(self) -> str:
        return self.subject

    @property
    def pair(self) -> str:
        return f"{self.subject}+{self.style}"


@dataclasses.dataclass
class Made:
    """What a system made of a pair: how to draw a number of pictures with a seed, and the files it needs."""

    draw: Callable[[int, int], torch.Tensor]
    files: Sequence[Path]

    @property
    def stored(self) -> int:
        return sum(file.stat().st_size for file in self.files)


class Workshop:
    """A studio, folders for what is trained, and the pack's trainings on its model."""

    def __init__(self, studio: Any, job: Job) -> None:
        from benchmarks.studio import PACK

        self.studio, self.job = studio, job
        self.subject, self.style = studio.concepts[job.subject], studio.concepts[job.style]
        self.bridge, self.core = PACK.nodes.bridge, PACK.ziplora_core
        self.output, self.words = own_folders()
        studio.embeddings[:] = [str(self.words)]
        self._trainings = 0

    def pictures(self, concept: Any, count: int | None = None) -> torch.Tensor:
        return pictures_of(self.studio.manifest, concept, count)

    def lora(self, *sets: tuple[torch.Tensor, Sequence[str]], steps: int = 1) -> tuple[dict[str, torch.Tensor], Path]:
        """One LoRA of one concept, or of several together. steps: times as many as one concept has."""
        training = self.bridge.training
        settings = self._settings(self.core.training.Settings, LORA, steps)
        shown = [training.pictures.TrainingImages([images], list(prompts)) for images, prompts in sets]
        task = training.concept.Task(shown, settings, "loras/lora", self.studio.manifest.size)
        with torch.inference_mode():
            done = training.concept.train_concept(self.studio.model, self.studio.clip, self.studio.vae, task)
        return done.lora_model, self.output / done.file

    def custom(self, *concepts: Any, steps: int = 1) -> tuple[dict[str, torch.Tensor], list[str], list[Path]]:
        """Custom Diffusion of one concept or several: LORA_MODEL, words as prompts name them, files."""
        trains = self.bridge.training.custom_diffusion
        settings = self._settings(self.core.trained_weights.Settings, CUSTOM, steps)
        taught = []
        for one in concepts:
            images, words = self.shown(one)
            caption = words.replace(one.identifier, NEW_WORD)
            taught.append(trains.Concept([images], [caption], NEW_WORD, one.identifier, one.of_class))
        count = max(2, round(CLASS_PICTURES * min(1.0, self.job.scale * 4)))
        size = self.studio.manifest.size
        task = trains.Task(taught, settings, "loras/custom", size, class_count=count)
        with torch.inference_mode():
            done = trains.train(self.studio.model, self.studio.clip, self.studio.vae, task)
        files = [self.output / done.file, *map(self.word_file, done.embeddings)]
        return done.lora_model, done.embeddings, files

    def word_file(self, word: str) -> Path:
        return self.words / f"{word.split(':')[1]}.safetensors"

    def shown(self, one: Any) -> tuple[torch.Tensor, str]:
        """For nodes that use every caption with every picture: one, with the identifier, and the pictures that it
        fits."""
        if one.kind == "style":
            words, fits = f"{one.of_class} {one.words}", [True] * len(one.prompts)
        else:
            words, fits = one.words, [not prompt.endswith(" style") for prompt in one.prompts]
        return self.pictures(one)[torch.tensor(fits)], words

    def ed_lora(self, one: Any) -> tuple[dict[str, torch.Tensor], str, list[Path], torch.Tensor]:
        """LORA_MODEL, its word as prompts name it, which stands for the class too, files, the pictures."""
        trains = self.bridge.training.ed_lora
        (images, words), size = self.shown(one), self.studio.manifest.size
        captions, class_word = [words.replace(spoken(one), NEW_WORD)], spoken(one).split()[1]
        settings = self._settings(self.core.trained_ed_lora.Settings, ED, 1)
        task = trains.Task([images], captions, settings, NEW_WORD, class_word, prefix="loras/ed", resolution=size)
        with torch.inference_mode():
            done = trains.train(self.studio.model, self.studio.clip, self.studio.vae, task)
        return done.lora_model, done.embedding, [self.output / done.file, self.word_file(done.embedding)], images

    def _settings(self, kind: Any, asked: dict[str, Any], times: int) -> Any:
        """Each training has a seed of its own: with one seed, two LoRAs that are merged start from the same factors."""
        steps = max(1, round(asked["steps"] * times * self.job.scale))
        seed = self.job.seed + 1000 * self._trainings
        self._trainings += 1
        return kind(**{**asked, "steps": steps, "seed": seed})

    def on_the_model(self, lora: dict[str, torch.Tensor]) -> Any:
        """The host's model with a LORA_MODEL on it, by the host's own loader."""
        import comfy.sd

        model, _ = comfy.sd.load_lora_for_models(self.studio.model, None, lora, 1.0, 0.0)
        return model

    def drawing(self, lora: dict[str, torch.Tensor], prompt: str) -> Callable[[int, int], torch.Tensor]:
        model = self.on_the_model(lora)
        return lambda count, seed: self.studio.drawn_by(model, [prompt] * count, seed)


def joint(shop: Workshop) -> Made:
    """One LoRA of both concepts, for twice as many steps."""
    sets = [(shop.pictures(one), one.prompts) for one in (shop.subject, shop.style)]
    lora, file = shop.lora(*sets, steps=2)
    return Made(shop.drawing(lora, shop.studio.manifest.prompt(shop.subject, shop.style)), [file])


def custom_joint(shop: Workshop) -> Made:
    """Custom Diffusion of both concepts together, for twice as many steps (Sec. 3.3)."""
    lora, words, files = shop.custom(shop.subject, shop.style, steps=2)
    return Made(shop.drawing(lora, composed(shop, words)), files)


def custom_merged(shop: Workshop) -> Made:
    """Custom Diffusion of each concept, merged in closed form (Sec. 3.3), with captions of the base's own words."""
    parts = [shop.custom(one) for one in (shop.subject, shop.style)]
    words = [word for _, said, _ in parts for word in said]
    source = shop.bridge.lora.loras
    tensors = {name: part[0] for name, part in zip(("content", "style"), parts, strict=True)}
    sources = source.LoRASources({name: source.LoRASource(name, found, 1.0) for name, found in tensors.items()})
    own = [
        shop.subject.words.replace(shop.subject.identifier, words[0]),
        f"{shop.subject.of_class} {shop.style.words.replace(shop.style.identifier, words[1])}",
    ]
    captions = "\n".join(asked.prompt for asked in shop.studio.manifest.known)
    with torch.inference_mode():
        lora, _ = shop.bridge.custom_diffusion.merge(
            shop.studio.model, shop.studio.clip, sources, "\n".join(own), captions
        )
    return Made(shop.drawing(lora, composed(shop, words)), [file for part in parts for file in part[2]])


def composed(shop: Workshop, words: Sequence[str]) -> str:
    """The pair's prompt with learned words in the place of the identifiers."""
    prompt = shop.studio.manifest.prompt(shop.subject, shop.style)
    return prompt.replace(shop.subject.identifier, words[0]).replace(shop.style.identifier, words[1])


def spoken(one: Any) -> str:
    """A concept's identifier with the word of its class that follows it in prompts."""
    (found,) = re.findall(rf"{one.identifier} \w+", one.words)
    return str(found)


def mix_of_show(shop: Workshop) -> Made:
    """An ED-LoRA of each concept; their text encoders' halves fused, then the rest by what prompts say to these
    (Sec. 3.3)."""
    studio, core, bridge = shop.studio, shop.core, shop.bridge
    concepts = {"content": shop.subject, "style": shop.style}
    parts = {name: shop.ed_lora(one) for name, one in concepts.items()}
    word = {name: part[1] for name, part in parts.items()}
    own = {name: shop.shown(one)[1].replace(spoken(one), word[name]) for name, one in concepts.items()}
    source = bridge.lora.loras
    sources = source.LoRASources({name: source.LoRASource(name, part[0], 1.0) for name, part in parts.items()})
    settings = core.solver.Settings(solver="fusion", seed=shop.job.seed)
    with torch.inference_mode():
        fused = bridge.text_fusion.fuse(studio.clip, sources, {name: [word[name], own[name]] for name in parts})
        fitted = bridge.lora.fitting.fit(fused.sources, studio.model.model)
        conditioning = {name: studio.prompt(own[name], clip=fused.clip) for name in parts}
        latents = {name: studio.vae.encode(part[3]) for name, part in parts.items()}

        def solve(predict: Any, joined: Any, references: Any) -> Any:
            return core.zipper.solve(joined, predict, references, settings)

        result = bridge.network.predictor.with_predictor(studio.model, fitted.loras, conditioning, latents, solve)
        routed = dataclasses.replace(fitted, loras=core.routing.routed(fitted.loras, result.routing))
        zipped = bridge.lora.zipped.ZippedLoRA(fused.sources, routed, result.coefficients, routing=result.routing)
        model, clip = bridge.apply.apply(studio.model, studio.clip, zipped, 1.0)
    prompt = studio.manifest.prompt(shop.subject, shop.style)
    for name, one in concepts.items():
        prompt = prompt.replace(spoken(one), word[name])
    files = [file for part in parts.values() for file in part[2]]
    return Made(lambda count, seed: studio.drawn_by(model, [prompt] * count, seed, clip), files)


def style_drop(shop: Workshop) -> Made:
    """A stand-in for StyleDrop + DreamBooth: a style LoRA from one picture in two rounds, the second also on those
    pictures of the first that show their subject and are nearest to the picture; added to a subject LoRA, drawn with
    two scales.

    The paper's second round takes what a person or CLIP prefers; here what the judge's features are nearest to.
    """
    import comfy.sd

    studio, world = shop.studio, shop.studio.manifest
    subject, subject_file = shop.lora((shop.pictures(shop.subject), shop.subject.prompts))
    picture = shop.pictures(shop.style, 1)
    first, _ = shop.lora((picture, shop.style.prompts[:1]))
    asked = [world.on_unseen(shop.style, number) for number in range(ROUND_TWO)]
    drawn = studio.drawn_by(shop.on_the_model(first), [one.prompt for one in asked], 7000 + shop.job.seed)
    said = studio.truth.answers(drawn)["subject"]
    features = studio.truth.features(torch.cat([picture.movedim(-1, 1), drawn]))
    far = (features[1:] - features[0]).norm(dim=1)
    wrong = torch.tensor([not studio.truth.same(word, one) for word, one in zip(said, asked, strict=True)])
    best = (far + 1e6 * wrong).argsort()[: ROUND_TWO // 2].tolist()
    images = torch.cat([picture, drawn[best].movedim(1, -1)])
    style, style_file = shop.lora((images, [shop.style.prompts[0], *(asked[i].prompt for i in best)]))
    base = shop.on_the_model(subject)
    adapted, _ = comfy.sd.load_lora_for_models(base, None, style, 1.0, 0.0)
    prompt = world.prompt(shop.subject, shop.style)

    def draw(count: int, seed: int) -> torch.Tensor:
        positive, negative = studio.prompt(*[prompt] * count), studio.prompt("")
        guider = shop.bridge.guider.two_scales(base, adapted, positive, negative, None, *SCALES)
        return studio.guided_by(guider, count, seed)

    return Made(draw, [subject_file, style_file])


TRAINED: dict[str, Callable[[Workshop], Made]] = {
    "joint training": joint,
    "StyleDrop + DreamBooth, stand-in": style_drop,
    "Custom Diffusion, joint": custom_joint,
    "Custom Diffusion, merged": custom_merged,
    "Mix-of-Show": mix_of_show,
}


def run_job(job: Job) -> list[Record]:
    """Train the system on the pair, draw from it and judge the pictures."""
    from benchmarks import quality_job

    studio = quality_job.studio_of()
    cuda = studio.model.load_device.type == "cuda"
    with Peak(cuda) as peak:
        before = torch.cuda.memory_allocated() if cuda else psutil.Process().memory_info().rss
        began = time.monotonic()
        made = TRAINED[job.method](Workshop(studio, job))
        seconds = time.monotonic() - began
    found: Record = {"pair": job.pair, "seed": job.seed, "method": job.method, "seconds": round(seconds, 2)}
    found["device"] = torch.cuda.get_device_name() if cuda else "CPU"
    found["peak"] = round(max(0, peak.bytes - before) / 1e9, 3)
    found["stored"] = made.stored
    pictures = made.draw(job.pictures, 1000 + job.seed)
    quality_job.keep(job, job.method, pictures)
    found |= {**quality_job.of_pair(studio, job, pictures), **quality_job.beside_truth(studio, job, pictures)}
    print(quality_job.line(found), flush=True)
    return [found]


def disjoint_pairs() -> list[tuple[str, str]]:
    """Each subject with a style of its own, where there is a truth of both."""
    world = read_manifest()
    left, found = [style.name for style in world.styles], []
    for subject in world.subjects:
        style = next((name for name in left if (subject.name, name) not in world.untold), None)
        if style is not None:
            left.remove(style)
            found.append((subject.name, style))
    return found[:PAIRS]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one pair, one seed, a few steps, two pictures")
    parser.add_argument("--table", action="store_true", help="measure nothing, print the table")
    parser.add_argument("--pairs", nargs="+", help="such as octopus+chalk; default: disjoint ones")
    parser.add_argument("--methods", nargs="+", default=list(TRAINED))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--results", type=Path, default=RESULTS)
    given = parser.parse_args()
    if not given.table:
        pairs = [tuple(pair.split("+")) for pair in given.pairs] if given.pairs else disjoint_pairs()
        done: set[tuple] = set()
        if given.results.exists():
            done = {(r["pair"], r["seed"], r["method"]) for r in read_records(given.results)}
            refuse_another_world(given.results, (pair for pair, *_ in done), read_manifest().trained())
        scale, pictures = (0.01, 2) if given.quick else (1.0, PICTURES)
        jobs = []
        for seed in given.seeds[:1] if given.quick else given.seeds:
            for subject, style in pairs[:1] if given.quick else pairs:
                missing = [m for m in given.methods if (f"{subject}+{style}", seed, m) not in done]
                jobs += [Job(subject, style, seed, m, pictures, scale, kept_folder(given.results)) for m in missing]
        given.results.parent.mkdir(parents=True, exist_ok=True)
        if not share_out(run_job, jobs, given.results, 1 if given.quick else given.processes):
            return 1
    print(report(given.results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
