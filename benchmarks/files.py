"""Reading, saving and exporting a full-size SDXL pair, against what safetensors needs for the same bytes.

    python3 dev.py run benchmarks/files.py [--rank 64] [--repeats 9] [--threads 1]

Two random attention LoRAs on the host's SDXL class; ours and safetensors in turn, every run into new memory and a
new file. One thread: these are thousands of small products, and waking a second thread may cost more than it does.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))  # last: `nodes` there would hide ComfyUI's module

from devhost import full_size
from devhost.inprocess import load_pack

PACK = load_pack()

import comfy.utils  # noqa: E402
import folder_paths  # noqa: E402
import torch  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402


def side_by_side(ours: Callable[[], object], plain: Callable[[], object], repeats: int) -> tuple[list[float], ...]:
    """Seconds of each run, taken in turn: a machine that slows down slows both."""
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeats):
        for work, taken in zip((ours, plain), times, strict=True):
            began = time.perf_counter()
            work()
            taken.append(time.perf_counter() - began)
    return times


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    comfy.utils.set_progress_bar_enabled(False)
    bridge, core = PACK.nodes.bridge, PACK.ziplora_core
    model = full_size.sdxl_model(torch.float16, device="meta")
    with tempfile.TemporaryDirectory() as folder:
        for kind in ("loras", "output/ziplora"):
            os.makedirs(os.path.join(folder, kind))
        folder_paths.folder_names_and_paths["loras"] = ([os.path.join(folder, "loras")], {".safetensors"})
        folder_paths.output_directory = os.path.join(folder, "output")
        files = [os.path.join(folder, "loras", f"{name}.safetensors") for name in ("subject", "style")]
        for seed, file in enumerate(files):
            save_file(full_size.attention_lora(model, given.rank, seed), file)

        def read():
            return bridge.lora.loras.load_pair("subject.safetensors", "style.safetensors", 1.0, 1.0)

        def plain_read():
            # as the stock loader: every tensor, in memory of its own
            return [{k: t.clone() for k, t in load_file(file).items()} for file in files]

        sources = read()
        fitted = bridge.lora.fitting.fit(sources, model)
        zipped = bridge.lora.zipped.ZippedLoRA(sources, fitted, core.coefficients.Coefficients.ones(fitted.loras))
        exported = bridge.export.export_tensors(zipped, 0, "fp16", "kohya")
        megabytes = sum(t.numel() * t.element_size() for t in exported.tensors.values()) / 1e6

        def write():
            bridge.export.export_file(zipped, "mine", 0, "fp16", "kohya")

        def plain_write():
            # as ours, into a new file and flushed: writing over pages that the cache holds already is another job
            target = os.path.join(folder, "output", f"plain_{time.monotonic_ns()}.safetensors")
            save_file(exported.tensors, target, exported.metadata)
            with open(target, "rb+") as file:
                os.fsync(file.fileno())

        print(f"rank {given.rank} each, {torch.get_num_threads()} threads; median of {given.repeats} runs in turn")
        for name, ours, plain in (
            ("read both files, every number checked", read, plain_read),
            (f"export at exact rank, {megabytes:.0f} MB", write, plain_write),
        ):
            times = side_by_side(ours, plain, given.repeats)
            mine, theirs = map(statistics.median, times)
            ratios = [a / b for a, b in zip(*times, strict=True)]
            print(
                f"{name}: {mine:.2f} s; safetensors {theirs:.2f} s; "
                f"ratio {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
            )
        began = time.perf_counter()
        bridge.lora.fitting.fit(read(), model)
        print(f"fit to the model, with one read: {time.perf_counter() - began:.2f} s")
        began = time.perf_counter()
        name = bridge.saved.save(zipped, "mine")
        size = os.path.getsize(os.path.join(folder, "output", "ziplora", name)) / 1e6
        print(f"save {size:.2f} MB, with both files' hashes: {time.perf_counter() - began:.2f} s")
        began = time.perf_counter()
        bridge.export.export_tensors(zipped, given.rank, "fp16", "kohya")
        print(f"cut to rank {given.rank} by SVD: {time.perf_counter() - began:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
