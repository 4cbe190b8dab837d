"""Zipping two LoRAs on the full-size SDXL, through the real patcher: time, memory, and the published algorithm beside.

    python3 dev.py run benchmarks/sdxl.py                                     # on the CPU, bf16, 256 x 256
    COMFYUI_PATH=… python benchmarks/sdxl.py --device cuda                    # 1024 x 1024
    COMFYUI_PATH=… python benchmarks/sdxl.py --device cuda --limits 12 8      # and then as if the card had 12, 8 GB

SDXL from ComfyUI's own class with random weights and two random attention LoRAs: figures of time and memory, never of
quality. First the machine's own ceilings, a large matrix product and a large copy; then a step in each way of spending
memory and by the published algorithm (whole ΔW, formed into the weights in each of four passes; see dense.py), whose
losses must be the same; then whole runs of the node; then applying; then training a LoRA; then steps and a whole run
within less memory. Operations are counted, not estimated. A part that fails is said and the next one goes on; what has
been measured is in the file of `--json` after every part. To measure on a machine without network: `dev.py kit`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent.parent))  # last: `nodes` there would hide ComfyUI's module

from devhost import full_size
from devhost.inprocess import load_pack

DTYPES = ("bf16", "fp16", "fp32")
PARTS = ("default", "steps", "dense", "start", "apply", "train", "limits", "paper")
ON_A_CARD = ("start", "limits", "paper")  # the others are done on a processor too


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--size", type=int, help="pixels of a side; 1024, on the CPU 256")
    parser.add_argument("--steps", type=int, help="steps that are timed, after one to warm up; 10, on the CPU 2")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--limits", type=float, nargs="*", default=[], help="GB that this process may take on the card")
    parser.add_argument("--skip", nargs="*", default=[], choices=PARTS)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    given = parser.parse_args()
    given.size = given.size or (256 if given.device == "cpu" else 1024)
    given.steps = given.steps or (2 if given.device == "cpu" else 10)
    return given


GIVEN = parse()
PACK = load_pack(cpu=GIVEN.device == "cpu")

import comfy.lora  # noqa: E402
import comfy.model_management as management  # noqa: E402
import comfy.sd  # noqa: E402
import psutil  # noqa: E402
import torch  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

from benchmarks import meters  # noqa: E402
from benchmarks.dense import dense_pair  # noqa: E402

BRIDGE, CORE = PACK.nodes.bridge, PACK.ziplora_core
CUDA = GIVEN.device == "cuda"
DTYPE = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[GIVEN.dtype]
CONCEPTS = ("content", "style")
now = partial(meters.now, CUDA)
Peak = partial(meters.Peak, CUDA)


class Bench:
    def __init__(self) -> None:
        torch.manual_seed(0)
        with torch.inference_mode():
            self.model = full_size.sdxl_patcher(DTYPE)
            loras = [full_size.attention_lora(self.model.model, GIVEN.rank, seed) for seed in (0, 1)]
            self.sources = BRIDGE.lora.loras.LoRASources(
                {n: BRIDGE.lora.loras.LoRASource(n, lora, 1.0) for n, lora in zip(CONCEPTS, loras, strict=True)}
            )
            self.conditioning = {c: full_size.random_prompt(i) for i, c in enumerate(CONCEPTS)}
            self.latents = {c: full_size.random_latents(GIVEN.size // 8, i) for i, c in enumerate(CONCEPTS)}
        self.samples = {c: latents["samples"] for c, latents in self.latents.items()}
        self.fitted = BRIDGE.lora.fitting.fit(self.sources, self.model.model)
        self.weights = self.model.model_size()

    def settings(self, **changes: Any):
        return CORE.solver.Settings(solver="gradient", objective=CORE.objective.PAPER, **changes)

    def plan(self, **settings: Any):
        room = BRIDGE.memory.plan.room_for(self.model)
        return BRIDGE.memory.plan.make(
            self.model, self.fitted.loras, self.conditioning, self.samples, self.settings(**settings), room
        )

    def operations(self, recomputed: int, together: bool) -> float:
        """TFLOP of a step, counted on the network without memory."""
        stage = BRIDGE.memory.rehearsal.MetaSet(self.model, self.fitted.loras, self.conditioning, self.samples)
        total = 0.0
        for concepts in [CONCEPTS] if together else [[c] for c in CONCEPTS]:
            batch = stage.batch(*concepts)
            with stage.injected(recomputed), FlopCounterMode(display=False) as counter:
                with torch.no_grad():
                    teacher = stage.predict(batch, stage.joined.teacher(batch.concept_index))
                with torch.enable_grad():
                    student = stage.predict(batch, stage.joined.student(stage.coefficients()))
                    (student - teacher).norm().backward()
            total += counter.get_total_flops() / 1e12
        return total

    def steps(self, plan, dense: bool = False) -> dict[str, Any]:
        """A few steps: seconds of one and of its parts, peak memory, and the losses."""
        found: dict[str, Any] = {}
        settings = self.settings(steps=GIVEN.steps + 1)

        def work(predict, joined, references) -> None:
            chosen = dense_pair(joined, BRIDGE.network.weights.cast) if dense else joined
            clock, began, losses = meters.Clock(now, BRIDGE.network.predictor.HostPredictor), [], []

            def on_step(step) -> None:
                began.append(now())
                losses.append(tuple(step.losses.retention.values()))
                if len(began) == 1:
                    clock.parts = dict.fromkeys(clock.parts, 0.0)

            with clock.running():
                CORE.gradient.optimize(chosen, predict, references, settings, on_step)
            seconds = (began[-1] - began[0]) / GIVEN.steps
            found.update(seconds=seconds, losses=losses)
            found["parts"] = {part: taken / GIVEN.steps for part, taken in clock.parts.items()}
            found["parts"]["rest"] = seconds - sum(found["parts"].values())

        with Peak() as peak, torch.inference_mode():
            BRIDGE.network.predictor.with_predictor(
                self.model,
                self.fitted.loras,
                self.conditioning,
                self.samples,
                work,
                together=plan.together and not dense,
                recomputed=plan.recomputed,
                need=plan.need,
            )
        return {**found, "peak": peak.bytes}

    def run(self, **settings: Any) -> dict[str, Any]:
        """The node, from sockets to the zipped pair."""
        began = now()
        with Peak() as peak, torch.inference_mode():
            *_, report, _ = BRIDGE.optimize.zipping.optimize(
                self.model, self.sources, self.conditioning, self.latents, CORE.solver.Settings(**settings)
            )
        lines = [line for line in report.splitlines() if line.startswith("cost:")]
        return {"seconds": now() - began, "peak": peak.bytes, "report": lines}

    def training(self) -> dict[str, Any]:
        """Training a LoRA of the attention layers with the defaults: seconds of a step, planned and peak memory."""
        bridge, core, began = BRIDGE.training, CORE.training, []
        shapes = bridge.layers.trained_layers(self.model.model, "attention")
        settings = core.Settings(steps=GIVEN.steps + 1, rank=GIVEN.rank)
        made = bridge.pictures.Prepared([self.conditioning["content"]])
        made.pictures = core.Pictures([[core.Example(self.samples["content"], 0)]])

        def work(denoiser, pictures, device) -> None:
            trained = CORE.trained_lora.TrainedLoRA(shapes, settings.rank, 0, device)
            core.train(trained, denoiser, pictures, settings, lambda step: began.append(now()))

        with Peak() as peak, torch.inference_mode():
            planned, _ = bridge.loading.with_denoiser(self.model, made, shapes, settings, work)
        return {"seconds": (began[-1] - began[0]) / GIVEN.steps, "peak": peak.bytes, "report": planned.line()}

    def applying(self) -> dict[str, float]:
        """Seconds of making patches and of the host writing them into the weights: ours, and a LoRA file's."""
        ones = CORE.coefficients.Coefficients.ones(self.fitted.loras)
        zipped = BRIDGE.lora.zipped.ZippedLoRA(self.sources, self.fitted, ones)
        with torch.inference_mode():
            file = BRIDGE.export.export_tensors(zipped, 0, "fp16", "kohya").tensors
            ways = {
                "zipped": lambda: BRIDGE.apply.apply(self.model, None, zipped, 1.0)[0],
                "stock": lambda: comfy.sd.load_lora_for_models(self.model, None, file, 1.0, 0.0)[0],
            }
            times: dict[str, list[float]] = {name: [] for name in ways}
            for _ in range(7):
                for name, way in ways.items():
                    began = now()
                    management.load_models_gpu([way()])
                    times[name].append(now() - began)
                    management.unload_all_models()
        ratios = [a / b for a, b in zip(*times.values(), strict=True)]
        return {**{name: statistics.median(taken) for name, taken in times.items()}, "ratio": statistics.median(ratios)}


def row(name: str, found: dict[str, Any], tflop: float, ceiling: float, weights: int) -> str:
    rate = tflop / found["seconds"]
    parts = " / ".join(f"{found['parts'][part]:.2f}" for part in ("teacher", "student", "backward", "rest"))
    return (
        f"| {name} | {found['seconds']:.2f} | {100 * found['seconds']:.0f} | {tflop:.1f} | {rate:.2f} | "
        f"{rate / ceiling:.0%} | {found['peak'] / 1e9:.2f} | {(found['peak'] - weights) / 1e9:.2f} | {parts} |"
    )


class Parts:
    """What is measured, one part after the other. Each prints its lines and returns its figures."""

    def __init__(self, ceiling: float):
        self.bench, self.ceiling = Bench(), ceiling
        self.weights = self.bench.weights if CUDA else psutil.Process().memory_info().rss
        self.chosen = self.bench.plan()
        self.every = replace(self.chosen, together=True, recomputed=self.chosen.blocks)
        self.ours: dict[str, Any] = {}

    def run(self, name: str, **settings: Any) -> dict[str, Any]:
        found = self.bench.run(**settings)
        print(f"{name}: {found['seconds']:.1f} s, peak {found['peak'] / 1e9:.2f} GB; {'; '.join(found['report'])}")
        return found

    def default(self) -> dict[str, Any]:
        return self.run("default")

    def start(self) -> dict[str, Any]:
        return self.run("layer-wise, then 20 steps", solver="layerwise, then gradient", steps=20)

    def paper(self) -> dict[str, Any]:
        return self.run("paper's", steps=100, solver="gradient", objective=CORE.objective.PAPER)

    def steps(self) -> dict[str, Any]:
        print(f"plan: {self.chosen.line()}\n\n{HEADING}")
        ways = {"as planned": self.chosen, "every block run again": self.every}
        ways["one at a time"] = replace(self.every, together=False)
        figures = {}
        for name, plan in ways.items():
            found = figures[name] = self.bench.steps(plan)
            found["tflop"] = self.bench.operations(plan.recomputed, plan.together)
            print(row(name, found, found["tflop"], self.ceiling, self.weights), flush=True)
        self.ours = figures["as planned"]
        return figures

    def dense(self) -> dict[str, Any]:
        found = self.bench.steps(self.chosen, dense=True)
        if not self.ours:
            return found
        print(row("published algorithm", found, self.ours["tflop"], self.ceiling, self.weights), flush=True)
        for mine, theirs in zip(self.ours["losses"][:1], found["losses"][:1], strict=True):
            assert all(abs(a - b) < 0.05 * abs(b) for a, b in zip(mine, theirs, strict=True)), (mine, theirs)
        extra = [(way["peak"] - self.weights) / 1e9 for way in (found, self.ours)]
        print(
            f"\npublished / ours: {found['seconds'] / self.ours['seconds']:.2f} of the time, "
            f"{extra[0] / extra[1]:.2f} of the memory beside the weights; losses of the first step "
            f"{found['losses'][0]} and {self.ours['losses'][0]}"
        )
        return found

    def apply(self) -> dict[str, Any]:
        taken = self.bench.applying()
        print(
            f"applying and writing into the weights: {taken['zipped']:.2f} s; a LoRA file of that rank by the stock "
            f"loader {taken['stock']:.2f} s; ratio {taken['ratio']:.2f} (medians of 7 in turn)"
        )
        return taken

    def train(self) -> dict[str, Any]:
        found = self.bench.training()
        print(
            f"training a LoRA: {found['seconds']:.2f} s a step, peak {found['peak'] / 1e9:.2f} GB, "
            f"{(found['peak'] - self.weights) / 1e9:.2f} beside the weights; planned {found['report']}"
        )
        return found

    def smaller(self, gigabytes: float) -> dict[str, Any]:
        """A step and a whole run as on a card of that size; of a part that fails, why."""
        part: dict[str, Any] = {}
        with meters.limited(gigabytes):
            for name, measure in (("step", lambda: self.bench.steps(self.bench.plan())), ("zip", self.bench.run)):
                measured(part, name, measure)
                if name in part:
                    peak, seconds = part[name]["peak"] / 1e9, part[name]["seconds"]
                    print(f"{gigabytes:g} GB: {name} {seconds:.2f} s, peak {peak:.2f} GB", flush=True)
        return part

    def todo(self) -> Iterator[tuple[str, str, Callable[[], Any]]]:
        """(Where its figures stand, "" for the top; its name; what measures it), of all that is asked for."""
        for name in PARTS:
            if name in GIVEN.skip or (name in ON_A_CARD and not CUDA):
                continue
            if name != "limits":
                yield "", name, getattr(self, name)
            for gigabytes in GIVEN.limits if name == "limits" else ():
                if gigabytes * 1e9 < torch.cuda.get_device_properties(0).total_memory:
                    yield "limits", f"{gigabytes:g} GB", partial(self.smaller, gigabytes)


HEADING = (
    "| way | s a step | s in 100 | TFLOP a step | TFLOP/s | of the ceiling | peak GB | beside the weights | parts |\n"
    "| --- | --- | --- | --- | --- | --- | --- | --- | --- |"
)


def measured(figures: dict[str, Any], name: str, measure: Any) -> None:
    """Put what a part measured into the figures, or why it could not, and let the next one go on."""
    try:
        figures[name] = measure()
    except Exception as error:
        figures.setdefault("failed", {})[name] = f"{type(error).__name__}: {error}"
        print(f"{name} failed: {type(error).__name__}: {error}", flush=True)


def main() -> int:
    top = meters.ceilings(CUDA, DTYPE)
    figures: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if CUDA else f"{torch.get_num_threads()} threads, {platform.machine()}",
        "torch": torch.__version__,
        **{key: getattr(GIVEN, key) for key in ("dtype", "size", "rank", "steps")},
        "ceilings": top,
    }
    print(
        f"{figures['device']}, torch {figures['torch']}, {GIVEN.dtype}, {GIVEN.size} x {GIVEN.size}, rank {GIVEN.rank}"
    )
    print(f"ceilings: {top['tflops']:.2f} TFLOP/s in a matrix product, {top['copy_gb_s']:.0f} GB/s in a copy")
    parts = Parts(top["tflops"])
    figures["weights"] = parts.weights
    for where, name, measure in parts.todo():
        began = now()
        measured(figures.setdefault(where, {}) if where else figures, name, measure)
        figures.setdefault("seconds", {})[name] = now() - began
        if GIVEN.json:  # whole or not at all: who waits for it may end this at any time
            partial_file = GIVEN.json.with_suffix(".part")
            partial_file.write_text(json.dumps(figures, indent=1), encoding="utf-8")
            os.replace(partial_file, GIVEN.json)
    return 1 if "failed" in figures else 0


if __name__ == "__main__":
    sys.exit(main())
