"""How well each way to merge keeps a subject and a style: the paper's Table 2, on the miniature SDXL.

    python3 dev.py run benchmarks/quality.py                    every subject and style, three seeds: hours
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
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.append(str(Path(__file__).resolve().parent.parent))  # last: `nodes` there would hide ComfyUI's module

from benchmarks import new_concepts
from benchmarks.quality_job import Job, run_job, studio_of
from benchmarks.quality_table import CEILING, kept_folder, read_records, refuse_another_world, report, sheet
from benchmarks.workers import share_out

if TYPE_CHECKING:
    from demo.manifest import Manifest

RESULTS = Path(__file__).resolve().parent / "results" / "drawn.jsonl"
SEEDS = (0, 1, 2)
PICTURES = 12  # of the pair, per method and seed: 36 over the seeds; fewer of the other prompts
QUICK_METHODS = ("content LoRA", "style LoRA", "direct 1/1", "default")


def chosen_jobs(given: argparse.Namespace) -> list[Job]:
    """What is asked for and not in the results file yet."""
    pairs = chosen_pairs(given)
    done: set[tuple] = set()
    if given.results.exists():
        done = {(r["pair"], r["seed"], r["method"]) for r in read_records(given.results)}
        refuse_another_world(given.results, (pair for pair, *_ in done), manifest_of(given).trained())
    if given.block:
        studio_of(given.block)  # before anything of the demo is imported
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
    kept = kept_folder(given.results)
    lean = given.candidates or given.rivals
    details = not (given.quick or given.ablation or lean)
    jobs = []
    for seed in seeds:
        for content, style in pairs:
            missing = tuple(m for m in methods if (f"{content}+{style}", seed, m) not in done)
            if missing:
                strengths = tuple(given.strengths)
                jobs.append(
                    Job(content, style, seed, missing, given.pictures, details, kept, given.block, lean, strengths)
                )
    return jobs


def manifest_of(given: argparse.Namespace) -> Manifest:
    from demo.manifest import read_manifest

    return read_manifest(new_concepts.FOLDER / given.block if given.block else None)


def chosen_pairs(given: argparse.Namespace) -> list[tuple[str, str]]:
    trained = manifest_of(given)
    subjects = trained.subjects if given.block else trained.subjects[: given.subjects]
    pairs = [(c.name, s.name) for c, s in trained.pairs() if c in subjects]
    if given.each:
        count = len(trained.styles)
        at = {s.name: i for i, s in enumerate(trained.styles)}
        first = {c.name: i for i, c in enumerate(subjects)}
        pairs = [(c, s) for c, s in pairs if (at[s] - first[c]) * given.each % count < given.each]
    if given.pairs:
        pairs = [tuple(p.split("+")) for p in given.pairs]
    elif given.quick:
        pairs = trained.quick
    if given.half:
        at = {name: i for group in (trained.subjects, trained.styles) for i, name in enumerate(c.name for c in group)}
        odd = given.half == "confirm"
        pairs = [(c, s) for c, s in pairs if (at[c] + at[s]) % 2 == odd]
    return pairs


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two pairs, one seed, the methods that matter most")
    parser.add_argument("--table", action="store_true", help="measure nothing, print the table")
    parser.add_argument("--pairs", nargs="+", help="such as octopus+gilded; default: every subject with every style")
    parser.add_argument("--subjects", type=int, help="how many of the subjects, with every style; default: all")
    parser.add_argument("--block", choices=new_concepts.BLOCKS, help="every pair of a block of new concepts")
    parser.add_argument(
        "--strengths", nargs=2, type=float, default=(1.0, 1.0), help="of both files; needs a results file of its own"
    )
    parser.add_argument("--each", type=int, help="so many styles for each subject, spread evenly, instead of all")
    parser.add_argument("--half", choices=("choose", "confirm"), help="pairs to choose a method on, or to confirm it")
    parser.add_argument("--methods", nargs="+", help="names as in the table; default: all")
    parser.add_argument("--candidates", action="store_true", help="variants of the layer-wise solve instead")
    parser.add_argument("--rivals", action="store_true", help="published merges instead, or with those")
    parser.add_argument("--ablation", action="store_true", help="the ways that were tried for the default instead")
    parser.add_argument("--seeds", nargs="+", type=int)
    parser.add_argument("--pictures", type=int, default=PICTURES, help="of each kind, per pair, method and seed")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument(
        "--sheet",
        type=Path,
        help="write a contact sheet of what is kept beside the results, of --methods and --pairs where given",
    )
    parser.add_argument("--results", type=Path, default=RESULTS)
    return parser.parse_args()


def main() -> int:
    given = parse()
    given.results.parent.mkdir(parents=True, exist_ok=True)
    if not given.table:
        jobs = chosen_jobs(given)
        started = time.monotonic()
        if not share_out(run_job, jobs, given.results, given.processes):
            return 1
        print(f"{len(jobs)} jobs in {(time.monotonic() - started) / 60:.1f} minutes")
    named = given.half or given.pairs or given.each
    print(report(given.results, {f"{c}+{s}" for c, s in chosen_pairs(given)} if named else None))
    if given.sheet:
        try:
            sheet(given.results, given.sheet, given.methods or (), given.pairs or ())
        except FileNotFoundError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
