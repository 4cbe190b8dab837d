"""From sockets to a zipped pair: check, load, solve, measure, report."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import partial

import torch
from comfy.model_management import throw_exception_if_processing_interrupted
from torch import Tensor

from ...ziplora_core import analysis, prompts, solver, zipper
from ...ziplora_core.branch import JoinedPair
from ...ziplora_core.coefficients import Coefficients
from . import fitting, loras, plan, predictor, saved, verdict
from . import references as drawing
from .progress import Progress
from .report import Outcome, write


def check_inputs(model, sources: loras.LoRASources, latents: dict[str, dict | None]) -> None:
    """Refuse files and latents that do not fit a model. Latents that are not made yet (None) are left out.

    model: ModelPatcher; nothing of it is loaded. Raises ValueError (LoRAFileError for a file).
    """
    fitting.fit(sources, model.model)
    for concept, made in latents.items():
        if made is not None:
            predictor.read_latents(f"{concept}_latents", made, model)


def optimise(
    model,
    sources: loras.LoRASources,
    conditioning: dict[str, list],
    latents: dict[str, dict | None],
    settings: solver.Settings,
    asked: drawing.Asked = drawing.DEFAULT,
) -> tuple[loras.ZippedLoRA, dict[str, list[float]], str, Tensor | None]:
    """Zip a pair on a model: (zipped pair, LOSS_MAP, report, rough pictures of what was drawn as a reference).

    model: ModelPatcher, unchanged. conditioning, latents: host values by concept ("content", "style"); where there
    are no latents, the concept's LoRA alone draws them. Every check comes before anything is loaded. steps = 0 loads
    nothing: the direct merge.
    Raises ValueError (LoRAFileError for a file) or FloatingPointError, and the host's own exception where memory runs
    out twice; interrupts pass through.
    """
    samples: dict[str, Tensor] = {}
    for concept in ("content", "style"):
        given = latents[concept]
        if given is not None:
            samples[concept] = predictor.read_latents(f"{concept}_latents", given, model)
        predictor.check_conditioning(f"{concept}_positive", conditioning[concept])
    fitted = fitting.fit(sources, model.model)
    ones = Coefficients.ones(fitted.pair)
    outcome = Outcome(sources, fitted, settings, before=ones)
    without = [concept for concept in latents if concept not in samples]

    def work(
        planned: plan.Plan, predict: predictor.HostPredictor, joined: JoinedPair, references: solver.References
    ) -> None:
        began = time.monotonic()
        progress.start(planned.moments)
        counted = progress.counted(predict)
        outcome.result = zipper.close(
            joined, counted, references, settings, progress.step, progress.layer, planned.moments
        )
        outcome.seconds = time.monotonic() - began
        progress.measuring()
        outcome.retention = solver.measure_retention(
            joined, counted, references, [ones, outcome.result.coefficients], settings.seed
        )
        _check_finite(outcome)
        progress.prompts()
        outcome.prompts = prompts.measure(joined, counted, references, settings.seed)

    if settings.steps == 0:
        outcome.result = solver.direct_merge(fitted.pair)
    else:
        progress = Progress(settings, fitted.pair, without, drawing.Drawn.rows(asked))

        def attempt(planned: plan.Plan) -> None:
            predictor.with_predictor(
                model,
                fitted.pair,
                conditioning,
                samples,
                partial(work, planned),
                planned.together,
                planned.recomputed,
                planned.need,
            )

        with _explained(model, conditioning):
            for concept in without:
                watch = partial(progress.drawing, concept)
                drawn = drawing.draw(
                    model, sources, fitted, concept, conditioning[concept], asked, settings.seed, watch
                )
                outcome.drawn[concept], samples[concept] = drawn, drawn.latents
            room = plan.room_for(model)
            planned = plan.make(model, fitted.pair, conditioning, samples, settings, room)
            try:
                outcome.plan = plan.carry_out(planned, attempt)
            except solver.NotFinite as error:
                raise FloatingPointError(f"{error}; {_rescue(outcome, error.kept)}") from error
            outcome.again = outcome.plan != planned
    with torch.inference_mode(False):
        for coefficients in (ones, outcome.result.coefficients):
            throw_exception_if_processing_interrupted()
            outcome.alignment.append(analysis.column_alignment(fitted.pair, coefficients))
    zipped, drawn = _zipped(outcome), _shown(model, outcome)
    if settings.steps:
        lines = verdict.lines(outcome)
        progress.finish("\n".join(lines), verdict.picture(lines, progress.picture, drawn))
    return zipped, outcome.loss_map, zipped.report, _pictures(drawn)


def _zipped(outcome: Outcome) -> loras.ZippedLoRA:
    made = {**asdict(outcome.settings), "objective": outcome.settings.objective.name}
    coefficients = outcome.result.coefficients
    return loras.ZippedLoRA(outcome.sources, outcome.fitted, coefficients, report=write(outcome), settings=made)


def _check_finite(outcome: Outcome) -> None:
    """Raises NotFinite where the zipped model draws no numbers on held-out noise, whatever its losses were."""
    after, result = outcome.retention[1], outcome.result
    if not all(map(math.isfinite, after.values())):
        what = f"the loss on held-out noise is not finite (content {after['content']:g}, style {after['style']:g})"
        kept = replace(result, stopped=what)
        raise solver.NotFinite(what, len(result.history), outcome.before, result.coefficients, kept)


def _rescue(outcome: Outcome, kept: solver.Result | None) -> str:
    """Save the last finite coefficients of a run that ended early, if it can be done; says where they are."""
    if kept is None:
        return "there are no coefficients to keep"
    outcome.result, outcome.retention = kept, []
    try:
        return f"the last finite coefficients are in '{saved.save(_zipped(outcome), 'stopped')}', for Load Zipped LoRA"
    except (ValueError, OSError) as error:
        return f"the last finite coefficients could not be saved: {error}"


@contextlib.contextmanager
def _explained(model, conditioning: dict[str, list]) -> Iterator[None]:
    """Where a model fails and a prompt is another model's, the error says so."""
    try:
        yield
    except RuntimeError as error:
        for concept, prompt in conditioning.items():
            try:
                predictor.check_width(f"{concept}_positive", prompt, model)
            except ValueError as found:
                raise found from error
        raise


def _shown(model, outcome: Outcome) -> dict[str, Tensor]:
    """Rough pictures of the references that were drawn, by concept."""
    shown = {concept: drawing.thumbnails(model, drawn.latents) for concept, drawn in outcome.drawn.items()}
    return {concept: pictures for concept, pictures in shown.items() if pictures is not None}


def _pictures(shown: dict[str, Tensor]) -> Tensor | None:
    return torch.cat(list(shown.values())) if shown else None
