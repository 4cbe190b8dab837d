"""UnZipLoRA on the host: one picture and three prompts to a pair, a zipped pair and two files."""

from __future__ import annotations

import math
import os
import re
import time
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from PIL import Image
from torch import Tensor

from ...ziplora_core import training, unzip
from ...ziplora_core.blocks import UNZIPLORA_BLOCKS, Blocks, block_owners
from ...ziplora_core.coefficients import Coefficients
from ...ziplora_core.files import read_metadata, shown
from ...ziplora_core.lora_set import CONCEPTS, Factors
from .disk import paths
from .lora import fitting, loras
from .lora.zipped import ZippedLoRA
from .memory import plan
from .network.bare import bare
from .network.weights import cast, compute_dtype
from .training import loading
from .training.denoiser import Denoiser, picture
from .training.layers import trained_layers
from .training.lora_file import File, check_fits, put_each, steps_before
from .training.pictures import TrainingImages, check_pictures, check_prompt, prepared
from .training.run import Run, check_pace, loss_line

_PROMPTED = re.compile(r"\.attn2\.to_[kv]\.weight$")
_SMALL_WORDS = frozenset(  # which a prompt may have for itself
    "a an the of in on at with and by for to image picture photo drawing painting illustration artwork".split()
)


@dataclass
class Task:
    """prompts: "full", "content", "style". picture: IMAGE (1, H, W, 3). prompts_apart, columns_apart, blocks_apart: the
    paper's three separations. as_used: trained as the LoRAs are used (`unzip.rows_as_used`). sample_every, save_every:
    steps; 0 for never. go_on_from: either file of an earlier run. blocks: each LoRA's own, SDXL's unless said
    otherwise. metadata: more of the files' own."""

    picture: Tensor
    prompts: dict[str, str]
    settings: unzip.Settings
    prefix: str
    resolution: int = 1024
    prompts_apart: bool = True
    columns_apart: bool = True
    blocks_apart: bool = True
    as_used: bool = True
    sample_every: int = 0
    save_every: int = 0
    go_on_from: str | None = None
    blocks: Blocks = field(default_factory=lambda: UNZIPLORA_BLOCKS)
    metadata: dict[str, str] = field(default_factory=dict)


@dataclass
class Unzipped:
    """pair: for the LORA_PAIR socket, with both files' names."""

    pair: loras.LoRASources
    zipped: ZippedLoRA
    loss_map: dict[str, list[float]]
    report: str
    files: list[str] = field(default_factory=list)


def check(model, task: Task) -> None:
    """Raises ValueError for what can be refused before anything is loaded. model: the host's BaseModel."""
    check_pace(task)
    for name, text in task.prompts.items():
        check_prompt("prompt" if name == "full" else f"{name}_prompt", text)
    _check_words(task.prompts)
    check_pictures("image", [task.picture])
    if len(task.picture) != 1:
        raise ValueError(f"image holds {len(task.picture)} pictures; UnZipLoRA learns from one")
    if not isinstance(bare(model).diffusion_model, UNetModel):
        raise ValueError(
            f"this model ({type(model.model_config).__name__}) has no cross-attention with keys and values of its own; "
            "UnZipLoRA needs a U-Net, as SDXL or SD 1.5"
        )


def _check_words(prompts: dict[str, str]) -> None:
    """The full prompt says everything that the other two say, and nothing of its own.

    Words in Latin letters; of languages that write no spaces nothing is said.
    """
    if any(ord(letter) > 0x2E7F for text in prompts.values() for letter in text):
        return
    full, content, style = (
        set(re.findall(r"[^\W\d]+", prompts[name].lower())) - _SMALL_WORDS for name in ("full", "content", "style")
    )
    for name, others in (("content_prompt", content - style), ("style_prompt", style - content)):
        if missing := sorted(others - full):
            raise ValueError(
                f"prompt lacks '{shown(missing[0], 40)}', which {name} has; it must say both: e.g. prompt 'a sks dog "
                "in szn style', content_prompt 'a sks dog', style_prompt 'szn style'"
            )
    if alone := sorted(full - content - style):
        raise ValueError(
            f"'{shown(alone[0], 40)}' stands in prompt, but neither in content_prompt nor in style_prompt, so nobody "
            "would learn it; add it to the one that it belongs to"
        )


def _contexts(prompts: list[list]) -> tuple[list[list], list[Tensor]]:
    """Contexts of one length, repeated as the host repeats them where lengths differ: (prompts, their contexts)."""
    contexts = [prompt[0][0] for prompt in prompts]
    length = math.lcm(*(c.shape[1] for c in contexts))
    contexts = [c.repeat(1, length // c.shape[1], 1) for c in contexts]
    return [[[c, prompt[0][1]]] for c, prompt in zip(contexts, prompts, strict=True)], contexts


@paths.names_given_back()
def unzip_picture(model, clip, vae, task: Task) -> Unzipped:
    """model: ModelPatcher, unchanged. Raises as `concept.train_concept`; both LoRAs are on disk whenever it ends, and
    where the disk takes none they are returned all the same, which the report says."""
    check(model.model, task)
    settings = task.settings
    shapes = trained_layers(model.model, "attention")
    belongs = block_owners(shapes, task.blocks) if task.blocks_apart else {}
    about = {**task.metadata, "ziplora_settings": repr(settings)}
    start, first = None, 0
    if task.go_on_from is not None:
        start, first = _load_resume_state(task.go_on_from, model.model, unzip.own_layers(shapes, belongs), settings)
    files = _files(model, task, about)
    images = TrainingImages([task.picture], [task.prompts["full"]])
    data = prepared(model, clip, vae, [images], task.resolution)
    for concept in CONCEPTS:
        data.prompt(clip, task.prompts[concept])
    if task.as_used:
        whole, empty = (data.prompt(clip, text) for text in (task.prompts["full"], ""))
        data.pictures = unzip.rows_as_used(data.pictures.sets[0][0], whole, empty)
    data.prompts, contexts = _contexts(data.prompts)
    training_run = Run(first)
    began = time.monotonic()

    def work(denoiser: Denoiser, pictures: training.Pictures, device: torch.device) -> unzip.UnZip:
        own = dict(zip(CONCEPTS, (c.to(device, copy=True) for c in contexts[1:3]), strict=True))
        apart = unzip.Separations(
            own if task.prompts_apart else None,
            {name for name in shapes if _PROMPTED.search(name)},
            belongs,
            task.columns_apart,
        )
        trained = unzip.UnZip(shapes, settings, apart, lambda name: _weight(denoiser.model, name, device), device)
        if start is not None:
            trained.load(start)

        def write(steps: int) -> str:
            _write(files, _halves(trained), steps)
            return " and ".join(file.said() for file in files.values())

        def sample() -> Image.Image | None:
            return picture(model, denoiser, data, trained, settings.seed)

        training_run.follow(task, trained, denoiser, pictures, write, sample)
        return trained

    planned, trained = loading.with_denoiser(model, data, shapes, settings, work, loras_at_once=2)
    seconds, history = time.monotonic() - began, training_run.history
    sources = loras.LoRASources({c: _source(files[c], settings.steps) for c in CONCEPTS})
    fitted = fitting.fit(sources, model.model)
    written = [file.line(settings.steps, training_run.unwritten) for file in files.values()]
    report = "  \n".join([*written, *_report(task, trained, history, seconds, planned)])
    how = {"settings": repr(settings), "prompts": task.prompts}
    zipped = ZippedLoRA(sources, fitted, trained.coefficients(), report=report, method="UnZipLoRA", settings=how)
    losses = training_run.loss_map()
    if not task.columns_apart:
        losses["overlap"] = [s.penalty for s in history]
    return Unzipped(sources, zipped, losses, report, [file.name for file in files.values() if file.steps])


_HALF, _OTHER = "ziplora_half", "ziplora_other_half"  # metadata: which concept's a file is, and the other's name


def _files(model, task: Task, about: dict[str, str]) -> dict[str, File]:
    """One for each concept, which names the other."""
    files = {
        c: File(model, f"{task.prefix}_{c}", {**about, "ziplora_prompt": task.prompts[c], _HALF: c}) for c in CONCEPTS
    }
    _name_each_other(files)
    return files


def _write(files: dict[str, File], halves: dict[str, dict[str, Factors]], steps: int) -> None:
    """Both, whatever becomes of one. Raises OSError where one could not be written."""
    failure = put_each([partial(file.write, halves[concept], steps) for concept, file in files.items()])
    if _name_each_other(files):
        return _write(files, halves, steps)
    if failure is not None:
        raise failure


def _name_each_other(files: dict[str, File]) -> bool:
    """Whether one of them has got another name since: what is written says the old one."""
    before = [file.about.get(_OTHER) for file in files.values()]
    for one, other in (CONCEPTS, CONCEPTS[::-1]):
        files[one].about[_OTHER] = os.path.basename(files[other].path)
    return [file.about[_OTHER] for file in files.values()] != before


def _load_resume_state(
    name: str, model, own: dict[str, dict[str, tuple[int, int]]], settings: unzip.Settings
) -> tuple[dict[str, dict[str, Factors]], int]:
    """What an earlier run left, from either of its files: concept -> layer -> factors, and the steps that both have.

    own: concept -> the layers that it trains. Raises ValueError (LoRAFileError for a file) where they have others.
    """
    about = read_metadata(loras.lora_path(name))
    if about.get(_HALF) not in CONCEPTS or not about.get(_OTHER):
        raise ValueError(f"'{name}' is not UnZip LoRA's; continue_from takes either of the two files that a run left")
    other = os.path.join(os.path.dirname(name), os.path.basename(about[_OTHER]))
    names = {concept: name if concept == about[_HALF] else other for concept in CONCEPTS}
    halves = {}
    for concept, file in names.items():
        halves[concept] = fitting.fit_one(loras.load(file, 1.0), model).factors
        check_fits(file, halves[concept], own[concept], settings)
    return halves, min(steps_before(file, settings) for file in names.values())


def _weight(model, name: str, device: torch.device) -> Tensor:
    """W0 as the host would use it, in float32."""
    module = model.get_submodule(name.removesuffix(".weight"))
    like = torch.empty(0, dtype=compute_dtype(model), device=device)
    with torch.no_grad(), cast(module, like) as (weight, _):
        return weight.float().clone()


def _halves(trained: unzip.UnZip) -> dict[str, dict[str, Factors]]:
    halves: dict[str, dict[str, Factors]] = {c: {} for c in CONCEPTS}
    for name, layer in trained.pair().layers.items():
        for concept, factors in layer.items():
            halves[concept][name] = factors
    return halves


def _source(file: File, steps: int) -> loras.LoRASource:
    """As read from disk, where the loras folders hold the file with so many steps; else as it was to be written."""
    name = file.lora_name() if file.steps == steps else None
    if name is None:
        return loras.LoRASource(file.name, file.tensors, 1.0)
    return replace(loras.load(name, 1.0), name=name)


def _report(task: Task, trained: unzip.UnZip, history: list, seconds: float, planned: plan.Plan) -> list[str]:
    settings, counts = task.settings, []
    for concept in CONCEPTS:
        masks = trained.masks[concept]
        owned, columns = sum(int(m.sum()) for m in masks.values()), sum(m.numel() for m in masks.values())
        counts.append(f"{concept} {len(masks)} layers, {owned:,} of {columns:,} columns")
    apart = [
        n
        for n, on in (("prompts", task.prompts_apart), ("columns", task.columns_apart), ("blocks", task.blocks_apart))
        if on
    ]
    used = "; trained as used" if task.as_used else ""
    coefficients: Coefficients = trained.coefficients()
    return [
        f"apart: {', '.join(apart) or 'nothing'}{used}; {'; '.join(counts)}",
        f"rank {settings.rank}, steps {history[0].index} to {history[-1].index} at rate {settings.learning_rate:g}, "
        f"mergers at {settings.merger_rate:g}, lambda {settings.similarity_lambda:g}, seed {settings.seed}",
        f"{loss_line(history)}; overlap {coefficients.overlap():.3f}",
        f"time: {seconds:.1f} s",
        planned.line(),
    ]
