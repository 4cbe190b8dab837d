"""Text-encoder halves that libraries write: on a clip they are what the library makes, or the stock loader."""

from __future__ import annotations

from typing import Any

import libraries
import pytest
import torch
from safetensors.torch import load_file
from test_library_files import folder, off
from torch import Tensor, nn

__all__ = ["folder"]  # a fixture
LAYERS = ["q_proj", "v_proj", "out_proj", "fc1", "fc2"]


def encoders(clip) -> dict[str, nn.Module]:
    """transformers' twins of the miniature's two text encoders, by the host's name."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    state, found = clip.cond_stage_model.state_dict(), {}
    for name, kind in (("clip_l", CLIPTextModel), ("clip_g", CLIPTextModelWithProjection)):
        start = f"{name}.transformer.text_model."
        wide, width = state[f"{start}encoder.layers.0.mlp.fc1.weight"].shape
        count = sum(key.startswith(start) and key.endswith("fc1.weight") for key in state)
        torch.manual_seed(len(found))
        found[name] = kind(
            CLIPTextConfig(
                vocab_size=122,
                hidden_size=width,
                intermediate_size=wide,
                num_hidden_layers=count,
                num_attention_heads=2,
                projection_dim=width,
            )
        )
    return found


def placed(deltas: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """Differences of a twin's weights by the host's names."""
    return {f"{name}.transformer.text_model.{key.removeprefix('text_model.')}": delta for key, delta in deltas.items()}


def on_clip(pack, clip) -> dict[str, Tensor]:
    """Weight of the clip -> what the pack puts on it of the file, in float64."""
    source = pack.nodes.bridge.lora.loras.load("one/subject.safetensors", 1.0)
    return patched(clip, pack.nodes.bridge.apply.with_text_encoder(clip, source, 1.0))


def patched(bare, clip) -> dict[str, Tensor]:
    import comfy.lora

    state, found = bare.cond_stage_model.state_dict(), {}
    for key, patches in clip.patcher.patches.items():
        before = state[key].double()
        found[key] = comfy.lora.calculate_weight(patches, before.clone(), key, torch.float64) - before
    return found


def test_diffusers_halves_count_as_trained(pack, folder, miniature):
    """Both, with alphas in the header; the first without `text_model` in its names, as transformers has it now."""
    from diffusers.loaders import StableDiffusionXLLoraLoaderMixin
    from peft import get_peft_model, get_peft_model_state_dict

    wanted: dict[str, Tensor] = {}
    given: dict[str, Any] = {}
    for (name, encoder), part, alpha in zip(
        encoders(miniature.clip).items(), ("text_encoder", "text_encoder_2"), (2, 8), strict=True
    ):
        before = libraries._weights(encoder)
        model = get_peft_model(encoder, libraries.peft_config(r=4, lora_alpha=alpha, target_modules=LAYERS))
        libraries.randomized((n, p) for n, p in model.named_parameters() if "lora_" in n)
        layers = get_peft_model_state_dict(model).items()
        given[f"{part}_lora_layers"] = {key.removeprefix("base_model.model."): t.clone() for key, t in layers}
        given[f"{part}_lora_adapter_metadata"] = model.peft_config["default"].to_dict()
        wanted |= placed(libraries._merged(model, before), name)
    StableDiffusionXLLoraLoaderMixin.save_lora_weights(folder, **given)
    (folder / "pytorch_lora_weights.safetensors").rename(folder / "subject.safetensors")
    assert len(wanted) == 6 * len(LAYERS)
    assert off(on_clip(pack, miniature.clip), wanted) < 1e-6


class Named(nn.Module):
    """A text encoder as kohya's scripts see it: its layers are in `text_model`."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.text_model = getattr(encoder, "text_model", encoder)


@pytest.mark.parametrize("algo", ["locon", "loha", "lokr", "full"])
def test_kohyas_halves_are_the_stock_loaders(pack, folder, miniature, algo):
    import comfy.sd
    from lycoris import LycorisNetwork, create_lycoris
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    for number, encoder in enumerate(encoders(miniature.clip).values(), 1):
        LycorisNetwork.LORA_PREFIX = f"lora_te{number}"
        network = create_lycoris(Named(encoder), 1.0, linear_dim=4, linear_alpha=2.0, algo=algo)
        network.apply_to()
        libraries.randomized(network.named_parameters(), seed=number)
        tensors |= {key: tensor.contiguous() for key, tensor in network.state_dict().items()}
    save_file(tensors, folder / "subject.safetensors")
    clip = miniature.clip
    stock = comfy.sd.load_lora_for_models(None, clip, load_file(folder / "subject.safetensors"), 0, 1.0)[1]
    wanted = patched(clip, stock)
    assert sum(key.endswith("weight") for key in wanted) >= 6 * 4
    assert off(on_clip(pack, clip), wanted) < 1e-6


def test_pefts_names_count_too(pack, folder, miniature):
    """`save_pretrained` of a text encoder beside the U-Net, as trainers put both into one file."""
    from peft import get_peft_model, get_peft_model_state_dict
    from safetensors.torch import save_file

    encoder = encoders(miniature.clip)["clip_g"]
    before = libraries._weights(encoder)
    model = get_peft_model(encoder, libraries.peft_config(r=4, lora_alpha=4, target_modules=LAYERS))
    libraries.randomized((n, p) for n, p in model.named_parameters() if "lora_" in n)
    layers = {f"text_encoder_2.{key}": t.clone() for key, t in get_peft_model_state_dict(model).items()}
    save_file(layers, folder / "subject.safetensors")
    wanted = placed(libraries._merged(model, before), "clip_g")
    assert all(".base_model.model." in key for key in layers)
    assert off(on_clip(pack, miniature.clip), wanted) < 1e-6


def test_what_a_clip_has_not_is_told(pack, miniature, caplog):
    layers = {f"text_encoder.no_such.layer.lora_{ab}.weight": torch.ones(2, 2) for ab in "AB"}
    source = pack.nodes.bridge.lora.loras.LoRASource("mine", layers, 1.0)
    pack.nodes.bridge.apply.with_text_encoder(miniature.clip, source, 1.0)
    assert "1 text-encoder layers of 'mine' are not in this clip" in caplog.text
