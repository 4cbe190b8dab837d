"""The report of ZipLoRA Optimize: verdict, advice and cost in plain words, then everything that was measured."""

from __future__ import annotations

import math

from ....ziplora_core import fusion
from ....ziplora_core.solver import EMPTY, OWN
from ..lora import described
from . import verdict
from .outcome import Outcome


def report(outcome: Outcome) -> str:
    """Plain text for a note or preview node."""
    return described.report([*verdict.lines(outcome), *_cost(outcome)], _details(outcome))


def _cost(outcome: Outcome) -> list[str]:
    if not outcome.seconds:
        return []
    again = "; it ran out at first, this is the second run" if outcome.again else ""
    return [f"cost: {outcome.seconds:.1f} s; {outcome.plan.line()}{again}"]


def _details(outcome: Outcome) -> list[str]:
    settings, result = outcome.settings, outcome.result
    lines = described.lines(outcome.sources, outcome.fitted)
    lines.append(f"solver: {settings.solver}, seed {settings.seed}; {result.stopped}")
    lines.extend(drawn.line(concept) for concept, drawn in outcome.drawn.items())
    if outcome.recipe is not None and outcome.recipe.told_by:
        recipe = outcome.recipe
        lines.append(
            f"the model draws in {recipe.steps} steps without guidance, by {recipe.told_by}: zipped and measured at "
            "the noise levels of these"
        )
    layers = outcome.fitted.loras.layers
    errors = {name: left for name, left in result.relative_error.items() if len(layers[name]) > 1}
    if errors:
        ridge = fusion.RIDGE if settings.solver == "fusion" else settings.ridge
        lines.append(
            f"layer by layer: {_mean(errors):.0%} of the direct merge's error is left on the mean, ridge {ridge:g}"
        )
    if result.history:
        lines.append(
            f"steps: {len(result.history)} of {settings.steps} at rate {settings.learning_rate:g}, objective "
            f"{settings.objective.name}, lambda {settings.similarity_lambda:g}, batch {settings.batch_size}"
        )
    lines += [*_retention_lines(outcome), *_prompt_lines(outcome), *_column_lines(outcome)]
    return lines + described.notes(outcome.sources, outcome.fitted, zipped=settings.steps > 0)


def _mean(values: dict[str, float]) -> float:
    return sum(values.values()) / len(values) if values else 0.0


def _percent(share: float) -> str:
    """Without a sign before a zero."""
    return f"{round(100 * share)}%" if math.isfinite(share) else f"{share}"


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
    for tried in outcome.tried:
        found = ", ".join(f"{concept} {loss:.4g}" for concept, loss in tried.retention.items())
        lines.append(f"the same with {tried.concept} at {tried.strength:g}: {found}")
    return lines


def _prompt_lines(outcome: Outcome) -> list[str]:
    """How much each LoRA does under its own prompt and under an empty one, and what it means where that is alike."""
    lines = []
    for concept, effect in outcome.prompts.items():
        lines.append(
            f"{concept} prompt: with its LoRA the model predicts its references better than bare by "
            f"{_percent(effect.gain[OWN])}, by {_percent(effect.gain[EMPTY])} with an empty prompt; the LoRA changes "
            f"the prediction by {_percent(effect.change[OWN])} and {_percent(effect.change[EMPTY])}"
        )
    for concept, words in outcome.words.items():
        times = f"{words.over_ordinary:.2f} times as strongly as to ordinary ones"
        how = times if math.isfinite(words.over_ordinary) else "by numbers that cannot be compared with ordinary words'"
        lines.append(f"{concept} prompt: the layers of its LoRA that read the prompt answer to its words {how}")
    if outcome.swapped or outcome.asleep:
        lines.append(
            "A prompt does not seem to wake its LoRA where this does about as much for its references under an empty "
            "prompt. Are these the words, trigger word included, that the LoRA was trained with? (A LoRA without a "
            "trigger, that acts on every prompt, looks like this too.) The losses above say how well it is kept under "
            "this prompt, whether it is the right one or not."
        )
    return lines


def _column_lines(outcome: Outcome) -> list[str]:
    after = outcome.result.coefficients
    if len(outcome.sources.by_concept) == 1:
        return []
    if not outcome.shared:
        return ["no layer is changed by two of these LoRAs, so no column is shared"]
    if outcome.fused:
        rest = len(outcome.fitted.loras.layers) - len(outcome.result.routing)
        wide = f", {rest} of too many inputs weighed by columns" if rest else ""
        return [f"{len(outcome.result.routing)} layers are fused{wide} (Mix-of-Show, text encoders left out)"]
    if outcome.result.routing:
        rest = sum(len(layer) > 1 for layer in outcome.fitted.loras.layers.values()) - len(outcome.result.routing)
        return [f"{len(outcome.result.routing)} layers are routed, {rest} of too many ranks weighed by columns"]
    lines = [f"overlap of coefficients: {outcome.before.overlap():.3f} direct merge, {after.overlap():.3f} zipped"]
    if outcome.alignment:
        direct, zipped = (round(_mean(found), 4) + 0.0 for found in outcome.alignment)
        lines.append(f"mean column alignment: {direct:+.4f} direct merge, {zipped:+.4f} zipped")
    owners = ", ".join(f"{who} {share:.0%}" for who, share in after.ownership().items())
    return [*lines, f"columns owned by: {owners}"]
