"""The nodes and the shipped graphs in ComfyUI's own frontend."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from devhost import workflows
from devhost.base import NODES
from devhost.host import current_host, named_frontend

if TYPE_CHECKING:
    from pathlib import Path

    from devhost.answers import Prompt
    from devhost.frontend import Frontend


def test_frontend_offers_the_nodes(shared_frontend: Frontend) -> None:
    assert set(NODES) <= set(shared_frontend.node_types())


def test_every_graph_has_its_api_file_and_none_is_left_over() -> None:
    written = {path.name for path in (workflows.FOLDER / "api").glob("*.json")}
    assert written == {workflows.api_file(path).name for path in workflows.ui_files()}
    assert written, "workflows/ holds no graph"


@pytest.mark.parametrize("ui_file", workflows.ui_files(), ids=lambda path: path.stem)
def test_api_file_is_what_the_frontend_makes_of_the_graph(shared_frontend: Frontend, ui_file: Path) -> None:
    """To the letter with the frontend that wrote it, else for the server: what its nodes take, and titles of ours."""
    written = workflows.api_file(ui_file).read_text(encoding="utf-8")
    made = workflows.generate(shared_frontend, ui_file)
    info, ours = shared_frontend.server.object_info(), titled(ui_file)
    assert taken(json.loads(made), info, ours) == taken(json.loads(written), info, ours)
    if not (current_host().own_tree or named_frontend()):
        assert written == made, "run `python3 dev.py workflows` and commit what it writes"


def titled(ui_file: Path) -> set[str]:
    """Ids of the nodes that a graph names itself; others are called as the host calls their type."""
    return {str(node["id"]) for node in json.loads(ui_file.read_text(encoding="utf-8"))["nodes"] if "title" in node}


def taken(prompt: Prompt, info: dict[str, Any], titled: set[str]) -> Prompt:
    """Of each node its type, the inputs that the server knows, and its title where the graph gives one."""
    found = {}
    for number, node in prompt.items():
        known = {name for part in ("required", "optional") for name in info[node["class_type"]]["input"].get(part, ())}
        inputs = {name: value for name, value in node["inputs"].items() if name in known}
        found[number] = {"class_type": node["class_type"], "inputs": inputs}
        if number in titled:
            found[number]["title"] = node["_meta"]["title"]
    return found
