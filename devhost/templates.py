"""The graphs that ship beside `ziplora_sdxl`, described here and laid out as UI files by `python3 dev.py workflows`.

Each is a list of columns; nodes that do not fit below one another begin a new one. Values are placeholders that a user
replaces: `my_subject.safetensors`, "a sks dog".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

ObjectInfo = Mapping[str, Any]

MODEL = "sd_xl_base_1.0.safetensors"
SUBJECTS = {"my_subject.safetensors": "a sks dog", "my_other_subject.safetensors": "a ohwx teapot"}
STYLES = {"my_style.safetensors": "a house in szn style", "my_other_style.safetensors": "a house in qrk style"}
CLIP, DINO = "clip-vit-large-patch14.safetensors", "dinov2_large.safetensors"
PICTURES = {"subject.png": "my_subject.safetensors", "style.png": "my_style.safetensors"}  # and the LoRA of each
WHOLE = "subject_in_style.png"  # one picture of both
NEW_STYLE, NEW_SUBJECT = "watercolor", "a teapot"
SIDE = 1024

_WIDTH, _GAP, _LINE = 340, 60, 26
_WIDGETS = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}
_TALL = {  # of nodes that show something when they have run, or a picture
    "SaveImage": 460,
    "ZippedLoRAReport": 300,
    "PreviewAny": 260,
    "BlindABSheet": 560,
    "LoadImage": 340,
    "ZipLoRAOptimize": 660,
    "TrainConceptLoRA": 840,
    "UnZipLoRA": 920,
}


def drawn(subject: str, style: str, where: str = "") -> str:
    """The prompt for a subject in a style: "a sks dog in szn style"."""
    return f"{SUBJECTS[subject]} in {STYLES[style].split(' in ')[1]}{where}"


@dataclass(frozen=True)
class Link:
    """An output of a node."""

    node: Node
    slot: int


@dataclass
class Node:
    number: int
    kind: str
    title: str | None
    column: int
    inputs: dict[str, Any]

    def __getitem__(self, slot: int) -> Link:
        return Link(self, slot)


@dataclass
class Graph:
    """name: of the files. note: Markdown, shown at the left. what: of its columns, their headings."""

    name: str
    note: str
    nodes: list[Node] = field(default_factory=list)
    headings: list[str] = field(default_factory=list)

    def column(self, heading: str) -> None:
        self.headings.append(heading)

    def add(self, kind: str, title: str | None = None, **inputs: Any) -> Node:
        node = Node(len(self.nodes) + 2, kind, title, len(self.headings) - 1, inputs)
        self.nodes.append(node)
        return node

    def ui(self, info: ObjectInfo) -> dict[str, Any]:
        """The graph as the frontend saves one. info: the server's object_info, for the order of widgets."""
        made = [self._note()]
        links: list[list[Any]] = []
        height: dict[int, int] = {}
        targets: dict[tuple[int, int], list[int]] = {}
        for node in self.nodes:
            entry = self._node(node, info[node.kind], links, targets)
            entry["pos"] = [node.column * (_WIDTH + _GAP), height.get(node.column, 0)]
            height[node.column] = entry["pos"][1] + entry["size"][1] + 70
            made.append(entry)
        for entry in made:
            for slot, output in enumerate(entry["outputs"]):
                output["links"] = targets.get((entry["id"], slot), [])
        return {
            "id": "00000000-0000-0000-0000-000000000000",
            "revision": 0,
            "last_node_id": len(self.nodes) + 1,
            "last_link_id": len(links),
            "nodes": made,
            "links": links,
            "groups": [
                {
                    "id": number + 1,
                    "title": heading,
                    "bounding": [number * (_WIDTH + _GAP) - 20, -80, _WIDTH + 40, height.get(number, 0) + 60],
                    "color": "#3f789e" if number % 2 else "#88A",
                    "font_size": 24,
                    "flags": {},
                }
                for number, heading in enumerate(self.headings)
            ],
            "config": {},
            "extra": {},
            "version": 0.4,
        }

    def _note(self) -> dict[str, Any]:
        return {
            "id": 1,
            "type": "MarkdownNote",
            "pos": [-500, -40],
            "size": [440, 460],
            "flags": {},
            "order": 0,
            "mode": 0,
            "inputs": [],
            "outputs": [],
            "title": "Read me first",
            "properties": {},
            "widgets_values": [self.note],
            "color": "#432",
            "bgcolor": "#653",
        }

    def _node(
        self, node: Node, info: Mapping[str, Any], links: list[list[Any]], targets: dict[tuple[int, int], list[int]]
    ) -> dict[str, Any]:
        inputs: list[dict[str, Any]] = []
        widgets: list[Any] = []
        tall = 0
        described = {**info["input"].get("required", {}), **info["input"].get("optional", {})}
        unknown = set(node.inputs) - set(described)
        if unknown:
            raise ValueError(f"{self.name}: {node.kind} has no input {', '.join(sorted(unknown))}")
        for name, spec in described.items():
            kind, options = spec[0], spec[1] if len(spec) > 1 else {}
            given = node.inputs.get(name)
            if isinstance(kind, list) or kind in _WIDGETS:
                widgets.append(_default(kind, options) if given is None else given)
                tall += 60 if options.get("multiline") else 0
                if options.get("control_after_generate"):
                    widgets.append("fixed")
                continue
            entry: dict[str, Any] = {"name": name, "type": kind, "link": None}
            if name in info["input"].get("optional", {}):
                entry["shape"] = 7
            if given is not None:
                entry["link"] = len(links) + 1
                links.append([entry["link"], given.node.number, given.slot, node.number, len(inputs), kind])
                targets.setdefault((given.node.number, given.slot), []).append(entry["link"])
            elif name in info["input"].get("required", {}):
                raise ValueError(f"{self.name}: {node.kind} needs {name}")
            inputs.append(entry)
        outputs = [
            {"name": name, "type": kind, "links": []}
            for name, kind in zip(info["output_name"], info["output"], strict=True)
        ]
        lines = max(len(inputs), len(outputs)) + len(widgets)
        made = {
            "id": node.number,
            "type": node.kind,
            "pos": [0, 0],
            "size": [_WIDTH, max(_TALL.get(node.kind, 0), 20 + _LINE * lines + tall)],
            "flags": {},
            "order": node.number - 1,
            "mode": 0,
            "inputs": inputs,
            "outputs": outputs,
            "properties": {"Node name for S&R": node.kind},
            "widgets_values": widgets,
        }
        return made | ({"title": node.title} if node.title else {})


def _default(kind: Any, options: Mapping[str, Any]) -> Any:
    if "default" in options:
        return options["default"]
    choices = kind if isinstance(kind, list) else options.get("options")
    return choices[0] if choices else {"INT": 0, "FLOAT": 0.0, "BOOLEAN": False}.get(kind, "")


class _Parts:
    """What the graphs have in common. The order of calls is the order on the canvas."""

    def __init__(self, name: str, note: str):
        self.graph = Graph(name, note)
        self.graph.column("Base model")
        self.checkpoint = self.graph.add("CheckpointLoaderSimple", ckpt_name=MODEL)
        self.model, self.clip, self.vae = (self.checkpoint[slot] for slot in range(3))

    def text(self, text: str, title: str | None = None, clip: Link | None = None) -> Link:
        """clip: None stands for the checkpoint's own, as of training prompts."""
        return self.graph.add("CLIPTextEncode", title, clip=clip or self.clip, text=text)[0]

    def pair(self, subject: str, style: str) -> Link:
        return self.graph.add("LoadLoRAPair", content_lora=subject, style_lora=style)[0]

    def zip(self, subject: str, style: str) -> Node:
        """Without pictures: each LoRA draws its own references."""
        return self.graph.add(
            "ZipLoRAOptimize",
            model=self.model,
            lora_pair=self.pair(subject, style),
            content_positive=self.text(SUBJECTS[subject], "Training prompt of the subject LoRA"),
            style_positive=self.text(STYLES[style], "Training prompt of the style LoRA"),
            drawn_size=SIDE,
        )

    def canvas(self, pictures: int = 1) -> Link:
        """An empty latent."""
        return self.graph.add("EmptyLatentImage", width=SIDE, height=SIDE, batch_size=pictures)[0]

    def apply(self, zipped: Link) -> tuple[Link, Link]:
        """(model, clip) with a zipped pair: prompts that are drawn with this model are encoded with this clip."""
        applied = self.graph.add("ApplyZippedLoRA", model=self.model, zipped_lora=zipped, clip=self.clip)
        return applied[0], applied[1]

    def prompts(self, clip: Link, words: str, title: str = "What to draw") -> tuple[Link, Link]:
        """(what to draw, what not to draw)"""
        return self.text(words, title, clip), self.text("", "What not to draw", clip)

    def picture(self, model: Link, prompts: tuple[Link, Link], empty: Link, title: str | None = None) -> Link:
        """prompts: what to draw, and what not."""
        sampled = self.graph.add(
            "KSampler",
            title,
            model=model,
            positive=prompts[0],
            negative=prompts[1],
            latent_image=empty,
            steps=30,
            cfg=5.0,
            sampler_name="euler",
            scheduler="normal",
        )
        return self.graph.add("VAEDecode", samples=sampled[0], vae=self.vae)[0]

    def train(self, kind: str, title: str | None = None, **given: Any) -> Node:
        """A node that learns from pictures with the base model."""
        base = {"model": self.model, "clip": self.clip, "vae": self.vae, "resolution": SIDE}
        return self.graph.add(kind, title, **base, **given)

    def whole(self) -> Link:
        """One picture of a subject in a style, in a column of its own."""
        self.graph.column("The picture")
        return self.graph.add("LoadImage", "A subject in a style", image=WHOLE)[0]

    def references(self) -> tuple[Link, Link]:
        """Pictures of the subject and of the style."""
        found = [
            self.graph.add("LoadImage", f"Picture of the {which}", image=name)[0]
            for which, name in zip(("subject", "style"), PICTURES, strict=True)
        ]
        return found[0], found[1]

    def beside(self, pictures: list[Link], direction: str = "right") -> Link:
        joined, *rest = pictures
        for picture in rest:
            joined = self.graph.add("ImageStitch", image1=joined, image2=picture, direction=direction, spacing_width=8)[
                0
            ]
        return joined

    def save(self, picture: Link) -> Graph:
        self.graph.add(
            "SaveImage", images=picture, filename_prefix=f"ziplora/{self.graph.name.removeprefix('ziplora_')}"
        )
        return self.graph


_SUBJECT, _STYLE = next(iter(SUBJECTS)), next(iter(STYLES))
_REPLACE = (
    "\n\n## What to choose\nThe checkpoint, the LoRA files and the words of their training prompts: what stands here "
    "is made up. No pictures are needed: each LoRA draws its own references."
)


def no_pictures() -> Graph:
    made = _Parts(
        "ziplora_no_pictures",
        "# Zip without reference pictures\n\nThe latents of **ZipLoRA Optimize** are not connected, so each LoRA draws "
        "four pictures from its own training prompt first. They show on the node when it is done; the report has their "
        "seeds." + _REPLACE,
    )
    made.graph.column("Zip")
    zipped = made.zip(_SUBJECT, _STYLE)
    made.graph.column("What it did")
    made.graph.add("PreviewAny", "Report", source=zipped[2])
    made.graph.add("ZippedLoRAReport", zipped_lora=zipped[0], loss_map=zipped[1])
    made.graph.column("Draw")
    model, clip = made.apply(zipped[0])
    prompts, empty = made.prompts(clip, drawn(_SUBJECT, _STYLE)), made.canvas()
    made.graph.column("Picture")
    return made.save(made.picture(model, prompts, empty))


def style_strength() -> Graph:
    made = _Parts(
        "ziplora_style_strength",
        "# How much style\n\nOne zipped pair, four style strengths: 0, 0.4, 0.7, 1 (the paper's Fig. 7a). Nothing is "
        "learned again: the dial multiplies the style's coefficients." + _REPLACE,
    )
    made.graph.column("Zip")
    zipped = made.zip(_SUBJECT, _STYLE)
    empty = made.canvas()
    pictures = []
    for strength in (0.0, 0.4, 0.7, 1.0):
        made.graph.column(f"Style {strength:g}")
        dial = made.graph.add("StyleStrength", zipped_lora=zipped[0], style_strength=strength)
        model, clip = made.apply(dial[0])
        prompts = made.prompts(clip, drawn(_SUBJECT, _STYLE))
        pictures.append(made.picture(model, prompts, empty, f"Style {strength:g}"))
    made.graph.column("Side by side")
    return made.save(made.beside(pictures))


def _prompts_of_one_zip(made: _Parts, wanted: list[tuple[str, str, str, str | None]]) -> Graph:
    """One zipped pair, a picture for each prompt. wanted: a column's heading, words, titles of prompt and sampler."""
    made.graph.column("Zip")
    zipped = made.zip(_SUBJECT, _STYLE)
    made.graph.column("Apply")
    empty, (model, clip) = made.canvas(), made.apply(zipped[0])
    negative = made.text("", "What not to draw", clip)
    pictures = []
    for heading, words, of_prompt, of_sampler in wanted:
        made.graph.column(heading)
        pictures.append(made.picture(model, (made.text(words, of_prompt, clip), negative), empty, of_sampler))
    made.graph.column("Side by side")
    return made.save(made.beside(pictures))


def each_alone() -> Graph:
    made = _Parts(
        "ziplora_each_alone",
        "# Each concept alone\n\nA zipped model still draws the subject without the style and the style without the "
        "subject, when the prompt asks for one of them (the paper's Fig. 7b)." + _REPLACE,
    )
    wanted = {
        "Subject alone": SUBJECTS[_SUBJECT],
        "Style alone": STYLES[_STYLE],
        "Both": drawn(_SUBJECT, _STYLE),
    }
    return _prompts_of_one_zip(made, [(heading, words, heading, heading) for heading, words in wanted.items()])


def new_contexts() -> Graph:
    made = _Parts(
        "ziplora_new_contexts",
        "# New contexts\n\nThe subject in the style, where neither LoRA has seen it: one zipped pair, three prompts "
        "(the paper's Fig. 6)." + _REPLACE,
    )
    wanted = {where.strip(" ,").capitalize(): drawn(_SUBJECT, _STYLE, where) for where in CONTEXTS}
    return _prompts_of_one_zip(made, [(heading, words, "What to draw", None) for heading, words in wanted.items()])


CONTEXTS = (", riding a bicycle", ", in a boat", ", wearing a crown")


def against_direct() -> Graph:
    made = _Parts(
        "ziplora_against_direct",
        "# Subjects × styles, zipped and added\n\nTwo subjects in two styles: the upper row is zipped, the lower row "
        "is the direct merge of the same LoRAs, with the same seeds (the paper's Fig. 1 and 5)." + _REPLACE,
    )
    made.graph.column("Draw")
    empty = made.canvas()
    rows: tuple[list[Link], list[Link]] = ([], [])
    for subject in SUBJECTS:
        for style in STYLES:
            made.graph.column(drawn(subject, style))
            zipped = made.zip(subject, style)
            pair = zipped.inputs["lora_pair"]
            direct = made.graph.add("DirectMergeLoRA", model=made.model, lora_pair=pair)
            applied = [made.apply(merge[0]) for merge in (zipped, direct)]
            prompts = made.prompts(applied[0][1], drawn(subject, style))  # both merges give the text encoder the same
            for row, (model, _) in zip(rows, applied, strict=True):
                row.append(made.picture(model, prompts, empty))
    made.graph.column("Side by side")
    return made.save(made.beside([made.beside(row) for row in rows], "down"))


def export() -> Graph:
    made = _Parts(
        "ziplora_export",
        "# Keep it, and take it elsewhere\n\n**Save Zipped LoRA** keeps the coefficients alone, a few megabytes, bound "
        "to the two files. **Export Merged LoRA** writes one ordinary LoRA for any program, here at half the rank; the "
        "picture is drawn with it through the stock *Load LoRA Model*, which has no clip: **Apply Zipped LoRA** is "
        "here for that." + _REPLACE,
    )
    made.graph.column("Zip")
    zipped = made.zip(_SUBJECT, _STYLE)
    made.graph.column("Files")
    made.graph.add("SaveZippedLoRA", zipped_lora=zipped[0], filename_prefix="my_pair")
    exported = made.graph.add(
        "ExportMergedLoRA", zipped_lora=zipped[0], filename_prefix="loras/my_merge", rank=64, dtype="fp16"
    )
    made.graph.add("PreviewAny", "What was written", source=exported[1])
    made.graph.column("Draw")
    model = made.graph.add("LoraModelLoader", model=made.model, lora=exported[0], strength_model=1.0)
    _, clip = made.apply(zipped[0])  # Load LoRA Model has no clip
    prompts, empty = made.prompts(clip, drawn(_SUBJECT, _STYLE)), made.canvas()
    made.graph.column("Picture")
    return made.save(made.picture(model[0], prompts, empty))


def scores() -> Graph:
    made = _Parts(
        "ziplora_scores",
        "# Measure it\n\nFour pictures of a zipped pair against four of the direct merge with the same seeds: "
        "**ZipLoRA Scores** gives the numbers of the paper's Table 2, **Blind A/B Sheet** the sheet of "
        "its user study. Vote "
        "before you open the key in the output folder.\n\n## What to choose\nThe checkpoint, the LoRA files, the words "
        "of their training prompts and a picture of each concept.\n\n`clip-vit-large-patch14` is OpenAI's whole CLIP "
        "in one file: put it into *models/clip_vision* and into *models/text_encoders*. `dinov2_large` goes into "
        "*models/clip_vision*.",
    )
    made.graph.column("Zip")
    zipped = made.zip(_SUBJECT, _STYLE)
    direct = made.graph.add("DirectMergeLoRA", model=made.model, lora_pair=zipped.inputs["lora_pair"])
    made.graph.column("Draw")
    words = drawn(_SUBJECT, _STYLE)
    applied = [made.apply(merge[0]) for merge in (zipped, direct)]
    prompts, empty = made.prompts(applied[0][1], words), made.canvas(4)  # both give the text encoder the same
    made.graph.column("Pictures")
    methods = ("Zipped", "Direct merge")
    pictures = [made.picture(model, prompts, empty, how) for (model, _), how in zip(applied, methods, strict=True)]
    made.graph.column("Compare with")
    subject, style = made.references()
    vision = made.graph.add("CLIPVisionLoader", clip_name=CLIP)
    dino = made.graph.add("CLIPVisionLoader", "DINOv2", clip_name=DINO)
    text = made.graph.add("CLIPLoader", clip_name=CLIP, type="stable_diffusion")
    made.graph.column("Scores")
    for method, images in zip(methods, pictures, strict=True):
        found = made.graph.add(
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
        made.graph.add("PreviewAny", method, source=found[0])
    made.graph.column("Blind sheet")
    sheet = made.graph.add(
        "BlindABSheet",
        images_a=pictures[0],
        images_b=pictures[1],
        subject_reference=subject,
        style_reference=style,
    )
    return made.save(sheet[0])


def from_pictures() -> Graph:
    made = _Parts(
        "ziplora_from_pictures",
        "# From pictures to a picture\n\nA LoRA of a subject and a LoRA of a style, trained from a picture each as the "
        "paper does, zipped, and drawn with: one graph. More pictures of each (up to five) are better: join them with "
        "*Batch Images*.\n\nTraining is the long part: 1000 steps each. The files stay in *output/loras*; zip them "
        "again with **Load LoRA Pair**.\n\n## What to choose\nThe checkpoint, the pictures, and a rare "
        "word for each in the "
        "prompts (`sks`, `szn`).",
    )
    made.graph.column("Pictures")
    subject, style = made.references()
    made.graph.column("Train")
    trained = [
        made.train(
            "TrainConceptLoRA",
            f"Train the {which}",
            images=picture,
            prompt=words,
            seed=seed,
            filename_prefix=f"loras/{which}",
        )
        for seed, (which, picture, words) in enumerate(
            (("subject", subject, SUBJECTS[_SUBJECT]), ("style", style, STYLES[_STYLE]))
        )
    ]
    made.graph.column("Zip")
    pair = made.graph.add("PairLoRAs", content_lora=trained[0][0], style_lora=trained[1][0])
    zipped = made.graph.add(
        "ZipLoRAOptimize",
        model=made.model,
        lora_pair=pair[0],
        content_positive=made.text(SUBJECTS[_SUBJECT], "Training prompt of the subject LoRA"),
        style_positive=made.text(STYLES[_STYLE], "Training prompt of the style LoRA"),
        drawn_size=SIDE,
    )
    made.graph.column("Draw")
    model, clip = made.apply(zipped[0])
    prompts, empty = made.prompts(clip, drawn(_SUBJECT, _STYLE)), made.canvas()
    made.graph.column("Picture")
    return made.save(made.picture(model, prompts, empty))


def _apart(made: _Parts, zipped: Link, wanted: dict[str, tuple[str, float, float]]) -> Graph:
    """A picture for each: heading -> (words, dials of content and style)."""
    made.graph.column("Draw")
    empty = made.canvas()
    pictures = []
    for heading, (words, content, style) in wanted.items():
        made.graph.column(heading)
        dial = made.graph.add("StyleStrength", zipped_lora=zipped, style_strength=style, content_strength=content)
        model, clip = made.apply(dial[0])
        pictures.append(made.picture(model, made.prompts(clip, words), empty, heading))
    made.graph.column("Side by side")
    return made.save(made.beside(pictures))


def unzip() -> Graph:
    made = _Parts(
        "ziplora_unzip",
        "# One picture, taken apart\n\n**UnZip LoRA** learns a content LoRA and a style LoRA from one picture: then "
        "its style on a new subject, its subject in a new style, and both together.\n\n## What to "
        "choose\nThe checkpoint, "
        "the picture, and its three prompts: the first says what the other two say, with a rare word for the subject "
        "(`sks`) and one for the style (`szn`).",
    )
    picture = made.whole()
    made.graph.column("Take apart")
    apart = made.train(
        "UnZipLoRA",
        image=picture,
        prompt=drawn(_SUBJECT, _STYLE),
        content_prompt=_WHAT,
        style_prompt=_HOW,
    )
    made.graph.add("PreviewAny", "Report", source=apart[3])
    return _apart(
        made,
        apart[1],
        {
            "Its subject, new style": (f"{_WHAT} in {NEW_STYLE} style", 1.0, 0.0),
            "New subject, its style": (f"{NEW_SUBJECT} in {STYLES[_STYLE].split(' in ')[1]}", 0.0, 1.0),
            "Both": (drawn(_SUBJECT, _STYLE), 1.0, 1.0),
        },
    )


_WHAT, _HOW = "one sks dog", "a picture in szn style"
V = "a sks"  # B-LoRA's "A [v]"


def b_lora() -> Graph:
    made = _Parts(
        "ziplora_b_lora",
        "# One picture, B-LoRA\n\nSDXL draws content in one of its blocks and style in another "
        "([B-LoRA](https://arxiv.org/abs/2403.14572)). Both are trained on one picture with the prompt *A [v]*; then "
        "each is used alone, and both together.\n\n## What to choose\nThe checkpoint, the picture, and a rare word "
        "(`sks`).",
    )
    picture = made.whole()
    made.graph.column("Train two blocks")
    trained = made.train(
        "TrainConceptLoRA",
        images=picture,
        prompt=V,
        layers="B-LoRA",
        filename_prefix="loras/b_lora",
    )
    made.graph.column("One block each")
    pair = made.graph.add("PairLoRAs", content_lora=trained[0], style_lora=trained[0])
    merged = made.graph.add("DirectMergeLoRA", model=made.model, lora_pair=pair[0], method="B-LoRA blocks")
    return _apart(
        made,
        merged[0],
        {
            "Its subject, new style": (f"{V} in {NEW_STYLE} style", 1.0, 0.0),
            "New subject, its style": (f"{NEW_SUBJECT} in sks style", 0.0, 1.0),
            "Both": (V, 1.0, 1.0),
        },
    )


def load_zipped() -> Graph:
    """Not shipped: for a picture on a help page."""
    made = _Parts("load_zipped", "")
    made.graph.column("Zipped before")
    loaded = made.graph.add("LoadZippedLoRA", model=made.model, zipped="my_pair_00001_.safetensors")
    made.graph.column("Draw")
    made.apply(loaded[0])
    return made.graph


def sparsify() -> Graph:
    """Not shipped: for a picture on a help page."""
    made = _Parts("sparsify", "")
    made.graph.column("Sparsify")
    sparse = made.graph.add("SparsifyLoRA", model=made.model, lora=_STYLE)
    made.graph.column("Use")
    made.graph.add("LoraModelLoader", model=made.model, lora=sparse[0], strength_model=1.0)
    made.graph.add("PreviewAny", "What is left", source=sparse[1])
    return made.graph


def direct_merge() -> Graph:
    """Not shipped: for a picture on a help page."""
    made = _Parts("direct_merge", "")
    made.graph.column("Merge")
    merged = made.graph.add("DirectMergeLoRA", model=made.model, lora_pair=made.pair(_SUBJECT, _STYLE))
    made.graph.column("Draw")
    made.apply(merged[0])
    return made.graph


SKETCHES: tuple[Callable[[], Graph], ...] = (load_zipped, sparsify, direct_merge)
TEMPLATES: tuple[Callable[[], Graph], ...] = (
    no_pictures,
    style_strength,
    each_alone,
    new_contexts,
    against_direct,
    export,
    scores,
    from_pictures,
    unzip,
    b_lora,
)
