"""One step's work in each kind of SDXL attention layer: low-rank branch against the published, dense algorithm.

    python3 dev.py run benchmarks/layers.py [--size 1024] [--dtype fp32] [--rank 64] [--repeats 5]

A step is a teacher pass (each reference with its own LoRA) and a student pass with the gradient of its input and of
the coefficients. The dense algorithm runs content and style apart, as published; both are checked to give the same
output and gradients. Times are medians of runs taken in turn; memory is the updates' own and the peak of what a step
allocates beside its input and output. The same machine, one process: the ratios count.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler is talkative
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

sys.path.append(str(Path(__file__).resolve().parent.parent))
from benchmarks.dense import WAYS, DenseLayer
from ziplora_core.branch import Branch, JoinedSet
from ziplora_core.frozen import Base
from ziplora_core.lora_set import CONCEPTS, Factors, LoRASet

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Kind:
    """tokens: of one row at 1024 x 1024; 77 of a prompt, whatever the size. count: layers of this kind in SDXL."""

    name: str
    tokens: int
    columns: int
    out: int
    count: int
    of_prompt: bool = False


KINDS = (
    Kind("1280 wide: q, k, v, out; q, out of the prompt's", 1024, 1280, 1280, 360),
    Kind("1280 wide: k, v of the prompt's", 77, 2048, 1280, 120, True),
    Kind("640 wide: q, k, v, out; q, out of the prompt's", 4096, 640, 640, 60),
    Kind("640 wide: k, v of the prompt's", 77, 2048, 640, 20, True),
)


class _Product(Base):
    """An ordinary weight, frozen."""

    def __init__(self, weight: Tensor):
        self._weight = weight

    def forward(self, x: Tensor) -> Tensor:
        return x @ self._weight.T

    def backward(self, grad: Tensor, shape: torch.Size) -> Tensor:
        return grad @ self._weight


class _Nothing(Base):
    """No layer at all: what is left is the branch."""

    def __init__(self, out: int):
        self._out = out

    def forward(self, x: Tensor) -> Tensor:
        return x.new_zeros(*x.shape[:-1], self._out)

    def backward(self, grad: Tensor, shape: torch.Size) -> Tensor:
        return grad.new_zeros(shape)


class Problem:
    """One layer, one step's inputs: rows 0 and 1 are the content's and the style's."""

    def __init__(self, kind: Kind, rank: int, dtype: torch.dtype, scale: float):
        g = torch.Generator().manual_seed(0)

        def random(*shape: int, size: float) -> Tensor:
            return (torch.randn(shape, generator=g) * size).to(dtype)

        def factors() -> Factors:
            up, down = (
                random(kind.out, rank, size=rank**-0.5),
                random(rank, kind.columns, size=0.1 * kind.columns**-0.5),
            )
            return Factors(up, down)

        tokens = kind.tokens if kind.of_prompt else max(1, round(kind.tokens * scale))
        pair = LoRASet(CONCEPTS, {"layer": {concept: factors() for concept in CONCEPTS}})
        self.kind = kind
        self.joined = JoinedSet(pair, dtype=dtype)
        self.x = random(2, tokens, kind.columns, size=1.0).requires_grad_(not kind.of_prompt)
        self.grad = random(2, tokens, kind.out, size=1.0)
        weight = random(kind.out, kind.columns, size=kind.columns**-0.5)
        content, style = ((f.up.float() @ f.down.float()).to(dtype) for f in pair.layers["layer"].values())
        self.dense = DenseLayer(weight, content, style)
        self.m = (torch.rand(2 * kind.columns, generator=g) + 0.5).requires_grad_()

    @property
    def stored(self) -> int:
        layer = self.joined.layers["layer"]
        return sum(t.numel() * t.element_size() for t in (layer.up, layer.down))

    def _inputs(self) -> list[Tensor]:
        return [self.m, self.x] if self.x.requires_grad else [self.m]

    def thin_step(self, with_base: bool) -> list[Tensor]:
        """[student's output, teacher's, gradient of the coefficients, gradient of the input]"""
        base = _Product(self.dense.base) if with_base else _Nothing(self.kind.out)
        branches: list[Branch] = [self.joined.teacher(torch.tensor([False, True])), self.joined.student(self.m)]
        teacher, student = (branch.layer("layer", self.x, base) for branch in branches)
        return [student.detach(), teacher, *torch.autograd.grad(student, self._inputs(), self.grad)]

    def dense_step(self, with_base: bool, way: str) -> list[Tensor]:
        m_c, m_s = self.m.chunk(2)
        outputs, totals = [], []
        for row, concept in enumerate(("content", "style")):
            x = self.x[row : row + 1]
            with torch.no_grad():
                teacher = self.dense.teacher(x, concept, way, with_base)
            student = self.dense.student(x, m_c, m_s, way, with_base)
            totals.append(torch.autograd.grad(student, self._inputs(), self.grad[row : row + 1]))
            outputs.append((student.detach(), teacher))
        students, teachers = (torch.cat(parts) for parts in zip(*outputs, strict=True))
        return [students, teachers, *(a + b for a, b in zip(*totals, strict=True))]


def peak_memory(work: Callable[[], object]) -> int:
    """Bytes: the most that a step has allocated at once."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    now, peak = 0, 0
    for event in sorted(profiler.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak


def in_turn(works: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds of each."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for repeat in range(repeats + 1):
        for name, work in works.items():
            began = time.perf_counter()
            work()
            if repeat:  # the first is for warming up
                times[name].append(time.perf_counter() - began)
    return {name: statistics.median(taken) for name, taken in times.items()}


def measure(kind: Kind, rank: int, dtype: torch.dtype, scale: float, repeats: int) -> dict[str, float]:
    problem = Problem(kind, rank, dtype, scale)
    tolerance = 1e-3 if dtype == torch.float32 else 0.1
    for way in WAYS:
        for thin, dense in zip(problem.thin_step(True), problem.dense_step(True, way), strict=True):
            difference = (thin - dense).float().norm() / dense.float().norm()
            assert difference < tolerance, f"{kind.name}, {way}: {difference:.1e}"
    works = {
        "branch": lambda: problem.thin_step(False),
        "dense branch": lambda: problem.dense_step(False, "update"),
        "thin": lambda: problem.thin_step(True),
        "update": lambda: problem.dense_step(True, "update"),
        "weight": lambda: problem.dense_step(True, "weight"),
    }
    found = in_turn(works, repeats)
    outputs = sum(t.numel() * t.element_size() for t in problem.thin_step(True))
    for name, stored in (("thin", problem.stored), ("update", problem.dense.stored), ("weight", problem.dense.stored)):
        found[f"{name} memory"] = stored + max(0, peak_memory(works[name]) - outputs)
    found["stored"], found["dense stored"] = problem.stored, problem.dense.stored
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=1024, help="pixels of a side")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    given = parser.parse_args()
    print(
        f"{given.size} x {given.size}, rank {given.rank} each, {given.dtype}, {torch.get_num_threads()} threads; "
        "ms a step; how many times the dense algorithm takes"
    )
    print(
        "| layers | branch alone | with W0 | dense update | dense weight | branch x | update x | weight x | memory x |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    rows = {}
    totals: dict[str, float] = {}
    for kind in KINDS:
        found = measure(kind, given.rank, DTYPES[given.dtype], (given.size / 1024) ** 2, given.repeats)
        rows[kind.name] = found
        print(_line(f"{kind.name} ({kind.count})", found), flush=True)
        for key, value in found.items():
            totals[key] = totals.get(key, 0.0) + kind.count * value
    print(_line("all 560", totals))
    if given.json:
        given.json.write_text(json.dumps({**rows, "all": totals}, indent=1), encoding="utf-8")
    return 0


def _line(name: str, found: dict[str, float]) -> str:
    ms = [f"{1e3 * found[key]:.1f}" for key in ("branch", "thin", "update", "weight")]
    times = [
        f"{found['dense branch'] / found['branch']:.1f}",
        f"{found['update'] / found['thin']:.2f}",
        f"{found['weight'] / found['thin']:.2f}",
        f"{found['update memory'] / found['thin memory']:.1f}",
    ]
    return "| " + " | ".join([name, *ms, *times]) + " |"


if __name__ == "__main__":
    sys.exit(main())
