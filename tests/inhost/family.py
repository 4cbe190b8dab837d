"""One model family of the host's, tiny in every number: its own class with random weights, LoRAs and prompts for it."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from devhost import full_size

TEXT, POOLED = 48, 32  # widths
TOKENS = 20

Names = Callable[[str], tuple[str, str]]


def kohya(weight: str) -> tuple[str, str]:
    """Up and down of a layer, without `.weight`, as kohya's trainers name them."""
    name = "lora_unet_" + weight.removeprefix("diffusion_model.").removesuffix(".weight").replace(".", "_")
    return f"{name}.lora_up", f"{name}.lora_down"


def own_names(weight: str) -> tuple[str, str]:
    """As the trainers of most transformers name them: the model's own name, with peft's endings."""
    name = weight.removesuffix(".weight")
    return f"{name}.lora_B", f"{name}.lora_A"


SLOPES = {  # by how much less x0 is for one more of the raw prediction, by what that is
    "eps": lambda sigma: sigma,
    "flow": lambda sigma: sigma,
    "v": lambda sigma: sigma / (sigma**2 + 1) ** 0.5,
    "cosmos": lambda sigma: sigma / (sigma + 1),
}


@dataclass(frozen=True)
class Family:
    """config: the host's class. unet: its numbers. latent: shape of one. layers: in names of what LoRAs change.

    options: of a prompt, beside its pooled vector. marks: tensors of a checkpoint by which the host knows its variant.
    predicts: in SLOPES. pixels: how many are one of a latent. params: the host's record of the numbers, where there is
    one that older hosts have fewer fields of. smaller: "module.attribute" of the host -> arguments of a part that takes
    none of the network's numbers.
    """

    config: str
    unet: dict[str, Any]
    latent: tuple[int, ...]
    layers: tuple[str, ...]
    options: dict[str, Any] = field(default_factory=dict)
    pooled: int = POOLED
    marks: tuple[str, ...] = ()
    predicts: str = "flow"
    pixels: int = 8
    params: str = ""
    smaller: dict[str, dict[str, Any]] = field(default_factory=dict)

    def is_known(self) -> bool:
        """Whether the host that runs has this family."""
        import comfy.supported_models

        return hasattr(comfy.supported_models, self.config)

    def model(self, dtype: torch.dtype = torch.float32):
        import comfy.supported_models

        unet = dict(self.unet)
        if self.params:
            known = {f.name for f in fields(_host(self.params))} | {"image_model"}
            unet = {k: v for k, v in unet.items() if k in known}
        config = getattr(comfy.supported_models, self.config)(unet)
        config.sampling_settings = dict(config.sampling_settings)
        config.set_inference_dtype(dtype, None)
        return config.get_model(dict.fromkeys(self.marks, torch.zeros(1)), device="cpu")

    def shrink(self, monkeypatch) -> None:
        """Has the host make its parts of fixed size as small as the rest."""
        for name, numbers in self.smaller.items():
            made = _host(name)
            monkeypatch.setattr(name, lambda made=made, numbers=numbers, **given: made(**{**given, **numbers}))

    def patcher(self):
        """A ModelPatcher as a loader leaves one: weights are inference tensors."""
        torch.manual_seed(0)
        with torch.inference_mode():
            patcher = full_size.random_patcher(self.model())
            for name, p in patcher.model.diffusion_model.named_parameters():
                if p.ndim == 1 and not name.endswith("bias"):
                    p.data.fill_(1.0)  # norms of other classes
                elif p.ndim > 1 and not name.endswith("weight"):
                    p.data.uniform_(-0.5, 0.5)  # tables and pads
            for name, table in patcher.model.diffusion_model.named_buffers():  # SD 3's is made without values
                if table.is_floating_point() and name == "pos_embed":
                    table.uniform_(-0.5, 0.5)
            return patcher

    def slope(self, sigma: Tensor) -> Tensor:
        return SLOPES[self.predicts](sigma)

    def weights(self, model) -> dict[str, Tensor]:
        """What a LoRA of this family changes: weight of the model -> its tensor."""
        return {
            k: w
            for k, w in model.state_dict().items()
            if k.endswith(".weight") and w.ndim == 2 and any(part in k for part in self.layers)
        }

    def lora(self, model, rank: int, seed: int, names: Names = kohya) -> dict[str, Tensor]:
        """Alpha twice the rank."""
        g = torch.Generator().manual_seed(seed)
        file = {}
        for key, weight in self.weights(model).items():
            out, columns = weight.shape
            up, down = names(key)
            file[f"{up}.weight"] = torch.randn(out, rank, generator=g) * 0.1 / rank**0.5
            file[f"{down}.weight"] = torch.randn(rank, columns, generator=g) / columns**0.5
            file[f"{up.rpartition('.')[0]}.alpha"] = torch.tensor(2.0 * rank)
        return file

    def prompts(self) -> dict[str, list]:
        with torch.inference_mode():
            return {c: self._prompt(seed) for seed, c in enumerate(("content", "style"))}

    def _prompt(self, seed: int) -> list:
        g = torch.Generator().manual_seed(seed)
        options = {k: v.clone() if isinstance(v, Tensor) else v for k, v in self.options.items()}
        options["pooled_output"] = torch.randn(1, self.pooled, generator=g) if self.pooled else None
        return [[torch.randn(1, TOKENS, TEXT, generator=g), options]]

    def latents(self) -> dict[str, dict[str, Tensor]]:
        with torch.inference_mode():
            made = {}
            for seed, c in enumerate(("content", "style")):
                g = torch.Generator().manual_seed(7 + seed)
                made[c] = {"samples": torch.randn(1, *self.latent, generator=g)}
            return made

    def sample(self, patcher) -> Tensor:
        """What the host's sampler draws: the witness that a model is what it was."""
        import comfy.sample

        with torch.inference_mode():
            empty = torch.zeros(1, *self.latent)
            noise = torch.randn(empty.shape, generator=torch.Generator().manual_seed(0))
            prompts = self.prompts()
            return comfy.sample.sample(
                patcher, noise, 3, 3.0, "euler", "simple", prompts["content"], prompts["style"], empty, seed=0,
                disable_pbar=True,
            )  # fmt: skip


def _host(name: str) -> Any:
    """What the host has under `module.name`."""
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(module), attribute)
