"""From sockets to a zipped pair: check, load, solve, measure, report."""

from __future__ import annotations

import time
from dataclasses import asdict

import torch

from ...ziplora_core import analysis, solver, zipper
from ...ziplora_core.branch import JoinedPair
from ...ziplora_core.coefficients import Coefficients
from . import loras, predictor
from .progress import Progress
from .report import Outcome, write


def check_inputs(model, sources: loras.LoRASources, latents: dict[str, dict | None]) -> None:
    """Refuse files and latents that do not fit a model. Latents that are not made yet (None) are left out.

    model: ModelPatcher; nothing of it is loaded. Raises ValueError (LoRAFileError for a file).
    """
    loras.fit(sources, model.model)
    for concept, made in latents.items():
        if made is not None:
            predictor.check_latents(f"{concept}_latents", made["samples"], model)


def optimise(
    model,
    sources: loras.LoRASources,
    conditioning: dict[str, list],
    latents: dict[str, dict],
    settings: solver.Settings,
) -> tuple[loras.ZippedLoRA, dict[str, list[float]], str]:
    """Zip a pair on a model: (zipped pair, LOSS_MAP, report).

    model: ModelPatcher, unchanged. conditioning, latents: host values by concept ("content", "style").
    Every check comes before anything is loaded. steps = 0 loads nothing: the direct merge.
    Raises ValueError (LoRAFileError for a file) or FloatingPointError; interrupts pass through.
    """
    for concept in ("content", "style"):
        predictor.check_latents(f"{concept}_latents", latents[concept]["samples"], model)
        predictor.check_conditioning(f"{concept}_positive", conditioning[concept])
    fitted = loras.fit(sources, model.model)
    ones = Coefficients.ones(fitted.pair)
    outcome = Outcome(sources, fitted, settings, before=ones)

    def work(predict: predictor.HostPredictor, joined: JoinedPair, references: solver.References) -> None:
        began = time.monotonic()
        progress = Progress(settings.gradient_steps)
        outcome.result = zipper.close(joined, predict, references, settings, progress.step, progress.layer)
        outcome.seconds = time.monotonic() - began
        outcome.retention = solver.measure_retention(
            joined, predict, references, [ones, outcome.result.coefficients], settings.seed
        )

    if settings.steps == 0:
        outcome.result = solver.direct_merge(fitted.pair)
    else:
        samples = {c: latents[c]["samples"] for c in ("content", "style")}
        predictor.with_predictor(
            model,
            fitted.pair,
            conditioning,
            samples,
            rows=4 * settings.batch_size if settings.gradient_steps else 2,  # as much again for what backward keeps
            checkpoint_blocks=model.load_device.type != "cpu",
            work=work,
        )
    with torch.inference_mode(False):
        outcome.alignment = [analysis.column_alignment(fitted.pair, c) for c in (ones, outcome.result.coefficients)]
    report = write(outcome)
    made = {**asdict(settings), "objective": settings.objective.name}
    zipped = loras.ZippedLoRA(sources, fitted, outcome.result.coefficients, report=report, settings=made)
    return zipped, {"loss": outcome.losses}, report
