"""The command line: python -m ziplora_batch run | again."""

from __future__ import annotations

import argparse
import asyncio
import sys
from contextlib import AsyncExitStack
from pathlib import Path

from . import again, jobs
from .results import Results
from .runner import Batch
from .server import Server, ServerLost


def main(arguments: list[str] | None = None) -> int:
    """0: everything is done; 1: some jobs failed; 2: it could not start, or not go on; 130: Ctrl-C."""
    asked = _parser().parse_args(arguments)
    try:
        return asyncio.run(asked.work(asked))
    except (jobs.BatchError, ServerLost, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m ziplora_batch", description=__doc__)
    commands = parser.add_subparsers(required=True)
    run = commands.add_parser("run", help="every row of a table, or every subject in every style")
    run.add_argument("workflow", type=Path, help="a workflow in API form, e.g. workflows/api/ziplora_sdxl.json")
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
    run.set_defaults(work=_run)
    remake = commands.add_parser("again", help="make a result again from its own file, and compare")
    remake.add_argument("file", type=Path, help="a .png of Save Image, or a .safetensors that this pack wrote")
    remake.add_argument("--server", required=True, help="address of a ComfyUI that has the same files")
    remake.set_defaults(work=lambda asked: again.again(asked.file, Server(asked.server)))
    return parser


async def _run(asked: argparse.Namespace) -> int:
    workflow = jobs.read_workflow(asked.workflow)
    async with AsyncExitStack() as stack:
        servers = [await stack.enter_async_context(Server(url)) for url in dict.fromkeys(asked.server)]
        if asked.table and not (asked.subjects or asked.styles or asked.prompt):
            rows = jobs.read_table(asked.table)
        elif asked.subjects and asked.styles and not asked.table:
            rows = jobs.cross(asked.subjects, asked.styles, asked.prompt)
            await _as_listed(rows, workflow, servers)
        else:
            raise jobs.BatchError("give either --table, or --subjects and --styles (and perhaps --prompt)")
        made = jobs.make(workflow, rows, asked.files)
        results = Results(asked.results)
        ended = await Batch(made, servers, results, asked.patience, asked.retry_errors).run()
    failed = [job for job in made if not results.has(job.key, retry=True)]
    print(f"{len(made) - len(failed)} of {len(made)} done; see {asked.results / 'results.csv'}")
    return 0 if not failed else 1 if ended else 2


async def _as_listed(rows: list[jobs.Row], workflow: jobs.Prompt, servers: list[Server]) -> None:
    """Local LoRA files by the names that a server has for them: the one that ends as the local path does."""
    for column in ("content_lora", "style_lora"):
        node, name = jobs.target(workflow, column)
        listed = await _choices(servers, workflow[node]["class_type"], name)
        for row in rows:
            file = row.files.pop(row.values[column])
            row.values[column] = jobs.listed_name(file, listed)
            row.files[row.values[column]] = file


async def _choices(servers: list[Server], node: str, name: str) -> list[str]:
    for server in servers:
        try:
            return await server.choices(node, name)
        except ServerLost as error:
            lost = error
    raise lost


if __name__ == "__main__":
    sys.exit(main())
