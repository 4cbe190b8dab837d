"""Text-encoder parts of LoRA files: they are not zipped, and only a connected `clip` gets them."""

from __future__ import annotations

import re

import comfy.lora

from ....ziplora_core import formats
from .loras import LoRASource, LoRASources
from .zipped import ZippedLoRA, sources_of

_KOHYA = re.compile(r"lora_te\d?_")


def parts(source: LoRASource) -> int:
    """How many text-encoder layers a file changes."""
    return len(set(formats.text_encoder_layers(source.tensors).values()))


def names(source: LoRASource, model) -> dict[str, str]:
    """Layer name in a LoRA file -> weight of a text encoder: the host's own map, and of this file's layers the names of
    peft and of newer releases of transformers, which the host skips. model: the host's text encoder.

    Of several names of one layer the host's counts.
    """
    hosts = comfy.lora.model_lora_keys_clip(model, {})
    known = formats.text_encoder_layers(source.tensors).items()
    more = {layer: hosts[name] for layer, name in known if layer not in hosts and name in hosts}
    return {**more, **hosts}


def kohya_names(model) -> dict[str, str]:
    """Weight of a text encoder -> layer name in a LoRA file, of those that the host reads there as kohya's trainers
    write them (`lora_te_…`; `lora_te1_…` and so on where there are several). model: the host's text encoder."""
    found: dict[str, list[str]] = {}
    for name, key in comfy.lora.model_lora_keys_clip(model, {}).items():
        if _KOHYA.match(name):
            found.setdefault(key, []).append(name)
    several = len({key.split(".")[0] for key in found}) > 1
    return {key: min(names, key=lambda name: name.startswith("lora_te_") == several) for key, names in found.items()}


def unread_scales(source: LoRASource) -> str | None:
    """What the host's loader does not read of a file's text-encoder part; None where it reads all."""
    count = sum(formats.is_text_encoder(key) and key.endswith(formats.MAGNITUDES) for key in source.tensors)
    if not count:
        return None
    return (
        f"{count} text-encoder layers of '{source.title}' are DoRA in peft's form, whose scale is not read: they count "
        "as LoRA without it, as in ComfyUI's own loader"
    )


def notes(sources: LoRASources, zipped: bool) -> list[str]:
    """What a report says of them, for each file and for all. zipped: whether prompts were looked at."""
    counted = [(source.title, parts(source)) for source in sources.by_concept.values()]
    where = (
        "the LoRA's own prompt was encoded with it, and what is drawn has it where its prompts are encoded with the "
        "clip that comes out"
        if sources.own_text_encoders
        else "it counts where clip is connected to Apply Zipped LoRA and the prompts to draw are encoded with the clip "
        "that comes out of it"
    )
    lines = [
        f"'{title}' also changes the text encoder ({count} layers). This part is not zipped: {where}"
        for title, count in counted
        if count
    ]
    lines += filter(None, map(unread_scales, sources.by_concept.values()))
    if lines and zipped and not sources.own_text_encoders:
        lines.append(
            "a prompt does not tell which text encoder made it: where the two prompts for zipping were encoded with "
            "the checkpoint's own clip, as in the graphs that ship, each LoRA was looked at without its text-encoder "
            "part; to have it in, put Load LoRA with that file (strength_model 0, strength_clip as the LoRA's "
            "strength) before the text encode of its own training prompt"
        )
    return lines


def left_out(given: ZippedLoRA | LoRASources) -> str | None:
    """What is lost where LoRAs are applied without `clip`; None where nothing is."""
    titles = [source.title for source in sources_of(given).by_concept.values() if source.of_clip and parts(source)]
    if not titles:
        return None
    files = " and ".join(f"'{title}'" for title in titles)
    return (
        f"clip is not connected: the text-encoder part of {files} is left out. Connect the checkpoint's clip here, and "
        "encode the prompts with the clip that comes out"
    )
