"""What stands in the shipped graphs for what a user puts there: file names, prompts, sizes."""

from __future__ import annotations

MODEL = "sd_xl_base_1.0.safetensors"
MODEL_ADDRESS = f"https://huggingface.co/stabilityai/stable-diffusion-xl-base-1.0/resolve/main/{MODEL}"
SUBJECT, STYLE = "my_subject.safetensors", "my_style.safetensors"
THIRD = "my_other_subject.safetensors"
NO_FILE = "[None]"  # among the choices of Zip LoRAs
SUBJECT_PROMPT, STYLE_PROMPT = "a sks dog", "a house in szn style"  # that each was trained with
IN_STYLE = STYLE_PROMPT.split(" in ")[1]
DRAWN = f"{SUBJECT_PROMPT} in {IN_STYLE}"  # the subject in the style
ELSEWHERE = f"{DRAWN}, riding a bicycle"
CLIP, DINO = "clip-vit-large-patch14.safetensors", "dinov2_large.safetensors"
PICTURES = {"subject.png": SUBJECT, "style.png": STYLE}  # and the LoRA of each
WHOLE = "subject_in_style.png"  # one picture of both
NEW_STYLE, NEW_SUBJECT = "watercolor", "a teapot"
SIDE = 1024
V = "a sks"  # B-LoRA's "A [v]"
PLAIN_STYLE = "melting golden style"  # in words of every day, as StyleDrop has them
ON_A_BEACH = "a photo of a * on a beach"  # * for a word that is known when it has been trained
OF_SUBJECT, OF_STYLE = "a photo of a * dog", "a house in * style"  # captions that it is trained with
FIRST, SECOND = "[1]", "[2]"  # for two such words
OF_BOTH, WORDS_OF_EACH = f"a {FIRST} dog in {SECOND} style", f"{FIRST} dog\na dog in {SECOND} style"
OF_A_WORD, OF_A_MANNER = "a photo of a *", "a house in *"  # where a word stands for the class too
CLASSES = "dog", "style"  # what the concepts are
RARE = "ktn", "pll"  # words that theirs start from
