"""What the host itself computes, by its own guider and loader: the truth that passes of ours are compared with."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def raw_prediction(
    patcher, positive: list, latents: Tensor, noise: Tensor, timestep: int, loras: Sequence[tuple[dict, float]] = ()
) -> Tensor:
    """(x − x0) / σ of one pass of the host's guider, without guidance, at a timestep of the model's own schedule.

    latents: (1, C, *space) as a VAE gives them, noise as large. loras: files and strengths, put on by the host's
    loader.
    """
    import comfy.samplers
    import comfy.sd

    for tensors, strength in loras:
        patcher, _ = comfy.sd.load_lora_for_models(patcher, None, tensors, strength, 0)
    found = []

    class Once(comfy.samplers.Sampler):
        def sample(self, guider, sigmas, extra_args, callback, noise, latent_image=None, *_, **__):
            sampling = guider.inner_model.model_sampling
            sigma = sampling.sigmas[torch.tensor([timestep])]
            x = sampling.noise_scaling(sigma, noise, latent_image, False)
            found.append((x - guider(x, sigma, **extra_args)) / sigma.reshape(-1, *[1] * (x.ndim - 1)))
            return latent_image

    with torch.inference_mode():
        guider = comfy.samplers.CFGGuider(patcher)
        guider.set_conds(positive, positive)
        guider.set_cfg(1.0)
        sigmas = torch.tensor([14.0, 0.0])
        guider.sample(noise, latents, Once(), sigmas, seed=0, disable_pbar=True)
    return found[0].clone()


def emptied(conditioning: list) -> list:
    """By the host's own node."""
    from nodes import ConditioningZeroOut

    return ConditioningZeroOut().zero_out(conditioning)[0]
