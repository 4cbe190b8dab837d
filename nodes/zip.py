"""ZipLoRAs: a subject and a style LoRA, or more of them, zipped and put on a model in one node."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import folder_paths
from comfy_api.v0_0_2 import io, ui

from . import inputs
from .bridge import zip as zipping
from .bridge.drawing.sampling import SIDE_OR_BEST
from .bridge.lora.captured import Chain
from .schema import Schema
from .sockets import LoRAStackSocket, ZippedLoRASocket

_EMPTY = "empty: the trigger words that the file names"
_OWN = ("subject", "style")
_PICTURES = tuple(f"{role}_images" for role in _OWN)


def _file(name: str, tooltip: str) -> io.Combo.Input:
    files = folder_paths.get_filename_list("loras")
    return io.Combo.Input(name, options=[zipping.NO_FILE, *files], default=zipping.NO_FILE, tooltip=tooltip)


def _prompt(name: str, example: str) -> io.String.Input:
    return io.String.Input(
        name,
        multiline=True,
        default="",
        placeholder=_EMPTY,
        tooltip=f"What this LoRA was trained with, trigger word included, e.g. '{example}'. Empty: the trigger words "
        "that the file, or a file beside it, names.",
    )


def _strength(name: str, what: str) -> io.Float.Input:
    tooltip = f"Strength at which the {what} LoRA alone draws well, as in Load LoRA."
    return inputs.advanced(inputs.strength(name, tooltip, optional=True))


def _images(name: str, what: str) -> io.Image.Input:
    return inputs.advanced(
        io.Image.Input(
            name,
            lazy=True,
            optional=True,
            tooltip=f"Pictures of the {what}, of any size, with vae: best those that the LoRA was trained on. Not "
            "connected: the LoRA draws some itself, and the node shows them.",
        )
    )


class ZipLoRAs(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> Schema:
        return Schema(
            node_id="ZipLoRAs",
            display_name="Zip LoRAs",
            category="ZipLoRA",
            search_aliases=[
                "merge",
                "merge lora",
                "merge loras",
                "combine loras",
                "combine",
                "mix loras",
                "subject and style",
            ],
            description="Merges a subject LoRA and a style LoRA, trained apart, so that the model draws your subject "
            "in your style. It goes between the checkpoint and KSampler, where two LoRA loaders would stand.",
            inputs=[
                io.Model.Input(
                    "model",
                    lazy=True,
                    tooltip="The checkpoint's model, without these LoRAs. Others may be on it. With both files [None] "
                    "and no stack: the LoRAs that loaders have put on it are used, the first as the subject.",
                ),
                io.Clip.Input("clip", lazy=True, tooltip="The checkpoint's text encoder."),
                _file("subject_lora", "The LoRA of what to draw: a character, an animal, a thing."),
                _prompt("subject_prompt", "a sks dog"),
                _file("style_lora", "The LoRA of how to draw it."),
                _prompt("style_prompt", "a house in szn style"),
                io.Combo.Input(
                    "quality",
                    options=[*zipping.QUALITIES, zipping.STACKED],
                    default=next(iter(zipping.QUALITIES)),
                    tooltip="balanced: looks at what each LoRA draws, as long as drawing some pictures. fast: looks "
                    "at the files alone, in seconds, and needs no prompts. paper: trains for a hundred steps, as the "
                    "method's paper does; takes longest and needs most memory. stacked: nothing is zipped, as with two "
                    "LoRA loaders in a row; bypassing this node (Ctrl+B) does the same.",
                ),
                inputs.seed("Seed of the examples and their noise: the same seed gives the same result."),
                _strength("subject_strength", "subject"),
                _strength("style_strength", "style"),
                inputs.advanced(
                    LoRAStackSocket.Input(
                        "lora_stack",
                        optional=True,
                        tooltip="More LoRAs, from any pack's LoRA stacker. With a stack, the two files of this node "
                        "may be [None]: the stack's first is the subject then, its second the style.",
                    )
                ),
                inputs.advanced(
                    io.String.Input(
                        "stack_prompts",
                        multiline=True,
                        default="",
                        optional=True,
                        tooltip="The same prompts for the LoRAs of lora_stack: a line for each, in its order. An empty "
                        "line: the trigger words that the file names.",
                    )
                ),
                _images("subject_images", "subject"),
                _images("style_images", "style"),
                inputs.advanced(
                    io.Vae.Input(
                        "vae", lazy=True, optional=True, tooltip="The checkpoint's VAE, where pictures are connected."
                    )
                ),
                inputs.advanced(
                    io.Int.Input(
                        "drawn_size",
                        default=0,
                        **inputs.span(SIDE_OR_BEST),
                        step=8,
                        optional=True,
                        tooltip="Side in pixels of the examples that are drawn, and of pictures when they are scaled. "
                        "0: what the model draws best, 1024 for SDXL, 512 for SD 1.5.",
                    )
                ),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="The model with the zipped LoRAs, for KSampler."),
                io.Clip.Output(
                    display_name="clip",
                    tooltip="The text encoder with the LoRAs' own parts: encode what to draw with it.",
                ),
                ZippedLoRASocket.Output(
                    display_name="zipped_lora", tooltip="To save, export, or turn the style up and down."
                ),
                io.String.Output(display_name="report", tooltip="What was found, and with which prompts."),
            ],
        )

    @classmethod
    def validate_inputs(cls, subject_lora: str | None, style_lora: str | None) -> bool | str:
        return zipping.check_files(subject_lora=subject_lora, style_lora=style_lora) or True

    @classmethod
    def fingerprint_inputs(cls, **given):
        return own_fingerprint(given)

    @classmethod
    def check_lazy_status(cls, quality: str, **given) -> list[str]:
        """Which inputs to make next: what can be refused is refused before a checkpoint is loaded."""
        names = ["model", "clip"]
        inputs.connected(**{name: given[name] for name in names if given.get(name) is not None})
        if of_loaders(given) and inputs.not_made(names, given):  # which LoRAs, is known when they are there
            return inputs.not_made(names, given)
        listed = listed_loras(loader_chain(given), **given)
        if zipping.QUALITIES.get(quality) is not None:
            zipping.prompts(listed)
            zipping.check_connected(listed, given)
            names += [*_PICTURES, "vae"]
        return inputs.not_made(names, given)

    @classmethod
    def execute(cls, model, clip, quality: str, seed: int, vae=None, drawn_size: int = 0, **given) -> io.NodeOutput:
        inputs.connected(model=model, clip=clip)
        chain = loader_chain({**given, "model": model, "clip": clip})
        images = {name: given[name] for name in _PICTURES if given.get(name) is not None}
        listed = listed_loras(chain, **given)
        *outputs, drawn = zipping.zip_loras(model, clip, listed, quality, seed, images, vae, drawn_size, chain)
        return io.NodeOutput(*outputs, ui=None if drawn is None else ui.PreviewImage(drawn, cls=cls))


def own_fingerprint(given: Mapping[str, Any]) -> list[Any]:
    """What tells that a run is to be made anew though its inputs are the same; an input that a link brings is None."""
    return zipping.fingerprint(*((given[f"{role}_lora"], given.get(f"{role}_prompt")) for role in _OWN))


def of_loaders(given: Mapping[str, Any]) -> bool:
    """Whether no LoRA is chosen here: then those count that loaders have put on the model."""
    return given.get("lora_stack") is None and all(given[f"{role}_lora"] == zipping.NO_FILE for role in _OWN)


def loader_chain(given: Mapping[str, Any]) -> Chain | None:
    """The LoRAs that loaders have put on the model and the text encoder, where they count."""
    return zipping.loaders(given["model"], given["clip"]) if of_loaders(given) else None


def listed_loras(
    chain: Chain | None, lora_stack=None, stack_prompts: str = "", **given: Any
) -> dict[str, zipping.Given]:
    """The LoRAs by concept, from the node's inputs, or from loaders before it: the first is the subject's then, the
    second the style's, and the prompts of others stand in stack_prompts."""
    chosen = {}
    for role in _OWN:
        name, strength = given[f"{role}_lora"], given.get(f"{role}_strength", 1.0)
        if name != zipping.NO_FILE:
            chosen[role] = (name, strength, strength)
    if chain is not None:
        rows = [(lora.name, lora.strength, lora.clip_strength) for lora in chain.loras]
        chosen, lora_stack = dict(zip(_OWN, rows, strict=False)), rows[len(_OWN) :]
    own = {
        role: zipping.Given(*file, given[f"{role}_prompt"], f"{role}_prompt", f"{role}_images")
        for role, file in chosen.items()
    }
    return zipping.by_concept(own, lora_stack, stack_prompts)
