"""The shipped graphs on the miniature: what stands for the placeholders, and their thumbnails.

    python3 dev.py run demo/templates.py [NAME ...]

runs each graph in API form on a server with the miniature and writes workflows/NAME.jpg from the picture it saves.
"""

from __future__ import annotations

import copy
import json
import re
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from demo import encoders, picture
from demo.manifest import Manifest, read_manifest
from demo.miniature import CFG
from devhost.answers import Prompt
from devhost.base import make_base
from devhost.server import ComfyServer
from devhost.templates import TEMPLATES, words, zipped
from devhost.workflows import FOLDER, api_file

QUALITY = 80  # of thumbnails: the archive has room for no more
ZIPPED = ("subject", "style")
TRAINING = {  # what the miniature learns well with, from one picture
    "TrainEmbedding": {"batch_size": 8, "steps": 300},
    "TrainCustomDiffusion": {"learning_rate": 2e-4, "batch_size": 8, "steps": 80},
    "TrainEDLoRA": {"learning_rate": 2e-3, "text_encoder_rate": 2e-4, "word_rate": 2e-2, "batch_size": 8, "steps": 200},
    "SplitConcept": {"batch_size": 8, "seeds": 2, "drawn_count": 2},
    "TrainConceptLoRA": {"rank": 16, "learning_rate": 1e-3, "batch_size": 8, "steps": 200},
    "UnZipLoRA": {"rank": 16, "learning_rate": 1e-3, "batch_size": 8, "steps": 225},
}


def replacements(world: Manifest) -> dict[str, str]:
    """Placeholder -> the miniature's word, longest first: files, training prompts, prompts for a subject in a style."""
    of_name, shown = world.trained(), world.shown
    subject, style = (of_name[name] for name in shown.pair)
    loras = {words.SUBJECT: subject, words.STYLE: style, words.THIRD: of_name[shown.third]}
    found = {words.MODEL: world.checkpoint}
    found |= {placeholder: loras[lora].learned.picture for placeholder, lora in words.PICTURES.items()}
    found |= {placeholder: trained.learned.file for placeholder, trained in loras.items()}
    found |= {words.SUBJECT_PROMPT: subject.learned.prompt, words.STYLE_PROMPT: style.learned.prompt}
    one, how = (of_name[name] for name in shown.whole)
    found[words.WHOLE] = f"{'_in_'.join(shown.whole)}/1.png"
    found["one sks dog"], found["a picture in szn style"] = one.words, f"a picture {how.words}"
    found[f"one sks dog in {words.NEW_STYLE} style"] = f"{one.words} in {shown.new_style} style"
    found[f"{words.NEW_SUBJECT} in {words.IN_STYLE}"] = f"{shown.new_subject} {how.words}"
    found[words.V] = f"a {one.identifier}"
    found[f"{words.V} in {words.NEW_STYLE} style"] = f"a {one.identifier} in {shown.new_style} style"
    found[f"{words.NEW_SUBJECT} in sks style"] = f"{shown.new_subject} in {one.identifier} style"
    found[f"a house in {words.PLAIN_STYLE}"] = style.learned.prompt
    found[f"{words.NEW_SUBJECT} in {words.PLAIN_STYLE}"] = f"{shown.new_subject} {style.words}"
    for placeholder, trained in ((words.OF_SUBJECT, subject), (words.OF_STYLE, style)):
        found[placeholder] = trained.learned.prompt.replace(trained.identifier, "*")
    in_prompts = (
        subject.words.replace(subject.identifier, words.FIRST),
        style.words.replace(style.identifier, words.SECOND),
    )
    each = (in_prompts[0].partition(" ")[2], f"{subject.of_class} {in_prompts[1]}")  # the first without "a"
    found |= dict(zip(words.WORDS_OF_EACH.split("\n"), each, strict=True))
    found |= dict(zip(words.RARE, (subject.identifier, style.identifier), strict=True))
    found[words.ON_A_BEACH] = f"{subject.words.replace(subject.identifier, '*')} in {world.other_styles[0]} style"
    found[words.OF_A_WORD] = "a *"
    found[words.OF_A_MANNER] = style.learned.prompt.replace(f"{style.identifier} style", "*")
    found[words.CLASSES[0]] = subject.of_class.split()[-1]
    found[words.OF_BOTH] = " ".join(in_prompts)
    found[words.DRAWN] = world.prompt(subject, style)
    found[words.ELSEWHERE] = f"{subject.words} on the left {style.words}"
    return found


def on_the_miniature(prompt: Prompt, world: Manifest, steps: int = 20) -> Prompt:
    """A shipped graph in API form with the miniature's files, words and sizes. steps: of sampling."""
    made, ours = copy.deepcopy(prompt), replacements(world)
    for node in made.values():
        for name, value in node["inputs"].items():
            if isinstance(value, str):
                node["inputs"][name] = "\n".join(ours.get(line, line) for line in value.split("\n"))
            elif value == words.SIDE:
                node["inputs"][name] = world.size
        if node["class_type"] in ("KSampler", "CompareMerges"):
            node["inputs"] |= {"steps": steps, "cfg": CFG}
        if node["class_type"] == "BasicScheduler":
            node["inputs"]["steps"] = steps
        node["inputs"] |= TRAINING.get(node["class_type"], {})
        if node["class_type"] in ("TrainEmbedding", "SplitConcept"):
            node["inputs"]["prompt"] = ours[words.OF_SUBJECT]
        if node["class_type"] == "MergeCustomDiffusion":
            node["inputs"]["captions"] = "\n".join(asked.prompt for asked in world.known[:4])
        if node["class_type"] == "UnZipLoRA":  # whose blocks are not SDXL's
            node["inputs"] |= {f"{concept}_blocks": ", ".join(names) for concept, names in world.blocks.items()}
        if node["class_type"] in ("ZipLoRAs", "ZipCheck"):  # whose files name no trigger words
            node["inputs"] |= _prompts(node["inputs"], ours, world)
        if node["class_type"] == "ExportMergedLoRA":
            node["inputs"]["rank"] = 16
    return made


def _prompts(inputs: Mapping[str, Any], ours: Mapping[str, str], world: Manifest) -> dict[str, str]:
    """The training prompts of the LoRAs that a node zips: its own, or those of the loaders before it."""
    prompt_of = {one.learned.file: one.learned.prompt for one in (*world.subjects, *world.styles)}
    names, files = [f"{which}_prompt" for which in ZIPPED], [inputs[f"{which}_lora"] for which in ZIPPED]
    if set(files) == {words.NO_FILE}:
        names, files = [*names, "stack_prompts"], [ours[file] for file in (words.SUBJECT, words.STYLE, words.THIRD)]
    return dict(zip(names, (prompt_of[file] for file in files), strict=True))


def caption(name: str) -> str:
    """A graph's name without its number and what is in brackets, for the picture of it."""
    return re.sub(r"^\d+ | \(.*\)", "", name)


def main() -> int:
    wanted, world = sys.argv[1:], read_manifest()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as base, ComfyServer(make_base(Path(base))) as server:
        for make in TEMPLATES:
            name = make().name
            if wanted and name not in wanted:
                continue
            file = FOLDER / f"{name}.json"
            if name == zipped.scores().name:
                encoders.provide(Path(base), *encoders.EVERY)
            prompt = json.loads(api_file(file).read_text(encoding="utf-8"))
            done = server.run(on_the_miniature(prompt, world), timeout=1800)
            (saver,) = (k for k, node in prompt.items() if node["class_type"] == "SaveImage")
            print(
                picture.write(
                    picture.thumbnail(done.images(saver)[0], caption(name)), file.with_suffix(".jpg"), QUALITY
                ),
                flush=True,
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
