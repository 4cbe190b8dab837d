"""What the records of `quality.py` say: tables over pairs and seeds, comparisons by pair, a contact sheet."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

Record = dict[str, Any]

CEILING, ORACLE = "true renderings", "direct, best by the truth"
DETAILED = ("content LoRA", "style LoRA", "direct 1/1", "default")  # also asked for each concept alone
DIAL = (0.0, 0.25, 0.5, 0.75)
COLUMNS = {
    "subject": "subject",
    "style": "style",
    "both": "both",
    "distance": "distance",
    "content_loss": "content loss",
    "style_loss": "style loss",
    "other_content_loss": "on others",
    "other_style_loss": "on others",
    "overlap": "overlap",
    "alignment": "alignment",
    "moved": "moved",
    "peak": "GB more",
    "stored": "bytes kept",
    "seconds": "seconds",
}
LAST = ("default", CEILING)  # of the rows; the others as they were measured
SPREAD = ("subject", "style", "both", "distance")
AGAINST = (
    "direct 1/1",
    "community settings",
    "direct, best by retention",
    ORACLE,
    "NP-LoRA",
    "Eq. 3 to the letter",
    "100 steps from ones",
    "start and 25 steps",
)


def read_records(path: Path) -> list[Record]:
    """The last record of every pair, seed and method. Losses are put in relation to those of the bare base model."""
    records: dict[tuple, Record] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        records[record["pair"], record["seed"], record["method"]] = record
    for (pair, seed, _), record in records.items():
        bare = records.get((pair, seed, "base model"))
        for kind, prefix in (("reference_loss", ""), ("other_loss", "other_")):
            for concept, loss in record.get(kind, {}).items():
                if bare and bare[kind][concept]:
                    record[f"{prefix}{concept}_loss"] = loss / bare[kind][concept]
    return list(records.values())


def refuse_another_world(path: Path, pairs: Iterable[str], known: Collection[str]) -> None:
    """Ends the program where a results file that is to be added to holds LoRAs that this world has not, of `known`.

    Worlds have pairs of one name: these would count as measured, and tables would be over both worlds.
    """
    others = sorted({name for pair in pairs for name in pair.split("+")} - set(known))
    if others:
        raise SystemExit(
            f"error: {path} holds figures of another world, of {', '.join(others[:3])} …: name a new file (--results), "
            "or measure on the world that they are of"
        )


def report(path: Path, pairs: Collection[str] | None = None) -> str:
    """Every table, as Markdown with a line above each; of some pairs alone where they are named."""
    records = [r for r in read_records(path) if pairs is None or r["pair"] in pairs]
    if not records:
        return f"{path} holds nothing of these pairs"
    seeds = sorted({r["seed"] for r in records})
    parts = [
        [f"{len({r['pair'] for r in records})} pairs, seeds {seeds}, {records[0]['pictures']} pictures each"],
        table(records, COLUMNS),
        *(comparison(records, other) for other in AGAINST),
        ["each concept alone:"],
        table(records, {"subject_alone": "subject", "style_alone": "style", "style_alone_shape": "the style's shape"}),
        ["a place added to the prompt:"],
        table(records, {"text_subject": "subject", "text_style": "style", "text": "place"}),
        dial(records),
        pace(records),
        ["both right, by pair:"],
        by_pair(records),
    ]
    return "\n\n".join("\n".join(part) for part in parts if part)


def table(records: Sequence[Record], columns: dict[str, str]) -> list[str]:
    """Rows of Markdown: mean over the pairs for each seed, then mean over seeds ± their standard deviation."""
    lines = ["| method | " + " | ".join(columns.values()) + " |", "|---" * (len(columns) + 1) + "|"]
    methods = list(dict.fromkeys(r["method"] for r in records))
    for method in sorted(methods, key=lambda m: LAST.index(m) if m in LAST else -1):
        found = {c: _by_seed(records, method, lambda r, c=c: r.get(c)) for c in columns}
        if any(found.values()):
            few = len(columns) < 4
            cells = [_cell(seeds, few or c in SPREAD, 3 if c == "moved" else 2) for c, seeds in found.items()]
            lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return lines


def _by_seed(records: Sequence[Record], method: str, value: Callable[[Record], float | None]) -> list[float]:
    groups: dict[int, list[float]] = {}
    for r in records:
        if r["method"] == method and (found := value(r)) is not None:
            groups.setdefault(r["seed"], []).append(found)
    return [statistics.mean(values) for _, values in sorted(groups.items())]


def _cell(seeds: list[float], spread: bool = True, digits: int = 2) -> str:
    if not seeds:
        return ""
    around = f" ± {statistics.stdev(seeds):.{digits}f}" if spread and len(seeds) > 1 else ""
    return f"{statistics.mean(seeds):.{digits}f}{around}"


def pair_means(records: Sequence[Record], method: str, column: str) -> dict[str, float]:
    """Each pair's mean over its seeds."""
    groups: dict[str, list[float]] = {}
    for r in records:
        if r["method"] == method and column in r:
            groups.setdefault(r["pair"], []).append(r[column])
    return {pair: statistics.mean(values) for pair, values in groups.items()}


def comparison(records: Sequence[Record], other: str) -> list[str]:
    """The default against another method: mean difference, and in how many pairs it is better, equal, worse."""
    lines = [f"default against {other}:"]
    for column, sign in (("both", 1), ("distance", -1), ("subject", 1), ("style", 1)):
        mine, theirs = pair_means(records, "default", column), pair_means(records, other, column)
        pairs = [p for p in mine if p in theirs]
        if not pairs:
            return []
        gains = [sign * (mine[p] - theirs[p]) for p in pairs]
        better, worse = sum(g > 0 for g in gains), sum(g < 0 for g in gains)
        line = f"  {column}: {sign * statistics.mean(gains):+.3f}, "
        line += f"better in {better}, equal in {len(pairs) - better - worse}, worse in {worse} of {len(pairs)} pairs"
        if column == "both":
            full = sum(theirs[p] == 1 for p in pairs)
            line += f"; {other} has nothing wrong in {full}, so better in {better} of {len(pairs) - full}"
        lines.append(line)
    return lines


def by_pair(records: Sequence[Record]) -> list[str]:
    """Each pair's share of pictures right in both, mean over the seeds."""
    methods = [m for m in dict.fromkeys(r["method"] for r in records) if m not in (CEILING, "base model")]
    found = {m: pair_means(records, m, "both") for m in methods}
    lines = ["| pair | " + " | ".join(methods) + " |", "|---" * (len(methods) + 1) + "|"]
    for pair in sorted({r["pair"] for r in records}):
        lines.append(
            f"| {pair} | " + " | ".join(f"{found[m][pair]:.2f}" if pair in found[m] else "" for m in methods) + " |"
        )
    return lines


def dial(records: Sequence[Record]) -> list[str]:
    """Subject and style as the style dial turns (Fig. 7a of the paper); 1 is the default itself."""
    if not any("dial" in r for r in records):
        return []
    lines = ["| style strength | subject | style |", "|---|---|---|"]
    for strength in (*DIAL, 1.0):
        cells = []
        for key in ("subject", "style"):

            def value(r: Record, strength: float = strength, key: str = key) -> float | None:
                return r[key] if strength == 1.0 else r.get("dial", {}).get(str(strength), {}).get(key)

            cells.append(_cell(_by_seed(records, "default", value)))
        lines.append(f"| {strength} | " + " | ".join(cells) + " |")
    return lines


def pace(records: Sequence[Record]) -> list[str]:
    """A layer-wise start with few steps against the paper's many: retention, pictures and time."""
    runs: dict[tuple, dict[str, Record]] = {}
    for r in records:
        runs.setdefault((r["pair"], r["seed"]), {})[r["method"]] = r
    few, many = "start and 25 steps", "100 steps from ones"
    both = [(found[few], found[many]) for found in runs.values() if {few, many} <= found.keys()]
    if not both:
        return []
    ratios = [sum(a["reference_loss"].values()) / sum(b["reference_loss"].values()) for a, b in both]
    times = [a["seconds"] / b["seconds"] for a, b in both]
    differences = {k: statistics.mean(a[k] - b[k] for a, b in both) for k in ("both", "distance")}
    return [
        f"{few} against {many}: retention loss {statistics.mean(ratios):.2f} of it, at or below it in "
        f"{sum(r <= 1 for r in ratios)} of {len(ratios)} runs; time {statistics.mean(times):.2f}; "
        + ", ".join(f"{k} {v:+.3f}" for k, v in differences.items())
    ]


# --- the contact sheet ---------------------------------------------------------------------------------------

_SIZE, _GAP, _LABEL, _HEAD = 64, 4, 170, 30
_SMALLEST = ImageFont.load_default(8)
_SHOWN = (CEILING, "content LoRA", "style LoRA", "direct 1/1", "NP-LoRA", "100 steps from ones", "default")


def kept_folder(results: Path) -> Path:
    """Where a run keeps its first pictures."""
    return results.with_suffix(".pictures")


def picture_file(folder: Path, pair: str, seed: int, method: str) -> Path:
    return folder / f"{pair}.{seed}.{method.replace('/', ' ')}.png"


def _font(text: str, width: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """As large as lets a text of one line stand in so many pixels, at most 16."""
    return next((f for f in map(ImageFont.load_default, range(16, 8, -1)) if f.getlength(text) <= width), _SMALLEST)


def sheet(results: Path, to: Path, methods: Sequence[str] = (), pairs: Sequence[str] = ()) -> None:
    """Write one row for each pair, of the first seed whose pictures were kept; one column for each method of note.

    methods, pairs: which, and in which order; empty for the methods of note and for every pair.
    """
    columns = methods or _SHOWN
    folder = kept_folder(results)
    files = {}
    for pair, seed in sorted({(r["pair"], r["seed"]) for r in read_records(results)}):
        found = [picture_file(folder, pair, seed, m) for m in columns]
        if pair not in files and all(f.exists() for f in found):
            files[pair] = found
    files = {pair: files[pair] for pair in pairs or files if pair in files}
    if not files:
        raise FileNotFoundError(
            f"{folder} holds no pair with pictures of {', '.join(columns)}: git does not keep them; measure into a new "
            "file of --results first"
        )
    with Image.open(next(iter(files.values()))[0]) as first:
        across = first.width // first.height
    step = across * _SIZE + 3 * _GAP
    image = Image.new("RGB", (_LABEL + len(columns) * step, _HEAD + len(files) * (_SIZE + _GAP)), "white")
    draw = ImageDraw.Draw(image)
    for column, method in enumerate(columns):
        draw.text((_LABEL + column * step, 6), method, fill="black", font=_font(method, step - 3 * _GAP))
    for row, (pair, found) in enumerate(files.items()):
        top = _HEAD + row * (_SIZE + _GAP)
        said = pair.replace("+", " + ")
        draw.text((6, top + _SIZE // 2 - 8), said, fill="black", font=_font(said, _LABEL - 3 * _GAP))
        for column, file in enumerate(found):
            strip = Image.open(file).convert("RGB")
            strip = strip.resize((across * _SIZE, _SIZE), Image.Resampling.LANCZOS)
            image.paste(strip, (_LABEL + column * step, top))
    image.save(to, quality=75)
