"""ZipCheck: in seconds, before a zip: what each LoRA does with its prompt, and whether zipping is worth it."""

from __future__ import annotations

import torch
from comfy_api.v0_0_2 import io, ui

from . import inputs, sheet
from .bridge import check as checking
from .bridge import zip as zipping
from .schema import Schema
from .zip import ZipLoRAs, listed_loras, loader_chain, of_loaders, own_fingerprint

_OF_ZIP = ("model", "clip", "subject_lora", "subject_prompt", "style_lora", "style_prompt", "seed")
_ADVANCED = ("subject_strength", "style_strength", "lora_stack", "stack_prompts", "drawn_size")


class ZipCheck(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> Schema:
        shared = {given.id: given for given in ZipLoRAs.define_schema().inputs}
        vae = io.Vae.Input(
            "vae", lazy=True, optional=True, tooltip="The checkpoint's VAE, for clear pictures. Not connected: rough."
        )
        return Schema(
            node_id="ZipCheck",
            display_name="Zip Check",
            category="ZipLoRA",
            search_aliases=["check", "check lora", "test lora", "trigger", "trigger word", "lora preview"],
            description="In seconds, before Zip LoRAs: draws each LoRA roughly with its prompt, beside the model "
            "without it, and says whether the prompts wake their LoRAs, whether zipping is worth it, and what it would "
            "take.",
            is_output_node=True,
            inputs=[*(shared[name] for name in _OF_ZIP), *(shared[name] for name in _ADVANCED), inputs.advanced(vae)],
            outputs=[
                io.Image.Output(display_name="strip", tooltip="What was drawn and found, as one picture."),
                io.String.Output(display_name="report", tooltip="What was found, and on which figures it rests."),
            ],
        )

    @classmethod
    def validate_inputs(cls, subject_lora: str | None, style_lora: str | None) -> bool | str:
        """Each file by itself: that both are one is a verdict."""
        chosen = {"subject_lora": subject_lora, "style_lora": style_lora}
        problems = [zipping.check_files(**{which: name}) for which, name in chosen.items()]
        return "; ".join(filter(None, problems)) or True

    @classmethod
    def fingerprint_inputs(cls, **given):
        return own_fingerprint(given)

    @classmethod
    def check_lazy_status(cls, **given) -> list[str]:
        """Which inputs to make next: what can be refused is refused before a checkpoint is loaded."""
        missing = inputs.not_made(("model", "clip"), given)
        if missing and of_loaders(given):  # which LoRAs, is known when they are there
            return missing
        zipping.prompts(listed_loras(loader_chain(given), **given))
        return inputs.not_made(("model", "clip", "vae"), given)

    @classmethod
    def execute(cls, model, clip, seed: int, vae=None, drawn_size: int = 0, **given) -> io.NodeOutput:
        inputs.connected(model=model, clip=clip)
        chain = loader_chain({**given, "model": model, "clip": clip})
        checked = checking.check(model, clip, listed_loras(chain, **given), seed, vae, drawn_size, chain)
        drawn = checked.pictures if checked.pictures is not None else torch.zeros(0)
        image = sheet.strip(checking.HEADINGS, checked.prompts if len(drawn) else (), drawn, checked.said)
        return io.NodeOutput(image, checked.report, ui=ui.PreviewImage(image, cls=cls))
