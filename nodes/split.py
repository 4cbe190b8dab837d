"""SplitConcept: from pictures of a concept to two words for its parts."""

from __future__ import annotations

from typing import Any

from comfy_api.v0_0_2 import io

from ..ziplora_core.checks import lines
from ..ziplora_core.split import Settings
from . import inputs
from .bridge.disk import provenance
from .bridge.training import split
from .bridge.training.split import DRAWN, Task
from .schema import Schema
from .sockets import LossMapSocket


class SplitConcept(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> Schema:
        return Schema(
            node_id="SplitConcept",
            display_name="Split Concept",
            category="ZipLoRA/train",
            search_aliases=["inspiration tree", "concept decomposition", "two embeddings"],
            description="Learns two new words from pictures of one concept, which together say it and apart each a "
            "part of it (Inspiration Tree, one split). Several seeds are tried, and the best is written as two "
            "embeddings.",
            is_output_node=True,
            is_input_list=True,
            inputs=[
                io.Model.Input("model", tooltip="The base model. LoRAs may be on it already."),
                io.Clip.Input("clip", tooltip="The base model's text encoder, by which the words are read."),
                io.Vae.Input("vae", tooltip="The base model's VAE."),
                io.Image.Input(
                    "images", tooltip="Pictures of the concept, one or more, of any sizes: a batch, or a list."
                ),
                io.String.Input(
                    "prompt",
                    multiline=True,
                    default=inputs.PROMPTS,
                    tooltip="Captions, with the word where both new words are to stand, side by side; each line is "
                    "used with each picture.",
                ),
                io.String.Input(
                    "word", default=Task.word, tooltip="What stands for both words in these prompts, and only there."
                ),
                io.String.Input(
                    "initial_word",
                    default=Task.initial,
                    tooltip="A common word that both start from, or two, one for each: 'cat sculpture'.",
                ),
                inputs.whole(Settings, "seeds", "How many seeds are tried, the paper's 4."),
                inputs.whole(Settings, "steps", "Updates for each seed, the paper's 200."),
                inputs.fraction(Settings, "learning_rate", 1e-4, "Adam's rate, the paper's 0.001."),
                inputs.whole(
                    Settings, "batch_size", "Pictures per step. More is steadier, slower, and takes more memory."
                ),
                inputs.resolution(Task.resolution),
                inputs.seed("The first seed; the others are the numbers after it."),
                io.String.Input(
                    "filename_prefix",
                    default=Task.prefix,
                    tooltip="Name of the files in models/embeddings, which are numbered; _left and _right are added.",
                ),
                inputs.sample_every(),
                io.ClipVision.Input(
                    "clip_vision",
                    optional=True,
                    tooltip="A CLIP vision model, from Load CLIP Vision: the seed is chosen whose words each draw "
                    "alike pictures, unlike the other's. Not connected: by the loss, which says less.",
                ),
                io.Int.Input(
                    "drawn_count",
                    default=Task.drawn,
                    **inputs.span(DRAWN),
                    optional=True,
                    tooltip="How many pictures each word draws, of every seed that is scored; the authors draw 40.",
                ),
            ],
            hidden=[io.Hidden.prompt],
            outputs=[
                io.String.Output(display_name="left", tooltip="One word, as prompts name it."),
                io.String.Output(display_name="right", tooltip="The other word, as prompts name it."),
                io.Image.Output(
                    display_name="left_pictures",
                    tooltip="What the left word draws alone. Split Concept can split them once more.",
                ),
                io.Image.Output(display_name="right_pictures", tooltip="What the right word draws alone."),
                LossMapSocket.Output(
                    display_name="loss_map", tooltip="The loss of each step of the chosen seed, for Plot Loss Graph."
                ),
                io.String.Output(
                    display_name="report", tooltip="Each seed's scores, which was chosen, and the memory."
                ),
            ],
        )

    @classmethod
    def execute(cls, images, **lists) -> io.NodeOutput:
        given = inputs.of_lists(lists, "prompt")
        linked = ("model", "clip", "vae", *(["clip_vision"] if "clip_vision" in given else []))
        inputs.connected(**{name: given[name] for name in linked})
        task = read_task(images, **given)
        task.metadata = provenance.workflow(cls.hidden)
        done = split.split_concept(given["model"], given["clip"], given["vae"], task)
        return io.NodeOutput(*done.embeddings, *done.images, done.loss_map, done.report)


def read_task(
    images: Any,
    prompt: str,
    word: str,
    initial_word: str,
    seeds: int,
    steps: int,
    learning_rate: float,
    batch_size: int,
    resolution: int,
    seed: int,
    filename_prefix: str,
    sample_every: int = inputs.SAMPLE_EVERY,
    clip_vision: Any = None,
    drawn_count: int = Task.drawn,
    **_: Any,
) -> Task:
    """Raises ValueError for a value that the API let through."""
    settings = Settings(steps=steps, learning_rate=learning_rate, batch_size=batch_size, seed=seed, seeds=seeds)
    return Task(
        images,
        lines(prompt),
        settings,
        word.strip(),
        initial_word,
        filename_prefix,
        resolution,
        drawn_count,
        clip_vision,
        sample_every,
    )
