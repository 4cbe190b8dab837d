"""A user study: pictures of several methods, read from a table or from results folders, as one page to vote on."""

from __future__ import annotations

import base64
import csv
import hashlib
import html
import io
import json
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import folder as disk
from . import jobs
from .errors import BatchError
from .results import DONE, as_it_was

QUESTION = "Which picture draws the subject best in the style?"
KEYS = 9  # pictures that a question can have: a digit each
SUBJECT, STYLE, PROMPT = "subject", "style", "prompt"
_REFERENCES = ("subject_picture", "style_picture")
_OWN = (SUBJECT, STYLE, *_REFERENCES, PROMPT)  # columns of a table that are no methods
_OF_RESULTS = ("content_lora", "style_lora", "content_picture", "style_picture", PROMPT)  # the same, of results.csv
_TEMPLATE = Path(__file__).with_name("study.html")


@dataclass(frozen=True)
class Row:
    """Pictures of one subject in one style, a method each. references: of subject and of style, where known."""

    subject: str
    style: str
    prompt: str
    references: tuple[Path | None, Path | None]
    pictures: Mapping[str, Path]


def read_table(path: Path) -> list[Row]:
    """Rows of a .csv: columns subject, style, perhaps subject_picture, style_picture and prompt; any other is a method,
    and its cells are pictures. Files are relative to the table. Raises BatchError."""
    rows = []
    for line, cells in _csv(path):
        _has(path, cells, (SUBJECT, STYLE))
        methods = [column for column in cells if column not in _OWN]
        if len(methods) < 2:
            raise BatchError(f"{path} has the columns {', '.join(cells)}; expected two or more that are methods")
        files = {
            column: _file(path.parent / cells[column], f"{path}, line {line}, {column}")
            for column in (*_REFERENCES, *methods)
            if cells.get(column) or column in methods
        }
        references = (files.get(_REFERENCES[0]), files.get(_REFERENCES[1]))
        pictures = {method: files[method] for method in methods}
        rows.append(Row(cells[SUBJECT], cells[STYLE], cells.get(PROMPT, ""), references, pictures))
    if not rows:
        raise BatchError(f"{path} has no rows")
    return rows


def read_results(folders: Mapping[str, Path], places: Sequence[Path]) -> list[Row]:
    """Rows that are done in every folder of results, by their names: a method for each folder. The n-th pictures of a
    row belong together. places: where the pictures lie that the rows name as references. Raises BatchError."""
    found = {method: dict(_done(folder / "results.csv")) for method, folder in folders.items()}
    names = [name for name in next(iter(found.values())) if all(name in of for of in found.values())]
    if not names:
        raise BatchError(f"no row is done in all of: {', '.join(map(str, folders.values()))}")
    rows = []
    for name in names:
        lists = {method: of[name]["files"].split("\n") for method, of in found.items()}
        if len({len(files) for files in lists.values()}) > 1:
            counts = ", ".join(f"{method} {len(files)}" for method, files in lists.items())
            raise BatchError(f"row '{name}' has not as many pictures in each folder ({counts})")
        cells = next(iter(found.values()))[name]
        subject, style, *pictures, prompt = (cells.get(column, "") for column in _OF_RESULTS)
        references = (_reference(pictures[0], places), _reference(pictures[1], places))
        for number in range(len(next(iter(lists.values())))):
            shown = {m: _file(folders[m] / files[number], f"row '{name}', {m}") for m, files in lists.items()}
            rows.append(Row(subject, style, prompt, references, shown))
    return rows


def _done(path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    seen: set[str] = set()
    for line, cells in _csv(path):
        _has(path, cells, ("name", "status", "files", *_OF_RESULTS[:2]))
        cells = {column: as_it_was(cell) for column, cell in cells.items()}
        if cells["status"] == DONE and cells["files"]:
            if cells["name"] in seen:
                raise BatchError(f"{path}, line {line}: a second row is called '{cells['name']}'; give rows names")
            seen.add(cells["name"])
            yield cells["name"], cells


def _csv(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """Line number and cells of every row that is not empty."""
    try:
        reader = csv.DictReader(io.StringIO(path.read_text(encoding="utf-8-sig"), newline=""), strict=True)
        columns = list(reader.fieldnames or ())
        if len(set(columns)) < len(columns):
            raise BatchError(f"{path} has two columns of one name: {', '.join(columns)}")
        yield from jobs.cells(path, reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise BatchError(f"{path} cannot be read as a table: {error}") from error


def _has(path: Path, cells: Mapping[str, str], columns: Sequence[str]) -> None:
    if lacking := [column for column in columns if column not in cells]:
        raise BatchError(f"{path} has no column {', '.join(lacking)}; it has {', '.join(cells)}")


def _file(path: Path, where: str) -> Path:
    if not path.is_file():
        raise BatchError(f"{where}: {path} is no file")
    return path


def _reference(name: str, places: Sequence[Path]) -> Path | None:
    """A picture by a server's name for it, which begins with twelve digits of its hash where it was uploaded."""
    names = [name, re.sub(r"^[0-9a-f]{12}_", "", name)] if name else []
    return next((place / n for place in places for n in names if (place / n).is_file()), None)


def page(rows: Sequence[Row], title: str, seed: int, against: str | None, question: str, side: int) -> str:
    """The page's HTML: every question in an order of its own, the pictures of each too, both by the seed.

    against: a method that stands in every question beside one other, as in the paper; None for all at once. side:
    pixels of the longer side of a picture, above which it is made smaller. Raises BatchError.
    """
    methods = list(rows[0].pictures)
    if against is not None and against not in methods:
        raise BatchError(f"there is no method '{against}'; there are {', '.join(methods)}")
    if against is None and len(methods) > KEYS:
        raise BatchError(f"{len(methods)} methods have not a digit each; compare them in twos (--against)")
    together = [methods] if against is None else [[against, other] for other in methods if other != against]
    pictures = _Pictures(side)
    asked: list[dict[str, Any]] = []
    for number, row in enumerate(rows, 1):
        references = [None if path is None else pictures.number(path) for path in row.references]
        said = {"row": number, SUBJECT: row.subject, STYLE: row.style, PROMPT: row.prompt, "references": references}
        for shown in together:
            order = [[methods.index(method), pictures.number(row.pictures[method])] for method in shown]
            asked.append({"question": len(asked) + 1, **said, "shown": order})
    # Voters with other seeds answer the same study.
    study = hashlib.sha256(json.dumps([methods, asked, question, pictures.digests]).encode()).hexdigest()[:16]
    chosen = random.Random(seed)
    chosen.shuffle(asked)
    for one in asked:
        chosen.shuffle(one["shown"])
    key = {"study": study, "seed": seed, "ask": question, "methods": methods, "questions": asked}
    return (
        _TEMPLATE.read_text(encoding="utf-8")
        .replace("{{title}}", html.escape(title))
        .replace("{{key}}", base64.b64encode(json.dumps(key).encode()).decode())
        .replace("{{pictures}}", "\n".join(map(_element, pictures.files)))
    )


def _element(file: bytes) -> str:
    return f'<script type="text/plain" class="picture">{base64.b64encode(file).decode()}</script>'


class _Pictures:
    """Pictures as the page holds them, each once, with nothing in them that tells where they come from."""

    def __init__(self, side: int):
        self.files: list[bytes] = []
        self.digests: list[str] = []
        self._side = side
        self._by_path: dict[Path, int] = {}

    def number(self, path: Path) -> int:
        """Raises BatchError for what is no picture."""
        if path not in self._by_path:
            file = self._small(path)
            digest = hashlib.sha256(file).hexdigest()
            if digest not in self.digests:
                self.digests.append(digest)
                self.files.append(file)
            self._by_path[path] = self.digests.index(digest)
        return self._by_path[path]

    def _small(self, path: Path) -> bytes:
        from PIL import Image, ImageOps  # which no other command needs

        try:
            with Image.open(path) as opened:
                image = ImageOps.exif_transpose(opened).convert("RGB")
        except Exception as error:  # decoders raise anything for a broken picture
            raise BatchError(f"{path} is no picture that can be read ({error})") from error
        image.thumbnail((self._side, self._side), Image.Resampling.LANCZOS)
        made = io.BytesIO()
        image.save(made, "WEBP", quality=92)
        return made.getvalue()


def write(path: Path, text: str) -> None:
    """Whole or not at all. Raises OSError."""
    with disk.written(path) as file:
        file.write(text.encode())
