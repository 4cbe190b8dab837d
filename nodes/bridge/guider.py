"""Guidance by two models that are one but for LoRAs: the base, and the same with an adapter's patches on it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import FunctionType
from typing import Any

import comfy.hooks
import comfy.samplers
import comfy.utils

from .network import checks
from .network.weights import is_coded

_MODEL_STRENGTH = 2  # of a patch, its place: what the weight itself is multiplied with
Patches = Mapping[str, list[tuple]]  # key -> (strength, update, strength of the weight, offset, function) each


def added(model, adapted) -> dict[str, list[tuple]]:
    """The patches that an adapted ModelPatcher has beyond those of another that it is a copy of.

    Raises ValueError where it is none, or differs from it in more than patches on weights, or in none, and where these
    weights are coded: the host's hooks change numbers as they lie in memory.
    """
    if getattr(adapted, "model", None) is not model.model:
        raise ValueError(
            "adapted_model is of another checkpoint loader than model: load the checkpoint once, and put the LoRA on "
            "that model"
        )
    found = {}
    for key, patches in adapted.patches.items():
        before = model.patches.get(key, [])
        if len(patches) < len(before) or any(a is not b for a, b in zip(patches, before, strict=False)):
            raise _more_than_patches()
        if len(patches) > len(before):
            found[key] = patches[len(before) :]
    merged = any(patch[_MODEL_STRENGTH] != 1 for patches in found.values() for patch in patches)
    others = (_beside(model), _options(model.model_options)) != (_beside(adapted), _options(adapted.model_options))
    if others or merged or model.patches.keys() - adapted.patches.keys():
        raise _more_than_patches()
    if any(is_coded(comfy.utils.get_attr(model.model, key)) for key in found):
        raise ValueError(
            "this model's weights are quantized (GGUF, or ComfyUI's own fp8 and fp4 files): nothing but LoRA loaders "
            "can change them, not the guider, which draws with and without the LoRA at once; load the checkpoint in "
            "fp16, bf16 or plain fp8"
        )
    if not found:
        raise ValueError("adapted_model has the weights of model: put the LoRA on it that was trained on the style")
    return found


def _beside(patcher) -> set[tuple[str, str]]:
    """What is on a ModelPatcher beside patches of its weights: (kind, name) each."""
    kinds = ("object_patches", "injections", "additional_models")
    plain = {(kind, name) for kind in kinds for name in getattr(patcher, kind, {})}
    return plain | {(kind, name) for kind, of in getattr(patcher, "wrappers", {}).items() for name in of}


def _options(of: Any) -> Any:
    """A model's options as far as a clone has them too: of most objects in them it has copies, which equal nothing."""
    if isinstance(of, Mapping):
        return {name: _options(value) for name, value in of.items()}
    if isinstance(of, list | tuple):
        return [_options(value) for value in of]
    return of if isinstance(of, FunctionType | str | float | int | None) else type(of)


def _more_than_patches() -> ValueError:
    return ValueError(
        "adapted_model is not model with a LoRA on it: take it from model itself, through Load LoRA or Apply Zipped "
        "LoRA alone"
    )


def as_hooks(patches: Patches) -> comfy.hooks.HookGroup:
    """The host's hooks that put these patches on a model's weights, for the conditioning that carries them alone."""
    by_turn: dict[tuple[int, float], dict[Any, Any]] = {}
    for key, given in patches.items():
        for turn, (strength, update, _, offset, function) in enumerate(given):
            by_turn.setdefault((turn, strength), {})[(key, offset, function)] = update
    group = comfy.hooks.HookGroup()
    for (_, strength), updates in sorted(by_turn.items(), key=lambda of: of[0][0]):
        hook = comfy.hooks.WeightHook(strength_model=strength, strength_clip=0.0)
        hook.weights, hook.need_weight_init = updates, False
        group.add(hook)
    return group


class TwoScales(comfy.samplers.CFGGuider):
    """negative + text_scale · (base − negative) + style_scale · (adapted − base) of three predictions.

    StyleDrop (arXiv 2306.00983) draws tokens by logits A + λ_A (A − B) + λ_B (B − N) of the adapted model, the base and
    the base with a negative prompt: the same with scales 1 + λ_B and 1 + λ_A. Factors add up to 1, so that it matters
    not whether a model predicts noise, velocity or pictures.
    """

    def set_conds(self, positive: list, negative: list, adapted: list) -> None:
        self.inner_set_conds({"positive": positive, "negative": negative, "adapted": adapted})

    def set_scales(self, text: float, style: float) -> None:
        self.text_scale, self.style_scale = text, style
        self.cfg = text

    def predict_noise(self, x, timestep, model_options={}, seed=None):  # noqa: B006 (the host's own signature)
        """As the host's guiders: what one scale alone needs is all that is run."""
        conds = {kind: self.conds[kind] for kind in ("positive", "negative", "adapted")}
        one_scale = math.isclose(self.text_scale, self.style_scale)
        if not model_options.get("disable_cfg1_optimization", False):
            if math.isclose(self.text_scale, 1.0):
                conds["negative"] = None
            if one_scale:
                conds["positive"] = None
            if math.isclose(self.style_scale, 0.0):
                conds["adapted"] = None
        found = comfy.samplers.calc_cond_batch(self.inner_model, list(conds.values()), x, timestep, model_options)
        positive, negative, adapted = found
        text = "adapted" if one_scale else "positive"
        guided = comfy.samplers.cfg_function(
            self.inner_model,
            adapted if one_scale else positive,
            negative,
            self.text_scale,
            x,
            timestep,
            model_options=model_options,
            cond=conds[text],
            uncond=conds["negative"],
        )
        return guided if one_scale else guided + self.style_scale * (adapted - positive)


def two_scales(
    model, adapted_model, positive: list, negative: list, adapted_positive: list | None, text: float, style: float
) -> TwoScales:
    """A GUIDER of the host. model, adapted_model: ModelPatchers, which stay as they are. adapted_positive: None for
    `positive`. Raises ValueError as `added` does, and for what is no conditioning."""
    own = positive if adapted_positive is None else adapted_positive
    for name, given in (("positive", positive), ("negative", negative), ("adapted_positive", own)):
        checks.check_prompts(name, given)
    hooks = as_hooks(added(model, adapted_model))
    guider = TwoScales(model.clone())
    guider.set_conds(positive, negative, comfy.hooks.set_hooks_for_conditioning(own, hooks))
    guider.set_scales(text, style)
    return guider
