"""A user's patched model, loaded and injected, run inside the host's own sampling machinery."""

from __future__ import annotations

import copy
import inspect
import math
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Generic, TypeVar

import comfy.model_management
import comfy.sampler_helpers
import comfy.samplers
import torch
from comfy.ldm.modules.attention import attention_pytorch
from comfy.patcher_extension import CallbacksMP
from torch import Tensor

from .differentiable import with_gradient
from .foreign import is_patched, leave_out, patched_pass
from .injection import Injection
from .weights import compute_dtype

T = TypeVar("T")

_HALF_PRECISION_LOSS_SCALE = 1024.0  # fp16 cannot hold gradients of a mean over 65,536 outputs


def prepare_state(patcher, sigma: Tensor, model_options: dict) -> None:
    """The host's own call before each pass; newer hosts hand the model's options on to its callbacks."""
    newer = "model_options" in inspect.signature(patcher.prepare_state).parameters
    patcher.prepare_state(sigma, model_options) if newer else patcher.prepare_state(sigma)


def attention_with_gradient(_, *args, **kwargs) -> Tensor:
    """PyTorch's attention whatever the host chose: chunked, sage and flash kernels have no gradient."""
    return attention_pytorch(*args, **kwargs)


def _own(value: Any, device: torch.device) -> Any:
    """Copies of the tensors in a conditioning, moved once, outside inference mode, so that autograd may keep them."""
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
    affine in it for every parameterization (eps, v, flow).
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
        return self._encode(self._guider.conds[prompt][0], latents)

    def _encode(self, conditioning: dict[str, Any], latents: Tensor) -> dict[str, Any]:
        noise = torch.zeros_like(latents[:1])
        encoded = comfy.samplers.encode_model_conds(
            self._model.extra_conds,
            [conditioning.copy()],
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
    beside: Sequence[Any] = (),
) -> T:
    """Load a clone of a model as the host loads it for sampling, injected, and do some work with it: what that returns.

    model: ModelPatcher, not changed. prompts: conditionings by name. shape: of one latent (C, *space). need: bytes
    for which the host makes room beside the weights. work: called with (guider, clone, model_options), without gradient
    and outside inference mode. beside: ModelPatchers that are loaded together with the model. Whatever happens in it
    (return, exception, interrupt), no injected layer is left behind.
    """
    patcher = model.clone()
    leave_out(patcher)
    if beside:
        patcher.set_additional_models("ziplora", list(beside))

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
