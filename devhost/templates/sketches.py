"""Graphs that do not ship: for pictures on help pages."""

from __future__ import annotations

from .graph import OUTSIDE, Graph
from .parts import Parts
from .words import STYLE


def load_zipped() -> Graph:
    parts = Parts("load_zipped", "")
    parts.graph.column("Zipped before")
    loaded = parts.graph.add("LoadZippedLoRA", model=parts.model, zipped="my_pair_00001_.safetensors")
    parts.graph.column("Draw")
    parts.apply(loaded[0])
    return parts.graph


def sparsify() -> Graph:
    parts = Parts("sparsify", "")
    parts.graph.column("Sparsify")
    sparse = parts.graph.add("SparsifyLoRA", model=parts.model, lora=STYLE)
    parts.graph.column("Use")
    parts.graph.add("LoraModelLoader", model=parts.model, lora=sparse[0], strength_model=1.0)
    parts.graph.add("PreviewAny", "What is left", source=sparse[1])
    return parts.graph


def direct_merge() -> Graph:
    parts = Parts("direct_merge", "")
    parts.graph.column("Merge")
    merged = parts.graph.add("DirectMergeLoRA", model=parts.model, lora_pair=parts.pair())
    parts.graph.column("Draw")
    parts.apply(merged[0])
    return parts.graph


def stack() -> Graph:
    """More than two LoRAs by single nodes; what gives the stack is another pack's."""
    parts = Parts("stack", "")
    parts.graph.column("LoRAs and prompts")
    loaded = parts.graph.add("LoadLoRAStack", lora_stack=OUTSIDE)
    third = parts.graph.add("ZipLoRAReference", positive=parts.text("a zrt hat", "Training prompt of the third LoRA"))
    parts.graph.column("Zip", 400)
    parts.zip(loaded[0], **parts.training_prompts(), references=third[0])
    return parts.graph
