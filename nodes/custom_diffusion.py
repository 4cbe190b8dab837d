"""TrainCustomDiffusion, MergeCustomDiffusion: concepts as patches of cross-attention and words of their own."""

from __future__ import annotations

from typing import Any

from comfy_api.v0_0_2 import io

from ..ziplora_core.checks import lines
from ..ziplora_core.trained_weights import Settings
from . import inputs
from .bridge.custom_diffusion import merge
from .bridge.disk import provenance
from .bridge.lora.zipped import sources_of
from .bridge.training import custom_diffusion
from .bridge.training.custom_diffusion import Concept, Task
from .schema import Schema
from .sockets import LoRAModelSocket, LoRAsToZipSocket, LossMapSocket

_SECOND_INITIAL = "pll"
_ORDINARY = (
    "a photo of a person",
    "a man and a woman in the street",
    "a dog in the grass",
    "a cat on a chair",
    "a red car in front of a house",
    "a bowl of fruit on a table",
    "a landscape with mountains and a lake",
    "a city at night",
    "a pencil drawing of a tree",
    "an oil painting of a ship at sea",
)


class TrainCustomDiffusion(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> Schema:
        return Schema(
            node_id="TrainCustomDiffusion",
            display_name="Train Custom Diffusion",
            category="ZipLoRA/train",
            search_aliases=["custom diffusion", "multi concept", "train cross attention"],
            description="Trains all numbers of cross-attention's keys and values and one new word for each concept "
            "(Custom Diffusion), of one concept or two together. Writes a LoRA file and embeddings.",
            is_output_node=True,
            is_input_list=True,
            inputs=[
                io.Model.Input("model", tooltip="The base model, SD 1.5 or SDXL. LoRAs may be on it already."),
                io.Clip.Input("clip", tooltip="The base model's text encoder, by which the words are read."),
                io.Vae.Input("vae", tooltip="The base model's VAE."),
                io.Image.Input(
                    "images", tooltip="One to five pictures of the concept, of any sizes: a batch, or a list."
                ),
                io.String.Input(
                    "prompt",
                    multiline=True,
                    default="a photo of a * dog",
                    tooltip="Captions with the word before the class; each line is used with each picture.",
                ),
                io.String.Input(
                    "word", default=Concept.word, tooltip="What stands for the concept in the captions, and only there."
                ),
                io.String.Input(
                    "initial_word",
                    default=Concept.initial,
                    tooltip="A rare word, whose vector is the start, as the paper's. Or embedding:name, of a file.",
                ),
                inputs.whole(
                    Settings, "steps", "Updates, the paper's 250 for one concept; 500 for two together are usual."
                ),
                inputs.fraction(
                    Settings, "learning_rate", 1e-6, "Adam's rate for each picture of a step, the paper's 1e-5."
                ),
                inputs.whole(
                    Settings, "batch_size", "Pictures per step, the paper's 8. Fewer take less memory and more steps."
                ),
                inputs.resolution(Task.resolution),
                inputs.seed("Seed of the noise, the timesteps and the order of pictures and captions."),
                io.String.Input(
                    "filename_prefix",
                    default=Task.prefix,
                    tooltip="Name of the LoRA file in the output folder, numbered; embeddings, in models/embeddings, "
                    "have the last part of it.",
                ),
                inputs.sample_every(),
                inputs.save_every(
                    "Write the files every so many steps too; 0 for only at the end. An interrupt writes them as well."
                ),
                io.String.Input(
                    "class_prompt",
                    multiline=True,
                    default="",
                    optional=True,
                    tooltip="For prior preservation: 'a dog'; for two concepts a line for each. Empty: none.",
                ),
                io.Image.Input(
                    "class_images",
                    optional=True,
                    tooltip="Pictures of the first concept's class. Not connected: the base model draws them.",
                ),
                inputs.class_count(Task.class_count),
                inputs.prior_weight(Settings),
                io.Image.Input(
                    "second_images", optional=True, tooltip="A second concept's pictures, trained together with it."
                ),
                io.String.Input(
                    "second_prompt",
                    multiline=True,
                    default="",
                    optional=True,
                    tooltip="The second concept's captions, with the same word for it.",
                ),
                io.String.Input(
                    "second_initial_word",
                    default=_SECOND_INITIAL,
                    optional=True,
                    tooltip="Another rare word, for the second concept.",
                ),
            ],
            hidden=[io.Hidden.prompt],
            outputs=[
                LoRAModelSocket.Output(
                    display_name="lora", tooltip="What was trained of the model, for Load LoRA Model."
                ),
                io.String.Output(
                    display_name="embedding",
                    tooltip="As prompts name it; the second one's follows in a line of its own.",
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
        given = inputs.of_lists(lists, "prompt", "second_prompt", "class_prompt")
        inputs.connected(**{name: given[name] for name in ("model", "clip", "vae")})
        task = read_task(images, second_images, class_images, **given)
        task.metadata = provenance.workflow(cls.hidden)
        done = custom_diffusion.train(given["model"], given["clip"], given["vae"], task)
        files = (provenance.written(done.file),) if done.file else ()
        return io.NodeOutput(
            done.lora_model, "\n".join(done.embeddings), done.loss_map, done.report, done.file, ui={"files": files}
        )


def read_task(
    images: Any,
    second_images: Any,
    class_images: Any,
    prompt: str,
    word: str,
    initial_word: str,
    steps: int,
    learning_rate: float,
    batch_size: int,
    resolution: int,
    seed: int,
    filename_prefix: str,
    sample_every: int = inputs.SAMPLE_EVERY,
    save_every: int = inputs.SAVE_EVERY,
    class_prompt: str = "",
    class_count: int = Task.class_count,
    prior_weight: float = Settings.prior_weight,
    second_prompt: str = "",
    second_initial_word: str = _SECOND_INITIAL,
    **_: Any,
) -> Task:
    """Raises ValueError for a value that the API let through."""
    if second_images is None and second_prompt.strip():
        raise ValueError("second_prompt has no pictures; connect second_images, or empty it")
    classes = _classes(class_prompt, 1 if second_images is None else 2)
    concepts = [Concept(images, lines(prompt), word.strip(), initial_word, classes[0])]
    if second_images is not None:
        concepts.append(Concept(second_images, lines(second_prompt), word.strip(), second_initial_word, classes[1]))
    settings = Settings(
        steps=steps, learning_rate=learning_rate, batch_size=batch_size, seed=seed, prior_weight=prior_weight
    )
    return Task(
        concepts,
        settings,
        filename_prefix,
        resolution,
        class_images or (),
        class_count,
        sample_every,
        save_every,
    )


def _classes(text: str, concepts: int) -> list[str]:
    """Of each concept its class prompt, "" for none: a single line below an empty one is the second's. Raises
    ValueError for more lines than concepts."""
    found = lines(text)
    if len(found) > concepts:
        raise ValueError(
            f"class_prompt has {len(found)} lines, and {concepts} {'is' if concepts == 1 else 'are'} expected: one for "
            "each concept"
        )
    if len(found) == 1 < concepts and not text.splitlines()[0].strip():
        return ["", *found]
    return [*found, *[""] * (concepts - len(found))]


class MergeCustomDiffusion(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> Schema:
        return Schema(
            node_id="MergeCustomDiffusion",
            display_name="Merge Custom Diffusion",
            category="ZipLoRA/train",
            search_aliases=["merge concepts", "constrained merge"],
            description="Merges LoRAs that Train Custom Diffusion made, in closed form: each concept's prompt means "
            "what it meant, and ordinary captions move as little as can be.",
            inputs=[
                io.Model.Input("model", tooltip="The base model, without the LoRAs. Nothing is computed on it."),
                io.Clip.Input("clip", tooltip="The base model's text encoder, which reads the prompts."),
                LoRAsToZipSocket.Input(
                    "lora_pair", tooltip="The LoRAs, from Load LoRA Pair, Load LoRA Stack or Pair LoRAs."
                ),
                io.String.Input(
                    "prompts",
                    multiline=True,
                    default="embedding:custom_00001_ dog\nembedding:custom_00002_ cat",
                    tooltip="What stands for each concept: a line for each LoRA, in order.",
                ),
                io.String.Input(
                    "captions",
                    multiline=True,
                    default="\n".join(_ORDINARY),
                    tooltip="Ordinary captions, a line each, which are to stay as they are. More keep more.",
                ),
            ],
            outputs=[
                LoRAModelSocket.Output(
                    display_name="lora", tooltip="The merge, for Load LoRA Model or Save LoRA Weights."
                ),
                io.String.Output(display_name="report", tooltip="What was kept, and how far ordinary captions move."),
            ],
        )

    @classmethod
    def execute(cls, model, clip, lora_pair, prompts: str, captions: str) -> io.NodeOutput:
        inputs.connected(model=model, clip=clip, lora_pair=lora_pair)
        return io.NodeOutput(*merge(model, clip, sources_of(lora_pair), prompts, captions))
