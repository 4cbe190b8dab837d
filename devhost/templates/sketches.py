"""Graphs that do not ship: for pictures on help pages."""

from __future__ import annotations

from .graph import OUTSIDE, Graph
from .parts import Parts
from .words import CLIP, STYLE


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


def split() -> Graph:
    """A concept's pictures, the eye that chooses, and what each word draws."""
    parts = Parts("split", "")
    parts.graph.column("Picture")
    picture = parts.reference("subject")
    eye = parts.graph.add("CLIPVisionLoader", clip_name=CLIP)
    parts.graph.column("Split")
    words = parts.train("SplitConcept", images=picture, clip_vision=eye[0])
    parts.graph.column("What each word draws")
    for number in (2, 3):
        parts.graph.add("PreviewImage", images=words[number])
    parts.report(words[5])
    return parts.graph


def ed_lora() -> Graph:
    """A LoRA and its word from a picture. Its text encoders' half is put on by a stock loader, from the file."""
    parts = Parts("ed_lora", "")
    parts.graph.column("Picture")
    picture = parts.reference("subject")
    parts.graph.column("Train")
    trained = parts.train("TrainEDLoRA", images=picture)
    parts.graph.column("What was trained")
    parts.graph.add("PreviewAny", "In prompts", source=trained[1])
    parts.report(trained[3])
    return parts.graph


def text_fusion() -> Graph:
    """Text encoders' halves first; the fused ones read the prompts that the rest is fused by."""
    parts = Parts("text_fusion", "")
    parts.graph.column("LoRAs")
    pair = parts.pair()
    parts.graph.column("Text encoders", 400)
    fused = parts.graph.add("FuseTextEncoders", clip=parts.clip, lora_pair=pair)
    first, second = (parts.text(f"a photo of a embedding:ed_0000{n}_", None, fused[1]) for n in (1, 2))
    parts.graph.column("The rest", 400)
    zipped = parts.graph.add(
        "ZipLoRAOptimize",
        model=parts.model,
        lora_pair=fused[0],
        content_positive=first,
        style_positive=second,
        solver="fusion",
    )
    parts.graph.column("Use")
    parts.apply(zipped[0])
    return parts.graph
