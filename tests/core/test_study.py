"""The page of a user study: what is read, what is refused, and what the page gives away."""

from __future__ import annotations

import base64
import contextlib
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from devhost.studies import METHODS, draw, key, table
from ziplora_batch import study
from ziplora_batch.__main__ import main
from ziplora_batch.errors import BatchError
from ziplora_batch.jobs import Job
from ziplora_batch.results import DONE, ERROR, Outcome, Picture, Results


def made(rows: list[study.Row], seed: int = 0, against: str | None = None) -> str:
    return study.page(rows, "A <study>", seed, against, study.QUESTION, 32)


def test_a_page_asks_about_every_row_with_every_method_in_random_order(tmp_path: Path) -> None:
    rows = study.read_table(table(tmp_path, 20))
    said = key(made(rows))
    assert sorted(one["row"] for one in said["questions"]) == list(range(1, 41))
    orders = Counter(tuple(said["methods"][method] for method, _ in one["shown"]) for one in said["questions"])
    assert all(sorted(order) == sorted(METHODS) for order in orders) and len(orders) == 6
    assert [one["row"] for one in said["questions"]] != list(range(1, 41))
    for one in said["questions"]:
        row = rows[one["row"] - 1]
        assert (one["subject"], one["style"], one["prompt"]) == (row.subject, row.style, row.prompt)


def test_a_picture_stands_where_the_key_says(tmp_path: Path) -> None:
    rows = study.read_table(table(tmp_path))
    page = made(rows)
    said, files = key(page), re.findall(r'class="picture">([^<]*)</script>', page)
    for one in said["questions"]:
        row = rows[one["row"] - 1]
        meant = [(row.pictures[said["methods"][method]], picture) for method, picture in one["shown"]]
        for path, number in [*meant, *zip(row.references, one["references"], strict=True)]:
            assert path is not None
            with Image.open(path) as original:
                expected = original.convert("RGB").getpixel((3, 3))
            (tmp_path / "one.webp").write_bytes(base64.b64decode(files[number]))
            with Image.open(tmp_path / "one.webp") as kept:
                found = kept.convert("RGB").getpixel((3, 3))
                assert kept.size == (32, 19)
            assert found == pytest.approx(expected, abs=4)


def test_nothing_but_the_coded_key_names_a_method(tmp_path: Path) -> None:
    page = made(study.read_table(table(tmp_path)))
    files = re.findall(r'class="picture">([^<]*)</script>', page)
    assert len(files) == len(set(files)), "each picture once"
    shown = page + "".join(base64.b64decode(file).decode("latin-1") for file in files)
    assert [name for name in (*METHODS, "pairs.csv", "workflow", str(tmp_path)) if name in shown] == []


def test_the_seed_decides_every_order_and_makes_no_other_study(tmp_path: Path) -> None:
    rows = study.read_table(table(tmp_path))
    one, same, other = (key(made(rows, seed)) for seed in (1, 1, 2))
    assert one == same and one["questions"] != other["questions"] and one["study"] == other["study"]
    draw(rows[0].pictures["zipped"], 200)
    assert key(made(rows, 1))["study"] != one["study"]


def test_one_method_against_each_other_two_by_two(tmp_path: Path) -> None:
    rows = study.read_table(table(tmp_path))
    said = key(made(rows, against="stacked"))
    asked = Counter(frozenset(said["methods"][m] for m, _ in one["shown"]) for one in said["questions"])
    assert asked == {frozenset({"stacked", "zipped"}): 8, frozenset({"stacked", "K-LoRA"}): 8}
    assert len({one["question"] for one in said["questions"]}) == 16
    left = Counter(said["methods"][one["shown"][0][0]] for one in said["questions"])
    assert 0 < left["stacked"] < 16
    with pytest.raises(BatchError, match="no method 'zip'; there are zipped, stacked, K-LoRA"):
        made(rows, against="zip")


def test_what_a_cell_says_stays_text(tmp_path: Path) -> None:
    evil = "</script><img src=x onerror=alert(1)>{{pictures}}"
    rows = study.read_table(table(tmp_path, 1, subject=evil))
    page = made(rows)
    assert evil not in page and key(page)["questions"][0]["subject"] == evil
    assert "<title>A &lt;study&gt;</title>" in page


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda text: text.replace("subject,style", "content,style"), "has no column subject; it has content, style"),
        (lambda text: text.splitlines()[0], "has no rows"),
        (lambda text: text.replace("K-LoRA", "zipped", 1), "two columns of one name"),
        (lambda text: text.replace("zipped/dog 1_ink.png", "gone.png"), "line 5, zipped: .*gone.png is no file"),
        (lambda text: text.replace("zipped/dog 1_ink.png", ""), "line 5, zipped: .* is no file"),
        (lambda text: text.replace("dog 0.png,", "gone.png,"), "line 2, subject_picture: .*gone.png is no file"),
        (lambda text: text + "one,two\n", "line 10: 8 columns expected"),
        (lambda text: "subject,style,zipped\n" + "a,b,pairs.csv\n", "expected two or more that are methods"),
        (lambda text: text.replace("zipped/dog 1_ink.png", "pairs.csv"), "pairs.csv is no picture"),
        (lambda text: text + "\udcff", "cannot be read as a table"),
    ],
)
def test_a_table_that_is_none_is_refused_in_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], spoil: Any, says: str
) -> None:
    path = table(tmp_path)
    path.write_bytes(spoil(path.read_text(encoding="utf-8")).encode(errors="surrogateescape"))
    assert main(["study", str(path), "--output", str(tmp_path / "study.html")]) == 2
    assert re.search(f"^error: .*{says}", capsys.readouterr().err) and not (tmp_path / "study.html").exists()


def results(
    folder: Path, method: str, names: list[str], count: int = 1, status: str = DONE, lost: bool = False
) -> Path:
    """A folder of `ziplora_batch run`, as its own code writes one. lost: its pictures are gone afterwards."""
    place = folder / method
    jobs = []
    with contextlib.closing(Results(place)) as written:
        for number, name in enumerate(names, 1):
            paths = [draw(place / "files" / f"{name} {at}.png", 9 * number + at) for at in range(count)]
            files = [Picture(str(path.relative_to(place)), path.stat().st_size) for path in paths]
            values = {"content_lora": f"{name}.safetensors", "style_lora": "=ink.safetensors"}
            values |= {"content_picture": f"0123456789ab_{name}.png", "style_picture": "gone.png"}
            jobs.append(Job(number, name, values, {}, f"{number}"))
            written.add(Outcome(f"{number}", status, files=files, report="two\nlines"))
        written.table(jobs)
    for path in place.glob("files/*.png") if lost else ():
        path.unlink()
    return place


def test_results_of_a_batch_for_each_method_are_a_study(tmp_path: Path) -> None:
    """Rows that all have; the reference that is found, under the name that it had before it was uploaded."""
    one, two = results(tmp_path, "one", ["a", "b", "c"], 2), results(tmp_path, "two", ["c", "a"], 2)
    reference = draw(tmp_path / "input" / "a.png", 77)
    rows = study.read_results({"zipped": one, "stacked": two}, [tmp_path / "input"])
    assert [(row.subject, row.style) for row in rows] == [
        ("a.safetensors", "=ink.safetensors"),
        ("a.safetensors", "=ink.safetensors"),
        ("c.safetensors", "=ink.safetensors"),
        ("c.safetensors", "=ink.safetensors"),
    ]
    assert rows[0].references == (reference, None) and rows[2].references == (None, None)
    assert rows[1].pictures == {"zipped": one / "files/a 1.png", "stacked": two / "files/a 1.png"}
    output = tmp_path / "new" / "study.html"
    given = [f"--results={name}={folder}" for name, folder in (("zipped", one), ("stacked", two))]
    assert main(["study", *given, "--files", str(tmp_path / "input"), "--output", str(output)]) == 0
    assert len(key(output.read_text(encoding="utf-8"))["questions"]) == 4


@pytest.mark.parametrize(
    ("first", "second", "says"),
    [
        ({}, {"status": ERROR}, "no row is done in all of"),
        ({}, {"names": ["x"]}, "no row is done in all of"),
        ({"names": ["a", "a"]}, {}, "line 5: a second row is called 'a'"),
        ({"count": 2}, {}, r"row 'a' has not as many pictures in each folder \(zipped 2, stacked 1\)"),
        ({}, {"lost": True}, "row 'a', stacked: .*a 0.png is no file"),
    ],
)
def test_results_that_do_not_fit_together_are_refused(tmp_path: Path, first: Any, second: Any, says: str) -> None:
    one, two = (results(tmp_path, name, **{"names": ["a"], **of}) for name, of in (("one", first), ("two", second)))
    with pytest.raises(BatchError, match=says):
        study.read_results({"zipped": one, "stacked": two}, [])


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ([], "give either a table, or --results"),
        (["t.csv", "--results", "a=b"], "give either a table, or --results"),
        (["--results", "a=b"], "two methods or more"),
        (["--results", "a=b", "--results", "a=c"], "--results a=c: METHOD=FOLDER expected, with another method each"),
        (["--results", "folder"], "--results folder: METHOD=FOLDER expected"),
        (["t.csv", "--side", "0"], "--side 0 leaves nothing"),
        (["gone.csv"], "gone.csv cannot be read as a table"),
        (["--results", "a=gone", "--results", "b=gone"], "results.csv cannot be read as a table"),
    ],
)
def test_a_command_that_says_too_little_is_refused(
    capsys: pytest.CaptureFixture[str], given: list[str], says: str
) -> None:
    assert main(["study", *given]) == 2 and says in capsys.readouterr().err
