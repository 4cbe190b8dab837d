"""Merges without learning, as zipped pairs."""

from __future__ import annotations

from dataclasses import replace

from ...ziplora_core import direct
from ...ziplora_core.checks import one_of
from .lora import fitting, loras
from .lora.zipped import ZippedLoRA


def merge(model, sources: loras.LoRASources, method: str) -> ZippedLoRA:
    """model: ModelPatcher, nothing of which is loaded. Raises ValueError (LoRAFileError for a file)."""
    one_of("method", method, direct.METHODS)
    fitted = fitting.fit(sources, model.model)
    pair, coefficients = direct.METHODS[method](fitted.pair)
    settings = direct.settings(method)
    said = "".join(f", {name} {value:g}" for name, value in settings.items())
    return ZippedLoRA(
        sources,
        replace(fitted, pair=pair),
        coefficients,
        report=f"merge: {method}{said}",
        method=method,
        settings=settings,
    )
