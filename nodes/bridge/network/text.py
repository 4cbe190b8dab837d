"""Words of prompts: embeddings that they name, and what LoRAs answer to them where a model reads the prompt itself."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from comfy.model_management import throw_exception_if_processing_interrupted
from torch import Tensor

from ....ziplora_core import words
from ....ziplora_core.files import shown
from ....ziplora_core.lora_set import Factors, LoRASet

_READ_PROMPTS = re.compile(r"\.attn2\.to_[kv]\.weight$")  # in UNets; other networks mix the prompt with the picture
_NAMED = re.compile(r"(?:^|\s|(?<!\\)\()embedding:\S")  # an embedding file, as the host's tokenizers look for it
Encode = Callable[[str], list]


def check_embeddings(name: str, text: str, tokens: Mapping[str, list]) -> None:
    """Raises ValueError where a prompt names embedding files that were not found: the host leaves such words out, with
    a line in its log.

    name: of the input. tokens: of the prompt, with the numbers of words.
    """
    named = len(_NAMED.findall(text))
    found = (
        {word for batch in batches for token, _, word in batch if isinstance(token, Tensor)}
        for batches in tokens.values()
    )
    if named > (there := max(map(len, found), default=0)):
        raise ValueError(
            f"{name}: not every embedding that '{shown(text)}' names was found ({there} of {named}); write their names "
            "as the node that trained them gives them"
        )


def readers(loras: LoRASet, concept: str) -> list[Factors]:
    """One LoRA's updates of the layers that read the prompt."""
    layers = loras.layers.items()
    return [layer[concept] for name, layer in layers if concept in layer and _READ_PROMPTS.search(name)]


def word_effects(
    loras: LoRASet, prompts: Mapping[str, str], encoders: Mapping[str, Encode]
) -> dict[str, words.WordEffect]:
    """By concept, of the LoRAs that change layers which read the prompt and hear it.

    prompts: of each concept, as written. encoders: of each concept, what a user of that LoRA has its prompts encoded
    with, as CLIP Text Encode does it. All prompts of one LoRA are encoded one after another. Interrupts pass through.
    """
    found = {}
    for concept in loras.concepts:
        layers = readers(loras, concept)
        if layers:

            def encoded(text: str, encode: Encode = encoders[concept]) -> Tensor:
                context: Tensor = encode(text)[0][0]
                return context[0].cpu()

            every = {other: encoded(text) for other, text in prompts.items()}
            ordinary = [encoded(text) for text in words.ORDINARY]
            effect = words.measure(
                layers, concept, every, ordinary, encoded(""), throw_exception_if_processing_interrupted
            )
            if effect is not None:
                found[concept] = effect
    return found
