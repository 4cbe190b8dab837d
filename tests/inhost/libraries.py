"""LoRA files as libraries write them, each with what the library itself then makes of the weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tiny
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]


@dataclass(frozen=True)
class Twins:
    """A model of the host's and its twin of diffusers', with the same weights.

    targets: the twin's weights -> the host's, or (its weight, (axis, start, length), what turns rows).
    part: what diffusers' pipelines call such a model.
    """

    patcher: Any
    twin: nn.Module
    targets: dict[str, str | tuple]
    part: str
    saver: Callable[..., None]

    def placed(self, deltas: dict[str, Tensor]) -> dict[str, Tensor]:
        """Differences of the twin's weights as the host's weights have them: by key, in float64."""
        state, found = self.patcher.model.state_dict(), {}
        for name, delta in deltas.items():
            target = self.targets[name]
            key, place, turned = (target, None, None) if isinstance(target, str) else (*target, None)[:3]
            whole = found.setdefault(key, torch.zeros(state[key].shape, dtype=torch.float64))
            (whole if place is None else whole.narrow(*place)).copy_(delta if turned is None else turned(delta))
        return found


def twins_of(patcher, twin: nn.Module, targets: dict[str, str | tuple], part: str, saver: Callable[..., None]) -> Twins:
    """Gives the twin's random weights to the host's model, so that what a table maps wrong would show."""
    state = patcher.model.state_dict()
    own = twin.state_dict()
    found = {name: target for name, target in targets.items() if name in own and own[name].ndim > 1}
    with torch.inference_mode():
        for name, target in found.items():
            key, place, turned = (target, None, None) if isinstance(target, str) else (*target, None)[:3]
            part_of = state[key] if place is None else state[key].narrow(*place)
            assert part_of.shape == own[name].shape, (name, key)
            part_of.copy_(own[name] if turned is None else turned(own[name]))
    return Twins(patcher, twin, found, part, saver)


def sdxl() -> Twins:
    import comfy.utils
    from diffusers import UNet2DConditionModel
    from diffusers.loaders import StableDiffusionXLLoraLoaderMixin

    torch.manual_seed(1)
    twin = UNet2DConditionModel(
        block_out_channels=(32, 64, 64),
        layers_per_block=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=1,
        attention_head_dim=(2, 4, 4),
        cross_attention_dim=96,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    )
    patcher = tiny.tiny_patcher()
    table = comfy.utils.unet_to_diffusers(patcher.model.model_config.unet_config)
    targets: dict[str, str | tuple] = {name: f"diffusion_model.{target}" for name, target in table.items()}
    return twins_of(patcher, twin, targets, "unet", StableDiffusionXLLoraLoaderMixin.save_lora_weights)


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
    """lycoris-lora's own network on the twin, in kohya's names, SimpleTuner's, or OneTrainer's of diffusers' modules."""
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
    network.restore()
    network.double()
    twins.twin.double()
    network.merge_to(1.0)
    after = _weights(twins.twin)
    return {n: after[n] - before[n] for n in before if not torch.equal(after[n], before[n])}


def strip_header(path: Path) -> None:
    """As older releases of diffusers wrote it, without a word on alpha."""
    save_file(load_file(path), path)


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
