"""Faults in the nodes themselves."""

from __future__ import annotations

from . import faults

NODES = ("tests/inhost/test_contracts_nodes.py",)
CSD = ("tests/inhost/test_csd.py",)
COMPARED = ("tests/inhost/test_compare.py",)
GUIDED = ("tests/inhost/test_guider.py",)

MUTANTS = [
    *faults(
        "nodes/bridge/guider.py",
        GUIDED,
        ("the style pulls from nothing", "(adapted - positive)", "adapted"),
        ("one scale for both", "self.style_scale * (adapted", "self.text_scale * (adapted"),
        ("every patch, the base's too", "patches[len(before) :]", "patches"),
        ("patches at one strength", "strength_model=strength, strength_clip", "strength_model=1.0, strength_clip"),
        (
            "its own prompt is not heard",
            "own = positive if adapted_positive is None else adapted_positive",
            "own = positive",
        ),
        ("the model that came in is hooked", "TwoScales(model.clone())", "TwoScales(model)"),
        ("any checkpoint", 'getattr(adapted, "model", None) is not model.model', "False"),
        ("what is merged is a LoRA", "patch[_MODEL_STRENGTH] != 1", "patch is None"),
        ("other settings are a LoRA", "if others or merged", "if merged"),
        ("a model's options are a LoRA", "_options(adapted.model_options))", "_options(model.model_options))"),
        ("wrappers are a LoRA", "return plain | {(kind, name)", "return plain or {(kind, name)"),
        ("coded weights are hooked", "if any(is_coded(", "if False and any(is_coded("),
        ("all three are always run", "if one_scale:\n                conds", "if False:\n                conds"),
    ),
    *faults(
        "nodes/inputs.py",
        NODES,
        (
            "a value is taken for a link",
            "if value is None or isinstance(value, str | int | float | list | dict):",
            "if False:",
        ),
    ),
    *faults(
        "nodes/optimize.py",
        NODES,
        ("the ridge is ignored", "rule, solver, ridge)", "rule, solver)"),
        (
            "prompts are made before the latents are checked",
            'return missing or ["content_positive", "style_positive"]',
            'return ["content_positive", "style_positive"] or missing',
        ),
    ),
    *faults(
        "nodes/scores.py",
        NODES,
        (
            "the two encoders swapped",
            "style_references, clip_vision, dino, clip, prompt, descriptors)",
            "style_references, dino, clip_vision, clip, prompt, descriptors)",
        ),
    ),
    *faults(
        "nodes/scores.py",
        CSD,
        ("another file under CSD's name is not seen", "style_descriptors.fingerprint(csd)", "csd"),
    ),
    *faults(
        "nodes/bridge/csd.py",
        CSD,
        ("the content head", '"backbone.", "last_layer_style"', '"backbone.", "last_layer_content"'),
        ("the authors' names are not known", 'key.removeprefix("module.")', "key"),
        ("the authors' tensors are not found", 'found.get("model_state_dict", found)', "found"),
        ("the authors' settings are refused", "safe_globals([argparse.Namespace])", "safe_globals([])"),
        ("a part of the file may be missing", "    if lacking:", "    if False:"),
    ),
    *faults(
        "nodes/bridge/scores.py",
        CSD,
        (
            "CSD sees the subject's pictures",
            "picture_features(csd, style, bar)",
            "picture_features(csd, subject, bar)",
        ),
    ),
    *faults(
        "nodes/bridge/lora/zipped.py",
        NODES,
        ("a second dial forgets the first", "self.dial(concept) * strengths.get", "strengths.get"),
    ),
    *faults(
        "nodes/training.py",
        NODES,
        (
            "samples and saves swapped",
            ("        sample_every,\n        save_every,\n"),
            ("        save_every,\n        sample_every,\n"),
        ),
    ),
    *faults(
        "nodes/pair.py",
        NODES,
        (
            "Pair LoRAs swaps the LoRAs",
            "loras.pair(content_lora, style_lora, ",
            "loras.pair(style_lora, content_lora, ",
        ),
    ),
    *faults(
        "nodes/unzip.py",
        NODES,
        (
            "the prompts of the two concepts swapped",
            '"content": content_prompt, "style": style_prompt}',
            '"content": style_prompt, "style": content_prompt}',
        ),
        ("percent are taken for parts", "share=column_share / 100", "share=column_share / 1000"),
    ),
    *faults(
        "nodes/figures.py",
        NODES,
        (
            "the panel shows one merge twice",
            "analysis.column_interference(subject.loras, Coefficients.ones(subject.loras))",
            "analysis.column_interference(subject.loras, subject.coefficients)",
        ),
    ),
    *faults(
        "nodes/bridge/compare.py",
        COMPARED,
        (
            "pictures stand under the wrong heading",
            "pictures[column * len(rows) + row]",
            "pictures[row * len(across) + column]",
        ),
        ("all prompts by the checkpoint's own text encoder", "[column.put(model, clip)[1] for", "[clip for"),
        (
            "a stack's text-encoder strength is forgotten",
            "tensors, source.strength, source.of_clip)",
            "tensors, source.strength, source.strength)",
        ),
        (
            "stacked is the last LoRA alone",
            "one.unfused or one for one in sources)",
            "one.unfused or one for one in sources[-1:])",
        ),
        ("text encoders of LoRAs alone stay fused", "one.unfused or one for one", "one for one"),
        ("the dial is not turned", "zipped.dialled(dict.fromkeys(styles, dial))", "zipped.dialled({})"),
    ),
]
