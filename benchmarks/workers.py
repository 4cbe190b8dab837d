"""Jobs shared out to single-threaded processes, whose records are added to one results file."""

from __future__ import annotations

import json
import multiprocessing
import sys
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from typing import Any, TypeVar

import torch

from benchmarks.quality_table import Record

Job = TypeVar("Job")


def _work_through(
    work: Callable[[Job], list[Record]], jobs: Sequence[Job], results: Path, begun: Synchronized[int]
) -> bool:
    """Takes job after job that no other process has begun, and appends the records of each when it is done.

    Whether none failed: one that does is told, and leaves the others alone.
    """
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    whole = True
    while True:
        with begun.get_lock():
            number, begun.value = begun.value, begun.value + 1
        if number >= len(jobs):
            return whole
        try:
            records = work(jobs[number])
        except Exception:
            print(f"{jobs[number]} failed:\n{traceback.format_exc()}", file=sys.stderr, flush=True)
            whole = False
            continue
        with open(results, "a", encoding="utf-8") as file:
            file.write("".join(json.dumps(r) + "\n" for r in records))


def _process(*given: Any) -> None:
    sys.exit(not _work_through(*given))


def share_out(work: Callable[[Job], list[Record]], jobs: Sequence[Job], results: Path, processes: int) -> bool:
    """Whether every job came to its end. They are begun in the order in which they are given.

    work: a module's own function; it runs in this process where one is enough.
    """
    context = multiprocessing.get_context("spawn")
    begun = context.Value("i", 0)
    given = (work, jobs, results, begun)
    if processes == 1:
        return _work_through(*given)
    workers = [context.Process(target=_process, args=given) for _ in range(min(processes, len(jobs)))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return not any(worker.exitcode for worker in workers)
