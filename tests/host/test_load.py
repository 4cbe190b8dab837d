"""Many prompts at once on one server: zips, dials, files, and bad ones between them.

Thirty-two, with `dev.py test --all` eighty; ZIPLORA_LOAD says another number. The figures are printed with -s.
"""

from __future__ import annotations

import os
import random
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from graphs import Concept, node, zipped_picture
from safetensors.torch import load_file, save_file

from devhost.answers import PromptRefused
from devhost.server import ComfyServer

COUNT = int(os.environ.get("ZIPLORA_LOAD", "80" if os.environ.get("ZIPLORA_ALL") else "32"))
SETTLED = min(50, COUNT // 4)  # prompts after which memory no longer grows
Prompt = dict[str, dict[str, Any]]


def good(concepts: dict[str, list[Concept]], chance: random.Random) -> tuple[str, Prompt]:
    """One of 72 pictures, and sometimes a file beside it."""
    content, style = chance.choice(concepts["content"][:3]), chance.choice(concepts["style"][:3])
    seed, dial, how = chance.choice((1, 2)), chance.choice((0.6, 1.0)), chance.choice(("zip", "direct"))
    graph = zipped_picture(content, style, steps=1, seed=seed, style_dial=dial)
    graph["sampler"]["inputs"]["steps"] = 3
    if how == "direct":
        graph["optimise"] = node("DirectMergeLoRA", model=["checkpoint", 0], lora_pair=["pair", 0], method="NP-LoRA")
        for unused in ("report", "content_picture", "style_picture", "content_latents", "style_latents"):
            del graph[unused]
    name = f"{how} {content.lora} {style.lora} {seed} {dial}"
    beside = chance.random()
    if beside < 0.15:
        graph["keep"] = node("SaveZippedLoRA", zipped_lora=["dial", 0], filename_prefix="load/zip")
    elif beside < 0.3:
        graph["export"] = node(
            "ExportMergedLoRA",
            zipped_lora=["dial", 0],
            filename_prefix="load/whole",
            rank=0,
            dtype="fp16",
            format="kohya",
        )
    return name, graph


def bad(concepts: dict[str, list[Concept]], chance: random.Random, absurd: str) -> tuple[str, Prompt]:
    """What is refused at the door, and what ends in an error."""
    _, graph = good(concepts, chance)
    kind = chance.choice(("missing", "range", "absurd", "prefix"))
    if kind == "missing":
        graph["pair"]["inputs"]["style_lora"] = "nowhere.safetensors"
    elif kind == "range":
        graph["dial"]["inputs"]["style_strength"] = 3.0
    elif kind == "absurd":
        graph = zipped_picture(Concept(absurd, "a star", concepts["content"][0].picture), concepts["style"][0], steps=1)
    else:
        graph["keep"] = node("SaveZippedLoRA", zipped_lora=["dial", 0], filename_prefix="../../out")
    return f"bad: {kind}", graph


def test_none_is_lost_none_is_wrong_and_memory_is_flat(
    make_server: Callable[..., ComfyServer],
    session_server: ComfyServer,
    concepts: dict[str, list[Concept]],
    tmp_path: Path,
) -> None:
    chance = random.Random(0)
    server, alone = make_server(), session_server  # a server of its own, for its memory is watched
    tensors = load_file(server.base / "models" / "loras" / concepts["content"][0].lora)
    save_file({k: v if "alpha" in k else (v.float() + 1e-3) * 1e18 for k, v in tensors.items()}, tmp_path / "absurd")
    absurd = server.put_lora(tmp_path / "absurd", "absurd_load.safetensors")
    queued: list[tuple[str, str]] = []
    graphs: dict[str, Prompt] = {}
    refused = 0
    for _ in range(COUNT):
        is_bad = chance.random() < 0.2
        name, graph = bad(concepts, chance, absurd) if is_bad else good(concepts, chance)
        try:
            queued.append((name, server.queue(graph)))
        except PromptRefused as refusal:
            refused += 1
            assert name in ("bad: missing", "bad: range"), refusal
        else:
            graphs.setdefault(name, graph)
    memory, files, errors = [], 0, 0
    pictures: dict[str, list[np.ndarray]] = {}
    for name, prompt_id in queued:
        result = server.finish(prompt_id, timeout=1800)
        memory.append(server.memory())
        if name.startswith("bad"):
            errors += 1
            assert result.status == "error" and result.error is not None
            said = result.error["exception_message"]
            assert ("not finite" if "absurd" in name else "leads out of the folder") in said, said
            continue
        assert result.status == "success", (name, result.error)
        pictures.setdefault(name, []).append(result.images("save")[0])
        written = [f for key in ("keep", "export") for f in result.files(key, "files")]
        assert all(f.is_file() for f in written)
        files += len(written)
    server.check_alive()
    wrong = []
    for name, found in pictures.items():
        alone.free()
        expected = alone.run({k: v for k, v in graphs[name].items() if k not in ("keep", "export")}).images("save")[0]
        wrong += [name for made in found if not np.array_equal(made, expected)]
    early, late = (statistics.median(m) / 1e6 for m in (memory[SETTLED : 2 * SETTLED], memory[-SETTLED:]))
    print(
        f"\n{COUNT} prompts: {refused} refused, {errors} errors, {sum(map(len, pictures.values()))} pictures of "
        f"{len(pictures)} kinds, {files} files, {len(wrong)} wrong; resident memory {early:.0f} MB after {SETTLED}, "
        f"{late:.0f} MB at the end"
    )
    assert len(queued) + refused == COUNT and not wrong, wrong
    assert late < early * 1.02, f"{early:.0f} MB have become {late:.0f} MB"
