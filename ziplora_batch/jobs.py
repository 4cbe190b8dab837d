"""From a workflow in API form and a table, or two folders, to prompts: one for each row."""

from __future__ import annotations

import copy
import csv
import hashlib
import io
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from . import folder as disk
from .errors import BatchError
from .names import plain, relative

Prompt = dict[str, dict[str, Any]]

NAME = "name"  # the column that names a row, and its folder in the results
PICTURES = (".png", ".jpg", ".jpeg", ".webp")
# Columns that stand for what a chain of nodes ends in: (the input where the chain arrives, the input at its start).
CHAINS = {
    "content_prompt": ("content_positive", "text"),
    "style_prompt": ("style_positive", "text"),
    "content_picture": ("content_latents", "image"),
    "style_picture": ("style_latents", "image"),
    "prompt": ("positive", "text"),
}


@dataclass(eq=False)
class Job:
    """One prompt. key: SHA-256 of everything that it is made from. values: its row. uploads: local pictures by the name
    that the prompt has for them."""

    number: int
    name: str
    values: dict[str, Any]
    prompt: Prompt
    key: str
    uploads: dict[str, Path] = field(default_factory=dict)


@dataclass
class Row:
    """values: column -> value. files: column -> the local file that it names, where there is one. uploads: value -> a
    local picture that servers are to have by this name."""

    values: dict[str, Any]
    files: dict[str, Path] = field(default_factory=dict)
    uploads: dict[str, Path] = field(default_factory=dict)


def read_workflow(path: Path) -> Prompt:
    """A workflow in API form. Raises BatchError, also for a graph of the frontend."""
    try:
        return parse_workflow(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise BatchError(f"{path} cannot be read as JSON: {error}") from error


def parse_workflow(text: str, path: str) -> Prompt:
    """The same from its text. path: what an error calls it."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BatchError(f"{path} cannot be read as JSON: {error}") from error
    if isinstance(found, dict) and "nodes" in found and "links" in found:
        raise BatchError(f"{path} is a graph of the frontend; export it with Workflow → Export (API)")
    if not isinstance(found, dict) or not found or not all(_is_node(node) for node in found.values()):
        raise BatchError(f"{path} is no workflow in API form: it must map ids to nodes with class_type and inputs")
    for key, node in found.items():
        for name, value in node["inputs"].items():
            if _is_link(value) and value[0] not in found:  # which would end a server's worker, and its queue with it
                raise BatchError(f"{path}: {key}.{name} is linked to node '{value[0]}', which is not there")
    # A picture's workflow tells also which versions of its files were read, and a server that is told does not look:
    # it would take what it drew of them for what it would draw of the files that are there now.
    return {key: {name: of for name, of in node.items() if name != "is_changed"} for key, node in found.items()}


def _is_node(node: Any) -> bool:
    return isinstance(node, dict) and isinstance(node.get("class_type"), str) and isinstance(node.get("inputs"), dict)


def read_table(path: Path) -> list[Row]:
    """Rows of a .csv (first line: columns) or a .jsonl (an object a line). Empty cells leave the workflow's value.

    Raises BatchError.
    """
    text = _text(path)
    rows = list(_jsonl(path, text) if path.suffix.lower() in (".jsonl", ".ndjson") else _csv(path, text))
    if not rows:
        raise BatchError(f"{path} has no rows")
    return [Row({k: v for k, v in row.items() if v not in (None, "")}) for row in rows]


def _csv(path: Path, text: str) -> Iterator[dict[str, Any]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        yield from (row for _, row in cells(path, reader))
    except csv.Error as error:
        raise BatchError(f"{path}, line {reader.line_num}: {error}") from error


def cells(path: Path, reader: csv.DictReader[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line number and cells of every row that is not empty. Raises BatchError for one of other columns."""
    for row in reader:
        if None in row or None in row.values():
            raise BatchError(f"{path}, line {reader.line_num}: {len(reader.fieldnames or ())} columns expected")
        if any(row.values()):
            yield reader.line_num, row


def _jsonl(path: Path, text: str) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise BatchError(f"{path}, line {number}: {error}") from error
            if not isinstance(row, dict):
                raise BatchError(f"{path}, line {number}: an object expected, found {line[:40]}")
            yield row


def cross(subjects: Path, styles: Path, drawn: str | None) -> list[Row]:
    """Every subject with every style. Beside `dog.safetensors` may lie `dog.txt`, the prompt that it was trained with,
    and a picture of it. drawn: what to draw, with {content} and {style} for the two prompts.

    Raises BatchError.
    """
    rows = []
    sides = {"content": _loras(subjects), "style": _loras(styles)}
    for content in sides["content"]:
        for style in sides["style"]:
            row = Row({NAME: f"{content.stem} + {style.stem}"})
            said: dict[str, str] = {}
            for concept, file in (("content", content), ("style", style)):
                row.values[f"{concept}_lora"] = file.name
                row.files[f"{concept}_lora"] = file
                words = file.with_suffix(".txt")
                if words.is_file():
                    said[concept] = row.values[f"{concept}_prompt"] = _text(words).strip()
                picture = next((p for e in PICTURES if (p := file.with_suffix(e)).is_file()), None)
                if picture is not None:
                    name = plain(f"{sha256(picture)[:12]}_{picture.name}")
                    row.values[f"{concept}_picture"] = name
                    row.uploads[name] = picture
            if drawn is not None:
                try:
                    row.values["prompt"] = drawn.format(**said)
                except (LookupError, ValueError, AttributeError) as error:
                    raise BatchError(
                        f"--prompt '{drawn}' needs a text file beside each LoRA, and no braces but {{content}} and "
                        f"{{style}}: {error!r} for {row.values[NAME]}"
                    ) from error
            rows.append(row)
    return rows


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise BatchError(f"{path} cannot be read: {error}") from error


def _loras(place: Path) -> list[Path]:
    found = sorted(place.rglob("*.safetensors")) if place.is_dir() else []
    if not found:
        raise BatchError(f"{place} holds no .safetensors")
    return found


def listed_name(file: Path, listed: Iterable[str]) -> str:
    """The name, among those that a server lists, that most of a local path ends in. Raises BatchError."""
    parts = file.resolve().parts
    best: dict[int, list[str]] = {}
    for name in listed:
        of_name = tuple(name.replace("\\", "/").split("/"))
        if parts[-len(of_name) :] == of_name:
            best.setdefault(len(of_name), []).append(name)
    if not best:
        raise BatchError(f"the server lists no LoRA that {file} could be; put it into the server's loras folder")
    return best[max(best)][0]


def make(workflow: Prompt, rows: Iterable[Row], folders: Iterable[Path] = ()) -> list[Job]:
    """A job for each row. folders: where the files that a prompt names may lie, so that their contents count.

    Raises BatchError for a column that means no input of the workflow, or several, and a value of the wrong kind.
    """
    jobs = []
    for number, row in enumerate(rows, 1):
        try:
            jobs.append(_job(workflow, number, row, folders))
        except RecursionError as error:
            raise BatchError(f"row {number}, or the workflow, nests lists too deep: {error}") from error
    return jobs


def _job(workflow: Prompt, number: int, row: Row, folders: Iterable[Path]) -> Job:
    prompt = copy.deepcopy(workflow)
    for column, value in row.values.items():
        if column != NAME:
            node, name = target(workflow, column)
            prompt[node]["inputs"][name] = _like(value, workflow[node]["inputs"][name], f"row {number}, {column}")
    for inner in prompt.values():
        inner.pop("_meta", None)
    label = str(row.values.get(NAME) or " + ".join(str(v) for k, v in row.values.items() if k.endswith("_lora")))
    own = {str(row.values[column]): file for column, file in row.files.items()}
    key = _key(prompt, {**_found(prompt, folders), **own, **row.uploads})
    return Job(number, label or f"row {number}", dict(row.values), prompt, key, row.uploads)


def target(workflow: Prompt, column: str) -> tuple[str, str]:
    """(node id, input) that a column means: `input`, `id.input`, `title.input`, or a name in CHAINS.

    Raises BatchError.
    """
    place, _, name = column.rpartition(".")
    found = [
        (key, name)
        for key, node in workflow.items()
        if place in ("", key, _own_title(node)) and name in node["inputs"] and not _is_link(node["inputs"][name])
    ]
    if not found and column in CHAINS:
        found = list(dict.fromkeys(_chain_starts(workflow, *CHAINS[column])))
    if len(found) == 1:
        return found[0]
    if found:
        raise BatchError(
            f"column '{column}' means {len(found)} inputs of the workflow; write one of: "
            + ", ".join(f"{key}.{name} ({_title(workflow[key])})" for key, name in found)
        )
    known = sorted({n for node in workflow.values() for n, v in node["inputs"].items() if not _is_link(v)})
    raise BatchError(f"column '{column}' means no input of the workflow; it has: {', '.join(known)}")


def _chain_starts(workflow: Prompt, arrives: str, start: str) -> Iterator[tuple[str, str]]:
    for node in workflow.values():
        link = node["inputs"].get(arrives)
        level = [link[0]] if _is_link(link) else []
        seen = set(level)
        while level:
            starts = [key for key in level if isinstance(workflow.get(key, {}).get("inputs", {}).get(start), str)]
            if starts:
                yield starts[0], start
                break
            links = [v for key in level for v in workflow.get(key, {}).get("inputs", {}).values() if _is_link(v)]
            level = [key for key in dict.fromkeys(v[0] for v in links) if key not in seen]
            seen.update(level)


def _is_link(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and isinstance(value[0], str) and isinstance(value[1], int)


def _title(node: Mapping[str, Any]) -> str:
    return _own_title(node) or str(node["class_type"])


def _own_title(node: Mapping[str, Any]) -> str | None:
    about = node.get("_meta")
    title = about.get("title") if isinstance(about, dict) else None
    return title if isinstance(title, str) and title else None


def _like(value: Any, old: Any, where: str) -> Any:
    """A table's text as the kind of value that the workflow has there."""
    if not isinstance(value, str) or isinstance(old, str):
        return value
    try:
        if isinstance(old, bool):
            return {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}[value.lower()]
        if isinstance(old, int | float):
            return int(value) if value.strip().lstrip("+-").isdigit() else float(value)
        return json.loads(value)
    except (KeyError, ValueError, RecursionError) as error:
        raise BatchError(f"{where}: '{value[:200]}' is not of the kind of the workflow's {old!r}") from error


def _found(prompt: Prompt, folders: Iterable[Path]) -> dict[str, Path]:
    """Inputs that are plain relative names of files in a folder: a prompt is none, however it begins, and what lies
    elsewhere on this machine is nobody's business."""
    texts = {v for node in prompt.values() for v in node["inputs"].values() if isinstance(v, str) and relative(v)}
    return {text: path for text in texts for folder in folders if _is_file(path := folder / text)}


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # too long a name for this disk, which is therefore none of its files
        return False


def _key(prompt: Prompt, files: Mapping[str, Path]) -> str:
    made_from = {"prompt": prompt, "files": {name: sha256(path) for name, path in files.items()}}
    return hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()


def sha256(path: Path) -> str:
    """Of a file's contents, once per version of it."""
    status = path.stat()
    return _sha256(path, status.st_size, status.st_mtime_ns)


@cache
def _sha256(path: Path, size: int, changed: int) -> str:
    return disk.sha256(path)
