"""A zipped pair as one LoRA file, in the names of kohya or of diffusers."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field, replace

import comfy.lora
import folder_paths
import torch
from torch import Tensor

from ...ziplora_core import export, formats
from ...ziplora_core.direct import METHODS
from ...ziplora_core.export import ExportLayer
from ...ziplora_core.lora_set import Factors, joined_rank
from ...ziplora_core.merge import merged_factors, one_lora
from ...ziplora_core.saved import FUSED, ROUTED
from ...ziplora_core.writing import write_tensors
from .disk import paths
from .lora import matrices
from .lora.adapters import is_plain
from .lora.loras import role
from .lora.zipped import ZIPPED, ZippedLoRA
from .progress.bar import Steps

FORMATS = ("kohya", "diffusers")
_ARCHITECTURES = {  # modelspec's names, by the host's
    "SDXL": "stable-diffusion-xl-v1-base",
    "SD15": "stable-diffusion-v1",
    "SD3": "stable-diffusion-3-medium",
    "Flux": "flux-1-dev",
    "FluxSchnell": "flux-1-schnell",
}
# How learned merges are called, by method.
_LEARNED = {
    ZIPPED: "ZipLoRA",
    ROUTED: "ZipLoRA, routed",
    FUSED: "Mix-of-Show's fusion",
    "UnZipLoRA": "UnZipLoRA's pair",
}
_KOHYA_BASES = {"SDXL": "sdxl_base_v1-0", "SD15": "sd_v1", "SD3": "sd3", "Flux": "flux1", "FluxSchnell": "flux1"}


@dataclass
class Exported:
    """lora_model: in kohya's form, for the host's LORA_MODEL socket. tensors, metadata, report: of the file."""

    lora_model: dict[str, Tensor]
    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    report: list[str] = field(default_factory=list)


@torch.no_grad()
def export_tensors(zipped: ZippedLoRA, rank: int, dtype: str, form: str) -> Exported:
    """The pair at its dials as one LoRA. rank 0: exact, at the sum of the ranks of each layer.

    form: "kohya" or "diffusers" (peft's names). Raises ValueError for a model without diffusers names, and where
    numbers do not fit into the dtype.
    """
    names, precision = zipped.fitted.names, export.DTYPES[dtype]
    if form == "diffusers":
        _check_diffusers_names(zipped)
    report: list[str] = []
    bar = Steps(len(zipped.fitted.loras.layers))
    layers: dict[str, ExportLayer] = {}
    for key, layer in zipped.fitted.loras.layers.items():
        chosen = zipped.coefficients.of_layer(key)
        if 0 < rank < joined_rank(layer):
            exported = export.cut(*one_lora(layer, chosen), rank)
        else:
            exported = export.whole(layer, chosen, precision)
        layers[key] = export.rounded(key, exported, precision)
        bar.advance()
    text, left_out = text_encoder_layers(zipped, rank)
    text = {name: export.rounded(name, layer, precision) for name, layer in text.items()}
    report += left_out
    lora_model = export.kohya_tensors({**{names.kohya(key): layer for key, layer in layers.items()}, **text})
    lora_model |= passthrough_tensors(zipped, precision, report)
    tensors = lora_model
    if form == "diffusers":
        named = {f"unet.{names.diffusers[key]}": layer for key, layer in layers.items()}
        named |= {formats.diffusers_text_encoder(key): layer for key, layer in text.items()}
        tensors = export.peft_tensors(named)
        if any(zipped.fitted.passthrough.values()):
            report.append("bias and norm differences are left out: diffusers' form has no place for them")
    report[:0] = _summary(layers, text, tensors, rank, dtype, form)
    return Exported(lora_model, tensors, _metadata(zipped, layers, report), report)


def _check_diffusers_names(zipped: ZippedLoRA) -> None:
    names, layers = zipped.fitted.names, zipped.fitted.loras.layers
    nameless = [key for key in layers if key not in names.diffusers]
    if nameless:
        raise ValueError(
            f"diffusers has no name for {len(nameless)} of the {len(layers)} layers of this model "
            f"({names.family}), e.g. '{nameless[0]}'; export in kohya's format"
        )


def _summary(layers, text, tensors, rank: int, dtype: str, form: str) -> list[str]:
    ranks = [layer.rank for layer in layers.values()]
    size = sum(t.numel() * t.element_size() for t in tensors.values())
    parts = f" and {len(text)} of the text encoders" if text else ""
    lines = [
        f"{len(layers)} layers{parts}, rank {min(ranks)} to {max(ranks)}, {dtype}, {form}'s names, {size / 1e6:.1f} MB"
    ]
    cut = {name: layer.kept for name, layer in layers.items() if layer.kept < 1}
    if rank and cut:
        worst = min(cut, key=cut.__getitem__)
        lines.append(
            f"cut to rank {rank}: {sum(cut.values()) / len(cut):.1%} of the energy is kept on the mean over the "
            f"{len(cut)} layers that were larger, {cut[worst]:.1%} in the worst ('{worst}')"
        )
    elif rank:
        lines.append(f"exact: no layer has a rank above {rank}")
    else:
        lines.append("exact: nothing is cut")
    return lines


def text_encoder_layers(zipped: ZippedLoRA, rank: int) -> tuple[dict[str, ExportLayer], list[str]]:
    """The files' text-encoder parts, added up at their strengths: (kohya's layer name -> layer, what is left out)."""
    parts: dict[str, dict[str, Factors]] = {}
    left_out = []
    for concept, source in zipped.sources.by_concept.items():
        names = formats.text_encoder_layers(source.tensors)
        for name, adapter in comfy.lora.load_lora(source.tensors, names, log_missing=False).items():
            if not is_plain(adapter):
                left_out.append(f"'{source.title}': text-encoder layer '{name}' is no plain LoRA and is left out")
                continue
            at_dial = replace(source, strength=zipped.clip_strength(concept))
            parts.setdefault(name, {})[concept] = matrices.low_rank(at_dial, name, adapter)
    layers = {}
    for name, layer in parts.items():
        layers[name] = export.cut(*merged_factors(layer), rank)
    return layers, left_out


def passthrough_tensors(zipped: ZippedLoRA, dtype: torch.dtype, report: list[str]) -> dict[str, Tensor]:
    """Bias and norm differences of all files at their strengths, added up. Raises ValueError where they do not fit."""
    tensors: dict[str, Tensor] = {}
    for concept, patches in zipped.fitted.passthrough.items():
        for key, (kind, (values, *_)) in patches.items():
            if kind != "diff":
                report.append(f"'{key}' is set, not changed, by a file; left out")
                continue
            name = zipped.fitted.names.kohya(key) + (".diff_b" if key.endswith(".bias") else ".diff")
            scaled = zipped.strength(concept) * values.float()
            tensors[name] = tensors[name] + scaled if name in tensors else scaled
    return {name: export.fitting(name, t, dtype) for name, t in tensors.items()}


def _metadata(zipped: ZippedLoRA, layers, report: list[str]) -> dict[str, str]:
    family = zipped.fitted.names.family
    sources = zipped.sources.by_concept
    rank = str(max(layer.rank for layer in layers.values()))
    title = " + ".join(os.path.splitext(source.title)[0] for source in sources.values())
    files = " and ".join(f"'{source.title}' ({role(concept)})" for concept, source in sources.items())
    return {
        "ss_network_module": "networks.lora",
        "ss_network_dim": rank,
        "ss_network_alpha": rank,
        "ss_output_name": title,
        "ss_base_model_version": _KOHYA_BASES.get(family, family),
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{_ARCHITECTURES.get(family, family)}/lora",
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.title": title,
        "modelspec.date": time.strftime("%Y-%m-%d"),
        "modelspec.description": f"{_merge_title(zipped)} of {files}; " + "; ".join(report),
    }


def _merge_title(zipped: ZippedLoRA) -> str:
    """What a merge is called, by the method that computed it."""
    if zipped.method in _LEARNED or zipped.method not in METHODS:
        return _LEARNED.get(zipped.method, f"Merge by {zipped.method}")
    method = METHODS[zipped.method]
    said = ", ".join(f"{name} {zipped.settings[name]:g}" for name in method.settings if name in zipped.settings)
    return f"{method.title} ({said})" if said else method.title


@paths.names_given_back()
def export_file(
    zipped: ZippedLoRA, prefix: str, rank: int, dtype: str, form: str, metadata: dict[str, str] | None = None
) -> tuple[dict[str, Tensor], str, str]:
    """Write the file below the output folder; (LORA_MODEL, report, the file's name). metadata: more of it."""
    exported = export_tensors(zipped, rank, dtype, form)
    path = paths.reserve(prefix, folder_paths.get_output_directory(), ".safetensors")
    written = write_tensors(path, exported.tensors, {**exported.metadata, **(metadata or {})})
    name = os.path.relpath(written, folder_paths.get_output_directory())
    return exported.lora_model, "  \n".join([f"written: {name}", *exported.report]), name
