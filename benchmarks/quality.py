"""How well each way to merge keeps a subject and a style: the paper's Table 2, on the miniature SDXL.

    python3 dev.py run benchmarks/quality.py                    four subjects, eight styles, three seeds: hours
    python3 dev.py run benchmarks/quality.py --quick            two pairs, one seed: minutes
    python3 dev.py run benchmarks/quality.py --ablation --half choose --seeds 0 --results ablation.jsonl
    python3 dev.py run benchmarks/quality.py --table            only print what the results file holds
    python3 dev.py run benchmarks/quality.py --table --sheet quality.jpg    and the pictures beside each other
    python3 dev.py run benchmarks/quality.py --block choose --seeds 0       on concepts of benchmarks/new_concepts.py

Every merge is found, applied and sampled by the pack and the host, as for a user's model; classifiers that saw only
true renderings judge the pictures. A run adds to the results file, so it can be stopped and continued.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.append(str(Path(__file__).resolve().parent.parent))  # last: `nodes` there would hide ComfyUI's module

from benchmarks import distances, new_concepts
from benchmarks.quality_table import (
    CEILING,
    DETAILED,
    DIAL,
    ORACLE,
    Record,
    kept_folder,
    picture_file,
    read_records,
    report,
    sheet,
)
from demo import world

RESULTS = Path(__file__).resolve().parent / "results" / "quality.jsonl"
SUBJECTS = 4  # of six, with every style; `--pairs` may name the others
SEEDS = (0, 1, 2)
PICTURES = 12  # of the pair, per method and seed: 36 over the seeds; fewer of the other prompts
KEPT = 3  # pictures of each for the contact sheet
ORACLE_PICTURES = 6
QUICK_PAIRS = (("mushroom", "ember"), ("icecream", "dusk"))  # the direct merge spoils both
QUICK_METHODS = ("content LoRA", "style LoRA", "direct 1/1", "default")


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

    @property
    def pair(self) -> str:
        return f"{self.content}+{self.style}"


# --- one job -------------------------------------------------------------------------------------------------


def run_job(job: Job) -> list[Record]:
    """Find every merge of a pair, draw from each and judge the pictures."""
    studio = _studio(job.block)
    from benchmarks.candidates import CANDIDATES, COMPOSED
    from benchmarks.methods import ABLATION, METHODS, Case
    from benchmarks.rivals import RIVALS
    from benchmarks.studio import core, fitting, zipped_lora

    content, style = studio.concepts[job.content], studio.concepts[job.style]
    sources = studio.sources(content, style)
    fitted = fitting.fit(sources, studio.model.model)
    merges: dict[str, Any] = {}
    losses: list[list[dict[str, float]]] = []

    def drawn_right(coefficients) -> tuple[float, float]:
        zipped = zipped_lora.ZippedLoRA(sources, fitted, coefficients)
        prompts = [studio.manifest.prompt(content, style)] * ORACLE_PICTURES
        found = of_pair(studio, job, studio.judge.scores(studio.draw(zipped, prompts, 5000 + job.seed)))
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
        print(_line(found), flush=True)
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
    world, few = studio.manifest, max(3, job.pictures // 2)
    both = world.prompt(content, style)
    shapes = [world.unseen_shapes[i % len(world.unseen_shapes)] for i in range(few)]
    rng = random.Random(job.seed)
    prompts = {"pair": [both] * job.pictures}
    if not job.lean:
        prompts["place"] = [both.replace(" in ", f" on the {p} in ") for p in _places(job)]
    details = job.details and method in DETAILED
    if details:
        prompts["subject_alone"] = [content.gates["alone"]] * few
        prompts["style_alone"] = [
            style.gates["unseen_shapes"].format(shape=s, colour=rng.choice(world.colours)) for s in shapes
        ]
    drawn = studio.draw(zipped, [p for group in prompts.values() for p in group], 1000 + job.seed, by_step)
    parts = dict(zip(prompts, drawn.split([len(group) for group in prompts.values()]), strict=True))
    judged = {name: studio.judge.scores(part) for name, part in parts.items()}
    _keep(job, method, parts["pair"])
    found = {**of_pair(studio, job, judged["pair"]), **beside_truth(studio, job, parts["pair"])}
    if not job.lean:
        found |= of_places(studio, job, judged["place"])
    if details:
        alone, styled = judged["subject_alone"], judged["style_alone"]
        found["subject_alone"] = _mean(_right(studio, alone, "shape", [job.content] * few))
        found["style_alone"] = _mean(_right(studio, styled, "style", [job.style] * few))
        found["style_alone_shape"] = _mean(_right(studio, styled, "shape", shapes))
    if details and method == "default":
        found["dial"] = {}
        for dial in DIAL:
            seen = studio.judge.scores(studio.draw(studio.turned(zipped, dial), [both] * few, 1000 + job.seed))
            turned = of_pair(studio, job, seen)
            found["dial"][str(dial)] = {k: turned[k] for k in ("subject", "style")}
    return found


def true_renderings(studio, job: Job) -> Record:
    """The ceiling: what the judge says of as many true pictures."""
    rng = random.Random(f"ceiling {job.pair} {job.seed}")
    scenes = [world.subject_scene(job.content, job.style, rng) for _ in range(job.pictures)]
    placed: list[world.Scene] = []
    for wanted in _places(job):
        while world.place(scene := world.subject_scene(job.content, job.style, rng)) != wanted:
            pass
        placed.append(scene)
    pictures = world.render(scenes)
    _keep(job, CEILING, pictures)
    found = of_pair(studio, job, studio.judge.scores(pictures))
    found |= of_places(studio, job, studio.judge.scores(world.render(placed)))
    found |= beside_truth(studio, job, pictures)
    return {"pair": job.pair, "seed": job.seed, "method": CEILING, **found}


def of_pair(studio, job: Job, judged: Record) -> Record:
    """What the judge says of pictures that should be the subject in the style."""
    count = len(judged["shape"])
    subject = _right(studio, judged, "shape", [job.content] * count)
    styled = _right(studio, judged, "style", [job.style] * count)
    distance = (judged["features"].mean(0) - studio.true_features(job.content, job.style)).norm()
    return {
        "pictures": count,
        "subject": _mean(subject),
        "style": _mean(styled),
        "both": _mean(subject & styled),
        "distance": round(float(distance), 4),
    }


def beside_truth(studio, job: Job, pictures: torch.Tensor) -> Record:
    """Distances that no judge has a part in."""
    true = studio.true_pictures(job.content, job.style)
    found = {"colors": distances.of_colors(pictures, true), "structure": distances.of_structure(pictures, true)}
    return {name: round(value, 3) for name, value in found.items()}


def of_places(studio, job: Job, judged: Record) -> Record:
    """What the judge says of pictures that should be the subject in the style on a side."""
    places = _places(job)
    return {
        "text": _mean(_right(studio, judged, "place", places)),
        "text_subject": _mean(_right(studio, judged, "shape", [job.content] * len(places))),
        "text_style": _mean(_right(studio, judged, "style", [job.style] * len(places))),
    }


def _places(job: Job) -> list[str]:
    return [world.PLACES[i % len(world.PLACES)] for i in range(max(4, job.pictures // 3))]


def _right(studio, judged: Record, key: str, wanted: Sequence[str]) -> torch.Tensor:
    """Which pictures the judge of shapes, styles or places calls what was wanted."""
    names = {"shape": studio.judge.shape_names, "style": studio.judge.style_names, "place": world.PLACES}[key]
    return judged[key].argmax(-1) == torch.tensor([names.index(w) for w in wanted])


def _keep(job: Job, method: str, pictures: torch.Tensor) -> None:
    """The first pictures, side by side, for the contact sheet."""
    if job.keep is not None:
        strip = torch.cat(list(pictures[:KEPT]), dim=-1)
        job.keep.mkdir(parents=True, exist_ok=True)
        world.save_png(strip, str(picture_file(job.keep, job.pair, job.seed, method)))


def _mean(values) -> float:
    return round(float(values.float().mean()), 4)


def _line(found: Record) -> str:
    shown = ("subject", "style", "both", "distance", "text", "overlap", "seconds")
    figures = " ".join(f"{k} {found[k]:.2f}" for k in shown if k in found)
    return f"{found['pair']} seed {found['seed']} {found['method']:24} {figures}"


_STUDIO: list[Any] = []


def _studio(block: str | None = None):
    """The one of this process. A block's concepts take the demo's place, before anything imports the demo's."""
    if not _STUDIO:
        if block is not None:
            new_concepts.enter(block)
            os.environ["ZIPLORA_MINIATURE"] = str(new_concepts.FOLDER / block)
        from benchmarks.studio import Studio

        _STUDIO.append(Studio())
    return _STUDIO[0]


def work_through(jobs: Sequence[Job], results: Path) -> None:
    """One process's share: appends the records of each job when it is done."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    for job in jobs:
        records = run_job(job)
        with open(results, "a", encoding="utf-8") as file:
            file.write("".join(json.dumps(r) + "\n" for r in records))


# --- the command ---------------------------------------------------------------------------------------------


def chosen_jobs(given: argparse.Namespace) -> list[Job]:
    """What is asked for and not in the results file yet."""
    pairs = chosen_pairs(given)
    if given.block:
        _studio(given.block)  # before anything of the demo is imported
    from benchmarks.candidates import CANDIDATES
    from benchmarks.methods import ABLATION, METHODS
    from benchmarks.rivals import RIVALS

    every = [*METHODS, CEILING]
    if given.ablation:
        every = [*ABLATION]
    elif given.candidates or given.rivals:
        every = [*(CANDIDATES if given.candidates else ()), *(RIVALS if given.rivals else ()), CEILING]
    methods = given.methods or (QUICK_METHODS if given.quick else every)
    seeds = given.seeds or (SEEDS[:1] if given.quick else SEEDS)
    done: set[tuple] = set()
    if given.results.exists():
        done = {(r["pair"], r["seed"], r["method"]) for r in read_records(given.results)}
    kept = kept_folder(given.results)
    lean = given.candidates or given.rivals
    details = not (given.quick or given.ablation or lean)
    jobs = []
    for seed in seeds:
        for content, style in pairs:
            missing = tuple(m for m in methods if (f"{content}+{style}", seed, m) not in done)
            if missing:
                jobs.append(Job(content, style, seed, missing, given.pictures, details, kept, given.block, lean))
    return jobs


def chosen_pairs(given: argparse.Namespace) -> list[tuple[str, str]]:
    from demo.manifest import read_manifest

    trained = read_manifest(new_concepts.FOLDER / given.block if given.block else None)
    subjects = trained.subjects if given.block else trained.subjects[:SUBJECTS]
    pairs = [(c.name, s.name) for c in subjects for s in trained.styles]
    if given.each:
        count = len(trained.styles)
        at = {s.name: i for i, s in enumerate(trained.styles)}
        first = {c.name: i for i, c in enumerate(subjects)}
        pairs = [(c, s) for c, s in pairs if (at[s] - first[c]) * given.each % count < given.each]
    if given.pairs:
        pairs = [tuple(p.split("+")) for p in given.pairs]
    elif given.quick:
        pairs = list(QUICK_PAIRS)
    if given.half:
        at = {name: i for group in (trained.subjects, trained.styles) for i, name in enumerate(c.name for c in group)}
        odd = given.half == "confirm"
        pairs = [(c, s) for c, s in pairs if (at[c] + at[s]) % 2 == odd]
    return pairs


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two pairs, one seed, the methods that matter most")
    parser.add_argument("--table", action="store_true", help="measure nothing, print the table")
    parser.add_argument("--pairs", nargs="+", help="such as mushroom+ember; default: four subjects, every style")
    parser.add_argument("--block", choices=new_concepts.BLOCKS, help="every pair of a block of new concepts")
    parser.add_argument("--each", type=int, help="so many styles for each subject, spread evenly, instead of all")
    parser.add_argument("--half", choices=("choose", "confirm"), help="pairs to choose a method on, or to confirm it")
    parser.add_argument("--methods", nargs="+", help="names as in the table; default: all")
    parser.add_argument("--candidates", action="store_true", help="variants of the layer-wise solve instead")
    parser.add_argument("--rivals", action="store_true", help="published merges instead, or with those")
    parser.add_argument("--ablation", action="store_true", help="the ways that were tried for the default instead")
    parser.add_argument("--seeds", nargs="+", type=int)
    parser.add_argument("--pictures", type=int, default=PICTURES, help="of each kind, per pair, method and seed")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--sheet", type=Path, help="write a contact sheet of what is kept beside the results")
    parser.add_argument("--results", type=Path, default=RESULTS)
    return parser.parse_args()


def main() -> int:
    given = parse()
    given.results.parent.mkdir(parents=True, exist_ok=True)
    if not given.table:
        jobs = chosen_jobs(given)
        started = time.monotonic()
        if given.processes == 1:
            work_through(jobs, given.results)
        else:
            context = multiprocessing.get_context("spawn")
            shares = [jobs[i :: given.processes] for i in range(given.processes)]
            workers = [context.Process(target=work_through, args=(share, given.results)) for share in shares if share]
            for worker in workers:
                worker.start()
            for worker in workers:
                worker.join()
            if any(worker.exitcode for worker in workers):
                return 1
        print(f"{len(jobs)} jobs in {(time.monotonic() - started) / 60:.1f} minutes")
    named = given.half or given.pairs or given.each
    print(report(given.results, {f"{c}+{s}" for c, s in chosen_pairs(given)} if named else None))
    if given.sheet:
        sheet(given.results, given.sheet)
    return 0


if __name__ == "__main__":
    sys.exit(main())
