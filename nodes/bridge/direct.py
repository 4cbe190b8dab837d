"""Training-free merges, as zipped pairs."""

from __future__ import annotations

import time
from dataclasses import replace

import torch
from comfy import model_management as management

from ...ziplora_core import direct
from ...ziplora_core.checks import one_of
from ...ziplora_core.direct import plain_sum
from ...ziplora_core.direct.method import Method
from ...ziplora_core.lora_set import LoRASet
from .lora import described, fitting, loras
from .lora.zipped import ZippedLoRA


def merge(model, sources: loras.LoRASources, method: str) -> ZippedLoRA:
    """model: ModelPatcher, nothing of which is loaded. Raises ValueError (LoRAFileError for a file), MemoryError."""
    one_of("method", method, direct.METHODS)
    chosen = direct.METHODS[method]
    chosen.check(sources.by_concept, direct.METHODS.values())
    fitted = fitting.fit(sources, model.model)
    check_memory(chosen, fitted.loras)
    began = time.monotonic()
    merged, coefficients = chosen(fitted.loras)
    seconds = time.monotonic() - began
    settings = dict(chosen.settings)
    return ZippedLoRA(
        sources,
        replace(fitted, loras=merged),
        coefficients,
        report=_report(sources, fitted, merged, chosen, seconds),
        method=method,
        settings=settings,
    )


def check_memory(method: Method, of: LoRASet) -> None:
    """Raises MemoryError where the merge would not fit beside what is in memory."""
    need, free = method.needs(of), management.get_free_memory(torch.device("cpu"))
    if len(of.concepts) > 1 and need > free:
        small = " or ".join(
            other.name for other in direct.METHODS.values() if not (other.needs(of) or other.for_a_pair)
        )
        raise MemoryError(
            f"{method.name} would hold {need / 1e9:.1f} GB, and {free / 1e9:.1f} GB of memory are free; choose "
            f"{small}, or close other programs"
        )


def _report(
    sources: loras.LoRASources, fitted: fitting.FittedSet, merged: LoRASet, method: Method, seconds: float
) -> str:
    """As ZipLoRA Optimize's, of what is known without a pass of the model."""
    verdict = "Merged without learning: nothing was measured, so compare what it draws with plain stacking."
    if method is plain_sum.METHOD:
        verdict = "Plain stacking, as LoRA loaders in a row do it."
    if len(sources.by_concept) == 1:
        verdict = described.ALONE
    settings = "".join(f", {name} {value:g}" for name, value in method.settings.items())
    told = method.told(fitted.loras, merged) if len(sources.by_concept) > 1 else []
    details = [f"merge: {method.name}{settings}", *told, *described.lines(sources, fitted)]
    details += described.notes(sources, fitted, zipped=False)
    return described.report([verdict, f"cost: {seconds:.1f} s, without running the model"], details)
