"""What a folder of results counts, how it is written, and what of a server's address is."""

from __future__ import annotations

import csv
import hashlib
import json
from pathlib import Path

import pytest

from ziplora_batch import jobs
from ziplora_batch.results import DONE, ERROR, INTERRUPTED, LOST, Outcome, Results

SHA_OF_PICTURE = hashlib.sha256(b"picture").hexdigest()


def test_results_count_across_runs_and_survive_a_torn_line(tmp_path: Path) -> None:
    results = Results(tmp_path)
    for key, status in (("a", DONE), ("b", ERROR), ("c", INTERRUPTED), ("d", LOST), ("d", LOST)):
        results.add(Outcome(key, status))
    with (tmp_path / "results.jsonl").open("ab") as log:
        log.write(b'{"key": "e", "stat')  # the client died here
    results.close()
    again_ = Results(tmp_path)
    assert [again_.has(k) for k in "abcde"] == [True, True, False, False, False]
    assert [again_.has(k, retry=True) for k in "ab"] == [True, False]
    assert again_.deaths == {"d": 2} and again_.attempts["d"] == 2
    again_.add(Outcome("e", DONE))
    again_.close()
    third = Results(tmp_path)
    assert third.has("e"), "the line after the torn one is lost"
    third.close()
    (tmp_path / "results.jsonl").write_text("nonsense\n", encoding="utf-8")
    with pytest.raises(jobs.BatchError, match="line 1, is no result"):
        Results(tmp_path)


def test_a_second_client_touches_nothing(tmp_path: Path) -> None:
    first = Results(tmp_path)
    first.add(Outcome("a", DONE))
    with (tmp_path / "results.jsonl").open("ab") as log:
        log.write(b'{"key": "b", "stat')  # the first is writing
    before = (tmp_path / "results.jsonl").read_bytes()
    with pytest.raises(jobs.BatchError, match=r"another client \(process \d+ on .*\) is working .*--results"):
        Results(tmp_path)
    assert (tmp_path / "results.jsonl").read_bytes() == before
    first.close()
    Results(tmp_path).close()
    assert (tmp_path / "results.jsonl").read_bytes() == before.rpartition(b"\n")[0] + b"\n"


def test_a_whole_last_line_counts_though_an_editor_took_its_end(tmp_path: Path) -> None:
    first = Results(tmp_path)
    first.add(Outcome("a", DONE))
    first.close()
    log = tmp_path / "results.jsonl"
    log.write_bytes(log.read_bytes().rstrip(b"\n"))
    second = Results(tmp_path)
    second.add(Outcome("b", DONE))
    second.close()
    third = Results(tmp_path)
    assert third.has("a") and third.has("b")
    third.close()


@pytest.mark.parametrize("data", [None, b"", b"pictur!", b"picture and more"])
def test_a_row_is_done_only_while_its_pictures_are_as_they_were(tmp_path: Path, data: bytes | None) -> None:
    line = {"key": "a", "status": "done", "files": [{"path": "files/a b/x.png", "size": 7, "sha256": SHA_OF_PICTURE}]}
    (tmp_path / "results.jsonl").write_text(json.dumps(line) + "\n", encoding="utf-8")
    path = tmp_path / "files" / "a b" / "x.png"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"picture")
    results = Results(tmp_path)
    assert results.has("a") and results.has("a", retry=True)
    results.close()
    path.unlink() if data is None else path.write_bytes(data)
    results = Results(tmp_path)
    assert not results.has("a") and not results.has("a", retry=True)
    results.close()


def test_lines_of_an_older_client_are_read(tmp_path: Path) -> None:
    lines = [{"key": key, "status": "done", "files": [f"files/{key}.png"]} for key in "ab"]
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "a.png").write_bytes(b"picture")
    results = Results(tmp_path)
    assert results.has("a") and not results.has("b")
    results.close()


def test_a_row_that_cannot_be_written_leaves_the_others_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = Results(tmp_path)
    results.add(Outcome("a", DONE))
    before = (tmp_path / "results.jsonl").read_bytes()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("os.fsync", full)
        with pytest.raises(OSError, match="No space left"):
            results.add(Outcome("b", DONE))
    assert (tmp_path / "results.jsonl").read_bytes() == before
    results.close()


def test_what_no_utf_8_holds_is_written_and_read(tmp_path: Path) -> None:
    results = Results(tmp_path)
    results.add(Outcome("a", ERROR, error="half a pair \ud800, 日本\u2028"))
    results.table([jobs.Job(1, "a", {}, {}, "a")])
    results.close()
    read = Results(tmp_path)
    assert read.last["a"].error == "half a pair \ud800, 日本\u2028"
    read.close()


def test_only_what_is_its_own_is_tidied(tmp_path: Path) -> None:
    """Another client may work in a folder below, under a lock of its own, and be writing."""
    own, theirs = f".{'a' * 32}.part", f".{'b' * 32}.part"
    Results(tmp_path).close()
    others = [Results(tmp_path / "second"), Results(tmp_path / "files" / "third")]
    mine = [tmp_path / own, tmp_path / "files" / own, tmp_path / "files" / "dog 1" / "sub" / own]
    writing = [other.folder / "files" / "dog 1" / theirs for other in others] + [o.folder / theirs for o in others]
    for path in mine + writing:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"half")
    Results(tmp_path).close()
    assert [path.exists() for path in mine + writing] == [False] * len(mine) + [True] * len(writing)
    for other in others:
        other.close()


def test_no_cell_is_a_formula(tmp_path: Path) -> None:
    texts = ["=1+2", "+1+2", "-1+2", "@SUM(A1)", "\t=1", "\r=1", "-0.5", "+3", "a=b", "", "-"]
    made = [jobs.Job(n, text, {"=column": text, "number": -1.5}, {}, str(n)) for n, text in enumerate(texts)]
    results = Results(tmp_path)
    results.add(Outcome("0", ERROR, error="=HYPERLINK()", report="@x", saved=["=a", "b"]))
    results.table(made)
    results.close()
    with (tmp_path / "results.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0][-2:] == ["'=column", "number"]
    safe = ["'=1+2", "'+1+2", "'-1+2", "'@SUM(A1)", "'\t=1", "'\r=1", "-0.5", "+3", "a=b", "", "'-"]
    assert [(row[1], row[-2]) for row in rows[1:]] == [(text, text) for text in safe]
    assert {row[-1] for row in rows[1:]} == {"-1.5"}
    assert [c for c in rows[1] if "HYPER" in c or "x" in c or "=a" in c] == ["'=a\nb", "'@x", "'=HYPERLINK()"]
    assert '"=HYPERLINK()"' in (tmp_path / "results.jsonl").read_text(encoding="utf-8")


def test_names_stay_apart_and_fit() -> None:
    from ziplora_batch.names import LONGEST, Names, plain

    names = Names()
    long = "x" * 200
    found = [
        names.unique("a", "dog.png"),
        names.unique("b/c", "dog.png"),
        names.unique("a", "DOG.png"),
        names.unique("a\\..", "dog.png"),
        *(names.unique("", f"{long}_{n:05}_.png") for n in range(1, 5)),
        names.unique("", "日" * 96 + ".png"),
        names.unique("../../etc", "con.png"),
    ]
    assert [str(p) for p in found[:4]] == ["a/dog.png", "b/c/dog.png", "a/DOG (2).png", "a/dog (3).png"]
    assert len({str(p).casefold() for p in found}) == len(found)
    assert all(p.suffix == ".png" and len(step.encode()) <= LONGEST for p in found for step in p.parts)
    assert str(found[-1]) == "etc/_con.png"
    assert plain("a/b:c\0.") == "a_b_c_" and plain("..") == "_" and len(plain("猫" * 96, 100).encode()) <= 100


# --- addresses -----------------------------------------------------------------------------------------------------


def test_one_server_counts_once_however_it_is_spelled() -> None:
    from ziplora_batch.address import addresses

    same = ["127.0.0.1:8188", "http://localhost:8188/", "HTTP://LOCALHOST:8188", "http://[::1]:8188", "0.0.0.0:8188"]
    assert [a.url for a in addresses(same)] == ["http://127.0.0.1:8188"]
    assert [a.url for a in addresses(["HOST", "http://host:80/"])] == ["http://host"]
    others = ["http://host", "https://host", "http://host:81", "http://host/b", "http://10.0.0.7"]
    assert len(addresses(others)) == len(others)


def test_passwords_and_tokens_are_sent_and_never_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    from ziplora_batch.address import HEADERS, addresses, read_headers

    given = read_headers(["X-Token: abc"], {HEADERS: "Authorization: Bearer s3cret\nX-Token: old\n"})
    assert given == {"Authorization": "Bearer s3cret", "X-Token": "abc"}
    plain, mine = addresses(["http://host", "http://me:p%40ss@host:81", "http://host:81"], given)
    assert plain.headers == given
    assert mine.headers == {"X-Token": "abc", "Authorization": "Basic bWU6cEBzcw=="}  # me:p@ss
    shown = f"{mine!r} {mine.url} {mine.name} {mine.identity}"
    assert not any(secret in shown for secret in ("me:", "p%40ss", "p@ss", "bWU6", "s3cret", "abc"))
    for bad in (
        "http://me:p@ss@ho st",
        "ftp://me:pass@host",
        "http://me:pass@host:99999",
        "http://me:pass@host?t=pass",
    ):
        with pytest.raises(jobs.BatchError) as caught:
            addresses([bad])
        assert "pass" not in str(caught.value) and "p@ss" not in str(caught.value)
    for bad in ("http://host..com", "http://.", f"http://{'x' * 64}.com", "http://me:pass@a..b"):
        with pytest.raises(jobs.BatchError, match="--server") as caught:
            addresses([bad])
        assert "pass" not in str(caught.value)
    for header in ("token", "a b: c", "Token: a\nb"):
        with pytest.raises(jobs.BatchError, match="not NAME:VALUE"):
            read_headers([header], {})
