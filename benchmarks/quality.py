"""How well each way to merge keeps a subject and a style: the paper's Table 2, on the miniature SDXL.

    python3 dev.py run benchmarks/quality.py                    every pair, three seeds: hours on two cores
    python3 dev.py run benchmarks/quality.py --quick            two pairs, one seed: minutes
    python3 dev.py run benchmarks/quality.py --table            only print what the results file holds

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
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.append(str(Path(__file__).resolve().parent.parent))  # last: `nodes` there would hide ComfyUI's module

from demo.world import PLACES

RESULTS = Path(__file__).resolve().parent / "results" / "quality.jsonl"
SEEDS = (0, 1, 2)
PICTURES = 12  # of the pair, per method and seed: 36 over the seeds; fewer of the other prompts
DIAL = (0.0, 0.25, 0.5, 0.75)
DETAILED = ("content LoRA", "style LoRA", "direct 1/1", "default")  # also asked for each concept alone
QUICK_PAIRS = (("mushroom", "ember"), ("icecream", "poster"))  # the direct merge spoils both
QUICK_METHODS = ("content LoRA", "style LoRA", "direct 1/1", "default")

Record = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """One pair and seed: everything that is measured in one process at a time."""

    content: str
    style: str
    seed: int
    methods: tuple[str, ...]
    pictures: int
    details: bool


# --- one job -------------------------------------------------------------------------------------------------


def run_job(job: Job) -> list[Record]:
    """Find every merge of a pair, draw from each and judge the pictures."""
    from benchmarks.methods import METHODS, Case
    from benchmarks.studio import core, loras

    studio = _studio()
    content, style = studio.concepts[job.content], studio.concepts[job.style]
    sources = studio.sources(content, style)
    fitted = loras.fit(sources, studio.model.model)
    merges: dict[str, Any] = {}
    losses: list[list[dict[str, float]]] = []

    def work(predictor, joined, references) -> None:
        case = Case(fitted, joined, predictor, references, job.seed)
        for name in job.methods:
            merges[name] = METHODS[name](case)
        others = studio.other_references(content, style, job.seed)
        losses.extend(case.retention(list(merges.values()), r) for r in (references, others))

    studio.zip(fitted.pair, content, style, work)
    records = []
    for number, (name, merge) in enumerate(merges.items()):
        found: Record = {"pair": f"{job.content}+{job.style}", "seed": job.seed, "method": name}
        found["seconds"] = round(merge.seconds, 2)
        for kind, found_losses in zip(("reference", "other"), losses, strict=True):
            found[f"{kind}_loss"] = {c: round(v, 4) for c, v in found_losses[number].items()}
        found["overlap"] = round(merge.coefficients.overlap(), 4)
        found["moved"] = round(merge.moved, 4)
        with torch.inference_mode(False):
            cosines = core.analysis.column_alignment(merge.fitted.pair, merge.coefficients)
        found["alignment"] = round(statistics.mean(cosines.values()), 4)
        found["owners"] = {k: round(v, 3) for k, v in merge.coefficients.ownership().items()}
        found |= pictures_of(studio, job, name, loras.ZippedLoRA(sources, merge.fitted, merge.coefficients))
        records.append(found)
        print(_line(found), flush=True)
    return records


def pictures_of(studio, job: Job, method: str, zipped) -> Record:
    """Draw from one merge and judge: subject in style, with a place added, each concept alone, the style dial."""
    content, style = studio.concepts[job.content], studio.concepts[job.style]
    world, count = studio.manifest, job.pictures
    both = world.prompt(content, style)
    places = [PLACES[i % len(PLACES)] for i in range(max(4, count // 3))]
    few = max(3, count // 2)
    shapes = [world.unseen_shapes[i % len(world.unseen_shapes)] for i in range(few)]
    rng = random.Random(job.seed)
    prompts = {
        "pair": [both] * count,
        "place": [both.replace(" in ", f" on the {p} in ") for p in places],
    }
    details = job.details and method in DETAILED
    if details:
        prompts["subject_alone"] = [content.gates["alone"]] * few
        prompts["style_alone"] = [
            style.gates["unseen_shapes"].format(shape=s, colour=rng.choice(world.colours)) for s in shapes
        ]
    flat = [p for group in prompts.values() for p in group]
    drawn = studio.draw(zipped, flat, 1000 + job.seed)
    parts = dict(zip(prompts, drawn.split([len(group) for group in prompts.values()]), strict=True))
    judged = {name: studio.judge.scores(part) for name, part in parts.items()}
    shape_at, style_at = studio.judge.shape_names.index, studio.judge.style_names.index

    def share(name: str, wanted: Iterable[str], key: str, number) -> Any:
        return judged[name][key].argmax(-1) == torch.tensor([number(w) for w in wanted])

    subject = share("pair", [job.content] * count, "shape", shape_at)
    styled = share("pair", [job.style] * count, "style", style_at)
    features = judged["pair"]["features"].mean(0)
    placed = share("place", places, "place", PLACES.index)
    found: Record = {
        "pictures": count,
        "subject": _mean(subject),
        "style": _mean(styled),
        "both": _mean(subject & styled),
        "p_subject": _mean(judged["pair"]["shape"][:, shape_at(job.content)]),
        "p_style": _mean(judged["pair"]["style"][:, style_at(job.style)]),
        "distance": round(float((features - studio.true_features(job.content, job.style)).norm()), 4),
        "text": _mean(placed),
        "text_subject": _mean(share("place", [job.content] * len(places), "shape", shape_at)),
        "text_style": _mean(share("place", [job.style] * len(places), "style", style_at)),
    }
    if details:
        found["subject_alone"] = _mean(share("subject_alone", [job.content] * few, "shape", shape_at))
        found["style_alone"] = _mean(share("style_alone", [job.style] * few, "style", style_at))
        found["style_alone_shape"] = _mean(share("style_alone", shapes, "shape", shape_at))
    if details and method == "default":
        found["dial"] = {}
        for dial in DIAL:
            turned = studio.turned(zipped, dial)
            seen = studio.judge.scores(studio.draw(turned, [both] * few, 1000 + job.seed))
            found["dial"][str(dial)] = {
                "subject": _mean(seen["shape"].argmax(-1) == shape_at(job.content)),
                "style": _mean(seen["style"].argmax(-1) == style_at(job.style)),
            }
    return found


def _mean(values) -> float:
    return round(float(values.float().mean()), 4)


def _line(found: Record) -> str:
    shown = ("subject", "style", "both", "distance", "text", "overlap", "seconds")
    figures = " ".join(f"{k} {found[k]:.2f}" for k in shown)
    loss = " ".join(f"{k} {v:.2f}" for k, v in found["reference_loss"].items())
    return f"{found['pair']} seed {found['seed']} {found['method']:24} {figures} loss {loss}"


_STUDIO: list[Any] = []


def _studio():
    if not _STUDIO:
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


# --- the table -----------------------------------------------------------------------------------------------

COLUMNS = {
    "subject": "subject",
    "style": "style",
    "both": "both",
    "distance": "distance",
    "text": "text",
    "content_loss": "content loss",
    "style_loss": "style loss",
    "other_content_loss": "on others",
    "other_style_loss": "on others",
    "overlap": "overlap",
    "alignment": "alignment",
    "seconds": "seconds",
}
SPREAD = ("subject", "style", "both")


def read_records(path: Path) -> list[Record]:
    """The last record of every pair, seed and method. Losses are put in relation to those of the bare base model."""
    records: dict[tuple, Record] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        records[record["pair"], record["seed"], record["method"]] = record
    for (pair, seed, _), record in records.items():
        bare = records.get((pair, seed, "base model"))
        for kind, prefix in (("reference", ""), ("other", "other_")):
            for concept in ("content", "style"):
                loss = record[f"{kind}_loss"][concept]
                whole = bare[f"{kind}_loss"][concept] if bare else 0.0
                record[f"{prefix}{concept}_loss"] = loss / whole if whole else float("nan")
    return list(records.values())


def table(records: Sequence[Record]) -> list[str]:
    """Rows of Markdown: mean over the pairs for each seed, then mean over seeds ± their standard deviation."""
    methods = list(dict.fromkeys(r["method"] for r in records))
    lines = ["| method | " + " | ".join(COLUMNS.values()) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for method in methods:
        cells = []
        for column in COLUMNS:
            seeds = _by_seed(records, method, column)
            spread = f" ± {statistics.stdev(seeds):.2f}" if len(seeds) > 1 and column in SPREAD else ""
            cells.append(f"{statistics.mean(seeds):.{1 if column == 'seconds' else 2}f}{spread}")
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return lines


def _by_seed(records: Sequence[Record], method: str, column: str) -> list[float]:
    groups: dict[int, list[float]] = {}
    for r in records:
        if r["method"] == method and column in r:
            groups.setdefault(r["seed"], []).append(r[column])
    return [statistics.mean(values) for _, values in sorted(groups.items())]


def pair_means(records: Sequence[Record], method: str, column: str) -> dict[str, float]:
    """Each pair's mean over its seeds."""
    groups: dict[str, list[float]] = {}
    for r in records:
        if r["method"] == method and column in r:
            groups.setdefault(r["pair"], []).append(r[column])
    return {pair: statistics.mean(values) for pair, values in groups.items()}


def compared(records: Sequence[Record], method: str, other: str, column: str, lower: bool = False) -> str:
    """How a method does against another: mean difference, and in how many pairs it is better or equal."""
    mine, theirs = pair_means(records, method, column), pair_means(records, other, column)
    pairs = [p for p in mine if p in theirs]
    sign = -1 if lower else 1
    gains = [sign * (mine[p] - theirs[p]) for p in pairs]
    better = sum(g > 0 for g in gains)
    equal = sum(g == 0 for g in gains)
    return f"{column}: {sign * statistics.mean(gains):+.3f}, better in {better}, equal in {equal} of {len(pairs)} pairs"


def report(path: Path) -> str:
    records = read_records(path)
    pairs = {r["pair"] for r in records}
    seeds = sorted({r["seed"] for r in records})
    lines = [f"{len(pairs)} pairs, seeds {seeds}, {records[0]['pictures']} pictures each", "", *table(records)]
    methods = {r["method"] for r in records}
    for other in ("direct 1/1", "community settings", "direct, best of grid", "NP-LoRA", "100 steps from ones"):
        if {"default", other} <= methods:
            lines += ["", f"default against {other}:"]
            for column in ("both", "distance", "subject", "style"):
                lines.append("  " + compared(records, "default", other, column, column == "distance"))
    return "\n".join([*lines, "", *alone(records), "", *dial(records), *pace(records)])


def alone(records: Sequence[Record]) -> list[str]:
    """Each concept asked for alone (Fig. 7b of the paper)."""
    lines = ["each concept alone: subject, style, its shape"]
    for method in DETAILED:
        found = [r for r in records if r["method"] == method and "subject_alone" in r]
        if found:
            figures = (
                statistics.mean(r[k] for r in found) for k in ("subject_alone", "style_alone", "style_alone_shape")
            )
            lines.append(f"  {method:14} " + " ".join(f"{v:.2f}" for v in figures))
    return lines


def dial(records: Sequence[Record]) -> list[str]:
    """Subject and style as the style dial turns (Fig. 7a of the paper); 1 is the default itself."""
    found = [r for r in records if "dial" in r]
    lines = ["style strength: subject, style"] if found else []
    for strength in DIAL if found else ():
        seen = [r["dial"][str(strength)] for r in found]
        means = [statistics.mean(s[k] for s in seen) for k in ("subject", "style")]
        lines.append(f"  {strength:4} {means[0]:.2f} {means[1]:.2f}")
    if found:
        lines.append(
            f"  {1.0:4} " + " ".join(f"{statistics.mean(r[k] for r in found):.2f}" for k in ("subject", "style"))
        )
    return lines


def pace(records: Sequence[Record]) -> list[str]:
    """The default's few steps against the paper's many, on retention and time."""
    both: dict[tuple, dict[str, Record]] = {}
    for r in records:
        both.setdefault((r["pair"], r["seed"]), {})[r["method"]] = r
    ratios = []
    for found in both.values():
        if {"default", "100 steps from ones"} <= found.keys():
            few, many = (sum(found[m]["reference_loss"].values()) for m in ("default", "100 steps from ones"))
            ratios.append(few / many)
    if not ratios:
        return []
    kept = f"at or below it in {sum(r <= 1 for r in ratios)} of {len(ratios)} runs"
    return ["", f"retention loss, default over 100 steps from ones: {statistics.mean(ratios):.2f}, {kept}"]


# --- the command ---------------------------------------------------------------------------------------------


def chosen_jobs(given: argparse.Namespace) -> list[Job]:
    """What is asked for and not in the results file yet."""
    from benchmarks.methods import METHODS
    from demo.manifest import read_manifest

    world = read_manifest()
    pairs = [(c.name, s.name) for c in world.subjects for s in world.styles]
    if given.pairs:
        pairs = [tuple(p.split("+")) for p in given.pairs]
    elif given.quick:
        pairs = list(QUICK_PAIRS)
    if given.half:
        at = {name: i for group in (world.subjects, world.styles) for i, name in enumerate(c.name for c in group)}
        odd = given.half == "confirm"
        pairs = [(c, s) for c, s in pairs if (at[c] + at[s]) % 2 == odd]
    methods = given.methods or (QUICK_METHODS if given.quick else list(METHODS))
    seeds = given.seeds or (SEEDS[:1] if given.quick else SEEDS)
    done: set[tuple] = set()
    if given.results.exists():
        done = {(r["pair"], r["seed"], r["method"]) for r in read_records(given.results)}
    jobs = []
    for seed in seeds:
        for content, style in pairs:
            missing = tuple(m for m in methods if (f"{content}+{style}", seed, m) not in done)
            if missing:
                jobs.append(Job(content, style, seed, missing, given.pictures, not given.quick))
    return jobs


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two pairs, one seed, the methods that matter most")
    parser.add_argument("--table", action="store_true", help="measure nothing, print the table")
    parser.add_argument("--pairs", nargs="+", help="such as mushroom+ember; default: all")
    parser.add_argument("--half", choices=("choose", "confirm"), help="pairs to choose a method on, or to confirm it")
    parser.add_argument("--methods", nargs="+", help="names as in the table; default: all")
    parser.add_argument("--seeds", nargs="+", type=int)
    parser.add_argument("--pictures", type=int, default=PICTURES, help="of each kind, per pair, method and seed")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
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
    print(report(given.results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
