"""Write workflows/*.json from their descriptions, and workflows/api/*.json from those through the real frontend.

A graph is called as people should read it, its API form as is easily typed: "4 Every step", every_step.json.

Also the blueprints (subgraphs/*.json), and what a server says of the nodes: the contract that a test holds them to,
and the English texts (snapshot.py).

python3 dev.py workflows            write them
python3 dev.py workflows --check    only say which differ
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from . import snapshot
from .answers import Prompt
from .base import make_base
from .frontend import Frontend, open_browser
from .host import ROOT
from .server import ComfyServer
from .templates import BLUEPRINTS, TEMPLATES
from .templates.graph import Graph, ObjectInfo, file_name

FOLDER = ROOT / "workflows"
# Inputs that newer hosts' nodes ask for, and older ones pass over: with them an API file runs on both.
LATER: dict[str, dict[str, Any]] = {"LoraModelLoader": {"bypass": False}}
BLUEPRINTS_FOLDER = ROOT / "subgraphs"  # where the host looks for a pack's


def ui_files() -> list[Path]:
    """The graphs that ship, in UI format."""
    return sorted(FOLDER.glob("*.json"))


def api_file(ui_file: Path) -> Path:
    return ui_file.parent / "api" / f"{file_name(ui_file.stem)}.json"


def api_text(prompt: Prompt) -> str:
    """The file's text: nodes in the order of their ids, so that a change shows as a small difference."""
    ordered = {key: prompt[key] for key in sorted(prompt, key=lambda key: [int(part) for part in key.split(":")])}
    return json.dumps(ordered, indent=2, ensure_ascii=False) + "\n"


def generate(frontend: Frontend, ui_file: Path) -> str:
    """The API file's text for a UI file. ValueError where a node is unknown to the server."""
    frontend.load(ui_file)
    missing = frontend.missing_nodes()
    if missing:
        raise ValueError(f"{ui_file.name} uses {', '.join(missing)}, which the server does not have.")
    prompt = frontend.api()
    for node in prompt.values():
        node["inputs"] = {**node["inputs"], **LATER.get(node["class_type"], {})}
    return api_text(prompt)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; status 1 where a file differs")
    check = parser.parse_args().check
    differing = 0
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as base:
        with ComfyServer(make_base(Path(base), miniature=False)) as server, open_browser() as browser:
            info = server.object_info()
            for path, text in snapshot.files(info).items():
                differing += renew(path, text, check)
            for folder, described in ((FOLDER, TEMPLATES), (BLUEPRINTS_FOLDER, BLUEPRINTS)):
                for graph in (describe() for describe in described):
                    differing += renew(folder / f"{graph.name}.json", ui_text(graph, info), check)
            for ui_file in ui_files():
                frontend = Frontend(browser, server)
                text = generate(frontend, ui_file)
                frontend.close()
                differing += renew(api_file(ui_file), text, check)
    return 1 if check and differing else 0


def ui_text(graph: Graph, info: ObjectInfo) -> str:
    """The UI file's text of a described graph."""
    return in_lines(graph.ui(info))


def in_lines(ui: Mapping[str, Any]) -> str:
    """A UI graph as JSON with a line for each node, link and group: small differences in few bytes."""
    parts = []
    for name, value in ui.items():
        entries = [json.dumps(entry, ensure_ascii=False) for entry in (value if isinstance(value, list) else ())]
        text = "[\n" + ",\n".join(entries) + "\n]" if entries else json.dumps(value, ensure_ascii=False)
        parts.append(f"{json.dumps(name)}: {text}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def renew(target: Path, text: str, check: bool) -> bool:
    """Write a file where it differs, unless only asked; says so, and whether it did."""
    same = target.is_file() and target.read_text(encoding="utf-8") == text
    print(f"{target.relative_to(ROOT).as_posix()}: {'up to date' if same else 'differs'}")
    if not same and not check:
        write(target, text)
    return not same


def write(target: Path, text: str) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_suffix(".tmp")
    temporary.write_text(text, encoding="utf-8", newline="\n")
    os.replace(temporary, target)


if __name__ == "__main__":
    sys.exit(main())
