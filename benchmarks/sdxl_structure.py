"""Zip two random LoRAs on the full-size SDXL structure with random weights, through the real patcher.

    python benchmarks/sdxl_structure.py --size 256 --steps 2            # CPU in fp32, 15 GB
    python benchmarks/sdxl_structure.py --device cuda --size 1024 --steps 10

Prints the number of coefficients, seconds a step and peak memory. Random weights: the figures are of time
and memory, never of quality. Needs a ComfyUI tree (COMFYUI_PATH, or the one that `dev.py setup` made).
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from devhost.inprocess import load_pack


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("fp32", "fp16", "bf16"), help="fp32 on the CPU, else bf16")
    parser.add_argument("--size", type=int, default=256, help="pixels of a side; latents are an eighth")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    args = parser.parse_args()
    args.dtype = args.dtype or ("fp32" if args.device == "cpu" else "bf16")  # a CPU's bf16 is slow
    return args


def peak_memory(device: str) -> int:
    """Peak bytes: of the card's allocator, or resident in this process."""
    if device == "cuda":
        import torch

        return torch.cuda.max_memory_allocated()
    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def main() -> None:
    args = parse()
    pack = load_pack(cpu=args.device == "cpu")
    import torch

    from devhost import full_size

    torch.manual_seed(0)
    dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[args.dtype]
    began = time.monotonic()
    with torch.inference_mode():
        patcher = full_size.sdxl_patcher(dtype)
        loras = pack.nodes.bridge.loras
        sources = loras.LoRASources(
            *(
                loras.LoRASource(name, full_size.attention_lora(patcher.model, args.rank, seed), 1.0)
                for seed, name in enumerate(("content", "style"))
            )
        )
        conditioning = {c: full_size.random_prompt(i) for i, c in enumerate(("content", "style"))}
        latents = {c: full_size.random_latents(args.size // 8, i) for i, c in enumerate(("content", "style"))}
        settings = pack.ziplora_core.solver.Settings(steps=args.steps)
        print(f"built in {time.monotonic() - began:.0f} s", flush=True)
        zipped, loss, report = pack.nodes.bridge.optimise.optimise(patcher, sources, conditioning, latents, settings)
    figures = {
        "device": torch.cuda.get_device_name() if args.device == "cuda" else platform.processor() or "cpu",
        "torch": torch.__version__,
        "dtype": args.dtype,
        "size": args.size,
        "rank": args.rank,
        "coefficients": zipped.coefficients.count,
        "peak_gb": round(peak_memory(args.device) / 1e9, 2),
        "losses": loss["loss"],
    }
    print(report)
    print(json.dumps(figures))
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
