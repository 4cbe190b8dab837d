"""Everything that docs/benchmarks.md says of unseen concepts, from the seeds: LoRAs, judges, merges, tables.

    python3 dev.py run benchmarks/unseen.py                    some five hours on two cores; goes on where it stopped
    python3 dev.py run benchmarks/unseen.py --results-in DIR --blocks final

What the repository keeps in benchmarks/results/ is not touched: figures go into a folder of their own.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))  # last: `nodes` there would hide ComfyUI's module

from benchmarks import new_concepts
from devhost.install import DEV

HERE = Path(__file__).resolve().parent
METHODS = ("direct 1/1", "direct .8/.8", "old default", "shared columns", "default", "LoRA-Optimizer")
OVER_STRONG = ("direct 1/1", "shared columns", "default")


def run(script: str, *words: str) -> None:
    """One of the benchmarks, in a process of its own. Raises CalledProcessError where it fails."""
    subprocess.run([sys.executable, str(HERE / script), *words], check=True)


def strong_pairs(block: str) -> list[str]:
    """Every pair of a block's LoRAs that hold alone."""
    subjects, styles = new_concepts.strong(block)
    return [f"{subject}+{style}" for subject in subjects for style in styles]


def measure(block: str, pairs: Sequence[str], results: Path, methods: Sequence[str], *words: str) -> None:
    run(
        "quality.py",
        *("--block", block, "--seeds", "0", "--pictures", "8", "--candidates", "--rivals", "--pairs", *pairs),
        *("--methods", *methods, "--results", str(results), *words),
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", nargs="+", choices=new_concepts.BLOCKS, default=["confirm", "final"])
    parser.add_argument("--results-in", type=Path, default=DEV / "unseen", help="a folder for the figures")
    given = parser.parse_args()
    given.results_in.mkdir(parents=True, exist_ok=True)
    run("new_concepts.py", *given.blocks)
    files = {block: given.results_in / f"{block}.jsonl" for block in given.blocks}
    for block, file in files.items():
        measure(block, strong_pairs(block), file, METHODS)
    if "confirm" in files:
        pairs, strong = strong_pairs("confirm")[::2], given.results_in / "over_strong.jsonl"
        measure("confirm", pairs, strong, OVER_STRONG, "--strengths", "1.3", "1.3")
        run("intervals.py", str(strong))
    run("intervals.py", *map(str, files.values()), "--together")
    return 0


if __name__ == "__main__":
    sys.exit(main())
