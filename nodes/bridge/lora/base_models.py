"""Notes where LoRA files say that they were made for another base model than the one that they are put on."""

from __future__ import annotations

import sys
from typing import Any

from ....ziplora_core import families
from ....ziplora_core.files import shown
from . import triggers
from .loras import LoRASource, LoRASources

_FAMILIES = {  # ours, by the host's classes of models; "" where ours has no name for what is under a class
    "SDXLRefiner": "SDXL refiner",
    "SDXL": "SDXL",
    "SD15": "SD 1.5",
    "SD20": "SD 2",
    "SD3": "SD 3",
    "Flux2": "Flux 2",
    "Flux": "Flux",
    "Chroma": "Chroma",
    "Lumina2": "Lumina 2 or Z-Image",
    "QwenImage": "Qwen-Image",
    "WAN21_T2V": "Wan",
    "HunyuanImage21": "HunyuanImage",
    "HunyuanVideo": "HunyuanVideo",
    "HunyuanDiT": "HunyuanDiT",
    "HiDream": "HiDream",
    "LTXV": "LTX-Video",
    "Anima": "Anima",
    "CosmosT2IPredict2": "Cosmos Predict2",
    "Krea2": "Krea 2",
}
_LOADED_BY = ("ckpt_name", "unet_name")  # inputs by which the host's loaders are told a model's file


def model_family(model: Any) -> str:
    """model: the host's BaseModel. "" for a family without a name of ours."""
    kinds = (kind.__name__ for kind in type(model.model_config).__mro__)
    return next((_FAMILIES[kind] for kind in kinds if kind in _FAMILIES), "")


def notes(sources: LoRASources, model: Any) -> list[str]:
    """A sentence for each file whose header, or a file beside it, names another family or another line of SDXL.

    model: the host's BaseModel. What does not fit is refused by its shapes, in `fitting`; these are notes on what does
    fit. Of a model's line only its file's name tells, which the host keeps in the graph that runs.
    """
    family, checkpoints = model_family(model), running_checkpoints()
    lines = []
    for source in sources.by_concept.values():
        if source.version is not None:  # of other nodes' LoRAs nothing is known
            lines += _notes(source, triggers.of_file(source.name), family, checkpoints)
    return lines


def _notes(source: LoRASource, said: triggers.Triggers, family: str, checkpoints: list[str]) -> list[str]:
    base = f"'{source.title}' says that it was made for {shown(said.base_model or said.line, 60)}"
    if said.family and family and said.family != family:
        return [f"{base} ({said.family}), and this model is {family}: see that it draws what it should when used alone"]
    if not said.line or family != "SDXL" or any(families.line(name) == said.line for name in checkpoints):
        return []
    line = "" if said.line in base else f", a model of the line {said.line}"
    which = (
        f"the checkpoint '{shown(checkpoints[0], 120)}'" if len(checkpoints) == 1 else "a checkpoint of another line"
    )
    return [
        f"{base}{line}; on {which} its words and strength may do less: best is a checkpoint of the same line, for "
        "every LoRA"
    ]


def running_checkpoints() -> list[str]:
    """Files that the graphs that run now load models from; none where no server runs."""
    server = getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)
    found = []
    try:
        running = list(server.prompt_queue.currently_running.values()) if server is not None else []
        for _, _, prompt, *_ in running:
            for node in prompt.values():
                found += [node["inputs"][name] for name in _LOADED_BY if isinstance(node["inputs"].get(name), str)]
    except (AttributeError, KeyError, TypeError, ValueError):  # a host that keeps its queue otherwise
        return []
    return found
