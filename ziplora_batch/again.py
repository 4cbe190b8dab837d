"""A result made again from nothing but its own file, and compared with it."""

from __future__ import annotations

import json
import re
import tempfile
import uuid
from pathlib import Path
from typing import Any

from .jobs import BatchError, Prompt, read_workflow
from .server import Refused, Server


async def again(file: Path, server: Server) -> int:
    """Queue the workflow that a file carries and say whether the same came out: 0 where it is the same, bit for bit.

    Raises BatchError, ServerLost.
    """
    prompt = carried(file)
    async with server:
        await server.forget()
        prompt_id = str(uuid.uuid4())
        async with server.listening() as socket:
            try:
                await server.queue(prompt, prompt_id)
            except Refused as error:
                raise BatchError(f"{server.name} does not accept the workflow of {file.name}: {error}") from error
            entry = await server.follow(socket, prompt_id)
        failed = dict(entry["status"]["messages"]).get("execution_error")
        if failed is not None:
            raise BatchError(f"the workflow of {file.name} failed: {failed['exception_message'].strip()}")
        made = [f for shown in entry["outputs"].values() for f in _files(shown) if _same_kind(f["filename"], file)]
        if not made:
            raise BatchError(f"the workflow of {file.name} wrote no {file.suffix} file")
        with tempfile.TemporaryDirectory() as folder:
            found = []
            for number, written in enumerate(made):
                path = Path(folder) / f"{number}{file.suffix}"
                await server.fetch(written, path)
                found.append((difference(file, path), written["filename"]))
    if any(said is None for said, _ in found):
        print(f"the same, bit for bit: {next(name for said, name in found if said is None)}")
        return 0
    for said, name in found:
        print(f"{name} differs: {said}")
    return 1


def carried(file: Path) -> Prompt:
    """The workflow in API form that a file carries. Raises BatchError."""
    said = _metadata(file).get("prompt")
    if said is None:
        raise BatchError(f"{file} carries no workflow: it was written with --disable-metadata, or by other means")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / file.name
        path.write_text(said, encoding="utf-8")
        return read_workflow(path)


def _metadata(file: Path) -> dict[str, str]:
    if not file.is_file():
        raise BatchError(f"{file} is missing")
    if file.suffix == ".safetensors":
        return _safetensors(file)[0].get("__metadata__", {})
    if file.suffix == ".png":
        return dict(_image(file).info)
    raise BatchError(f"{file} is neither a .png nor a .safetensors")


def _image(file: Path) -> Any:
    from PIL import Image

    try:
        with Image.open(file) as image:
            image.load()
            return image
    except OSError as error:
        raise BatchError(f"{file} cannot be read: {error}") from error


def _safetensors(file: Path) -> tuple[dict[str, Any], bytes]:
    """(header, numbers)"""
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    try:
        header = json.loads(data[8 : 8 + length])
    except ValueError as error:
        raise BatchError(f"{file} is no safetensors file") from error
    return header, data[8 + length :]


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
    if before.suffix == ".png":
        old, new = (_image(path).convert("RGB") for path in (before, after))
        if old.size != new.size:
            return f"{old.size[0]} x {old.size[1]} pixels before, {new.size[0]} x {new.size[1]} now"
        count = sum(a != b for a, b in zip(old.tobytes(), new.tobytes(), strict=True))
        return f"{count:,} of {len(old.tobytes()):,} values" if count else None
    (old, old_data), (new, new_data) = (_safetensors(path) for path in (before, after))
    names = [name for name in {**old, **new} if name != "__metadata__"]
    others = [name for name in names if _tensor(old, old_data, name) != _tensor(new, new_data, name)]
    if not others:
        return None
    return f"{len(others):,} of {len(names):,} tensors, the first '{others[0]}'{_why(old, new)}"


def _tensor(header: dict[str, Any], data: bytes, name: str) -> tuple[Any, ...] | None:
    if name not in header:
        return None
    start, end = header[name]["data_offsets"]
    return header[name]["dtype"], header[name]["shape"], data[start:end]


def _why(old: dict[str, Any], new: dict[str, Any]) -> str:
    """Inputs and versions that changed between two files, from what they say of themselves."""
    said = []
    before, after = (_about(header.get("__metadata__", {})) for header in (old, new))
    for concept in ("content", "style"):
        was, now = (about.get(concept, {}).get("sha256", "") for about in (before, after))
        if was != now:
            said.append(f"the {concept} LoRA '{before.get(concept, {}).get('name')}' is another file now")
    versions = [about.get("versions", {}) for about in (before, after)]
    said.extend(f"{k} {v} then, {versions[1].get(k)} now" for k, v in versions[0].items() if versions[1].get(k) != v)
    return "".join(f"; {words}" for words in said)


def _about(metadata: dict[str, str]) -> dict[str, Any]:
    return {**json.loads(metadata.get("ziplora", "{}")), **json.loads(metadata.get("ziplora_pair", "{}"))}
