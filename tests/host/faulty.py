"""A server that is struck, and what must be as it was before: pictures, networks, tensors, memory, files.

The faults are those of the host extension in tests/faults.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from graphs import BASE, Concept, Link, Prompt, node, optimised, picture, zipped_picture
from safetensors.torch import load_file

from devhost.answers import Event, ExecutionFailed, Result
from devhost.server import ComfyServer

FAULTS = Path(__file__).resolve().parent.parent / "faults"
FAST = {"solver": "gradient", "objective": "paper", "steps": 1}  # passes: teacher, student, 12 on held-out noise
MEMORY = 0.02  # resident bytes may differ by so much of them


def fault(place: str, act: str, at: int = 1, always: bool = False, value: Link = BASE) -> dict[str, Any]:
    return node("InjectFault", value=value, place=place, act=act, at=at, always=always)


def exported(value: Link, prefix: str = "loras/faults") -> dict[str, Any]:
    return node("ExportMergedLoRA", zipped_lora=value, filename_prefix=prefix, rank=0, dtype="fp32", format="kohya")


@dataclass(frozen=True)
class State:
    """What the next prompts give, and what is left in the process after them."""

    pictures: list[np.ndarray]
    left: dict[str, Any]
    memory: int


@dataclass
class Bench:
    """A server with the faults, and two concepts. injected, survived: faults."""

    server: ComfyServer
    content: Concept
    style: Concept
    injected: int = 0
    survived: int = 0
    before: State = field(init=False)

    def __post_init__(self) -> None:
        """See what it is like once it has done everything that a test does, and is warm."""
        for kind in ("TrainConceptLoRA", "UnZipLoRA"):
            self.server.run(self.training(kind, prefix="warm"))
        self.server.run(self.without_references(self.struck("plan", "wait", 2)))
        self.server.run({**self.direct(), "export": exported(["zipped", 0], "warm")})
        for _ in range(2):
            self.before = self.look()

    def next_prompts(self) -> list[Prompt]:
        """One zips a pair and draws with it; then one draws with the bare model."""
        zipped = zipped_picture(self.content, self.style, **FAST)
        zipped["sampler"]["inputs"]["steps"] = 2
        return [zipped, picture(BASE, self.content.prompt, steps=2)]

    def look(self) -> State:
        pictures = [self.server.run(prompt).images("save")[0] for prompt in self.next_prompts()]
        left = self.server.get("faults")
        return State(pictures, left, self.server.memory())

    def memory_is_back(self, after: State) -> bool:
        """Where it was before the first fault."""
        return abs(after.memory / self.before.memory - 1) <= MEMORY

    def files(self) -> set[Path]:
        """All but pictures, hidden ones too."""
        folders = (self.server.base / name for name in ("output", "temp", "models"))
        found = (path for folder in folders for path in folder.rglob("*"))
        return {path for path in found if path.is_file() and path.suffix != ".png"}

    @contextlib.contextmanager
    def survives(self, adds: int = 0) -> Iterator[None]:
        """A fault is injected in here. adds: files that it may leave, whole."""
        self.injected += 1
        files = self.files()
        yield
        after = self.look()
        if not self.memory_is_back(after):  # what an allocator keeps for a while goes; what is held stays
            after = self.look()
        new = self.files() - files
        assert all(map(np.array_equal, after.pictures, self.before.pictures)), "the next prompt draws something else"
        assert after.left == self.before.left
        assert self.memory_is_back(after), (after.memory, self.before.memory)
        assert len(new) == adds, new
        assert files <= self.files()
        for path in new:
            check_whole(path)
        self.survived += 1

    def struck(self, place: str, act: str, at: int = 1, always: bool = False, **settings: Any) -> Prompt:
        """An optimisation whose model has a fault, and a file that it would be saved to."""
        return {
            **optimised(self.content, self.style, model=["fault", 0], **{**FAST, **settings}),
            "fault": fault(place, act, at, always),
            "file": node("SaveZippedLoRA", zipped_lora=["optimise", 0], filename_prefix="faults/zipped"),
        }

    def without_references(self, prompt: Prompt) -> Prompt:
        """The same, drawing its references."""
        for concept in ("content", "style"):
            for part in ("picture", "latents"):
                del prompt[f"{concept}_{part}"]
            del prompt["optimise"]["inputs"][f"{concept}_latents"]
        prompt["optimise"]["inputs"] |= {"drawn_references": 1, "drawn_size": 128}
        return prompt

    def training(self, kind: str, model: Link = BASE, prefix: str = "loras/faults", **settings: Any) -> Prompt:
        """kind: TrainConceptLoRA or UnZipLoRA, in node "train"."""
        info = self.server.object_info(kind)["input"]
        inputs = {name: spec[1]["default"] for name, spec in info["required"].items() if "default" in spec[1]}
        choices = {name: spec[0][0] for name, spec in info["required"].items() if isinstance(spec[0], list)}
        own: dict[str, Any] = {"images": ["content_picture", 0], "prompt": self.content.prompt}
        if kind == "UnZipLoRA":
            own = {
                "image": ["content_picture", 0],
                "prompt": "a zub in vorp style",
                "content_prompt": "a zub",
                "style_prompt": "vorp style",
                "block_separation": False,
            }
        own |= {"steps": 4, "rank": 2, "resolution": 128, "filename_prefix": prefix, **settings}
        sockets = {"model": model, "clip": ["checkpoint", 1], "vae": ["checkpoint", 2]}
        parts = optimised(self.content, self.style)
        return {
            "checkpoint": parts["checkpoint"],
            "content_picture": parts["content_picture"],
            "train": node(kind, **{**choices, **inputs, **sockets, **own}),
        }

    def direct(self) -> Prompt:
        """A zipped pair that costs nothing, in node "zipped"."""
        parts = optimised(self.content, self.style)
        merge = node("DirectMergeLoRA", model=BASE, lora_pair=["pair", 0], method="sum")
        return {"checkpoint": parts["checkpoint"], "pair": parts["pair"], "zipped": merge}

    def fails(self, prompt: Prompt) -> ExecutionFailed:
        """How a prompt fails. Its words are one line, but for the host's own."""
        result = self.server.run(prompt, check=False)
        assert result.error is not None, f"it ended as {result.status}"
        failed = ExecutionFailed(result)
        assert "\n" not in failed.text.split("\nThis error means you ran out of memory")[0]
        return failed

    def until_waiting(self, prompt: Prompt, meanwhile: Callable[[], None], *also: Prompt) -> list[Result]:
        """Queue prompts of which the first waits at its fault; do something then; their results."""
        start = len(self.server.connection.events)
        ids = [self.server.queue(p) for p in (prompt, *also)]
        self.wait_for_fault(start)
        meanwhile()
        return [self.server.finish(prompt_id, timeout=120) for prompt_id in ids]

    def wait_for_fault(self, start: int) -> Event:
        event = self.server.connection.wait_for(lambda event: event.type == "faults", 60.0, start)
        assert event is not None, self.server.log_tail()
        return event

    def open(self) -> None:
        """End a wait without an interrupt."""
        self.server.post("faults/open").raise_for_status()

    def blocker(self) -> Prompt:
        """A prompt that waits, for others to queue behind it."""
        return {**picture(["fault", 0], self.content.prompt, steps=1), "fault": fault("start", "wait")}


def check_whole(path: Path) -> None:
    """Raises where a file cannot be read to its end."""
    assert path.suffix in (".safetensors", ".json"), path
    if path.suffix == ".json":
        json.loads(path.read_text(encoding="utf-8"))
    else:
        assert load_file(path)
