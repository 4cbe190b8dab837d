"""The core's Predictor on a loaded network: references of each concept and their prompts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import comfy.model_management
import comfy.sampler_helpers
import comfy.samplers
import torch
from torch import Tensor

from ....ziplora_core.branch import Branch, JoinedSet
from ....ziplora_core.lora_set import LoRASet
from ....ziplora_core.solver import EMPTY, OTHER, Batch, References
from ..drawing import recipes
from . import session
from .empty_prompt import zeros
from .injection import Injection
from .weights import compute_dtype

T = TypeVar("T")


class HostPredictor(session.Network):
    """The core's Predictor: references of each concept and their prompts. Its timesteps are all of the model's, and of
    one that was distilled to few steps these alone."""

    def __init__(self, guider, model_options: dict, injection: Injection, references: References):
        super().__init__(guider, model_options, injection)
        self._references = references
        self._conds = {(c, c): self.encode(c, latents) for c, latents in self._references.items()}
        first, *others = [self._rows(concept, concept, 1) for concept in references]
        self.joins = all(comfy.samplers.cond_equal_size(first, other) for other in others)

    def keep_to(self, recipe: recipes.Recipe) -> None:
        """Only the noise levels that a model of few steps draws at."""
        if recipe.told_by:
            self._sigmas = recipe.levels(self._model.model_sampling).to(self._device)
            self.timesteps = len(self._sigmas)

    def _rows(self, concept: str, prompt: str, rows: int) -> dict[str, Any]:
        """One of the guider's prompts for rows of a concept's references."""
        if (concept, prompt) not in self._conds:
            self._conds[concept, prompt] = self.encode(prompt, self._references[concept])
        return {k: v.process_cond(batch_size=rows, area=None) for k, v in self._conds[concept, prompt].items()}

    def _conditioning(self, batch: Batch) -> dict[str, Any]:
        """Conditioning of a batch, the rows of one concept after those of another, joined as the host joins."""
        concepts = list(self._references)
        names = dict(zip(concepts, concepts, strict=True))
        if batch.prompt == OTHER:
            names = dict(zip(concepts, reversed(concepts), strict=True))
        elif batch.prompt == EMPTY:
            names = {c: f"{c} {EMPTY}" for c in concepts}
        counts = zip(concepts, torch.bincount(batch.concept_index, minlength=len(concepts)).tolist(), strict=True)
        return comfy.samplers.cond_cat([self._rows(c, names[c], n) for c, n in counts if n])

    def __call__(self, batch: Batch, branch: Branch) -> Tensor:
        x, sigma = self.noised(batch.latents, batch.noise, batch.timesteps)
        (raw,) = self.raw(x, sigma, self.denoised(x, sigma, self._conditioning(batch), branch))
        return raw

    def target(self, batch: Batch) -> Tensor:
        """The raw prediction with which the model would find the clean latents."""
        x, sigma = self.noised(batch.latents, batch.noise, batch.timesteps)
        (raw,) = self.raw(x, sigma, batch.latents.to(x))
        return raw


def with_predictor(
    model,
    loras: LoRASet,
    conditioning: dict[str, list],
    latents: dict[str, Tensor],
    work: Callable[[HostPredictor, JoinedSet, References], T],
    together: bool = True,
    recomputed: int = 0,
    need: int = 0,
) -> T:
    """LoRAs injected into a model that is loaded and frozen, and some work with it: what that returns.

    conditioning, latents: by concept; latents as a VAE gives them. together, recomputed, need: of
    a Plan.
    """
    injection = Injection(loras.layers, recomputed)

    def prepared(guider, patcher, model_options: dict) -> T:
        base, device = guider.inner_model, patcher.load_device
        references = {c: base.process_latent_in(latents[c].to(device, torch.float32).clone()) for c in loras.concepts}
        joined = JoinedSet(loras, device, compute_dtype(base))
        predict = HostPredictor(guider, model_options, injection, references)
        predict.keep_to(recipes.of(patcher))
        predict.joins = predict.joins and together
        return work(predict, joined, references)

    prompts = {concept: conditioning[concept] for concept in loras.concepts}
    prompts |= {f"{concept} {EMPTY}": zeros(prompt) for concept, prompt in prompts.items()}
    return session.with_network(model, injection, prompts, latents[loras.concepts[0]].shape[1:], need, prepared)
