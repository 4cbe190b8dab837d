"""Faults in passes and runs inside the host."""

from __future__ import annotations

from . import faults

HOST = ("tests/inhost/test_contracts_host.py",)
HOST_FAMILIES = (
    "tests/inhost/test_contracts_host.py",
    "tests/inhost/test_families.py::test_gradient_is_that_of_autograd_over_copied_weights",
)
PLAN = ("tests/inhost/test_contracts_plan.py",)
DRAWN = ("tests/inhost/test_contracts_drawn.py",)

MUTANTS = [
    *faults(
        "nodes/bridge/network/injection.py",
        HOST,
        (
            "no interrupt in a linear layer's backward",
            (
                "class _Linear(_Layer):\n"
                "    def backward(self, grad: Tensor, shape: torch.Size) -> Tensor:\n"
                "        comfy.model_management.throw_exception_if_processing_interrupted()\n"
            ),
            ("class _Linear(_Layer):\n    def backward(self, grad: Tensor, shape: torch.Size) -> Tensor:\n"),
        ),
        (
            "no interrupt in a convolution's backward",
            (
                "class _Convolution(_Layer):\n"
                "    def backward(self, grad: Tensor, shape: torch.Size) -> Tensor:\n"
                "        comfy.model_management.throw_exception_if_processing_interrupted()\n"
            ),
            ("class _Convolution(_Layer):\n    def backward(self, grad: Tensor, shape: torch.Size) -> Tensor:\n"),
        ),
        ("layers that cannot be injected go unnoticed", "if missing:", "if False:"),
    ),
    *faults(
        "nodes/bridge/network/injection.py",
        HOST_FAMILIES,
        ("what a block adds to is not copied for its norm", "if changes_inputs:", "if False:"),
    ),
    *faults(
        "nodes/bridge/network/injection.py",
        PLAN,
        (
            "the last blocks are run again instead of the first",
            "set(all_blocks[: self.recomputed])",
            "set(all_blocks[self.recomputed :])",
        ),
    ),
    *faults(
        "nodes/bridge/network/checks.py",
        HOST,
        (
            "masks and ControlNets are accepted",
            '("area", "mask", "control", "gligen", "hooks")',
            '("area", "gligen", "hooks")',
        ),
        (
            "latents of a nested kind or of no space are taken",
            "latents.is_nested or not 4 <= latents.ndim <= most or ",
            "",
        ),
    ),
    *faults(
        "nodes/bridge/network/predictor.py",
        HOST,
        (
            "latents are not in the model's own space",
            "base.process_latent_in(latents[c].to(device, torch.float32).clone())",
            "latents[c].to(device, torch.float32).clone()",
        ),
        (
            "both concepts see the style prompt",
            "{concept: conditioning[concept] for concept in",
            '{concept: conditioning["style"] for concept in',
        ),
        (
            "the style prompt is told the content picture's size",
            "self.encode(c, latents) for c, latents in",
            "self.encode(c, next(iter(references.values()))) for c, latents in",
        ),
    ),
    *faults(
        "nodes/bridge/network/session.py",
        HOST,
        (
            "other packs' transformer options are ignored",
            'options = {**options, **self._model_options.get("transformer_options", {})}',
            "pass",
        ),
        (
            "other packs' function wrapper is ignored",
            'wrapper = self._model_options.get("model_function_wrapper")',
            "wrapper = None",
        ),
        ("the model that came in is injected", "patcher = model.clone()", "patcher = model"),
        (
            "no loss scale in fp16",
            "_HALF_PRECISION_LOSS_SCALE if compute_dtype(self._model) == torch.float16 else 1.0",
            "1.0",
        ),
        (
            "a pass goes on although the user has stopped it",
            "comfy.model_management.throw_exception_if_processing_interrupted()",
            "pass",
        ),
    ),
    *faults(
        "nodes/bridge/network/predictor.py",
        PLAN,
        ("a plan for one reference at a time is ignored", "predict.joins = predict.joins and together", "pass"),
    ),
    *faults(
        "nodes/bridge/optimize/zipping.py",
        HOST,
        ("retention that is NaN is a success", "if not all(map(math.isfinite, after.values())):", "if False:"),
        (
            "prompts are not checked",
            'checks.check_conditioning(sources.input_name(concept, "positive"), conditioning[concept])',
            "pass",
        ),
    ),
    *faults(
        "nodes/bridge/optimize/zipping.py",
        ("tests/inhost/test_contracts_files.py::test_what_is_rescued_is_what_was_learned",),
        (
            "what is rescued is not what was kept",
            "_zipped(replace(outcome, result=kept))",
            "_zipped(outcome)",
        ),
    ),
    *faults(
        "nodes/bridge/optimize/zipping.py",
        DRAWN,
        (
            "all references are drawn from the content prompt",
            "model, sources, fitted, concept, conditioning[concept], request",
            'model, sources, fitted, concept, conditioning["content"], request',
        ),
    ),
]
