"""Jobs that processes of a benchmark share: none is lost or done twice, and one that fails leaves the others alone."""

from __future__ import annotations

import json
import os

import pytest

from benchmarks import workers

FAILS = 3


def work(job: int) -> list[dict[str, int]]:
    if job == FAILS:
        raise RuntimeError("this one cannot be measured")
    return [{"job": job, "process": os.getpid()}]


@pytest.mark.parametrize("processes", [1, 2])
def test_a_job_that_fails_is_told_and_the_others_are_done(processes, tmp_path, capfd) -> None:
    results = tmp_path / "results.jsonl"
    assert not workers.share_out(work, range(6), results, processes)
    found = [json.loads(line)["job"] for line in results.read_text().splitlines()]
    assert sorted(found) == [0, 1, 2, 4, 5]
    said = capfd.readouterr().err
    assert "3 failed:" in said and "this one cannot be measured" in said


def test_where_none_fails_it_says_so(tmp_path) -> None:
    assert workers.share_out(work, [0, 1, 2], tmp_path / "results.jsonl", 1)
