"""The page of a user study, opened as a file: votes by keyboard, what it shows of them, and what it does not."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from benchmarks.intervals import bootstrap
from devhost.studies import METHODS, key, table
from ziplora_batch import study

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

PAIRS = 5  # subjects, each in two styles
Z, S, K = METHODS
VOTES = (Z, S, Z, None, K, Z, S, K, Z, S)  # by row


@pytest.fixture
def opened(browser: Browser, tmp_path: Path) -> Iterator[Callable[..., tuple[Page, dict[str, Any]]]]:
    """A page of a study and its key. A script error on it fails the test, and so does a request to anywhere."""
    context = browser.new_context(viewport={"width": 1400, "height": 900}, accept_downloads=True)
    errors: list[str] = []

    def show(seed: int = 3, against: str | None = None, **changed: Any) -> tuple[Page, dict[str, Any]]:
        rows = study.read_table(table(tmp_path, PAIRS, **changed))
        text = study.page(rows, "Study", seed, against, study.QUESTION, 32)
        path = tmp_path / f"study {seed}.html"
        path.write_text(text, encoding="utf-8")
        page = context.new_page()
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda said: errors.append(said.text) if said.type == "error" else None)
        page.on(
            "request", lambda asked: errors.append(asked.url) if not asked.url.startswith(("file:", "data:")) else None
        )
        page.goto(path.as_uri())
        return page, key(text)

    yield show
    context.close()
    assert not errors


def rows_of(page: Page, name: str) -> list[list[str]]:
    found: list[list[str]] = page.locator(f"#{name} tbody tr").evaluate_all(
        "rows => rows.map(row => [...row.cells].map(cell => cell.textContent))"
    )
    return found


def answer(page: Page, said: dict[str, Any], choose: Callable[[dict[str, Any]], str | None]) -> list[dict[str, Any]]:
    """Vote on every question by keyboard; what was chosen, as names."""
    given = []
    for one in said["questions"]:
        shown = [said["methods"][method] for method, _ in one["shown"]]
        chosen = choose({**one, "shown": shown})
        page.keyboard.press("Space" if chosen is None else f"{shown.index(chosen) + 1}")
        given.append({**one, "shown": shown, "chosen": chosen})
    return given


def wilson(wins: int, count: int) -> list[float]:
    """Where the distance of the share is 1.96 standard errors of the interval's own end: roots of a parabola."""
    z = 1.959963984540054
    return sorted(np.roots([1 + z**2 / count, -2 * wins / count - z**2 / count, (wins / count) ** 2]).real)


def shares(text: str) -> list[float]:
    return [float(part.removesuffix(" %")) / 100 for part in text.split(" to ")]


def test_votes_are_counted_with_their_intervals(opened: Callable, kept: Callable, tmp_path: Path) -> None:
    page, said = opened()
    given = answer(page, said, lambda one: VOTES[one["row"] - 1])
    assert page.locator("#where").inner_text() == f"{len(given)} of {len(given)}"
    page.keyboard.press("Enter")
    for method, shown, chosen, share, by_votes, drawn_again in rows_of(page, "preferred"):
        won = [one["chosen"] == method for one in given]
        assert (shown, chosen) == (f"{len(given)}", f"{sum(won)}")
        assert shares(share) == pytest.approx([sum(won) / len(won)], abs=6e-4)
        assert shares(by_votes) == pytest.approx(wilson(sum(won), len(won)), abs=6e-4)
        values = {(one["subject"], one["style"]): float(one["chosen"] == method) for one in given}
        assert shares(drawn_again) == pytest.approx(bootstrap(values), abs=0.03)
    duels = {row[0]: row[1:] for row in rows_of(page, "duels")}
    assert len(duels) == 3
    for at, one in enumerate(METHODS):
        for other in METHODS[at + 1 :]:
            wins, losses = (sum(of["chosen"] == name for of in given) for name in (one, other))
            votes, share, by_votes, _ = duels[f"{one} : {other}"]
            assert votes == f"{wins} : {losses}" and wins and losses
            assert shares(share) == pytest.approx([wins / (wins + losses)], abs=6e-4)
            assert shares(by_votes) == pytest.approx(wilson(wins, wins + losses), abs=6e-4)
    pairs = {tuple(row[:2]): row[2:] for row in rows_of(page, "pairs")}
    for one in given:
        assert pairs[one["subject"], one["style"]] == [f"{one['chosen'] == m:d}" for m in (*METHODS, None)]
    page.screenshot(path=tmp_path / "results.png", full_page=True)
    kept(tmp_path / "results.png", "study_results", ".dev/reports/screens/study_results.jpg", 1400)


def test_no_method_is_named_before_the_votes_are_final(opened: Callable, kept: Callable, tmp_path: Path) -> None:
    page, said = opened()
    page.screenshot(path=tmp_path / "vote.png")
    kept(tmp_path / "vote.png", "study_vote", ".dev/reports/screens/study_vote.jpg", 1400)
    shown = page.locator(".shown img").evaluate_all("images => images.map(image => [image.naturalWidth, image.alt])")
    assert shown == [[32, "1"], [32, "2"], [32, "3"]]
    assert page.locator(".references img").count() == 2
    for _ in said["questions"]:
        assert not [name for name in METHODS if name in page.content()]
        page.keyboard.press("1")
    page.keyboard.press("2")  # there is no question left
    assert not [name for name in METHODS if name in page.content()]
    page.keyboard.press("Backspace")
    assert page.locator(".shown figure").count() == 3
    page.keyboard.press("3")
    page.keyboard.press("Enter")
    assert all(name in page.locator("#preferred").inner_text() for name in METHODS)
    last = said["questions"][-1]["shown"][2][0]
    before = rows_of(page, "preferred")
    assert int(before[last][2]) >= 1
    for pressed in ("Backspace", "1", "Escape", "Space"):
        page.keyboard.press(pressed)
    assert rows_of(page, "preferred") == before, "votes are final"


def test_keys_that_mean_nothing_do_nothing(opened: Callable) -> None:
    page, _ = opened()
    for pressed in ("4", "0", "a", "Enter", "Backspace", "Control+1", "Alt+2"):
        page.keyboard.press(pressed)
    page.keyboard.down("2")
    page.keyboard.down("2")  # held
    page.keyboard.up("2")
    assert page.locator("#where").inner_text() == "1 of 10"
    page.locator(".shown figure").nth(1).click()
    page.get_by_role("button", name="none of them").click()
    assert page.locator("#where").inner_text() == "3 of 10"
    page.keyboard.press("Space")
    page.get_by_role("button", name="one back").click()
    assert page.locator("#where").inner_text() == "3 of 10"


def test_votes_are_there_again_after_the_page_was_closed(opened: Callable) -> None:
    page, said = opened()
    for pressed in ("1", "Space", "3"):
        page.keyboard.press(pressed)
    page.close()
    page, _ = opened()
    assert page.locator("#where").inner_text() == "3 of 10"
    page.keyboard.press("Escape")
    page.keyboard.press("Enter")
    page.reload()
    chosen = [said["questions"][at]["shown"][place][0] for at, place in ((0, 0), (2, 2))]
    found = {row[0]: int(row[2]) for row in rows_of(page, "preferred")}
    assert found == {method: chosen.count(at) for at, method in enumerate(METHODS)}
    other, _ = opened(seed=4)
    assert other.locator("#where").inner_text() == "0 of 10", "another voter's page"


def saved(page: Page, kind: str) -> Path:
    with page.expect_download() as waited:
        page.get_by_role("button", name=f"Save my votes ({kind})").click()
    return Path(waited.value.path())


def test_votes_of_several_people_are_counted_together(opened: Callable, tmp_path: Path) -> None:
    first, said = opened()
    given = answer(first, said, lambda one: "zipped")
    first.keyboard.press("Enter")
    file = tmp_path / "first.json"
    file.write_bytes(saved(first, "JSON").read_bytes())
    votes = json.loads(file.read_text(encoding="utf-8"))["votes"]
    assert [(one["question"], one["shown"], one["chosen"]) for one in votes] == [
        (one["question"], one["shown"], "zipped") for one in given
    ]
    second, said = opened(seed=4)
    answer(second, said, lambda one: None)
    second.keyboard.press("Enter")
    for _ in range(2):  # the same file twice is one voter
        second.set_input_files("input[type=file]", file)
        second.wait_for_function("() => document.body.innerText.includes('20 votes of 2 voters, 10 for none')")
    assert rows_of(second, "preferred")[0][:4] == ["zipped", "20", "10", "50.0 %"]
    assert rows_of(second, "preferred")[0][5] == "0.0 % to 100.0 %", "two voters who disagree about everything"
    broken = {"study.json": '{"study": "another"}', "text.json": "no", "null.json": "null"}
    for name, text in broken.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    second.set_input_files("input[type=file]", [tmp_path / name for name in broken])
    second.wait_for_function("() => document.getElementById('refused').textContent")
    refused = second.locator("#refused").inner_text()
    assert all(name in refused for name in broken) and rows_of(second, "preferred")[0][1] == "20"


def test_texts_are_shown_as_they_are(opened: Callable) -> None:
    evil = '=<img src=x onerror="throw \'run\'">"</script>'
    page, said = opened(subject=evil, prompt=evil)
    assert evil in page.locator(".references").inner_text() and page.locator("main img").count() == 5
    answer(page, said, lambda one: None)
    page.keyboard.press("Enter")
    assert rows_of(page, "pairs")[0][0] == evil and page.locator("main img").count() == 0
    rows = list(csv.reader(io.StringIO(saved(page, "CSV").read_text(encoding="utf-8"), newline="")))
    assert rows[1][2] == f"'{evil}" and rows[1][-1] == "" and len(rows) == 11


def test_two_at_a_time_as_in_the_paper(opened: Callable) -> None:
    page, said = opened(against="zipped")
    answer(page, said, lambda one: "zipped" if "stacked" in one["shown"] else "K-LoRA")
    page.keyboard.press("Enter")
    assert [row[:3] for row in rows_of(page, "duels")] == [
        ["zipped : stacked", "10 : 0", "100.0 %"],
        ["zipped : K-LoRA", "0 : 10", "0.0 %"],
    ]
    assert [shares(row[3]) for row in rows_of(page, "duels")] == [
        pytest.approx(wilson(won, 10), abs=6e-4) for won in (10, 0)
    ]
    assert [row[4] for row in rows_of(page, "duels")] == ["100.0 % to 100.0 %", "0.0 % to 0.0 %"]
