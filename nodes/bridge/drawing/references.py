"""Reference latents where a user has no pictures: drawn by each LoRA alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ....ziplora_core.coefficients import Coefficients
from ..apply import apply
from ..lora import fitting, loras
from ..lora.zipped import ZippedLoRA
from ..memory.retry import is_out_of_memory
from .sampling import GeneratedReferences, ReferenceRequest, Watch, draw_plain

DEFAULT = ReferenceRequest()
LESS = "drawn_references or drawn_size"  # inputs that make it need less memory


@dataclass(frozen=True)
class Reference:
    """What a user gives of one concept: its prompt (the host's conditioning), and a LATENT or None."""

    positive: Any
    latents: Any = None


def draw(
    model,
    sources: loras.LoRASources,
    fitted: fitting.FittedSet,
    concept: str,
    conditioning: list,
    request: ReferenceRequest,
    seed: int,
    watch: Watch | None = None,
) -> GeneratedReferences:
    """Latents that one LoRA draws at its strength from its own prompt.

    model: ModelPatcher, unchanged. watch: as of `draw_plain`. The negative prompt is zeros, as Conditioning Zero Out
    makes them.
    """
    alone = {other: 0.0 for other in fitted.loras.concepts if other != concept}
    patched, _ = apply(model, None, ZippedLoRA(sources, fitted, Coefficients.ones(fitted.loras)).dialled(alone), 1.0)
    seed += sorted(fitted.loras.concepts).index(concept)  # as many noises as concepts, whatever their order
    try:
        drawn = draw_plain(patched, conditioning, request, seed, watch)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise type(error)(
            f"not enough memory to draw {request.count} {concept} references of {request.side} x {request.side} "
            f"pixels; lower {LESS}, or connect {sources.input_name(concept, 'latents')}"
        ) from None
    if drawn is None:
        raise FloatingPointError(
            f"the {concept} LoRA alone draws no picture (its latents are not finite): look at the file and at what "
            "other nodes have put on the model, load the model in bf16 or fp32, or connect "
            f"{sources.input_name(concept, 'latents')}"
        )
    return drawn
