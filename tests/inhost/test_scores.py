"""Scores against transformers' own encoders with the same weights, and the blind sheet."""

from __future__ import annotations

import json

import pytest
import torch

CLIP = {
    "attention_dropout": 0.0,
    "hidden_act": "quick_gelu",
    "hidden_size": 32,
    "image_size": 28,
    "intermediate_size": 64,
    "layer_norm_eps": 1e-05,
    "model_type": "clip_vision_model",
    "num_attention_heads": 2,
    "num_channels": 3,
    "num_hidden_layers": 3,
    "patch_size": 14,
    "projection_dim": 24,
}
DINO = {
    "model_type": "dinov2",
    "hidden_size": 32,
    "num_attention_heads": 2,
    "num_hidden_layers": 3,
    "layer_norm_eps": 1e-06,
    "use_swiglu_ffn": False,
    "image_size": 518,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
}


def encoder(tmp_path, config):
    """The host's own encoder with random weights, as its loader makes one."""
    from comfy.clip_vision import ClipVisionModel

    path = tmp_path / f"{config['model_type']}.json"
    path.write_text(json.dumps(config), encoding="utf-8")
    made = ClipVisionModel(str(path))
    g = torch.Generator().manual_seed(len(config))
    with torch.no_grad():
        for name, parameter in made.model.named_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=g) * 0.2 + ("norm" in name and "weight" in name))
    return made


def state(made):
    return {k: v.clone().float() for k, v in made.model.state_dict().items()}


def theirs_clip(made, pixels):
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    model = CLIPVisionModelWithProjection(CLIPVisionConfig(**CLIP)).eval()
    missing, _ = model.load_state_dict(state(made), strict=False)
    assert not [name for name in missing if "position_ids" not in name]
    mean, std = ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711])
    return model(pixel_values=normal(pixels, mean, std)).image_embeds


def theirs_dino(made, pixels):
    from transformers import Dinov2Config, Dinov2Model

    config = Dinov2Config(**{**DINO, "patch_size": 14, "mlp_ratio": 4})
    model = Dinov2Model(config).eval()
    ours, theirs = state(made), {}
    for name, tensor in ours.items():  # transformers' newer names of the same
        for old, new in (("attention.query", "q_proj"), ("attention.key", "k_proj"), ("attention.value", "v_proj")):
            name = name.replace(f"attention.{old}.", f"attention.{new}.")
        theirs[name.replace("attention.output.dense.", "attention.o_proj.")] = tensor
    assert not model.load_state_dict(
        theirs if "encoder.layer.0.attention.q_proj.weight" in dict(model.named_parameters()) else ours, strict=False
    ).missing_keys
    return model(pixel_values=normal(pixels, DINO["image_mean"], DINO["image_std"])).pooler_output


def normal(pixels, mean, std):
    rounded = (255 * pixels.movedim(-1, 1)).round() / 255
    return (rounded - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


def pictures(count, side, seed):
    return torch.rand(count, side, side, 3, generator=torch.Generator().manual_seed(seed))


def cosines(a, b):
    return torch.stack([torch.stack([torch.cosine_similarity(x, y, dim=0) for y in b]).mean() for x in a])


@pytest.fixture
def encoders(tmp_path):
    return encoder(tmp_path, CLIP), encoder(tmp_path, DINO)


@pytest.mark.parametrize("side", [28, 518])
def test_alignments_are_mean_cosines_of_the_encoders_features(pack, encoders, side):
    clip, dino = encoders
    made, theirs = (clip, theirs_clip) if side == 28 else (dino, theirs_dino)
    with torch.inference_mode():
        images, subject, style = (pictures(n, side, seed) for seed, n in enumerate((3, 2, 1)))
        found = pack.nodes.bridge.scores.score(images, subject, style, made, made, None, "")
        assert set(found) == {"style", "subject"}
        features = [theirs(made, x) for x in (images, subject, style)]
    torch.testing.assert_close(found["subject"], cosines(features[0], features[1]), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found["style"], cosines(features[0], features[2]), rtol=1e-3, atol=1e-3)


def test_an_empty_prompt_is_compared_with_no_picture(pack, miniature, encoders):
    with pytest.raises(ValueError, match="^prompt is empty"):
        pack.nodes.bridge.scores.score(*[pictures(1, 40, 0)] * 3, *encoders, miniature.clip, " ")


def test_a_picture_is_like_itself_and_json_holds_each(pack, encoders):
    execute = next(node for node in pack.nodes.NODES if node.__name__ == "ZipLoRAScores").execute
    images = pictures(2, 40, 0)
    with torch.inference_mode():
        report, text = execute(images, images[:1], images[1:], *encoders, prompt="").args
    found = json.loads(text)
    assert found["subject"]["pictures"][0] == pytest.approx(1, abs=1e-3) == found["style"]["pictures"][1]
    assert found["subject"]["mean"] == pytest.approx(sum(found["subject"]["pictures"]) / 2, abs=1e-3)
    assert "2 pictures" in report and "style alignment" in report and "text" not in found


@pytest.mark.parametrize("spoil", ["width", "projection"])
def test_text_of_another_clip_is_refused(pack, miniature, encoders, spoil):
    """The miniature's own text encoder, with and without a projection of its own."""
    model = miniature.clip.cond_stage_model
    projection = next(m for name, m in model.named_modules() if name.endswith("clip_g.transformer.text_projection"))
    before = projection.weight.data.clone()
    images = pictures(1, 28, 0)
    try:
        if spoil == "projection":
            projection.weight.data.copy_(torch.eye(len(before)))
        else:
            projection.weight.data.copy_(torch.randn(before.shape))
        says = "has no projection" if spoil == "projection" else "not of the same CLIP"
        with torch.inference_mode(), pytest.raises(ValueError, match=says):
            pack.nodes.bridge.scores.score(images, images, images, *encoders, miniature.clip, "a star")
    finally:
        projection.weight.data.copy_(before)


def test_text_is_compared_with_the_prompts_features(pack, miniature, tmp_path):
    model = miniature.clip.cond_stage_model
    projection = next(m for name, m in model.named_modules() if name.endswith("clip_g.transformer.text_projection"))
    before, width = projection.weight.data.clone(), projection.weight.shape[0]
    clip, dino = encoder(tmp_path, {**CLIP, "projection_dim": width}), encoder(tmp_path, DINO)
    images = pictures(2, 28, 0)
    try:
        projection.weight.data.copy_(torch.randn(before.shape, generator=torch.Generator().manual_seed(0)))
        with torch.inference_mode():
            found = pack.nodes.bridge.scores.score(images, images, images, clip, dino, miniature.clip, "a red star")
            prompt = miniature.clip.encode_from_tokens(miniature.clip.tokenize("a red star"), return_pooled=True)[1]
            expected = torch.cosine_similarity(theirs_clip_of(clip, width, images), prompt.float())
    finally:
        projection.weight.data.copy_(before)
    torch.testing.assert_close(found["text"], expected, rtol=1e-3, atol=1e-3)


def theirs_clip_of(made, width, pixels):
    return made.encode_image(pixels)["image_embeds"].float()


def test_blind_sheet_and_its_key(pack, tmp_path, monkeypatch):
    import folder_paths

    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path))
    node = next(node for node in pack.nodes.NODES if node.__name__ == "BlindABSheet")
    a, b = torch.zeros(12, 64, 32, 3), torch.ones(12, 64, 32, 3)
    monkeypatch.setattr(node.execute.__func__.__globals__["ui"], "PreviewImage", lambda *_, **__: None)
    reference = torch.full((1, 32, 32, 3), 0.5)
    image, name = node.execute(a, b, reference, reference, "dark", "light", 5, "study/key").args
    key = json.loads((tmp_path / name).read_text(encoding="utf-8"))
    assert name.replace("\\", "/") == "study/key_00001_.json" and key["seed"] == 5
    assert {row["left"] for row in key["rows"]} == {"dark", "light"}, "an order of one side only is no blind test"
    cell, gap, head, number = (
        node.execute.__func__.__globals__["sheet"].__dict__[n] for n in ("_CELL", "_GAP", "_HEAD", "_NUMBER")
    )
    for at, row in enumerate(key["rows"]):
        for column, side in ((2, "left"), (3, "right")):
            pixel = image[0, head + at * (cell + gap) + 20, number + column * (cell + gap) + 20]
            assert pixel.mean().item() == pytest.approx(0.0 if row[side] == "dark" else 1.0, abs=0.01)
    with pytest.raises(ValueError, match="holds 12 pictures, images_b 3"):
        node.execute(a, b[:3], reference, reference, "dark", "light", 5, "study/key")


@pytest.mark.parametrize("name", ["images", "subject_references", "style_references"])
@pytest.mark.parametrize(
    ("spoilt", "says"),
    [
        (torch.zeros(0, 28, 28, 3), "holds no picture"),
        (torch.full((1, 28, 28, 3), float("nan")), "holds NaN"),
        (torch.zeros(1, 28, 28, 1), r"has shape \(1, 28, 28, 1\); expected pictures .* red, green and blue"),
        (torch.zeros(28, 28, 3), r"has shape \(28, 28, 3\)"),
        (torch.zeros(1, 0, 28, 3), r"has shape \(1, 0, 28, 3\)"),
        ({"samples": torch.zeros(1, 4, 8, 8)}, "is no picture"),
    ],
    ids=["none", "nan", "grey", "frame", "flat", "latents"],
)
def test_what_is_no_picture_is_refused_in_a_sentence(pack, encoders, name, spoilt, says):
    execute = next(node for node in pack.nodes.NODES if node.__name__ == "ZipLoRAScores").execute
    given = {n: pictures(1, 28, 0) for n in ("images", "subject_references", "style_references")} | {name: spoilt}
    with torch.inference_mode(), pytest.raises(ValueError, match=f"^{name} {says}"):
        execute(**given, clip_vision=encoders[0], dino=encoders[1], prompt="")
