"""The pack's own socket types, and the host's that it reuses."""

from __future__ import annotations

from comfy_api.v0_0_2 import io

LoRAPairSocket = io.Custom("LORA_PAIR")
ZippedLoRASocket = io.Custom("ZIPPED_LORA")
LoRAModelSocket = io.Custom("LORA_MODEL")  # the host's: Load LoRA Model and Save LoRA Weights take it
LossMapSocket = io.Custom("LOSS_MAP")  # the host's: Plot Loss Graph takes it
