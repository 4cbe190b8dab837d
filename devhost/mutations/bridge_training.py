"""Faults in training and UnZip."""

from __future__ import annotations

from . import faults

TRAINING = ("tests/inhost/test_contracts_training.py",)
PLAN = ("tests/inhost/test_contracts_plan.py::test_class_pictures_are_planned_for_as_so_many_more_rows",)
NODES = ("tests/inhost/test_contracts_nodes.py",)

MUTANTS = [
    *faults(
        "nodes/bridge/training/loading.py",
        PLAN,
        (
            "class pictures cost no memory",
            "settings.batch_size * (2 if data.pictures.priors else 1)",
            "settings.batch_size",
        ),
    ),
    *faults(
        "nodes/bridge/unzip.py",
        PLAN,
        ("one LoRA's memory is planned for two", "loras_at_once=2", "loras_at_once=1"),
    ),
    *faults(
        "nodes/bridge/training/denoiser.py",
        TRAINING,
        (
            "samples are drawn without guidance",
            "plain[0] + recipe.cfg * (wanted - plain[0]) if plain else wanted",
            "wanted",
        ),
    ),
    *faults(
        "nodes/bridge/training/loading.py",
        TRAINING,
        (
            "samples are guided away from the prompt itself",
            'prompts["empty"] = zeros(data.prompts[0])',
            'prompts["empty"] = data.prompts[0]',
        ),
        (
            "latents are not in the model's own space",
            "training.Example(into(e.latents.float().clone()), e.prompt)",
            "training.Example(e.latents.float().clone(), e.prompt)",
        ),
    ),
    *faults(
        "nodes/bridge/drawing/sampling.py",
        TRAINING,
        ("every batch of class pictures is the same", "request, seed + len(latents)", "request, seed"),
    ),
    *faults(
        "nodes/bridge/training/pictures.py",
        TRAINING,
        ("pictures are squashed into their bucket", '"lanczos", "center"', '"lanczos", "disabled"'),
    ),
    *faults(
        "nodes/bridge/training/denoiser.py",
        TRAINING,
        ("one picture's size is told for all", "key = (str(prompt), latents.shape[1:])", 'key = (str(prompt), "")'),
        (
            "prompts of two lengths share a pass",
            "return None if context is None else tuple(context.shape)",
            "return None",
        ),
    ),
    *faults(
        "nodes/bridge/training/lora_file.py",
        TRAINING,
        ("another trainer's steps count", 'if "ziplora_settings" in metadata else 0', ""),
    ),
    *faults(
        "nodes/bridge/training/lora_file.py",
        ("tests/inhost/test_custom_diffusion.py", "tests/inhost/test_ed_lora.py"),
        ("one that fails takes the others along", "            failure = error\n", "            raise\n"),
        ("a word that is behind is unsaid", "steps >= steps:\n            return []", "steps:\n            return []"),
    ),
    *faults(
        "nodes/bridge/training/run.py",
        TRAINING,
        (
            "the last tenth of the losses is the first",
            "(history[:tenth], history[-tenth:])",
            "(history[:tenth], history[:tenth])",
        ),
    ),
    *faults(
        "nodes/bridge/unzip.py",
        TRAINING,
        ("each LoRA sees the other's prompt", "for c in contexts[1:3])", "for c in contexts[2:0:-1])"),
        (
            "the empty prompt stands for the whole",
            "rows_as_used(data.pictures.sets[0][0], whole, empty)",
            "rows_as_used(data.pictures.sets[0][0], empty, whole)",
        ),
        ("prompts of different lengths stay so", "math.lcm(*(c.shape[1] for c in contexts))", "contexts[0].shape[1]"),
        (
            "the file that is ahead counts the steps",
            "halves, min(steps_before",
            "halves, max(steps_before",
        ),
    ),
    *faults(
        "nodes/bridge/scores.py",
        NODES,
        (
            "the subject is scored by CLIP",
            "alignment(picture_features(dino, images, bar), picture_features(dino, subject, bar))",
            "alignment(pictures, picture_features(clip_vision, subject, bar))",
        ),
    ),
]
