"""The floor under the quality table: on pairs that the direct merge spoils, zipping draws subject and style."""

from __future__ import annotations

import statistics


def test_default_draws_what_the_direct_merge_spoils(pack):
    from benchmarks.quality_job import Job, run_job
    from demo.manifest import read_manifest

    both: dict[str, list[float]] = {}
    for content, style in read_manifest().quick:
        for record in run_job(Job(content, style, 0, ("direct 1/1", "default"), 12, details=False)):
            both.setdefault(record["method"], []).append(record["both"])
    direct, zipped = (statistics.mean(both[m]) for m in ("direct 1/1", "default"))
    assert zipped > 0.7 and zipped > direct + 0.5, both
