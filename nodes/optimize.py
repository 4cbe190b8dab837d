"""ZipLoRAOptimize: learn the merger coefficients of a pair."""

from __future__ import annotations

from comfy_api.v0_0_2 import io, ui

from ..ziplora_core.checks import one_of
from ..ziplora_core.objective import OBJECTIVES
from ..ziplora_core.solver import SOLVERS, Settings
from . import inputs
from .bridge.drawing.sampling import COUNT, SIDE, ReferenceRequest
from .bridge.lora.zipped import sources_of
from .bridge.optimize.zipping import by_concept, check_inputs, check_prompts, optimize
from .schema import Schema
from .sockets import LoRAsToZipSocket, LossMapSocket, ReferencesSocket, ZippedLoRASocket

_NOT_CONNECTED = object()  # None stands for latents that are connected and not computed yet


class ZipLoRAOptimize(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> Schema:
        return Schema(
            node_id="ZipLoRAOptimize",
            display_name="ZipLoRA Optimize",
            category="ZipLoRA",
            search_aliases=["merge by training"],
            description="Learns one coefficient per column of both LoRAs so that the merged model draws the subject "
            "as the content LoRA does and the style as the style LoRA does (ZipLoRA, arXiv 2311.13600).",
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="The base model, without the two LoRAs. Other LoRAs may be on it already.",
                ),
                LoRAsToZipSocket.Input(
                    "lora_pair",
                    tooltip="The two LoRAs, from Load LoRA Pair. Bypassed (Ctrl+B), this node hands them on as they "
                    "are, and they are stacked. A zipped pair is zipped anew.",
                ),
                io.Conditioning.Input(
                    "content_positive",
                    lazy=True,
                    tooltip="The prompt that the content LoRA was trained with, e.g. 'a sks dog'.",
                ),
                io.Conditioning.Input(
                    "style_positive",
                    lazy=True,
                    optional=True,
                    tooltip="The prompt that the style LoRA was trained with, e.g. 'a house in szn style'. One LoRA "
                    "alone needs none.",
                ),
                io.Latent.Input(
                    "content_latents",
                    lazy=True,
                    optional=True,
                    tooltip="Reference pictures of the subject, VAE-encoded: one is enough, a batch is welcome. Not "
                    "connected: the content LoRA draws some from its prompt, and the node shows them when it is done.",
                ),
                io.Latent.Input(
                    "style_latents",
                    lazy=True,
                    optional=True,
                    tooltip="Reference pictures of the style, VAE-encoded: one is enough, a batch is welcome. Not "
                    "connected: the style LoRA draws some from its prompt, and the node shows them when it is done.",
                ),
                inputs.whole(
                    Settings,
                    "steps",
                    "Updates of the coefficients by gradient: the paper's 100 for solver gradient, 10 from the "
                    "layer-wise start; solvers layerwise and fusion take none. 0 gives the direct merge.",
                ),
                inputs.fraction(
                    Settings,
                    "learning_rate",
                    0.001,
                    "Adam's rate, the paper's 0.01. Coefficients move about rate x steps, so at 5e-5 nothing happens.",
                ),
                inputs.fraction(
                    Settings,
                    "similarity_lambda",
                    0.001,
                    "Weight of the overlap between the two sets of coefficients, the paper's 0.01. "
                    "Higher: columns are divided more strictly between subject and style.",
                ),
                inputs.whole(
                    Settings,
                    "batch_size",
                    "Noisy copies of each reference per step. More is steadier, slower, and takes more memory.",
                ),
                inputs.seed("Seed of the noise and timesteps: the same seed gives the same coefficients."),
                inputs.choice(
                    "objective",
                    OBJECTIVES,
                    "balanced: each concept's loss counts relative to the direct merge's, so that lambda means "
                    "the same for every model and size. paper: Eq. 3 to the letter.",
                ),
                inputs.choice(
                    "solver",
                    SOLVERS,
                    "layerwise: in closed form from a few forward passes, without backpropagation: fits wherever "
                    "sampling fits, and draws as well as what takes longer; of three LoRAs and more it mixes ranks "
                    "instead of weighing columns. gradient: the paper's, from all ones; give it 100 steps. Or the "
                    "first as the second's start. fusion: Mix-of-Show's, of any number, in closed form from whole "
                    "moments of what layers see; takes gigabytes of memory, and is there to compare with.",
                ),
                inputs.fraction(
                    Settings,
                    "ridge",
                    0.1,
                    "How strongly the layer-wise solve holds on to the plain sum of the LoRAs: 0.1 less, 1 more. Of "
                    "three and more it is divided by their number. Solver fusion has one of its own.",
                    optional=True,
                ),
                io.Int.Input(
                    "drawn_references",
                    default=ReferenceRequest.count,
                    **inputs.span(COUNT),
                    optional=True,
                    tooltip="How many references to draw for a concept without latents.",
                ),
                io.Int.Input(
                    "drawn_size",
                    default=ReferenceRequest.side,
                    **inputs.span(SIDE),
                    step=8,
                    optional=True,
                    tooltip="Side in pixels of references that are drawn: what the model draws best, 1024 for SDXL.",
                ),
                ReferencesSocket.Input(
                    "references",
                    lazy=True,
                    optional=True,
                    tooltip="Where a stack holds more than two LoRAs: a ZipLoRA Reference for each after the second.",
                ),
            ],
            outputs=[
                ZippedLoRASocket.Output(
                    display_name="zipped_lora",
                    tooltip="The zipped pair, for Style Strength or Apply Zipped LoRA.",
                ),
                LossMapSocket.Output(
                    display_name="loss_map",
                    tooltip="For Plot Loss Graph: the loss of each step; for layerwise and fusion, what is left of "
                    "each layer's error.",
                ),
                io.String.Output(
                    display_name="report",
                    tooltip="Whether zipping helped, how well each LoRA is kept, what to try and what it cost; below, "
                    "every detail: layers, ranks, retention on noise that was not trained on, prompts, overlap.",
                ),
            ],
        )

    @classmethod
    def check_lazy_status(
        cls,
        model,
        lora_pair,
        content_positive,
        style_positive=_NOT_CONNECTED,
        content_latents=_NOT_CONNECTED,
        style_latents=_NOT_CONNECTED,
        references=(),
        **settings,
    ) -> list[str]:
        """Which inputs to compute next: what can be refused is refused before a VAE or a text encoder is loaded."""
        inputs.connected(model=model, lora_pair=lora_pair)
        lora_pair = sources_of(lora_pair)
        read_settings(**settings)
        latents = {"content_latents": content_latents, "style_latents": style_latents}
        if references is None:  # of whichever number: told apart when they are there
            check_inputs(model, lora_pair, {})
            return ["references"]
        prompts = by_concept(lora_pair, (content_positive, style_positive), [r.positive for r in references])
        check_prompts(lora_pair, [concept for concept, made in prompts.items() if made is _NOT_CONNECTED])
        of = by_concept(lora_pair, list(latents.values()), [reference.latents for reference in references])
        check_inputs(model, lora_pair, {c: given for c, given in of.items() if given is not _NOT_CONNECTED})
        missing = [name for name, given in latents.items() if given is None]
        return missing or ["content_positive", "style_positive"][: len(of)]

    @classmethod
    def execute(
        cls,
        model,
        lora_pair,
        content_positive,
        style_positive=None,
        content_latents=None,
        style_latents=None,
        references=(),
        **settings,
    ) -> io.NodeOutput:
        inputs.connected(model=model, lora_pair=lora_pair)
        lora_pair = sources_of(lora_pair)
        conditioning = by_concept(lora_pair, (content_positive, style_positive), [r.positive for r in references])
        latents = by_concept(lora_pair, (content_latents, style_latents), [r.latents for r in references])
        *outputs, drawn = optimize(model, lora_pair, conditioning, latents, *read_settings(**settings))
        return io.NodeOutput(*outputs, ui=None if drawn is None else ui.PreviewImage(drawn, cls=cls))


def read_settings(
    steps: int,
    learning_rate: float,
    similarity_lambda: float,
    batch_size: int,
    seed: int,
    objective: str = Settings.objective.name,
    solver: str = Settings.solver,
    ridge: float = Settings.ridge,
    drawn_references: int = ReferenceRequest.count,
    drawn_size: int = ReferenceRequest.side,
) -> tuple[Settings, ReferenceRequest]:
    """The core's settings from the node's inputs. Raises ValueError for a value that the API let through."""
    one_of("objective", objective, OBJECTIVES)
    rule = OBJECTIVES[objective]
    settings = Settings(steps, learning_rate, similarity_lambda, batch_size, seed, rule, solver, ridge)
    return settings, ReferenceRequest(drawn_references, drawn_size)
