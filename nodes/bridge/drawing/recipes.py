"""How a model draws: steps, guidance, sampler and scheduler, asked from the host's model and the names of its files."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import comfy.model_sampling
import comfy.samplers
import comfy.supported_models
import folder_paths
from torch import Tensor

from ....ziplora_core import few_steps
from ....ziplora_core.files import LoRAFileError, read_metadata, shown
from ..lora import base_models, captured

STEPS, GUIDANCE, SAMPLER, SCHEDULER = 20, 4.0, "euler", "normal"
_SIMPLE = "simple"  # flow models' usual scheduler; in few steps the noise levels that distilled models were trained at
_LCM_STEPS, _X0_STEPS, _SCHNELL_STEPS = 8, 1, 4
_TITLES = ("modelspec.title", "modelspec.architecture")
_FOLDERS = ("checkpoints", "diffusion_models")


@dataclass(frozen=True)
class Recipe:
    """cfg: 1 for models that were distilled to need no second pass. told_by: what says that the model was distilled to
    draw in so few steps, "" where nothing does."""

    steps: int
    cfg: float
    sampler: str
    scheduler: str
    told_by: str = ""

    def at_most(self, steps: int) -> Recipe:
        """In no more steps, but for a model that was trained at its own alone."""
        return self if self.told_by else replace(self, steps=min(steps, self.steps))

    def rows(self, count: int) -> int:
        """How many rows go through the network for so many pictures: two a step each where it is guided."""
        return (1 if self.cfg == 1 else 2) * self.steps * count

    def levels(self, sampling) -> Tensor:
        """The noise levels that it draws at, rising, (steps,). sampling: the model's own."""
        return comfy.samplers.calculate_sigmas(sampling, self.scheduler, self.steps)[:-1].flip(0)

    def line(self) -> str:
        return f"{self.sampler}, {self.scheduler}, {self.steps} steps, cfg {self.cfg:g}"


def of(model) -> Recipe:
    """model: ModelPatcher, with everything that is on it; unchanged."""
    sampling = model.get_model_object("model_sampling")
    for steps, told_by in _signs(model, sampling):
        if steps:
            sampler = "lcm" if _is_lcm(sampling) else SAMPLER
            return Recipe(steps, 1.0, sampler, _SIMPLE, told_by)
    scheduler = _SIMPLE if isinstance(sampling, comfy.model_sampling.CONST) else SCHEDULER
    return Recipe(STEPS, 1.0 if takes_guidance(model) else GUIDANCE, SAMPLER, scheduler)


def takes_guidance(model) -> bool:
    """Whether guidance is a number in a prompt, as Flux Guidance puts it there. model: ModelPatcher."""
    return bool(model.model.model_config.unet_config.get("guidance_embed", False))


def _signs(model, sampling) -> Iterator[tuple[int, str]]:
    """(steps, what says it) of everything that may say it, steps 0 where it does not; what was put on last first."""
    config = model.model.model_config
    for name in captured.names_on(model, few_steps.of_lora):
        yield few_steps.of_lora(os.path.basename(name)), f"'{shown(name, 120)}', which is on the model"
    if _is_lcm(sampling):
        yield _LCM_STEPS, "its sampling, LCM"
    x0, pictures = comfy.model_sampling.X0, comfy.model_sampling.IMG_TO_IMG
    if isinstance(sampling, x0) and not isinstance(sampling, pictures):
        yield _X0_STEPS, "its sampling, x0"
    families = tuple(kind.__name__ for kind in type(config).__mro__)
    said = _said_by_file(model)
    if said:
        yield few_steps.of_model(said[1], families), f"'{shown(said[0], 120)}'"
    of_schnell = isinstance(config, comfy.supported_models.FluxSchnell)
    if of_schnell and config.unet_config.get("vec_in_dim"):  # Ovis is of this class too, and takes no vector
        undone = said is not None and few_steps.is_undone(said[1])
        yield 0 if undone else _SCHNELL_STEPS, "its layers, those of Flux schnell"


def _is_lcm(sampling) -> bool:
    return any(kind.__name__ == "LCM" for kind in type(sampling).__mro__)


def _said_by_file(model) -> tuple[str, str] | None:
    """(name, all that is said) of the file that a model was loaded from: its name and its title; None where nobody
    knows the file. Where the host does not keep it with the model, the one model of the graph that runs is it."""
    path = _path(getattr(model, "cached_patcher_init", None))
    if path is None:
        names = set(base_models.running_checkpoints())
        if len(names) != 1:
            return None
        (name,) = names
        found = (folder_paths.get_full_path(folder, name) for folder in _FOLDERS)
        path = next(filter(None, found), name)
    about: dict[str, str] = {}
    with suppress(LoRAFileError):  # of other kinds of files only the name is read
        about = read_metadata(path)
    name = os.path.basename(path)
    return name, " ".join([name, *(about[key] for key in _TITLES if key in about)])


def _path(loading: Any) -> str | None:
    """Of the file in what newer hosts keep of a model: (function, its arguments, ...)."""
    if isinstance(loading, tuple) and len(loading) > 1 and isinstance(loading[1], tuple) and loading[1]:
        first = loading[1][0]
        return first if isinstance(first, str) else None
    return None
