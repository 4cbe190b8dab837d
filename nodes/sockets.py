"""The pack's own socket types, and the host's that it reuses."""

from __future__ import annotations

from comfy_api.v0_0_2 import io

LoRAPairSocket = io.Custom("LORA_PAIR")
ZippedLoRASocket = io.Custom("ZIPPED_LORA")
# Inputs that take either: a pair is a zipped pair of all ones, a zipped pair can be zipped anew. The page bypasses a
# node by an input whose type its output has and the next node takes, so that a zip that is bypassed hands on the pair.
LoRAsToZipSocket = io.Custom("LORA_PAIR,ZIPPED_LORA")
LoRAsToApplySocket = io.Custom("ZIPPED_LORA,LORA_PAIR")
LoRAStackSocket = io.Custom("LORA_STACK")  # other packs': a list of (file, model strength, clip strength)
ReferencesSocket = io.Custom("ZIPLORA_REFERENCES")
LoRAModelSocket = io.Custom("LORA_MODEL")  # the host's: Load LoRA Model and Save LoRA Weights take it
LossMapSocket = io.Custom("LOSS_MAP")  # the host's: Plot Loss Graph takes it
