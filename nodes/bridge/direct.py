"""Training-free merges, as zipped pairs."""

from __future__ import annotations

import time
from dataclasses import replace

from ...ziplora_core import direct
from ...ziplora_core.checks import one_of
from ...ziplora_core.direct import plain_sum
from ...ziplora_core.direct.method import Method
from .lora import described, fitting, loras
from .lora.zipped import ZippedLoRA


def merge(model, sources: loras.LoRASources, method: str) -> ZippedLoRA:
    """model: ModelPatcher, nothing of which is loaded. Raises ValueError (LoRAFileError for a file)."""
    one_of("method", method, direct.METHODS)
    chosen = direct.METHODS[method]
    chosen.check(sources.by_concept, direct.METHODS.values())
    fitted = fitting.fit(sources, model.model)
    began = time.monotonic()
    merged, coefficients = chosen(fitted.loras)
    seconds = time.monotonic() - began
    settings = dict(chosen.settings)
    return ZippedLoRA(
        sources,
        replace(fitted, loras=merged),
        coefficients,
        report=_report(sources, fitted, chosen, seconds),
        method=method,
        settings=settings,
    )


def _report(sources: loras.LoRASources, fitted: fitting.FittedSet, method: Method, seconds: float) -> str:
    """As ZipLoRA Optimize's, of what is known without a pass of the model."""
    verdict = "Merged without learning: nothing was measured, so compare what it draws with plain stacking."
    if method is plain_sum.METHOD:
        verdict = "Plain stacking, as LoRA loaders in a row do it."
    if len(sources.by_concept) == 1:
        verdict = described.ALONE
    settings = "".join(f", {name} {value:g}" for name, value in method.settings.items())
    details = [f"merge: {method.name}{settings}", *described.lines(sources, fitted)]
    details += described.notes(sources, fitted, zipped=False)
    return described.report([verdict, f"cost: {seconds:.1f} s, without running the model"], details)
