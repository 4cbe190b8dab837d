"""What each node of the graph has read that its inputs do not name: the host gives fingerprints no linked input."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from comfy_execution.utils import get_executing_context

from ....ziplora_core.files import LoRAFileError

Look = Callable[[str], Any]


@dataclass
class _Reads:
    """Of one node. found: (look, name) -> what was seen there last. changes: how often that was another."""

    found: dict[tuple[Look, str], Any] = field(default_factory=dict)
    changes: int = 0

    def note(self, look: Look, name: str, now: Any) -> None:
        """Also where a run reads what has changed since its fingerprint: another graph may know it as it was."""
        self.changes += self.found.setdefault((look, name), now) != now
        self.found[look, name] = now


_BY_NODE: dict[str, _Reads] = {}


def _of_this_node() -> _Reads:
    """By the node's id, told in fingerprints too, as hidden inputs are not. Nobody's where no graph runs."""
    running = get_executing_context()
    return _Reads() if running is None else _BY_NODE.setdefault(running.node_id, _Reads())


def remember(look: Look, name: str) -> None:
    """That the node that runs depends on look(name), which later calls of `changes` look at again."""
    _of_this_node().note(look, name, _seen(look, name))


def changes() -> int:
    """How often anything that this node ever read has turned out another: a part of its fingerprint, 0 before it runs
    for the first time and as long as nothing changes. Raises nothing."""
    reads = _of_this_node()
    for look, name in list(reads.found):
        reads.note(look, name, _seen(look, name))
    return reads.changes


def _seen(look: Look, name: str) -> Any:
    """None for what cannot be read now: its return counts as a change too."""
    try:
        return look(name)
    except LoRAFileError:
        return None
