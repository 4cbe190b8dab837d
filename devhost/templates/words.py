"""What stands in the shipped graphs for what a user puts there: file names, prompts, sizes."""

from __future__ import annotations

MODEL = "sd_xl_base_1.0.safetensors"
SUBJECTS = {"my_subject.safetensors": "a sks dog", "my_other_subject.safetensors": "a ohwx teapot"}
STYLES = {"my_style.safetensors": "a house in szn style", "my_other_style.safetensors": "a house in qrk style"}
CLIP, DINO = "clip-vit-large-patch14.safetensors", "dinov2_large.safetensors"
PICTURES = {"subject.png": "my_subject.safetensors", "style.png": "my_style.safetensors"}  # and the LoRA of each
WHOLE = "subject_in_style.png"  # one picture of both
NEW_STYLE, NEW_SUBJECT = "watercolor", "a teapot"
SIDE = 1024
CONTEXTS = (", riding a bicycle", ", in a boat", ", wearing a crown")
V = "a sks"  # B-LoRA's "A [v]"

SUBJECT, STYLE = next(iter(SUBJECTS)), next(iter(STYLES))  # the pair of graphs that zip one


def drawn(subject: str, style: str, where: str = "") -> str:
    """The prompt for a subject in a style: "a sks dog in szn style"."""
    return f"{SUBJECTS[subject]} in {STYLES[style].split(' in ')[1]}{where}"
