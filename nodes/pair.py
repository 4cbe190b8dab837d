"""LoadLoRAPair, PairLoRAs: two LoRAs, from the loras folder or from other nodes, as a pair."""

from __future__ import annotations

import folder_paths
from comfy_api.v0_0_2 import io

from .bridge.lora import loras
from .inputs import strength
from .schema import Schema
from .sockets import LoRAModelSocket, LoRAPairSocket, LoRAStackSocket


class LoadLoRAPair(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> Schema:
        files = folder_paths.get_filename_list("loras")
        return Schema(
            node_id="LoadLoRAPair",
            display_name="Load LoRA Pair",
            category="ZipLoRA",
            search_aliases=["two loras", "load two loras"],
            description="Loads a content (subject) LoRA and a style LoRA of the same base model, to be zipped.",
            inputs=[
                io.Combo.Input(
                    "content_lora",
                    options=files,
                    tooltip="LoRA of the subject: what to draw. Any trainer's format, any rank.",
                ),
                io.Combo.Input(
                    "style_lora",
                    options=files,
                    tooltip="LoRA of the style: how to draw it. May differ in rank.",
                ),
                strength(
                    "content_strength",
                    "Strength at which the content LoRA alone draws its subject well. "
                    "The zipped model is taught to draw as the LoRA does at this strength.",
                ),
                strength(
                    "style_strength",
                    "Strength at which the style LoRA alone draws its style well. "
                    "To dial the style after zipping use Style Strength, which costs nothing.",
                ),
            ],
            outputs=[
                LoRAPairSocket.Output(display_name="lora_pair", tooltip="Both LoRAs, for ZipLoRA Optimize."),
                LoRAStackSocket.Output(
                    display_name="lora_stack",
                    tooltip="The same files as a plain stack, for any pack's LoRA stacker or loader: to stack them.",
                ),
            ],
        )

    @classmethod
    def validate_inputs(cls, content_lora: str | None, style_lora: str | None) -> bool | str:
        # Before anything runs: a broken file should not cost the load of a checkpoint. The host shows the answer
        # at both inputs, so it says which one is meant. A name that another node makes is not known yet (None).
        names = {"content_lora": content_lora, "style_lora": style_lora}
        checked = {socket: loras.check(name) for socket, name in names.items() if name is not None}
        problems = [f"{name}: {problem}" for name, problem in checked.items() if problem]
        if content_lora is not None and style_lora is not None and not problems:
            try:
                loras.refuse_one_file(content_lora, style_lora)
            except loras.LoRAFileError as error:
                problems = [str(error)]
        return "; ".join(problems) or True

    @classmethod
    def fingerprint_inputs(cls, content_lora: str | None, style_lora: str | None, **_):
        return [loras.fingerprint(name) for name in (content_lora, style_lora) if name is not None]

    @classmethod
    def execute(
        cls, content_lora: str, style_lora: str, content_strength: float, style_strength: float
    ) -> io.NodeOutput:
        sources = loras.load_pair(content_lora, style_lora, content_strength, style_strength)
        plain = [(content_lora, content_strength), (style_lora, style_strength)]
        return io.NodeOutput(sources, [(name, strength, strength) for name, strength in plain])


class PairLoRAs(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> Schema:
        return Schema(
            node_id="PairLoRAs",
            display_name="Pair LoRAs",
            category="ZipLoRA/train",
            search_aliases=["two loras"],
            description="Makes a pair of two LoRAs that other nodes made, such as Train Concept LoRA, to be zipped.",
            inputs=[
                LoRAModelSocket.Input("content_lora", tooltip="LoRA of the subject."),
                LoRAModelSocket.Input("style_lora", tooltip="LoRA of the style."),
                strength("content_strength", "Strength at which the content LoRA alone draws well."),
                strength("style_strength", "Strength at which the style LoRA alone draws well."),
            ],
            outputs=[LoRAPairSocket.Output(display_name="lora_pair", tooltip="Both LoRAs, for ZipLoRA Optimize.")],
        )

    @classmethod
    def execute(cls, content_lora, style_lora, content_strength: float, style_strength: float) -> io.NodeOutput:
        return io.NodeOutput(loras.pair(content_lora, style_lora, content_strength, style_strength))
