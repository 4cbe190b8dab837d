"""One pair and seed of quality.py: every merge is found, applied and drawn from, and the pictures are judged."""

from __future__ import annotations

import os
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from benchmarks import distances, new_concepts
from benchmarks.quality_table import CEILING, DETAILED, DIAL, ORACLE, Record, picture_file
from demo import picture
from demo.manifest import Asked
from demo.truth import rights, shares
from demo.world.atlas import image

KEPT = 3  # pictures of each for the contact sheet
ORACLE_PICTURES = 6


@dataclass(frozen=True)
class Job:
    """One pair and seed: everything that is measured in one process at a time."""

    content: str
    style: str
    seed: int
    methods: tuple[str, ...]
    pictures: int
    details: bool
    keep: Path | None = None  # a folder for the first pictures
    block: str | None = None  # of new concepts; None: the demo's
    lean: bool = False  # pictures of the pair alone: no places, no retention
    strengths: tuple[float, float] = (1.0, 1.0)  # that both files are loaded at, before any merge

    @property
    def pair(self) -> str:
        return f"{self.content}+{self.style}"


def run_job(job: Job) -> list[Record]:
    """Find every merge of a pair, draw from each and judge the pictures."""
    studio = studio_of(job.block)
    from benchmarks.candidates import CANDIDATES, COMPOSED
    from benchmarks.methods import ABLATION, METHODS, Case
    from benchmarks.rivals import RIVALS
    from benchmarks.studio import core, fitting, zipped_lora

    content, style = studio.concepts[job.content], studio.concepts[job.style]
    sources = studio.sources(content, style, job.strengths)
    fitted = fitting.fit(sources, studio.model.model)
    merges: dict[str, Any] = {}
    losses: list[list[dict[str, float]]] = []

    def drawn_right(coefficients) -> tuple[float, float]:
        zipped = zipped_lora.ZippedLoRA(sources, fitted, coefficients)
        prompts = [studio.manifest.prompt(content, style)] * ORACLE_PICTURES
        found = of_pair(studio, job, studio.draw(zipped, prompts, 5000 + job.seed))
        return found["both"], -found["distance"]

    def work(predictor, joined, references) -> None:
        case = Case(fitted, joined, predictor, references, job.seed, oracle, composed)
        for name in job.methods:
            if name != CEILING:
                merges[name] = {**CANDIDATES, **RIVALS, **ABLATION, **METHODS}[name](case)
        if job.lean:
            return
        others = studio.other_references(content, style, job.seed)
        losses.extend(case.retention(list(merges.values()), r) for r in (references, others))

    # before the merges, which have the model to themselves
    oracle = max(Case.grid(fitted.loras), key=drawn_right) if ORACLE in job.methods else None
    composed = _composed(studio, job, sources, fitted) if set(COMPOSED) & set(job.methods) else None
    studio.zip(fitted.loras, content, style, work)
    records = []
    for number, (name, merge) in enumerate(merges.items()):
        found: Record = {"pair": job.pair, "seed": job.seed, "method": name}
        found["seconds"] = round(merge.seconds, 2)
        for kind, found_losses in zip(("reference", "other"), losses, strict=not job.lean):
            found[f"{kind}_loss"] = {c: round(v, 4) for c, v in found_losses[number].items()}
        if not job.lean:
            found |= of_columns(core, merge)
        zipped = zipped_lora.ZippedLoRA(sources, merge.fitted, merge.coefficients)
        found |= pictures_of(studio, job, name, zipped, merge.by_step)
        records.append(found)
    if CEILING in job.methods:
        records.append(true_renderings(studio, job))
    for found in records:
        print(line(found), flush=True)
    return records


def of_columns(core, merge) -> Record:
    """What a merge did to the columns."""
    with torch.inference_mode(False):
        cosines = core.analysis.column_alignment(merge.fitted.loras, merge.coefficients)
    return {
        "overlap": round(merge.coefficients.overlap(), 4),
        "moved": round(merge.moved, 4),
        "alignment": round(statistics.mean(cosines.values()), 4),
        "owners": {k: round(v, 3) for k, v in merge.coefficients.ownership().items()},
    }


def _composed(studio, job: Job, sources, fitted) -> Any:
    """Two pictures that the direct merge draws of the composed prompt, and what layers see of them."""
    from benchmarks.candidates import Composed, composed_moments
    from benchmarks.methods import Coefficients
    from benchmarks.studio import zipped_lora

    content, style = studio.concepts[job.content], studio.concepts[job.style]
    prompt = studio.manifest.prompt(content, style)
    direct = zipped_lora.ZippedLoRA(sources, fitted, Coefficients.ones(fitted.loras))
    drawn = studio.vae.encode(studio.draw(direct, [prompt] * 2, 9000 + job.seed).movedim(1, -1))

    def work(predictor, joined, references) -> Any:
        return Composed(references, composed_moments(joined, predictor, references, job.seed))

    return studio.zip(fitted.loras, content, style, work, prompt, drawn)


def pictures_of(studio, job: Job, method: str, zipped, by_step: Sequence[Any] | None) -> Record:
    """Draw from one merge and judge: subject in style, with a place added, each concept alone, the style dial."""
    content, style = studio.concepts[job.content], studio.concepts[job.style]
    manifest, few = studio.manifest, max(3, job.pictures // 2)
    both = manifest.prompt(content, style)
    unseen = [manifest.on_unseen(style, i) for i in range(few)]
    prompts = {"pair": [both] * job.pictures}
    if not job.lean:
        places = _places(studio, job)
        prompts["place"] = [f"{content.words} {_where(p)} {style.words}" for p in places]
    details = job.details and method in DETAILED
    if details:
        prompts["subject_alone"] = [manifest.alone(content).prompt] * few
        prompts["style_alone"] = [asked.prompt for asked in unseen]
    drawn = studio.draw(zipped, [p for group in prompts.values() for p in group], 1000 + job.seed, by_step)
    parts = dict(zip(prompts, drawn.split([len(group) for group in prompts.values()]), strict=True))
    keep(job, method, parts["pair"])
    found = {**of_pair(studio, job, parts["pair"]), **beside_truth(studio, job, parts["pair"])}
    if not job.lean:
        found |= of_places(studio, job, parts["place"])
    if details:
        alone = shares(rights(studio.truth, parts["subject_alone"], [manifest.alone(content)] * few))
        styled = shares(rights(studio.truth, parts["style_alone"], unseen))
        found["subject_alone"] = round(alone["subject"], 4)
        found["style_alone"], found["style_alone_shape"] = round(styled["style"], 4), round(styled["subject"], 4)
    if details and method == "default":
        found["dial"] = {}
        for dial in DIAL:
            turned = of_pair(studio, job, studio.draw(studio.turned(zipped, dial), [both] * few, 1000 + job.seed))
            found["dial"][str(dial)] = {k: turned[k] for k in ("subject", "style")}
    return found


def true_renderings(studio, job: Job) -> Record:
    """The ceiling: what the judge says of as many true pictures."""
    rng = random.Random(f"ceiling {job.pair} {job.seed}")
    pictures = studio.truth.pictures(job.content, job.style, job.pictures, rng)
    placed = [studio.truth.pictures(job.content, job.style, 1, rng, place) for place in _places(studio, job)]
    keep(job, CEILING, pictures)
    found = of_pair(studio, job, pictures)
    found |= of_places(studio, job, torch.cat(placed))
    found |= beside_truth(studio, job, pictures)
    return {"pair": job.pair, "seed": job.seed, "method": CEILING, **found}


def of_pair(studio, job: Job, pictures: torch.Tensor) -> Record:
    """What the judge says of pictures that should be the subject in the style."""
    found = shares(rights(studio.truth, pictures, [Asked("", job.content, job.style)] * len(pictures)))
    distance = (studio.truth.features(pictures).mean(0) - studio.true_features(job.content, job.style)).norm()
    counted = {name: round(share, 4) for name, share in found.items()}
    return {"pictures": len(pictures), **counted, "distance": round(float(distance), 4)}


def beside_truth(studio, job: Job, pictures: torch.Tensor) -> Record:
    """Distances that no judge has a part in."""
    true = studio.true_pictures(job.content, job.style)
    found = {"colors": distances.of_colors(pictures, true), "structure": distances.of_structure(pictures, true)}
    return {name: round(value, 3) for name, value in found.items()}


def of_places(studio, job: Job, pictures: torch.Tensor) -> Record:
    """What the judge says of pictures that should be the subject in the style at a place."""
    found = shares(rights(studio.truth, pictures, [Asked("", job.content, job.style)] * len(pictures)))
    said, places = studio.truth.answers(pictures)["place"], _places(studio, job)
    right = sum(one == other for one, other in zip(said, places, strict=True)) / len(places)
    return {
        "text": round(right, 4),
        "text_subject": round(found["subject"], 4),
        "text_style": round(found["style"], 4),
    }


def _places(studio, job: Job) -> list[str]:
    known = studio.truth.places
    return [known[i % len(known)] for i in range(max(4, job.pictures // 3))]


def _where(place: str) -> str:
    return "in the middle" if place == "middle" else f"on the {place}"


def strip(pictures: torch.Tensor) -> Image.Image:
    """The first pictures side by side. pictures: B3HW in 0..1."""
    return image(torch.cat(list(pictures[:KEPT]), dim=-1))


def keep(job: Job, method: str, pictures: torch.Tensor) -> None:
    """The first pictures, side by side, for the contact sheet."""
    if job.keep is not None:
        picture.write(strip(pictures), picture_file(job.keep, job.pair, job.seed, method))


def line(found: Record) -> str:
    shown = ("subject", "style", "both", "distance", "text", "overlap", "seconds")
    figures = " ".join(f"{k} {found[k]:.2f}" for k in shown if k in found)
    return f"{found['pair']} seed {found['seed']} {found['method']:24} {figures}"


_STUDIO: list[Any] = []


def studio_of(block: str | None = None):
    """The one of this process. A block's concepts take the demo's place, before anything imports the demo's."""
    if not _STUDIO:
        if block is not None:
            new_concepts.enter(block)
            os.environ["ZIPLORA_MINIATURE"] = str(new_concepts.FOLDER / block)
        from benchmarks.studio import Studio

        _STUDIO.append(Studio())
    return _STUDIO[0]
