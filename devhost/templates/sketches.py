"""Graphs that do not ship: for pictures on help pages."""

from __future__ import annotations

from .graph import OUTSIDE, Graph
from .parts import Parts
from .words import CLIP, DRAWN, IN_STYLE, STYLE


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


def k_lora() -> Graph:
    parts = Parts("k_lora", "")
    parts.graph.column("One LoRA in each layer and step")
    both = parts.graph.add("KLoRA", model=parts.model, lora_pair=parts.pair(), clip=parts.clip)
    parts.report(both[2])
    parts.graph.column("Draw")
    parts.picture(both[0], parts.prompts(both[1], DRAWN), parts.canvas())
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


def two_scales() -> Graph:
    """Guided by the prompt and by a style's LoRA, sampled by the host's own custom sampler."""
    parts = Parts("two_scales", "")
    adapted = parts.graph.add("LoraLoader", model=parts.model, clip=parts.clip, lora_name=STYLE)
    parts.graph.column("Guide")
    prompts = parts.prompts(parts.clip, f"a teapot in {IN_STYLE}")
    guider = parts.graph.add(
        "TwoScaleGuider", model=parts.model, adapted_model=adapted[0], positive=prompts[0], negative=prompts[1]
    )
    parts.graph.column("Draw")
    parts.graph.add(
        "SamplerCustomAdvanced",
        noise=parts.graph.add("RandomNoise")[0],
        guider=guider[0],
        sampler=parts.graph.add("KSamplerSelect", sampler_name="euler")[0],
        sigmas=parts.graph.add("BasicScheduler", model=parts.model, scheduler="normal", steps=30, denoise=1.0)[0],
        latent_image=parts.canvas(),
    )
    return parts.graph


def embedding() -> Graph:
    parts = Parts("embedding", "")
    parts.graph.column("Picture")
    picture = parts.references()[0]
    parts.graph.column("Train")
    word = parts.train("TrainEmbedding", images=picture)
    parts.report(word[2])
    return parts.graph


def split() -> Graph:
    """A concept's pictures, the eye that chooses, and what each word draws."""
    parts = Parts("split", "")
    parts.graph.column("Picture")
    picture = parts.references()[0]
    eye = parts.graph.add("CLIPVisionLoader", clip_name=CLIP)
    parts.graph.column("Split")
    words = parts.train("SplitConcept", images=picture, clip_vision=eye[0])
    parts.graph.column("What each word draws")
    for number in (2, 3):
        parts.graph.add("PreviewImage", images=words[number])
    parts.report(words[5])
    return parts.graph


def custom_diffusion() -> Graph:
    """One concept trained; two that were, merged."""
    parts = Parts("custom_diffusion", "")
    parts.graph.column("Picture")
    picture = parts.references()[0]
    parts.graph.column("Train")
    parts.train("TrainCustomDiffusion", images=picture)
    parts.graph.column("Merge")
    parts.graph.add("MergeCustomDiffusion", model=parts.model, clip=parts.clip, lora_pair=parts.pair())
    return parts.graph
