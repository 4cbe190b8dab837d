"""What the pack's own training makes of the miniature's pictures, judged as the demo's LoRAs are.

python3 dev.py run benchmarks/training.py concept     Train Concept LoRA against the shipped LoRAs, three seeds
python3 dev.py run benchmarks/training.py prior       what class pictures keep of the base model

Figures are shares of 32 pictures that the judges call right; each line says which seed.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent.parent))

import torch
from PIL import Image
from safetensors.torch import load_file

from demo import concepts, gates, judge, lora, miniature
from devhost.base import find_miniature
from devhost.inprocess import load_miniature_extension, load_pack

STEPS, RATE, RANK, BATCH = 450, 2e-3, 16, 8


class Bench:
    """The miniature twice: as ComfyUI loads it, to train on, and as the demo loads it, to be judged."""

    def __init__(self) -> None:
        self.pack = load_pack()
        load_miniature_extension()
        import comfy.sd
        import folder_paths

        found = find_miniature()
        self.folder = found.checkpoint.parent.parent
        self.output = Path(tempfile.mkdtemp())
        folder_paths.set_output_directory(str(self.output))
        with torch.inference_mode():
            self.model, self.clip, self.vae, _ = comfy.sd.load_checkpoint_guess_config(str(found.checkpoint))
        self.judged = miniature.load_miniature(str(found.checkpoint))
        self.jury = judge.load_judge(str(self.folder / "weights" / "judge.safetensors"))
        self.concepts = {concept.name: concept for concept in concepts.concepts()}

    def prompt(self, text: str) -> list:
        with torch.inference_mode():
            return self.clip.encode_from_tokens_scheduled(self.clip.tokenize(text))

    def shown(self, concept: concepts.Concept, only: int | None = None) -> Any:
        chosen = range(len(concept.scenes)) if only is None else [only]
        files = [self.folder / concept.picture(i) for i in chosen]
        frames = [torch.frombuffer(bytearray(Image.open(f).convert("RGB").tobytes()), dtype=torch.uint8) for f in files]
        images = torch.stack(frames).reshape(len(frames), 128, 128, 3) / 255
        prompts = [self.prompt(concept.prompts[i]) for i in chosen]
        return self.pack.nodes.bridge.training.Shown([images], prompts)

    def settings(self, **changes: Any) -> Any:
        asked = {"steps": STEPS, "learning_rate": RATE, "rank": RANK, "batch_size": BATCH, **changes}
        return self.pack.ziplora_core.training.Settings(**asked)

    def train(self, concept: concepts.Concept, seed: int, **changes: Any) -> tuple[Path, float]:
        """(file, seconds)"""
        training = self.pack.nodes.bridge.training
        settings = self.settings(seed=seed, **{k: changes.pop(k) for k in list(changes) if k in _SETTINGS})
        task = training.Task([self.shown(concept)], settings, f"loras/{concept.name}", 128, **changes)
        began = time.monotonic()
        with torch.inference_mode():
            done = training.train_concept(self.model, self.vae, task)
        return self.output / done.file, time.monotonic() - began

    def gates(self, concept: concepts.Concept, file: Path, seed: int = 1000) -> dict[str, float]:
        """As `demo.train --parts gates` judges a LoRA file."""
        tensors = load_file(str(file))
        rank = next(t.shape[0] for k, t in tensors.items() if k.endswith("lora_down.weight"))
        branches = lora.attach(self.judged.unet, rank, float(rank))
        try:
            lora.load_into(branches, tensors)
            gate = gates.subject_gates if concept.kind == "content" else gates.style_gates
            figures, _ = gate(self.judged, self.jury, concept, seed)
            return {**figures, "base": gates.leak_gates(self.judged, self.jury, seed + 7)}
        finally:
            lora.detach(self.judged.unet, branches)


_SETTINGS = ("steps", "learning_rate", "rank", "batch_size", "prior_weight")


def line(name: str, figures: dict[str, float]) -> str:
    return f"{name:34}" + "  ".join(f"{k} {v:.2f}" for k, v in figures.items())


def spread(several: list[dict[str, float]]) -> str:
    spreads = {k: (statistics.mean(v), statistics.pstdev(v)) for k in several[0] for v in [[f[k] for f in several]]}
    return "  ".join(f"{k} {mean:.2f} ± {sd:.2f}" for k, (mean, sd) in spreads.items())


def concept(bench: Bench, names: list[str], seeds: int, steps: int, rate: float) -> None:
    for name in names:
        taught = bench.concepts[name]
        print(line(f"{name}: shipped", bench.gates(taught, bench.folder / taught.file)), flush=True)
        found = []
        for seed in range(seeds):
            file, seconds = bench.train(taught, seed, steps=steps, learning_rate=rate)
            found.append(bench.gates(taught, file))
            print(line(f"{name}: trained here, seed {seed}, {seconds:.0f} s", found[-1]), flush=True)
        print(f"{name}: mean ± sd  {spread(found)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["concept"])
    parser.add_argument("--only", default="house,mushroom,ember,candy", help="names, by commas")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--rate", type=float, default=RATE)
    asked = parser.parse_args()
    bench = Bench()
    concept(bench, asked.only.split(","), asked.seeds, asked.steps, asked.rate)


if __name__ == "__main__":
    main()
