"""Whether LoRAs that the prompt does not ask for stay silent: three and five at once, one or two of them asked for.

    python3 dev.py run benchmarks/bystanders.py confirm final       sets of LoRAs that hold alone: two hours
    python3 dev.py run benchmarks/bystanders.py confirm final --table    only what the results file holds

A set is a subject, a style, and LoRAs that no prompt names, which take turns as second subject and second style. Three
kinds of prompts: the subject in the style, the subject alone, the style alone on a shape that its pictures lack. What
a method loses to bystanders is how much less often it is right than on the asked-for two alone. For the intervals sets
are drawn again as a whole; a style serves in several of them, so they are a little narrow. A run adds to the results
file, so it can be stopped and continued.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import random
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.append(str(Path(__file__).resolve().parent.parent))  # last: `nodes` there would hide ComfyUI's module

from benchmarks import new_concepts
from benchmarks.quality_table import Record, refuse_another_world
from benchmarks.workers import share_out
from demo.manifest import Asked
from demo.truth import rights, shares

RESULTS = Path(__file__).resolve().parent / "results" / "bystanders.jsonl"
COUNTS = (2, 3, 5)  # of LoRAs; 2: the asked-for ones alone
KINDS = {"both": 8, "subject": 6, "style": 6}  # prompts, and pictures of each
SHOWN = ("stack at 1", "stack at 2/n", "TIES", "columns by activity", "default")
ROUNDS = 10_000


@dataclass(frozen=True)
class Set:
    """The asked-for subject and style, and so many LoRAs beside them that no prompt names."""

    block: str
    subject: str
    style: str
    bystanders: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"{self.block} {self.subject}+{self.style}"


def sets(block: str) -> list[Set]:
    """As many sets as the block has strong subjects; each subject is asked for once, styles and bystanders by lot."""
    rng = random.Random(f"bystanders {block}")
    subjects, styles = new_concepts.strong(block)
    shuffled = rng.sample(styles, len(styles))
    chosen = []
    for place, subject in enumerate(subjects):
        style = shuffled[place % len(styles)]
        others = rng.sample([s for s in subjects if s != subject], 2)
        manners = rng.sample([s for s in styles if s != style], 2)
        beside = (others[0], manners[0], others[1]) if place % 2 else (manners[0], others[0], manners[1])
        chosen.append(Set(block, subject, style, beside))
    return chosen


# --- merges of any number ------------------------------------------------------------------------------------


def methods() -> dict[str, Callable[[Any], Any]]:
    """Name -> Case -> Merge, of methods that take any number of LoRAs."""
    from benchmarks.methods import METHODS, node, timed
    from benchmarks.rivals import dense, ties
    from benchmarks.routing import ROUTING
    from benchmarks.studio import core

    def everywhere(case: Any, strength: float) -> Any:
        return case.ones.scaled(**dict.fromkeys(case.joined.concepts, strength))

    def parted(case: Any) -> Any:
        return everywhere(case, 2 / max(2, len(case.joined.concepts)))

    def by_activity(case: Any) -> Any:
        return core.layerwise.merge(case.joined, case.predictor, case.references, case.seed)

    return {
        "stack at 1": timed(lambda case: case.ones),
        "stack at .8": timed(lambda case: everywhere(case, 0.8)),
        "stack at 2/n": timed(parted),
        "TIES": dense(ties()),
        "shared columns": METHODS["shared columns"],
        "columns by activity": timed(by_activity),
        "default": node(),
        **ROUTING,
    }


# --- one set -------------------------------------------------------------------------------------------------


def measure(job: tuple[Set, int, Sequence[str]]) -> list[Record]:
    """Every merge of a set's first LoRAs, drawn and judged. job: the set, how many of its LoRAs, methods."""
    asked, count, names = job
    from benchmarks.quality_job import studio_of

    studio = studio_of(asked.block)
    from benchmarks.methods import Case
    from benchmarks.studio import PACK, fitting, zipped_lora

    trained = [studio.concepts[n] for n in (asked.subject, asked.style, *asked.bystanders[: count - 2])]
    kinds = {c.name: "subject" for c in studio.manifest.subjects}
    roles = ",".join(kinds.get(t.name, "style") for t in trained)
    concepts = dict(zip(PACK.nodes.bridge.lora.stack.concepts(roles, count), trained, strict=True))
    sources = studio.set_of(concepts)
    fitted = fitting.fit(sources, studio.model.model)
    known, merges = methods(), {}

    def work(predictor, joined, references) -> None:
        case = Case(fitted, joined, predictor, references, seed=0)
        merges.update({name: known[name](case) for name in names})

    studio.zip_set(fitted.loras, concepts, work)
    records = []
    for name, merge in merges.items():
        zipped = zipped_lora.ZippedLoRA(sources, merge.fitted, merge.coefficients)
        record = {"set": asked.name, "count": count, "method": name, **_judged(studio, asked, zipped)}
        record["seconds"] = round(merge.seconds, 2)
        print(" ".join(f"{k} {v}" for k, v in record.items()), flush=True)
        records.append(record)
    return records


def _judged(studio: Any, asked: Set, zipped: Any) -> Record:
    """How often what each kind of prompt asks for is right."""
    subject, style, manifest = studio.concepts[asked.subject], studio.concepts[asked.style], studio.manifest
    both = Asked(manifest.prompt(subject, style), subject.name, style.name)
    questions = {
        "both": [both] * KINDS["both"],
        "subject": [dataclasses.replace(manifest.alone(subject), style=None)] * KINDS["subject"],
        "style": [manifest.on_unseen(style, number) for number in range(KINDS["style"])],
    }
    drawn = studio.draw(zipped, [q.prompt for group in questions.values() for q in group], 1000)
    parts = drawn.split(list(KINDS.values()))
    return {
        kind: round(shares(rights(studio.truth, pictures, group))["both"], 4)
        for (kind, group), pictures in zip(questions.items(), parts, strict=True)
    }


def read(results: Path) -> list[Record]:
    """The last record of each set, number of LoRAs and method."""
    lines = results.read_text(encoding="utf-8").splitlines() if results.exists() else []
    records = [json.loads(line) for line in lines]
    return list({(r["set"], r["count"], r["method"]): r for r in records}.values())


# --- the table -----------------------------------------------------------------------------------------------


def interval(values: Sequence[Sequence[float]], figure: Callable[[Sequence[float]], float]) -> tuple[float, ...]:
    """A figure of columns' means, and its 95 % interval: rows are drawn again, with replacement (percentiles)."""
    table = torch.tensor(values, dtype=torch.float64)
    picks = torch.randint(len(table), (ROUNDS, len(table)), generator=torch.Generator().manual_seed(0))
    again = sorted(f for row in table[picks].mean(1).tolist() if not math.isnan(f := figure(row)))
    if not again:
        return math.nan, math.nan, math.nan
    return figure(table.mean(0).tolist()), again[int(0.025 * len(again))], again[int(0.975 * len(again))]


def ratio(means: Sequence[float]) -> float:
    """Of the first to the second; no number where both are zero."""
    return means[0] / means[1] if means[1] else math.inf if means[0] else math.nan


def table(records: Sequence[Record], against: str = "stack at 1") -> list[str]:
    """A row for each method and number of LoRAs: how often each kind is right, times as often as `against`, what
    bystanders cost as a share of what they cost there."""
    by: dict[tuple[str, int, str], Mapping[str, float]] = {(r["method"], r["count"], r["set"]): r for r in records}
    lines = [
        f"| LoRAs | method | sets | both right | subject alone | style alone | all three | less {against}'s | in parts "
        "of it | lost to bystanders | in parts of that one's loss |",
        "|---" * 11 + "|",
    ]

    def mean_of(key: tuple[str, int, str]) -> float:
        return statistics.mean(by[key][kind] for kind in KINDS)

    for count in sorted({r["count"] for r in records}):
        for method in dict.fromkeys(r["method"] for r in records):
            names = [n for m, c, n in by if (m, c) == (method, count) and (against, count, n) in by]
            if not names:
                continue
            rows = [by[method, count, n] for n in names]
            cells = [f"{statistics.mean(r[kind] for r in rows):.2f}" for kind in KINDS]
            mine, theirs = ([mean_of((m, count, n)) for n in names] for m in (method, against))
            pairs = list(zip(mine, theirs, strict=True))
            cells.append(f"{statistics.mean(mine):.2f}")
            cells += [
                "" if method == against else _shown(interval(pairs, figure))
                for figure in (lambda means: means[0] - means[1], ratio)
            ]
            alone = [n for n in names if (method, 2, n) in by and (against, 2, n) in by]
            if count > 2 and alone:
                lost = [
                    (
                        mean_of((method, 2, n)) - mean_of((method, count, n)),
                        mean_of((against, 2, n)) - mean_of((against, count, n)),
                    )
                    for n in alone
                ]
                cells.append(_shown(interval(lost, lambda means: means[0])))
                cells.append("" if method == against else _shown(interval(lost, ratio)))
            else:
                cells += ["", ""]
            lines.append("| " + " | ".join([str(count), method, str(len(names)), *cells]) + " |")
    return lines


def _shown(found: tuple[float, ...]) -> str:
    return "" if math.isnan(found[0]) else "{:.2f} [{:.2f}, {:.2f}]".format(*found)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("blocks", nargs="+", choices=new_concepts.BLOCKS)
    parser.add_argument("--counts", nargs="+", type=int, default=COUNTS)
    parser.add_argument("--sets", type=int, help="so many of each block")
    parser.add_argument("--methods", nargs="+")
    parser.add_argument("--against", default=SHOWN[0], help="the method that the table compares the others with")
    parser.add_argument("--table", action="store_true", help="measure nothing, print the table")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--results", type=Path, default=RESULTS)
    given = parser.parse_args()
    names = given.methods or SHOWN
    records = read(given.results)
    done = {(r["set"], r["count"], r["method"]) for r in records}
    for block in () if given.table else given.blocks:  # a process knows one block's judge
        held = (name.split()[1] for name, *_ in done if name.split()[0] == block)
        refuse_another_world(given.results, held, sum(new_concepts.strong(block), []))
        jobs = []
        for asked in sets(block)[: given.sets]:
            for count in given.counts:
                missing = tuple(m for m in names if (asked.name, count, m) not in done)
                if missing:
                    jobs.append((asked, count, missing))
        if not share_out(measure, jobs, given.results, given.processes):
            return 1
    records = read(given.results)
    print("\n".join(table([r for r in records if r["set"].split()[0] in given.blocks], given.against)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
