"""Features of pictures and prompts from the host's own encoders."""

from __future__ import annotations

import torch
from torch import Tensor

from ...ziplora_core.scores import alignment
from .progress.bar import Steps

_AT_ONCE = 8  # pictures


def picture_features(encoder, pictures: Tensor, bar: Steps) -> Tensor:
    """(pictures, d): what a CLIP vision or DINOv2 model makes of an IMAGE, as its loader in the host gives it."""
    features = []
    for part in pictures.split(_AT_ONCE):
        features.append(encoder.encode_image(part)["image_embeds"].float().cpu())
        bar.advance(len(part))
    return torch.cat(features)


def prompt_features(clip, prompt: str) -> Tensor:
    """(1, d): a prompt in CLIP's space. Raises ValueError for an empty one, and for a text encoder without CLIP's
    projection into it."""
    if not prompt.strip():
        raise ValueError("prompt is empty; write what the pictures were to show, or leave clip unconnected")
    pooled = clip.encode_from_tokens(clip.tokenize(prompt), return_pooled=True)[1]
    if pooled is None or not _is_projected(clip.cond_stage_model, pooled.shape[-1]):
        raise ValueError(
            "clip has no projection into CLIP's space, so its prompts cannot be compared with pictures; connect the "
            "text encoder of the same CLIP as clip_vision (clip-vit-large-patch14 is both; SDXL's own goes with "
            "CLIP-ViT-bigG)"
        )
    return pooled.float().cpu().reshape(1, -1)


def _is_projected(text_encoder: torch.nn.Module, width: int) -> bool:
    """Whether there is a projection to this width that is not the unit matrix, which stands for none in the host."""
    for name, module in text_encoder.named_modules():
        weight = getattr(module, "weight", None)
        if name.endswith("text_projection") and weight is not None and weight.shape[0] == width:
            square = weight.shape[0] == weight.shape[1]
            return not (square and torch.equal(weight.float().cpu(), torch.eye(width)))
    return False


def score(
    images: Tensor, subject: Tensor, style: Tensor, clip_vision, dino, clip, prompt: str, csd=None
) -> dict[str, Tensor]:
    """Scores of each picture by name: style (CLIP), subject (DINO) and, where they are given, text (CLIP) and csd.

    images, subject, style: IMAGE (N, H, W, 3). csd: from `csd.load`. Raises ValueError where text and picture features
    do not match, or there is nothing to compare pictures with.
    """
    text = None if clip is None else prompt_features(clip, prompt)
    by_style = 1 if csd is None else 2  # networks
    bar = Steps(by_style * (len(images) + len(style)) + len(images) + len(subject))
    pictures = picture_features(clip_vision, images, bar)
    if text is not None and text.shape[1] != pictures.shape[1]:
        raise ValueError(
            f"clip gives {text.shape[1]} numbers for a prompt, clip_vision {pictures.shape[1]} for a picture: they are "
            "not of the same CLIP; connect the text encoder that belongs to clip_vision, or leave clip unconnected"
        )
    scores = {
        "style": alignment(pictures, picture_features(clip_vision, style, bar)),
        "subject": alignment(picture_features(dino, images, bar), picture_features(dino, subject, bar)),
    }
    if text is not None:
        scores["text"] = alignment(pictures, text)
    if csd is not None:
        scores["csd"] = alignment(picture_features(csd, images, bar), picture_features(csd, style, bar))
    return scores
