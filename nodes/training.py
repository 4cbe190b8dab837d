"""TrainConceptLoRA: from pictures and prompts to a LoRA."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from comfy_api.v0_0_2 import io

from ..ziplora_core.checks import lines
from ..ziplora_core.training import Settings
from . import inputs
from .bridge.disk import provenance
from .bridge.training import concept
from .bridge.training.concept import Task
from .bridge.training.layers import LAYERS
from .bridge.training.pictures import TrainingImages
from .schema import Schema
from .sockets import LoRAModelSocket, LossMapSocket


class TrainConceptLoRA(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> Schema:
        return Schema(
            node_id="TrainConceptLoRA",
            display_name="Train Concept LoRA",
            category="ZipLoRA/train",
            search_aliases=["dreambooth", "lora from pictures"],
            description="Trains a LoRA of a subject or of a style from one to five pictures and a prompt, as the "
            "ZipLoRA paper does (DreamBooth), in little memory. The model stays as it is.",
            is_output_node=True,
            is_input_list=True,
            inputs=[
                io.Model.Input("model", tooltip="The base model. Other LoRAs may be on it already."),
                io.Clip.Input("clip", tooltip="The base model's text encoder. It is not trained."),
                io.Vae.Input("vae", tooltip="The base model's VAE."),
                io.Image.Input(
                    "images",
                    tooltip="One to five pictures of the subject or in the style, of any sizes: a batch, or a list. "
                    "Each is scaled in its own shape, and cut a little.",
                ),
                io.String.Input(
                    "prompt",
                    multiline=True,
                    default="",
                    tooltip="The prompt that stands for them, with a rare word in it: 'a sks dog', 'a house in szn "
                    "style'. One line for all pictures, or a line for each.",
                ),
                inputs.whole(
                    Settings,
                    "steps",
                    "Updates, the paper's 1000. Too many, and the LoRA draws its pictures whatever it is asked.",
                ),
                inputs.fraction(Settings, "learning_rate", 1e-5, "Adam's rate, the paper's 5e-5."),
                inputs.whole(Settings, "rank", "Of the LoRA, the paper's 64; alpha is the rank."),
                inputs.whole(
                    Settings, "batch_size", "Pictures per step. More is steadier, slower, and takes more memory."
                ),
                inputs.resolution(Task.resolution),
                io.Combo.Input(
                    "layers",
                    options=list(LAYERS),
                    default=LAYERS[0],
                    tooltip="attention: queries, keys, values and outputs, as the paper. all linear: feed-forward "
                    "layers too. B-LoRA: SDXL's content block and style block alone, to be used apart.",
                ),
                inputs.seed(
                    "Seed of the first factors, the noise and the timesteps. Give LoRAs that are to be merged "
                    "different seeds."
                ),
                io.String.Input(
                    "filename_prefix",
                    default="loras/concept",
                    tooltip="Name of the file in the output folder, which is numbered; output/loras is a folder that "
                    "ComfyUI loads LoRAs from.",
                ),
                inputs.sample_every(),
                inputs.save_every(),
                inputs.continue_from(
                    "A LoRA that was trained here with the same layers and rank: goes on after its steps."
                ),
                io.String.Input(
                    "class_prompt",
                    default="",
                    optional=True,
                    tooltip="For prior preservation: the prompt without the rare word, 'a dog'. The class then stays "
                    "as it was. Empty: none.",
                ),
                io.Image.Input(
                    "class_images",
                    optional=True,
                    tooltip="Pictures of the class. Not connected: the base model draws them, once per run.",
                ),
                inputs.class_count(Task.class_count),
                inputs.prior_weight(Settings),
                io.Image.Input(
                    "second_images",
                    optional=True,
                    tooltip="Joint training, a baseline of the paper: a second concept's pictures, into the same LoRA.",
                ),
                io.String.Input(
                    "second_prompt",
                    multiline=True,
                    default="",
                    optional=True,
                    tooltip="The second concept's prompt, or a line for each picture.",
                ),
            ],
            hidden=[io.Hidden.prompt],
            outputs=[
                LoRAModelSocket.Output(
                    display_name="lora", tooltip="The LoRA, for Load LoRA Model, Pair LoRAs or Save LoRA Weights."
                ),
                LossMapSocket.Output(display_name="loss_map", tooltip="The loss of each step, for Plot Loss Graph."),
                io.String.Output(
                    display_name="report", tooltip="What was trained on what, for how long, and the memory."
                ),
                io.String.Output(display_name="file", tooltip="The file's name below the output folder."),
            ],
        )

    @classmethod
    def execute(cls, images, second_images=None, class_images=None, **lists) -> io.NodeOutput:
        given = inputs.of_lists(lists, "prompt", "second_prompt")
        inputs.connected(**{name: given[name] for name in ("model", "clip", "vae")})
        task = read_task(images, second_images, class_images, **given)
        task.metadata = provenance.workflow(cls.hidden)
        done = concept.train_concept(given["model"], given["clip"], given["vae"], task)
        files = (provenance.written(done.file),) if done.file else ()
        return io.NodeOutput(done.lora_model, done.loss_map, done.report, done.file, ui={"files": files})


def read_task(
    images: Sequence[Any],
    second_images: Sequence[Any] | None,
    class_images: Sequence[Any] | None,
    prompt: str,
    steps: int,
    learning_rate: float,
    rank: int,
    batch_size: int,
    resolution: int,
    layers: str,
    seed: int,
    filename_prefix: str,
    sample_every: int = inputs.SAMPLE_EVERY,
    save_every: int = inputs.SAVE_EVERY,
    continue_from: str = inputs.NEW,
    class_prompt: str = "",
    class_count: int = Task.class_count,
    prior_weight: float = Settings.prior_weight,
    second_prompt: str = "",
    **_: Any,
) -> Task:
    """Raises ValueError for a value that the API let through."""
    sets = [TrainingImages(images, lines(prompt))]
    if second_images is not None:
        sets.append(TrainingImages(second_images, lines(second_prompt)))
    elif second_prompt.strip():
        raise ValueError("second_prompt has no pictures; connect second_images, or empty it")
    return Task(
        sets,
        Settings(steps, learning_rate, rank, batch_size, seed, prior_weight),
        filename_prefix,
        resolution,
        layers,
        class_prompt,
        class_images or (),
        class_count,
        sample_every,
        save_every,
        inputs.file_to_continue(continue_from),
    )
