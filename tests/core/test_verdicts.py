"""How often verdicts are right, as the table says it: intervals against published ones, rows from records by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import verdicts

SPEAK, DEAF = [2.0, {"style": 1.0}, [1.0, 1.2]], [1.1, {"style": 1.0}, [1.0, 1.2]]


@pytest.mark.parametrize(
    ("right", "count", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_intervals_are_the_published_ones(right: int, count: int, low: float, high: float) -> None:
    """Newcombe, Statistics in Medicine 17 (1998), table I, score method without continuity correction."""
    assert verdicts.wilson(right, count, 1.959964) == pytest.approx((low, high), abs=5e-5)
    mirrored = verdicts.wilson(count - right, count, 1.959964)
    assert mirrored == pytest.approx((1 - high, 1 - low), abs=5e-5)
    assert verdicts.wilson(0, 0) == (0.0, 1.0)


def of(own: float, empty: float, words: list | None, gain: float = 0.9, spoiled: float = 0.9, **other: float) -> dict:
    change = {"own": own, "empty": empty, **other}
    return {"change": change, "spoiled": spoiled, "words": words, "gain": {"own": gain, "empty": 0.1}}


def record(case: str, content: dict, style: dict, **more) -> dict:
    return {"block": "a block of this test", "pair": "a+b", "case": case, "content": content, "style": style, **more}


def test_the_table_counts_what_each_judge_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verdicts, "read_records", lambda path: [])  # of pictures: none were judged
    records = [
        record("good", of(0.3, 0.1, SPEAK), of(0.2, 0.2, SPEAK, gain=0.1)),  # awake by words; not by passes: the style
        record("good", of(0.3, 0.1, SPEAK), of(0.25, 0.2, DEAF)),  # the style asleep; by passes alone awake
        record("cat", of(0.2, 0.2, DEAF, gain=0.1), of(0.3, 0.1, DEAF)),  # the subject asleep
        record("swapped", of(0.1, 0.1, [1.0, {"style": 2.0}, [1.2]], other=0.3),
               of(0.1, 0.1, [0.8, {"content": 1.9}, [1.2]], other=0.1)),  # by words; by passes only asleep
        record("zeros", of(0.3, 0.1, SPEAK), of(0.0, 0.0, None), silenced="style"),
        {"block": "a block of this test", "pair": "a+b", "case": "same file", "refused": True},
    ]  # fmt: skip
    rows = {}
    for line in verdicts.table(records)[2:]:
        if line.startswith("|"):
            name, case, *cells = line.strip("| ").split(" | ")
            rows[name, case] = [cell.partition(" [")[0] for cell in cells]
    assert rows == {
        ("Zip Check", "good"): ["1 of 2", "0 of 2", "1 of 2", "0 of 2"],
        ("Zip Check", "cat"): ["1 of 1", "1 of 1", "0 of 1", "0 of 1"],
        ("Zip Check", "swapped"): ["1 of 1", "1 of 1", "1 of 1", "1 of 1"],
        ("Zip Check, words left out", "good"): ["1 of 2", "0 of 2", "1 of 2", "0 of 2"],
        ("Zip Check, words left out", "cat"): ["1 of 1", "1 of 1", "0 of 1", "0 of 1"],
        ("Zip Check, words left out", "swapped"): ["1 of 1", "1 of 1", "1 of 1", "0 of 1"],
        ("after a zip, as Zip LoRAs", "good"): ["0 of 2", "0 of 2", "0 of 2", "0 of 2"],
        ("after a zip, as Zip LoRAs", "cat"): ["1 of 1", "1 of 1", "0 of 1", "0 of 1"],
        ("after a zip, as Zip LoRAs", "swapped"): ["1 of 1", "1 of 1", "1 of 1", "1 of 1"],
        ("after a zip, without words", "good"): ["1 of 2", "0 of 2", "1 of 2", "0 of 2"],
        ("after a zip, without words", "cat"): ["1 of 1", "1 of 1", "0 of 1", "0 of 1"],
        ("after a zip, without words", "swapped"): ["0 of 1", "0 of 1", "0 of 1", "0 of 1"],
    }
    said = "\n".join(verdicts.table(records))
    assert "a LoRA of zeros named: 1 of 1" in said and "said to do nothing: 0 of 2" in said
    assert "the same file twice refused: 1 of 1" in said


def test_a_second_run_measures_what_is_missing_and_its_failure_is_the_exit_status(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results, asked = tmp_path / "verdicts.jsonl", []

    def share_out(work, jobs, path, processes):
        assert work is verdicts.measure_words and path == results
        asked.append(jobs)
        return len(asked) > 1

    monkeypatch.setattr(verdicts, "share_out", share_out)
    monkeypatch.setattr(verdicts.new_concepts, "strong", lambda block: (["a", "b"], ["c"]))
    monkeypatch.setattr("sys.argv", ["verdicts.py", "choose", "--words", "--results", str(results)])
    assert verdicts.main() == 1, "what failed is not said"
    found = [(job.pair, job.cases) for block in asked[0] for job in block]
    assert found == [("a+c", verdicts.WORDED), ("b+c", verdicts.WORDED)]
    kept = [{"block": "choose", "pair": "a+c", "case": case, "words alone": True} for case in verdicts.WORDED]
    kept += [{"block": "choose", "pair": "b+c", "case": "good", "words alone": True}]
    kept += [{"block": "choose", "pair": "b+c", "case": "cat"}]  # with all figures: of another kind
    kept = [{**r, "content": SPEAK, "style": SPEAK} if "words alone" in r else {**r, "content": of(0.3, 0.1, SPEAK),
            "style": of(0.3, 0.1, SPEAK)} for r in kept]  # fmt: skip
    results.write_text("".join(json.dumps(r) + "\n" for r in kept), encoding="utf-8")
    assert verdicts.main() == 0
    assert [(job.pair, job.cases) for block in asked[1] for job in block] == [("b+c", verdicts.WORDED[1:])]
