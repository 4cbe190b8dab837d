"""Paired differences between two methods over subjects x styles, with intervals that know what pairs share.

    python3 dev.py run benchmarks/intervals.py choose confirm                  what results/ holds of new concepts
    python3 dev.py run benchmarks/intervals.py confirm --against "direct .8/.8" --strong
    python3 dev.py run benchmarks/intervals.py confirm final --strong --together
    python3 dev.py run benchmarks/intervals.py drawn drawn_strong --mean
    python3 dev.py run benchmarks/intervals.py drawn_strong --beside drawn --against "direct 1/1 (drawn)"

Pairs that share a LoRA are not independent: what is drawn again is the subjects and the styles, not the pairs.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).resolve().parent.parent))  # last: `nodes` there would hide ComfyUI's module

from benchmarks import new_concepts
from benchmarks.quality_table import Record, pair_means, read_records

Pair = tuple[str, str]  # subject, style
ROUNDS = 10_000


@dataclass(frozen=True)
class Difference:
    """Mean over the pairs, its 95 % interval, pairs better, equal and worse, and the sign test's two-sided p."""

    mean: float
    low: float
    high: float
    better: int
    equal: int
    worse: int
    p: float

    def __str__(self) -> str:
        pairs = self.better + self.equal + self.worse
        return (
            f"{self.mean:+.3f} [{self.low:+.3f}, {self.high:+.3f}], better in {self.better}, equal in {self.equal}, "
            f"worse in {self.worse} of {pairs} pairs, sign test p {self.p:.2g}"
        )


def bootstrap(values: Mapping[Pair, float], rounds: int = ROUNDS, seed: int = 0) -> tuple[float, float]:
    """95 % interval of the mean of paired differences: subjects and styles drawn again, each with replacement.

    The two-way cluster bootstrap for crossed random factors (Owen, "The pigeonhole bootstrap", 2007), which is a
    little wider than exact. A pair counts as often as its subject times as often as its style was drawn.
    """
    subjects, styles = (sorted({pair[i] for pair in values}) for i in (0, 1))
    table, there = torch.zeros(2, len(subjects), len(styles), dtype=torch.float64)
    for (subject, style), value in values.items():
        at = subjects.index(subject), styles.index(style)
        table[at], there[at] = value, 1.0
    generator = torch.Generator().manual_seed(seed)

    def drawn(count: int) -> torch.Tensor:
        picks = torch.randint(count, (rounds, count), generator=generator)
        return torch.zeros(rounds, count, dtype=torch.float64).scatter_add_(1, picks, torch.ones_like(picks).double())

    rows, columns = drawn(len(subjects)), drawn(len(styles))
    weight = torch.einsum("rs,st,rt->r", rows, there, columns)
    total = torch.einsum("rs,st,rt->r", rows, table * there, columns)
    means = (total / weight)[weight > 0]
    low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def sign_test(better: int, worse: int) -> float:
    """Two-sided p of as uneven a split, were both as likely. Treats pairs as independent: a guide, not a proof."""
    count = better + worse
    if not count:
        return 1.0
    tail = sum(math.comb(count, k) for k in range(min(better, worse) + 1)) / 2**count
    return min(1.0, 2 * tail)


def difference(mine: Mapping[Pair, float], theirs: Mapping[Pair, float], sign: int = 1) -> Difference:
    """Mine less theirs over the pairs that both have; sign -1 where less is better (then better counts less).

    Raises ValueError where no pair is in both.
    """
    values = {pair: mine[pair] - theirs[pair] for pair in mine if pair in theirs}
    if not values:
        raise ValueError("no pair was measured with both methods")
    low, high = bootstrap(values)
    better, worse = (sum(s * v > 1e-9 for v in values.values()) for s in (sign, -sign))
    equal = len(values) - better - worse
    return Difference(statistics.mean(values.values()), low, high, better, equal, worse, sign_test(better, worse))


def components(values: Mapping[Pair, float]) -> dict[str, float]:
    """Variance of differences over a full table, parted into subject, style and what is left (method of moments)."""
    subjects, styles = (sorted({pair[i] for pair in values}) for i in (0, 1))
    table = torch.tensor([[values[s, t] for t in styles] for s in subjects], dtype=torch.float64)
    n, m = table.shape
    whole, rows, columns = table.mean(), table.mean(1), table.mean(0)
    left = float((table - rows[:, None] - columns + whole).square().sum() / ((n - 1) * (m - 1)))
    by_subject = max(0.0, (float(rows.var()) * m - left) / m)
    by_style = max(0.0, (float(columns.var()) * n - left) / n)
    return {"subject": by_subject, "style": by_style, "left": left}


def power(parts: Mapping[str, float], effect: float, subjects: int, styles: int, rounds: int = 20_000) -> float:
    """How often a 95 % interval would be clear of zero, were the true mean difference `effect`. parts: `components`."""
    rng = random.Random(0)
    error = math.sqrt(parts["subject"] / subjects + parts["style"] / styles + parts["left"] / (subjects * styles))
    if error == 0:
        return float(effect != 0)
    return sum(abs(rng.gauss(effect, error)) > 1.96 * error for _ in range(rounds)) / rounds


# --- the table -----------------------------------------------------------------------------------------------

RESULTS = Path(__file__).resolve().parent / "results"
COLUMNS = {"subject": 1, "style": 1, "both": 1, "distance": -1, "colors": -1, "structure": -1}  # -1: less is better
COMPARED = ("both", "distance", "colors")
WEAK = {  # LoRAs of the first world, whose figures RESULTS keeps, that fail the demo's gates
    "choose": {"kelp", "agate", "garnet", "indigo"},
    "confirm": {"iris", "coral", "dolerite", "flint", "indigo", "kyanite", "lapis"},
    "final": {"hazel", "agate", "coral", "dolerite", "flint", "garnet", "halite", "indigo", "jasper", "kyanite"},
}


def of_pairs(records: Sequence[Record], method: str, column: str) -> dict[Pair, float]:
    """Each pair's mean over its seeds, by (subject, style)."""
    found = pair_means(records, method, column)
    return {(pair.split("+")[0], pair.split("+")[1]): value for pair, value in found.items()}


def table(records: Sequence[Record], against: str, methods: Sequence[str] = ()) -> list[str]:
    """A row for each method: means over the pairs that `against` was measured on too, and differences to it."""
    names = methods or list(dict.fromkeys(r["method"] for r in records))
    head = ["method", "pairs", *COLUMNS, *(f"{column}, less {against}'s" for column in COMPARED), "better/equal/worse"]
    rows = []
    for name in names:
        mine = {c: of_pairs(records, name, c) for c in COLUMNS}
        theirs = {c: of_pairs(records, against, c) for c in COLUMNS}
        pairs = [pair for pair in mine["both"] if pair in theirs["both"]]
        if not pairs:
            continue
        cells = [name, str(len(pairs))]
        for column in COLUMNS:
            mean = statistics.mean(mine[column][pair] for pair in pairs)
            cells.append(f"{mean:.1f}" if column in ("distance", "colors") else f"{mean:.2f}")
        found = {c: difference(mine[c], theirs[c], COLUMNS[c]) for c in COMPARED}
        if name == against:
            cells += [""] * (len(COMPARED) + 1)
        else:
            for column, said in found.items():
                digits = 2 if column == "both" else 1
                cells.append(f"{said.mean:+.{digits}f} [{said.low:+.{digits}f}, {said.high:+.{digits}f}]")
            cells.append(f"{found['both'].better}/{found['both'].equal}/{found['both'].worse}")
        rows.append((statistics.mean(mine["both"][pair] for pair in pairs), cells))
    rows.sort(key=lambda row: -row[0])
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    return lines + ["| " + " | ".join(cells) + " |" for _, cells in rows]


def best(records: Sequence[Record], methods: Sequence[str] = ()) -> tuple[int, float]:
    """Of how many methods, and how often both are right where each pair has its best one by the truth, which no user
    has. Over the pairs that all of them were measured on."""
    names = methods or list(dict.fromkeys(r["method"] for r in records))
    found = [of_pairs(records, name, "both") for name in names]
    most = max(len(by_pair) for by_pair in found)
    whole = [by_pair for by_pair in found if len(by_pair) == most]
    pairs = set.intersection(*(set(by_pair) for by_pair in whole))
    return len(whole), statistics.mean(max(by_pair[pair] for by_pair in whole) for pair in pairs)


def without(records: Sequence[Record], names: Collection[str]) -> list[Record]:
    """Records of pairs that hold none of these LoRAs."""
    return [r for r in records if not set(r["pair"].split("+")) & set(names)]


def weak(results: Path) -> set[str]:
    """LoRAs of a results file's block that fail the demo's gates. Raises FileNotFoundError where the block is not
    trained here, KeyError where nothing is known of it."""
    if results.resolve().parent == RESULTS:
        return WEAK[results.stem]
    text = (new_concepts.FOLDER / results.stem / "world.json").read_text(encoding="utf-8")
    return {name for name, entry in json.loads(text)["loras"].items() if entry["weak"]}


def in_all(blocks: Mapping[str, Sequence[Record]]) -> dict[str, list[Record]]:
    """The same of those methods alone that every block has."""
    everywhere = set.intersection(*({r["method"] for r in records} for records in blocks.values()))
    return {block: [r for r in records if r["method"] in everywhere] for block, records in blocks.items()}


def pooled(blocks: Mapping[str, Sequence[Record]]) -> list[Record]:
    """Records of several blocks as one table, in which each block's subjects and styles are its own."""
    return [
        {**record, "pair": "+".join(f"{block} {name}" for name in record["pair"].split("+"))}
        for block, records in blocks.items()
        for record in records
    ]


def averaged(blocks: Mapping[str, Sequence[Record]]) -> list[Record]:
    """Records of several files of the same pairs, of the methods and pairs that all have, as one file's: each pair's
    mean is over all of them, each counting as much as it has seeds."""
    pairs = set.intersection(*({r["pair"] for r in records} for records in blocks.values()))
    return [r for records in in_all(blocks).values() for r in records if r["pair"] in pairs]


def _file(name: str) -> Path:
    return Path(name) if name.endswith(".jsonl") else RESULTS / f"{name}.jsonl"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("blocks", nargs="+", help="of new concepts, or results files")
    parser.add_argument("--against", default="direct 1/1")
    parser.add_argument("--methods", nargs="+", default=[])
    parser.add_argument("--beside", metavar="FILE", help="another one, whose methods are named 'METHOD (FILE)'")
    parser.add_argument("--strong", action="store_true", help="only pairs whose LoRAs both pass the demo's gates")
    parser.add_argument("--together", action="store_true", help="one table over all blocks, of methods that all have")
    parser.add_argument("--mean", action="store_true", help="one table of each pair's mean over all files, likewise")
    given = parser.parse_args()
    blocks = {}
    beside = read_records(_file(given.beside)) if given.beside else []
    named = [{**record, "method": f"{record['method']} ({given.beside})"} for record in beside]
    for path in map(_file, given.blocks):
        blocks[path.stem] = read_records(path) + named
        if given.strong:
            blocks[path.stem] = without(blocks[path.stem], weak(path))
    if given.mean:
        blocks = {"mean of " + " and ".join(blocks): averaged(blocks)}
    elif given.together:
        blocks = {" and ".join(blocks): pooled(in_all(blocks))}
    for name, records in blocks.items():
        print(f"{name}: means over pairs; differences with their 95 % interval over subjects and styles")
        print("\n".join(table(records, given.against, given.methods)))
        count, right = best(records, given.methods)
        print(f"the best of {count} methods for each pair, chosen by the truth: both right in {right:.2f}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
