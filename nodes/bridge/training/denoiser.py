"""The core's Denoiser on a loaded network, and a rough picture of what it has learned."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import Any

import comfy.sampler_helpers
import comfy.samplers
import comfy.utils
import torch
from PIL import Image
from torch import Tensor

from ....ziplora_core import training
from ..drawing import recipes
from ..drawing.sampling import thumbnails
from ..network import session
from ..network.injection import Injection
from .pictures import Prepared


class Denoiser(session.Network):
    """The core's Denoiser on a loaded network: any number of prompts."""

    def __init__(self, guider, model_options: dict, injection: Injection):
        super().__init__(guider, model_options, injection)
        self.model = self._model
        self._encoded: dict[tuple[str, torch.Size], dict[str, Any]] = {}

    def _conditioning(self, prompt: int | str, latents: Tensor) -> dict[str, Any]:
        key = (str(prompt), latents.shape[1:])
        if key not in self._encoded:
            self._encoded[key] = self.encode(str(prompt), latents)
        return {k: v.process_cond(batch_size=1, area=None) for k, v in self._encoded[key].items()}

    def kind(self, prompt: int) -> Hashable:
        context = self._guider.conds[str(prompt)][0].get("cross_attn")
        return None if context is None else tuple(context.shape)

    def conditioning(self, rows: training.Rows) -> dict[str, Any]:
        conditionings = [self._conditioning(p, rows.latents[i : i + 1]) for i, p in enumerate(rows.prompts)]
        return comfy.samplers.cond_cat(conditionings)

    def __call__(self, rows: training.Rows, branch: training.Adapted) -> tuple[Tensor, Tensor]:
        x, sigma = self.noised(rows.latents, rows.noise, rows.timesteps)
        denoised = self.denoised(x, sigma, self.conditioning(rows), branch)
        prediction, target = self.raw(x, sigma, denoised, rows.latents.to(x))
        return prediction, target

    @torch.no_grad()
    def sample(self, prompt: int, latents: Tensor, branch: training.Adapted, seed: int) -> Tensor:
        """A picture's latents, as large as these (1, C, *space): Euler, guided away from an empty prompt where it
        is the model's way."""
        sampling, recipe = self._model.model_sampling, recipes.of(self._guider.model_patcher)
        sigmas = comfy.samplers.calculate_sigmas(sampling, recipe.scheduler, recipe.steps).to(self._device)
        prompts = (prompt,) if recipe.cfg == 1 else (prompt, "empty")
        noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(seed % 2**63)).to(self._device)
        x = sampling.noise_scaling(sigmas[0], noise, torch.zeros_like(noise), True)
        for sigma, following in zip(sigmas[:-1], sigmas[1:], strict=True):
            level = sigma.expand(1)
            wanted, *plain = (
                self.denoised(x, level, comfy.samplers.cond_cat([self._conditioning(p, latents)]), branch)
                for p in prompts
            )
            x0 = plain[0] + recipe.cfg * (wanted - plain[0]) if plain else wanted
            x = x + (x - x0) / sigma * (following - sigma)
        return x


class WordDenoiser(Denoiser):
    """A Denoiser of prompts that hold vectors which are trained, encoded anew for each pass.

    said: of each such prompt, its number -> the conditioning that it makes now.
    """

    def __init__(self, guider, model_options: dict, injection: Injection, said: Mapping[str, Callable[[], list]]):
        super().__init__(guider, model_options, injection)
        self._said = said

    def encode(self, prompt: str, latents: Tensor) -> dict[str, Any]:
        if prompt not in self._said:
            return super().encode(prompt, latents)
        return self._encode(comfy.sampler_helpers.convert_cond(self._said[prompt]())[0], latents)

    def _forget(self) -> None:
        self._encoded = {key: value for key, value in self._encoded.items() if key[0] not in self._said}

    def __call__(self, rows: training.Rows, branch: training.Adapted) -> tuple[Tensor, Tensor]:
        self._forget()
        return super().__call__(rows, branch)

    @torch.no_grad()
    def sample(self, prompt: int, latents: Tensor, branch: training.Adapted, seed: int) -> Tensor:
        self._forget()
        try:
            return super().sample(prompt, latents, branch, seed)
        finally:
            self._forget()


def picture(model, denoiser: Denoiser, data: Prepared, trained: training.Trainable, seed: int) -> Image.Image | None:
    """A rough picture of the first prompt, as the LoRA draws it now."""
    example = data.pictures.sets[0][0]
    latents = denoiser.sample(example.prompt, example.latents, trained.branch(None), seed)
    shown = thumbnails(model, model.model.process_latent_out(latents.cpu()))
    if shown is None:
        return None
    pixels = (255 * shown[0]).round().to(torch.uint8).numpy()
    return Image.fromarray(pixels)
