"""Custom Diffusion's merge as the host's LORA_MODEL: what the captions of each concept mean is kept."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ...ziplora_core import custom_diffusion
from ...ziplora_core.checks import lines
from ...ziplora_core.files import all_finite, shown
from ...ziplora_core.lora_set import Factors
from .lora import fitting, loras, text_encoders
from .network import checks
from .network.text import check_embeddings
from .progress.bar import Steps
from .training.layers import prompt_readers
from .training.lora_file import lora_tensors
from .training.pictures import check_letters


def _features(clip, text: str, own: bool) -> Tensor:
    """A caption's features (n, in), float32: of its words alone, or of all its places."""
    tokens = clip.tokenize(text, return_word_ids=True)
    check_embeddings("prompts" if own else "captions", text, tokens)
    plain = {kind: [[token[:2] for token in batch] for batch in batches] for kind, batches in tokens.items()}
    context = clip.encode_from_tokens_scheduled(plain)[0][0][0].float().cpu()
    if not own:
        return context
    batches = next(iter(tokens.values()))
    words = torch.tensor([bool(word) for batch in batches for _, _, word in batch])[: len(context)]
    return context[: len(words)][words]


_ALIKE = 1e-3  # of a word's features: as far as two encodings of one text may differ


def _own_words(targets: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The features that no other concept's words have. Words with which two texts begin alike are read alike: what
    each concept's LoRA answers to them cannot be kept for both."""
    found = {}
    for concept, rows in targets.items():
        others = [other for name, other in targets.items() if name != concept]
        if not others:
            return dict(targets)
        exact = "donot_use_mm_for_euclid_dist"  # by products, equal rows are some thousandths apart
        far = torch.cdist(rows, torch.cat(others), compute_mode=exact)
        found[concept] = rows[(far > _ALIKE * rows.norm(dim=1)[:, None]).all(1)]
    return found


@torch.no_grad()
def merge(model, clip, sources: loras.LoRASources, prompts: str, captions: str) -> tuple[dict[str, Tensor], str]:
    """(LORA_MODEL, report): one LoRA, of as high a rank as the captions have words, of the layers that read the prompt.

    model: ModelPatcher; says which layers there are. prompts: a line for each LoRA, in order. captions: ordinary ones,
    a line each. Raises ValueError (LoRAFileError for a file that does not fit).
    """
    check_letters("prompts", prompts)
    check_letters("captions", captions)
    fitted = fitting.fit(sources, model.model)
    readers, concepts = prompt_readers(model.model), list(fitted.loras.concepts)
    own, ordinary = lines(prompts), lines(captions)
    if len(own) != len(concepts):
        raise ValueError(
            f"prompts has {len(own)} lines and there are {len(concepts)} LoRAs; write one for each, in order"
        )
    if not ordinary:
        raise ValueError("captions is empty; write some ordinary captions, which are to stay as they are")
    layers = {name: dict(layer) for name, layer in fitted.loras.layers.items() if name in readers}
    if not layers:
        raise ValueError(
            "these LoRAs change no keys or values of cross-attention; connect LoRAs that Train Custom Diffusion made"
        )
    targets = {concept: _features(clip, text, True) for concept, text in zip(concepts, own, strict=True)}
    for text, rows in zip(own, targets.values(), strict=True):
        if not len(rows):
            raise ValueError(f"the prompt '{shown(text)}' has no words; write what stands for the concept")
    said_alike = sum(map(len, targets.values()))
    targets = _own_words(targets)
    said_alike -= sum(map(len, targets.values()))
    for concept, rows in targets.items():
        if not len(rows):
            raise ValueError(
                f"the line of '{sources[concept].title}' in prompts is the beginning of another's, or the same; write "
                "what stands for this concept alone, early in its line"
            )
    others = torch.cat([_features(clip, text, False) for text in ordinary])
    width = next(iter(readers.values()))[1]
    if others.shape[1] != width:
        raise ValueError(f"clip's prompts are {others.shape[1]} wide, this model's {width}; {checks.OTHER_CLIP}")
    down = custom_diffusion.answering(torch.cat(list(targets.values())), custom_diffusion.second_moment(others))
    merged, bar, drift, summed = {}, Steps(len(layers)), 0.0, 0.0
    for name, layer in layers.items():
        updates = {concept: Factors(f.up.cpu(), f.down.cpu(), f.scale) for concept, f in layer.items()}
        factors = custom_diffusion.merge_layer(updates, targets, down)
        if not all_finite(factors.up):
            raise ValueError(f"the update of layer '{name}' is not finite; use another file")
        together = [custom_diffusion.answer(f, others) for f in updates.values()]
        drift += float(custom_diffusion.answer(factors, others).square().sum())
        summed += float(torch.stack(together).sum(0).square().sum())
        merged[name] = Factors(factors.up.float(), factors.down.float())
        bar.advance()
    said = [
        f"{len(layers)} layers (cross-attention keys and values), rank {down.shape[0]}: "
        + ", ".join(f"'{text}' {len(rows)}" for text, rows in zip(own, targets.values(), strict=True))
        + " words, kept"
        + (f"; {said_alike} with which lines begin alike stay as ordinary ones" if said_alike else ""),
        f"{len(ordinary)} ordinary captions move by {(drift / summed) ** 0.5 if summed else 0.0:.2f} of what they move "
        "by where the LoRAs are stacked",
    ]
    left = len(fitted.loras.layers) - len(layers)
    if left:
        said.append(f"{left} other layers that the LoRAs change are left out: they do not read the prompt alone")
    for source in sources.by_concept.values():
        if text_encoders.parts(source):
            said.append(f"the text-encoder part of '{source.title}' is left out: put it on the clip with Load LoRA")
    return lora_tensors(model, merged), "  \n".join([*said, *fitted.notes])
