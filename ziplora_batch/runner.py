"""Jobs to servers: each server takes the next job when it has none of ours, until all have ended."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import time
import uuid
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tqdm import tqdm

from .jobs import Job
from .results import DONE, ERROR, INTERRUPTED, LOST, REFUSED, Outcome, Results
from .server import Refused, Server, ServerLost

_SPACE = uuid.UUID("3b0a7bd0-9a1c-5b3e-8c55-3c4f5d2a7e11")
_DEATHS = 3  # so often may a server go while it runs a job, before the job is to blame
_PAUSE = 2.0  # seconds between two looks at a server that is gone


@dataclass
class Batch:
    """patience: seconds without any server before the rest is given up. retry: run failed jobs again."""

    jobs: Sequence[Job]
    servers: Sequence[Server]
    results: Results
    patience: float = 600.0
    retry: bool = False
    quiet: bool | None = None  # None: bars on a terminal only
    _waiting: deque[Job] = field(default_factory=deque, init=False)
    _running: dict[str, Job] = field(default_factory=dict, init=False)
    _refused: dict[str, dict[str, str]] = field(default_factory=dict, init=False)
    _found: dict[str, str] = field(default_factory=dict, init=False)
    _present: set[str] = field(default_factory=set, init=False)

    async def run(self) -> bool:
        """Whether every job has ended, in whatever way; each is in the results."""
        by_key = {job.key: job for job in self.jobs}
        self._waiting.extend(job for job in by_key.values() if not self.results.has(job.key, self.retry))
        self._ended = len(by_key) - len(self._waiting)
        total = tqdm(total=len(by_key), initial=self._ended, desc="prompts", disable=self.quiet)
        self._total = total
        self._changed = asyncio.Condition()
        try:
            await asyncio.gather(*(self._adopt(server) for server in self.servers))
            found = [job for job in self._waiting if self._prompt_id(job) in self._found]
            self._waiting = deque(found + [job for job in self._waiting if job not in found])
            workers = [
                asyncio.create_task(self._work(server, tqdm(position=number, disable=self.quiet, leave=False)))
                for number, server in enumerate(self.servers, 1)
            ]
            watch = asyncio.create_task(self._watch())
            try:
                await asyncio.wait([asyncio.gather(*workers), watch], return_when=asyncio.FIRST_COMPLETED)
                for task in (*workers, watch):
                    if task.done():
                        task.result()
            finally:
                for task in (*workers, watch):
                    task.cancel()
                await asyncio.gather(*workers, watch, return_exceptions=True)
        finally:
            total.close()
            self.results.table(self.jobs)
        return not self._waiting and not self._running

    async def _adopt(self, server: Server) -> None:
        """Find prompts of an earlier run of ours, that a server still works on or has ended since."""
        with contextlib.suppress(ServerLost):
            there = await server.queued() | await server.ended()
            self._found.update({i: server.url for i in map(self._prompt_id, self._waiting) if i in there})
            self._present.add(server.url)

    def _prompt_id(self, job: Job) -> str:
        """The same for the same attempt at the same job, whoever asks."""
        return str(uuid.uuid5(_SPACE, f"{self.results.batch} {job.key} {self.results.attempts.get(job.key, 0)}"))

    async def _watch(self) -> None:
        """Ends when no server has been there for too long."""
        seen = time.monotonic()
        while time.monotonic() - seen < self.patience:
            await asyncio.sleep(min(1.0, self.patience / 4))
            if self._present:
                seen = time.monotonic()
        logging.error("no server has answered for %.0f s; the rest is not run", self.patience)

    async def _work(self, server: Server, bar: Any) -> None:
        stale: set[str] = set()
        while True:
            try:
                async with server.listening() as socket:
                    for prompt_id in stale:
                        await server.cancel(prompt_id)
                    stale.clear()
                    self._present.add(server.url)
                    while (job := await self._take(server)) is not None:
                        prompt_id = self._prompt_id(job)
                        stale.add(prompt_id)
                        outcome = await self._one(server, socket, job, prompt_id, bar)
                        stale.discard(prompt_id)
                        await self._end(server, job, outcome)
                    return
            except ServerLost as error:
                self._present.discard(server.url)
                bar.set_description_str(f"{server.name}: gone")
                await self._lost(server, str(error))
                if await self._all_ended_or(_PAUSE):
                    return

    async def _take(self, server: Server) -> Job | None:
        """The next job for this server; None when all have ended."""
        async with self._changed:
            while True:
                job = next((job for job in self._waiting if self._may(server, job)), None)
                if job is not None:
                    self._waiting.remove(job)
                    self._running[server.url] = job
                    return job
                if not self._waiting and not self._running:
                    return None
                await self._changed.wait()

    def _may(self, server: Server, job: Job) -> bool:
        """Whether this server is one for a job: none that has refused it, nor while another still works on it."""
        elsewhere = self._found.get(self._prompt_id(job)) if self._found else None
        if elsewhere not in (None, server.url) and elsewhere in self._present:
            return False
        return server.url not in self._refused.get(job.key, {})

    async def _one(self, server: Server, socket: Any, job: Job, prompt_id: str, bar: Any) -> Outcome:
        """One attempt. Raises ServerLost; cancels the prompt where we are cancelled."""
        began = time.monotonic()
        outcome = Outcome(job.key, DONE, server.url, prompt_id)

        def heard(node: str, value: int, end: int) -> None:
            kind = job.prompt.get(node, {}).get("class_type", node)
            bar.total, bar.n = end, value
            bar.set_description_str(f"{server.name}: {job.name}: {kind}", refresh=False)
            bar.refresh()

        bar.reset(1)
        bar.set_description_str(f"{server.name}: {job.name}")
        try:
            if self._found.pop(prompt_id, None) != server.url:
                for name, picture in job.uploads.items():
                    await server.upload(picture, name)
                await server.queue(job.prompt, prompt_id)
            entry = await server.follow(socket, prompt_id, heard)
            await self._read(server, job, entry, outcome)
        except Refused as error:
            outcome.status, outcome.error = REFUSED, str(error)
        except asyncio.CancelledError:
            self.results.add(Outcome(job.key, INTERRUPTED, server.url, prompt_id, error="stopped with the batch"))
            with contextlib.suppress(ServerLost, asyncio.TimeoutError):
                await asyncio.wait_for(server.cancel(prompt_id), 5)
            raise
        outcome.seconds = time.monotonic() - began
        outcome.ended = _now()
        return outcome

    async def _read(self, server: Server, job: Job, entry: dict[str, Any], outcome: Outcome) -> None:
        """Status, texts and files from a history entry."""
        texts = []
        folder = self.results.folder / "files" / f"{_plain(job.name)} {job.key[:8]}"
        for shown in entry["outputs"].values():
            texts.extend(str(text) for text in shown.get("text") or [])
            for kind, entries in shown.items():
                for file in entries if isinstance(entries, list) else []:
                    if not isinstance(file, dict) or file.get("type") != "output" or "filename" not in file:
                        continue
                    if kind == "images":
                        folder.mkdir(parents=True, exist_ok=True)
                        path = folder / _plain(file["filename"])
                        await server.fetch(file, path)
                        outcome.files.append(path.relative_to(self.results.folder).as_posix())
                    else:
                        outcome.saved.append("/".join(filter(None, (file.get("subfolder"), file["filename"]))))
        outcome.report = "\n\n".join(dict.fromkeys(texts))
        status = entry.get("status") or {}
        if status.get("status_str") != "success":
            messages = dict(status.get("messages") or [])
            failed = messages.get("execution_error")
            if failed is None:
                outcome.status, outcome.error = INTERRUPTED, "interrupted on the server"
            else:
                node = f"{failed.get('node_type')} ({failed.get('node_id')})"
                text = str(failed.get("exception_message", "")).strip()
                outcome.status, outcome.error = ERROR, f"{node}: {failed.get('exception_type')}: {text}"

    async def _end(self, server: Server, job: Job, outcome: Outcome) -> None:
        async with self._changed:
            del self._running[server.url]
            if outcome.status == REFUSED:
                self._refused.setdefault(job.key, {})[server.url] = outcome.error
                self._waiting.append(job)  # another server may have what this one lacks
                self._give_up_refused()
            else:
                self._record(job, outcome)
            self._changed.notify_all()

    def _give_up_refused(self) -> None:
        """What every server that is there has refused."""
        for job in [j for j in self._waiting if self._present <= self._refused.get(j.key, {}).keys()]:
            refusals = self._refused[job.key]
            self._waiting.remove(job)
            said = "; ".join(dict.fromkeys(refusals.values()))
            self._record(job, Outcome(job.key, REFUSED, " ".join(refusals), ended=_now(), error=said))

    async def _lost(self, server: Server, why: str) -> None:
        """What the server was running goes back to the front of the queue, unless servers keep dying of it."""
        async with self._changed:
            job = self._running.pop(server.url, None)
            if job is not None:
                self.results.add(Outcome(job.key, LOST, server.url, self._prompt_id(job), error=why))
                deaths = self.results.deaths[job.key]
                if deaths < _DEATHS:
                    self._waiting.appendleft(job)
                    tqdm.write(f"{job.name}: {why}; it goes to another server")
                else:
                    said = f"{deaths} servers were lost while they ran it; the last: {why}"
                    self._record(job, Outcome(job.key, ERROR, server.url, ended=_now(), error=said))
            if self._present:
                self._give_up_refused()
            self._changed.notify_all()

    def _record(self, job: Job, outcome: Outcome) -> None:
        self.results.add(outcome)
        self._ended += 1
        self._total.update()
        said = f"{outcome.status} {outcome.seconds:.1f} s" + (f": {outcome.error}" if outcome.error else "")
        tqdm.write(f"[{self._ended}/{self._total.total}] {job.name}: {said}")

    async def _all_ended_or(self, seconds: float) -> bool:
        await asyncio.sleep(seconds)
        return not self._waiting and not self._running


def _now() -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S")


def _plain(name: str) -> str:
    """A name that every file system takes."""
    return re.sub(r'[\x00-\x1f<>:"/\\|?*]+', "_", name).strip(" .")[:100] or "_"
