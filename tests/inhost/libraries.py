"""LoRA files as libraries write them, each with what the library itself then makes of the weights."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from twins import Twins

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]


def randomized(parameters: Iterator[tuple[str, nn.Parameter]], seed: int = 5) -> None:
    """Adapters begin as nothing; matrices get numbers of the size of the weights, DoRA's scales stay near theirs."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in parameters:
            if "magnitude" in name or "dora_scale" in name:
                parameter.mul_(1 + 0.3 * torch.rand(parameter.shape, generator=g))
            else:
                parameter.copy_(torch.randn(parameter.shape, generator=g) * 0.2)


def _weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone().double() for name, p in module.named_parameters() if p.ndim > 1}


def _trained(model: nn.Module, mark: str) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, p) for name, p in model.named_parameters() if mark in name)


def _merged(model: nn.Module, before: dict[str, Tensor]) -> dict[str, Tensor]:
    """What peft's own merge changes, in float64: by names of the twin."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    model.double()
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.merge()
    found = {}
    for name, weight in _weights(model).items():
        plain = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
        if plain in before and not torch.equal(weight, before[plain]):
            found[plain] = weight - before[plain]
    return found


def peft_config(kind: str = "LoraConfig", **settings: Any):
    import peft

    return getattr(peft, kind)(**{"target_modules": ATTENTION, **settings})


def by_diffusers(twins: Twins, folder: Path, how: str = "pipeline", **settings: Any) -> dict[str, Tensor]:
    """`save_lora_weights` of a pipeline, with what it says in its header, or `save_lora_adapter` of a model."""
    from peft import get_peft_model_state_dict

    before = _weights(twins.twin)
    twins.twin.add_adapter(peft_config(**settings))
    randomized(_trained(twins.twin, "lora_"))
    if how == "model":
        twins.twin.save_lora_adapter(folder)
    else:
        layers = get_peft_model_state_dict(twins.twin)
        about = twins.twin.peft_config["default"].to_dict() if how == "pipeline" else None
        twins.saver(folder, **{f"{twins.part}_lora_layers": layers, f"{twins.part}_lora_adapter_metadata": about})
    (folder / "pytorch_lora_weights.safetensors").rename(folder / "subject.safetensors")
    return _merged(twins.twin, before)


def by_peft(twins: Twins, folder: Path, beside: bool = True, **settings: Any) -> dict[str, Tensor]:
    """`save_pretrained`: the matrices, and `adapter_config.json` beside them."""
    from peft import get_peft_model

    before = _weights(twins.twin)
    config = peft_config(**settings)
    model = get_peft_model(twins.twin, config)
    randomized(_trained(model, model.base_model.prefix))
    model.save_pretrained(folder)
    (folder / "adapter_model.safetensors").rename(folder / "subject.safetensors")
    if not beside:
        (folder / "adapter_config.json").unlink()
    return _merged(model, before)


def by_lycoris(twins: Twins, folder: Path, names: str = "kohya", **settings: Any) -> dict[str, Tensor]:
    """lycoris-lora's own network on the twin, in kohya's names, SimpleTuner's or OneTrainer's."""
    from lycoris import LycorisNetwork, create_lycoris

    before = _weights(twins.twin)
    LycorisNetwork.LORA_PREFIX = "lycoris" if names == "SimpleTuner" else "lora_unet"
    network = create_lycoris(
        twins.twin, 1.0, **{"linear_dim": 4, "linear_alpha": 2.0, "conv_dim": 4, "conv_alpha": 2.0, **settings}
    )
    network.apply_to()
    randomized(network.named_parameters())
    if names == "OneTrainer":
        dotted = {name.replace(".", "_"): name for name, _ in twins.twin.named_modules()}
        tensors = {
            f"unet.{dotted[key.split('.')[0].removeprefix('lora_unet_')]}.{key.split('.', 1)[1]}": tensor.contiguous()
            for key, tensor in network.state_dict().items()
        }
        save_file(tensors, folder / "subject.safetensors")
    else:
        network.save_weights(folder / "subject.safetensors", torch.float32, {})
    kind = torch.float32 if settings["algo"] in ("diag-oft", "boft") else torch.float64  # these take an inverse
    network.to(kind)
    twins.twin.to(kind)
    modules = dict(twins.twin.named_modules())
    names = [name for name in before if name.endswith(".weight")]
    found = {name: _acts_as(modules[name.removesuffix(".weight")], before[name], kind) for name in names}
    return {name: after - before[name] for name, after in found.items() if (after - before[name]).norm() > 1e-5}


def _acts_as(module: nn.Module, weight: Tensor, kind: torch.dtype) -> Tensor:
    """The weight that a linear layer or a convolution works with when it is called, from its answers to unit inputs.

    (What lycoris-lora 4.1.3 *merges* of a LoHa or LoKr has alpha / rank twice, unlike what it trains.)
    """
    unit = torch.eye(weight[0].numel(), dtype=kind).reshape(-1, *weight.shape[1:])
    with torch.no_grad():
        if weight.ndim == 2:
            return (module(unit) - module(torch.zeros_like(unit))).double().T
        (kernel, _), start = module.kernel_size, module.stride[0] - module.padding[0]  # of what output (1, 1) sees
        picture = torch.zeros(*unit.shape[:2], start + kernel, start + kernel, dtype=kind)
        picture[:, :, start:, start:] = unit
        seen = module(picture) - module(torch.zeros_like(picture))
    return seen[:, :, 1, 1].double().T.reshape(weight.shape)


def strip_header(path: Path) -> None:
    """As older releases of diffusers wrote it, without a word on alpha."""
    save_file(load_file(path), path)


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
