"""Zip Check: what each LoRA does with its prompt, what a zip would take, and whether it is worth it, in some passes."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from PIL import Image
from torch import Tensor

from ...ziplora_core import checkup, prompts, retention, solver
from ...ziplora_core.branch import Branch, JoinedSet
from ...ziplora_core.checkup import Effect, Finding
from ...ziplora_core.coefficients import Coefficients
from ...ziplora_core.solver import EMPTY, OWN, References, Settings
from ...ziplora_core.words import WordEffect
from . import zip as of_zip
from .apply import apply
from .drawing import references, sampling
from .lora import base_models, described, fitting, loras, refusals, text_encoders
from .lora.loras import role
from .lora.zipped import ZippedLoRA
from .memory import plan
from .network import predictor, text
from .optimize import zipping
from .optimize.progress import Progress
from .progress.bar import Bar, seconds

STEPS = 8  # of a picture: enough to see what it will be
DRAWS, DRAWS_STACKED = 3, 2  # noisy latents of each picture, for what a LoRA changes and for what stacking spoils
HEADINGS = ("without the LoRA", "with it")
_DRAWING, _MEASURING = "drawing each LoRA", "measuring what they do"  # parts of the bar


@dataclass(frozen=True)
class Looked:
    """What was drawn and measured. By concept: effects; latents (1, C, *space) of its prompt without and with its LoRA.

    per_row: seconds of one row through the network, while drawing and while measuring.
    """

    effects: Mapping[str, Effect]
    drawn: Mapping[str, tuple[Tensor, Tensor]] = field(repr=False)
    per_row: tuple[float, float]


@dataclass(frozen=True)
class Checked:
    """said: the report's lines above its details. prompts: of rows, of two pictures each (HEADINGS). pictures: IMAGE
    (rows * 2, H, W, 3), row by row; None where there are none."""

    report: str
    said: Sequence[str]
    prompts: Sequence[str] = ()
    pictures: Tensor | None = None


def check(model, clip, given: Mapping[str, of_zip.Given], seed: int, vae=None, drawn_size: int = 0) -> Checked:
    """model: ModelPatcher; it, clip and vae are unchanged. vae: None for rough pictures. drawn_size: in pixels, 0 for
    what the model draws best.

    The same file twice and another base model are verdicts. Raises ValueError for what cannot be looked at
    (LoRAFileError for a file), FloatingPointError for a LoRA that draws no numbers; interrupts pass through.
    """
    written = of_zip.prompts(given)
    sampling.SIDE_OR_BEST.check("drawn_size", drawn_size)
    used = [prompt.line(concept) for concept, prompt in written.items()]
    with of_zip.in_our_words(*(of.name for of in given.values())):
        try:
            sources = of_zip.sources_of({concept: replace(of, pictures="") for concept, of in given.items()})
            fitted = fitting.fit(sources, model.model)
        except loras.SameLoRAError as error:
            return _refused(f"The same file twice: {error}.", used)
        except refusals.OtherModelError as error:
            return _refused(f"Wrong base model: {error}.", used)
        said, encoders = {c: prompt.text for c, prompt in written.items()}, of_zip.encoders(clip, sources)
        side = drawn_size or sampling.best_side(model)
        looked = look(model, clip, sources, fitted, said, encoders, seed, side)
        lines = [*found(looked.effects), cost(model, fitted, looked, {c: encoders[c](said[c]) for c in said}, side)]
        lines += [f"note: {note}" for note in base_models.notes(sources, model.model)]
    details = _details(sources, looked, {c: _moved(clip, encoders[c], said[c]) for c in said})
    details += [*described.lines(sources, fitted), *described.notes(sources, fitted, zipped=True), *used]
    shown = [_shown(model, vae, latents) for pair in looked.drawn.values() for latents in pair]
    whole = [picture for picture in shown if picture is not None]
    rows = [f"{role(concept)}: {words}" for concept, words in said.items()]
    drawn = torch.cat(whole) if len(whole) == len(shown) else None
    return Checked(described.report(lines, details), lines, rows, drawn)


def _refused(line: str, details: Sequence[str]) -> Checked:
    return Checked(described.report([line], details), [line])


# --- what is drawn and measured ------------------------------------------------------------------------------


def look(
    model,
    clip,
    sources: loras.LoRASources,
    fitted: fitting.FittedSet,
    said: Mapping[str, str],
    encoders: Mapping[str, text.Encode],
    seed: int,
    side: int,
) -> Looked:
    """Draw each prompt without and with its LoRA, and measure what that does. said: prompts. By concept."""
    words = text.word_effects(fitted.loras, said, encoders)
    own = {concept: encoders[concept](prompt) for concept, prompt in said.items()}
    bare = {concept: clip.encode_from_tokens_scheduled(clip.tokenize(prompt)) for concept, prompt in said.items()}
    rows = len(said) * (6 * DRAWS + 3 * DRAWS_STACKED)
    bar = Bar({_DRAWING: 4.0 * STEPS * len(said), _MEASURING: float(rows)})
    watch, drawn = _Watch(bar), {}
    for place, concept in enumerate(sorted(said)):  # as many noises as concepts, whatever their order
        alone = _alone(model, sources, fitted, concept)
        drawn[concept] = (
            _drawn(model, bare[concept], concept, seed + place, side, watch),
            _drawn(alone, own[concept], concept, seed + place, side, watch),
        )
    took: list[float] = []

    def work(predict: predictor.HostPredictor, joined: JoinedSet, refs: References) -> tuple:
        counted = _Timed(predict, bar, took)
        plain = {c: model.model.process_latent_in(drawn[c][0].to(refs[c])) for c in refs}
        changes = prompts.measure(joined, counted, plain, seed, DRAWS)
        ones = Coefficients.ones(joined.loras)
        none = ones.scaled(**dict.fromkeys(joined.concepts, 0.0))
        return changes, *retention.measure_retention(joined, counted, refs, [ones, none], seed, DRAWS_STACKED)

    latents = {concept: with_lora for concept, (_, with_lora) in drawn.items()}
    with zipping.explained(model, sources, own):
        changes, stacked, nothing = predictor.with_predictor(model, fitted.loras, own, latents, work)
    bar.finish("checked")
    effects = {
        c: Effect(effect.change, stacked[c] / nothing[c] if nothing[c] > 0 else 0.0, words.get(c))
        for c, effect in changes.items()
    }
    return Looked(effects, {c: drawn[c] for c in said}, (watch.per_row, statistics.median(took)))


class _Watch:
    """Moves the bar while pictures are drawn, one after another, and takes the time from step to step."""

    def __init__(self, bar: Bar):
        self._bar, self._words, self._before = bar, "", 0.0
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
        self._bar.at(_DRAWING, self._before + 2 * STEPS * share, self._words, preview)
        if share >= 1:
            self._before += 2 * STEPS

    @property
    def per_row(self) -> float:
        """Seconds; a step of a guided picture has two rows."""
        return statistics.median(self._steps) / 2 if self._steps else 0.0


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


# --- what is said of it --------------------------------------------------------------------------------------


def found(effects: Mapping[str, Effect]) -> list[str]:
    """The verdict, what it rests on, and advice where there is some: a line each."""
    finding = checkup.find(effects)
    lines = [_verdict(effects, finding), _figures(effects)]
    if finding.idle or finding.asleep:
        lines.append(
            "Try the words, trigger word included, that the LoRA was trained with: its download page says them. (One "
            "that was trained without a trigger acts on every prompt: then all is well.)"
        )
    elif finding.swapped:
        lines.append("Try the two prompts the other way round.")
    return lines


def _verdict(effects: Mapping[str, Effect], finding: Finding) -> str:
    if not all(math.isfinite(change) for effect in effects.values() for change in effect.change.values()):
        return "It cannot be told: what was measured is not finite. Load the model in bf16 or fp32."
    if finding.swapped:
        return "The two prompts look swapped: each LoRA answers to the other's words."
    if finding.idle:
        return f"{_named(finding.idle, 'does', 'do')} nothing with this prompt: trigger word? Is the strength above 0?"
    if finding.asleep:
        return f"{_named(finding.asleep, 'does', 'do')} hardly more with this prompt than without one: trigger word?"
    if len(effects) == 1:
        return described.ALONE
    spoiled = ", ".join(f"{role(c)} {_percent(effect.spoiled)}" for c, effect in effects.items())
    if finding.enough:
        return f"A plain stack is enough: LoRA loaders in a row spoil little of what each does ({spoiled})."
    return f"Worth zipping: LoRA loaders in a row spoil much of what each does ({spoiled})."


def _named(concepts: Sequence[str], one: str, several: str) -> str:
    named = " and ".join(role(concept) for concept in concepts)
    return f"The {named} {f'LoRA {one}' if len(concepts) == 1 else f'LoRAs {several}'}"


def _percent(share: float) -> str:
    return f"{share:.0%}" if math.isfinite(share) else f"{share}"


def _figures(effects: Mapping[str, Effect]) -> str:
    parts = [
        f"{role(c)} {_percent(effect.change[OWN])} with its prompt, {_percent(effect.change[EMPTY])} without one"
        for c, effect in effects.items()
    ]
    return f"how much each LoRA changes what is drawn: {'; '.join(parts)}"


def cost(model, fitted: fitting.FittedSet, looked: Looked, own: dict[str, list], side: int) -> str:
    """What a zip in quality balanced would take, by the passes that were timed and the plan that it would follow."""
    drawing, measuring = looked.per_row
    request = sampling.ReferenceRequest(references.DEFAULT.count, side)
    each = sampling.GeneratedReferences.rows(request)
    after = Progress(Settings(), len(own), [], each).rows
    took = len(own) * each * drawing + after * measuring
    latents = {concept: with_lora for concept, (_, with_lora) in looked.drawn.items()}
    planned = plan.make(model, fitted.loras, own, latents, Settings(), plan.room_for(model))
    memory = (planned.need + model.model_size()) / plan.GB
    return f"a zip would take about {seconds(took)} and {memory:.1f} GB with the model"


def _moved(clip, encode: text.Encode, prompt: str) -> float:
    """How far a LoRA's own text-encoder part moves its prompt, in parts of the prompt without it."""
    with_part = encode(prompt)[0][0].float()
    without = clip.encode_from_tokens_scheduled(clip.tokenize(prompt))[0][0].float()
    return float((with_part - without).norm() / without.norm())


def _details(sources: loras.LoRASources, looked: Looked, moved: Mapping[str, float]) -> list[str]:
    lines = []
    for concept, effect in looked.effects.items():
        under = ", ".join(f"{prompt} prompt {_percent(change)}" for prompt, change in effect.change.items())
        lines.append(f"{concept}: changes predictions on the bare model's picture by, under its {under}")
        lines += _word_lines(concept, effect.words)
        parts = text_encoders.parts(sources[concept])
        lines.append(
            f"{concept}: its text-encoder part ({parts} layers) moves the prompt by {_percent(moved[concept])}"
            if parts
            else f"{concept}: no text-encoder part"
        )
    drawing, measuring = looked.per_row
    lines.append(f"seconds for each row through the network: {drawing:.3g} drawing, {measuring:.3g} measuring")
    return lines


def _word_lines(concept: str, words: WordEffect | None) -> list[str]:
    if words is None:
        return [f"{concept}: no layer of it reads the prompt by itself; its words were not looked at"]
    others = ", ".join(f"{answer:.2f} to the {role(other)} prompt" for other, answer in words.others.items())
    plain = ", ".join(f"{answer:.2f}" for answer in words.ordinary)
    said = ", ".join(filter(None, [f"{words.own:.2f} to its own prompt", others, f"{plain} to ordinary prompts"]))
    return [f"{concept}: its layers that read the prompt answer by {said} (1: as to numbers at random)"]
