"""The layers of a model that read the prompt itself, and what LoRAs answer there to the words of prompts."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from ....ziplora_core import words
from ....ziplora_core.lora_set import Factors, LoRASet

_READ_PROMPTS = re.compile(r"\.attn2\.to_[kv]\.weight$")  # in UNets; other networks mix the prompt with the picture
Encode = Callable[[str], list]


def readers(loras: LoRASet, concept: str) -> list[Factors]:
    """One LoRA's updates of the layers that read the prompt."""
    layers = loras.layers.items()
    return [layer[concept] for name, layer in layers if concept in layer and _READ_PROMPTS.search(name)]


def word_effects(
    loras: LoRASet, prompts: Mapping[str, str], encoders: Mapping[str, Encode]
) -> dict[str, words.WordEffect]:
    """By concept, of the LoRAs that change layers which read the prompt.

    prompts: of each concept, as written. encoders: of each concept, what a user of that LoRA has its prompts encoded
    with, as CLIP Text Encode does it.
    """
    found, known = {}, {}

    def encoded(concept: str, text: str):
        encode = encoders[concept]
        if (encode, text) not in known:
            known[encode, text] = encode(text)[0][0][0].cpu()
        return known[encode, text]

    for concept in loras.concepts:
        layers = readers(loras, concept)
        if layers:
            every = {other: encoded(concept, text) for other, text in prompts.items()}
            ordinary = [encoded(concept, text) for text in words.ORDINARY]
            found[concept] = words.measure(layers, concept, every, ordinary, encoded(concept, ""))
    return found
