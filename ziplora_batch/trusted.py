"""Which nodes of a stranger's workflow are run unasked: those that neither run code nor write elsewhere."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from .jobs import Prompt

_TEXTS = Path(__file__).resolve().parent.parent / "locales" / "en" / "nodeDefs.json"
_RISKS = {  # ComfyUI's own modules, and why one is asked all the same
    "comfy_api_nodes": "pays for a service",
    "comfy_extras.nodes_dataset": "writes into any folder that the workflow names",
    "comfy_extras.nodes_glsl": "runs code that the workflow carries",
}


def node_types(prompt: Prompt) -> list[str]:
    """Those of a workflow, in order, each once."""
    return list(dict.fromkeys(node["class_type"] for node in prompt.values()))


def doubts(prompt: Prompt, modules: Mapping[str, str]) -> list[str]:
    """The node types of a workflow that are not run unasked, each with where it comes from or what it does.

    modules: node type -> Python module, as a server says it.
    """
    own = set(json.loads(_TEXTS.read_text(encoding="utf-8")))
    found = []
    for name in node_types(prompt):
        module = modules.get(name)
        if module is None:
            found.append(f"'{plain(name)}', which the server has not")
            continue
        risk = _RISKS.get(module) or _RISKS.get(module.partition(".")[0])
        if risk is not None:
            found.append(f"'{plain(name)}', which {risk} ({module})")
        elif not (_is_hosts(module) or (name in own and module.startswith("custom_nodes."))):
            found.append(f"'{plain(name)}' of {plain(module) or 'an unknown module'}")
    return found


def _is_hosts(module: str) -> bool:
    return module == "nodes" or module.startswith("comfy_extras.")


def plain(name: str) -> str:
    """Fit for a terminal."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in name[:100])
