"""README, docs and CONTRIBUTING: what they link to, name and tell people to run is there."""

from __future__ import annotations

import re
import statistics
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

import dev
from benchmarks import bystanders, intervals, one_picture
from benchmarks.quality_table import read_records
from devhost.base import NODES

ROOT = Path(__file__).resolve().parent.parent.parent
README, CONTRIBUTING = ROOT / "README.md", ROOT / "CONTRIBUTING.md"
PAPERS = [
    README,
    CONTRIBUTING,
    ROOT / "CHANGELOG.md",
    ROOT / "demo" / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
BLOCKS = ("confirm", "final")  # of new concepts, whose figures the papers give
NAMES = [paper.relative_to(ROOT).as_posix() for paper in PAPERS]
LARGEST_README = 9 * 1024  # bytes: what somebody reads before the first zip
LINK = re.compile(r"\]\(([^()\s]+)\)")
COMMAND = re.compile(r"python3 dev\.py (\w+)([^`\n]*)")
A_FILE = re.compile(r"(?<![\w./-])(?:[\w.-]+/)+[\w.-]+\.(?:py|md|json|yml|txt)(?![\w/])")
PLACEHOLDERS = re.compile(r"NODE|NAME|LANGUAGE|^FOLDER/|\.dev/|^results/")


def text_of(paper: Path) -> str:
    return paper.read_text(encoding="utf-8")


def prose(paper: Path) -> str:
    """Without blocks of code, whose # is no heading."""
    return re.sub(r"^```.*?^```", "", text_of(paper), flags=re.MULTILINE | re.DOTALL)


def anchors(paper: Path) -> set[str]:
    """What a link may put behind `#`: headings in small letters, without punctuation, with - for spaces."""
    headings = re.findall(r"^#+ (.+)$", prose(paper), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(paper: Path) -> Iterator[str]:
    for target in LINK.findall(prose(paper)):
        if not re.match(r"https?://", target):
            path, _, anchor = target.partition("#")
            file = (paper.parent / path).resolve() if path else paper
            if not file.exists() or (anchor and anchor not in anchors(file)):
                yield target


def commands(paper: Path) -> list[tuple[str, list[str]]]:
    """(command of dev.py, words after it), without the comment behind."""
    return [(name, rest.partition("#")[0].split()) for name, rest in COMMAND.findall(text_of(paper))]


@pytest.mark.parametrize("paper", PAPERS, ids=NAMES)
def test_links_lead_somewhere(paper: Path) -> None:
    assert not list(broken_links(paper))


def test_a_link_to_nowhere_is_seen(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# One heading\n[a](page.md#one-heading) [b](#two) [c](gone.md) [d](https://x.y)\n", encoding="utf-8"
    )
    assert list(broken_links(page)) == ["#two", "gone.md"]


@pytest.mark.parametrize("paper", PAPERS, ids=NAMES)
def test_files_that_are_named_exist(paper: Path) -> None:
    named = {name for name in A_FILE.findall(LINK.sub("]", text_of(paper))) if not PLACEHOLDERS.search(name)}
    places = (ROOT, paper.parent)
    assert not {name for name in named if not any((place / name).exists() for place in places)}


@pytest.mark.parametrize("paper", PAPERS, ids=NAMES)
def test_commands_are_dev_pys_and_options_their_files(paper: Path) -> None:
    for command, words in commands(paper):
        assert callable(getattr(dev, command, None)), f"dev.py has no command {command}"
        options = [word for word in words if word.startswith("--")]
        files = [ROOT / word.partition("::")[0] for word in words if "/" in word and word.endswith(".py")]
        assert all(file.is_file() for file in files), words
        if command == "run" and files:
            known = text_of(files[0])
            assert all(f'"{option}"' in known for option in options), f"{files[0].name}: {options}"


def test_readme_is_short() -> None:
    assert len(README.read_bytes()) <= LARGEST_README


def test_readme_links_every_help_page_and_names_every_graph_and_page() -> None:
    text = text_of(README)
    assert not [node for node in NODES if f"](web/docs/{node}.md)" not in text]
    graphs = sorted(path.stem for path in (ROOT / "workflows").glob("*.json"))
    assert not [graph for graph in graphs if f"`{graph}`" not in text]
    assert not [page.name for page in (ROOT / "docs").glob("*.md") if f"](docs/{page.name})" not in text]


def test_results_in_the_papers_are_what_the_command_prints() -> None:
    """Rows of docs/benchmarks.md without their first cell are the command's; README's are columns of those."""

    def rows(text: str, width: int) -> list[list[str]]:
        lines = (line.replace("−", "-") for line in text.splitlines() if re.match(r"\|.*\| \d\.\d\d \|", line))
        cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
        return [row[1:] for row in cells if len(row) == width]

    kept = {b: intervals.without(read_records(intervals.RESULTS / f"{b}.jsonl"), intervals.WEAK[b]) for b in BLOCKS}
    others = [read_records(intervals.RESULTS / f"{name}.jsonl") for name in ("over_strong", "drawn", "drawn_strong")]
    both = intervals.averaged(dict(zip(("ordinary", "strong"), others[1:], strict=True)))
    tables = [*kept.values(), intervals.pooled(intervals.in_all(kept)), *others, both]
    printed = [row for records in tables for row in rows("\n".join(intervals.table(records, "direct 1/1")), 12)]
    columns = [row[1:5] + row[7:] for row in printed]  # without the number of pairs, colors and structure
    large, small = rows(text_of(ROOT / "docs" / "benchmarks.md"), 9), rows(text_of(README), 5)
    assert len(large) > 20 and not [row for row in large if row not in columns]
    zipped, stacked = (intervals.of_pairs(both, method, "both") for method in ("default", "direct 1/1"))
    means = [statistics.mean(of.values()) for of in (zipped, stacked)]
    gain = intervals.difference(zipped, stacked)
    said = f"zipped {means[0]:.2f}, stacked {means[1]:.2f}, {gain.mean:+.2f} [{gain.low:+.2f}, {gain.high:+.2f}]"
    assert f"Mean of both strengths: {said}." in text_of(README)
    assert len(small) == 6 and not [row for row in small if row not in [[*whole[:3], whole[4]] for whole in large]]


def test_figures_of_systems_that_train_are_those_of_the_results_file() -> None:
    """All rows of docs/benchmarks.md with seconds and memory behind: means, spread over seeds, difference, count."""
    records = read_records(intervals.RESULTS / "trained.jsonl")
    stacked, found = intervals.of_pairs(records, "direct 1/1", "both"), []
    for method in dict.fromkeys(record["method"] for record in records):
        mine = [record for record in records if record["method"] == method]
        means = {c: statistics.mean(r[c] for r in mine) for c in ("subject", "style", "distance", "colors")}
        seeds = [statistics.mean(r["both"] for r in mine if r["seed"] == seed) for seed in (0, 1, 2)]
        both = f"{statistics.mean(seeds):.2f} ± {statistics.stdev(seeds):.2f}"
        gain = intervals.difference(intervals.of_pairs(records, method, "both"), stacked)
        less = [f"{gain.mean:+.2f} [{gain.low:+.2f}, {gain.high:+.2f}]", f"{gain.better}/{gain.equal}/{gain.worse}"]
        cells = [f"{means['subject']:.2f}", f"{means['style']:.2f}", both]
        cells += [f"{means['distance']:.1f}", f"{means['colors']:.1f}"]
        found.append([*cells, *(less if method != "direct 1/1" else ["", ""])])
    lines = text_of(ROOT / "docs" / "benchmarks.md").replace("−", "-").splitlines()
    shown = [[cell.strip() for cell in line.split("|")[2:9]] for line in lines if line.count("|") == 12]
    shown = [row for row in shown if re.match(r"\d", row[0])]
    assert len(shown) == len(found) - 1 and all(row in found for row in shown)  # true renderings have no row


def test_unzips_table_is_what_the_command_prints() -> None:
    printed = [line.split("|")[2:5] for line in one_picture.table(one_picture.RESULTS).splitlines()[2:]]
    shown = [line for line in text_of(ROOT / "docs" / "training.md").splitlines() if re.match(r"\|.*± \d.*, \d", line)]
    assert len(shown) == len(printed) and all(line.split("|")[2:5] in printed for line in shown)


def test_figures_of_many_loras_are_what_the_command_prints() -> None:
    """All rows of docs/benchmarks.md, and the front page's three figures of three LoRAs."""
    records = [r for r in bystanders.read(bystanders.RESULTS) if r["set"].split()[0] in BLOCKS]
    printed = bystanders.table(records)
    shown = [line for line in text_of(ROOT / "docs" / "benchmarks.md").splitlines() if re.match(r"\| [235] \| ", line)]
    assert shown == printed[2:] and len(shown) > 10
    right = {row[1]: row[6] for row in (line.strip("| ").split(" | ") for line in printed) if row[0] == "3"}
    kinds = (right["default"], right["stack at 1"], right["stack at 2/n"])
    assert "right in {}, stacked in {}, stacked at 2/3 in {}".format(*kinds) in text_of(README)


def test_the_map_has_every_folder() -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True).stdout.split()
    folders = {name.partition("/")[0] for name in tracked if "/" in name and not name.startswith(".")}
    assert not {folder for folder in folders if f"`{folder}/" not in text_of(CONTRIBUTING)}


def test_hosted_runs_are_the_readmes_commands() -> None:
    """Lint besides; nothing that a person would not be told to run."""
    hosted = re.findall(r"run: python3 dev\.py (\w+)$", text_of(ROOT / ".github/workflows/test.yml"), re.MULTILINE)
    block = re.search(r"^```\n(python3 dev\.py .*?)^```", text_of(README), re.MULTILINE | re.DOTALL)
    assert block is not None
    assert hosted == ["lint", *re.findall(r"^python3 dev\.py (\w+)", block[1], re.MULTILINE)]
