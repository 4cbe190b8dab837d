"""What graphs have in common: the base model, prompts, pictures, a zip."""

from __future__ import annotations

from typing import Any

from .graph import Graph, Link, Node, file_name
from .words import MODEL, PICTURES, SIDE, STYLE, STYLE_PROMPT, SUBJECT, SUBJECT_PROMPT, WHOLE


class Parts:
    """A graph that grows: the order of calls is the order on the canvas."""

    def __init__(self, name: str, note: str):
        self.graph = Graph(name, note)
        self.graph.column("Base model")
        self.checkpoint = self.graph.add("CheckpointLoaderSimple", ckpt_name=MODEL)
        self.model, self.clip, self.vae = (self.checkpoint[slot] for slot in range(3))

    def text(self, text: str | Link, title: str | None = None, clip: Link | None = None) -> Link:
        """clip: None stands for the checkpoint's own, as of training prompts."""
        return self.graph.add("CLIPTextEncode", title, clip=clip or self.clip, text=text)[0]

    def pair(self) -> Link:
        return self.graph.add("LoadLoRAPair", content_lora=SUBJECT, style_lora=STYLE)[0]

    def training_prompts(self) -> dict[str, Link]:
        """What ZipLoRA Optimize takes them as."""
        return {
            "content_positive": self.text(SUBJECT_PROMPT, "Training prompt of the subject LoRA"),
            "style_positive": self.text(STYLE_PROMPT, "Training prompt of the style LoRA"),
        }

    def zip(self, pair: Link, **given: Link | str) -> Node:
        """given: latents of pictures, and the prompts; without latents, each LoRA draws its own. Settings too."""
        return self.graph.add("ZipLoRAOptimize", None, model=self.model, lora_pair=pair, drawn_size=SIDE, **given)

    def dial(self, zipped: Link) -> Link:
        return self.graph.add("StyleStrength", zipped_lora=zipped)[0]

    def report(self, text: Link) -> None:
        self.graph.add("PreviewAny", "Report", source=text)

    def canvas(self, pictures: int = 1) -> Link:
        """An empty latent."""
        return self.graph.add("EmptyLatentImage", width=SIDE, height=SIDE, batch_size=pictures)[0]

    def apply(self, zipped: Link) -> tuple[Link, Link]:
        """(model, clip) with a zipped pair: prompts that are drawn with this model are encoded with this clip."""
        applied = self.graph.add("ApplyZippedLoRA", model=self.model, zipped_lora=zipped, clip=self.clip)
        return applied[0], applied[1]

    def prompts(self, clip: Link, words: str | Link, title: str = "What to draw") -> tuple[Link, Link]:
        """(what to draw, what not to draw)"""
        return self.text(words, title, clip), self.text("", "What not to draw", clip)

    def picture(
        self, model: Link, prompts: tuple[Link, Link], empty: Link, title: str | None = None, steps: int = 30
    ) -> Link:
        """prompts: what to draw, and what not."""
        sampled = self.graph.add(
            "KSampler",
            title,
            model=model,
            positive=prompts[0],
            negative=prompts[1],
            latent_image=empty,
            steps=steps,
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

    def reference(self, which: str) -> Link:
        """A picture of the subject, or of the style."""
        names = dict(zip(("subject", "style"), PICTURES, strict=True))
        return self.graph.add("LoadImage", f"Picture of the {which}", image=names[which])[0]

    def references(self) -> tuple[Link, Link]:
        """Pictures of the subject and of the style."""
        return self.reference("subject"), self.reference("style")

    def beside(self, pictures: list[Link], direction: str = "right") -> Link:
        joined, *rest = pictures
        for picture in rest:
            joined = self.graph.add("ImageStitch", image1=joined, image2=picture, direction=direction, spacing_width=8)[
                0
            ]
        return joined

    def save(self, picture: Link, name: str | None = None) -> Graph:
        self.graph.add("SaveImage", images=picture, filename_prefix=f"ziplora/{name or file_name(self.graph.name)}")
        return self.graph
