"""Faults in the ways from LoRAs to its coefficients."""

from __future__ import annotations

from . import faults

SOLVER = ("tests/core/test_solver.py", "tests/core/test_objective.py", "tests/core/test_descent.py")
LAYERWISE = ("tests/core/test_layerwise.py",)
ZIPPER = ("tests/core/test_solver.py", "tests/core/test_descent.py")

MUTANTS = [
    *faults(
        "ziplora_core/draws.py",
        SOLVER,
        (
            "only the first reference",
            "torch.randint(latents.shape[0], (rows,), generator=generator)",
            "torch.zeros(rows, dtype=torch.int64)",
        ),
        ("training ignores the seed", "manual_seed(settings.seed % 2**63)", "manual_seed(0)"),
        ("measuring ignores the seed", "manual_seed(seed % 2**63)", "manual_seed(0)"),
        (
            "the same noise in each step",
            "torch.randn(picked.shape, generator=generator)",
            "torch.randn(picked.shape, generator=torch.Generator().manual_seed(1))",
        ),
        ("measured at the ends of the schedule", "(i + 0.5) / draws", "i / draws"),
        ("measured at one timestep", "(i + 0.5) / draws", "0.5 / draws"),
        ("a schedule of a thousand steps", "(row * predictor.timesteps).long()", "(row * 1000).long()"),
        ("timesteps not spread", "GOLDEN = (5**0.5 - 1) / 2", "GOLDEN = 0.5"),
        ("steps share timesteps", "itertools.count(step=settings.batch_size)", "itertools.count(step=1)"),
        ("one timestep for the whole run", "itertools.count(step=settings.batch_size)", "itertools.repeat(0)"),
        ("passes joined against the predictor's word", "if joins else number", "if True else number"),
    ),
    *faults(
        "ziplora_core/retention.py",
        SOLVER,
        (
            "retentions swapped",
            "parts = zip(rows, *(",
            "parts = zip([*rows][::-1], *(",
        ),
        ("measured sum, not mean", "total[concept] += loss.item() / draws", "total[concept] += loss.item()"),
        (
            "measured without the merged pair",
            "student = predictor(batch, merged.student(flat))",
            "student = predictor(batch, joined.student(flat))",
        ),
        (
            "measured against the merged pair's LoRAs",
            "joined.teacher(batch.concept_index))\n                for",
            "merged.teacher(batch.concept_index))\n                for",
        ),
        (
            "measured by another retention",
            "teacher, rows, retention)",
            "teacher, rows, norm)",
        ),
    ),
    *faults(
        "ziplora_core/gradient.py",
        SOLVER,
        (
            "the gradient accumulates over steps",
            "adam.step()\n            adam.zero_grad()",
            "adam.step()",
        ),
        ("stops far too early", "_ZERO_OVERLAP = 1e-4", "_ZERO_OVERLAP = 0.9"),
        ("stops a little too early", "_ZERO_OVERLAP = 1e-4", "_ZERO_OVERLAP = 1e-2"),
        ("never stops early", "_ZERO_OVERLAP = 1e-4", "_ZERO_OVERLAP = 0"),
        (
            "stops where signs cancel",
            "(one * other).abs().mean() < _ZERO_OVERLAP",
            "(one * other).mean().abs() < _ZERO_OVERLAP",
        ),
        (
            "the loss scale is never lowered",
            "skipped, scale = skipped + 1, scale / 4",
            "skipped, scale = skipped + 1, scale",
        ),
        ("the gradient keeps its scale", "gradient.div_(scale)", "gradient.div_(1.0)"),
        ("one overflow ends the run", "MAX_SKIPPED = 12", "MAX_SKIPPED = 0"),
        ("overflows add up over a run", "            skipped = 0\n", ""),
        ("overlap's gradient without its weight", "of_two * (settings.similarity_lambda * scale)", "of_two * scale"),
        (
            "overlap's gradient without the scale",
            "of_two * (settings.similarity_lambda * scale)",
            "of_two * settings.similarity_lambda",
        ),
        ("retention's gradient without the scale", "losses.values())).sum() * scale", "losses.values())).sum()"),
        ("total without the overlap's weight", "+ settings.similarity_lambda * overlap)", "+ overlap)"),
        ("retentions not weighted", "loss * weights[concept]", "loss"),
        ("weights upside down", "1 / value if value else 1.0", "value if value else 1.0"),
        ("weights of other retentions", ", retention=settings.objective.retention\n", "\n"),
        (
            "one step too many in the mean",
            "settings.steps - step.index < averaged",
            "settings.steps - step.index <= averaged",
        ),
        ("no mean over steps", "max(1, settings.steps // 2), _BETAS_FROM_START", "1, _BETAS_FROM_START"),
        ("Adam's memory from a start", "_BETAS_FROM_START = (0.8, 0.999)", "_BETAS_FROM_START = (0.5, 0.999)"),
        ("Adam's memory from ones", "averaged, betas = 1, (0.9, 0.999)", "averaged, betas = 1, (0.5, 0.999)"),
        (
            "the start is ignored",
            "flat = joined.flatten(start)",
            "flat = joined.flatten(Coefficients.ones(joined.loras))",
        ),
        ("the rate is ignored", "lr=settings.learning_rate", "lr=0.01"),
        ("last finite coefficients forgotten", "finite.copy_(flat.detach())", "pass"),
        ("objectives' terms of the last batch", "values[concept] = loss.item()", "values[concept] = 1.0"),
    ),
    *faults(
        "ziplora_core/solver.py",
        SOLVER,
        ("named is the start", "= now.most_changed(start)", "= start.most_changed(start)"),
        ("steps announced that are not taken", '0 if self.solver == "layerwise" else self.steps', "self.steps"),
    ),
    *faults(
        "ziplora_core/checks.py",
        SOLVER,
        ("no lower bound", "self.low <= value <= self.high", "value <= self.high"),
        ("the lower bound is out", "self.low <= value <= self.high", "self.low < value <= self.high"),
    ),
    *faults(
        "ziplora_core/layerwise.py",
        LAYERWISE,
        ("ridge ignored", "shares.merge(joined.loras, ridge,", "shares.merge(joined.loras, 1.0,"),
        ("activity ignored", "lambda name, layer: activity.of(name, list(layer))", "shares.everywhere"),
        ("seed ignored", "predictor, seed + _SEED, draws)", "predictor, _SEED, draws)"),
        ("solved on the noise that it is measured by", "_SEED = 0x1A7E", "_SEED = 0x5EED"),
        ("samples not counted", "self.counts.get(key, 0) + len(rows)", "len(rows)"),
        ("the last call alone", "self.sums[key] + squares if key in self.sums else squares", "squares"),
        ("squares in half precision", "torch.promote_types(x.dtype, torch.float32)", "x.dtype"),
        ("norms not squared", "dtype=wide).square().float()", "dtype=wide).float()"),
        ("a convolution's columns are its pixels", "else mine.movedim(1, -1)", "else mine"),
        ("one pass only", "DRAWS = 8", "DRAWS = 1"),
        (
            "concepts swapped",
            "for concept, mine in self.own(x).items()",
            "for concept, mine in zip([*self._rows][::-1], self.own(x).values())",
        ),
    ),
    *faults(
        "ziplora_core/zipper.py",
        ZIPPER,
        ("the gradient starts from ones", "settings, on_step, start)", "settings, on_step)"),
        ("ridge ignored", "solved, settings.ridge)", "solved, 1.0)"),
        ("seed ignored", "references, settings.seed, solved", "references, 0, solved"),
        ("layers not told", "            on_layer(layer)", "            pass"),
        ("steps not told", "settings, on_step, start)", "settings, None, start)"),
        ("no steps are solved", "if settings.steps == 0:", "if settings.steps < 0:"),
        ("layer-wise is followed by the gradient", 'if settings.solver == "layerwise":', "if False:"),
    ),
    *faults(
        "ziplora_core/prompts.py",
        ("tests/core/test_prompts.py",),
        ("an error that is no number is none", "if not (above.isfinite() and below.isfinite()):", "if False:"),
        ("a gain that is not finite wakes", "if not (math.isfinite(prompted) and math.isfinite(empty)):", "if False:"),
        (
            "rows of the two concepts swapped",
            "zip(rows, torch.split(norms",
            "zip([*rows][::-1], torch.split(norms",
        ),
        ("every prompt is the own one", "prompted = replace(batch, prompt=prompt)", "prompted = batch"),
        ("a LoRA is compared with itself", "joined.student(bare)", "joined.teacher(batch.concept_index)"),
        ("another prompt is tried where none need be", "and not all(effect.fires for", "and any(effect.fires for"),
    ),
]
