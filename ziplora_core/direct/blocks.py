"""Block maps: SDXL's transformer blocks go to content or to style (B-LoRA, UnZipLoRA)."""

from __future__ import annotations

from ..blocks import B_LORA_BLOCKS, UNZIPLORA_BLOCKS, Blocks, lies_in
from ..coefficients import Coefficients
from ..lora_set import LoRASet
from .method import Merged, Method


def by_blocks(loras: LoRASet, blocks: Blocks, elsewhere: float) -> Merged:
    """Coefficients of one in a concept's own blocks, zero in the other's, `elsewhere` in the rest.

    Raises ValueError where the set has no layer in a block.
    """

    for own in blocks.values():
        if not any(lies_in(name, own) for name in loras.layers):
            raise ValueError(
                f"no layer of the pair lies in {', '.join(own)}: block presets are for SDXL; "
                "choose another method for this model"
            )

    def weight(concept: str, name: str) -> float:
        owner = next((owner for owner in (concept, *blocks) if lies_in(name, blocks[owner])), None)
        return elsewhere if owner is None else float(owner == concept)

    ones = Coefficients.ones(loras)
    return loras, Coefficients(
        {c: {name: m * weight(c, name) for name, m in by_layer.items()} for c, by_layer in ones.by_concept.items()}
    )


B_LORA = Method(
    "B-LoRA blocks",
    "SDXL's blocks go to content or to style, the rest to nobody",
    lambda loras: by_blocks(loras, B_LORA_BLOCKS, elsewhere=0.0),
    for_a_pair=True,
    sdxl_alone=True,
)
UNZIPLORA = Method(
    "UnZipLoRA blocks",
    "SDXL's blocks go to content or to style, the rest to both",
    lambda loras: by_blocks(loras, UNZIPLORA_BLOCKS, elsewhere=1.0),
    for_a_pair=True,
    sdxl_alone=True,
)
