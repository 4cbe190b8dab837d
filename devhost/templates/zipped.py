"""Graphs that zip two LoRA files: drawn, dialled, measured, kept."""

from __future__ import annotations

from .graph import Graph, Link, Node
from .parts import Parts
from .words import CLIP, DINO, DRAWN, ELSEWHERE, MODEL, NO_FILE, SIDE, STYLE, SUBJECT, THIRD

_REPLACE = (
    "\n\n## What to choose\nThe checkpoint, the LoRA files and the words of their training prompts: what stands here "
    "is made up. No pictures are needed: each LoRA draws its own references."
)
_CHOOSE = (
    "1. **Checkpoint**: the model that both LoRAs were made for.\n2. **LoRAs**: the subject's file and the style's. "
    "Leave a prompt empty to use the trigger words that the file names; where it names none, write the prompt that "
    "the LoRA was trained with, such as `a sks dog` or `a house in szn style`.\n"
)
_MORE = "\n\nMore: select a node, then the **i** above it."


def _on_a_checkpoint(graph: Graph, kind: str, title: str, *sockets: str) -> tuple[Node, Node]:
    """The checkpoint, and a node on it that takes a subject's file and a style's, in a column of their own.

    sockets: of the node, for the checkpoint's outputs in their order.
    """
    graph.column("Model and LoRAs")
    checkpoint = graph.add("CheckpointLoaderSimple", "1 Checkpoint", ckpt_name=MODEL)
    linked = {name: checkpoint[slot] for slot, name in enumerate(sockets)}
    return checkpoint, graph.add(kind, title, subject_lora=SUBJECT, style_lora=STYLE, **linked)


def _zipped_at_once(graph: Graph) -> tuple[Node, Node]:
    """The checkpoint, and Zip LoRAs on it."""
    return _on_a_checkpoint(graph, "ZipLoRAs", "2 LoRAs to zip", "model", "clip")


def _strip(graph: Graph, images: Link, title: str, name: str, report: Link) -> Graph:
    """A picture of several in a wide column, and the report below it."""
    graph.column("Result", 640)
    graph.add("SaveImage", title, images=images, filename_prefix=f"ziplora/{name}")
    graph.add("PreviewAny", "Report", source=report)
    return graph


def _drawn(graph: Graph, model: Link, clip: Link, number: int) -> Link:
    """What is sampled. number: of the step in which a user says what to draw."""
    positive = graph.add("CLIPTextEncode", f"{number} What to draw", clip=clip, text=DRAWN)
    negative = graph.add("CLIPTextEncode", "What not to draw", clip=clip, text="")
    empty = graph.add("EmptyLatentImage", width=SIDE, height=SIDE, batch_size=1)
    sampled = graph.add(
        "KSampler",
        "How to draw",
        model=model,
        positive=positive[0],
        negative=negative[0],
        latent_image=empty[0],
        steps=30,
        cfg=5.0,
        sampler_name="euler",
        scheduler="normal",
    )
    return sampled[0]


def _result(graph: Graph, checkpoint: Node, sampled: Link, zipped: Node, name: str) -> Graph:
    graph.column("Result")
    picture = graph.add("VAEDecode", "To pixels", samples=sampled, vae=checkpoint[2])
    graph.add("SaveImage", images=picture[0], filename_prefix=f"ziplora/{name}")
    graph.add("PreviewAny", "Report", source=zipped[3])
    return graph


def start() -> Graph:
    """The shortest way: one node between the checkpoint and the sampler."""
    graph = Graph(
        "1 Zip two LoRAs (start here)",
        "# Zip two LoRAs\n\nDraws the subject of one LoRA in the style of another.\n\n" + _CHOOSE + "3. **What to "
        "draw**: with the words of both.\n4. **Run**. The first time takes about as long as some pictures; every "
        "picture after it as long as any.\n\n**Is it better than two LoRA loaders?** The report says so. If the style "
        "is too weak or too strong: template *3 Style dial*." + _MORE,
    )
    checkpoint, zipped = _zipped_at_once(graph)
    graph.column("Picture")
    return _result(graph, checkpoint, _drawn(graph, zipped[0], zipped[1], 3), zipped, "zipped")


def check() -> Graph:
    """Before the zip: whether the prompts wake their LoRAs."""
    graph = Graph(
        "0 Check two LoRAs",
        "# Are these two LoRAs ready to be zipped?\n\nDraws each LoRA roughly with its prompt, beside the model "
        "without it, and says in a sentence whether the prompts wake their LoRAs, whether zipping is worth it, and "
        "what it would take.\n\n"
        + _CHOOSE
        + "3. **Run**.\n\n**What to look at**: the sentence on top of the picture. Then "
        "give the same files and prompts to template *1 Zip two LoRAs*." + _MORE,
    )
    _, checked = _on_a_checkpoint(graph, "ZipCheck", "2 LoRAs to check", "model", "clip", "vae")
    return _strip(graph, checked[0], "Without and with each LoRA", "checked", checked[1])


def zipped_or_stacked() -> Graph:
    """Whether zipping is worth it for a pair: seen, with one seed."""
    graph = Graph(
        "2 Zipped or stacked",
        "# Zipped or stacked?\n\nDraws the same prompts with the same seed in several ways, as one labelled strip: "
        "each LoRA alone, both stacked (as two LoRA loaders do), and zipped with less, as much and more style.\n\n"
        + _CHOOSE
        + "3. **What to draw**: a row of pictures for each line, with the words of both.\n4. **Run**.\n\n**What to "
        "look at**: the subject as in its own column, the style as in its own. If *stacked* is as good, use two LoRA "
        "loaders. If a *zipped* one is best, give its number to *Style Strength* in template *3 Style dial*." + _MORE,
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
        prompts=f"{DRAWN}\n{ELSEWHERE}",
        steps=30,
    )
    return _strip(graph, compared[0], "Side by side", "compared", zipped[3])


def style_dial() -> Graph:
    """One zip, and its style turned up and down: only the picture is drawn again."""
    graph = Graph(
        "3 Style dial",
        "# More style, or less\n\nThe two LoRAs are zipped once; then the dial turns the style up or down, and only "
        "the picture is drawn again.\n\n" + _CHOOSE + "3. **Style**: 1 is as zipped, 1.2 to 1.5 is more style, "
        "below 1 less.\n4. **What to draw**: with the words of both.\n5. **Run**; turn the dial, run again." + _MORE,
    )
    checkpoint, zipped = _zipped_at_once(graph)
    graph.column("Style and picture")
    dial = graph.add("StyleStrength", "3 Style", zipped_lora=zipped[2])
    applied = graph.add("ApplyZippedLoRA", "On the model", model=checkpoint[0], zipped_lora=dial[0], clip=checkpoint[1])
    graph.column("Picture")
    return _result(graph, checkpoint, _drawn(graph, applied[0], applied[1], 4), zipped, "style_dial")


def several() -> Graph:
    """LoRAs as loaders have put them on the model, any number of them."""
    graph = Graph(
        "9 More than two LoRAs",
        "# More than two LoRAs\n\n**Zip LoRAs** with *[None]* for both files takes the LoRAs that the loaders before "
        "it have put on the model, in their order: the first is the subject's, the second the style's, then any "
        "others. Those that a prompt does not ask for are held back.\n\n1. **Checkpoint**: the model that all LoRAs "
        "were made for.\n2. **LoRAs**: a loader for each; add more, or take one out.\n3. **Zip**: leave the prompts "
        "empty to use the trigger words that the files name; else write what each LoRA was trained with. The prompts "
        "of the third LoRA and of those after it stand in *stack_prompts*, a line for each, under *More options*.\n"
        "4. **How much of each**: turn any of them up or down; nothing is zipped again.\n5. **What to draw**: with "
        "the words of those that you want.\n6. **Run**." + _MORE,
    )
    graph.column("Model and LoRAs")
    checkpoint = graph.add("CheckpointLoaderSimple", "1 Checkpoint", ckpt_name=MODEL)
    model, clip = checkpoint[0], checkpoint[1]
    for which, file in (("subject", SUBJECT), ("style", STYLE), ("other", THIRD)):
        loaded = graph.add("LoraLoader", f"2 LoRA: {which}", model=model, clip=clip, lora_name=file)
        model, clip = loaded[0], loaded[1]
    graph.column("Zip")
    zipped = graph.add(
        "ZipLoRAs", "3 Zip what is loaded", model=model, clip=clip, subject_lora=NO_FILE, style_lora=NO_FILE
    )
    graph.column("How much of each")
    dials = "subject: 1.0\nstyle: 1.0\nother: 1.0"
    dialled = graph.add("ConceptStrengths", "4 How much of each", zipped_lora=zipped[2], strengths=dials)
    applied = graph.add(
        "ApplyZippedLoRA", "On the checkpoint", model=checkpoint[0], zipped_lora=dialled[0], clip=checkpoint[1]
    )
    graph.column("Picture")
    return _result(graph, checkpoint, _drawn(graph, applied[0], applied[1], 5), zipped, "several")


def every_step() -> Graph:
    parts = Parts(
        "4 Every step",
        "# Every step as a node\n\nWhat *Zip LoRAs* does in one, with all its settings. The latents of **ZipLoRA "
        "Optimize** are not connected, so each LoRA draws four pictures from its own training prompt first. They show "
        "on the node when it is done; the report has their seeds. **Style Strength** turns the style up or down "
        "without zipping again." + _REPLACE,
    )
    parts.graph.column("Zip")
    pair = parts.pair()
    zipped = parts.zip(pair, **parts.training_prompts())
    parts.graph.column("What it did")
    parts.report(zipped[2])
    parts.graph.add("ZippedLoRAReport", zipped_lora=zipped[0], loss_map=zipped[1])
    parts.graph.column("Draw")
    model, clip = parts.apply(parts.dial(zipped[0]))
    prompts, empty = parts.prompts(clip, DRAWN), parts.canvas()
    parts.graph.column("Result")
    return parts.save(parts.picture(model, prompts, empty))


def with_pictures() -> Graph:
    """The paper's way: a picture of each concept in the place of what its LoRA draws."""
    parts = Parts(
        "5 Every step, with pictures",
        "# Every step, with a picture for each LoRA\n\nThe two LoRAs stay as they are. What is learned is one number "
        "for each column of each of them, so that the merged model still draws the subject as its own LoRA does, and "
        "the style as its own LoRA does.\n\n## What to choose\nThe checkpoint, the LoRA files, a picture that each was "
        "trained on (or any of its subject or style), the words of their training prompts, and what to draw: what "
        "stands here is made up. Without pictures: template *4 Every step*.\n\n**Style Strength** turns the style up "
        "or down without zipping again.",
    )
    pair = parts.pair()
    sides = ("subject", "style")
    parts.graph.column("Pictures of subject and style")
    loaded = parts.references()
    parts.graph.column("As latents")
    latents = []
    for which, picture in zip(sides, loaded, strict=True):
        scaled = parts.graph.add(
            "ImageScale",
            f"Size of the {which}'s picture",
            image=picture,
            upscale_method="lanczos",
            width=SIDE,
            height=SIDE,
            crop="center",
        )
        latents.append(parts.graph.add("VAEEncode", f"Latents of the {which}", pixels=scaled[0], vae=parts.vae)[0])
    prompts = parts.training_prompts()
    parts.graph.column("Zip", 400)
    zipped = parts.zip(pair, **prompts, content_latents=latents[0], style_latents=latents[1])
    parts.graph.column("What it did", 400)
    parts.report(zipped[2])
    parts.graph.add("ZippedLoRAReport", "What it did, drawn", zipped_lora=zipped[0], loss_map=zipped[1])
    parts.graph.column("Draw")
    model, clip = parts.apply(parts.dial(zipped[0]))
    wanted, empty = parts.prompts(clip, DRAWN, "What to draw: subject in style"), parts.canvas()
    parts.graph.column("Result")
    return parts.save(parts.picture(model, wanted, empty, steps=50), "zipped")


def export() -> Graph:
    parts = Parts(
        "6 Save and export",
        "# Keep it, and take it elsewhere\n\n**Save Zipped LoRA** keeps the coefficients alone, a few megabytes, bound "
        "to the two files. **Export Merged LoRA** writes one ordinary LoRA, cut to rank 64 (0 is exact); "
        "the picture is drawn with it through the stock *Load LoRA Model*, which has no clip: **Apply Zipped LoRA** "
        "is here for that." + _REPLACE,
    )
    parts.graph.column("Zip")
    pair = parts.pair()
    zipped = parts.zip(pair, **parts.training_prompts())
    parts.graph.column("Files")
    dialled = parts.dial(zipped[0])
    parts.graph.add("SaveZippedLoRA", zipped_lora=dialled, filename_prefix="my_pair")
    exported = parts.graph.add(
        "ExportMergedLoRA", zipped_lora=dialled, filename_prefix="loras/my_merge", rank=64, dtype="fp16"
    )
    parts.graph.add("PreviewAny", "What was written", source=exported[1])
    parts.graph.column("Draw")
    model = parts.graph.add("LoraModelLoader", model=parts.model, lora=exported[0], strength_model=1.0)
    _, clip = parts.apply(dialled)  # Load LoRA Model has no clip
    prompts, empty = parts.prompts(clip, DRAWN), parts.canvas()
    parts.graph.column("Result")
    picture = parts.save(parts.picture(model[0], prompts, empty))
    parts.report(zipped[2])
    return picture


def scores() -> Graph:
    parts = Parts(
        "Scores",
        "# Measure it\n\nFour pictures of a zipped pair against four of the direct merge with the same seeds: "
        "**ZipLoRA Scores** gives the numbers of the paper's Table 2, **Blind A/B Sheet** the sheet of "
        "its user study. Vote "
        "before you open the key in the output folder.\n\n## What to choose\nThe checkpoint, the LoRA files, the words "
        "of their training prompts and a picture of each concept.\n\n`clip-vit-large-patch14` is OpenAI's whole CLIP "
        "in one file: put it into *models/clip_vision* and into *models/text_encoders*. `dinov2_large` goes into "
        "*models/clip_vision*.",
    )
    parts.graph.column("Zip")
    pair = parts.pair()
    zipped = parts.zip(pair, **parts.training_prompts())
    direct = parts.graph.add("DirectMergeLoRA", model=parts.model, lora_pair=pair)
    parts.graph.column("Draw")
    applied = [parts.apply(merge[0]) for merge in (zipped, direct)]
    prompts, empty = parts.prompts(applied[0][1], DRAWN), parts.canvas(4)  # both give the text encoder the same
    parts.graph.column("Pictures")
    methods = ("Zipped", "Direct merge")
    pictures = [parts.picture(model, prompts, empty, how) for (model, _), how in zip(applied, methods, strict=True)]
    parts.graph.column("Compare with")
    subject, style = parts.references()
    vision = parts.graph.add("CLIPVisionLoader", "CLIP", clip_name=CLIP)
    dino = parts.graph.add("CLIPVisionLoader", "DINOv2", clip_name=DINO)
    text = parts.graph.add("CLIPLoader", "CLIP's text encoder", clip_name=CLIP, type="stable_diffusion")
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
            prompt=DRAWN,
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
