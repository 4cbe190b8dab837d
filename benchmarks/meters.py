"""Clocks that wait for the card, the most memory that a block takes, a card made smaller, and a machine's ceilings."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import psutil
import torch


def now(cuda: bool) -> float:
    """Seconds, once the card has finished what it was asked for."""
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter()


@dataclass
class Clock:
    """Seconds of the parts of a step, by asking the device to finish after each. predictor: the class that predicts."""

    now: Callable[[], float]
    predictor: type
    parts: dict[str, float] = field(default_factory=lambda: dict.fromkeys(("teacher", "student", "backward"), 0.0))

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        clock, forward, backward = self, self.predictor.__call__, torch.autograd.backward

        def timed_forward(self, batch, branch):
            began = clock.now()
            out = forward(self, batch, branch)
            clock.parts["student" if torch.is_grad_enabled() else "teacher"] += clock.now() - began
            return out

        def timed_backward(*args, **kwargs):
            began = clock.now()
            backward(*args, **kwargs)
            clock.parts["backward"] += clock.now() - began

        self.predictor.__call__, torch.autograd.backward = timed_forward, timed_backward
        try:
            yield
        finally:
            self.predictor.__call__, torch.autograd.backward = forward, backward


@contextlib.contextmanager
def limited(gigabytes: float) -> Iterator[None]:
    """As a smaller card: the host is told to leave the rest alone, and torch may not have it."""
    import comfy.model_management as management

    management.unload_all_models()
    management.soft_empty_cache()
    total, reserved = torch.cuda.get_device_properties(0).total_memory, management.EXTRA_RESERVED_VRAM
    torch.cuda.set_per_process_memory_fraction(gigabytes * 1e9 / total)
    management.EXTRA_RESERVED_VRAM = reserved + int(total - gigabytes * 1e9)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        management.EXTRA_RESERVED_VRAM = reserved


class Peak:
    """The most memory taken inside the block, in bytes: the card's allocator's, or resident in this process."""

    def __init__(self, cuda: bool) -> None:
        self.cuda, self.bytes = cuda, 0

    def __enter__(self) -> Peak:
        self.bytes = 0
        gc.collect()
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        else:
            with contextlib.suppress(OSError, AttributeError):  # glibc keeps what was freed
                ctypes.CDLL(None).malloc_trim(0)
            self._stop = threading.Event()
            self._watch = threading.Thread(target=self._sample, daemon=True)
            self._watch.start()
        return self

    def _sample(self) -> None:
        process = psutil.Process()
        while not self._stop.wait(0.01):
            self.bytes = max(self.bytes, process.memory_info().rss)

    def __exit__(self, *_: object) -> None:
        if self.cuda:
            self.bytes = torch.cuda.max_memory_allocated()
        else:
            self._stop.set()
            self._watch.join()


def ceilings(cuda: bool, dtype: torch.dtype) -> dict[str, float]:
    """TFLOP/s of a large matrix product, GB/s of a large copy (read and written): the best of several."""
    device, side = ("cuda", 8192) if cuda else ("cpu", 2048)
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    source = torch.empty(2**30 if cuda else 2**27, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def best(work: Callable[[], object], repeats: int = 10) -> float:
        times = []
        for _ in range(repeats):
            began = now(cuda)
            work()
            times.append(now(cuda) - began)
        return min(times)

    return {
        "tflops": 2 * side**3 / best(lambda: a @ b) / 1e12,
        "copy_gb_s": 2 * source.numel() / best(lambda: target.copy_(source)) / 1e9,
    }
