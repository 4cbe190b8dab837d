"""TrainEDLoRA: from pictures to a LoRA and the word that goes with it."""

from __future__ import annotations

from typing import Any

from comfy_api.v0_0_2 import io

from ..ziplora_core.checks import lines
from ..ziplora_core.trained_ed_lora import Settings
from . import inputs
from .bridge.disk import provenance
from .bridge.training import ed_lora
from .bridge.training.ed_lora import Task
from .schema import Schema
from .sockets import LoRAModelSocket, LossMapSocket


class TrainEDLoRA(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> Schema:
        return Schema(
            node_id="TrainEDLoRA",
            display_name="Train ED-LoRA",
            category="ZipLoRA/train",
            search_aliases=["mix of show", "ed-lora", "text encoder lora", "pivotal tuning"],
            description="Trains a LoRA of the model and of its text encoders together with a new word of two vectors, "
            "as Mix-of-Show does (ED-LoRA). Writes a LoRA file and an embedding.",
            is_output_node=True,
            is_input_list=True,
            inputs=[
                io.Model.Input("model", tooltip="The base model. LoRAs may be on it already."),
                io.Clip.Input("clip", tooltip="The base model's text encoder, of SD 1.5, SDXL or alike."),
                io.Vae.Input("vae", tooltip="The base model's VAE."),
                *inputs.concept(Task.word),
                io.String.Input(
                    "class_word",
                    default=Task.class_word,
                    tooltip="A common word for what it is: 'dog', 'painting'. The second vector starts there.",
                ),
                io.String.Input(
                    "rare_word",
                    default=Task.rare_word,
                    tooltip="A rare word, from which the first vector starts. Empty: random numbers, as in the paper.",
                ),
                inputs.whole(Settings, "steps", "Updates, 1000 in the authors' example."),
                inputs.fraction(Settings, "learning_rate", 1e-5, "Adam's rate for the model's LoRA, the paper's 1e-4."),
                inputs.fraction(
                    Settings, "text_encoder_rate", 1e-6, "Adam's rate for the text encoders' LoRA, the paper's 1e-5."
                ),
                inputs.fraction(Settings, "word_rate", 1e-4, "Adam's rate for the word's vectors, the paper's 1e-3."),
                inputs.whole(Settings, "rank", "Of the LoRA, the paper's 4; alpha is the rank."),
                inputs.whole(
                    Settings, "batch_size", "Pictures per step. More is steadier, slower, and takes more memory."
                ),
                inputs.resolution(Task.resolution),
                inputs.seed(
                    "Seed of the first factors, the noise and the timesteps. Give LoRAs that are to be merged "
                    "different seeds."
                ),
                io.String.Input(
                    "filename_prefix",
                    default=Task.prefix,
                    tooltip="Name of the LoRA file in the output folder, numbered; the embedding, in "
                    "models/embeddings, has the last part of it.",
                ),
                inputs.sample_every(),
                inputs.save_every(
                    "Write the files every so many steps too; 0 for only at the end. An interrupt writes them as well."
                ),
            ],
            hidden=[io.Hidden.prompt],
            outputs=[
                LoRAModelSocket.Output(
                    display_name="lora",
                    tooltip="The LoRA, for Pair LoRAs or Save LoRA Weights. To draw, load the file with Load LoRA: "
                    "Load LoRA Model leaves out the text encoders.",
                ),
                io.String.Output(display_name="embedding", tooltip="As prompts name it: embedding:ed_00001_."),
                LossMapSocket.Output(display_name="loss_map", tooltip="The loss of each step, for Plot Loss Graph."),
                io.String.Output(
                    display_name="report", tooltip="What was trained on what, for how long, and the memory."
                ),
                io.String.Output(display_name="file", tooltip="The file's name below the output folder."),
            ],
        )

    @classmethod
    def execute(cls, images, **lists) -> io.NodeOutput:
        given = inputs.of_lists(lists, "prompt")
        inputs.connected(**{name: given[name] for name in ("model", "clip", "vae")})
        task = read_task(images, **given)
        task.metadata = provenance.workflow(cls.hidden)
        done = ed_lora.train(given["model"], given["clip"], given["vae"], task)
        files = (provenance.written(done.file),) if done.file else ()
        return io.NodeOutput(
            done.lora_model, done.embedding, done.loss_map, done.report, done.file, ui={"files": files}
        )


def read_task(
    images: Any,
    prompt: str,
    word: str,
    class_word: str,
    rare_word: str,
    steps: int,
    learning_rate: float,
    text_encoder_rate: float,
    word_rate: float,
    rank: int,
    batch_size: int,
    resolution: int,
    seed: int,
    filename_prefix: str,
    sample_every: int = inputs.SAMPLE_EVERY,
    save_every: int = inputs.SAVE_EVERY,
    **_: Any,
) -> Task:
    """Raises ValueError for a value that the API let through."""
    settings = Settings(
        steps=steps,
        learning_rate=learning_rate,
        rank=rank,
        batch_size=batch_size,
        seed=seed,
        text_encoder_rate=text_encoder_rate,
        word_rate=word_rate,
    )
    return Task(
        images,
        lines(prompt),
        settings,
        word.strip(),
        class_word,
        rare_word,
        filename_prefix,
        resolution,
        sample_every,
        save_every,
    )
