"""One attempt at a job on one server: find its prompt or queue it, wait for its end, and bring its pictures home."""

from __future__ import annotations

import asyncio
import copy
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from .errors import Denied, Refused, ServerError, ServerLost, TooLarge
from .folder import holds
from .jobs import Job, Prompt
from .names import Names, plain
from .progress import Heard, Listener
from .results import DONE, ERROR, INTERRUPTED, REFUSED, UNFETCHED, Outcome, Picture, Results
from .server import Server

_DELIVERY = 10.0  # seconds that a prompt which a dying client sent may take to arrive


@dataclass(frozen=True)
class Known:
    """A prompt of a job that a server may have. identity: of the server. why: how the server was lost while the prompt
    ran, or nothing. dead: whether that counts against the job."""

    identity: str
    prompt_id: str
    why: str = ""
    dead: bool = False
    since: float = 0.0  # when it was sent, in seconds since 1970


@dataclass
class Attempt:
    """known: the prompt that the job may have on this server, as far as we know; after a failure, for the runner."""

    server: Server
    job: Job
    results: Results
    new_id: Callable[[], str]  # for a new prompt
    known: Known | None = None

    async def run(self, listener: Listener, heard: Heard, lost: Callable[[Known, str], None]) -> Outcome:
        """How it ended. lost: called for a prompt that the server knew before it died, and has forgotten; it may raise.

        Raises ServerError for what concerns the server and not the job.
        """
        began = time.monotonic()
        outcome = Outcome(self.job.key, DONE, self.server.url)
        try:
            restored = await self._restored()
            if restored is not None:
                return restored
            entry, outcome.prompt_id = await self._ended(listener, heard, lost)
            self._read(entry, outcome)
            await self._fetch(entry, outcome)
        except Refused as error:
            outcome.status, outcome.error = REFUSED, str(error)
        outcome.seconds = time.monotonic() - began
        outcome.ended = time.strftime("%Y-%m-%d %H:%M:%S")
        return outcome

    async def _restored(self) -> Outcome | None:
        """The outcome that the job has had, where no more than pictures are missing here, and the server still has the
        same ones."""
        last = self.results.last.get(self.job.key)
        if self.known is None or last is None or last.status != DONE:
            return None
        for picture in last.files:
            path = self.results.folder / picture.path
            if picture.sha256 is None or not picture.entry:
                return None  # as an older client left it: the history knows
            if not holds(path, picture.size, picture.sha256):
                try:
                    _, digest = await self.server.fetch(picture.entry, path)
                except ServerError as error:
                    if error.dead:
                        raise ServerLost(str(error)) from error
                    digest = ""
                if digest != picture.sha256:
                    self.known = None  # its name means another picture now, or none
                    return None
        return last

    async def _ended(
        self, listener: Listener, heard: Heard, lost: Callable[[Known, str], None]
    ) -> tuple[dict[str, Any], str]:
        """The history, and the id, of the job's prompt: of one that is there, or of a new one."""
        if self.known is not None:
            age = time.time() - self.known.since
            known = self.known
            if await self.server.find(known.prompt_id, min(max(_DELIVERY - age, 0.0), _DELIVERY)):
                entry = await self.server.follow(listener, known.prompt_id, heard)
                if not _interrupted(entry):
                    return entry, known.prompt_id
                stopped = Outcome(self.job.key, INTERRUPTED, self.server.url, known.prompt_id, error="stopped before")
                self.results.add(stopped)
            elif known.why:
                lost(known, f"{self.server.name} has forgotten the prompt")
            self.known = None
        prompt_id = self.new_id()
        await self._queue(prompt_id)
        return await self.server.follow(listener, prompt_id, heard), prompt_id

    async def _queue(self, prompt_id: str) -> None:
        """Raises Refused also where the server, which answers otherwise, takes this prompt or its pictures not."""
        try:
            prompt = await self._uploaded()
            self.results.sending(self.job.key, self.server.url, prompt_id)
            self.known = Known(self.server.identity, prompt_id, since=time.time())
            await self.server.queue(prompt, prompt_id)
        except (Refused, Denied):
            self._not_taken()
            raise
        except ServerLost:
            raise
        except ServerError as error:
            if isinstance(error, TooLarge) or (error.status and await self.server.alive()):
                self._not_taken()
                raise Refused(str(error)) from error
            raise

    def _not_taken(self) -> None:
        if self.known is not None:
            self.results.withdraw(self.job.key)
            self.known = None

    async def _uploaded(self) -> Prompt:
        """The prompt, with the names that the server has for the job's own pictures."""
        if not self.job.uploads:
            return self.job.prompt
        prompt = copy.deepcopy(self.job.prompt)
        names = {name: await self.server.upload(picture, name) for name, picture in self.job.uploads.items()}
        for node in prompt.values():
            for key, value in node["inputs"].items():
                if isinstance(value, str) and value in names:
                    node["inputs"][key] = names[value]
        return prompt

    def _read(self, entry: dict[str, Any], outcome: Outcome) -> None:
        """Status, texts and the names of other files."""
        texts = [str(t) for shown in _shown(entry) for t in _list(shown.get("text"))]
        outcome.report = "\n\n".join(dict.fromkeys(texts))
        outcome.saved = ["/".join(filter(None, (f.get("subfolder"), f["filename"]))) for _, f in _files(entry, False)]
        if (entry.get("status") or {}).get("status_str") == "success":
            return
        failed = _messages(entry).get("execution_error")
        if not isinstance(failed, dict):
            outcome.status, outcome.error = INTERRUPTED, "interrupted on the server"
        else:
            node = f"{failed.get('node_type')} ({failed.get('node_id')})"
            text = str(failed.get("exception_message", "")).strip()
            outcome.status, outcome.error = ERROR, f"{node}: {failed.get('exception_type')}: {text}"

    async def _fetch(self, entry: dict[str, Any], outcome: Outcome) -> None:
        """Its pictures. What cannot be had of a server that answers is no reason to draw it again."""
        names = Names()
        place = PurePosixPath("files", f"{plain(self.job.name, 100)} {self.job.key[:8]}")
        for _, file in _files(entry, True):
            path = place / names.unique(str(file.get("subfolder") or ""), file["filename"])
            called = {k: str(file.get(k) or "") for k in ("filename", "subfolder", "type")}
            try:
                size, digest = await self.server.fetch(called, Path(self.results.folder, path))
            except ServerError as error:
                if error.dead:
                    raise ServerLost(str(error)) from error
                outcome.status, outcome.error = UNFETCHED, f"it has ended, but {called['filename']} is missing: {error}"
                continue
            outcome.files.append(Picture(path.as_posix(), size, digest, called))

    async def stop(self) -> bool:
        """Stop its prompt, because the batch stops; whether it is certain that nothing of it goes on."""
        if self.known is None:
            return True
        try:
            return await asyncio.wait_for(self._stop(self.known.prompt_id), 5)
        except (ServerError, asyncio.TimeoutError):
            return False  # the next run finds it

    async def _stop(self, prompt_id: str) -> bool:
        await self.server.settled()
        while True:
            await self.server.cancel(prompt_id)  # again and again: one that comes as the prompt begins is lost
            entry = await self.server.history(prompt_id)
            if entry is not None:
                return _interrupted(entry)  # else it had ended just before
            if prompt_id not in await self.server.queued():
                return await self.server.history(prompt_id) is None
            await asyncio.sleep(0.1)


def _interrupted(entry: dict[str, Any]) -> bool:
    status = (entry.get("status") or {}).get("status_str")
    return status != "success" and "execution_error" not in _messages(entry)


def _messages(entry: dict[str, Any]) -> dict[str, Any]:
    """What a history says of the run, by kind."""
    found = _list((entry.get("status") or {}).get("messages"))
    return {m[0]: m[1] for m in found if isinstance(m, list) and len(m) == 2 and isinstance(m[0], str)}


def _shown(entry: dict[str, Any]) -> list[dict[str, Any]]:
    return [shown for shown in entry["outputs"].values() if isinstance(shown, dict)]


def _files(entry: dict[str, Any], pictures: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """(kind, entry) of what the nodes wrote into the output folder: pictures, or everything else."""
    for shown in _shown(entry):
        for kind, entries in shown.items():
            for file in _list(entries):
                named = isinstance(file, dict) and isinstance(file.get("filename"), str) and file["filename"]
                if named and file.get("type") == "output" and (kind == "images") == pictures:
                    yield kind, file


def _list(found: Any) -> list[Any]:
    return found if isinstance(found, list) else []
