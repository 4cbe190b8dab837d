"""The statistics behind every claim about quality, against closed forms and simulated tables."""

from __future__ import annotations

import json
import math
import sys
from statistics import NormalDist

import pytest
import torch

from benchmarks import intervals, new_concepts
from benchmarks.intervals import bootstrap, components, difference, power, sign_test, table, without


def tables(count: int, by_subject: float, by_style: float, left: float, mean: float = 0.0, size: int = 12):
    """Simulated paired differences: a subject's part, a style's part, and the pair's own."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        rows, columns, rest = (torch.randn(s, generator=generator) for s in ((size, 1), (1, size), (size, size)))
        values = mean + by_subject * rows + by_style * columns + left * rest
        yield {(f"s{i}", f"t{j}"): float(values[i, j]) for i in range(size) for j in range(size)}


@pytest.mark.parametrize(("better", "worse", "p"), [(8, 2, 112 / 1024), (5, 5, 1.0), (0, 6, 2 / 64), (0, 0, 1.0)])
def test_the_sign_test_is_the_binomial_tail(better: int, worse: int, p: float) -> None:
    assert sign_test(better, worse) == pytest.approx(p)


def test_an_interval_holds_the_mean_as_often_as_it_says() -> None:
    """Where subjects and styles differ, intervals over independent pairs would hold it in half of the tables."""
    held = [low <= 0.1 <= high for low, high in (bootstrap(t, 400) for t in tables(150, 1.0, 0.5, 1.0, mean=0.1))]
    assert sum(held) / len(held) >= 0.88


def test_an_interval_is_clear_of_zero_where_nothing_varies_and_grows_with_what_does() -> None:
    constant = {(s, t): 0.25 for s in "abc" for t in "xyz"}
    assert bootstrap(constant) == pytest.approx((0.25, 0.25))
    narrow, wide = (next(iter(tables(1, by, 0.0, 0.1))) for by in (0.1, 1.0))
    assert bootstrap(wide)[1] - bootstrap(wide)[0] > 3 * (bootstrap(narrow)[1] - bootstrap(narrow)[0])


def test_variance_is_parted_as_it_was_put_together() -> None:
    found = [components(t) for t in tables(60, 0.6, 0.3, 1.0)]
    for name, true in (("subject", 0.36), ("style", 0.09), ("left", 1.0)):
        mean = sum(parts[name] for parts in found) / len(found)
        assert mean == pytest.approx(true, abs=0.06)


def test_power_is_the_normal_tail() -> None:
    parts = {"subject": 0.0, "style": 0.0, "left": 1.44}
    error = math.sqrt(1.44 / 144)
    expected = 1 - NormalDist().cdf(1.96 - 0.25 / error) + NormalDist().cdf(-1.96 - 0.25 / error)
    assert power(parts, 0.25, 12, 12) == pytest.approx(expected, abs=0.01)


def test_pairs_are_compared_with_themselves() -> None:
    said = difference({("a", "x"): 3.0, ("b", "x"): 1.0}, {("a", "x"): 1.0, ("b", "x"): 1.0, ("c", "x"): 9.0}, -1)
    assert (said.mean, said.better, said.equal, said.worse) == (1.0, 0, 1, 1)
    with pytest.raises(ValueError, match="no pair"):
        difference({("a", "x"): 1.0}, {("b", "x"): 1.0})


def test_a_table_has_a_row_for_each_method_and_leaves_out_weak_loras() -> None:
    figures = {"subject": 0.5, "style": 0.5, "distance": 10.0, "colors": 5.0, "structure": 1.0}
    records = [
        {"pair": pair, "seed": 0, "method": method, **figures, "both": both}
        for method, both in (("direct 1/1", 0.25), ("other", 0.75))
        for pair in ("a+x", "b+x", "a+y", "b+y")
    ]
    head, _, first, second = table(records, "direct 1/1")
    assert first.startswith("| other | 4 |") and "+0.50 [+0.50, +0.50]" in first and "4/0/0" in first
    assert second.startswith("| direct 1/1 | 4 |") and head.count("|") == first.count("|")
    assert table(without(records, {"x"}), "direct 1/1")[2].startswith("| other | 2 |")


def test_weak_loras_are_those_of_the_files_own_world(monkeypatch, tmp_path, capsys) -> None:
    """Blocks of every world are called alike, and so are styles of them."""
    assert "coral" in intervals.weak(intervals.RESULTS / "confirm.jsonl")
    loras = {"moai": False, "pear": True, "coral": False, "agate": True}
    (tmp_path / "confirm").mkdir()
    told = json.dumps({"loras": {name: {"weak": weak} for name, weak in loras.items()}})
    (tmp_path / "confirm" / "world.json").write_text(told, encoding="utf-8")
    monkeypatch.setattr(new_concepts, "FOLDER", tmp_path)
    figures = {"subject": 1.0, "style": 1.0, "distance": 1.0, "colors": 1.0, "structure": 1.0, "seed": 0}
    lines = [
        json.dumps({"pair": pair, "method": method, "both": both, **figures})
        for pair, both in (("moai+coral", 0.25), ("moai+agate", 1.0), ("pear+coral", 1.0))
        for method in ("direct 1/1", "default")
    ]
    results = tmp_path / "confirm.jsonl"
    results.write_text("\n".join(lines), encoding="utf-8")
    monkeypatch.setattr("sys.argv", ["intervals.py", str(results), "--strong"])
    assert intervals.main() == 0
    assert "| direct 1/1 | 1 | 1.00 | 1.00 | 0.25 |" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", [*sys.argv, "--beside", str(results), "--against", f"direct 1/1 ({results})"])
    assert intervals.main() == 0
    printed = capsys.readouterr().out
    assert f"| default ({results}) | 1 |" in printed and "| default | 1 |" in printed and "less direct 1/1 (" in printed


def test_a_mean_over_files_is_of_the_pairs_and_methods_that_all_have() -> None:
    one = [{"pair": pair, "seed": 0, "method": m, "both": 0.2} for pair in ("a+x", "b+x") for m in ("stack", "zip")]
    other = [{"pair": "a+x", "seed": 0, "method": m, "both": 0.6} for m in ("stack", "zip", "third")]
    found = intervals.averaged({"one": one, "other": other})
    assert intervals.of_pairs(found, "zip", "both") == {("a", "x"): pytest.approx(0.4)}
    assert {record["method"] for record in found} == {"stack", "zip"}
