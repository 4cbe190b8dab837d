"""CSD's published files, against a transcription of its network in plain torch and float64."""

from __future__ import annotations

import argparse
import json
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from test_scores import CLIP, DINO, encoder, normal, pictures

WIDTH, HEADS, LAYERS, HEAD = 32, 2, 24, 16  # of a small network with ViT-L's names, and of its descriptors


def published(width=WIDTH, head=HEAD, side=28, seed=0):
    """Random tensors under the published names, and of the published shapes where the sizes are."""
    g = torch.Generator().manual_seed(seed)
    shapes = {
        "class_embedding": (width,),
        "positional_embedding": ((side // 14) ** 2 + 1, width),
        "conv1.weight": (width, 3, 14, 14),
    }
    for layer in range(LAYERS):
        at = f"transformer.resblocks.{layer}."
        shapes |= {at + "attn.in_proj_weight": (3 * width, width), at + "attn.in_proj_bias": (3 * width,)}
        shapes |= {at + "attn.out_proj.weight": (width, width), at + "attn.out_proj.bias": (width,)}
        shapes |= {at + "mlp.c_fc.weight": (4 * width, width), at + "mlp.c_fc.bias": (4 * width,)}
        shapes |= {at + "mlp.c_proj.weight": (width, 4 * width), at + "mlp.c_proj.bias": (width,)}
    norms = ("ln_pre", "ln_post", *(f"transformer.resblocks.{n}.ln_{k}" for n in range(LAYERS) for k in (1, 2)))
    shapes |= {f"{norm}.{kind}": (width,) for norm in norms for kind in ("weight", "bias")}
    made = {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=g) / shape[-1] ** 0.5
        made[f"backbone.{name}"] = noise + (1 if "ln_" in name and name.endswith("weight") else 0)
    for kind in ("style", "content"):
        made[f"last_layer_{kind}"] = torch.randn(width, head, generator=g) / width**0.5
    return made


def transcribed(tensors, pixels, heads=HEADS, head="last_layer_style"):
    """Descriptors (N, head), of length 1, by the paper's network: CLIP's ViT, its class token, and a matrix."""
    w = {name.removeprefix("backbone."): tensor.double() for name, tensor in tensors.items()}
    norm = torch.nn.functional.layer_norm
    mean, std = ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711])
    x = torch.nn.functional.conv2d(normal(pixels.double(), mean, std), w["conv1.weight"], stride=14)
    x = x.flatten(2).transpose(1, 2)
    x = torch.cat([w["class_embedding"].expand(len(x), 1, -1), x], dim=1) + w["positional_embedding"]
    width = x.shape[-1:]
    x = norm(x, width, w["ln_pre.weight"], w["ln_pre.bias"])
    for layer in range(LAYERS):
        of = {name.split(f"resblocks.{layer}.")[1]: t for name, t in w.items() if f"resblocks.{layer}." in name}
        y = norm(x, width, of["ln_1.weight"], of["ln_1.bias"])
        q, k, v = (y @ of["attn.in_proj_weight"].T + of["attn.in_proj_bias"]).unflatten(-1, (3, heads, -1)).unbind(2)
        weights = torch.einsum("nihd,njhd->nhij", q, k).div(q.shape[-1] ** 0.5).softmax(-1)
        y = torch.einsum("nhij,njhd->nihd", weights, v).flatten(2)
        x = x + y @ of["attn.out_proj.weight"].T + of["attn.out_proj.bias"]
        y = norm(x, width, of["ln_2.weight"], of["ln_2.bias"]) @ of["mlp.c_fc.weight"].T + of["mlp.c_fc.bias"]
        x = x + (y * torch.sigmoid(1.702 * y)) @ of["mlp.c_proj.weight"].T + of["mlp.c_proj.bias"]
    found = norm(x[:, 0], width, w["ln_post.weight"], w["ln_post.bias"]) @ w[head]
    return found / found.norm(dim=1, keepdim=True)


def as_the_authors(path, tensors):
    """The checkpoint of the authors' training: settings, optimizers and an older numpy's number beside the tensors."""
    saved = {
        "model_state_dict": {f"module.{name}": tensor for name, tensor in tensors.items()},
        "opt_bb": {"state": {0: {"step": 1, "exp_avg": torch.ones(2)}}, "param_groups": [{"lr": np.float64(0.5)}]},
        "iter": 80000,
        "args": argparse.Namespace(arch="vit_large", lam_sup=5.0),
        "fp16_scaler": None,
    }
    now = path.with_suffix(".now")
    torch.save(saved, now)
    with zipfile.ZipFile(now) as old, zipfile.ZipFile(path, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            if name.endswith("data.pkl"):
                assert b"cnumpy._core.multiarray\n" in content
                content = content.replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")
            new.writestr(name, content)


WRITERS = {
    "csd.bin": as_the_authors,
    "csd.pth": lambda path, tensors: torch.save({"model_state_dict": tensors}, path),
    "csd.safetensors": lambda path, tensors: save_file(tensors, path),
    "half.safetensors": lambda path, tensors: save_file({k: t.half() for k, t in tensors.items()}, path),
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A clip_vision folder. The host's own configuration of ViT-L, in small, and in float32."""
    import comfy.clip_vision
    import folder_paths

    real = comfy.clip_vision.ClipVisionModel

    def small(path):
        with open(path, encoding="utf-8") as file:
            config = json.load(file)
        sizes = {"hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "num_attention_heads": HEADS}
        changed = tmp_path / "config.json"
        changed.write_text(json.dumps({**config, **sizes, "image_size": 28, "projection_dim": HEAD}), encoding="utf-8")
        return real(str(changed))

    monkeypatch.setattr(comfy.clip_vision, "ClipVisionModel", small)
    monkeypatch.setattr(comfy.model_management, "text_encoder_dtype", lambda *_: torch.float32)
    made = tmp_path / "clip_vision"
    made.mkdir()
    endings = folder_paths.folder_names_and_paths["clip_vision"][1]
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "clip_vision", ([str(made)], endings))
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    return made


@pytest.mark.parametrize("name", WRITERS)
def test_descriptors_are_the_published_networks(pack, folder, name):
    tensors, images = published(), pictures(3, 28, 1)
    WRITERS[name](folder / name, tensors)
    with torch.inference_mode():
        found = pack.nodes.bridge.csd.load(name).encode_image(images)["image_embeds"]
        expected = transcribed(tensors, images)
    assert found.shape == (3, HEAD)
    found = torch.nn.functional.normalize(found.double(), dim=1)
    close = 1e-2 if name.startswith("half") else 1e-4
    torch.testing.assert_close(found, expected, rtol=0, atol=close)
    assert (expected[0] - expected[1]).abs().max() > 10 * close, "pictures that cannot be told apart show nothing"
    content = transcribed(tensors, images, head="last_layer_content")
    assert (found - content).abs().max() > 10 * close, "the content head, not the style head"


@pytest.fixture
def encoders(tmp_path):
    return encoder(tmp_path, CLIP), encoder(tmp_path, DINO)


def test_csd_stands_beside_the_other_scores(pack, encoders, folder):
    execute = next(node for node in pack.nodes.NODES if node.__name__ == "ZipLoRAScores").execute
    tensors = published()
    WRITERS["csd.bin"](folder / "csd.bin", tensors)
    images, subject, style = (pictures(n, 28, seed) for seed, n in enumerate((3, 1, 2)))
    with torch.inference_mode():
        report, text = execute(images, subject, style, *encoders, prompt="", csd="csd.bin").args
        without = json.loads(execute(images, subject, style, *encoders, prompt="").args[1])
        expected = (transcribed(tensors, images) @ transcribed(tensors, style).T).mean(1)
    found = json.loads(text)
    assert found.pop("csd")["pictures"] == pytest.approx(expected.tolist(), abs=2e-4)
    assert found == without
    assert f"style alignment by CSD: {expected.mean():.2f}" in report


def test_another_file_under_the_same_name_is_scored_anew(pack, folder):
    node = next(node for node in pack.nodes.NODES if node.__name__ == "ZipLoRAScores")
    assert node.fingerprint_inputs(prompt="") is None
    WRITERS["csd.pth"](folder / "csd.pth", published())
    before = node.fingerprint_inputs(csd="csd.pth", prompt="")
    assert before == node.fingerprint_inputs(csd="csd.pth", prompt="")
    (folder / "csd.pth").write_bytes(b"another")
    assert before != node.fingerprint_inputs(csd="csd.pth", prompt="")


def without(tensors, part):
    return {name: tensor for name, tensor in tensors.items() if part not in name}


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (
            lambda t: {"lora_up.weight": torch.ones(1)},
            r"is no CSD file: of its 1 tensors \(lora_up.weight, …\) none is",
        ),
        (lambda t: {}, "is no CSD file: of its 0 tensors none is last_layer_style"),
        (
            lambda t: without(t, "resblocks.7.mlp"),
            r"lacks 4 of the 295 tensors .* backbone.transformer.resblocks.7.mlp",
        ),
        (lambda t: published(width=48), "has other shapes than CSD's ViT-L"),
        (lambda t: published(head=HEAD + 1), "has other shapes than CSD's ViT-L"),
    ],
    ids=["lora", "empty", "part", "width", "head"],
)
@pytest.mark.parametrize("name", ["csd.bin", "csd.safetensors"])
def test_another_file_is_refused_by_name(pack, folder, name, spoil, says):
    WRITERS["csd.pth" if name == "csd.bin" else name](folder / name, spoil(published()))
    with torch.inference_mode(), pytest.raises(ValueError, match=f"^csd: '{name}' ({says})"):
        pack.nodes.bridge.csd.load(name)


class Runs:
    """A pickle of it would run code."""

    def __reduce__(self):
        return print, ("a pickle ran code",)


@pytest.mark.parametrize("name", ["csd.bin", "csd.safetensors"])
@pytest.mark.parametrize("content", [b"", b"<html>not found</html>", "code"], ids=["empty", "page", "code"])
def test_a_file_of_no_tensors_is_refused_by_name(pack, folder, capsys, name, content):
    if content == "code":
        torch.save({"model_state_dict": published(), "args": Runs()}, folder / name)
    else:
        (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"^csd: '{name}' cannot be read as a file of tensors"):
        pack.nodes.bridge.csd.load(name)
    assert "ran code" not in capsys.readouterr().out


@pytest.mark.parametrize("name", ["gone.bin", None, 3])
def test_a_missing_file_is_named(pack, folder, name):
    with pytest.raises(ValueError, match=f"^csd: '{name}' is missing"):
        pack.nodes.bridge.csd.load(name)
