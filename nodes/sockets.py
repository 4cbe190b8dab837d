"""The pack's own socket types, and the host's that it reuses."""

from __future__ import annotations

from comfy_api.v0_0_2 import io

LoRAPairSocket = io.Custom("LORA_PAIR")
ZippedLoRASocket = io.Custom("ZIPPED_LORA")
LossMapSocket = io.Custom("LOSS_MAP")  # the host's: Plot Loss Graph takes it
