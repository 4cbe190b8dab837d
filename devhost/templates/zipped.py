"""Graphs that zip two LoRA files: drawn, dialled, measured, kept."""

from __future__ import annotations

from .graph import Graph, Link, Node
from .parts import Parts
from .words import CLIP, CONTEXTS, DINO, MODEL, SIDE, STYLE, STYLES, SUBJECT, SUBJECTS, drawn

_REPLACE = (
    "\n\n## What to choose\nThe checkpoint, the LoRA files and the words of their training prompts: what stands here "
    "is made up. No pictures are needed: each LoRA draws its own references."
)


def _zipped_at_once(graph: Graph) -> tuple[Node, Node]:
    """The checkpoint, and Zip LoRAs on it, in a column of their own."""
    graph.column("Model and LoRAs")
    checkpoint = graph.add("CheckpointLoaderSimple", "1 Checkpoint", ckpt_name=MODEL)
    zipped = graph.add(
        "ZipLoRAs",
        "2 LoRAs to zip",
        model=checkpoint[0],
        clip=checkpoint[1],
        subject_lora=SUBJECT,
        style_lora=STYLE,
    )
    return checkpoint, zipped


def start() -> Graph:
    """The shortest way: one node between the checkpoint and the sampler."""
    graph = Graph(
        "Zip two LoRAs (start here)",
        "# Zip two LoRAs\n\nDraws the subject of one LoRA in the style of another.\n\n1. **Checkpoint**: the model "
        "that both LoRAs were made for.\n2. **LoRAs**: the subject's file and the style's. Leave a prompt empty to use "
        "the trigger words that the file names; where it names none, write the prompt that the LoRA was trained "
        "with, such as `a sks dog` or `a house in szn style`.\n3. **What to draw**: with the words of both.\n4. "
        "**Run**. The first time takes about as long as some pictures; every picture after it as long as any.\n\n"
        "**Is it better than two LoRA loaders?** The report says so. If the style is too weak or too strong: template "
        "*ziplora_style_strength*.\n\nMore: select a node, then the **i** above it.",
    )
    checkpoint, zipped = _zipped_at_once(graph)
    graph.column("Picture")
    positive = graph.add("CLIPTextEncode", "3 What to draw", clip=zipped[1], text=drawn(SUBJECT, STYLE))
    negative = graph.add("CLIPTextEncode", "What not to draw", clip=zipped[1], text="")
    empty = graph.add("EmptyLatentImage", "Size of the picture", width=SIDE, height=SIDE, batch_size=1)
    sampled = graph.add(
        "KSampler",
        model=zipped[0],
        positive=positive[0],
        negative=negative[0],
        latent_image=empty[0],
        steps=30,
        cfg=5.0,
        sampler_name="euler",
        scheduler="normal",
    )
    graph.column("Result")
    picture = graph.add("VAEDecode", samples=sampled[0], vae=checkpoint[2])
    graph.add("SaveImage", "Picture", images=picture[0], filename_prefix="ziplora/zipped")
    graph.add("PreviewAny", "Report", source=zipped[3])
    return graph


def zipped_or_stacked() -> Graph:
    """Whether zipping is worth it for a pair: seen, with one seed."""
    graph = Graph(
        "Zipped or stacked",
        "# Zipped or stacked?\n\nDraws the same prompts with the same seed in several ways, as one labelled strip: "
        "each LoRA alone, both stacked (as two LoRA loaders do), and zipped with less, as much and more style.\n\n1. "
        "**Checkpoint**: the model that both LoRAs were made for.\n2. **LoRAs**: the subject's file and the style's, "
        "each with the prompt that it was trained with; empty for the trigger words that the file names.\n3. "
        "**What to draw**: a row of pictures for each line, with the words of both.\n4. **Run**.\n\n**What to "
        "look at**: the subject as in its own column, the style as in its own. If *stacked* is as good, use two LoRA "
        "loaders. If a *zipped* one is best, give its number to *Style Strength*.\n\nMore: select a node, then the "
        "**i** above it.",
    )
    checkpoint, zipped = _zipped_at_once(graph)
    graph.column("Compare")
    compared = graph.add(
        "CompareMerges",
        "3 What to draw",
        model=checkpoint[0],
        clip=checkpoint[1],
        vae=checkpoint[2],
        zipped_lora=zipped[2],
        prompts=f"{drawn(SUBJECT, STYLE)}\n{drawn(SUBJECT, STYLE, CONTEXTS[0])}",
        steps=30,
    )
    graph.column("Result", 640)
    graph.add("SaveImage", "Side by side", images=compared[0], filename_prefix="ziplora/compared")
    graph.add("PreviewAny", "Report", source=zipped[3])
    return graph


def no_pictures() -> Graph:
    parts = Parts(
        "ziplora_no_pictures",
        "# Zip without reference pictures\n\nThe latents of **ZipLoRA Optimize** are not connected, so each LoRA draws "
        "four pictures from its own training prompt first. They show on the node when it is done; the report has their "
        "seeds." + _REPLACE,
    )
    parts.graph.column("Zip")
    zipped = parts.zip(SUBJECT, STYLE)
    parts.graph.column("What it did")
    parts.graph.add("PreviewAny", "Report", source=zipped[2])
    parts.graph.add("ZippedLoRAReport", zipped_lora=zipped[0], loss_map=zipped[1])
    parts.graph.column("Draw")
    model, clip = parts.apply(zipped[0])
    prompts, empty = parts.prompts(clip, drawn(SUBJECT, STYLE)), parts.canvas()
    parts.graph.column("Picture")
    return parts.save(parts.picture(model, prompts, empty))


def style_strength() -> Graph:
    parts = Parts(
        "ziplora_style_strength",
        "# How much style\n\nOne zipped pair, four style strengths: 0, 0.4, 0.7, 1 (the paper's Fig. 7a). Nothing is "
        "learned again: the dial multiplies the style's coefficients." + _REPLACE,
    )
    parts.graph.column("Zip")
    zipped = parts.zip(SUBJECT, STYLE)
    empty = parts.canvas()
    pictures = []
    for strength in (0.0, 0.4, 0.7, 1.0):
        parts.graph.column(f"Style {strength:g}")
        dial = parts.graph.add("StyleStrength", zipped_lora=zipped[0], style_strength=strength)
        model, clip = parts.apply(dial[0])
        prompts = parts.prompts(clip, drawn(SUBJECT, STYLE))
        pictures.append(parts.picture(model, prompts, empty, f"Style {strength:g}"))
    parts.graph.column("Side by side")
    return parts.save(parts.beside(pictures))


def _prompts_of_one_zip(parts: Parts, wanted: list[tuple[str, str, str, str | None]]) -> Graph:
    """One zipped pair, a picture for each prompt. wanted: a column's heading, words, titles of prompt and sampler."""
    parts.graph.column("Zip")
    zipped = parts.zip(SUBJECT, STYLE)
    parts.graph.column("Apply")
    empty, (model, clip) = parts.canvas(), parts.apply(zipped[0])
    negative = parts.text("", "What not to draw", clip)
    pictures = []
    for heading, words, of_prompt, of_sampler in wanted:
        parts.graph.column(heading)
        pictures.append(parts.picture(model, (parts.text(words, of_prompt, clip), negative), empty, of_sampler))
    parts.graph.column("Side by side")
    return parts.save(parts.beside(pictures))


def each_alone() -> Graph:
    parts = Parts(
        "ziplora_each_alone",
        "# Each concept alone\n\nA zipped model still draws the subject without the style and the style without the "
        "subject, when the prompt asks for one of them (the paper's Fig. 7b)." + _REPLACE,
    )
    wanted = {
        "Subject alone": SUBJECTS[SUBJECT],
        "Style alone": STYLES[STYLE],
        "Both": drawn(SUBJECT, STYLE),
    }
    return _prompts_of_one_zip(parts, [(heading, words, heading, heading) for heading, words in wanted.items()])


def new_contexts() -> Graph:
    parts = Parts(
        "ziplora_new_contexts",
        "# New contexts\n\nThe subject in the style, where neither LoRA has seen it: one zipped pair, three prompts "
        "(the paper's Fig. 6)." + _REPLACE,
    )
    wanted = {where.strip(" ,").capitalize(): drawn(SUBJECT, STYLE, where) for where in CONTEXTS}
    return _prompts_of_one_zip(parts, [(heading, words, "What to draw", None) for heading, words in wanted.items()])


def against_direct() -> Graph:
    parts = Parts(
        "ziplora_against_direct",
        "# Subjects × styles, zipped and added\n\nTwo subjects in two styles: the upper row is zipped, the lower row "
        "is the direct merge of the same LoRAs, with the same seeds (the paper's Fig. 1 and 5)." + _REPLACE,
    )
    parts.graph.column("Draw")
    empty = parts.canvas()
    rows: tuple[list[Link], list[Link]] = ([], [])
    for subject in SUBJECTS:
        for style in STYLES:
            parts.graph.column(drawn(subject, style))
            zipped = parts.zip(subject, style)
            pair = zipped.inputs["lora_pair"]
            direct = parts.graph.add("DirectMergeLoRA", model=parts.model, lora_pair=pair)
            applied = [parts.apply(merge[0]) for merge in (zipped, direct)]
            prompts = parts.prompts(applied[0][1], drawn(subject, style))  # both merges give the text encoder the same
            for row, (model, _) in zip(rows, applied, strict=True):
                row.append(parts.picture(model, prompts, empty))
    parts.graph.column("Side by side")
    return parts.save(parts.beside([parts.beside(row) for row in rows], "down"))


def export() -> Graph:
    parts = Parts(
        "ziplora_export",
        "# Keep it, and take it elsewhere\n\n**Save Zipped LoRA** keeps the coefficients alone, a few megabytes, bound "
        "to the two files. **Export Merged LoRA** writes one ordinary LoRA, here at half the rank; the "
        "picture is drawn with it through the stock *Load LoRA Model*, which has no clip: **Apply Zipped LoRA** is "
        "here for that." + _REPLACE,
    )
    parts.graph.column("Zip")
    zipped = parts.zip(SUBJECT, STYLE)
    parts.graph.column("Files")
    parts.graph.add("SaveZippedLoRA", zipped_lora=zipped[0], filename_prefix="my_pair")
    exported = parts.graph.add(
        "ExportMergedLoRA", zipped_lora=zipped[0], filename_prefix="loras/my_merge", rank=64, dtype="fp16"
    )
    parts.graph.add("PreviewAny", "What was written", source=exported[1])
    parts.graph.column("Draw")
    model = parts.graph.add("LoraModelLoader", model=parts.model, lora=exported[0], strength_model=1.0)
    _, clip = parts.apply(zipped[0])  # Load LoRA Model has no clip
    prompts, empty = parts.prompts(clip, drawn(SUBJECT, STYLE)), parts.canvas()
    parts.graph.column("Picture")
    return parts.save(parts.picture(model[0], prompts, empty))


def scores() -> Graph:
    parts = Parts(
        "ziplora_scores",
        "# Measure it\n\nFour pictures of a zipped pair against four of the direct merge with the same seeds: "
        "**ZipLoRA Scores** gives the numbers of the paper's Table 2, **Blind A/B Sheet** the sheet of "
        "its user study. Vote "
        "before you open the key in the output folder.\n\n## What to choose\nThe checkpoint, the LoRA files, the words "
        "of their training prompts and a picture of each concept.\n\n`clip-vit-large-patch14` is OpenAI's whole CLIP "
        "in one file: put it into *models/clip_vision* and into *models/text_encoders*. `dinov2_large` goes into "
        "*models/clip_vision*.",
    )
    parts.graph.column("Zip")
    zipped = parts.zip(SUBJECT, STYLE)
    direct = parts.graph.add("DirectMergeLoRA", model=parts.model, lora_pair=zipped.inputs["lora_pair"])
    parts.graph.column("Draw")
    words = drawn(SUBJECT, STYLE)
    applied = [parts.apply(merge[0]) for merge in (zipped, direct)]
    prompts, empty = parts.prompts(applied[0][1], words), parts.canvas(4)  # both give the text encoder the same
    parts.graph.column("Pictures")
    methods = ("Zipped", "Direct merge")
    pictures = [parts.picture(model, prompts, empty, how) for (model, _), how in zip(applied, methods, strict=True)]
    parts.graph.column("Compare with")
    subject, style = parts.references()
    vision = parts.graph.add("CLIPVisionLoader", clip_name=CLIP)
    dino = parts.graph.add("CLIPVisionLoader", "DINOv2", clip_name=DINO)
    text = parts.graph.add("CLIPLoader", clip_name=CLIP, type="stable_diffusion")
    parts.graph.column("Scores")
    for method, images in zip(methods, pictures, strict=True):
        found = parts.graph.add(
            "ZipLoRAScores",
            f"Scores: {method}",
            images=images,
            subject_references=subject,
            style_references=style,
            clip_vision=vision[0],
            dino=dino[0],
            clip=text[0],
            prompt=words,
        )
        parts.graph.add("PreviewAny", method, source=found[0])
    parts.graph.column("Blind sheet")
    sheet = parts.graph.add(
        "BlindABSheet",
        images_a=pictures[0],
        images_b=pictures[1],
        subject_reference=subject,
        style_reference=style,
    )
    return parts.save(sheet[0])
