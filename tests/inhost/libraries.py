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
    dotted = {name.replace(".", "_"): name for name, _ in twins.twin.named_modules()}
    network.apply_to()
    randomized(network.named_parameters())
    if names == "OneTrainer":
        tensors = {
            f"unet.{dotted[key.split('.')[0].removeprefix('lora_unet_')]}.{key.split('.', 1)[1]}": tensor.contiguous()
            for key, tensor in network.state_dict().items()
        }
        save_file(tensors, folder / "subject.safetensors")
    else:
        network.save_weights(folder / "subject.safetensors", torch.float32, {})
    kind = torch.float32 if settings["algo"] in ("diag-oft", "boft") else torch.float64  # these take an inverse
    network.restore()
    network.to(kind)
    twins.twin.to(kind)
    if settings["algo"] in ("loha", "lokr"):  # what it trains: 4.1.3 merges alpha / rank twice
        prefix = f"{LycorisNetwork.LORA_PREFIX}_"
        with torch.no_grad():
            return {
                f"{dotted[lora.lora_name.removeprefix(prefix)]}.weight": lora.get_weight(lora.shape) * lora.scalar
                for lora in network.loras
            }
    network.merge_to(1.0)
    after = _weights(twins.twin)
    return {name: after[name] - before[name] for name in before if not torch.equal(after[name], before[name])}


def strip_header(path: Path) -> None:
    """As older releases of diffusers wrote it, without a word on alpha."""
    save_file(load_file(path), path)


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
