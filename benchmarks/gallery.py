"""Every pair, method and seed of a results file on one page, beside references and truth: to overrule the judge by eye.

    python3 dev.py run benchmarks/quality.py --results mine.jsonl       measure; the first pictures are kept
    python3 dev.py run benchmarks/gallery.py mine.jsonl                 mine.gallery/index.html, blind.html
    python3 dev.py run benchmarks/gallery.py drawn.jsonl --methods "direct 1/1" default --seed 0 --screenshot new.jpg

`index.html` has a row for each pair and seed and a column for each method, with what the judge said of all pictures of
the cell; rows can be put first where two methods differ most. `blind.html` asks the same pictures without names, one
question for each pair, seed and picture, and counts the votes (as `python -m ziplora_batch study` does). Both open
from the disk and load nothing.
"""

from __future__ import annotations

import argparse
import functools
import json
import random
import shutil
import sys
import tempfile
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent.parent))

from PIL import Image

from benchmarks.quality_job import KEPT, strip
from benchmarks.quality_table import CEILING, Record, kept_folder, picture_file, read_records
from demo import picture
from demo.manifest import Manifest, Trained, read_manifest
from demo.truth import Truth
from ziplora_batch import study
from ziplora_batch.errors import BatchError

TEMPLATE = Path(__file__).with_name("gallery.html")
FIGURES = ("subject", "style", "both", "distance", "colors")


@dataclass(frozen=True)
class Cell:
    """One pair, seed and method: the kept pictures side by side, and the judge's figures of all."""

    file: Path
    figures: dict[str, float]


Rows = dict[tuple[str, int], dict[str, Cell]]


def read(results: Path, methods: Collection[str] = ()) -> Rows:
    """By pair and seed, the methods whose pictures were kept. methods: only these; empty: all.

    Raises FileNotFoundError where no picture was kept.
    """
    rows: Rows = {}
    for record in read_records(results):
        file = picture_file(kept_folder(results), record["pair"], record["seed"], record["method"])
        if file.exists() and (not methods or record["method"] in methods):
            rows.setdefault((record["pair"], record["seed"]), {})[record["method"]] = Cell(file, _figures(record))
    if not rows:
        raise FileNotFoundError(
            f"{kept_folder(results)} holds no pictures of these methods: git does not keep them; measure into a new "
            "file of --results first"
        )
    return rows


def _figures(record: Record) -> dict[str, float]:
    return {name: record[name] for name in FIGURES if name in record}


def write(rows: Rows, world: Manifest, folder: Path) -> Path:
    """The gallery's page and its pictures, true ones drawn where none were kept. Returns the page."""
    trained, truth = world.trained(), functools.cache(functools.partial(Truth, world))
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    methods = list(dict.fromkeys(method for cells in rows.values() for method in cells if method != CEILING))
    shown = []
    for (pair, seed), cells in rows.items():
        subject, style = pair.split("+")
        entry: dict[str, Any] = {"pair": pair, "seed": seed, "cells": {}}
        entry["prompt"] = world.prompt(trained[subject], trained[style])
        entry["references"] = [_reference(world, trained[name], folder) for name in (subject, style)]
        true = folder / "pictures" / f"{pair}.true.png"
        if CEILING in cells:
            shutil.copyfile(cells[CEILING].file, true)
        elif not true.exists():
            rng = random.Random(f"gallery {subject} {style}")
            picture.write(strip(truth().pictures(subject, style, KEPT, rng)), true)
        entry["truth"] = f"pictures/{true.name}"
        for method, cell in cells.items():
            if method != CEILING:
                name = f"{pair}.{seed}.{methods.index(method)}.png"
                shutil.copyfile(cell.file, folder / "pictures" / name)
                entry["cells"][method] = {"file": f"pictures/{name}", **cell.figures}
        shown.append(entry)
    told = json.dumps({"methods": methods, "size": world.size, "rows": shown})
    page = folder / "index.html"
    study.write(page, TEMPLATE.read_text(encoding="utf-8").replace("{{data}}", told.replace("</", "<\\/")))
    return page


def _reference(world: Manifest, concept: Trained, folder: Path) -> str:
    to = folder / "pictures" / f"{concept.name}.reference.png"
    shutil.copyfile(world.folder / concept.pictures[0], to)
    return f"pictures/{to.name}"


def write_blind(rows: Rows, world: Manifest, folder: Path, methods: Sequence[str], seed: int = 0) -> Path:
    """A page that asks which is best of the methods' first pictures, without their names. Returns it.

    Raises BatchError for fewer than two methods, or more than there are digits.
    """
    asked = []
    trained = world.trained()
    for (pair, number), cells in rows.items():
        if not set(methods) <= set(cells):
            continue
        subject, style = pair.split("+")
        shown = {}
        for place, method in enumerate(methods):
            with Image.open(cells[method].file) as kept:
                first = kept.crop((0, 0, kept.height, kept.height))
            shown[method] = folder / "pictures" / f"{pair}.{number}.{place}.first.png"
            picture.write(first, shown[method])
        references = tuple(folder / _reference(world, trained[name], folder) for name in (subject, style))
        prompt = world.prompt(trained[subject], trained[style])
        asked.append(study.Row(subject, style, prompt, (references[0], references[1]), shown))
    page = folder / "blind.html"
    study.write(page, study.page(asked, "Which is best?", seed, None, study.QUESTION, world.size))
    return page


def screenshot(page: Path, to: Path) -> None:
    """The page as it opens, as a picture of 1400 × 1500 pixels, reduced to three quarters."""
    from devhost.frontend import open_browser

    with open_browser() as browser, tempfile.TemporaryDirectory() as scratch:
        opened = browser.new_page(viewport={"width": 1400, "height": 1500})
        opened.goto(page.resolve().as_uri(), wait_until="networkidle")
        opened.wait_for_function("[...document.images].slice(0, 20).every(image => image.complete)")
        opened.screenshot(path=f"{scratch}/page.png")
        with Image.open(f"{scratch}/page.png") as shown:
            picture.write(shown.convert("RGB").resize((1050, 1125), Image.Resampling.LANCZOS), to, 60)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="of quality.py, whose kept pictures lie beside it")
    parser.add_argument("--methods", nargs="+", default=[], help="which columns; default: all")
    parser.add_argument(
        "--blind", nargs="+", default=["direct 1/1", "direct .8/.8", "default"], help="methods to vote on"
    )
    parser.add_argument("--seed", type=int, help="rows of this one alone")
    parser.add_argument("--screenshot", type=Path, metavar="FILE", help="of the page, for a document")
    parser.add_argument("--to", type=Path, help="the folder; default: beside the results")
    given = parser.parse_args()
    world, folder = read_manifest(), given.to or given.results.with_suffix(".gallery")
    try:
        rows = read(given.results, given.methods)
        if given.seed is not None:
            rows = {(pair, seed): cells for (pair, seed), cells in rows.items() if seed == given.seed}
        made = write(rows, world, folder)
        print(made)
        if given.screenshot:
            screenshot(made, given.screenshot)
        known = {method for cells in rows.values() for method in cells}
        blind = [method for method in given.blind if method in known]
        if 2 <= len(blind) <= study.KEYS:
            print(write_blind(rows, world, folder, blind))
    except (FileNotFoundError, BatchError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
