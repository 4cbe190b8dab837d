"""A LoRA file's largest elements as the host's LORA_MODEL."""

from __future__ import annotations

import torch
from torch import Tensor

from ...ziplora_core import formats
from ...ziplora_core.files import all_finite
from ...ziplora_core.sparse import top_elements
from .lora import fitting, keys, loras
from .progress.bar import Steps


@torch.no_grad()
def sparsify(model, name: str, percent: float) -> tuple[dict[str, Tensor], str]:
    """(LORA_MODEL, report): in each layer the largest elements of ΔW, written out whole, in fp16 where they fit in.

    model: ModelPatcher; says which layers there are. Text-encoder parts, and biases and norms that the file changes or
    sets, stay as they are. Raises LoRAFileError for a file that does not fit, ValueError for a percentage out of range
    and for an update that is not finite.
    """
    if not 0 < percent <= 100:
        raise ValueError(f"keep is {percent}; expected a number above 0, up to 100")
    source = loras.load(name, 1.0)
    fitted = fitting.fit_one(source, model.model)
    names = keys.file_names(model.model)
    bar = Steps(len(fitted.factors))
    tensors = {k: t for k, t in source.tensors.items() if formats.is_text_encoder(k)}
    held: dict[str, float] = {}
    elements, wide = 0, 0
    for key, factors in fitted.factors.items():
        delta, held[key] = top_elements(factors, percent / 100)
        elements += delta.numel()
        if not all_finite(delta):
            raise ValueError(f"'{name}': the update of layer '{key}' is not finite in fp32; use another file")
        half = delta.half()
        fits = all_finite(half)
        wide += not fits
        tensors[f"{names.kohya(key)}.diff"] = half if fits else delta
        bar.advance()
    for key, (kind, (values, *_)) in fitted.passthrough.items():
        if kind == "diff":
            tensors[names.kohya(key) + (".diff_b" if key.endswith(".bias") else ".diff")] = values
        else:  # "set": the host's own names, as kohya has none for a bias of its own
            tensors[f"{key.removesuffix('.weight')}.set_weight"] = values
    worst = min(held, key=held.__getitem__)
    size, before = (sum(t.numel() * t.element_size() for t in d.values()) / 1e6 for d in (tensors, source.tensors))
    lines = [
        f"'{source.title}': the largest {percent:g} % of each layer's elements, of {elements:,} in {len(held)} layers",
        f"they hold {sum(held.values()) / len(held):.1%} of the energy on the mean, {held[worst]:.1%} in the least "
        f"('{worst}')",
        f"no longer of low rank: whole updates, {size:.0f} MB in fp16 (the file has {before:.0f} MB)",
        *fitted.unused,
    ]
    if wide:
        lines.append(f"{wide} of the layers hold numbers too large for fp16 and are in fp32")
    return tensors, "  \n".join(lines)
