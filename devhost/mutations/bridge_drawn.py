"""Faults in drawn references and the report."""

from __future__ import annotations

from . import faults

DRAWN = ("tests/inhost/test_contracts_drawn.py",)
RECIPES = tuple(
    f"tests/inhost/test_recipes.py::{test}"
    for test in (
        "test_families_are_drawn_as_they_draw",
        "test_flux_schnell_is_known_by_its_layers",
        "test_a_name_in_the_graph_tells_where_it_is_the_only_one",
        "test_what_the_host_keeps_with_a_model_tells_more_than_the_graph",
        "test_sampling_that_was_put_on_tells",
        "test_loras_are_compared_at_the_noise_levels_that_the_model_draws_at",
    )
)
REPORT = tuple(
    f"tests/inhost/test_report.py::{test}"
    for test in (
        "test_a_dial_is_advised_only_where_it_was_measured_to_help",
        "test_shares_are_those_of_the_losses",
        "test_long_lines_stay_in_the_picture",
    )
)

MUTANTS = [
    *faults(
        "nodes/bridge/drawing/references.py",
        DRAWN,
        ("references are drawn by the direct merge", "0.0 for other in fitted", "1.0 for other in fitted"),
        (
            "bias differences of both LoRAs are on for one's references",
            "Coefficients.ones(fitted.loras)).dialled(alone), 1.0)",
            "Coefficients.ones(fitted.loras).scaled(**alone)), 1.0)",
        ),
        ("both concepts start from one noise", ".index(concept)  #", ".index(concept) * 0  #"),
    ),
    *faults(
        "nodes/bridge/drawing/sampling.py",
        DRAWN,
        ("references that are NaN are used", "if bool(torch.isfinite(samples).all()) else None", ""),
        (
            "thumbnails are not of the model's own space",
            "ready = form.process_in(latents.float())",
            "ready = latents.float()",
        ),
    ),
    *faults(
        "nodes/bridge/drawing/recipes.py",
        RECIPES,
        ("references are drawn without guidance", "takes_guidance(model) else GUIDANCE", "True else 1.0"),
        ("a model with guidance in its prompt is guided twice", "Recipe(STEPS, 1.0 if", "Recipe(STEPS, GUIDANCE if"),
        ("a few-step model is guided", "return Recipe(steps, 1.0, sampler", "return Recipe(steps, GUIDANCE, sampler"),
        (
            "flow models are drawn with the U-Nets' scheduler",
            "_SIMPLE if isinstance(sampling",
            "SCHEDULER if isinstance(sampling",
        ),
        ("one of two models of a graph is taken for this one", "if len(names) != 1:", "if not names:"),
        ("LCM is drawn with euler", '"lcm" if _is_lcm(sampling) else SAMPLER', "SAMPLER"),
        (
            "a model of pictures to pictures is taken for x0",
            "if isinstance(sampling, x0) and not isinstance(sampling, pictures)",
            "if isinstance(sampling, x0)",
        ),
        ("a model that was trained back is drawn in few steps", "0 if undone else", ""),
        ("titles of models are not read", "if key in about", "if False"),
    ),
    *faults(
        "nodes/bridge/network/predictor.py",
        RECIPES,
        ("few-step models are asked at all noise levels", "if recipe.told_by:", "if False:"),
    ),
    *faults(
        "nodes/bridge/network/empty_prompt.py",
        DRAWN,
        (
            "the emptied prompt keeps its pooled output",
            '"pooled_output": torch.zeros_like(pooled)',
            '"pooled_output": pooled',
        ),
    ),
    *faults(
        "nodes/bridge/optimize/report.py",
        DRAWN,
        (
            "the share is of what zipping left",
            "after[concept] / before[concept]:.0%",
            "before[concept] / after[concept]:.0%",
        ),
    ),
    *faults(
        "nodes/bridge/optimize/outcome.py",
        DRAWN,
        ("the overlap in the loss map lacks its weight", "weight * losses.overlap for", "losses.overlap for"),
    ),
    *faults(
        "nodes/bridge/optimize/verdict.py",
        DRAWN,
        (
            "no help is reported as help",
            'if sum(after.values()) >= sum(before.values()):\n        return "Z',
            'if False:\n        return "Z',
        ),
    ),
    *faults(
        "nodes/bridge/optimize/verdict.py",
        REPORT,
        (
            "what is left is taken for what is gone",
            "100 * (1 - share_left(before, after))",
            "100 * share_left(before, after)",
        ),
        ("a dial is advised that gains nothing", ".values()) - _GAIN:", ".values()) + 1:"),
        ("the dial that gains least is advised", "best = min(outcome.tried", "best = max(outcome.tried"),
    ),
    *faults(
        "nodes/bridge/progress/lettering.py",
        REPORT,
        ("lines run out of the picture", "if parts and font.getlength(longer) <= width:", "if parts:"),
    ),
    *faults(
        "nodes/bridge/optimize/outcome.py",
        REPORT,
        ("dials are tried under prompts that wake nothing", "or self.asleep or not", "or not"),
        ("the LoRA that is kept best is turned up", "worst = max(left", "worst = min(left"),
    ),
    *faults(
        "nodes/bridge/optimize/zipping.py",
        ("tests/inhost/test_report.py::test_numbers_of_a_spoiled_model_are_not_the_loras_fault",),
        ("LoRAs are blamed for the model's own numbers", "            _check_bare(error", "            bool(error"),
    ),
]
