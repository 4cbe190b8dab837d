"""The command line: python -m ziplora_batch run | again | study."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import io
import os
import sys
from collections.abc import Mapping
from pathlib import Path

from . import again, jobs, study
from .address import HEADERS, addresses, read_headers
from .errors import BatchError, ServerError
from .results import Results
from .runner import Batch
from .server import LOST_AFTER, Server


def main(arguments: list[str] | None = None) -> int:
    """0: everything is done; 1: some jobs failed; 2: it could not start, or not go on; 130: Ctrl-C."""
    asked = _parser().parse_args(arguments)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # names are anybody's, and no character of one ends a batch
            stream.reconfigure(errors="backslashreplace")
    try:
        return int(asyncio.run(asked.work(asked)))
    except (BatchError, OSError) as error:  # a ServerError is one
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"stopped; {asked.stopped}", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m ziplora_batch", description=__doc__)
    commands = parser.add_subparsers(required=True)
    run = commands.add_parser("run", help="every row of a table, or every subject in every style")
    run.add_argument("workflow", type=Path, help="in API form: workflows/api/every_step_with_pictures.json")
    run.add_argument("--table", type=Path, help=".csv or .jsonl; columns are inputs: content_lora, prompt, 12.seed, …")
    run.add_argument("--subjects", type=Path, help="a folder of LoRA files, each perhaps with a .txt and a picture")
    run.add_argument("--styles", type=Path, help="the same for styles")
    run.add_argument("--prompt", help="what to draw for --subjects and --styles: '{content} in {style}'")
    run.add_argument(
        "--server", action="append", required=True, help="address of a ComfyUI; may be given several times"
    )
    run.add_argument("--results", type=Path, default=Path("results"), help="folder; what it holds is not run again")
    run.add_argument(
        "--files",
        type=Path,
        action="append",
        default=[],
        help="folders (models/loras, input, …) whose files count by content",
    )
    run.add_argument("--retry-errors", action="store_true", help="run those again that failed")
    run.add_argument("--patience", type=float, default=600.0, help="seconds without any server before giving up")
    run.add_argument(
        "--lost-after",
        type=float,
        default=LOST_AFTER,
        help="seconds of failed requests, at least three, after which a server counts as lost (default: %(default)g)",
    )
    _takes_headers(run)
    run.set_defaults(work=_run, stopped="the same command goes on from here")
    remake = commands.add_parser("again", help="make a result again from its own file, and compare")
    remake.add_argument("file", type=Path, help="a .png of Save Image, or a .safetensors that this pack wrote")
    remake.add_argument("--server", required=True, help="address of a ComfyUI that has the same files")
    _takes_headers(remake)
    remake.add_argument(
        "--yes",
        action="store_true",
        help="also where the file wants nodes that are neither ComfyUI's own nor this pack's",
    )
    remake.set_defaults(
        work=lambda asked: again.again(asked.file, Server(asked.server, _headers(asked)), asked.yes),
        stopped="the prompt was cancelled on the server",
    )
    _add_study(commands)
    return parser


def _add_study(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    made = commands.add_parser("study", help="a page on which people vote on pictures of several methods")
    made.add_argument(
        "table",
        type=Path,
        nargs="?",
        help=".csv with the columns subject, style, perhaps subject_picture, style_picture, prompt, and a column of "
        "pictures for each method",
    )
    made.add_argument(
        "--results",
        action="append",
        default=[],
        metavar="METHOD=FOLDER",
        help="instead of a table: a folder of results for each method, whose rows go by the same names",
    )
    made.add_argument("--files", type=Path, action="append", default=[], help="folders of the rows' reference pictures")
    made.add_argument("--output", type=Path, default=Path("study.html"), help="the page (default: %(default)s)")
    made.add_argument("--against", help="ask about this method beside one other at a time, not about all at once")
    made.add_argument("--seed", type=int, default=0, help="decides every order; voters may have one each")
    made.add_argument("--question", default=study.QUESTION, help="what the page asks (default: %(default)s)")
    made.add_argument("--side", type=int, default=1024, help="larger pictures are made so small (default: %(default)s)")
    made.set_defaults(work=_study, stopped="nothing was written")


def _takes_headers(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--header",
        action="append",
        default=[],
        metavar="NAME:VALUE",
        help="sent with every request to every server, e.g. 'Authorization: Bearer …'; or in the environment variable "
        f"{HEADERS}, a header a line, where no list of processes shows it. A server's user and password belong into "
        "its address: https://user:password@host",
    )


def _headers(asked: argparse.Namespace) -> Mapping[str, str]:
    return read_headers(asked.header, os.environ)


async def _run(asked: argparse.Namespace) -> int:
    workflow = jobs.read_workflow(asked.workflow)
    places = addresses(asked.server, _headers(asked))
    if asked.table and not (asked.subjects or asked.styles or asked.prompt):
        rows = jobs.read_table(asked.table)
    elif asked.subjects and asked.styles and not asked.table:
        rows = jobs.cross(asked.subjects, asked.styles, asked.prompt)
    else:
        raise BatchError("give either --table, or --subjects and --styles (and perhaps --prompt)")
    with contextlib.closing(Results(asked.results)) as results:
        async with contextlib.AsyncExitStack() as stack:
            servers = [await stack.enter_async_context(Server(p, lost_after=asked.lost_after)) for p in places]
            if asked.subjects:
                await _as_listed(rows, workflow, servers)
            made = jobs.make(workflow, rows, asked.files)
            ended = await Batch(made, servers, results, asked.patience, asked.retry_errors).run()
        failed = [job for job in made if not results.has(job.key, retry=True)]
    print(f"{len(made) - len(failed)} of {len(made)} done; see {asked.results / 'results.csv'}")
    return 0 if not failed else 1 if ended else 2


async def _study(asked: argparse.Namespace) -> int:
    if bool(asked.table) == bool(asked.results):
        raise BatchError("give either a table, or --results for each method")
    if asked.side < 1:
        raise BatchError(f"--side {asked.side} leaves nothing of a picture")
    rows = study.read_table(asked.table) if asked.table else study.read_results(_folders(asked.results), asked.files)
    made = study.page(rows, "Which is best?", asked.seed, asked.against, asked.question, asked.side)
    study.write(asked.output, made)
    print(f"{asked.output}: {len(rows)} rows, methods {', '.join(rows[0].pictures)}; open it in a browser")
    return 0


def _folders(given: list[str]) -> dict[str, Path]:
    """METHOD=FOLDER, several times."""
    found: dict[str, Path] = {}
    for text in given:
        method, sign, folder = text.partition("=")
        if not (method and sign and folder) or method in found:
            raise BatchError(f"--results {text}: METHOD=FOLDER expected, with another method each")
        found[method] = Path(folder)
    if len(found) < 2:
        raise BatchError("a study compares two methods or more: give --results for each")
    return found


async def _as_listed(rows: list[jobs.Row], workflow: jobs.Prompt, servers: list[Server]) -> None:
    """Local LoRA files by the names that a server has for them: the one that ends as the local path does."""
    meant: dict[str, Path] = {}
    for column in ("content_lora", "style_lora"):
        node, name = jobs.target(workflow, column)
        listed = await _choices(servers, workflow[node]["class_type"], name)
        for row in rows:
            file = row.files[column]
            row.values[column] = found = jobs.listed_name(file, listed)
            other = meant.setdefault(found, file)
            if jobs.sha256(other) != jobs.sha256(file):
                raise BatchError(
                    f"{other} and {file} would both be '{found}' on the server, which lists no other of that name; "
                    "rename one of them, there too"
                )


async def _choices(servers: list[Server], node: str, name: str) -> list[str]:
    """What the first server lists that has such a node. Raises ServerError where none answers."""
    failed: ServerError | None = None
    for server in servers:
        try:
            if listed := await server.choices(node, name):
                return listed
        except ServerError as error:
            failed = error
    if failed is not None:
        raise failed
    return []


if __name__ == "__main__":
    sys.exit(main())
