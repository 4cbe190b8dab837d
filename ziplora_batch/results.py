"""What came of each job: results.jsonl, a line as soon as it is known, and results.csv, the same as a table."""

from __future__ import annotations

import csv
import json
import os
import uuid
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .jobs import NAME, BatchError, Job

DONE, ERROR, REFUSED, INTERRUPTED, LOST = "done", "error", "refused", "interrupted", "lost"
_FINAL = (DONE, ERROR, REFUSED)  # an interrupted job, or one that a server took with it, is run again
_COLUMNS = ("row", NAME, "status", "server", "seconds", "ended", "files", "saved", "report", "error")


@dataclass
class Outcome:
    """One attempt at a job. report: what its nodes show as text. files: pictures fetched, below the results folder.
    saved: other files that it wrote, on the server. ended: local time."""

    key: str
    status: str
    server: str = ""
    prompt_id: str = ""
    seconds: float = 0.0
    ended: str = ""
    error: str = ""
    report: str = ""
    files: list[str] = field(default_factory=list)
    saved: list[str] = field(default_factory=list)


class Results:
    """A folder of results: what is there already counts, by key."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.last: dict[str, Outcome] = {}
        self.attempts: dict[str, int] = {}
        self.deaths: dict[str, int] = {}  # servers lost by a job since it last ended
        folder.mkdir(parents=True, exist_ok=True)
        name = folder / ".batch"
        if not name.is_file():
            name.write_text(uuid.uuid4().hex, encoding="ascii")
        self.batch = name.read_text(encoding="ascii")  # tells this batch's prompts from another's of the same content
        self._log = folder / "results.jsonl"
        whole = self._log.read_bytes().rpartition(b"\n")[0] if self._log.is_file() else b""
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                self._count(Outcome(**json.loads(line)))
            except (ValueError, TypeError) as error:
                raise BatchError(
                    f"{self._log}, line {number}, is no result ({error}); take the line out, or use another folder"
                ) from error
        if self._log.is_file():  # a line that a dying client did not finish
            os.truncate(self._log, len(whole) + (1 if whole else 0))

    def _count(self, outcome: Outcome) -> None:
        self.attempts[outcome.key] = self.attempts.get(outcome.key, 0) + 1
        if outcome.status == LOST:
            self.deaths[outcome.key] = self.deaths.get(outcome.key, 0) + 1
        else:
            self.deaths.pop(outcome.key, None)
            self.last[outcome.key] = outcome

    def add(self, outcome: Outcome) -> None:
        """Raises OSError where the line cannot be written."""
        with self._log.open("ab") as file:
            file.write(json.dumps(asdict(outcome), ensure_ascii=False).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        self._count(outcome)

    def has(self, key: str, retry: bool = False) -> bool:
        """Whether a job needs no further run. retry: one that failed does."""
        status = self.last[key].status if key in self.last else None
        return status == DONE if retry else status in _FINAL

    def table(self, jobs: Iterable[Job]) -> Path:
        """Write results.csv, a line for each row; returns its path."""
        jobs = list(jobs)
        columns = list(dict.fromkeys(c for job in jobs for c in job.values if c != NAME))
        path, partial = self.folder / "results.csv", self.folder / ".results.csv.part"
        with partial.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow([*_COLUMNS, *columns])
            for job in jobs:
                writer.writerow([*self._cells(job), *(job.values.get(c, "") for c in columns)])
        partial.replace(path)
        return path

    def _cells(self, job: Job) -> list[Any]:
        found = self.last.get(job.key)
        if found is None:
            return [job.number, job.name, "not run", *[""] * (len(_COLUMNS) - 3)]
        lists = (" ".join(found.files), " ".join(found.saved))
        ends = (found.server, round(found.seconds, 1), found.ended)
        return [job.number, job.name, found.status, *ends, *lists, found.report, found.error]
