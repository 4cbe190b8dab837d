"""Jobs shared out to single-threaded processes, whose records are added to one results file."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import torch

from benchmarks.quality_table import Record

Job = TypeVar("Job")


def _work_through(work: Callable[[Job], list[Record]], jobs: Sequence[Job], results: Path) -> None:
    """One process's share: appends the records of each job when it is done."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    for job in jobs:
        records = work(job)
        with open(results, "a", encoding="utf-8") as file:
            file.write("".join(json.dumps(r) + "\n" for r in records))


def share_out(work: Callable[[Job], list[Record]], jobs: Sequence[Job], results: Path, processes: int) -> bool:
    """Whether every process came to its end. work: a module's own function; in this process where one is enough."""
    if processes == 1:
        _work_through(work, jobs, results)
        return True
    context = multiprocessing.get_context("spawn")
    shares = [jobs[i::processes] for i in range(processes)]
    workers = [context.Process(target=_work_through, args=(work, share, results)) for share in shares if share]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return not any(worker.exitcode for worker in workers)
