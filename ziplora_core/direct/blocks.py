"""Block maps: SDXL's transformer blocks go to content or to style (B-LoRA, UnZipLoRA)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..coefficients import Coefficients
from ..lora_set import LoRASet
from .method import Merged, Method

Blocks = Mapping[str, Sequence[str]]  # "content", "style" -> starts of layer names
B_LORA_BLOCKS: Blocks = {"content": ("output_blocks.0.1.",), "style": ("output_blocks.1.1.",)}  # arXiv 2403.14572
UNZIPLORA_BLOCKS: Blocks = {  # arXiv 2412.04465: up_blocks.0.attentions.0 and .2; up_blocks.0.attentions.1, up_blocks.1
    "content": ("output_blocks.0.1.", "output_blocks.2.1."),
    "style": ("output_blocks.1.1.", "output_blocks.3.", "output_blocks.4.", "output_blocks.5."),
}


def by_blocks(loras: LoRASet, blocks: Blocks, elsewhere: float) -> Merged:
    """Coefficients of one in a concept's own blocks, zero in the other's, `elsewhere` in the rest.

    Raises ValueError where the set has no layer in a block.
    """

    def inside(name: str, blocks: Sequence[str]) -> bool:
        return any(f".{block}" in name for block in blocks)

    for own in blocks.values():
        if not any(inside(name, own) for name in loras.layers):
            raise ValueError(
                f"no layer of the pair lies in {', '.join(own)}: block presets are for SDXL; "
                "choose another method for this model"
            )

    def weight(concept: str, name: str) -> float:
        owner = next((owner for owner in (concept, *blocks) if inside(name, blocks[owner])), None)
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
