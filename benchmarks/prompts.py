"""Whether the report tells right prompts from wrong ones, on the miniature's LoRAs.

    python3 dev.py run benchmarks/prompts.py            pairs in which every LoRA takes part: half an hour
    python3 dev.py run benchmarks/prompts.py --all      every pair: hours
    python3 dev.py run benchmarks/prompts.py --table    only what the results file holds

A run adds to the results file, so it can be stopped and continued. Each LoRA is measured as the node measures it, with
the picture that it was trained on and with references that it draws, under its training prompt, an empty one, "a photo
of a cat" and the other concept's. Also without its trigger word, which is neither right nor wrong: LoRAs leak, and
what else stands in the prompt may wake them. The threshold is chosen on half of the LoRAs, tried on the other half.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent.parent))  # last: `nodes` there would hide ComfyUI's module

from benchmarks.quality_table import refuse_another_world
from demo.manifest import read_manifest

RESULTS = Path(__file__).resolve().parent / "results" / "prompts.jsonl"
RIGHT, WRONG, BETWEEN = ("right",), ("empty", "a photo of a cat", "swapped"), ("without trigger",)
SEED = 0
Record = dict[str, Any]


def words(case: str, own: Any, other: Any) -> str:
    """The prompt of one concept in a case. own, other: the two trained concepts."""
    prompt = str(own.learned.prompt)
    return {
        "right": prompt,
        "empty": "",
        "a photo of a cat": "a photo of a cat",
        "swapped": str(other.learned.prompt),
        "without trigger": prompt.replace(f"{own.identifier} ", ""),
    }[case]


def measure(every_pair: bool, done: set[tuple[str, str]]) -> Iterator[list[Record]]:
    """The records of one pair and kind of references after the other, but for those that are done."""
    from benchmarks.studio import PACK, Studio, core, fitting, predictor, torch

    drawing, prompts = PACK.nodes.bridge.drawing, core.prompts
    torch.set_num_threads(1)  # the tensors are tiny
    studio = Studio()
    subjects, styles = studio.manifest.subjects, studio.manifest.styles
    pairs = [(subjects[i % len(subjects)], styles[i % len(styles)]) for i in range(max(len(subjects), len(styles)))]
    if every_pair:
        pairs = list(itertools.product(subjects, styles))
    for kind, (content, style) in itertools.product(("pictures", "drawn"), pairs):
        name = f"{content.name}+{style.name}"
        if (kind, name) in done:
            continue
        found = []
        sources = studio.sources(content, style)
        fitted = fitting.fit(sources, studio.model.model)
        pair = {"content": (content, style), "style": (style, content)}
        for case in (*RIGHT, *WRONG, *BETWEEN):
            conditioning = {c: studio.prompt(words(case, *both)) for c, both in pair.items()}
            latents = {c: studio.latents(own) for c, (own, _) in pair.items()}
            with torch.inference_mode():
                if kind == "drawn":
                    asked = drawing.sampling.ReferenceRequest(2, 128)
                    given = studio.model, sources, fitted
                    latents = {
                        c: drawing.references.draw(*given, c, conditioning[c], asked, SEED).latents for c in pair
                    }
                effects: dict[str, Any] = {}

                def look(predict, joined, refs, effects=effects) -> None:
                    effects.update(prompts.measure(joined, predict, refs, SEED))

                predictor.with_predictor(studio.model, fitted.loras, conditioning, latents, look)
            for concept, effect in effects.items():
                record = {"pair": name, "references": kind, "case": case}
                record |= {"lora": pair[concept][0].name, "concept": concept, "left": round(effect.relative_error(), 4)}
                record["gain"] = {k: round(v, 4) for k, v in effect.gain.items()}
                record["change"] = {k: round(v, 4) for k, v in effect.change.items()}
                found.append(record)
        yield found


def halves(records: Sequence[Record]) -> tuple[list[Record], list[Record]]:
    """Those of every second LoRA of each concept, to choose by, and the others, to try it on."""
    chosen: set[str] = set()
    for concept in ("content", "style"):
        chosen |= set(list(dict.fromkeys(r["lora"] for r in records if r["concept"] == concept))[::2])
    first = [r for r in records if r["lora"] in chosen]
    return first, [r for r in records if r["lora"] not in chosen]


def best_threshold(records: Sequence[Record]) -> float:
    """Half-way (geometric) between the right prompts and the wrong ones, where fewest are on the wrong side."""
    right, wrong = ([r["left"] for r in records if r["case"] in cases] for cases in (RIGHT, WRONG))
    edges = sorted({*right, *wrong})
    middles = [math.sqrt(a * b) for a, b in itertools.pairwise(edges)]
    errors = [sum(x >= m for x in right) + sum(x < m for x in wrong) for m in middles]
    fewest = [m for m, e in zip(middles, errors, strict=True) if e == min(errors)]
    return statistics.median(fewest)


def table(records: Sequence[Record]) -> str:
    """The threshold, and how often it is right, by case and kind of references."""
    from ziplora_core.prompts import FIRES

    chosen, tried = halves(records)
    lines = [f"threshold on half of the LoRAs {best_threshold(chosen):.3f}, in use {FIRES:g}"]
    lines += ["", "| prompt | references | said to wake it | on the other half | left of the error, mean (range) |"]
    lines += ["|---|---|---|---|---|"]
    for case, kind in itertools.product((*RIGHT, *WRONG, *BETWEEN), ("pictures", "drawn")):
        cells = []
        for half in (chosen, tried):
            mine = [r["left"] for r in half if r["case"] == case and r["references"] == kind]
            cells.append(f"{sum(x < FIRES for x in mine)} of {len(mine)}")
        every = [r["left"] for r in records if r["case"] == case and r["references"] == kind]
        if not every:
            continue
        spread = f"{statistics.mean(every):.2f} ({min(every):.2f} to {max(every):.2f})"
        lines.append(f"| {case} | {kind} | {cells[0]} | {cells[1]} | {spread} |")
    for name, half in (("first half", chosen), ("other half", tried)):
        judged = [r for r in half if r["case"] in (*RIGHT, *WRONG)]
        good = sum((r["left"] < FIRES) == (r["case"] in RIGHT) for r in judged)
        lines.append(f"\n{name}: {good} of {len(judged)} told rightly")
    swapped = [r for r in records if r["case"] == "swapped"]
    seen = sum("other" in r["gain"] and (1 - r["gain"]["other"]) / (1 - r["gain"]["empty"]) < FIRES for r in swapped)
    lines.append(f"swapped prompts: the other's said to wake it in {seen} of {len(swapped)}")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="only print what the results file holds")
    parser.add_argument("--all", action="store_true", help="every pair")
    parser.add_argument("--results", type=Path, default=RESULTS)
    given = parser.parse_args()
    if not given.table:
        done = {(r["references"], r["pair"]) for r in kept(given.results)}
        refuse_another_world(given.results, (pair for _, pair in done), read_manifest().trained())
        for records in measure(given.all, done):
            with given.results.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(record) + "\n" for record in records)
            print(records[0]["references"], records[0]["pair"], flush=True)
    print(table(kept(given.results)))
    return 0


def kept(path: Path) -> list[Record]:
    """What the results file holds."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return [json.loads(line) for line in lines]


if __name__ == "__main__":
    sys.exit(main())
