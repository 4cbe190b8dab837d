"""What the optimisation did, in words."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from ....ziplora_core.coefficients import Coefficients
from ....ziplora_core.prompts import PromptEffect
from ....ziplora_core.solver import EMPTY, OWN, Result, Settings
from ..drawing.sampling import GeneratedReferences
from ..lora import text_encoders
from ..lora.fitting import FittedSet
from ..lora.loras import LoRASources
from ..memory.plan import Plan


@dataclass(frozen=True)
class Outcome:
    """Everything a report tells. retention and alignment: [direct merge, zipped]. drawn, prompts: by concept.

    again: memory ran out, and this is the second run.
    """

    sources: LoRASources
    fitted: FittedSet
    settings: Settings
    before: Coefficients
    result: Result = field(default_factory=lambda: Result(Coefficients({})))
    seconds: float = 0.0
    retention: list[dict[str, float]] = field(default_factory=list)
    alignment: list[dict[str, float]] = field(default_factory=list)
    drawn: dict[str, GeneratedReferences] = field(default_factory=dict)
    prompts: dict[str, PromptEffect] = field(default_factory=dict)
    plan: Plan = field(default_factory=Plan)
    again: bool = False

    @property
    def loss_map(self) -> dict[str, list[float]]:
        """Each step's loss and its terms; without steps, as "loss" and "left", what is left of each layer's error."""
        steps = [step.losses for step in self.result.history]
        if not steps:
            left = list(self.result.relative_error.values())
            return {"loss": left, "left": left} if left else {"loss": []}
        weight = self.settings.similarity_lambda
        return {
            "loss": [losses.total for losses in steps],
            **{c: [losses.retention[c] for losses in steps] for c in self.sources.by_concept},
            "overlap": [weight * losses.overlap for losses in steps],
        }


def _mean(values: dict[str, float]) -> float:
    return sum(values.values()) / len(values) if values else 0.0


def _ranks(low: int, high: int) -> str:
    return f"rank {low}" if low == high else f"ranks {low} to {high}"


def report(outcome: Outcome) -> str:
    """A few lines of plain text for a note or preview node."""
    loras, settings, result = outcome.fitted.loras, outcome.settings, outcome.result
    layers = ", ".join(f"{n} {kind}" for kind, n in loras.layer_counts().items() if n)
    lines = [
        *(f"{c}: {source.title} ({_ranks(*loras.ranks(c))})" for c, source in outcome.sources.by_concept.items()),
        f"layers: {layers}; {loras.coefficient_count:,} coefficients",
        f"solver: {settings.solver}, seed {settings.seed}; {result.stopped}",
    ]
    lines.extend(drawn.line(concept) for concept, drawn in outcome.drawn.items())
    if result.relative_error:
        lines.append(
            f"layer by layer: {_mean(result.relative_error):.0%} of the direct merge's error is left on the mean, "
            f"ridge {settings.ridge:g}"
        )
    if result.history:
        lines.append(
            f"steps: {len(result.history)} of {settings.steps} at rate {settings.learning_rate:g}, objective "
            f"{settings.objective.name}, lambda {settings.similarity_lambda:g}, batch {settings.batch_size}"
        )
    if outcome.seconds:
        lines.append(f"time: {outcome.seconds:.1f} s")
        lines.append(outcome.plan.line() + ("; it ran out at first, this is the second run" if outcome.again else ""))
    lines.extend(_retention_lines(outcome))
    lines.extend(_prompt_lines(outcome))
    after = result.coefficients
    lines.append(f"overlap of coefficients: {outcome.before.overlap():.3f} direct merge, {after.overlap():.3f} zipped")
    if outcome.alignment:
        lines.append(
            f"mean column alignment: {_mean(outcome.alignment[0]):+.4f} direct merge, "
            f"{_mean(outcome.alignment[1]):+.4f} zipped"
        )
    owners = after.ownership()
    lines.append("columns owned by: " + ", ".join(f"{who} {share:.0%}" for who, share in owners.items()))
    notes = [*outcome.fitted.notes, *text_encoders.notes(outcome.sources, zipped=settings.steps > 0)]
    lines.extend(f"note: {note}" for note in notes)
    return "  \n".join(lines)  # a line break in Markdown too, which Preview as Text renders


def _retention_lines(outcome: Outcome) -> list[str]:
    if not outcome.retention:
        return []
    before, after = outcome.retention
    lines = []
    for concept in before:
        finite = math.isfinite(before[concept]) and math.isfinite(after[concept])
        share = f" ({after[concept] / before[concept]:.0%})" if finite and before[concept] else ""
        lines.append(
            f"{concept} retention loss on held-out noise: {before[concept]:.4g} direct merge, "
            f"{after[concept]:.4g} zipped{share}"
        )
    if not all(map(math.isfinite, [*before.values(), *after.values()])):
        lines.append("These losses are not finite, so they say nothing: load the model in bf16 or fp32.")
    elif sum(after.values()) >= sum(before.values()):
        these, every = ("this pair", "both concepts") if len(before) == 2 else ("these LoRAs", "what they draw")
        lines.append(f"Zipping did not help {these}: the direct merge keeps {every} as well or better.")
    return lines


def _prompt_lines(outcome: Outcome) -> list[str]:
    """How much each LoRA does under its own prompt and under an empty one, and where its own does not wake it."""
    lines = []
    for concept, effect in outcome.prompts.items():
        lines.append(
            f"{concept} prompt: with its LoRA the model predicts its references better than bare by "
            f"{effect.gain[OWN]:.0%}, by {effect.gain[EMPTY]:.0%} with an empty prompt; the LoRA changes the "
            f"prediction by {effect.change[OWN]:.0%} and {effect.change[EMPTY]:.0%}"
        )
        if not effect.fires:
            lines.append(
                f"The {concept} prompt does not seem to wake its LoRA: it does about as much for its references as an "
                "empty prompt. Are these the words, trigger word included, that the LoRA was trained with? (A LoRA "
                "without a trigger, that acts on every prompt, looks like this too.) The losses above say how well it "
                "is kept under this prompt, whether it is the right one or not."
            )
    if outcome.prompts and all(effect.swapped for effect in outcome.prompts.values()):
        lines.append("Each LoRA is woken by the other's prompt: the two prompts seem to be swapped.")
    return lines
