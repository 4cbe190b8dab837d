"""The gallery of merges, made from a results file and its kept pictures, opened from the disk."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image

from benchmarks import gallery
from benchmarks.quality_table import CEILING, kept_folder, picture_file
from demo.manifest import read_manifest

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

WORLD = read_manifest()
PAIRS = [f"{subject.name}+{style.name}" for subject, style in WORLD.pairs()[:3]]
BOTH = {"direct 1/1": (0.5, 0.25, 0.75), "default": (0.5, 1.0, 0.25)}  # by pair


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three pairs, two methods and the truth; the last method of the last pair has no pictures."""
    path = tmp_path_factory.mktemp("results") / "mine.jsonl"
    kept_folder(path).mkdir()
    lines = []
    for number, pair in enumerate(PAIRS):
        for method in (*BOTH, CEILING):
            both = 1.0 if method == CEILING else BOTH[method][number]
            lines.append({"pair": pair, "seed": 0, "method": method, "subject": both, "style": 1.0, "both": both})
            if (number, method) != (2, "default"):
                strip = np.full((8, 24, 3), 40 * number + len(method), np.uint8)
                Image.fromarray(strip).save(picture_file(kept_folder(path), pair, 0, method))
    path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def folder(results: Path) -> Path:
    rows, made = gallery.read(results), results.with_suffix(".gallery")
    gallery.write(rows, WORLD, made)
    gallery.write_blind(rows, WORLD, made, list(BOTH))
    return made


@pytest.fixture
def page(browser: Browser, folder: Path) -> Iterator[Page]:
    """A script error or a request to anywhere else fails the test."""
    context, errors = browser.new_context(viewport={"width": 1400, "height": 900}), []
    opened = context.new_page()
    opened.on("pageerror", lambda error: errors.append(str(error)))
    opened.on("requestfailed", lambda asked: errors.append(asked.url))
    opened.on("request", lambda asked: errors.append(asked.url) if not asked.url.startswith("file:") else None)
    opened.goto((folder / "index.html").as_uri())
    yield opened
    context.close()
    assert not errors


def shown(page: Page) -> list[str]:
    found: list[str] = page.locator("#body tr strong").all_text_contents()
    return [name.replace(" + ", "+") for name in found]


def test_rows_come_first_where_two_methods_differ_most(page: Page) -> None:
    assert shown(page) == [PAIRS[1], PAIRS[0], PAIRS[2]], ".75 and 0 apart; of the last one only one is there"
    page.select_option("#order", "the second one better, first")
    assert shown(page)[-1] == PAIRS[1]
    page.select_option("#order", "as measured")
    assert shown(page) == PAIRS


def test_each_cell_shows_its_own_picture_and_figures(page: Page, results: Path) -> None:
    page.select_option("#order", "as measured")
    for number, pair in enumerate(PAIRS[:2]):
        cells = page.locator("#body tr").nth(number).locator("td")
        assert WORLD.trained()[pair.split("+")[0]].identifier in cells.nth(0).inner_text()
        for place, method in enumerate(BOTH):
            assert f"both {BOTH[method][number]:.2f}" in cells.nth(2 + place).inner_text()
            drawn = cells.nth(2 + place).locator("img").get_attribute("src")
            made = np.asarray(Image.open(results.with_suffix(".gallery") / str(drawn)))
            assert (made == 40 * number + len(method)).all()
    every: list[int] = page.locator("img").evaluate_all("images => images.map(image => image.naturalWidth)")
    assert len(every) == 3 * 2 + 3 + 5 and all(every)


def test_methods_and_words_narrow_it(page: Page) -> None:
    page.get_by_label("direct 1/1").last.uncheck()
    assert page.locator("#head th").all_text_contents() == ["subject and style", "truth", "default"]
    page.fill("#find", PAIRS[2].replace("+", " "))
    assert shown(page) == [PAIRS[2]]


def test_the_blind_page_asks_what_has_every_method(folder: Path) -> None:
    text = (folder / "blind.html").read_text(encoding="utf-8")
    from devhost.studies import key

    said: dict[str, Any] = key(text)
    assert said["methods"] == list(BOTH) and len(said["questions"]) == 2
    assert "direct 1/1" not in text, "nobody reads a name by accident"


def test_results_without_pictures_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "bare.jsonl"
    path.write_text(json.dumps({"pair": PAIRS[0], "seed": 0, "method": "default"}), encoding="utf-8")
    with pytest.raises(FileNotFoundError, match="git does not keep them"):
        gallery.read(path)
