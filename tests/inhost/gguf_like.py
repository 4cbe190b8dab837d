"""A model as ComfyUI-GGUF loads one: linear weights in blocks of eight-bit numbers, written out in each forward.

Of Q8_0 alone. What it calls its attributes and methods is that pack's (city96/ComfyUI-GGUF, December 2025), for these
the bridge asks; so are its habits: a tensor that says another shape than it has, copies of it that are itself, a state
dict without numbers, and LoRAs that are laid onto the tensor and added while it is written out.
"""

from __future__ import annotations

from typing import Any

import comfy.lora
import comfy.model_patcher
import comfy.ops
import comfy.utils
import torch

F32, F16, Q8_0 = 0, 1, 8  # ggml's numbers of its types
AT_ONCE = 32  # numbers that share a scale


def is_coded(tensor: Any) -> bool:
    return getattr(tensor, "tensor_type", None) not in (None, F32, F16)


class BlockTensor(torch.Tensor):
    """Bytes, or plain floats, that say which shape they stand for. patches: [(the host's patches, key)]."""

    def __new__(cls, data, *_):
        return super().__new__(cls, data)

    def __init__(self, data, tensor_type: int, tensor_shape: torch.Size):
        super().__init__()
        self.tensor_type, self.tensor_shape, self.patches = tensor_type, tensor_shape, []

    def to(self, *args, **kwargs):
        new = super().to(*args, **kwargs)
        new.tensor_type = getattr(self, "tensor_type", None)
        new.tensor_shape = getattr(self, "tensor_shape", new.data.shape)
        new.patches = list(getattr(self, "patches", []))
        return new

    def clone(self, *_, **__):
        return self

    def detach(self, *_, **__):
        return self

    @property
    def shape(self):
        if not hasattr(self, "tensor_shape"):
            self.tensor_shape = self.size()
        return self.tensor_shape


def coded(weight: torch.Tensor) -> BlockTensor:
    """A matrix (out, in) in blocks of one row, or as it is where a row is no whole number of them."""
    if weight.shape[-1] % AT_ONCE:
        return BlockTensor(weight.clone(), F32, weight.shape)
    blocks = weight.float().reshape(-1, AT_ONCE)
    scale = (blocks.abs().amax(1, keepdim=True) / 127).half()
    numbers = (blocks / scale.float().clamp_min(1e-12)).round().clamp(-127, 127).to(torch.int8)
    held = torch.cat([scale.view(torch.uint8), numbers.view(torch.uint8)], 1)
    return BlockTensor(held.reshape(weight.shape[0], -1), Q8_0, weight.shape)


def written_out(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The numbers that it stands for, without patches."""
    if not is_coded(tensor):
        return tensor.to(dtype)
    held = tensor.data.reshape(-1, 2 + AT_ONCE)
    numbers = held[:, :2].view(torch.float16) * held[:, 2:].view(torch.int8)
    return numbers.reshape(tensor.tensor_shape).to(dtype)


class BlockLayer(torch.nn.Module):
    """Writes its weights out for itself."""

    comfy_cast_weights = True

    def is_ggml_quantized(self) -> bool:
        return is_coded(self.weight) or is_coded(self.bias)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        if not (isinstance(self, torch.nn.Linear) or is_coded(state_dict.get(f"{prefix}weight"))):
            return super()._load_from_state_dict(state_dict, prefix, *args)
        for name in ("weight", "bias"):
            value = state_dict.get(f"{prefix}{name}")
            if value is not None:
                setattr(self, name, torch.nn.Parameter(value, requires_grad=False))

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        if not self.is_ggml_quantized():
            return super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, value in self.named_parameters(recurse=False):
            destination[prefix + name] = torch.zeros_like(value, device="meta")

    def get_weight(self, tensor, dtype):
        if tensor is None:
            return None
        weight = written_out(tensor, dtype)
        weight = torch.Tensor(weight) if isinstance(weight, BlockTensor) else weight
        for patches, key in getattr(tensor, "patches", []):
            weight = comfy.lora.calculate_weight(patches, weight, key)
        return weight

    def cast_bias_weight(self, input=None, dtype=None, device=None, bias_dtype=None):
        dtype = input.dtype if dtype is None else dtype
        device = input.device if device is None else device
        bias = None if self.bias is None else self.get_weight(self.bias.to(device), dtype).to(bias_dtype or dtype)
        return self.get_weight(self.weight.to(device), dtype), bias

    def forward_comfy_cast_weights(self, input, *args, **kwargs):
        if self.is_ggml_quantized():
            made = self.forward_ggml_cast_weights(input)
        else:
            made = super().forward_comfy_cast_weights(input, *args, **kwargs)
        return torch.Tensor(made) if isinstance(made, BlockTensor) else made


class BlockOperations(comfy.ops.manual_cast):
    class Linear(BlockLayer, comfy.ops.manual_cast.Linear):
        def __init__(self, in_features, out_features, bias=True, device=None, dtype=None):
            torch.nn.Module.__init__(self)
            self.in_features, self.out_features, self.weight, self.bias = in_features, out_features, None, None

        def forward_ggml_cast_weights(self, input):
            return torch.nn.functional.linear(input, *self.cast_bias_weight(input))

    class Conv2d(BlockLayer, comfy.ops.manual_cast.Conv2d):
        pass

    class LayerNorm(BlockLayer, comfy.ops.manual_cast.LayerNorm):
        pass

    class GroupNorm(BlockLayer, comfy.ops.manual_cast.GroupNorm):
        pass


class BlockPatcher(comfy.model_patcher.ModelPatcher):
    """Lays patches onto coded tensors, and writes them into the others as the host does."""

    def patch_weight_to_device(self, key, device_to=None, inplace_update=False):
        weight = comfy.utils.get_attr(self.model, key)
        if not is_coded(weight):
            return super().patch_weight_to_device(key, device_to, inplace_update)
        if key in self.patches:
            weight = weight.to(device_to)
            weight.patches = [(self.patches[key], key)]
            comfy.utils.set_attr_param(self.model, key, weight)

    def unpatch_model(self, device_to=None, unpatch_weights=True):
        for weight in self.model.parameters() if unpatch_weights else ():
            if is_coded(weight) and getattr(weight, "patches", []):
                weight.patches = []
        return super().unpatch_model(device_to=device_to, unpatch_weights=unpatch_weights)

    def load(self, *args, force_patch_weights=False, **kwargs):
        super().load(*args, force_patch_weights=True, **kwargs)


def patcher_like(plain) -> BlockPatcher:
    """A patcher over the same network with coded linear layers; the plain one gets the numbers that these stand for.

    plain: the host's ModelPatcher over a small model of any family.
    """
    own, file = plain.model.diffusion_model, {}
    for key, weight in own.state_dict().items():
        file[key] = weight.clone()
    for name, module in own.named_modules():
        if isinstance(module, torch.nn.Linear):
            key = f"{name}.weight"
            file[key] = coded(file[key])
            own.get_parameter(key).data.copy_(torch.Tensor(written_out(file[key], torch.float32)))
            if module.bias is not None:
                file[f"{name}.bias"] = BlockTensor(file[f"{name}.bias"], F32, module.bias.shape)
    config = type(plain.model.model_config)(dict(plain.model.model_config.unet_config))
    config.set_inference_dtype(torch.float32, torch.float32)
    config.custom_operations = BlockOperations
    model = config.get_model({}, device="cpu")
    model.load_model_weights({f"unet.{key}": value for key, value in file.items()}, "unet.")
    return BlockPatcher(model, plain.load_device, plain.offload_device)
