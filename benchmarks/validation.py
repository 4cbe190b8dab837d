"""How long a server answers nobody while it validates a prompt with large LoRA files.

    python3 dev.py run benchmarks/validation.py [--megabytes 800] [--beside 40]

A real server; files that take no place on the disk. Another client asks for the queue without a pause; the figure is
the longest that it waited for an answer while a prompt was posted, refused for a setting at its end, after every file
was validated; and, for comparison, while none was. Then the same while a prompt that reads both files runs.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import requests
import torch

sys.path.append(str(Path(__file__).resolve().parent.parent))

from devhost.answers import PromptRefused
from devhost.base import CHECKPOINT, make_base
from devhost.large_files import sparse_lora
from devhost.server import ComfyServer
from ziplora_core import saved
from ziplora_core.coefficients import Coefficients


def node(class_type: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": class_type, "inputs": inputs}


def longest_wait(url: str, work: Callable[[], object]) -> tuple[float, float]:
    """(seconds that the work took, the longest that an answer of the server took meanwhile)."""
    waits, over = [], threading.Event()

    def ask() -> None:
        with requests.Session() as session:
            while not over.is_set():
                began = time.perf_counter()
                session.get(f"{url}/queue", timeout=600).raise_for_status()
                waits.append(time.perf_counter() - began)

    asking = threading.Thread(target=ask)
    asking.start()
    while len(waits) < 20:
        time.sleep(0.01)
    del waits[:]
    began = time.perf_counter()
    work()
    took = time.perf_counter() - began
    over.set()
    asking.join()
    return took, max(waits)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=800)
    parser.add_argument("--beside", type=int, default=40)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        base = make_base(Path(folder) / "base")
        loras = base / "models" / "loras"
        names = [f"large {number}.safetensors" for number in range(given.beside)]
        sizes = [sparse_lora(loras / name, given.megabytes * 10**6) for name in names]
        gone = saved.SavedLoRA("gone.safetensors", "0" * 64, sizes[0], 1.0)
        file = base / "output" / "ziplora" / "gone.safetensors"
        file.parent.mkdir(parents=True, exist_ok=True)
        vectors = {"diffusion_model.x.weight": torch.ones(4)}
        about = saved.SavedZip({"content": gone, "style": gone}, {"content": 1.0, "style": 1.0}, "zipped", {}, {})
        saved.write(file, Coefficients({"content": vectors, "style": vectors}), about)
        pair = node(
            "LoadLoRAPair", content_lora=names[0], style_lora=names[1], content_strength=1.0, style_strength=1.0
        )
        checkpoint = node("CheckpointLoaderSimple", ckpt_name=CHECKPOINT)
        loaded = node("LoadZippedLoRA", model=["checkpoint", 0], zipped=file.name)
        merged = node("DirectMergeLoRA", model=["checkpoint", 0], lora_pair=["pair", 0], method="sum")
        dial = node("StyleStrength", zipped_lora=["zipped", 0], style_strength=9.0, content_strength=1.0)
        keep = node("SaveZippedLoRA", zipped_lora=["dial", 0], filename_prefix="x")
        prompts = {
            "two LoRAs": {"checkpoint": checkpoint, "pair": pair, "zipped": merged, "dial": dial, "keep": keep},
            "a saved pair whose LoRA is gone": {"checkpoint": checkpoint, "zipped": loaded, "dial": dial, "keep": keep},
        }
        seen = {"pair": pair, "seen": node("PreviewAny", source=["pair", 0])}
        with ComfyServer(base) as server:

            def refused(prompt: dict[str, Any]) -> None:
                with suppress(PromptRefused):
                    server.queue(prompt)
                    raise RuntimeError("the prompt was accepted")

            print(f"{given.beside} LoRAs of {given.megabytes} MB; milliseconds")
            _, wait = longest_wait(server.url, lambda: time.sleep(2))
            print(f"nothing: longest wait {1e3 * wait:.0f}")
            for name, prompt in prompts.items():
                for turn in ("first", "again"):
                    took, wait = longest_wait(server.url, lambda p=prompt: refused(p))
                    print(f"{name}, {turn}: validated in {1e3 * took:.0f}, longest wait {1e3 * wait:.0f}")
            took, wait = longest_wait(server.url, lambda: server.run(seen, check=False))
            print(f"both read, checked and hashed: {1e3 * took:.0f}, longest wait {1e3 * wait:.0f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
