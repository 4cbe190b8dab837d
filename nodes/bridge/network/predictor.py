"""The core's Predictor on a loaded network: two references and their prompts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import comfy.model_management
import comfy.sampler_helpers
import comfy.samplers
import torch
from torch import Tensor

from ....ziplora_core.branch import Branch, JoinedPair
from ....ziplora_core.pair import LoRAPair
from ....ziplora_core.solver import EMPTY, OTHER, Batch, References
from . import session
from .empty_prompt import zeros
from .injection import Injection
from .weights import compute_dtype

T = TypeVar("T")


class HostPredictor(session.Network):
    """The core's Predictor: two references and their prompts."""

    def __init__(self, guider, model_options: dict, injection: Injection, references: References):
        super().__init__(guider, model_options, injection)
        self._references = {"content": references.content, "style": references.style}
        self._conds = {(c, c): self.encode(c, latents) for c, latents in self._references.items()}
        one_row = [self._rows(concept, concept, 1) for concept in ("content", "style")]
        self.joins = comfy.samplers.cond_equal_size(*one_row)

    def _rows(self, concept: str, prompt: str, rows: int) -> dict[str, Any]:
        """One of the guider's prompts for rows of a concept's references."""
        if (concept, prompt) not in self._conds:
            self._conds[concept, prompt] = self.encode(prompt, self._references[concept])
        return {k: v.process_cond(batch_size=rows, area=None) for k, v in self._conds[concept, prompt].items()}

    def _conditioning(self, batch: Batch) -> dict[str, Any]:
        """Conditioning of a batch whose content rows come before its style rows, joined as the host joins."""
        style_rows = int(batch.is_style.sum())
        counts = {"content": len(batch.is_style) - style_rows, "style": style_rows}
        names = {c: c for c in counts}
        if batch.prompt == OTHER:
            names = {"content": "style", "style": "content"}
        elif batch.prompt == EMPTY:
            names = {c: f"{c} {EMPTY}" for c in counts}
        return comfy.samplers.cond_cat([self._rows(c, names[c], n) for c, n in counts.items() if n])

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
    pair: LoRAPair,
    conditioning: dict[str, list],
    latents: dict[str, Tensor],
    work: Callable[[HostPredictor, JoinedPair, References], T],
    together: bool = True,
    recomputed: int = 0,
    need: int = 0,
) -> T:
    """A pair injected into a model that is loaded and frozen, and some work with it: what that returns.

    conditioning, latents: by concept ("content", "style"); latents as a VAE gives them. together, recomputed, need: of
    a Plan.
    """
    injection = Injection(pair.layers, recomputed)

    def prepared(guider, patcher, model_options: dict) -> T:
        base, device = guider.inner_model, patcher.load_device
        content, style = (
            base.process_latent_in(latents[c].to(device, torch.float32).clone()) for c in ("content", "style")
        )
        references = References(content, style)
        joined = JoinedPair(pair, device, compute_dtype(base))
        predict = HostPredictor(guider, model_options, injection, references)
        predict.joins = predict.joins and together
        return work(predict, joined, references)

    prompts = {concept: conditioning[concept] for concept in ("content", "style")}
    prompts |= {f"{concept} {EMPTY}": zeros(prompt) for concept, prompt in prompts.items()}
    return session.with_network(model, injection, prompts, latents["content"].shape[1:], need, prepared)
