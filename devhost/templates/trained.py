"""Graphs that train LoRAs from pictures, and draw with them."""

from __future__ import annotations

from .graph import Graph, Link
from .parts import Parts
from .words import DRAWN, IN_STYLE, NEW_STYLE, NEW_SUBJECT, STYLE_PROMPT, SUBJECT_PROMPT, V

_WHAT, _HOW = "one sks dog", "a picture in szn style"


def from_pictures() -> Graph:
    parts = Parts(
        "7 LoRAs from pictures",
        "# From pictures to a picture\n\nA LoRA of a subject and a LoRA of a style, trained from a picture each as the "
        "paper does, zipped, and drawn with: one graph. More pictures of each (up to five) are better: join them with "
        "*Batch Images*.\n\nTraining is the long part: 1000 steps each. The files stay in *output/loras*; zip them "
        "again with **Load LoRA Pair**.\n\n## What to choose\nThe checkpoint, the pictures, and a rare "
        "word for each in the "
        "prompts (`sks`, `szn`).",
    )
    parts.graph.column("Pictures")
    subject, style = parts.references()
    parts.graph.column("Train")
    trained = [
        parts.train(
            "TrainConceptLoRA",
            f"Train the {which}",
            images=picture,
            prompt=words,
            seed=seed,
            filename_prefix=f"loras/{which}",
        )
        for seed, (which, picture, words) in enumerate(
            (("subject", subject, SUBJECT_PROMPT), ("style", style, STYLE_PROMPT))
        )
    ]
    parts.graph.column("Zip")
    pair = parts.graph.add("PairLoRAs", content_lora=trained[0][0], style_lora=trained[1][0])
    zipped = parts.zip(pair[0], **parts.training_prompts())
    parts.graph.column("Draw")
    model, clip = parts.apply(parts.dial(zipped[0]))
    prompts, empty = parts.prompts(clip, DRAWN), parts.canvas()
    parts.graph.column("Result")
    picture = parts.save(parts.picture(model, prompts, empty))
    parts.report(zipped[2])
    return picture


def _apart(parts: Parts, zipped: Link, wanted: dict[str, tuple[str, float, float]]) -> Graph:
    """A picture for each: heading -> (words, dials of content and style)."""
    parts.graph.column("Draw")
    empty = parts.canvas()
    pictures = []
    for heading, (words, content, style) in wanted.items():
        parts.graph.column(heading)
        dial = parts.graph.add("StyleStrength", zipped_lora=zipped, style_strength=style, content_strength=content)
        model, clip = parts.apply(dial[0])
        pictures.append(parts.picture(model, parts.prompts(clip, words), empty, heading))
    parts.graph.column("Side by side")
    return parts.save(parts.beside(pictures))


def unzip() -> Graph:
    parts = Parts(
        "8 One picture taken apart",
        "# One picture, taken apart\n\n**UnZip LoRA** learns a content LoRA and a style LoRA from one picture: then "
        "its style on a new subject, its subject in a new style, and both together.\n\n## What to "
        "choose\nThe checkpoint, "
        "the picture, and its three prompts: the first says what the other two say, with a rare word for the subject "
        "(`sks`) and one for the style (`szn`).",
    )
    picture = parts.whole()
    parts.graph.column("Take apart")
    apart = parts.train(
        "UnZipLoRA",
        image=picture,
        prompt=DRAWN,
        content_prompt=_WHAT,
        style_prompt=_HOW,
    )
    parts.graph.add("PreviewAny", "Report", source=apart[3])
    return _apart(
        parts,
        apart[1],
        {
            "Its subject, new style": (f"{_WHAT} in {NEW_STYLE} style", 1.0, 0.0),
            "New subject, its style": (f"{NEW_SUBJECT} in {IN_STYLE}", 0.0, 1.0),
            "Both": (DRAWN, 1.0, 1.0),
        },
    )


def b_lora() -> Graph:
    parts = Parts(
        "B-LoRA",
        "# One picture, B-LoRA\n\nSDXL draws content in one of its blocks and style in another "
        "([B-LoRA](https://arxiv.org/abs/2403.14572)). Both are trained on one picture with the prompt *A [v]*; then "
        "each is used alone, and both together.\n\n## What to choose\nThe checkpoint, the picture, and a rare word "
        "(`sks`).",
    )
    picture = parts.whole()
    parts.graph.column("Train two blocks")
    trained = parts.train(
        "TrainConceptLoRA",
        images=picture,
        prompt=V,
        layers="B-LoRA",
        filename_prefix="loras/b_lora",
    )
    parts.graph.column("One block each")
    pair = parts.graph.add("PairLoRAs", content_lora=trained[0], style_lora=trained[0])
    merged = parts.graph.add("DirectMergeLoRA", model=parts.model, lora_pair=pair[0], method="B-LoRA blocks")
    return _apart(
        parts,
        merged[0],
        {
            "Its subject, new style": (f"{V} in {NEW_STYLE} style", 1.0, 0.0),
            "New subject, its style": (f"{NEW_SUBJECT} in sks style", 0.0, 1.0),
            "Both": (V, 1.0, 1.0),
        },
    )
