"""A user's patched model as the core's Predictor, run inside the host's own sampling machinery."""

from __future__ import annotations

import copy
import inspect
import math
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Generic, TypeVar

import comfy.model_management
import comfy.sampler_helpers
import comfy.samplers
import torch
from comfy.ldm.modules.attention import attention_pytorch
from comfy.patcher_extension import CallbacksMP
from torch import Tensor

from ...ziplora_core.branch import Branch, JoinedPair
from ...ziplora_core.files import all_finite
from ...ziplora_core.pair import LoRAPair
from ...ziplora_core.solver import EMPTY, OTHER, Batch, References
from .foreign import is_patched, leave_out, patched_pass
from .frozen import Injection, with_gradient
from .prompts import zeros

T = TypeVar("T")
_HALF_PRECISION_LOSS_SCALE = 1024.0  # fp16 cannot hold gradients of a mean over 65,536 outputs
_UNSUPPORTED = ("area", "mask", "control", "gligen", "hooks")


def check_conditioning(name: str, conditioning: list) -> None:
    """Raises ValueError unless a conditioning is one plain prompt: areas, masks and ControlNets have no teacher."""
    if not isinstance(conditioning, list) or not all(map(_is_prompt, conditioning)):
        raise ValueError(f"{name} is no conditioning; connect a text encode node to it")
    if len(conditioning) != 1:
        raise ValueError(
            f"{name} holds {len(conditioning)} prompts; expected one: connect a single text encode node to it"
        )
    found = [key for key in _UNSUPPORTED if conditioning[0][1].get(key) is not None]
    if found:
        raise ValueError(f"{name} carries {found[0]}; expected a plain prompt: connect a text encode node to it")
    context, options = conditioning[0]
    tensors = [part for part in (context, options.get("pooled_output")) if part is not None]
    ranges = [value for value in options.values() if isinstance(value, float)]
    if not (all(map(_is_usable, tensors)) and all(map(math.isfinite, ranges))):
        raise ValueError(f"{name} holds no usable numbers; check the nodes that made it")


def _is_usable(numbers: Tensor) -> bool:
    """Of a kind that has arithmetic, and finite."""
    known = numbers.is_floating_point() and numbers.element_size() > 1
    return known and numbers.numel() > 0 and all_finite(numbers)


def _is_prompt(entry: Any) -> bool:
    """As the host keeps one: [context (1, tokens, width), options]."""
    if not (isinstance(entry, list | tuple) and len(entry) == 2 and isinstance(entry[1], dict)):
        return False
    context, pooled = entry[0], entry[1].get("pooled_output")
    return isinstance(context, Tensor) and context.ndim == 3 and (pooled is None or isinstance(pooled, Tensor))


_WIDTHS = ("context_dim", "context_in_dim", "cap_feat_dim", "joint_attention_dim")  # in the host's configurations


def check_width(name: str, conditioning: list, model) -> None:
    """Raises ValueError for a prompt of another model's text encoder. model: ModelPatcher.

    For when the model has failed: other packs teach models prompts of other widths.
    """
    config, found = model.model.model_config.unet_config, conditioning[0][0].shape[-1]
    expected = [config[key] for key in _WIDTHS if isinstance(config.get(key), int)]
    if expected and found not in expected:
        raise ValueError(
            f"{name} is {found} wide, this model's prompts are {expected[0]}: it comes from another model's text "
            "encoder; connect a text encode node with this checkpoint's own clip"
        )


def read_latents(name: str, given: Any, model) -> Tensor:
    """The samples of a LATENT, (N, C, *space). Raises ValueError where they cannot be this model's."""
    samples = given.get("samples") if isinstance(given, dict) else None
    if not isinstance(samples, Tensor):
        raise ValueError(f"{name} is no latent; connect VAE Encode to it")
    check_latents(name, samples, model)
    return samples


def check_latents(name: str, latents: Tensor, model) -> None:
    """Raises ValueError where latents cannot be this model's. latents: (N, C, *space). model: ModelPatcher."""
    form = model.get_model_object("latent_format")
    channels, most = form.latent_channels, max(4, 2 + getattr(form, "latent_dimensions", 3))
    if latents.is_nested or not 4 <= latents.ndim <= most or latents.shape[1] != channels:
        raise ValueError(
            f"{name} has shape {tuple(latents.shape)}; this model's latents have {channels} channels: "
            "connect VAE Encode with this checkpoint's own VAE"
        )
    if not (latents.numel() and latents.is_floating_point()):
        raise ValueError(f"{name} is empty or holds no fractions; connect VAE Encode with this checkpoint's own VAE")
    if not all_finite(latents):
        raise ValueError(f"{name} holds NaN or infinite numbers; check the picture and the VAE that encoded it")


def compute_dtype(model) -> torch.dtype:
    """The dtype in which the host runs this BaseModel's network."""
    return model.manual_cast_dtype or model.get_dtype()


def prepare_state(patcher, sigma: Tensor, model_options: dict) -> None:
    """The host's own call before each pass; newer hosts hand the model's options on to its callbacks."""
    newer = "model_options" in inspect.signature(patcher.prepare_state).parameters
    patcher.prepare_state(sigma, model_options) if newer else patcher.prepare_state(sigma)


def attention_with_gradient(_, *args, **kwargs) -> Tensor:
    """PyTorch's attention whatever the host chose: chunked, sage and flash kernels have no gradient."""
    return attention_pytorch(*args, **kwargs)


def _own(value: Any, device: torch.device) -> Any:
    """Copies of the tensors in a conditioning, moved once, made outside inference mode: autograd may keep them."""
    if isinstance(value, Tensor):
        return value.to(device, copy=True)
    if isinstance(value, list):
        return [_own(v, device) for v in value]
    if hasattr(value, "cond"):
        owned = copy.copy(value)
        owned.cond = _own(value.cond, device)
        return owned
    return value


class Network:
    """A loaded, injected BaseModel and its prompts; lives inside one `CFGGuider.sample` call.

    The raw prediction is recovered from the host's x0 through the model's own `calculate_denoised`, which is
    affine in it for every parameterisation (eps, v, flow).
    """

    attention = staticmethod(attention_with_gradient)

    def __init__(self, guider, model_options: dict, injection: Injection):
        self._guider = guider
        self._model = guider.inner_model
        self._injection = injection
        self._model_options = model_options
        self._device = guider.model_patcher.load_device
        self._sigmas = self._model.model_sampling.sigmas.to(self._device).clone()
        self.timesteps = len(self._sigmas)
        self.loss_scale = _HALF_PRECISION_LOSS_SCALE if compute_dtype(self._model) == torch.float16 else 1.0

    def encode(self, prompt: str, latents: Tensor) -> dict[str, Any]:
        """What the model makes of one of the guider's prompts at this latent size: context, vector with sizes, ..."""
        noise = torch.zeros_like(latents[:1])
        encoded = comfy.samplers.encode_model_conds(
            self._model.extra_conds,
            [self._guider.conds[prompt][0].copy()],
            noise,
            self._device,
            "positive",
            latent_image=latents[:1],
            denoise_mask=None,
            seed=0,
            latent_shapes=[noise.shape],
        )
        return {k: _own(v, self._device) for k, v in encoded[0]["model_conds"].items()}

    def _transformer_options(self, sigma: Tensor, rows: int) -> dict[str, Any]:
        options = self._model.current_patcher.apply_hooks(hooks=None)
        options = {**options, **self._model_options.get("transformer_options", {})}
        options["optimized_attention_override"] = self.attention
        options["cond_or_uncond"] = [0] * rows
        options["uuids"] = [uuid.uuid4() for _ in range(rows)]
        options["sigmas"] = sigma
        return options

    def denoised(self, x: Tensor, sigma: Tensor, conditioning: dict[str, Any], branch: Any) -> Tensor:
        """The host's x0 of noisy latents x (rows, C, *space) at sigma (rows,), with a branch added to the layers."""
        comfy.model_management.throw_exception_if_processing_interrupted()
        self._injection.branch = branch
        prepare_state(self._model.current_patcher, sigma, self._model_options)
        conditioning["transformer_options"] = self._transformer_options(sigma, len(x))
        self._injection.begin_pass()
        with patched_pass(sigma) if self._injection.is_patched else nullcontext():
            x0 = self._apply_model(x, sigma, conditioning)
        self._injection.check_pass()
        return x0

    def _apply_model(self, x: Tensor, sigma: Tensor, conditioning: dict[str, Any]) -> Tensor:
        wrapper = self._model_options.get("model_function_wrapper")
        if wrapper is None:
            return self._model.apply_model(x, sigma, **conditioning)
        call = {"input": x, "timestep": sigma, "c": conditioning, "cond_or_uncond": [0] * len(x)}
        return wrapper(self._model.apply_model, call)

    def noised(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """(noisy latents, sigma) on the model's device, by its own schedule."""
        sigma = self._sigmas[timesteps.to(self._device)]
        latents, noise = latents.to(self._device), noise.to(self._device)
        return self._model.model_sampling.noise_scaling(sigma, noise, latents, False), sigma

    def raw(self, x: Tensor, sigma: Tensor, *denoised: Tensor) -> list[Tensor]:
        """The raw predictions with which the model would denoise x to each of these."""
        sampling = self._model.model_sampling
        zeros = torch.zeros_like(x)
        offset = sampling.calculate_denoised(sigma, zeros, x)
        slope = sampling.calculate_denoised(sigma, torch.ones_like(x), zeros)
        return [(x0 - offset) / slope for x0 in denoised]


class HostPredictor(Network):
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


class _Work(comfy.samplers.Sampler, Generic[T]):
    """A sampler that samples nothing: it hands the prepared model to a function, and keeps what that returns, since the
    host gives back latents alone."""

    result: T

    def __init__(self, work: Callable[[Any, dict], T]):
        self._work = work

    def sample(self, model_wrap, sigmas, extra_args, callback, noise, latent_image=None, *_, **__):
        self.result = self._work(model_wrap, extra_args["model_options"])
        return latent_image


def _rows_that_take(need: int, model, shape: torch.Size) -> int:
    """For how many rows of such latents the host sets so many bytes aside: it reckons in rows."""
    one = model.model.memory_required([1, *shape])
    return max(2, math.ceil(need / one)) if one else 2


@contextmanager
def _renewed(injection: Injection, patcher) -> Iterator[None]:
    """Whatever moves weights meanwhile, such as a VAE that needs room, has the host eject and inject what others
    inject: their order is kept, ours is on top again."""
    patcher.add_callback_with_key(
        CallbacksMP.ON_INJECT_MODEL, "ziplora", lambda patcher: injection.renew(patcher.model)
    )
    try:
        yield
    finally:
        patcher.remove_callbacks_with_key(CallbacksMP.ON_INJECT_MODEL, "ziplora")


def with_network(
    model,
    injection: Injection,
    prompts: dict[str, list],
    shape: torch.Size,
    need: int,
    work: Callable[[Any, Any, dict], T],
) -> T:
    """Load a clone of a model as the host loads it for sampling, injected, and do some work with it: what that returns.

    model: ModelPatcher, not changed. prompts: conditionings by name. shape: of one latent (C, *space). need: bytes
    for which the host makes room beside the weights. work: called with (guider, clone, model_options), without gradient
    and outside inference mode. Whatever happens in it (return, exception, interrupt), no injected layer is left behind.
    """
    patcher = model.clone()
    leave_out(patcher)

    def prepared(guider, model_options: dict) -> T:
        injection.is_patched = is_patched(guider.model_patcher, model_options)  # before our own forwards are on it
        with (
            injection.injected(guider.inner_model),
            _renewed(injection, patcher),
            torch.inference_mode(False),
            torch.no_grad(),
            with_gradient(),
        ):
            return work(guider, patcher, model_options)

    sampler = _Work(prepared)
    try:
        empty = torch.zeros(_rows_that_take(need, model, shape), *shape)
        sigmas = torch.tensor([float(patcher.get_model_object("model_sampling").sigma_max), 0.0])
        guider = comfy.samplers.CFGGuider(patcher)
        guider.inner_set_conds(prompts)
        guider.sample(empty, empty, sampler, sigmas, seed=0, disable_pbar=True)
        return sampler.result
    finally:
        patcher.eject_model()  # a clone that goes away must not leave others' injections behind
        injection.uncover()


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
    """`with_network` for two references: load, freeze, inject a pair, and do some work with it: what that returns.

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
    return with_network(model, injection, prompts, latents["content"].shape[1:], need, prepared)
