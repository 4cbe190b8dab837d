"""Graphs of other papers' ways: without zipping, or by training something else than a LoRA."""

from __future__ import annotations

from .graph import Graph, Link, Node
from .parts import Parts
from .words import (
    CLASSES,
    DRAWN,
    FIRST,
    NEW_SUBJECT,
    OF_A_MANNER,
    OF_A_WORD,
    OF_BOTH,
    OF_STYLE,
    OF_SUBJECT,
    ON_A_BEACH,
    PLAIN_STYLE,
    RARE,
    SECOND,
    WORDS_OF_EACH,
)


def k_lora() -> Graph:
    parts = Parts(
        "K-LoRA",
        "# K-LoRA beside a zip\n\nTwo ways to put a subject's and a style's LoRA together, with the same seed. At the "
        "left the two are **zipped**: one merge, learned once, the same in every step. At the right "
        "**K-LoRA** ([paper](https://arxiv.org/abs/2502.18461)): nothing is learned; in each layer and step one of the "
        "two acts alone, first mostly the subject's, then mostly the style's. It can be neither saved nor exported."
        "\n\n## What to choose\nThe checkpoint, the LoRA files and the words of their training prompts: what stands "
        "here is made up.",
    )
    parts.graph.column("LoRAs")
    pair = parts.pair()
    prompts = parts.training_prompts()
    parts.graph.column("Zipped")
    zipped = parts.zip(pair, **prompts)
    parts.graph.column("On the model")
    applied = parts.apply(zipped[0])
    switched = parts.graph.add("KLoRA", model=parts.model, lora_pair=pair, clip=parts.clip)
    parts.report(switched[2])
    empty = parts.canvas()
    pictures = []
    for heading, (model, clip) in {"Zipped": applied, "K-LoRA": (switched[0], switched[1])}.items():
        parts.graph.column(f"Draw: {heading}")
        pictures.append(parts.picture(model, parts.prompts(clip, DRAWN), empty, heading))
    parts.graph.column("Zipped, K-LoRA", 640)
    return parts.save(parts.beside(pictures))


def two_scales() -> Graph:
    parts = Parts(
        "Style of one picture (two scales)",
        "# The style of one picture, by two scales\n\nA LoRA is trained on one picture of a style. "
        "**Two-Scale Guider** then draws with it: *text_scale* says how strongly the prompt is followed, "
        "*style_scale* how strongly the LoRA pulls. More style than prompt: raise the second, lower the first. "
        "[StyleDrop](https://arxiv.org/abs/2306.00983) samples so; its own model cannot be had, so this is a stand-in."
        "\n\nTraining is the long part; the scales can be turned without training again. For a LoRA file that you "
        "have, put *Load LoRA* in the place of training and *Load LoRA Model*.\n\n## What to choose\nThe "
        "checkpoint, the picture, a prompt that says what is seen on it and names its style, and what to draw, in the "
        "same words of style.",
    )
    parts.graph.column("Picture")
    picture = parts.reference("style")
    parts.graph.column("Train")
    trained = parts.train(
        "TrainConceptLoRA",
        "Train the style",
        images=picture,
        prompt=f"a house in {PLAIN_STYLE}",
        layers="all linear",
        filename_prefix="loras/style",
    )
    parts.graph.column("Guide")
    adapted = parts.graph.add(
        "LoraModelLoader", "The style on the model", model=parts.model, lora=trained[0], strength_model=1.0
    )
    prompts = parts.prompts(parts.clip, f"{NEW_SUBJECT} in {PLAIN_STYLE}")
    guider = parts.graph.add(
        "TwoScaleGuider", model=parts.model, adapted_model=adapted[0], positive=prompts[0], negative=prompts[1]
    )
    parts.graph.column("Draw")
    sampled = parts.graph.add(
        "SamplerCustomAdvanced",
        noise=parts.graph.add("RandomNoise")[0],
        guider=guider[0],
        sampler=parts.graph.add("KSamplerSelect", sampler_name="euler")[0],
        sigmas=parts.graph.add("BasicScheduler", model=parts.model, scheduler="normal", steps=30, denoise=1.0)[0],
        latent_image=parts.canvas(),
    )
    parts.graph.column("Result")
    return parts.save(parts.graph.add("VAEDecode", samples=sampled[0], vae=parts.vae)[0])


def _replaced(parts: Parts, title: str, text: str | Link, words: dict[str, Link]) -> Link:
    """A text with what is only known after training in the place of each sign."""
    for sign, word in words.items():
        of = title if isinstance(text, str) else f"{title}: {sign}"
        text = parts.graph.add("StringReplace", of, string=text, find=sign, replace=word)[0]
    assert isinstance(text, Link)
    return text


def embedding() -> Graph:
    parts = Parts(
        "An embedding from pictures",
        "# A word of your own, from pictures\n\n**Train Embedding** learns what one word means "
        "([Textual Inversion](https://arxiv.org/abs/2208.01618)); the model stays as it is. The file, a few kilobytes "
        "in *models/embeddings*, works in any prompt of this model family: *a photo of a embedding:concept_00001_ on a "
        "beach*. It says what the model can draw already and has no word for; what the model cannot draw, a LoRA "
        "learns better (template *7 LoRAs from pictures*).\n\nTraining is the long part: 5000 steps. More pictures (up "
        "to five) are better: join them with *Batch Images*.\n\n## What to choose\nThe checkpoint, the picture, "
        "*initial_word*: a common word that is like it, and what to draw: `*` stands for the new word.",
    )
    parts.graph.column("Picture")
    picture = parts.reference("subject")
    parts.graph.column("Train", 400)
    word = parts.train("TrainEmbedding", images=picture, initial_word="dog")
    parts.report(word[2])
    parts.graph.column("Draw")
    text = _replaced(parts, "What to draw", ON_A_BEACH, {"*": word[0]})
    prompts, empty = parts.prompts(parts.clip, text, "With the word"), parts.canvas()
    parts.graph.column("Result")
    return parts.save(parts.picture(parts.model, prompts, empty))


def _trained(parts: Parts, kind: str, name: str, **words: tuple[str, str]) -> list[Node]:
    """A subject and a style, each learned from its picture. words: an input -> what it is for each of the two."""
    parts.graph.column("Pictures")
    pictures = parts.references()
    parts.graph.column("Train", 400)
    found = []
    for number, which in enumerate(("subject", "style")):
        own = {key: both[number] for key, both in words.items()}
        prefix = f"loras/{name}_{which}"
        found.append(parts.train(kind, f"Train the {which}", images=pictures[number], **own, filename_prefix=prefix))
    return found


def custom_diffusion() -> Graph:
    parts = Parts(
        "Custom Diffusion",
        "# Two concepts, merged by Custom Diffusion\n\nA subject and a style, each learned from its picture: the "
        "layers that read the prompt are trained in full, and a word for each "
        "([paper](https://arxiv.org/abs/2212.04488)). **Merge Custom Diffusion** then puts the two together in "
        "seconds: each concept's words mean what they meant, and ordinary prompts change as little as can be. Two "
        "subjects go as well.\n\n`[1]` and `[2]` stand for the two new words, which have their names when they are "
        "trained.\n\n## What to choose\nThe checkpoint, the pictures, a caption for each with `*` where the new word "
        "stands; what the words of each concept are, a line for each, as you use them; and what to draw.\n\nOn "
        "SDXL each training takes about 27 GB with the model, 15 GB with *batch_size* 1 (and more *steps*).",
    )
    trained = _trained(parts, "TrainCustomDiffusion", "custom", prompt=(OF_SUBJECT, OF_STYLE), initial_word=RARE)
    words = {FIRST: trained[0][1], SECOND: trained[1][1]}
    parts.graph.column("Words")
    lines = _replaced(parts, "Words of each concept", WORDS_OF_EACH, words)
    parts.graph.column("What to draw")
    drawn = _replaced(parts, "What to draw", OF_BOTH, words)
    parts.graph.column("Merge")
    pair = parts.graph.add("PairLoRAs", content_lora=trained[0][0], style_lora=trained[1][0])
    merged = parts.graph.add(
        "MergeCustomDiffusion", model=parts.model, clip=parts.clip, lora_pair=pair[0], prompts=lines
    )
    parts.report(merged[1])
    parts.graph.column("Draw")
    model = parts.graph.add("LoraModelLoader", "Both on the model", model=parts.model, lora=merged[0], strength_model=1)
    prompts, empty = parts.prompts(parts.clip, drawn, "With both words"), parts.canvas()
    parts.graph.column("Result")
    return parts.save(parts.picture(model[0], prompts, empty))


def split_concept() -> Graph:
    parts = Parts(
        "A concept split in two",
        "# What is in a concept, as two words\n\n**Split Concept** learns two words from one concept's pictures "
        "([Inspiration Tree](https://arxiv.org/abs/2305.18203)): side by side they are trained to draw the "
        "concept, and each alone may draw one side of it, such as its form or its pattern. At the right is what "
        "each word draws. Both are embeddings of a few kilobytes, for any prompt of this model family; each can "
        "be split again.\n\nFour seeds are tried. Connect *Load CLIP Vision* to `clip_vision`, and the seed is "
        "chosen whose words each draw alike pictures; without it the loss decides, which says less.\n\n## What to "
        "choose\nThe checkpoint, the picture, *initial_word*: a common word that is like it, and what to draw: "
        "`*` stands for a word.",
    )
    parts.graph.column("Picture")
    picture = parts.reference("subject")
    parts.graph.column("Split", 400)
    split = parts.train("SplitConcept", images=picture, initial_word="dog")
    parts.report(split[5])
    pictures = []
    for side, word in zip(("left", "right"), (split[0], split[1]), strict=True):
        parts.graph.column(f"Draw: the {side} word")
        text = _replaced(parts, f"What the {side} word draws", OF_A_WORD, {"*": word})
        prompts = parts.prompts(parts.clip, text, f"With the {side} word")
        pictures.append(parts.picture(parts.model, prompts, parts.canvas(), f"The {side} word"))
    parts.graph.column("Left, right", 640)
    return parts.save(parts.beside(pictures))


def mix_of_show() -> Graph:
    parts = Parts(
        "Mix-of-Show",
        "# Two concepts, merged by Mix-of-Show\n\nA subject and a style, each learned from its picture: a LoRA of the "
        "model and of its text encoders, and a word ([paper](https://arxiv.org/abs/2305.18292)). Then both are "
        "fused in closed form: **Fuse Text Encoders** first, so that each word is read as its own LoRA reads it, then "
        "*ZipLoRA Optimize* with `solver` *fusion*. More pictures of each (up to five) are better: join them with "
        "*Batch Images*.\n\n`[1]` and `[2]` stand for the two new words, which have their names when they are trained."
        "\n\n## What to choose\nThe checkpoint, the pictures, a caption for each with `*` where the new word stands, "
        "*class_word*: what it is, which the new word says too; and what to draw.",
    )
    trained = _trained(parts, "TrainEDLoRA", "ed", prompt=(OF_A_WORD, OF_A_MANNER), class_word=CLASSES)
    words = {FIRST: trained[0][1], SECOND: trained[1][1]}
    parts.graph.column("Words")
    lines = _replaced(parts, "Words of each concept", "\n".join(words), words)
    parts.graph.column("Fuse the text encoders", 400)
    pair = parts.graph.add("PairLoRAs", content_lora=trained[0][0], style_lora=trained[1][0])
    fused = parts.graph.add("FuseTextEncoders", clip=parts.clip, lora_pair=pair[0], prompts=lines)
    parts.report(fused[2])
    parts.graph.column("Fuse the rest", 400)
    own = [
        parts.text(words[sign], f"Prompt of the {which}", fused[1])
        for which, sign in zip(("subject", "style"), words, strict=True)
    ]
    references = {"content_positive": own[0], "style_positive": own[1]}
    zipped = parts.zip(fused[0], solver="fusion", **references)
    model, clip = parts.apply(zipped[0])
    parts.graph.column("What to draw")
    drawn = _replaced(parts, "What to draw", f"a {FIRST} in {SECOND}", words)
    prompts, empty = parts.prompts(clip, drawn, "With both words"), parts.canvas()
    parts.graph.column("Result")
    return parts.save(parts.picture(model, prompts, empty))
