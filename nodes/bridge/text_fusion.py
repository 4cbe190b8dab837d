"""Mix-of-Show's fusion of the text encoders' halves of LoRAs (arXiv 2305.18292, Sec. 3.3).

As `ziplora_core/fusion.py` has it for the network, from what each layer of the text encoders sees of each concept's own
prompts, read with that concept's LoRA. Each LoRA keeps its ups and has new downs, so that the sum of all of them, which
is how text-encoder parts are merged everywhere, is the fusion.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import comfy.lora
import torch
from comfy.model_management import throw_exception_if_processing_interrupted
from torch import Tensor

from ...ziplora_core import formats, fusion
from ...ziplora_core.checks import lines
from ...ziplora_core.files import all_finite, shown
from ...ziplora_core.lora_set import Factors
from .apply import with_text_encoder
from .lora import captured, fitting, matrices, text_encoders
from .lora.adapters import is_plain
from .lora.loras import LoRASource, LoRASources
from .network.text import check_embeddings
from .progress.bar import Steps
from .training.lora_file import named_tensors
from .training.pictures import check_letters

_BETWEEN = "//"  # prompts of one LoRA


@dataclass
class Fused:
    """sources: the LoRAs with their text encoders' halves fused, which belong together; no file holds them so. clip:
    with all these halves on it, as prompts of the merge are read. errors: weight -> what is left of the direct merge's
    error. notes: what was left as it was."""

    sources: LoRASources
    clip: Any
    errors: dict[str, float]
    notes: list[str]

    def lines(self) -> list[str]:
        left = f"{sum(self.errors.values()) / len(self.errors):.3f}" if self.errors else "none"
        return [
            f"{len(self.errors)} text-encoder layers fused: of the added parts' error on the concepts' prompts {left} "
            "is left on the mean",
            *self.notes,
        ]


def read_prompts(sources: LoRASources, text: str) -> dict[str, list[str]]:
    """Of each concept the prompts in its line, between which // stands. Raises ValueError where lines or words lack."""
    check_letters("prompts", text)
    said = lines(text)
    if len(said) != len(sources.by_concept):
        raise ValueError(
            f"prompts has {len(said)} lines and there are {len(sources.by_concept)} LoRAs; write one for each, in order"
        )
    found = {
        c: [one.strip() for one in line.split(_BETWEEN) if one.strip()]
        for c, line in zip(sources.by_concept, said, strict=True)
    }
    for concept, own in found.items():
        if not own:
            raise ValueError(
                f"the line of '{sources[concept].title}' in prompts says nothing; write a prompt with its word"
            )
    return found


def _plain_factors(source: LoRASource, model) -> tuple[dict[str, Factors], set[str]]:
    """(weight of a text encoder -> a file's factors at strength 1, weights that it changes in another way)."""
    names, whole = text_encoders.names(source, model), replace(source, strength=1.0)
    plain, others = {}, set()
    for key, adapter in comfy.lora.load_lora(source.tensors, names, log_missing=False).items():
        weight = fitting.parameter(model, key)
        factors = matrices.low_rank(whole, key, adapter) if is_plain(adapter) else None
        if weight is not None and factors is not None and factors.shape == weight.shape:
            plain[key] = factors
        else:
            others.add(key)
    return plain, others


@contextlib.contextmanager
def _watched(model: torch.nn.Module, weights: Collection[str], seen: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Meanwhile `seen` hears of what these layers are given."""
    hooks = []
    try:
        for path, module in model.named_modules():
            name = f"{path}.weight"
            if name in weights:
                hooks.append(module.register_forward_pre_hook(lambda _, given, name=name: seen(name, given[0])))
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _inputs(clip, weights: Collection[str], prompts: Sequence[str]) -> dict[str, Tensor]:
    """What layers see of prompts, (positions, in) float32 on the CPU: from the start to the end of each text, without
    what fills it up."""
    found: dict[str, list[Tensor]] = {}
    for text in prompts:
        throw_exception_if_processing_interrupted()
        tokens = clip.tokenize(text, return_word_ids=True)
        check_embeddings("prompts", text, tokens)
        ends = {
            kind: [2 + max((i for i, (*_, word) in enumerate(batch) if word), default=0) for batch in batches]
            for kind, batches in tokens.items()
        }

        def seen(name: str, x: Tensor, ends: Mapping[str, list[int]] = ends) -> None:
            own = ends.get(name.split(".")[0].removeprefix("clip_"), [x.shape[1]] * len(x))
            several = x if x.ndim == 3 else x[:, None]  # of a text as a whole: one position
            rows = [of[:end].float().cpu() for of, end in zip(several, own, strict=False)]  # what follows weighs words
            found.setdefault(name, []).extend(rows)

        plain = {kind: [[token[:2] for token in batch] for batch in batches] for kind, batches in tokens.items()}
        with _watched(clip.cond_stage_model, weights, seen):
            clip.encode_from_tokens_scheduled(plain)
    return {name: torch.cat(rows) for name, rows in found.items()}


def _with_downs(source: LoRASource, model, factors: Mapping[str, Factors], names: Mapping[str, str]) -> LoRASource:
    """A file with other factors of these weights of text encoders, at the same strength. names: theirs in a file."""
    weights = text_encoders.names(source, model)
    kept = {
        key: tensor
        for key, tensor in source.tensors.items()
        if not (formats.is_text_encoder(key) and weights.get(formats.layer_name(key)) in factors)
    }
    tensors = {**kept, **named_tensors(factors, names, torch.float32)}
    note = f"the text-encoder part of '{source.title}' is fused: it goes with those of the others"
    notes, unfused = (*source.notes, note), source.unfused or source
    return replace(source, tensors=tensors, version=None, sha256=None, notes=notes, unfused=unfused)


@torch.no_grad()
def fuse(clip, sources: LoRASources, prompts: Mapping[str, Sequence[str]]) -> Fused:
    """The text encoders' halves of LoRAs, fused.

    clip: the base model's, unchanged. prompts: of each concept, with what stands for it in them. Layers that a LoRA
    changes by anything but two matrices, or that no prompt reaches, stay as they are. Raises ValueError where no LoRA
    has a text encoders' half, where loaders have put all of them on the clip already, or numbers are not finite;
    interrupts pass through.
    """
    captured.refuse_twice_on_clip(clip, sources)
    model, every = clip.cond_stage_model, sources.by_concept
    plain, others = {}, set()
    for concept, source in every.items():
        plain[concept], more = _plain_factors(source, model)
        others |= more
    names = text_encoders.kohya_names(model)
    weights = sorted({key for of in plain.values() for key in of if key in names} - others)
    if not weights:
        raise ValueError(
            f"none of {sources.names()} has a text-encoder part of low rank for this clip; there is nothing to fuse: "
            "use LoRAs that Train ED-LoRA made, and the clip of the same model family"
        )
    bar = Steps(len(every))
    seen = {}
    for concept, source in every.items():
        own = with_text_encoder(clip, source, source.of_clip)
        seen[concept] = _inputs(own, weights, prompts[concept])
        bar.advance()
    downs: dict[str, dict[str, Factors]] = {concept: {} for concept in every}
    errors = {}
    for name in weights:
        if not all(name in of for of in seen.values()):
            continue
        layer = {c: replace(of[name], scale=of[name].scale * every[c].of_clip) for c, of in plain.items() if name in of}
        made, errors[name] = fusion.fuse_linear(layer, {concept: of[name] for concept, of in seen.items()})
        for concept, down in made.items():
            if not all_finite(down):
                raise ValueError(f"'{every[concept].title}': layer '{shown(name)}' is not finite once it is fused")
            own = plain[concept][name]
            downs[concept][name] = Factors(own.up.float(), down, own.scale)
    fused = replace(sources, by_concept={c: _with_downs(of, model, downs[c], names) for c, of in every.items()})
    together = clip
    for source in fused.by_concept.values():
        together = with_text_encoder(together, source, source.of_clip)
    left = len(others | set(weights) - set(errors))
    notes = [f"{left} text-encoder layers are added as they are: no plain LoRA, or not reached"] if left else []
    return Fused(fused, together, errors, notes)
