"""A result made again from nothing but its own file, and compared with it."""

from __future__ import annotations

import asyncio
import contextlib
import re
import tempfile
import uuid
from pathlib import Path
from typing import Any

from . import carried, trusted
from .carried import Tensors
from .connection import looks
from .errors import BatchError, Refused, ServerError
from .jobs import Prompt
from .server import Server

_CANCELLING = 20.0  # seconds that it may take in all
_NOTICING = 5.0  # seconds that a node may take to notice that it is interrupted


async def again(file: Path, server: Server, yes: bool = False) -> int:
    """Queue the workflow that a file carries and say whether the same came out: 0 where it is the same, bit for bit.

    yes: whatever nodes it has. Raises BatchError, also for nodes that nobody has agreed to, and ServerError.
    """
    prompt = carried.workflow(file)
    print("nodes:", ", ".join(map(trusted.plain, trusted.node_types(prompt))), flush=True)
    async with server:
        if not yes:
            _check_trusted(file, trusted.doubts(prompt, await server.nodes()))
        await server.forget()
        try:
            entry = await _run(prompt, server)
            if server.remembered(entry):  # it took the prompt before it forgot, which by now it has
                entry = await _run(prompt, server)
        except Refused as error:
            raise BatchError(f"{server.name} does not accept the workflow of {file.name}: {error}") from error
        _check_success(file, entry)
        made = [f for shown in entry["outputs"].values() for f in _files(shown) if _same_kind(f["filename"], file)]
        if not made:
            raise BatchError(f"the workflow of {file.name} wrote no {file.suffix} file")
        with tempfile.TemporaryDirectory() as folder:
            found = []
            for number, written in enumerate(made):
                path = Path(folder) / f"{number}{carried.kind(file)}"
                await server.fetch(written, path)
                found.append((difference(file, path), written["filename"]))
    if any(said is None for said, _ in found):
        print(f"the same, bit for bit: {next(name for said, name in found if said is None)}")
        return 0
    for said, name in found:
        print(f"{name} differs: {said}")
    return 1


def _check_trusted(file: Path, doubts: list[str]) -> None:
    if doubts:
        raise BatchError(
            f"{file} wants nodes that are not run unasked: {'; '.join(doubts)}. Where you trust whoever made the file, "
            "add --yes"
        )


async def _run(prompt: Prompt, server: Server) -> dict[str, Any]:
    """The history of a prompt once it has ended. What ends the wait before, Ctrl-C too, cancels it there."""
    prompt_id = str(uuid.uuid4())
    sending = asyncio.ensure_future(server.queue(prompt, prompt_id))
    try:
        await asyncio.shield(sending)  # or one could not tell whether it is still to arrive there
        async with server.listening() as listener:
            return await server.follow(listener, prompt_id)
    except BaseException:

        async def cancel() -> None:
            await sending
            async for _ in looks(_NOTICING):  # an interrupt that comes as a prompt begins is lost
                await server.cancel(prompt_id)
                if prompt_id not in await server.queued():
                    return

        with contextlib.suppress(Refused, ServerError, asyncio.TimeoutError):
            await asyncio.wait_for(cancel(), _CANCELLING)
        raise


def _check_success(file: Path, entry: dict[str, Any]) -> None:
    status = entry.get("status") or {}
    if status.get("status_str", "success") == "success":
        return
    said = [m[1] for m in status.get("messages") or [] if isinstance(m, list) and m[:1] == ["execution_error"]]
    if not said:
        raise BatchError(f"the workflow of {file.name} was interrupted on the server")
    raise BatchError(f"the workflow of {file.name} failed: {str(_table(said[0]).get('exception_message')).strip()}")


def _files(shown: dict[str, Any]) -> list[dict[str, str]]:
    return [
        file
        for entries in shown.values()
        for file in (entries if isinstance(entries, list) else [])
        if isinstance(file, dict) and "filename" in file and file.get("type") == "output"
    ]


def _same_kind(name: str, file: Path) -> bool:
    """zipped_00002_.safetensors is the next of zipped_00001_.safetensors."""
    return re.sub(r"\d+", "", name) == re.sub(r"\d+", "", file.name)


def difference(before: Path, after: Path) -> str | None:
    """What tells two files apart in their numbers, in words; None where nothing does."""
    if carried.kind(before) == ".png":
        old, new = (carried.image(path).convert("RGB") for path in (before, after))
        if old.size != new.size:
            return f"{old.size[0]} x {old.size[1]} pixels before, {new.size[0]} x {new.size[1]} now"
        count = sum(a != b for a, b in zip(old.tobytes(), new.tobytes(), strict=True))
        return f"{count:,} of {len(old.tobytes()):,} values" if count else None
    was, now = Tensors.read(before), Tensors.read(after)
    names = list(dict.fromkeys([*was.entries, *now.entries]))
    others = [name for name in names if was.tensor(name) != now.tensor(name)]
    if not others:
        return None
    return f"{len(others):,} of {len(names):,} tensors, the first '{others[0]}'{_why(was, now)}"


def _why(old: Tensors, new: Tensors) -> str:
    """Inputs and versions that changed between two files, from what they say of themselves."""
    said = []
    before, after = old.about(), new.about()
    for concept in ("content", "style"):
        was, now = (_table(about.get(concept)) for about in (before, after))
        if was.get("sha256", "") != now.get("sha256", ""):
            said.append(f"the {concept} LoRA '{was.get('name')}' is another file now")
    then, today = (_table(about.get("versions")) for about in (before, after))
    said.extend(f"{k} {v} then, {today.get(k)} now" for k, v in then.items() if today.get(k) != v)
    return "".join(f"; {words}" for words in said)


def _table(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
