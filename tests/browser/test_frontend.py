"""The nodes and the shipped graphs in ComfyUI's own frontend."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from devhost import workflows
from devhost.base import NODES

if TYPE_CHECKING:
    from pathlib import Path

    from devhost.frontend import Frontend


def test_frontend_offers_the_nodes(shared_frontend: Frontend) -> None:
    assert set(NODES) <= set(shared_frontend.node_types())


def test_every_graph_has_its_api_file_and_none_is_left_over() -> None:
    written = {path.name for path in (workflows.FOLDER / "api").glob("*.json")}
    assert written == {workflows.api_file(path).name for path in workflows.ui_files()}
    assert written, "workflows/ holds no graph"


@pytest.mark.parametrize("ui_file", workflows.ui_files(), ids=lambda path: path.stem)
def test_api_file_is_what_the_frontend_makes_of_the_graph(shared_frontend: Frontend, ui_file: Path) -> None:
    written = workflows.api_file(ui_file).read_text(encoding="utf-8")
    assert written == workflows.generate(shared_frontend, ui_file), (
        "run `python3 dev.py workflows` and commit what it writes"
    )
