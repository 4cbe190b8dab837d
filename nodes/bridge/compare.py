"""Each LoRA alone, all of them stacked and the zip at several dials, drawn with one seed."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import comfy.sd
import torch
from torch import Tensor

from ...ziplora_core.checks import lines
from ...ziplora_core.direct import plain_sum
from ...ziplora_core.files import shown
from . import direct
from .apply import apply, is_on
from .drawing.sampling import Drawing, best_side, draw_one
from .lora import captured
from .lora.loras import STRENGTH, LoRASource, LoRASources, of_kind
from .lora.zipped import ZippedLoRA
from .network.bare import bare
from .progress.bar import Bar
from .training.pictures import check_prompt

MOST_COLUMNS, MOST_ROWS = 24, 64
_ENCODING, _DRAWING, _DECODING = "encoding the prompts", "drawing", "decoding"  # parts of the bar
_TEXT, _VAE = 1.0, 2.0  # what a prompt and a picture cost there, in steps of the sampler, about


@dataclass(frozen=True)
class Column:
    """heading: above its pictures. put: (model, clip) clones with its LoRAs on, of those that came in."""

    heading: str
    put: Callable[[Any, Any], tuple[Any, Any]]


@dataclass(frozen=True)
class Compared:
    """headings: of columns. prompts: of rows. pictures: IMAGE (rows * columns, H, W, 3), row by row."""

    headings: list[str]
    prompts: list[str]
    pictures: Tensor


def read_prompts(text: str) -> list[str]:
    """The lines of a text that say something. Raises ValueError where there are none, or too many."""
    rows = lines(text)
    if not rows:
        raise ValueError("prompts is empty; write what to draw: a prompt, or several with a line for each")
    if len(rows) > MOST_ROWS:
        raise ValueError(f"prompts: {len(rows)} lines are too many rows; at most {MOST_ROWS} fit")
    for number, line in enumerate(rows, 1):
        check_prompt(f"prompts: line {number}", line)
    return rows


def read_dials(text: str) -> list[float]:
    """The numbers of a text, each once. Raises ValueError where there is none, for what is no number, and for one that
    is out of range."""
    dials: dict[float, None] = {}
    for word in filter(None, re.split(r"[\s,，;；]+", text)):
        try:
            dial = float(word)
        except ValueError:
            dial = math.nan
        if math.isnan(dial):
            raise ValueError(f"dials: '{shown(word, 40)}' is no number; write some with commas, such as 0.5, 1, 1.5")
        STRENGTH.check("dials", dial)
        dials[dial] = None
    if not dials:
        raise ValueError("dials is empty; write numbers with commas between them, such as 0.5, 1, 1.5")
    if len(dials) > MOST_COLUMNS:
        raise ValueError(f"dials: {len(dials)} numbers are too many columns; at most {MOST_COLUMNS} fit, all in all")
    return list(dials)


def check_words(prompts: str | None, negative: str | None, dials: str | None) -> None:
    """Raises ValueError for what can be refused without a model. None: another node makes it, and it is not known."""
    if prompts is not None:
        read_prompts(prompts)
    if negative is not None and negative.strip():
        check_prompt("negative", negative)
    if dials is not None:
        read_dials(dials)


def columns(zipped: ZippedLoRA, dials: Sequence[float]) -> list[Column]:
    """In the strip's order. Raises ValueError where they are too many."""
    sources = list(zipped.sources.by_concept.values())
    found = [Column(title, _loaders([source])) for title, source in zip(_titles(sources), sources, strict=True)]
    if len(sources) > 1:
        found.append(Column("stacked", _loaders(sources)))
    found += [_zipped(zipped, dial) for dial in dials]
    if len(found) > MOST_COLUMNS:
        raise ValueError(
            f"dials: {len(dials)} numbers beside {len(found) - len(dials)} columns of {len(sources)} LoRAs are too "
            f"many columns; at most {MOST_COLUMNS} fit, all in all"
        )
    return found


def _titles(sources: Sequence[LoRASource]) -> list[str]:
    """File names without folder and ending, where that tells them apart."""
    short = [os.path.splitext(re.split(r"[/\\]", source.title)[-1])[0] for source in sources]
    return short if len(set(short)) == len(short) else [source.title for source in sources]


def _loaders(sources: Sequence[LoRASource]) -> Callable[[Any, Any], tuple[Any, Any]]:
    """As Load LoRA puts files on, one after another."""

    def put(model, clip) -> tuple[Any, Any]:
        bare(model.model)
        for source in (one.unfused or one for one in sources):
            if source.strength or source.of_clip:
                tensors = dict(source.tensors)
                model, clip = comfy.sd.load_lora_for_models(model, clip, tensors, source.strength, source.of_clip)
        return model, clip

    return put


def _zipped(zipped: ZippedLoRA, dial: float) -> Column:
    """All styles turned by a dial or, in a set without one, the zip as a whole."""
    styles = of_kind("style", zipped.sources.by_concept)
    if not styles:
        return Column(f"zipped, strength {dial:g}", lambda model, clip: apply(model, clip, zipped, dial))
    turned = zipped if dial == 1 else zipped.dialled(dict.fromkeys(styles, dial))
    told = {turned.dial(style) for style in styles}  # with what was turned before
    heading = f"zipped, style {told.pop():g}" if len(told) == 1 else f"zipped, styles times {dial:g}"
    return Column(heading, lambda model, clip: apply(model, clip, turned, 1.0))


def compare(
    model, clip, vae, zipped: ZippedLoRA | LoRASources, prompts: str, negative: str, dials: str, **how: Any
) -> Compared:
    """model: ModelPatcher; it and clip are unchanged. zipped: a pair that nothing has zipped counts as one of all ones.
    how: of a `Drawing`; width or height 0: what the model draws best.

    Each picture is drawn alone, as the host's KSampler draws it. Text encoder, model and VAE are used one after
    another, so that each is loaded once. Every check comes before. Raises ValueError, naming the input; interrupts
    pass through within a step.
    """
    check_words(prompts, negative, dials)
    if isinstance(zipped, LoRASources):
        zipped = direct.merge(model, zipped, plain_sum.METHOD.name)
    best = best_side(model)
    drawing = Drawing(**{**how, **{name: how[name] or best for name in ("width", "height")}})
    rows, across = read_prompts(prompts), columns(zipped, read_dials(dials))
    _check_bare(model, clip, zipped)
    _check_vae(model, vae)
    clips = [column.put(model, clip)[1] for column in across]  # raises where the LoRAs are another model's
    each = len(rows) * len(across)
    parts = {_ENCODING: _TEXT * each, _DRAWING: float(drawing.steps * each), _DECODING: _VAE * each}
    bar = Bar(parts)
    prompted = list(_encoded(clips, rows, negative, bar))
    del clips
    latents = list(_drawn(model, clip, across, prompted, drawing, bar))
    pictures = list(_decoded(vae, latents, bar))
    bar.finish(f"{each} pictures, seed {drawing.seed}")
    by_row = [pictures[column * len(rows) + row] for row in range(len(rows)) for column in range(len(across))]
    return Compared([column.heading for column in across], rows, torch.cat(by_row))


def _check_bare(model, clip, zipped: ZippedLoRA) -> None:
    captured.refuse_twice(model, clip, zipped.sources)
    if is_on(model, zipped):
        raise ValueError(
            "model carries the zip already, so every picture would have it twice; connect the model and the clip of "
            "the checkpoint, as they go into the node that zips"
        )


def _check_vae(model, vae) -> None:
    """Raises ValueError for another model's: it would only show when all is drawn."""
    takes, draws = getattr(vae, "latent_channels", None), model.get_model_object("latent_format").latent_channels
    if isinstance(takes, int) and takes != draws:
        raise ValueError(
            f"vae takes latents of {takes} channels, this model draws {draws}; connect the checkpoint's own VAE"
        )


def _encoded(clips: Sequence[Any], rows: Sequence[str], negative: str, bar: Bar) -> Iterator[tuple[list, list]]:
    """(prompts of all rows, the negative one) of each column, as CLIP Text Encode makes them."""
    for number, clip in enumerate(clips):
        bar.at(_ENCODING, _TEXT * number * len(rows), f"{_ENCODING}, {number + 1} of {len(clips)}")
        positive = [clip.encode_from_tokens_scheduled(clip.tokenize(row)) for row in rows]
        yield positive, clip.encode_from_tokens_scheduled(clip.tokenize(negative))


def _drawn(
    model, clip, across: Sequence[Column], prompted: Sequence[tuple[list, list]], drawing: Drawing, bar: Bar
) -> Iterator[Tensor]:
    """Latents of each picture, column by column: a column's patches are on while it is drawn, and no others."""
    each, number = sum(len(positive) for positive, _ in prompted), 0
    for column, (positives, negative) in zip(across, prompted, strict=True):
        patched = column.put(model, clip)[0]
        for positive in positives:
            done, number = drawing.steps * number, number + 1
            words = f"drawing '{column.heading}', picture {number} of {each}"

            def watch(share: float, preview: Any, done: int = done, words: str = words) -> None:
                bar.at(_DRAWING, done + share * drawing.steps, words, preview)

            bar.at(_DRAWING, done, words)
            yield draw_one(patched, positive, negative, drawing, watch)


def _decoded(vae, latents: Sequence[Tensor], bar: Bar) -> Iterator[Tensor]:
    """IMAGE (1, H, W, 3) of each, as VAE Decode makes it."""
    for number, samples in enumerate(latents):
        bar.at(_DECODING, _VAE * number, f"{_DECODING}, picture {number + 1} of {len(latents)}")
        images: Tensor = vae.decode(samples)
        yield images.reshape(-1, *images.shape[-3:])  # those of video models have frames
