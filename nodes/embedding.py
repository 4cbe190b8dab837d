"""TrainEmbedding: from pictures to a word of one's own."""

from __future__ import annotations

from typing import Any

from comfy_api.v0_0_2 import io

from ..ziplora_core.checks import lines
from ..ziplora_core.trained_embedding import Settings
from . import inputs
from .bridge.disk import provenance
from .bridge.training import embedding
from .bridge.training.embedding import Task
from .schema import Schema
from .sockets import LossMapSocket


class TrainEmbedding(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> Schema:
        return Schema(
            node_id="TrainEmbedding",
            display_name="Train Embedding",
            category="ZipLoRA/train",
            search_aliases=["textual inversion", "embedding from pictures", "train word"],
            description="Learns a new word from one to five pictures (Textual Inversion): its vectors alone are "
            "trained, the model and the text encoders stay as they are. Writes an embedding.",
            is_output_node=True,
            is_input_list=True,
            inputs=[
                io.Model.Input("model", tooltip="The base model. LoRAs may be on it already."),
                io.Clip.Input("clip", tooltip="The base model's text encoder, by which the word is read."),
                io.Vae.Input("vae", tooltip="The base model's VAE."),
                *inputs.concept(Task.word),
                io.String.Input(
                    "initial_word",
                    default=Task.initial,
                    tooltip="A common word that is like the concept: 'dog', 'painting'; its vectors are the start. "
                    "Or embedding:name, to go on from a file.",
                ),
                inputs.whole(
                    Settings, "vectors", "How many vectors the word has, the paper's 1. More hold more, and obey less."
                ),
                inputs.whole(Settings, "steps", "Updates, the paper's 5000."),
                inputs.fraction(Settings, "learning_rate", 1e-4, "Adam's rate, the paper's 0.005."),
                inputs.whole(
                    Settings, "batch_size", "Pictures per step. More is steadier, slower, and takes more memory."
                ),
                inputs.resolution(Task.resolution),
                inputs.seed("Seed of the noise, the timesteps and the order of pictures and prompts."),
                io.String.Input(
                    "filename_prefix",
                    default=Task.prefix,
                    tooltip="Name of the file in models/embeddings, which is numbered; prompts call it by that name.",
                ),
                inputs.sample_every(),
                inputs.save_every(),
            ],
            hidden=[io.Hidden.prompt],
            outputs=[
                io.String.Output(display_name="embedding", tooltip="As prompts name it: embedding:concept_00001_."),
                LossMapSocket.Output(display_name="loss_map", tooltip="The loss of each step, for Plot Loss Graph."),
                io.String.Output(
                    display_name="report", tooltip="What was trained on what, for how long, and the memory."
                ),
            ],
        )

    @classmethod
    def execute(cls, images, **lists) -> io.NodeOutput:
        given = inputs.of_lists(lists, "prompt")
        inputs.connected(**{name: given[name] for name in ("model", "clip", "vae")})
        task = read_task(images, **given)
        task.metadata = provenance.workflow(cls.hidden)
        done = embedding.train_embedding(given["model"], given["clip"], given["vae"], task)
        return io.NodeOutput(done.embedding, done.loss_map, done.report)


def read_task(
    images: Any,
    prompt: str,
    word: str,
    initial_word: str,
    vectors: int,
    steps: int,
    learning_rate: float,
    batch_size: int,
    resolution: int,
    seed: int,
    filename_prefix: str,
    sample_every: int = inputs.SAMPLE_EVERY,
    save_every: int = inputs.SAVE_EVERY,
    **_: Any,
) -> Task:
    """Raises ValueError for a value that the API let through."""
    settings = Settings(steps=steps, learning_rate=learning_rate, batch_size=batch_size, seed=seed, vectors=vectors)
    return Task(
        images,
        lines(prompt),
        settings,
        word.strip(),
        initial_word,
        filename_prefix,
        resolution,
        sample_every,
        save_every,
    )
