"""Zip Check: what each LoRA does with its prompt, what a zip would take, and whether it is worth it, in some passes."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from PIL import Image
from torch import Tensor

from ...ziplora_core import prompts, retention, solver
from ...ziplora_core.branch import Branch, JoinedSet
from ...ziplora_core.checkup import Effect
from ...ziplora_core.coefficients import Coefficients
from ...ziplora_core.solver import References
from . import findings
from . import zip as of_zip
from .apply import apply
from .drawing import recipes, sampling
from .findings import Looked
from .lora import base_models, captured, described, fitting, loras, refusals
from .lora.loras import role
from .lora.zipped import ZippedLoRA
from .memory.retry import is_out_of_memory
from .network import checks, predictor, text
from .optimize import zipping
from .progress.bar import Bar

STEPS = 8  # of a picture: enough to see what it will be
DRAWS, DRAWS_STACKED = 3, 2  # noisy latents of each picture, for what a LoRA changes and for what stacking spoils
HEADINGS = ("without the LoRA", "with it")
_DRAWING, _MEASURING = "drawing each LoRA", "measuring what they do"  # parts of the bar


@dataclass(frozen=True)
class Checked:
    """said: the report's lines above its details. prompts: of rows, of two pictures each (HEADINGS). pictures: IMAGE
    (rows * 2, H, W, 3), row by row; None where there are none."""

    report: str
    said: Sequence[str]
    prompts: Sequence[str] = ()
    pictures: Tensor | None = None


def check(
    model,
    clip,
    given: Mapping[str, of_zip.Given],
    seed: int,
    vae=None,
    drawn_size: int = 0,
    chain: captured.Chain | None = None,
) -> Checked:
    """model: ModelPatcher; it, clip and vae are unchanged. vae: None for rough pictures. drawn_size: in pixels, 0 for
    what the model draws best. chain: where the LoRAs are those of loaders before the node.

    The same file twice and another base model are verdicts. Raises ValueError for what cannot be looked at
    (LoRAFileError for a file), FloatingPointError for a LoRA that draws no numbers, and the host's own exception where
    memory runs out; interrupts pass through.
    """
    written = of_zip.prompts(given)
    sampling.SIDE_OR_BEST.check("drawn_size", drawn_size)
    used = [prompt.line(concept) for concept, prompt in written.items()]
    if chain is not None:
        used += chain.lines()
        model, clip = chain.without(model, clip)
    with of_zip.in_our_words(*(of.name for of in given.values())):
        try:
            sources = of_zip.sources_of({concept: replace(of, pictures="") for concept, of in given.items()})
            fitted = fitting.fit(sources, model.model)
        except loras.SameLoRAError as error:
            return _refused(f"The same file twice: {_same_file(given) or error}.", used)
        except refusals.OtherModelError as error:
            return _refused(f"Wrong base model: {error}.", used)
        plain, said = of_zip.encoder(clip), {c: prompt.text for c, prompt in written.items()}
        side = drawn_size or sampling.best_side(model)
        looked = look(model, plain, sources, fitted, said, of_zip.encoders(clip, sources, plain), seed, side)
        lines = [*findings.found(looked.effects, fitted), *findings.cost(model, fitted, looked, side)]
        of_models = [f"note: {note}" for note in base_models.notes(sources, model.model)]
    notes = [note for note in described.notes(sources, fitted, zipped=True) if note not in of_models]
    details = [*findings.details(sources, looked), *described.lines(sources, fitted), *notes, *used]
    shown = [_shown(model, vae, latents) for pair in looked.drawn.values() for latents in pair]
    whole = [picture for picture in shown if picture is not None]
    rows = [f"{role(concept)}: {words}" for concept, words in said.items()]
    drawn = torch.cat(whole) if len(whole) == len(shown) else None
    lines += of_models
    return Checked(described.report(lines, details), lines, rows, drawn)


def _refused(line: str, details: Sequence[str]) -> Checked:
    return Checked(described.report([line], details), [line])


def _same_file(given: Mapping[str, of_zip.Given]) -> str:
    """Where two files are the node's own two inputs, what they are and what to do; "" for others."""
    if len(given) != 2 or not all(of.pictures for of in given.values()):
        return ""
    one, other = (f"'{of.title}'" for of in given.values())
    return f"{one} and {other} hold the same LoRA; choose another file in subject_lora or style_lora"


# --- what is drawn and measured ------------------------------------------------------------------------------


def look(
    model,
    plain: text.Encode,
    sources: loras.LoRASources,
    fitted: fitting.FittedSet,
    said: Mapping[str, str],
    encoders: Mapping[str, text.Encode],
    seed: int,
    side: int,
    other: bool = False,
) -> Looked:
    """Draw each prompt without and with its LoRA, and measure what that does. said: prompts. By concept.

    plain: encodes with no LoRA on. other: whether two are measured under each other's prompts also where words tell
    which is whose. Raises ValueError for prompts that are not this model's.
    """
    words = text.word_effects(fitted.loras, said, encoders)
    own = {concept: encoders[concept](prompt) for concept, prompt in said.items()}
    bare = {concept: plain(prompt) for concept, prompt in said.items()}
    for concept in said:
        for conditioning in (own[concept], bare[concept]):
            checks.check_conditioning(sources.input_name(concept, "positive"), conditioning)
    other = len(said) == 2 and (other or len(words) < len(said))
    rows = len(said) * ((6 if other else 4) * DRAWS + 3 * DRAWS_STACKED)
    recipe = recipes.of(model).at_most(STEPS)
    bar = Bar({_DRAWING: 2.0 * recipe.rows(len(said)), _MEASURING: float(rows)})
    watch, took = _Watch(bar, recipe), list[float]()
    drawn: dict[str, tuple[Tensor, Tensor]] = {}

    def work(predict: predictor.HostPredictor, joined: JoinedSet, refs: References) -> tuple:
        counted = _Timed(predict, bar, took)
        without = {c: model.model.process_latent_in(drawn[c][0].to(refs[c])) for c in refs}
        changes = prompts.measure(joined, counted, without, seed, DRAWS, other=other)
        ones = Coefficients.ones(joined.loras)
        none = ones.scaled(**dict.fromkeys(joined.concepts, 0.0))
        return changes, *retention.measure_retention(joined, counted, refs, [ones, none], seed, DRAWS_STACKED)

    with _less_memory(side), zipping.explained(model, sources, own):
        for place, concept in enumerate(sorted(said)):  # as many noises as concepts, whatever their order
            alone = _alone(model, sources, fitted, concept)
            drawn[concept] = (
                _drawn(model, bare[concept], concept, seed + place, side, watch),
                _drawn(alone, own[concept], concept, seed + place, side, watch),
            )
        latents = {concept: with_lora for concept, (_, with_lora) in drawn.items()}
        changes, stacked, nothing = predictor.with_predictor(model, fitted.loras, own, latents, work)
    bar.finish("checked")
    effects = {
        c: Effect(effect.change, 0.0 if nothing[c] == 0 else stacked[c] / nothing[c], words.get(c))
        for c, effect in changes.items()
    }
    moved = {concept: _moved(own[concept], bare[concept]) for concept in said}
    per_row = watch.per_row, statistics.median(took)
    return Looked(effects, {c: drawn[c] for c in said}, own, moved, per_row)


@contextlib.contextmanager
def _less_memory(side: int) -> Iterator[None]:
    """Where memory runs out, the error says what would need less."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        kind = type(error)  # and not the error, whose frames hold what filled the memory
    else:
        return
    raise kind(f"not enough memory to draw and measure pictures of {side} x {side} pixels; lower drawn_size")


def _moved(own: list, bare: list) -> float:
    """How far a LoRA's own text-encoder part moves its prompt, in parts of the prompt without it."""
    with_part, without = own[0][0].float(), bare[0][0].float()
    return float((with_part - without).norm() / without.norm())


class _Watch:
    """Moves the bar while pictures are drawn, one after another, and takes the time from step to step."""

    def __init__(self, bar: Bar, recipe: recipes.Recipe):
        self._bar, self._words, self._before = bar, "", 0.0
        self._rows, self._rows_a_step = recipe.rows(1), recipe.rows(1) / recipe.steps
        self._last: float | None = None
        self._steps: list[float] = []

    def start(self, words: str) -> None:
        self._words, self._last = words, None
        self._bar.at(_DRAWING, self._before, words)

    def __call__(self, share: float, preview: Image.Image | None) -> None:
        now = time.monotonic()
        if self._last is not None:  # the first step of a picture also loads the model
            self._steps.append(now - self._last)
        self._last = now
        self._bar.at(_DRAWING, self._before + self._rows * share, self._words, preview)
        if share >= 1:
            self._before += self._rows

    @property
    def per_row(self) -> float:
        """Seconds."""
        return statistics.median(self._steps) / self._rows_a_step if self._steps else 0.0


class _Timed:
    """A predictor that moves the bar, and takes the time of each row."""

    def __init__(self, predict: predictor.HostPredictor, bar: Bar, took: list[float]):
        self._predict, self._bar, self._took, self._done = predict, bar, took, 0
        self.timesteps, self.joins, self.loss_scale = predict.timesteps, predict.joins, predict.loss_scale

    def __call__(self, batch: solver.Batch, branch: Branch) -> Tensor:
        self._bar.at(_MEASURING, float(self._done), _MEASURING)
        began = time.monotonic()
        predicted = self._predict(batch, branch)
        predicted.flatten()[0].item()  # devices that work ahead have done so by then
        self._took.append((time.monotonic() - began) / len(batch.latents))
        self._done += len(batch.latents)
        return predicted

    def target(self, batch: solver.Batch) -> Tensor:
        return self._predict.target(batch)


def _alone(model, sources: loras.LoRASources, fitted: fitting.FittedSet, concept: str):
    others = {other: 0.0 for other in fitted.loras.concepts if other != concept}
    alone = ZippedLoRA(sources, fitted, Coefficients.ones(fitted.loras)).dialled(others)
    return apply(model, None, alone, 1.0)[0]


def _drawn(model, conditioning: list, concept: str, seed: int, side: int, watch: _Watch) -> Tensor:
    watch.start(f"drawing the {role(concept)} prompt")
    drawn = sampling.draw_plain(model, conditioning, sampling.ReferenceRequest(1, side), seed, watch, STEPS)
    if drawn is None:
        raise FloatingPointError(
            f"the {role(concept)} prompt draws no picture (its latents are not finite): look at the file and at what "
            "other nodes have put on the model, or load the model in bf16 or fp32"
        )
    return drawn.latents


def _shown(model, vae, latents: Tensor) -> Tensor | None:
    """IMAGE (1, H, W, 3) of latents: as VAE Decode makes it, or a rough one; None where the host knows no colors."""
    if vae is None:
        return sampling.thumbnails(model, latents)
    images: Tensor = vae.decode(latents)
    return images.reshape(-1, *images.shape[-3:])[:1]
