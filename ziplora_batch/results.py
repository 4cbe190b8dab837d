"""What came of each job: results.jsonl, a line as soon as it is known, and results.csv, the same as a table."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import time
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from . import folder as disk
from .errors import BatchError
from .jobs import NAME, Job

DONE, ERROR, REFUSED, INTERRUPTED, LOST = "done", "error", "refused", "interrupted", "lost"
UNFETCHED = "not fetched"  # it has ended, but a picture could not be had from the server; the next run asks again
NOT_RUN = "not run"
_FINAL = (DONE, ERROR, REFUSED)  # an interrupted job, or one that a server took with it, is run again
_COLUMNS = ("row", NAME, "status", "server", "seconds", "ended", "files", "saved", "report", "error")
_NUMBER = re.compile(r"[+-]?\d+(\.\d*)?([eE][+-]?\d+)?")


@dataclass
class Picture:
    """path: below the results folder. size, sha256: of the file, None where an older client wrote the line. entry:
    what the server calls it."""

    path: str
    size: int | None = None
    sha256: str | None = None
    entry: dict[str, str] = field(default_factory=dict)


@dataclass
class Outcome:
    """One attempt at a job. report: what its nodes show as text. files: pictures fetched. saved: other files that it
    wrote, on the server. ended: local time."""

    key: str
    status: str
    server: str = ""
    prompt_id: str = ""
    seconds: float = 0.0
    ended: str = ""
    error: str = ""
    report: str = ""
    files: list[Picture] = field(default_factory=list)
    saved: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Sent:
    """A prompt that was about to be queued. when: seconds since 1970."""

    key: str
    server: str
    prompt_id: str
    when: float


class Results:
    """A folder of results: what is there already counts, by key. This client's alone until it is closed.

    Raises BatchError where another client has it, or where a line of it is none.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.last: dict[str, Outcome] = {}
        self.done: dict[str, Outcome] = {}  # the last that was done, whatever came after it
        self.rejected: set[tuple[Any, ...]] = set()  # pictures that a server had under a job's names, and not the job's
        self.attempts: dict[str, int] = {}
        self.deaths: dict[str, int] = {}  # servers lost by a job since it last ended
        self.sent: dict[str, Sent] = {}  # what may be on a server, and has not ended yet as far as we know
        self._whole: dict[str, bool] = {}
        disk.make(folder)
        self._lock = disk.Lock(folder)
        self._log, self._queued = folder / "results.jsonl", folder / ".queued.jsonl"
        try:
            disk.tidy(folder)
            self.batch = self._name()  # tells this batch's prompts from another's of the same content
            ended = set()
            for outcome in _lines(self._log, _outcome):
                self._count(outcome)
                ended.add(outcome.prompt_id)
            sent = {entry.key: entry for entry in _lines(self._queued, lambda line: Sent(**line))}  # the last of each
            self.sent = {k: v for k, v in sent.items() if v.prompt_id and v.prompt_id not in ended}
            with disk.written(self._queued) as file:
                file.writelines(map(_line, self.sent.values()))
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Let other clients have the folder."""
        self._lock.close()

    def _name(self) -> str:
        path = self.folder / ".batch"
        name = path.read_text(encoding="ascii", errors="replace").strip() if path.is_file() else ""
        if not name:
            name = uuid.uuid4().hex
            with disk.written(path) as file:
                file.write(name.encode())
        return name

    def _count(self, outcome: Outcome) -> None:
        self.attempts[outcome.key] = self.attempts.get(outcome.key, 0) + 1
        self.sent.pop(outcome.key, None)
        self._whole.pop(outcome.key, None)
        if outcome.status == LOST:
            self.deaths[outcome.key] = self.deaths.get(outcome.key, 0) + 1
        else:
            self.deaths.pop(outcome.key, None)
            self.last[outcome.key] = outcome
            if outcome.status == DONE:
                self.done[outcome.key] = outcome

    def add(self, outcome: Outcome) -> None:
        """Raises OSError where the line cannot be written."""
        _append(self._log, outcome)
        self._count(outcome)
        self._whole[outcome.key] = outcome.status == DONE

    def sending(self, key: str, server: str, prompt_id: str) -> None:
        """Note that a prompt is about to be queued: were we to die now, the next client would look for it there.

        Raises OSError.
        """
        entry = Sent(key, server, prompt_id, time.time())
        _append(self._queued, entry)
        self.sent[key] = entry

    def withdraw(self, key: str) -> None:
        """The prompt that was about to be queued was not taken, for certain. Raises OSError."""
        _append(self._queued, Sent(key, "", "", time.time()))
        self.sent.pop(key, None)

    def has(self, key: str, retry: bool = False) -> bool:
        """Whether a job needs no further run. retry: one that failed does."""
        status = self.last[key].status if key in self.last else None
        if status == DONE:
            return self.whole(key)
        return not retry and status in _FINAL

    def whole(self, key: str) -> bool:
        """Whether every picture of a job is there as it was written."""
        if key not in self._whole:
            pictures = self.last[key].files
            self._whole[key] = all(disk.holds(self.folder / p.path, p.size, p.sha256) for p in pictures)
        return self._whole[key]

    def table(self, jobs: Iterable[Job], why: str = "") -> Path:
        """Write results.csv, a line for each row; returns its path. why: of those that were not run."""
        jobs = list(jobs)
        columns = list(dict.fromkeys(c for job in jobs for c in job.values if c != NAME))
        text = io.StringIO(newline="")
        writer = csv.writer(text)
        writer.writerow(_safe([*_COLUMNS, *columns]))
        for job in jobs:
            writer.writerow(_safe([*self._cells(job, why), *(job.values.get(c, "") for c in columns)]))
        path = self.folder / "results.csv"
        with disk.written(path) as file:
            file.write(text.getvalue().encode("utf-8", "backslashreplace"))
        return path

    def _cells(self, job: Job, why: str) -> list[Any]:
        found = self.last.get(job.key)
        if found is None:
            return [job.number, job.name, NOT_RUN, *[""] * (len(_COLUMNS) - 4), why]
        status = UNFETCHED if found.status == DONE and not self.whole(job.key) else found.status
        lists = ("\n".join(p.path for p in found.files), "\n".join(found.saved))
        ends = (found.server, round(found.seconds, 1), found.ended)
        return [job.number, job.name, status, *ends, *lists, found.report, found.error]


def _safe(cells: Iterable[Any]) -> list[Any]:
    """Cells that no spreadsheet takes for a formula: an apostrophe before text that begins as one does."""
    return [
        f"'{cell}" if isinstance(cell, str) and cell[:1] in _FORMULA and not _NUMBER.fullmatch(cell) else cell
        for cell in cells
    ]


def as_it_was(cell: str) -> str:
    """A cell of `results.csv` without the apostrophe that was put before it."""
    return cell[1:] if cell[:1] == "'" and cell[1:2] in _FORMULA else cell


_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠")


def _line(entry: Any) -> bytes:
    """As JSON. What UTF-8 cannot hold, half of a pair of surrogates, becomes the escape that JSON has for it."""
    return json.dumps(asdict(entry), ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"


def _append(path: Path, entry: Any) -> None:
    """A line at the end of a file, on the disk; where that fails, the file is as it was."""
    with path.open("ab", buffering=0) as file:
        before = file.tell()
        left = _line(entry)
        try:
            while left:
                left = left[file.write(left) :]
            os.fsync(file.fileno())
        except OSError:
            os.truncate(path, before)
            raise


def _lines(path: Path, read: Any) -> list[Any]:
    """Lines of a file through `read`. One that a dying client did not finish is taken off: hold the lock.

    Raises BatchError.
    """
    if not path.is_file():
        with disk.written(path):
            return []
    whole, newline, torn = path.read_bytes().rpartition(b"\n")
    found = []
    for number, line in enumerate(whole.split(b"\n") if newline else [], 1):
        try:
            found.append(read(json.loads(line)))
        except (ValueError, TypeError, AttributeError) as error:
            raise BatchError(
                f"{path}, line {number}, is no result ({error}); take the line out, or use another folder"
            ) from error
    if torn:
        try:
            found.append(read(json.loads(torn)))  # whole, but for the end of the line: an editor took it
            torn += b"\n"
        except (ValueError, TypeError, AttributeError):
            torn = b""
        with disk.written(path) as file:
            file.write(whole + newline + torn)
    return found


def _outcome(line: Mapping[str, Any]) -> Outcome:
    """Also of a line by an older client, which wrote the names of the pictures alone."""
    known = {f.name for f in fields(Outcome)}
    if unknown := line.keys() - known:
        raise TypeError(f"unknown: {', '.join(sorted(unknown))}")
    files = [Picture(p) if isinstance(p, str) else Picture(**p) for p in line.get("files", [])]
    return Outcome(**{**line, "files": files})
