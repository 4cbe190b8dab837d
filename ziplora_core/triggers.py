"""What a LoRA file and the files beside it say of its use: a prompt, a base model, a strength, a thumbnail."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Triggers:
    """What is known of a LoRA without its tensors.

    prompt: what to write to use it, "" where nothing is known. source: where that stands, such as
    "modelspec.trigger_phrase" or "civitai.info", "" where there is no prompt. base_model: as the file says, or "".
    family: of base_model, by the names of `formats.looks_like` ("SDXL", "SD 1.5", "Flux", …), "" where unknown.
    thumbnail: path of a picture beside the file. strength: the weight that a file beside it prefers. notes: what could
    not be read, in sentences.
    """

    prompt: str = ""
    source: str = ""
    base_model: str = ""
    family: str = ""
    thumbnail: str | None = None
    strength: float | None = None
    notes: tuple[str, ...] = ()
