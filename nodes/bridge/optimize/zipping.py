"""From sockets to a zipped set: check, load, solve, measure, report."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any, TypeVar

import torch
from comfy.model_management import throw_exception_if_processing_interrupted
from torch import Tensor

from ....ziplora_core import analysis, draws, prompts, retention, solver, zipper
from ....ziplora_core.branch import Branch, JoinedSet
from ....ziplora_core.coefficients import Coefficients
from ....ziplora_core.lora_set import LoRASet
from ....ziplora_core.routing import RoutedBranch, routed
from ....ziplora_core.saved import FUSED, ROUTED, ROUTED_LAYERS
from ....ziplora_core.words import WordEffect
from .. import saved
from ..disk import remembered
from ..drawing import recipes, references, sampling
from ..lora import fitting, loras
from ..lora.zipped import ZIPPED, ZippedLoRA
from ..memory import plan, retry
from ..network import checks, predictor
from . import verdict
from .outcome import Outcome, Tried
from .progress import Progress, finish
from .report import report

T = TypeVar("T")


def by_concept(sources: loras.LoRASources, given: Sequence[T], more: Sequence[T]) -> dict[str, T]:
    """What is given of each concept: of the first two by the node's own inputs, of the others by its references.

    Raises ValueError where there are not as many references as other LoRAs, which says what to do.
    """
    concepts = list(sources.by_concept)
    wanted = max(0, len(concepts) - len(given))
    if more and not wanted:
        raise ValueError(
            f"references has {len(more)} ZipLoRA Reference nodes, but there is no LoRA after the first two "
            f"({sources.names()}): disconnect references"
        )
    if len(more) != wanted:
        named = ", ".join(f"{concept} '{source.title}'" for concept, source in sources.by_concept.items())
        raise ValueError(
            f"references has {len(more)} ZipLoRA Reference nodes; expected {wanted}, one for each LoRA after the first "
            f"two, in this order: {named}"
        )
    return dict(zip(concepts, [*given, *more], strict=False))


def check_prompts(sources: loras.LoRASources, without: Sequence[str]) -> None:
    """Raises ValueError for the first of the concepts that have no prompt. One LoRA alone needs the first alone."""
    for concept in without:
        raise ValueError(
            f"{sources.input_name(concept, 'positive')} is not connected; connect a text encode node with the prompt "
            f"that '{sources[concept].title}' ({loras.role(concept)}) was trained with"
        )


def check_inputs(model, sources: loras.LoRASources, latents: dict[str, dict | None]) -> None:
    """Refuse files and latents that do not fit a model. Latents that are not there yet (None) are left out.

    model: ModelPatcher; nothing of it is loaded. Raises ValueError (LoRAFileError for a file).
    """
    loras.refuse_one_lora(sources)
    checks.check_model(model)
    fitting.fit(sources, model.model)
    for concept, given in latents.items():
        if given is not None:
            checks.read_latents(sources.input_name(concept, "latents"), given, model)


def optimize(
    model,
    sources: loras.LoRASources,
    conditioning: dict[str, list],
    latents: dict[str, dict | None],
    settings: solver.Settings,
    request: sampling.ReferenceRequest = references.DEFAULT,
    words: Callable[[LoRASet], Mapping[str, WordEffect]] = lambda _: {},
) -> tuple[ZippedLoRA, dict[str, list[float]], str, Tensor | None]:
    """Zip LoRAs on a model: (zipped, LOSS_MAP, report, rough pictures of what was drawn as a reference).

    model: ModelPatcher, unchanged. conditioning, latents: host values by concept; where there
    are no latents, the concept's LoRA alone draws them. words: of fitted LoRAs, what their prompts' words say to them,
    where a node knows the words. Every check comes before anything is loaded. steps = 0 loads
    nothing: the direct merge.
    Raises ValueError (LoRAFileError for a file) or FloatingPointError, and the host's own exception where memory runs
    out twice; interrupts pass through. What was zipped before of the same, its report saying so, is taken from disk.
    """
    loras.refuse_one_lora(sources)
    checks.check_model(model)
    check_prompts(sources, [concept for concept, given in conditioning.items() if given is None])
    samples: dict[str, Tensor] = {}
    for concept, given in latents.items():
        if given is not None:
            samples[concept] = checks.read_latents(sources.input_name(concept, "latents"), given, model)
        checks.check_conditioning(sources.input_name(concept, "positive"), conditioning[concept])
    fitted = fitting.fit(sources, model.model)
    unlearned = zipper.without_learning(fitted.loras, settings)
    outcome = Outcome(sources, fitted, settings, Coefficients.ones(fitted.loras))
    if unlearned is not None:
        outcome = replace(outcome, result=unlearned)
        outcome = replace(outcome, alignment=_alignment(outcome))
        zipped = _zipped(outcome)
        return zipped, outcome.loss_map, zipped.report, None
    recipe = recipes.of(model)
    given = {"conditioning": conditioning, "latents": dict(samples), "request": asdict(request)}
    given["recipe"] = asdict(recipe)  # files' names tell it, which no content does
    made_of, untold = remembered.key(model, sources, **given, settings=_told(settings))
    known = remembered.find(made_of, sources, fitted)
    if known is not None:
        finish(known.words, known.picture)
        return known.zipped, known.loss_map, known.zipped.report, known.drawn
    outcome = replace(outcome, words=words(fitted.loras))  # before the model is loaded: text encoders need room too
    without = [concept for concept in latents if concept not in samples]
    progress = Progress(settings, len(fitted.loras.concepts), without, recipe.rows(request.count))
    with explained(model, sources, conditioning):
        drawn = {}
        for concept in without:
            watch = partial(progress.drawing, concept)
            drawn[concept] = references.draw(
                model, sources, fitted, concept, conditioning[concept], request, settings.seed, watch
            )
            samples[concept] = drawn[concept].latents
        outcome = replace(outcome, recipe=recipe, drawn=drawn)
        planned = plan.make(model, fitted.loras, conditioning, samples, settings, plan.room_for(model))
        try:
            used, solved = retry.carry_out(
                planned, lambda planned: _solve(planned, model, conditioning, samples, outcome, progress)
            )
        except solver.NotFinite as error:
            raise FloatingPointError(f"{error}; {_rescue(outcome, error.kept)}") from error
    outcome = replace(solved, plan=used, again=used != planned)
    outcome = replace(outcome, alignment=_alignment(outcome))
    zipped, thumbnails = _zipped(outcome), _thumbnails(model, outcome)
    lines = verdict.lines(outcome)
    said = "\n".join(lines)
    picture, drawings = verdict.picture(lines, progress.picture, thumbnails, sources.by_concept), _pictures(thumbnails)
    progress.finish(said, picture)
    untold += remembered.keep(made_of, remembered.Remembered(zipped, outcome.loss_map, said, picture, drawings))
    if untold:
        zipped = replace(zipped, report=f"{zipped.report}  \n{untold}")
    return zipped, outcome.loss_map, zipped.report, drawings


def _solve(
    planned: plan.Plan,
    model,
    conditioning: dict[str, list],
    samples: dict[str, Tensor],
    outcome: Outcome,
    progress: Progress,
) -> Outcome:
    """One try: the outcome with its result and what is measured of it. Raises NotFinite."""
    settings = outcome.settings

    def work(predict: predictor.HostPredictor, joined: JoinedSet, references: solver.References) -> Outcome:
        began = time.monotonic()
        progress.start()
        counted = progress.counted(predict)
        try:
            result = zipper.solve(joined, counted, references, settings, progress.step, progress.layer)
        except FloatingPointError as error:
            _check_bare(error, joined, predict, references, settings.seed)
            raise
        seconds = time.monotonic() - began
        progress.measuring()
        candidates = [outcome.before, _student(joined, result)]
        measured = retention.measure_retention(joined, counted, references, candidates, settings.seed)
        solved = replace(outcome, result=result, seconds=seconds, retention=measured)
        _check_finite(solved)
        progress.prompts()
        solved = replace(solved, prompts=prompts.measure(joined, counted, references, settings.seed))
        dials = solved.dials_to_try
        if not dials:
            return solved
        turned = [_student(joined, result, {concept: strength}) for concept, strength in dials]
        measured = retention.measure_retention(joined, counted, references, turned, settings.seed)
        tried = [Tried(*dial, kept) for dial, kept in zip(dials, measured, strict=True)]
        return replace(solved, tried=tried)

    return predictor.with_predictor(
        model,
        outcome.fitted.loras,
        conditioning,
        samples,
        work,
        bool(planned.together),
        planned.recomputed,
        planned.need,
    )


def _student(
    joined: JoinedSet, result: solver.Result, dials: Mapping[str, float] | None = None
) -> Coefficients | Branch:
    """What came of a run, with these dials, as its retention is measured."""
    coefficients = result.coefficients.scaled(**(dials or {}))
    if not result.routing:
        return coefficients
    return RoutedBranch(joined.student(joined.flatten(coefficients)), result.routing)


def _check_bare(
    error: FloatingPointError,
    joined: JoinedSet,
    predict: solver.Predictor,
    references: solver.References,
    seed: int,
) -> None:
    """Raises FloatingPointError where a run that gained nothing failed on the model's own numbers, not the LoRAs'."""
    if isinstance(error, solver.NotFinite) and error.kept is not None:
        return
    with torch.inference_mode(False), torch.no_grad():
        bare = joined.flatten(Coefficients.ones(joined.loras)).zero_()
        batches = next(draws.spread_batches(references, predict, seed, 1))
        if all(bool(predict(batch, joined.student(bare)).isfinite().all()) for batch in batches):
            return
    seen = str(error).partition(";")[0]
    raise FloatingPointError(
        f"the model that is connected gives numbers that are not finite without these LoRAs too (seen first: {seen}); "
        "take off what other nodes have put on it, or load it in bf16 or fp32"
    ) from error


def _alignment(outcome: Outcome) -> list[dict[str, float]]:
    """Of the columns of both LoRAs, by layer: [direct merge, zipped]. Of none where downs are others instead."""
    alignments: list[dict[str, float]] = []
    if outcome.result.routing:
        return alignments
    with torch.inference_mode(False):
        for coefficients in (outcome.before, outcome.result.coefficients):
            throw_exception_if_processing_interrupted()
            alignments.append(analysis.column_alignment(outcome.fitted.loras, coefficients))
    return alignments


def _told(settings: solver.Settings) -> dict[str, Any]:
    return {**asdict(settings), "objective": settings.objective.name}


def _zipped(outcome: Outcome) -> ZippedLoRA:
    result, settings = outcome.result, _told(outcome.settings)
    method = ZIPPED
    if result.routing:
        settings[ROUTED_LAYERS] = len(result.routing)
        method = FUSED if outcome.fused else ROUTED
    return ZippedLoRA(
        outcome.sources,
        replace(outcome.fitted, loras=routed(outcome.fitted.loras, result.routing)),
        result.coefficients,
        report=report(outcome),
        method=method,
        settings=settings,
        routing=result.routing,
    )


def _check_finite(outcome: Outcome) -> None:
    """Raises NotFinite, or FloatingPointError for what no step found, where the zipped model draws no numbers on
    held-out noise, whatever its losses were."""
    after, result = outcome.retention[1], outcome.result
    if not all(map(math.isfinite, after.values())):
        losses = ", ".join(f"{concept} {loss:g}" for concept, loss in after.items())
        what = f"the loss on held-out noise is not finite ({losses})"
        if not result.history:  # of one piece: there is nothing before it to keep
            raise FloatingPointError(f"{what}; load the model in bf16 or fp32")
        kept = replace(result, stopped=what)
        raise solver.NotFinite(what, len(result.history), outcome.before, result.coefficients, kept)


def _rescue(outcome: Outcome, kept: solver.Result | None) -> str:
    """Save the last finite coefficients of a run that ended early, if it can be done; says where they are."""
    if kept is None:
        return "there are no coefficients to keep"
    zipped = _zipped(replace(outcome, result=kept))
    try:
        return f"the last finite coefficients are in '{saved.save(zipped, 'stopped')}', for Load Zipped LoRA"
    except (ValueError, OSError) as error:
        return f"the last finite coefficients could not be saved: {error}"


@contextlib.contextmanager
def explained(model, sources: loras.LoRASources, conditioning: dict[str, list]) -> Iterator[None]:
    """Where a model fails and a prompt is another model's, the error says so."""
    try:
        yield
    except RuntimeError as error:
        for concept, prompt in conditioning.items():
            try:
                checks.check_width(sources.input_name(concept, "positive"), prompt, model)
            except ValueError as mismatch:
                raise mismatch from error
        raise


def _thumbnails(model, outcome: Outcome) -> dict[str, Tensor]:
    """Rough pictures of the references that were drawn, by concept."""
    thumbnails = {concept: sampling.thumbnails(model, drawn.latents) for concept, drawn in outcome.drawn.items()}
    return {concept: pictures for concept, pictures in thumbnails.items() if pictures is not None}


def _pictures(thumbnails: dict[str, Tensor]) -> Tensor | None:
    return torch.cat(list(thumbnails.values())) if thumbnails else None
