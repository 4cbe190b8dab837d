"""Zip LoRAs in one call: from files, prompts and pictures to a model with the zipped LoRAs on it."""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ...ziplora_core.checks import one_of
from ...ziplora_core.direct import plain_sum
from ...ziplora_core.direct.shared_columns import METHOD as SHARED_COLUMNS
from ...ziplora_core.files import LoRAFileError, shown
from ...ziplora_core.lora_set import LoRASet
from ...ziplora_core.objective import OBJECTIVES
from ...ziplora_core.solver import Settings
from ...ziplora_core.words import WordEffect
from . import direct
from .apply import apply, with_text_encoder
from .apply import stack as stack_on
from .drawing import references, sampling
from .lora import captured, loras, reads, stack, text_encoders, triggers
from .lora.zipped import ZippedLoRA
from .memory.retry import LESS, is_out_of_memory
from .network import text
from .network.checks import OTHER_CLIP
from .optimize import zipping
from .training import pictures

NO_FILE = "[None]"
# None: from the weights alone.
QUALITIES: dict[str, Settings | None] = {
    "balanced": Settings(),
    "fast": None,
    "paper": Settings(steps=100, objective=OBJECTIVES["paper"], solver="gradient"),
}
STACKED = "stacked"  # in the place of a quality, to compare with; web/ziplora_bypass.js asks for it by this name
# What errors say to users of the other nodes, and what this one's can do. Whole words, never inside quotes.
_OTHERS = {
    "content_lora": "subject_lora",
    "content_strength": "subject_strength",
    "content": "subject",
    OTHER_CLIP: "connect the clip that came with this checkpoint",
}
_EASIER = {"balanced": "choose quality fast", "paper": "choose quality balanced or fast"}


@dataclass(frozen=True)
class Given:
    """What a user says of one LoRA. asked: the input that its prompt is written in. pictures: the one for pictures of
    it, "" where there is none."""

    name: str
    strength: float
    clip_strength: float
    prompt: str
    asked: str
    pictures: str = ""

    @property
    def title(self) -> str:
        return shown(self.name, 255)


@dataclass(frozen=True)
class Prompt:
    """What a LoRA's examples are drawn and looked at with, and where it comes from. title: of the LoRA's file."""

    text: str
    source: str
    title: str

    def line(self, concept: str) -> str:
        return f"prompt used for {loras.role(concept)}: '{shown(self.text, 255)}' ({self.source}); LoRA: '{self.title}'"


def check_files(**chosen: str | None) -> str | None:
    """One sentence on why files of the node's own two inputs cannot be used, or None. Reads headers alone.

    None as a name: another node makes it, and it is not known yet.
    """
    names = {which: name for which, name in chosen.items() if name not in (None, NO_FILE)}
    checked = {which: loras.check(name) for which, name in names.items()}
    problems = [f"{which}: {problem}" for which, problem in checked.items() if problem]
    if not problems:
        try:
            with in_our_words(*names.values()):
                loras.refuse_one_file(*names.values())
        except LoRAFileError as error:
            return str(error)
    return "; ".join(problems) or None


def fingerprint(*chosen: tuple[str | None, str | None]) -> list[Any]:
    """Changes where a file does, or what is known of its prompt where none is written; also of what a link names.

    chosen: file and prompt of the node's own two inputs.
    """
    own = [
        (loras.fingerprint(name), "" if prompt and prompt.strip() else _known_prompt(name))
        for name, prompt in chosen
        if name not in (None, NO_FILE)
    ]
    return [*own, reads.changes()]


def _known_prompt(name: str) -> str:
    return triggers.of_file(name).prompt


def by_concept(own: Mapping[str, Given], lora_stack: Any, stack_prompts: str) -> dict[str, Given]:
    """All LoRAs by concept, in the order of everything made of them: the node's own, then those of a stack.

    own: "subject" and "style", those that are chosen. lora_stack: None where none is connected. Those of a stack alone
    are the subject, the style, and others; one that is turned off keeps its place and its line of stack_prompts.
    Raises ValueError for what is no stack, LoRAFileError where there are not enough LoRAs.
    """
    listed = [] if lora_stack is None else stack.entries(lora_stack)
    if lora_stack is None and len(own) < 2:
        missing = next(role for role in ("subject", "style") if role not in own)
        raise LoRAFileError(f"{missing}_lora is {NO_FILE}; choose a file, or connect more LoRAs to lora_stack")
    lines = stack_prompts.rstrip().splitlines()
    if len(lines) > len(listed):
        raise ValueError(
            f"stack_prompts has {len(lines)} lines, lora_stack {len(listed)} LoRAs; write one line for each, an empty "
            "one for the trigger words that its file names"
        )
    lines += [""] * (len(listed) - len(lines))
    given = list(own.values()) + [
        Given(entry.name, entry.strength, entry.clip_strength, line, f"line {place} of stack_prompts")
        for place, (entry, line) in enumerate(zip(listed, lines, strict=True), 1)
    ]
    names = stack.concepts(", ".join([*own, *["other"] * len(listed)] if own else [stack.ROLES]), len(given))
    ordered = {names[place]: given[place] for place in stack.in_order(names)}
    found = {c: g for c, g in ordered.items() if g in own.values() or g.strength or g.clip_strength}
    if not found:
        raise LoRAFileError("lora_stack holds no LoRA with a strength; choose a file in the stacker")
    return found


def loaders(model, clip) -> captured.Chain:
    """The LoRAs that loaders before the node have put on its model, where it names none itself.

    Raises LoRAFileError where there are fewer than two, and as `captured.find`.
    """
    chain = captured.find(model, clip)
    if len(chain.loras) < 2:
        there = f"'{shown(chain.loras[0].name, 255)}' alone is" if chain.loras else "no LoRA is"
        raise LoRAFileError(
            f"subject_lora and style_lora are {NO_FILE}, and {there} on the model that is connected; choose a subject "
            "and a style LoRA here, or put a loader for each before this node"
        )
    return chain


def prompts(given: Mapping[str, Given]) -> dict[str, Prompt]:
    """Each LoRA's prompt: what is written, or what its file and the files beside it say. From headers alone.

    What files say is remembered for the fingerprint of the node that runs. Raises ValueError where there is neither,
    naming the LoRA and the input.
    """
    found = {concept: _prompt(of) for concept, of in given.items()}
    missing = [of for concept, of in given.items() if not found[concept].text]
    if missing:
        said = " and ".join(f"{of.asked} for '{of.title}'" for of in missing)
        raise ValueError(
            f"{said} {'is' if len(missing) == 1 else 'are'} empty, and no trigger words are known from the file: write "
            "the prompt that the LoRA was trained with, trigger word included, such as 'a sks dog' or 'a house in szn "
            "style' (its download page says it), or choose quality fast, which needs none"
        )
    return found


def _prompt(of: Given) -> Prompt:
    if of.prompt.strip():
        pictures.check_prompt(of.asked, of.prompt)
        return Prompt(of.prompt, "as written on the node", of.title)
    reads.remember(_known_prompt, of.name)
    known = triggers.of_file(of.name)
    return Prompt(known.prompt.strip(), f"empty on the node; trigger words from {known.source}", of.title)


def zip_loras(
    model,
    clip,
    given: Mapping[str, Given],
    quality: str,
    seed: int,
    images: Mapping[str, Tensor],
    vae=None,
    drawn_size: int = 0,
    chain: captured.Chain | None = None,
) -> tuple[Any, Any, ZippedLoRA, str, Tensor | None]:
    """(model, clip, zipped, report, rough pictures of what was drawn as a reference or None).

    model: ModelPatcher; it and clip are unchanged. images: by input, IMAGEs (N, H, W, 3) of any size. drawn_size: in
    pixels, of pictures that are drawn or encoded; 0 for what the model draws best. chain: where the LoRAs are those of
    loaders before the node. Every check comes before anything is loaded. Raises as `optimize` does.
    """
    one_of("quality", quality, [*QUALITIES, STACKED])
    settings, written = QUALITIES.get(quality), {}
    if settings is not None:
        settings, written = replace(settings, seed=seed), prompts(given)
        sampling.SIDE_OR_BEST.check("drawn_size", drawn_size)
        check_connected(given, [*images, *(["vae"] if vae is not None else [])])
        for name, made in images.items():
            pictures.check_pictures(name, [made])
    found = [] if chain is None else chain.lines()
    if chain is not None:
        model, clip = chain.without(model, clip)
    with in_our_words(*(of.name for of in given.values()), easier=_EASIER.get(quality, "")):
        sources = sources_of(given)
        if quality == STACKED:
            zipped = direct.merge(model, sources, plain_sum.METHOD.name)
            zipped = replace(zipped, report="  \n".join([zipped.report, *found]))
            return (*stack_on(model, clip, sources, 1.0), zipped, zipped.report, None)
        if settings is None:
            zipped, drawn = direct.merge(model, sources, SHARED_COLUMNS.name), None
        else:
            zipping.check_inputs(model, sources, {})
            side = drawn_size or sampling.best_side(model)
            encode = encoders(clip, sources)
            conditioning = {c: encode[c](prompt.text) for c, prompt in written.items()}
            latents = {
                c: _latents(model, vae, images[of.pictures], side) if of.pictures in images else None
                for c, of in given.items()
            }
            asked = replace(references.DEFAULT, side=side)
            zipped, _, _, drawn = zipping.optimize(
                model, sources, conditioning, latents, settings, asked, functools.partial(_words, written, encode)
            )
    lines = [zipped.report, *found, *(prompt.line(concept) for concept, prompt in written.items())]
    zipped = replace(zipped, report="  \n".join(lines))
    return (*apply(model, clip, zipped, 1.0), zipped, zipped.report, drawn)


def check_connected(given: Mapping[str, Given], connected: Collection[str]) -> None:
    """Raises ValueError for pictures without a LoRA or a VAE. connected: the inputs that something is connected to."""
    own = {of.pictures for of in given.values()}
    for name in (name for name in connected if name.endswith("_images")):
        if name not in own:
            file = name.replace("images", "lora")
            raise ValueError(f"{name} is connected, but {file} is {NO_FILE}; choose a file, or take the pictures away")
        if "vae" not in connected:
            raise ValueError(f"{name} has to be encoded; connect the checkpoint's VAE to vae")


def sources_of(given: Mapping[str, Given]) -> loras.LoRASources:
    """The files, read. Raises LoRAFileError, SameLoRAError where two are one, and ValueError for a strength."""
    files = {c: (of.name, of.strength, of.clip_strength) for c, of in given.items()}
    sources = loras.load_sources(files, of_inputs=all(of.pictures for of in given.values()))
    inputs = {(concept, "positive"): of.asked for concept, of in given.items()}
    elsewhere = "its latents to ZipLoRA Optimize, which takes what Load LoRA Stack gives"
    inputs |= {(concept, "latents"): of.pictures or elsewhere for concept, of in given.items()}
    return replace(sources, inputs=inputs, own_text_encoders=True)


def encoder(clip) -> text.Encode:
    """What makes conditioning of words with a CLIP as it is; each words once."""
    return functools.cache(functools.partial(_encoded, clip))


def encoders(clip, sources: loras.LoRASources, plain: text.Encode | None = None) -> dict[str, text.Encode]:
    """By concept, what makes its user's prompts of words: with the LoRA's own text-encoder part on, as CLIP Text Encode
    makes them for a user of that LoRA alone; each words once.

    plain: the clip's own `encoder`, where there is one. A clone for each LoRA that needs one, made here: the host moves
    a text encoder for each clone that it has not just used.
    """
    plain = plain or encoder(clip)
    return {
        concept: encoder(with_text_encoder(clip, source, source.of_clip))
        if source.of_clip and text_encoders.parts(source)
        else plain
        for concept, source in sources.by_concept.items()
    }


def _words(written: Mapping[str, Prompt], encode: Mapping[str, text.Encode], fitted: LoRASet) -> dict[str, WordEffect]:
    return text.word_effects(fitted, {concept: prompt.text for concept, prompt in written.items()}, encode)


def _encoded(clip, words: str) -> list:
    """A prompt as CLIP Text Encode makes it."""
    conditioning: list = clip.encode_from_tokens_scheduled(clip.tokenize(words))
    return conditioning


def _latents(model, vae, images: Tensor, side: int) -> dict[str, Tensor]:
    """Pictures as a LATENT, each encoded alone: autoencoders of video models take several for frames of one."""
    return {"samples": torch.cat([pictures.encode(model, vae, frame[None], side) for frame in images])}


@contextlib.contextmanager
def in_our_words(*names: str, easier: str = "") -> Iterator[None]:
    """Errors by the names of this node's inputs, with what its users can change. names: of the files in question.
    easier: what to choose where a run needs too much memory, or fails on its numbers."""
    try:
        yield
    except Exception as error:
        kinds = (LoRAFileError, ValueError, FloatingPointError)
        kind = next((kind for kind in kinds if isinstance(error, kind)), None)
        if kind is None and not is_out_of_memory(error):
            raise
        said = _translated(str(error), names, easier)
        if said == str(error):
            raise
        raise (kind or type(error))(said) from None


def _translated(said: str, names: Collection[str], easier: str) -> str:
    """Word for word, but for what stands in quotes: names of files, which may have quotes of their own, and layers."""
    words = dict(_OTHERS)
    if easier:
        words |= {LESS: f"lower drawn_size, or {easier}", references.LESS: "drawn_size"}
        words["lower learning_rate or"] = f"{easier}, or"
    quoted = [rf"'{re.escape(shown(name, 255))}'" for name in names] + [r"(?<!\w)'.*?'(?!\w)"]
    ours = [rf"(?<!\w){re.escape(word)}(?!\w)" for word in sorted(words, key=len, reverse=True)]
    return re.sub("|".join([*ours, *quoted]), lambda found: words.get(found[0], found[0]), said)
