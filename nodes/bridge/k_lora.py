"""K-LoRA on a model: in each layer and step one of two LoRAs, whole, added beside the layer's own output.

Nothing is written into the weights and nothing is injected but while the network runs a pass, so that other packs'
patches, wrappers and injections stay what and where they are.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any

import comfy.model_management as management
import comfy.utils
import torch
import torch.nn.functional as F
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ...ziplora_core import k_lora
from ...ziplora_core.coefficients import Coefficients
from ...ziplora_core.frozen import project
from ...ziplora_core.lora_set import Factors, LoRASet, wide
from .apply import ZippedAdapter, apply_once
from .lora import described, fitting, loras
from .lora.loras import LoRASources
from .lora.zipped import ZippedLoRA
from .network.injection import convolution_options, is_convolution, is_linear
from .network.replaced import replacing
from .network.weights import compute_dtype
from .progress.bar import Steps

_KEY = "ziplora_k_lora"
_BEFORE = "diffusion_model.llm_adapter."  # Anima's, which reads the prompt once, before the sampler has a noise level


class Update(torch.nn.Module):
    """ΔW · x of one LoRA in one layer.

    up: (out, rank) with the scale in it; None where `down` is ΔW itself. down: (rank, in, *kernel). Both in `dtype`.
    """

    def __init__(self, factors: Factors, dtype: torch.dtype):
        super().__init__()
        up, down = factors.up, factors.down
        whole = up.shape[0] == up.shape[1] and bool(torch.equal(up, torch.eye(len(up)).to(up)))
        self.up = None if whole else _frozen(wide(up) * factors.scale, dtype)
        self.down = _frozen(wide(down) * factors.scale if whole else down, dtype)

    def forward(self, x: Tensor, convolution: Mapping[str, Any]) -> Tensor:
        """x: a layer's input. convolution: its stride, padding and dilation where it is one."""
        h = project(x, self.down.to(x.device), convolution)
        y = h if self.up is None else F.linear(h, self.up.to(h))
        return y.movedim(-1, 1) if self.down.ndim > 2 else y


def _frozen(tensor: Tensor, dtype: torch.dtype) -> torch.nn.Parameter:
    return torch.nn.Parameter(tensor.to(dtype, copy=True), requires_grad=False)


class Switch:
    """A wrapper of the host's `apply_model`: while a pass runs, each layer has the LoRA that is chosen for its noise
    level among the sampler's own; among the model's, where no sampler says which.

    updates: layer -> concept -> its update there. Raises ValueError in a pass whose rows differ in noise level.
    """

    def __init__(
        self, scores: k_lora.Scores, updates: Mapping[str, Mapping[str, Update]], factor: Callable[[float], float]
    ):
        self._scores, self._updates, self._factor = scores, updates, factor

    def __call__(
        self, executor, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options=None, **kwargs
    ) -> Tensor:
        options = {} if transformer_options is None else transformer_options
        model = executor.class_obj
        layers = (
            (_module(model, name), self._updates[name][of]) for name, of in self.chosen(model, t, options).items()
        )
        with replacing((module, _with(module, update)) for module, update in layers):
            result: Tensor = executor(x, t, c_concat, c_crossattn, control, options, **kwargs)
            return result

    def chosen(self, model, t: Tensor, options: Mapping[str, Any]) -> dict[str, str]:
        """Layer -> concept, at noise levels t (rows,), which are equal."""
        levels = t.flatten().float()  # Apple's GPUs have no float64
        low, high = float(levels.min()), float(levels.max())
        if low != high:
            raise ValueError(
                f"K-LoRA is on the model, which chooses a LoRA for each noise level; found rows of {low:g} to {high:g} "
                "in one pass. Take it off a model that is zipped or trained"
            )
        sigmas = options.get("sample_sigmas")
        if sigmas is None:
            sigmas = model.model_sampling.sigmas.flip(0)
        return self._scores.chosen(self._factor(k_lora.progress(high, sigmas)))


def _module(model, name: str) -> torch.nn.Module:
    module: torch.nn.Module = comfy.utils.get_attr(model, name.removesuffix(".weight"))
    return module


def _with(module: torch.nn.Module, update: Update) -> Callable[..., Tensor]:
    """The module's forward, whosever it is, and the update beside it; its output may be another's, and stays."""
    forward = module.forward
    convolution = convolution_options(module) if is_convolution(module) else {}
    mode: str = getattr(module, "padding_mode", "zeros")  # another is padded before, as for seamless pictures
    sides: Any = getattr(module, "_reversed_padding_repeated_twice", ())

    def run(x: Tensor, *args, **kwargs) -> Tensor:
        y: Tensor = forward(x, *args, **kwargs)
        if mode == "zeros":
            return y + update(x, convolution).to(y)
        padded = F.pad(x, sides, mode=mode)
        return y + update(padded, {**convolution, "padding": 0}).to(y)

    return run


def _refuse_zipped(model, sources: LoRASources, shared: Collection[str]) -> None:
    """Raises ValueError where a merge, of whatever kind, is on the model that has one of these LoRAs.

    shared: layers that both change; in others K-LoRA itself puts on one as a merge of one.
    """
    adapters = (entry[1] for name in shared for entry in model.patches.get(name, ()))
    merges = {id(a.sources): a.sources for a in adapters if isinstance(a, ZippedAdapter) and a.sources is not None}
    before = [of for merge in merges.values() for of in merge.by_concept.values()]
    if any(loras.one_lora(one, other) for one in before for other in sources.by_concept.values()):
        raise ValueError(
            "a merge of these LoRAs is on the model already, by Apply Zipped LoRA or Zip LoRAs; connect the model "
            "from before that node"
        )


def put_on(model, clip, sources: LoRASources, alpha: float, beta: float) -> tuple[Any, Any, str]:
    """(model, clip) clones that draw by K-LoRA, and a report; what came in is not changed. clip may be None.

    Layers that one LoRA alone changes have it all the time, and what reads the prompt, text encoders too, has both, as
    by LoRA loaders; bias and norm differences as well. Raises LoRAFileError where a file is another model's, and
    ValueError as `k_lora.scores` does, where LoRA loaders or a merge have put the same files on, and for layers whose
    forward cannot be added to.
    """
    began = time.monotonic()
    fitted = fitting.fit(sources, model.model)
    layers = fitted.loras.layers.items()
    shared = {name: layer for name, layer in layers if len(layer) > 1 and not name.startswith(_BEFORE)}
    _refuse_zipped(model, sources, shared)
    others = LoRASet(fitted.loras.concepts, {name: layer for name, layer in layers if name not in shared})
    odd = [n for n in shared if not (is_linear(_module(model.model, n)) or is_convolution(_module(model.model, n)))]
    if odd:
        raise ValueError(
            f"{len(odd)} layers are of a kind that K-LoRA cannot add to, e.g. '{odd[0]}'; use LoRAs that change linear "
            "and convolution layers"
        )
    steps = Steps(max(len(shared), 1))
    device = management.get_torch_device()
    device = torch.device("cpu") if device.type == "mps" else device  # whose top-k knows a few numbers only
    scores = k_lora.scores(replace(fitted.loras, layers=shared), device, steps.advance)
    rest = ZippedLoRA(sources, replace(fitted, loras=others), Coefficients.ones(others))
    model, clip = apply_once(model, clip, rest, 1.0)
    dtype = compute_dtype(model.model)
    with torch.inference_mode(False), torch.no_grad():
        updates = {name: {c: Update(f, dtype) for c, f in layer.items()} for name, layer in shared.items()}
    held = torch.nn.ModuleList(update for layer in updates.values() for update in layer.values())
    key = f"{_KEY}_{uuid.uuid4()}"  # a second one on the same model stays apart
    model.add_wrapper_with_key(
        WrappersMP.APPLY_MODEL, key, Switch(scores, updates, lambda done: k_lora.factor(done, alpha, beta))
    )
    # which the host makes room for, and moves, with the model
    model.set_additional_models(key, [ModelPatcher(held, model.load_device, management.unet_offload_device())])
    return model, clip, _report(sources, fitted, scores, (alpha, beta), time.monotonic() - began)


def _report(
    sources: LoRASources,
    fitted: fitting.FittedSet,
    scores: k_lora.Scores,
    settings: tuple[float, float],
    seconds: float,
) -> str:
    def subject(done: float) -> int:
        chosen = scores.chosen(k_lora.factor(done, *settings)).values()
        return sum(concept == k_lora.CONTENT for concept in chosen)

    layers, whole = len(scores.ratios), len(fitted.loras.layers)
    said = [
        f"The subject's LoRA acts in {subject(0)} of {layers} layers in the first step, in {subject(0.5)} half way and "
        f"in {subject(1)} at the end; the style's in all others.",
        "One LoRA in each layer and step: that is no LoRA, so it cannot be saved or exported.",
        f"cost: {seconds:.1f} s, without running the model",
    ]
    alpha, beta = settings
    details = [
        f"K-LoRA: alpha {alpha:g}, beta {beta:g}, gamma {scores.gamma:.3g}",
        *described.files(sources, fitted),
        f"layers: {layers} that are chosen for, of {whole}",
        *(f"note: {note}" for note in fitted.notes),
    ]
    return described.report(said, details)
