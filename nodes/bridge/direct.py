"""Training-free merges, as zipped pairs."""

from __future__ import annotations

from dataclasses import replace

from ...ziplora_core import direct
from ...ziplora_core.checks import one_of
from .lora import fitting, loras
from .lora.zipped import ZippedLoRA


def merge(model, sources: loras.LoRASources, method: str) -> ZippedLoRA:
    """model: ModelPatcher, nothing of which is loaded. Raises ValueError (LoRAFileError for a file)."""
    one_of("method", method, direct.METHODS)
    chosen = direct.METHODS[method]
    chosen.check(sources.by_concept, direct.METHODS.values())
    fitted = fitting.fit(sources, model.model)
    merged, coefficients = chosen(fitted.loras)
    settings = dict(chosen.settings)
    said = "".join(f", {name} {value:g}" for name, value in settings.items())
    return ZippedLoRA(
        sources,
        replace(fitted, loras=merged),
        coefficients,
        report=f"merge: {method}{said}",
        method=method,
        settings=settings,
    )
