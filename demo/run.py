"""Zip subject and style LoRAs of the miniature inside a real ComfyUI, draw them, and count what came out right.

    python3 dev.py demo              the first two pairs, and what each LoRA draws alone
    python3 dev.py demo --quick      one pair, a few pictures, few steps each: only to see that everything runs

Every graph is `workflows/api/every_step_with_pictures.json` with names, prompts and sizes put in; for the bare model, a
LoRA alone and the direct merge, stock LoRA loaders stand in place of the zipped pair.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from demo import picture, scores
from demo.graphs import Drawing, Graphs, Prompt, Sampling
from demo.manifest import Manifest, Trained, read_manifest
from demo.miniature import CFG, STEPS
from demo.scores import Question, Score
from demo.truth import Truth
from devhost.answers import Result
from devhost.base import MissingMiniature, find_miniature, make_base
from devhost.host import ROOT
from devhost.process import has_gpu
from devhost.server import ComfyServer

OUTPUT = ROOT / "demo" / "output"
SEED = 1000
DIALS = (0.0, 0.5, 1.0)

Pictures = list[np.ndarray]


@dataclass(frozen=True)
class Plan:
    """How much to do.

    gated: subjects and styles whose own figures are printed, of `pictures` each. gates: how these are sampled: as the
    miniature was judged when it was trained. pairs: merges, of `merged` pictures each. merges: as the shipped graph
    samples, at the miniature's own guidance. dial_pictures: for style strengths other than 1, which are only shown.
    """

    gated: int = 3
    pairs: int = 2
    pictures: int = 32
    merged: int = 16
    dial_pictures: int = 2
    columns: int = 2
    gates: Sampling = Sampling(steps=STEPS, cfg=CFG)
    merges: Sampling = Sampling(cfg=CFG)


FEW = Sampling(steps=3)
QUICK = Plan(
    gated=1, pairs=1, pictures=2, merged=2, dial_pictures=1, columns=1, gates=FEW, merges=FEW
)  # fmt: skip


@dataclass(frozen=True)
class Asked:
    """Pictures of some questions, and how many were right."""

    pictures: Pictures
    score: Score


@dataclass
class Studio:
    """The server, the graphs and the truth, and a count of the seconds."""

    server: ComfyServer
    graphs: Graphs
    truth: Truth
    plan: Plan
    started: float

    def ask(self, questions: Sequence[Question], sampling: Sampling, graph: Callable[[Drawing], Prompt]) -> Asked:
        """Draw the answers to some questions with a graph, and count."""
        return self.answer(questions, sampling, graph)[0]

    def answer(
        self, questions: Sequence[Question], sampling: Sampling, graph: Callable[[Drawing], Prompt]
    ) -> tuple[Asked, Result]:
        """The same, with what the server said about the last question's prompt."""
        asked = Asked([], Score())
        for number, question in enumerate(questions):
            drawing = Drawing(question.asked.prompt, question.count, SEED + number, sampling)
            result = self.server.run(graph(drawing))
            pictures = result.images(self.graphs.save)
            right = scores.score(self.truth, pictures, question.asked)
            asked = Asked(asked.pictures + pictures, asked.score + right)
        return asked, result

    def plain(self, loras: Sequence[Trained]) -> Callable[[Drawing], Prompt]:
        return lambda drawing: self.graphs.plain([lora.learned.file for lora in loras], drawing)

    def zipped(self, subject: Trained, style: Trained, dial: float) -> Callable[[Drawing], Prompt]:
        return lambda drawing: self.graphs.zipped(subject.learned, style.learned, drawing, dial)

    def say(self, text: str) -> None:
        print(f"[{time.monotonic() - self.started:5.0f} s] {text}", flush=True)


@dataclass(frozen=True)
class PairResult:
    """One pair: each LoRA alone, and each way to merge them, by label."""

    subject: Trained
    style: Trained
    subject_alone: Asked
    style_alone: Asked
    merged: dict[str, Asked]
    report: str

    @property
    def name(self) -> str:
        return f"{self.subject.name} + {self.style.name}"


def gate(studio: Studio, what: str, asked: Asked, **wanted: float) -> None:
    """Print one of the miniature's own figures beside what is wanted of it. The keys are the scores' names."""
    parts = []
    for name, least in wanted.items():
        short = "" if asked.score.share(name) >= least else ", SHORT OF IT"
        parts.append(f"{name} {getattr(asked.score, name)} (wanted {least:.0%}{short})")
    studio.say(f"{what}: of {asked.score.count} pictures right in " + ", ".join(parts))


def base_gate(studio: Studio, world: Manifest) -> None:
    questions = scores.base_questions(world, studio.plan.pictures)
    gate(studio, "base model, its own words", studio.ask(questions, studio.plan.gates, studio.plain([])),
         subject=0.85, style=0.9)  # fmt: skip


def subject_gates(studio: Studio, world: Manifest, subject: Trained) -> Asked:
    sampling, count = studio.plan.gates, studio.plan.pictures
    alone = studio.ask(scores.alone_questions(world, subject, count), sampling, studio.plain([subject]))
    gate(studio, f"subject LoRA {subject.name} alone", alone, subject=0.85)
    styled = studio.ask(scores.known_style_questions(world, subject, count), sampling, studio.plain([subject]))
    gate(studio, f"subject LoRA {subject.name} in styles that the base knows", styled, subject=0.6)
    return alone


def style_gates(studio: Studio, world: Manifest, style: Trained) -> Asked:
    questions = scores.unseen_questions(world, style, studio.plan.pictures)
    alone = studio.ask(questions, studio.plan.gates, studio.plain([style]))
    gate(studio, f"style LoRA {style.name} on subjects that its pictures lack", alone, style=0.8, subject=0.65)
    return alone


def gate_all(studio: Studio, world: Manifest, pairs: Sequence[tuple[Trained, Trained]]) -> dict[str, Asked]:
    """Print the miniature's own figures. Returns what LoRAs draw alone, by name: those of the pairs, and more."""
    base_gate(studio, world)
    subjects, styles = (
        list({one.name: one for one in (*merged, *every)}.values())[: studio.plan.gated]
        for merged, every in zip(zip(*pairs, strict=True), (world.subjects, world.styles), strict=True)
    )
    alone = {subject.name: subject_gates(studio, world, subject) for subject in subjects}
    return alone | {style.name: style_gates(studio, world, style) for style in styles}


def merge_pair(studio: Studio, world: Manifest, subject: Trained, style: Trained) -> tuple[dict[str, Asked], str]:
    """Merge two LoRAs directly and zipped: the pictures by label, and the optimisation's report."""
    plan, sampling = studio.plan, studio.plan.merges
    questions = scores.pair_questions(world, subject, style, plan.merged)
    merged = {"direct merge": studio.ask(questions, sampling, studio.plain([subject, style]))}
    report = ""
    for dial in DIALS:
        count = plan.merged if dial == 1.0 else plan.dial_pictures
        questions = scores.pair_questions(world, subject, style, count)
        asked, result = studio.answer(questions, sampling, studio.zipped(subject, style, dial))
        merged[f"zipped, style {dial:g}"] = asked
        if studio.graphs.optimise in result.cached:
            continue
        report = "\n".join(line.rstrip() for line in result.text(studio.graphs.report).splitlines())
        studio.say(f"zipped {subject.name} + {style.name}; only the dial turns after this")
    return merged, report


def print_scores(results: Sequence[PairResult]) -> None:
    """The two scores of every merge, and both at once."""
    print("\nSubject in style: pictures in which the judge finds the subject, the style, both")
    for result in results:
        print(f"  {result.name}")
        for label, asked in result.merged.items():
            right = asked.score
            print(
                f"    {label:18} subject {right.subject:3}  style {right.style:3}  both {right.both:3} of {right.count}"
            )
    if len(results) > 1:
        print("  all pairs")
        for label in results[0].merged:
            right = sum((result.merged[label].score for result in results), Score())
            print(
                f"    {label:18} subject {right.subject:3}  style {right.style:3}  both {right.both:3} of {right.count}"
            )


def rows(results: Sequence[PairResult], columns: int) -> list[picture.Row]:
    """The rows of the README's picture."""

    def total(asked: Sequence[Asked], name: str) -> str:
        right = sum((a.score for a in asked), Score())
        return f"{getattr(right, name)} of {right.count}"

    subjects, styles = [r.subject_alone for r in results], [r.style_alone for r in results]
    made = [
        picture.Row(
            "subject LoRA alone",
            f"its own prompt\nsubject right {total(subjects, 'subject')}",
            _first(subjects, columns),
        ),
        picture.Row(
            "style LoRA alone", f"subjects new to it\nstyle right {total(styles, 'style')}", _first(styles, columns)
        ),
    ]
    for label in results[0].merged:
        asked = [result.merged[label] for result in results]
        note = f"subject right {total(asked, 'subject')}\nstyle right {total(asked, 'style')}"
        made.append(picture.Row(label, note, _first(asked, columns)))
    return made


def _first(asked: Sequence[Asked], columns: int) -> list[Pictures]:
    return [a.pictures[:columns] for a in asked]


def write_pictures(results: Sequence[PairResult], columns: int, folder: Path) -> list[Path]:
    """The README's picture, then for each pair its report and every picture that was drawn, as contact sheets."""
    headers = [(r.name, f'"{r.subject.words} {r.style.words}"') for r in results]
    written = [picture.write(picture.comparison(headers, rows(results, columns)), folder / "comparison.png")]
    for result in results:
        pair = folder / f"{result.subject.name}_{result.style.name}"
        sheets = {"subject LoRA alone": result.subject_alone, "style LoRA alone": result.style_alone, **result.merged}
        for label, asked in sheets.items():
            name = label.replace(",", "").replace(" ", "_")
            written.append(picture.write(picture.sheet(asked.pictures), pair / f"{name}.png"))
        (pair / "report.txt").write_text(result.report + "\n", encoding="utf-8")
    return written


def publish(results: Sequence[PairResult], written: Sequence[Path]) -> list[Path]:
    """Put the pictures where the README and the template browser show them."""
    with Image.open(written[0]) as comparison:
        readme = picture.write(comparison.convert("RGB"), ROOT / "docs" / "ziplora_demo.jpg")
    first = results[0]
    merged = list(first.merged.values())
    ways = (first.subject_alone, first.style_alone, merged[0], merged[-1])
    drawn = np.asarray(picture.square([asked.pictures[0] for asked in ways]))
    file = ROOT / "workflows" / "5 Every step, with pictures.jpg"
    return [readme, picture.write(picture.thumbnail(drawn, "Every step, with pictures"), file, 80)]


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one pair, a few pictures, few steps each")
    parser.add_argument("--pairs", type=int, help="how many pairs (2): the first subject with the first style, ...")
    parser.add_argument("--merged", type=int, help="pictures of each merge (16)")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="folder for the pictures (demo/output)")
    parser.add_argument("--publish", action="store_true", help="also renew the README's picture and the thumbnail")
    return parser.parse_args()


def main() -> int:
    given = options()
    plan, started = QUICK if given.quick else Plan(), time.monotonic()
    try:
        find_miniature()
        world = read_manifest()
        truth = Truth(world)
    except (MissingMiniature, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    plan = replace(plan, pairs=given.pairs or plan.pairs, merged=given.merged or plan.merged)
    plan = replace(plan, gated=max(plan.gated, plan.pairs))
    pairs = [(world.trained()[subject], world.trained()[style]) for subject, style in world.quick[: plan.pairs]]

    def studio(base: Path, servers: ExitStack) -> Studio:
        threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 2) // 2))}
        server = ComfyServer(make_base(base), device="auto" if has_gpu() else "cpu", environment=threads)
        return Studio(servers.enter_context(server), Graphs(world.checkpoint, world.size), truth, plan, started)

    # Two servers: one draws what each LoRA does alone while the other merges. So small a model keeps one core busy.
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder,
        ThreadPoolExecutor(1) as helper,
        ExitStack() as servers,  # stopped first: whoever waits for an answer then gives up
    ):
        alone = helper.submit(gate_all, studio(Path(folder, "alone"), servers), world, pairs)
        merging = studio(Path(folder, "merged"), servers)
        merging.say("ComfyUI is up")
        merges = [merge_pair(merging, world, *pair) for pair in pairs]
        gated = alone.result()
    results = [
        PairResult(subject, style, gated[subject.name], gated[style.name], merged, report)
        for (subject, style), (merged, report) in zip(pairs, merges, strict=True)
    ]
    print_scores(results)
    written = write_pictures(results, plan.columns, given.output)
    if given.publish:
        written += publish(results, written)
    for result in results:
        print(f"\n{result.name}\n{result.report}")
    merging.say("done. Pictures:")
    print("\n".join(f"  {path}" for path in written))
    return 0


if __name__ == "__main__":
    sys.exit(main())
