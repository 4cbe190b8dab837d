"""Jobs to servers: each server takes the next job when it has none of ours, until all have ended."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from tqdm import tqdm

from .address import identity
from .attempt import SENDING, Attempt, Known
from .connection import ended
from .errors import Denied, ServerError, ServerLost
from .jobs import Job
from .progress import Listener
from .results import DONE, ERROR, INTERRUPTED, LOST, REFUSED, UNFETCHED, Outcome, Results
from .server import Server

_SPACE = uuid.UUID("3b0a7bd0-9a1c-5b3e-8c55-3c4f5d2a7e11")
_DEATHS = 3  # so often may a server go while it runs a job, before the job is to blame
_STRIKES = 3  # so often may a server that answers not end a job, before it is asked no more
_STOPPING = 15.0  # seconds that a server may take over stopping its prompt
_PAUSE = 2.0  # seconds between two looks at a server that is gone


class _Deadly(Exception):
    """Too many servers were lost while they ran a job."""


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
    _known: dict[str, Known] = field(default_factory=dict, init=False)  # by key: what may be on a server
    _present: set[str] = field(default_factory=set, init=False)  # identities of the servers that answer
    _failed: Counter[tuple[str, str, str]] = field(default_factory=Counter, init=False)  # by server, job and step
    _absent: dict[str, str] = field(default_factory=dict, init=False)  # why a server does not, by its name

    async def run(self) -> bool:
        """Whether every job has ended, in whatever way; each is in the results."""
        by_key = {job.key: job for job in self.jobs}
        self._waiting.extend(job for job in by_key.values() if not self.results.has(job.key, self.retry))
        self._ended = len(by_key) - len(self._waiting)
        total = tqdm(total=len(by_key), initial=self._ended, desc="prompts", disable=self.quiet)
        self._total = total
        self._changed = asyncio.Condition()
        try:
            self._remember()
            await asyncio.gather(*(self._meet(server) for server in self.servers))
            workers = [
                asyncio.create_task(self._work(server, tqdm(position=number, disable=self.quiet, leave=False)))
                for number, server in enumerate(self.servers, 1)
            ]
            watch = asyncio.create_task(self._watch())
            try:
                going = set(workers)
                while going and not watch.done():
                    done, _ = await asyncio.wait({*going, watch}, return_when=asyncio.FIRST_COMPLETED)
                    for task in done:
                        task.result()
                    going -= done
            finally:
                await ended([*workers, watch], _STOPPING)
        finally:
            total.close()
            self.results.table(self.jobs, "; ".join(dict.fromkeys(self._absent.values())))
        return not self._waiting and not self._running

    def _remember(self) -> None:
        """What earlier runs left on the servers comes first: prompts, and pictures."""
        ours = {server.identity for server in self.servers}
        for job in self._waiting:
            sent, last = self.results.sent.get(job.key), self.results.last.get(job.key)
            if sent is not None:
                known = Known(identity(sent.server), sent.prompt_id, since=sent.when)
            elif last is not None and (last.status == DONE or (last.status == UNFETCHED and not self.retry)):
                known = Known(identity(last.server), last.prompt_id)
            else:
                continue
            if known.identity in ours:
                self._known[job.key] = known
        found = [job for job in self._waiting if job.key in self._known]
        self._waiting = deque(found + [job for job in self._waiting if job.key not in self._known])

    async def _meet(self, server: Server) -> None:
        """Who is there decides who may take what an earlier run left on another server."""
        try:
            await asyncio.wait_for(server.queued(), 10)
            self._present.add(server.identity)
        except Denied as error:
            self._leave(server, error)
        except (ServerError, asyncio.TimeoutError):
            pass

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
        left: dict[str, str] = {}  # prompt id -> key, of jobs that ran here when the server was lost
        strikes = 0  # jobs in a row that it did not end, though something answered there
        while True:
            try:
                await server.queued()
                await self._clear(server, left)
                await self._is_back(server)
                async with server.listening() as listener:
                    while (job := await self._take(server)) is not None:
                        await self._run(server, listener, job, bar)
                        strikes = 0
                    return
            except ServerError as error:
                self._present.discard(server.identity)
                if self._absent.get(server.name) != str(error):
                    tqdm.write(str(error))
                self._absent[server.name] = str(error)
                bar.set_description_str(f"{server.name}: gone")
                strikes += server.url in self._running and not error.dead
                await self._put_back(server, left, error)
                if isinstance(error, Denied) or strikes >= _STRIKES:
                    logging.error("%s is not asked again", server.name)
                    return
                if await self._all_ended_or(_PAUSE):
                    return

    async def _is_back(self, server: Server) -> None:
        """Who comes back may be the only one left, and have refused what waits for another."""
        async with self._changed:
            self._present.add(server.identity)
            self._absent.pop(server.name, None)
            self._give_up_refused()
            self._changed.notify_all()

    def _leave(self, server: Server, error: Denied) -> None:
        """What may be on a server that does not let us in any more, perhaps done, is not drawn elsewhere: the next run
        asks there again."""
        for job in list(self._waiting):
            known = self._known.get(job.key)
            if known is not None and known.identity == server.identity:
                self._waiting.remove(job)
                del self._known[job.key]
                said = f"it may have ended there, but {error}"
                self._record(job, Outcome(job.key, UNFETCHED, server.url, known.prompt_id, ended=_now(), error=said))

    async def _clear(self, server: Server, left: dict[str, str]) -> None:
        """Stop prompts whose jobs have gone to another server meanwhile; the others are found again."""
        for prompt_id, key in list(left.items()):
            known = self._known.get(key)
            if known is None or (known.identity, known.prompt_id) != (server.identity, prompt_id):
                await server.cancel(prompt_id)
            del left[prompt_id]

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
        """Whether this server is one for a job: none that has refused it, nor while another may still work on it."""
        known = self._known.get(job.key)
        if known is not None and known.identity != server.identity and known.identity in self._present:
            return False
        return server.url not in self._refused.get(job.key, {})

    async def _run(self, server: Server, listener: Listener, job: Job, bar: Any) -> None:
        """One attempt, to its end. Raises ServerError; stops the prompt where we are cancelled."""

        def heard(node: str, value: int, end: int) -> None:
            kind = job.prompt.get(node, {}).get("class_type", node)
            bar.total, bar.n = end, value
            bar.set_description_str(f"{server.name}: {job.name}: {kind}", refresh=False)
            bar.refresh()

        bar.reset(1)
        bar.set_description_str(f"{server.name}: {job.name}")
        known = self._known.get(job.key)
        attempt = Attempt(server, job, self.results, lambda: self._prompt_id(job))
        try:
            if known is not None and known.identity == server.identity:
                attempt.known = known
            elif known is not None and known.why:
                self._died(job, known, f"{known.why}; it goes to another server")
            outcome = await attempt.run(listener, heard, lambda known, why: self._died(job, known, why))
        except _Deadly as error:
            outcome = Outcome(job.key, ERROR, server.url, ended=_now(), error=str(error))
        except asyncio.CancelledError:
            if await attempt.stop():
                prompt_id = attempt.known.prompt_id if attempt.known else ""
                self.results.add(Outcome(job.key, INTERRUPTED, server.url, prompt_id, error="stopped with the batch"))
            raise
        except ServerError as error:
            self._known.pop(job.key, None)
            if attempt.known is not None:
                self._known[job.key] = replace(attempt.known, why=str(error), dead=error.dead)
            stuck = self._stuck(server, job, attempt, error)
            if stuck is None:
                raise
            outcome = stuck
        await self._end(server, job, outcome)

    def _stuck(self, server: Server, job: Job, attempt: Attempt, error: ServerError) -> Outcome | None:
        """What becomes of a job that fails again and again at one step of a server which answers meanwhile: else it
        would be tried for good, and nothing after it. A prompt that is followed, or sent, has its deaths instead."""
        if not error.dead or attempt.step == SENDING or (isinstance(error, ServerLost) and error.answered):
            return None
        place = (server.url, job.key, attempt.step)
        self._failed[place] += 1
        if self._failed[place] < _STRIKES:
            return None
        said = f"{error}; {_STRIKES} times, though {server.name} answered in between"
        if attempt.known is None:
            return Outcome(job.key, REFUSED, server.url, error=said)
        return Outcome(job.key, UNFETCHED, server.url, attempt.known.prompt_id, ended=_now(), error=said)

    def _died(self, job: Job, known: Known, why: str) -> None:
        """A prompt is given up that was on a server which is gone or has forgotten it. Raises _Deadly."""
        self._known.pop(job.key, None)
        if known.dead:
            url = next((server.url for server in self.servers if server.identity == known.identity), known.identity)
            self.results.add(Outcome(job.key, LOST, url, known.prompt_id, error=why))
            tqdm.write(f"{job.name}: {why}")
            deaths = self.results.deaths[job.key]
            if deaths >= _DEATHS:
                raise _Deadly(f"{deaths} servers were lost while they ran it; the last: {why}")

    async def _end(self, server: Server, job: Job, outcome: Outcome) -> None:
        async with self._changed:
            del self._running[server.url]
            self._known.pop(job.key, None)
            if outcome.status == REFUSED:
                self._refused.setdefault(job.key, {})[server.url] = outcome.error
                if not self._given_up(job):
                    self._waiting.append(job)  # another server may have what this one lacks
            else:
                self._record(job, outcome)
            self._changed.notify_all()

    def _give_up_refused(self) -> None:
        """What waits, and every server that is there has refused; for when a server comes or goes."""
        self._waiting = deque(job for job in self._waiting if not self._given_up(job))

    def _given_up(self, job: Job) -> bool:
        refusals = self._refused.get(job.key)
        if refusals is None or not self._present:
            return False
        if any(s.identity in self._present and s.url not in refusals for s in self.servers):
            return False
        said = "; ".join(dict.fromkeys(refusals.values()))
        self._record(job, Outcome(job.key, REFUSED, " ".join(refusals), ended=_now(), error=said))
        return True

    async def _put_back(self, server: Server, left: dict[str, str], error: ServerError) -> None:
        """What the server was running goes back to the front of the queue."""
        async with self._changed:
            job = self._running.pop(server.url, None)
            if job is not None:
                self._waiting.appendleft(job)
                if (known := self._known.get(job.key)) is not None:
                    left[known.prompt_id] = job.key
            if isinstance(error, Denied):
                self._leave(server, error)
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
