"""What Zip Check says of what it has found: the verdict with its figures, advice, what a zip would take, details."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from ...ziplora_core import checkup, zipper
from ...ziplora_core.checkup import Effect, Finding
from ...ziplora_core.solver import EMPTY, OWN, Settings
from ...ziplora_core.words import WordEffect
from .drawing import recipes, references
from .lora import described, fitting, loras, text_encoders
from .lora.loras import role
from .memory import plan
from .optimize import verdict
from .optimize.progress import Progress
from .progress.bar import seconds

_ALL = "100%: as far from it as without LoRAs"


@dataclass(frozen=True)
class Looked:
    """What was drawn and measured. By concept: effects; latents (1, C, *space) of its prompt without and with its LoRA;
    own, the prompt as a user of its LoRA has it encoded; moved, how far its text-encoder part moves that.

    per_row: seconds of one row through the network, while drawing and while measuring.
    """

    effects: Mapping[str, Effect]
    drawn: Mapping[str, tuple[Tensor, Tensor]] = field(repr=False)
    own: Mapping[str, list] = field(repr=False)
    moved: Mapping[str, float]
    per_row: tuple[float, float]


def found(effects: Mapping[str, Effect], fitted: fitting.FittedSet) -> list[str]:
    """The verdict, what it rests on, and advice where there is some: a line each."""
    finding = checkup.find(effects, shared=any(True for _ in fitted.loras.common_layers()))
    lines = [_verdict(effects, finding), _figures(effects)]
    if not _finite(effects):
        return lines
    if finding.silent:
        lines.append(
            "At a strength of 0, or with a file of zeros, a LoRA changes nothing of the model, whatever the prompt: "
            "set its strength, or choose another file."
        )
    if finding.asleep or set(finding.idle) - set(finding.silent):
        lines.append(
            "Try the words, trigger word included, that the LoRA was trained with: its download page says them. (One "
            "that was trained without a trigger acts on every prompt, and looks like this too.)"
        )
    elif finding.swapped:
        lines.append("Try the two prompts the other way round.")
    if finding.unheard and not finding.swapped:
        lines.append(
            f"Whether its prompt wakes {_these(finding.unheard, 'the {} LoRA', 'each of the {} LoRAs')} cannot be told "
            "well: no layer of it hears the prompt by itself. Compare the two pictures."
        )
    return lines


def _finite(effects: Mapping[str, Effect]) -> bool:
    return all(effect.finite for effect in effects.values())


def _verdict(effects: Mapping[str, Effect], finding: Finding) -> str:
    if not _finite(effects):
        return "It cannot be told: what was measured is not finite. Load the model in bf16 or fp32."
    if finding.swapped:
        return "The two prompts look swapped: each LoRA answers to the other's words."
    wrong = _wrong(effects, finding)
    if wrong:
        return " ".join(wrong)
    if len(effects) == 1:
        return described.ALONE
    if not finding.shared:
        return verdict.APART
    if finding.enough:
        spoiled = _spoiled(effects, list(effects))
        return f"A plain stack is enough: LoRA loaders in a row spoil little of what each does ({spoiled})."
    which = _these(finding.spoiled, "the {} LoRA", "the {} LoRAs")
    spoiled = _spoiled(effects, finding.spoiled)
    return f"Worth zipping: LoRA loaders in a row spoil much of what {which} would draw alone ({spoiled})."


def _wrong(effects: Mapping[str, Effect], finding: Finding) -> list[str]:
    """A sentence for each kind of LoRA or prompt that is wrong."""
    said = []
    idle = [concept for concept in finding.idle if concept not in finding.silent]
    if finding.silent:
        which = _these(finding.silent, "The {} LoRA does", "The {} LoRAs do")
        said.append(f"{which} nothing to the model: strength 0, or zeros in the file?")
    if idle:
        said.append(f"{_these(idle, 'The {} LoRA does', 'The {} LoRAs do')} nothing with this prompt: trigger word?")
    deaf = [concept for concept in finding.asleep if effects[concept].words is not None]
    if deaf:
        said.append(
            _these(
                deaf,
                "The {} prompt does not seem to wake its LoRA: its words say no more to it than ordinary words do.",
                "The {} prompts do not seem to wake their LoRAs: their words say no more to them than ordinary words "
                "do.",
            )
        )
    unheard = [concept for concept in finding.asleep if effects[concept].words is None]
    if unheard:
        which = _these(unheard, "The {} LoRA does", "The {} LoRAs do")
        said.append(f"{which} hardly more with this prompt than without one: trigger word?")
    return said


def _these(concepts: Sequence[str], one: str, several: str) -> str:
    """Concepts in their places of a sentence, of one or of several."""
    return (one if len(concepts) == 1 else several).format(" and ".join(role(concept) for concept in concepts))


def _percent(share: float) -> str:
    if not math.isfinite(share):
        return f"{share}"
    return f"{share:.1%}" if 0 < share < 0.1 else f"{share:.0%}"


def _spoiled(effects: Mapping[str, Effect], concepts: Sequence[str]) -> str:
    return f"{', '.join(f'{role(c)} {_percent(effects[c].spoiled)}' for c in concepts)}; {_ALL}"


def _figures(effects: Mapping[str, Effect]) -> str:
    parts = [
        f"{role(c)} {_percent(effect.change[OWN])} with its prompt, {_percent(effect.change[EMPTY])} without one"
        for c, effect in effects.items()
    ]
    return f"how much each LoRA changes what is drawn: {'; '.join(parts)}"


def cost(model, fitted: fitting.FittedSet, looked: Looked, side: int) -> list[str]:
    """A line on what a zip in quality balanced would take, by the passes that were timed and the plan that it would
    follow; none where nothing would be zipped.

    A row that is drawn alone takes as long as any or longer, so the time is at most about this.
    """
    settings = Settings()
    if zipper.without_learning(fitted.loras, settings) is not None:
        return []
    own = dict(looked.own)
    drawing, measuring = looked.per_row
    each = recipes.of(model).rows(references.DEFAULT.count)
    after = Progress(settings, len(own), [], each).rows
    took = len(own) * each * drawing + after * measuring
    latents = {concept: with_lora for concept, (_, with_lora) in looked.drawn.items()}
    planned = plan.make(model, fitted.loras, own, latents, settings, plan.room_for(model))
    memory = (planned.need + model.model_size()) / plan.GB
    return [f"a zip would take at most about {seconds(took)}, and at least {memory:.1f} GB with the model"]


def details(sources: loras.LoRASources, looked: Looked) -> list[str]:
    """Everything that was measured, a line each."""
    lines = []
    for concept, effect in looked.effects.items():
        under = ", ".join(f"{prompt} prompt {_percent(change)}" for prompt, change in effect.change.items())
        lines.append(f"{concept}: changes predictions on the bare model's picture by, under its {under}")
        if len(looked.effects) > 1:
            lines.append(f"{concept}: what all draw together is off by {_percent(effect.spoiled)}; {_ALL}")
        lines += _word_lines(concept, effect.words)
        parts = text_encoders.parts(sources[concept])
        lines.append(
            f"{concept}: its text-encoder part ({parts} layers) moves the prompt by {_percent(looked.moved[concept])}"
            if parts
            else f"{concept}: no text-encoder part"
        )
    drawing, measuring = looked.per_row
    lines.append(f"seconds for each row through the network: {drawing:.3g} drawing, {measuring:.3g} measuring")
    return lines


def _word_lines(concept: str, words: WordEffect | None) -> list[str]:
    if words is None:
        return [f"{concept}: no layer of it hears the prompt by itself; its words were not looked at"]
    others = ", ".join(f"{answer:.2f} to the {role(other)} prompt" for other, answer in words.others.items())
    plain = ", ".join(f"{answer:.2f}" for answer in words.ordinary)
    said = ", ".join(filter(None, [f"{words.own:.2f} to its own prompt", others, f"{plain} to ordinary prompts"]))
    return [f"{concept}: its layers that read the prompt answer by {said} (1: as to numbers at random)"]
