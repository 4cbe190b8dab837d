"""Which model families can be zipped on the host that runs: the tests of each, as the table of docs/families.md.

    python3 dev.py run benchmarks/families.py            # pytest's options narrow it down
    python3 dev.py run benchmarks/families.py --table    # the table alone, of what was found before

What other hosts gave stays in results/families.json, and so do the cells that a narrower run leaves out.
"""

from __future__ import annotations

import json
import re
import sys
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
RESULTS, PAGE = ROOT / "benchmarks" / "results" / "families.json", ROOT / "docs" / "families.md"
TESTS = {  # of tests/inhost/test_families.py, by what each shows
    "test_update_is_the_stock_loaders_and_export_is_too": "update and export",
    "test_names_of_its_trainers_are_read_as_the_stock_loader_reads_them": "trainers' names",
    "test_gradient_is_that_of_autograd_over_copied_weights": "gradient",
    "test_references_are_drawn_in_its_own_latents": "references",
    "test_memory_is_estimated_as_it_is": "memory",
    "test_optimising_lowers_the_losses_and_leaves_the_model": "zip",
}
COLUMNS = list(TESTS.values())


class Outcomes:
    """pytest's plugin: family -> column -> whether all its tests passed."""

    def __init__(self) -> None:
        self.found: defaultdict[str, dict[str, bool]] = defaultdict(dict)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        named = re.search(r"::(\w+)\[(.+)\]$", report.nodeid)
        if named is None or named[1] not in TESTS or report.skipped:
            return
        family, column = re.sub(r"-(True|False)$", "", named[2]), TESTS[named[1]]
        self.found[family][column] = self.found[family].get(column, True) and report.passed


def table(results: dict[str, dict[str, dict[str, bool]]]) -> str:
    """Family × (column, host): the hosts on which it holds."""
    families = list(dict.fromkeys(family for host in results.values() for family in host))
    lines = [f"| Family | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 1) + "|"]
    for family in families:
        cells = []
        for column in COLUMNS:
            holds = {host: found[family][column] for host, found in results.items() if column in found.get(family, ())}
            cells.append(", ".join(f"{host}{'' if ok else ' **no**'}" for host, ok in holds.items()))
        lines.append(f"| {family} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(options: list[str]) -> int:
    status, outcomes = 0, Outcomes()
    if options != ["--table"]:
        tests = [str(ROOT / "tests" / "inhost" / "test_families.py"), "-q", "-p", "no:cacheprovider"]
        status = int(pytest.main([*tests, "-k", " or ".join(TESTS), *options], plugins=[outcomes]))
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    if outcomes.found:
        import comfyui_version

        before = results.setdefault(comfyui_version.__version__, {})
        for family, found in outcomes.found.items():
            before[family] = {**before.get(family, {}), **found}
        RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    page = PAGE.read_text(encoding="utf-8")
    start, end = page.index("| Family |"), page.index("\n\n", page.index("| Family |"))
    PAGE.write_text(page[:start] + table(results) + page[end:], encoding="utf-8")
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
