"""Blocks of the network: which one a layer lies in, and which ones belong to content or to style alone."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence

from .files import shown
from .lora_set import CONCEPTS

Blocks = Mapping[str, Sequence[str]]  # "content", "style" -> starts of layer names
B_LORA_BLOCKS: Blocks = {"content": ("output_blocks.0.1.",), "style": ("output_blocks.1.1.",)}  # arXiv 2403.14572
UNZIPLORA_BLOCKS: Blocks = {  # arXiv 2412.04465: up_blocks.0.attentions.0 and .2; up_blocks.0.attentions.1, up_blocks.1
    "content": ("output_blocks.0.1.", "output_blocks.2.1."),
    "style": ("output_blocks.1.1.", "output_blocks.3.", "output_blocks.4.", "output_blocks.5."),
}
_NETWORK = "diffusion_model."  # before every layer's name in the host
_KIND_AND_NUMBER = re.compile(r"^(?P<kind>[a-z_]+?)(?:_?blocks?)?\.(?P<number>\d+)\.")


def block_name(layer: str) -> str:
    """A short name of the block that a layer lies in: "input 4", "middle", "double 0"; "" for none."""
    match = _KIND_AND_NUMBER.match(layer.removeprefix(_NETWORK))
    if match is None:
        return ""
    kind = match["kind"].replace("_", " ")
    return kind if kind == "middle" else f"{kind} {match['number']}"


def lies_in(layer: str, blocks: Iterable[str]) -> bool:
    """Whether a layer lies in one of these blocks, each the start of a layer's name."""
    return layer.removeprefix(_NETWORK).startswith(tuple(blocks))


def read_blocks(content: str, style: str) -> Blocks:
    """Blocks from two texts that name them, with commas or spaces between."""
    texts = {"content": content, "style": style}
    return {c: tuple(f"{name.rstrip('.')}." for name in re.split(r"[,\s]+", text) if name) for c, text in texts.items()}


def block_owners(layers: Collection[str], blocks: Blocks) -> dict[str, str]:
    """Layer -> the concept that it belongs to alone, of those that lie in a block of either.

    Raises ValueError for a block that the model has not, a layer of both concepts, and a concept without a block.
    """
    owners: dict[str, str] = {}
    for concept in CONCEPTS:
        if not blocks[concept]:
            raise ValueError(f"{concept}_blocks is empty; name a block, or turn block_separation off")
        for block in blocks[concept]:
            inside = [layer for layer in layers if lies_in(layer, [block])]
            name = shown(block.rstrip("."), 40)
            if not inside:
                others = ", ".join(sorted({n.removeprefix(_NETWORK).split(".transformer_")[0] for n in layers}))
                raise ValueError(
                    f"{concept}_blocks: this model has no attention in '{name}'; name its own "
                    f"blocks (it has {others}), or turn block_separation off"
                )
            if any(owners.get(layer, concept) != concept for layer in inside):
                raise ValueError(f"'{name}' is in content_blocks and in style_blocks; choose one")
            owners |= dict.fromkeys(inside, concept)
    return owners
