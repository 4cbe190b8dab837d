"""Faults in pairs: fitted, dialled, put on a model."""

from __future__ import annotations

from . import faults

PAIRS = ("tests/inhost/test_contracts_pairs.py",)
PAIRS_DENSE_FORMATS = (
    "tests/inhost/test_contracts_pairs.py",
    "tests/inhost/test_dense_formats.py::test_base_weights_are_read_without_what_the_host_has_patched_in",
)
FILES = ("tests/inhost/test_contracts_files.py",)
LIBRARIES = ("tests/inhost/test_library_files.py",)
KINDS = ("tests/inhost/test_library_kinds.py",)
TEXT_ENCODERS = ("tests/inhost/test_library_text_encoders.py",)
NOTES = ("tests/inhost/test_library_notes.py",)

MUTANTS = [
    *faults(
        "nodes/bridge/apply.py",
        PAIRS,
        (
            "text-encoder parts at the node's strength alone",
            "_text_encoder(clip, source, strength * zipped.clip_strength(concept))",
            "_text_encoder(clip, source, strength)",
        ),
        ("text-encoder parts of any size are put on", "if _fits(clip.cond_stage_model, key, patch)", "if True"),
        (
            "bias differences ignore the strength of the whole",
            "fitted.passthrough[concept], strength * zipped.strength(concept), names)",
            "fitted.passthrough[concept], zipped.strength(concept), names)",
        ),
        (
            "coefficients of the two concepts swapped",
            "_adapter(layer, zipped.coefficients.of_layer(name), zipped",
            "_adapter(layer, dict(zip(layer, [*zipped.coefficients.of_layer(name).values()][::-1])), zipped",
        ),
        (
            "layers that the model lacks go unnoticed",
            "missing = [k for k in patches if k not in applied]",
            "missing = []",
        ),
        ("any strength is taken", 'STRENGTH.check("strength", strength)', "pass"),
    ),
    *faults(
        "nodes/bridge/lora/fitting.py",
        PAIRS,
        (
            "a pair fitted to one model is used on another",
            "if known is None or known[0]() is not model:",
            "if known is None:",
        ),
        (
            "dense updates ignore the file's strength",
            "[(strength, patch, 1.0, None, turned)]",
            "[(1.0, patch, 1.0, None, turned)]",
        ),
        ("dense updates may be NaN", "if not all_finite(delta):", "if False:"),
        (
            "of two updates of one weight one is kept",
            "factors if key not in self.factors else matrices.side_by_side(self.factors[key], factors)",
            "factors",
        ),
        ("what the model lacks is not told", "unused += fitting.absent", "unused += []"),
    ),
    *faults(
        "nodes/bridge/lora/matrices.py",
        PAIRS,
        (
            "parts of a fused weight land in its first rows",
            "whole.narrow(axis, start, length)",
            "whole.narrow(axis, 0, length)",
        ),
    ),
    *faults(
        "nodes/bridge/lora/base_weights.py",
        PAIRS_DENSE_FORMATS,
        (
            "dense updates are made from a weight that is patched",
            "backups[0][key].weight if backups else",
            "comfy.utils.get_attr(model, key) if backups else",
        ),
    ),
    *faults(
        "nodes/bridge/lora/keys.py",
        FILES,
        (
            "SD 1.5's layers under names that its trainers do not use",
            'self.diffusers.get(weight) if self.family.startswith("SD1") else None',
            "None",
        ),
    ),
    *faults(
        "ziplora_core/formats.py",
        FILES,
        ("peft's first text encoder goes to the second's place", (', "lora_te1_"),\n)'), (', "lora_te2_"),\n)')),
    ),
    *faults(
        "ziplora_core/formats.py",
        PAIRS,
        ("SDXL's prompts are taken for SD 2's", '2048: "SDXL"', '2048: "SD 2"'),
        ("text encoders under SD 3's names are unknown", "|te\\d?[._]", ""),
    ),
    *faults(
        "nodes/bridge/lora/loras.py",
        FILES,
        (
            "Load LoRA Pair swaps the strengths",
            '{"content": (content, content_strength), "style": (style, style_strength)}',
            '{"content": (content, style_strength), "style": (style, content_strength)}',
        ),
        ("a file that changes while it is read is taken", "if hashes.key(path) != file:", "if False:"),
    ),
    *faults(
        "nodes/bridge/lora/zipped.py",
        FILES,
        (
            "dials of the two concepts swapped",
            "self.sources[concept].strength * self.dial(concept)",
            "self.sources[concept].strength * self.dial([*self.dials, concept][0])",
        ),
    ),
    *faults(
        "nodes/bridge/lora/loras.py",
        PAIRS,
        (
            "Pair LoRAs swaps the strengths",
            '("content", content, content_strength), ("style", style, style_strength)',
            '("content", content, style_strength), ("style", style, content_strength)',
        ),
        ("LoRAs of other nodes are taken unchecked", "check_tensors(name, tensors)", "pass"),
        (
            "one LoRA on both sockets is zipped",
            "    if same is not None:\n        raise SameLoRAError(\n",
            "    if False:\n        raise SameLoRAError(\n",
        ),
        ("float8 is compared as it is", "if one.element_size() == 1:", "if one.element_size() == 0:"),
        (
            "a file for the text encoder alone is let through when queued",
            "255))) if alone else",
            "255))) if False else",
        ),
    ),
    *faults(
        "nodes/bridge/lora/hashes.py",
        PAIRS,
        ("files without numbers are one file", "if here.st_ino and there.st_ino:", "if True:"),
        ("links without numbers are two files", "os.path.normcase(os.path.realpath(path))", "path"),
    ),
    *faults(
        "nodes/bridge/lora/adapters.py",
        PAIRS,
        ("a product of matrices that do not meet fits", "if rank and rank == right.shape[0] else 0", "if rank else 0"),
    ),
    *faults(
        "nodes/bridge/lora/fitting.py",
        LIBRARIES,
        ("rows that the host keeps in another order stay", "if turned is None else replace(", "if True else replace("),
        ("a scale for each row counts as in the host everywhere", "(ours or self.trained):", "False:"),
    ),
    *faults(
        "nodes/bridge/lora/dora.py",
        LIBRARIES,
        ("DoRA is divided by the norm of the weight", "norms = rows.norm(", "norms = before.flatten(1).norm("),
    ),
    *faults(
        "nodes/bridge/lora/adapters.py",
        LIBRARIES,
        ("a Tucker core is left to the host", "whole = whole * (1.0 if", "return patch; (1.0 if"),
        ("LoKr's alpha is lost with its core", "(1.0 if alpha is None else alpha / right.shape[0])", "1.0"),
    ),
    *faults(
        "nodes/bridge/lora/diffusers_names.py",
        NOTES,
        ("all levels count as even", "if is_even(config):", "if True:"),
    ),
    *faults(
        "nodes/bridge/lora/spellings.py",
        NOTES,
        ("kohya's constraint is the host's", " * blocks.shape[0] * blocks.shape[1]", ""),
        ("the stock loader's conversions are left out", "tensors = convert_lora(tensors)", "pass"),
    ),
    *faults(
        "nodes/bridge/lora/adapter_config.py",
        NOTES,
        ("another LoRA's configuration is used", "if not adapter_config.fits(tensors, configs):", "if False:"),
        ("any folder's configuration is used", "own = os.path", "own = True or os.path"),
    ),
    *faults(
        "nodes/bridge/lora/own_adapters.py",
        KINDS,
        ("what comes out keeps its bias", "if not patch.axis and patch.fits(shape):", "if False:"),
        (
            "rows of a layer in another order are scaled as they are",
            "self.delta(function(weight))",
            "self.delta(weight)",
        ),
    ),
    *faults(
        "ziplora_core/other_kinds.py",
        KINDS,
        ("columns turn the other way", "onb,ncb->onc", "onb,nbc->onc"),
        ("the series ends with a double term", "(1 if exponent == last else 2)", "2"),
    ),
    *faults(
        "nodes/bridge/lora/text_encoders.py",
        TEXT_ENCODERS,
        ("text encoders have the host's names alone", "return {**more, **hosts}", "return hosts"),
    ),
]
