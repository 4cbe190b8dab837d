"""From pictures and prompts to LoRAs: what Train Concept LoRA and UnZip LoRA share, and the first of them."""
