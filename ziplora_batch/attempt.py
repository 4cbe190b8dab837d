"""One attempt at a job on one server: find its prompt or queue it, wait for its end, and bring its pictures home."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from .errors import Denied, NotFound, Refused, ServerError, ServerLost, TooLarge
from .folder import holds
from .jobs import Job, Prompt
from .names import Names, plain
from .progress import Heard, Listener
from .results import DONE, ERROR, INTERRUPTED, REFUSED, UNFETCHED, Outcome, Picture, Results
from .server import Server

SENDING = "sending"
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
    step: str = ""  # what it is at: a failure that comes back comes back there

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
            outcome = self._without_rejected(outcome)
        except Refused as error:
            outcome.status, outcome.error = REFUSED, str(error)
        outcome.seconds = time.monotonic() - began
        outcome.ended = time.strftime("%Y-%m-%d %H:%M:%S")
        return outcome

    async def _restored(self) -> Outcome | None:
        """The outcome that the job has had, where no more than pictures are missing here: with them, or not fetched.
        None where it is to be drawn again, since the server has them no more, or others under their names."""
        done = self.results.done.get(self.job.key)
        if self.known is None or done is None or done.prompt_id != self.known.prompt_id:
            return None
        self.step = "fetching"
        for picture in done.files:
            path = self.results.folder / picture.path
            if picture.sha256 is None or not picture.entry:
                return None  # as an older client left it: the history knows
            if holds(path, picture.size, picture.sha256):
                continue
            try:
                _, digest = await self.server.fetch(picture.entry, path)
            except NotFound:
                self.known = None
                return None
            except ServerError as error:
                await self._check_alive(error)
                return _unfetched(done, f"{picture.entry.get('filename')} cannot be fetched again: {error}")
            if digest != picture.sha256:
                path.unlink(missing_ok=True)
                self.results.rejected.add(self._named(picture.entry, digest))
                self.known = None
                return None
        return done

    def _named(self, entry: dict[str, str], digest: str | None) -> tuple[Any, ...]:
        return (self.job.key, self.server.identity, *sorted(entry.items()), digest)

    async def _check_alive(self, error: ServerError) -> None:
        """Raises ServerLost where a failure to fetch is the whole server's. One file may break off for good while
        everything else is answered, and would keep its job, and what comes after it, from ever ending."""
        if error.dead and not await self.server.alive():
            raise ServerLost(str(error)) from error

    def _without_rejected(self, outcome: Outcome) -> Outcome:
        """Not done, where it has the very picture, under the very name, that was another row's a moment ago."""
        wrong = [p for p in outcome.files if self._named(p.entry, p.sha256) in self.results.rejected]
        if not wrong:
            return outcome
        for picture in wrong:
            (self.results.folder / picture.path).unlink(missing_ok=True)
        self.results.withdraw(self.job.key)  # or the next run would find this prompt, and take what it made
        self.server.forgetful = False
        said = f"{wrong[0].entry['filename']} is another picture on {self.server.name}, and was not drawn anew"
        return _unfetched(self.results.done[self.job.key], said)

    async def _ended(
        self, listener: Listener, heard: Heard, lost: Callable[[Known, str], None]
    ) -> tuple[dict[str, Any], str]:
        """The history, and the id, of the job's prompt: of one that is there, or of a new one."""
        if self.known is not None:
            age = time.time() - self.known.since
            known = self.known
            self.step = "looking"
            found = await self.server.find(known.prompt_id, min(max(_DELIVERY - age, 0.0), _DELIVERY))
            if found is not None:
                why = "stopped before"
                if dropped := await self.server.dropped(found):  # as it does not say why, it is asked again
                    await self.server.end(known.prompt_id)
                    why = f"without {', '.join(dropped)}, which the server did not accept"
                else:
                    self.step = "following"
                    entry = await self.server.follow(listener, known.prompt_id, heard)
                    if not _interrupted(entry):
                        return entry, known.prompt_id
                stopped = Outcome(self.job.key, INTERRUPTED, self.server.url, known.prompt_id, error=why)
                self.results.add(stopped)
            elif known.why:
                lost(known, f"{self.server.name} has forgotten the prompt")
            self.known = None
        forgot = await self._forget()
        entry, prompt_id = await self._drawn(listener, heard)
        if forgot and self.server.remembered(entry):  # it took the prompt before it forgot, which by now it has
            entry, prompt_id = await self._drawn(listener, heard)
        return entry, prompt_id

    async def _drawn(self, listener: Listener, heard: Heard) -> tuple[dict[str, Any], str]:
        """The history, and the id, of a new prompt."""
        self.known = None
        prompt_id = self.new_id()
        await self._queue(prompt_id)
        self.step = "following"
        return await self.server.follow(listener, prompt_id, heard), prompt_id

    async def _queue(self, prompt_id: str) -> None:
        """Raises Refused also where the server, which answers otherwise, takes this prompt or its pictures not."""
        try:
            prompt = await self._uploaded()
            self.step = SENDING
            self.results.sending(self.job.key, self.server.url, prompt_id)
            self.known = Known(self.server.identity, prompt_id, since=time.time())
            await self.server.queue(prompt, prompt_id)
        except (Refused, Denied):
            self._not_taken()
            raise
        except ServerLost:
            raise
        except ServerError as error:
            certain = error.status or self.known is None  # nothing was sent, or it is known not to have arrived
            if isinstance(error, TooLarge) or (certain and await self.server.alive()):
                self._not_taken()
                raise Refused(str(error)) from error
            raise

    async def _forget(self) -> bool:
        """What was drawn before would come out of the server's cache, by its old name, whatever that means now.
        Whether the server is to forget it now."""
        last = self.results.last.get(self.job.key)
        drawn = self.job.key in self.results.done or (last is not None and last.status == UNFETCHED)
        if not drawn or self.server.forgetful:
            return False
        self.step = "forgetting"
        try:
            await self.server.forget()
        except ServerError as error:  # one that has no such request is asked to draw all the same
            await self._check_alive(error)
            return False
        return True

    def _not_taken(self) -> None:
        if self.known is not None:
            self.results.withdraw(self.job.key)
            self.known = None

    async def _uploaded(self) -> Prompt:
        """The prompt, with the names that the server has for the job's own pictures."""
        if not self.job.uploads:
            return self.job.prompt
        self.step = "uploading"
        names = {name: await self.server.upload(picture, name) for name, picture in self.job.uploads.items()}

        def renamed(value: Any) -> Any:
            return names.get(value, value) if isinstance(value, str) else value

        return {
            key: {**node, "inputs": {name: renamed(value) for name, value in node["inputs"].items()}}
            for key, node in self.job.prompt.items()
        }

    def _read(self, entry: dict[str, Any], outcome: Outcome) -> None:
        """Status, texts and the names of other files."""
        texts = [str(t) for shown in _shown(entry) for t in _list(shown.get("text"))]
        outcome.report = "\n\n".join(dict.fromkeys(texts))
        named = [(file["subfolder"], file["filename"]) for file in _files(entry, False)]
        outcome.saved = ["/".join(filter(None, steps)) for steps in named]
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
        self.step = "fetching"
        names = Names()
        place = PurePosixPath("files", f"{plain(self.job.name, 76)} {self.job.key[:32]}")
        for called in _files(entry, True):
            path = place / names.unique(called["subfolder"], called["filename"])
            try:
                size, digest = await self.server.fetch(called, Path(self.results.folder, path))
            except ServerError as error:
                await self._check_alive(error)
                outcome.status, outcome.error = UNFETCHED, f"it has ended, but {called['filename']} is missing: {error}"
                if isinstance(error, NotFound):
                    outcome.error += "; --retry-errors draws it again"
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
        entry = await self.server.end(prompt_id)
        return entry is None or _interrupted(entry)  # else it had ended just before


def _unfetched(done: Outcome, why: str) -> Outcome:
    """What has been done, and is not here any more: the next run asks for the same pictures."""
    return replace(done, status=UNFETCHED, ended=time.strftime("%Y-%m-%d %H:%M:%S"), error=why)


def _interrupted(entry: dict[str, Any]) -> bool:
    status = (entry.get("status") or {}).get("status_str")
    return status != "success" and "execution_error" not in _messages(entry)


def _messages(entry: dict[str, Any]) -> dict[str, Any]:
    """What a history says of the run, by kind."""
    found = _list((entry.get("status") or {}).get("messages"))
    return {m[0]: m[1] for m in found if isinstance(m, list) and len(m) == 2 and isinstance(m[0], str)}


def _shown(entry: dict[str, Any]) -> list[dict[str, Any]]:
    return [shown for shown in entry["outputs"].values() if isinstance(shown, dict)]


def _files(entry: dict[str, Any], pictures: bool) -> Iterator[dict[str, str]]:
    """filename, subfolder and type of what the nodes wrote into the output folder: pictures, or everything else."""
    for shown in _shown(entry):
        for kind, entries in shown.items():
            for file in _list(entries):
                named = isinstance(file, dict) and isinstance(file.get("filename"), str) and file["filename"]
                if named and file.get("type") == "output" and (kind == "images") == pictures:
                    yield {k: str(file.get(k) or "") for k in ("filename", "subfolder", "type")}


def _list(found: Any) -> list[Any]:
    return found if isinstance(found, list) else []
