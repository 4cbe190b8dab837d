"""Prompts in API format, spoiled: the server refuses them in words, or runs them to a result or to an error of ours.

A tenth of them is tried, the same in every run; `dev.py test --all` tries all, and ZIPLORA_FUZZ=<n> draws new ones, n
times as many.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from graphs import BASE, SIZE, Concept, Prompt, node, text
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from devhost.base import CHECKPOINT
from devhost.server import ComfyServer

TIMES = int(os.environ.get("ZIPLORA_FUZZ", "0"))
CASES = 1000 if TIMES or os.environ.get("ZIPLORA_ALL") else 100
ERRORS = ("LoRAFileError", "ValueError", "FloatingPointError", "OSError")
KEPT = ("output", "temp", "user", "server.log")  # where a server may write

words = st.one_of(
    st.text(max_size=12),
    st.sampled_from(
        ["", "../../x", "/etc/passwd", "a\0b", "a\nb", "x" * 300, "x" * 20_000, "nan", "-inf", "1e400", "None"]
    ),
)
numbers = st.sampled_from([-1, 0, 1, 0.5, -0.5, 2**31, 2**63, -(2**64), 10**30, 1e300, True])
links = st.one_of(
    st.lists(st.one_of(words, numbers), max_size=3),
    st.tuples(st.sampled_from(["pair", "optimise", "direct", "dial", "apply", "sparse", "switch", "guider", "merge",
                               "checkpoint", "nowhere", "0"]),
              st.sampled_from([0, 1, 2, 7, -1, "0", None, 0.5])).map(list),
)  # fmt: skip
values = st.one_of(words, numbers, links, st.none(), st.dictionaries(words, words, max_size=2))


def graph(content: Concept, style: Concept) -> Prompt:
    """Every node of the pack that needs no training, none of which takes long."""
    zipped = ["dial", 0]
    return {
        "checkpoint": node("CheckpointLoaderSimple", ckpt_name=CHECKPOINT),
        "words": text(content.prompt),
        "latents": node("EmptyLatentImage", width=SIZE, height=SIZE, batch_size=1),
        "picture": node("EmptyImage", width=16, height=16, batch_size=1, color=0),
        "pair": node("LoadLoRAPair", content_lora=content.lora, style_lora=style.lora, content_strength=1.0,
                     style_strength=1.0),
        "optimise": node("ZipLoRAOptimize", model=BASE, lora_pair=["pair", 0], content_positive=["words", 0],
                         style_positive=["words", 0], content_latents=["latents", 0], style_latents=["latents", 0],
                         steps=0, learning_rate=0.01, similarity_lambda=0.01, batch_size=1, seed=0,
                         objective="balanced", solver="gradient", ridge=1.0, drawn_references=1, drawn_size=128),
        "direct": node("DirectMergeLoRA", model=BASE, lora_pair=["pair", 0], method="sum"),
        "dial": node("StyleStrength", zipped_lora=["optimise", 0], style_strength=1.0, content_strength=1.0),
        "apply": node("ApplyZippedLoRA", model=BASE, zipped_lora=zipped, strength=1.0, clip=["checkpoint", 1]),
        "applied": node("PreviewAny", source=["apply", 0]),
        "save": node("SaveZippedLoRA", zipped_lora=zipped, filename_prefix="fuzzed"),
        "export": node("ExportMergedLoRA", zipped_lora=["direct", 0], filename_prefix="loras/fuzzed", rank=1,
                       dtype="fp16", format="kohya"),
        "sparse": node("SparsifyLoRA", model=BASE, lora=style.lora, keep=10.0),
        "thinned": node("PreviewAny", source=["sparse", 1]),
        "sheet": node("BlindABSheet", images_a=["picture", 0], images_b=["picture", 0],
                      subject_reference=["picture", 0], style_reference=["picture", 0], name_a="a", name_b="b", seed=0,
                      filename_prefix="fuzzed"),
        "load": node("LoadZippedLoRA", model=BASE, zipped="no.safetensors"),
        "loaded": node("PreviewAny", source=["load", 1]),
        "train": node("TrainConceptLoRA", model=BASE, clip=["checkpoint", 1], vae=["checkpoint", 2],
                      images=["picture", 0], prompt="", steps=1, learning_rate=1e-4, rank=1, batch_size=1,
                      resolution=64, layers="attention", seed=0, filename_prefix="loras/fuzzed"),
        "unzip": node("UnZipLoRA", model=BASE, clip=["checkpoint", 1], vae=["checkpoint", 2], image=["picture", 0],
                      prompt="", content_prompt="a", style_prompt="b", steps=1, learning_rate=1e-4,
                      merger_learning_rate=1e-3, similarity_lambda=0.5, column_share=10.0, rank=1, batch_size=1,
                      resolution=64, seed=0, filename_prefix="loras/fuzzed"),
        "switch": node("KLoRA", model=BASE, lora_pair=["pair", 0], alpha=1.5, beta=0.5, clip=["checkpoint", 1]),
        "switched": node("PreviewAny", source=["switch", 2]),
        "guider": node("TwoScaleGuider", model=BASE, adapted_model=["apply", 0], positive=["words", 0],
                       negative=["words", 0], text_scale=6.0, style_scale=3.0),
        "guided": node("PreviewAny", source=["guider", 0]),
        "word": node("TrainEmbedding", model=BASE, clip=["checkpoint", 1], vae=["checkpoint", 2],
                     images=["picture", 0], prompt="", word="*", initial_word="star", vectors=1, steps=1,
                     learning_rate=1e-4, batch_size=1, resolution=64, seed=0, filename_prefix="fuzzed",
                     sample_every=0, save_every=0),
        "whole": node("TrainCustomDiffusion", model=BASE, clip=["checkpoint", 1], vae=["checkpoint", 2],
                      images=["picture", 0], prompt="", word="*", initial_word="star", steps=1, learning_rate=1e-4,
                      batch_size=1, resolution=64, seed=0, filename_prefix="loras/fuzzed", sample_every=0,
                      save_every=0),
        "fuse": node("FuseTextEncoders", clip=["checkpoint", 1], lora_pair=["pair", 0], prompts="a star\na heart"),
        "fused": node("PreviewAny", source=["fuse", 2]),
        "both": node("TrainEDLoRA", model=BASE, clip=["checkpoint", 1], vae=["checkpoint", 2], images=["picture", 0],
                     prompt="", word="*", class_word="star", rare_word="", steps=1, learning_rate=1e-4,
                     text_encoder_rate=1e-5, word_rate=1e-3, rank=1, batch_size=1, resolution=64, seed=0,
                     filename_prefix="loras/fuzzed", sample_every=0, save_every=0),
        "merge": node("MergeCustomDiffusion", model=BASE, clip=["checkpoint", 1], lora_pair=["pair", 0],
                      prompts="a star\na heart", captions="a red circle\na blue square"),
        "merged": node("PreviewAny", source=["merge", 1]),
    }  # fmt: skip


ENDS = {  # output node -> what it needs
    "applied": ("apply", "dial", "optimise", "pair", "words", "latents", "checkpoint"),
    "save": ("dial", "optimise", "pair", "words", "latents", "checkpoint"),
    "export": ("direct", "pair", "checkpoint"),
    "thinned": ("sparse", "checkpoint"),
    "sheet": ("picture",),
    "loaded": ("load", "checkpoint"),
    "train": ("picture", "checkpoint"),
    "unzip": ("picture", "checkpoint"),
    "switched": ("switch", "pair", "checkpoint"),
    "guided": ("guider", "apply", "dial", "optimise", "pair", "words", "latents", "checkpoint"),
    "word": ("picture", "checkpoint"),
    "whole": ("picture", "checkpoint"),
    "both": ("picture", "checkpoint"),
    "fused": ("fuse", "pair", "checkpoint"),
    "merged": ("merge", "pair", "checkpoint"),
}
OURS = {"pair", "optimise", "direct", "dial", "apply", "save", "export", "sparse", "sheet", "load", "train", "unzip",
        "switch", "guider", "word", "whole", "both", "fuse", "merge"}  # fmt: skip


@st.composite
def spoilings(draw: Callable[..., Any]) -> tuple[str, list[tuple[str, str, Any]]]:
    """An output node, and changes: (node of the pack, what to do, how)."""
    end = draw(st.sampled_from(sorted(ENDS)))
    own = sorted(OURS & {end, *ENDS[end]})
    changes = []
    for _ in range(draw(st.sampled_from([1, 1, 1, 2, 3]))):
        way = draw(st.sampled_from(["set", "set", "set", "set", "drop", "add", "class"]))
        changes.append((draw(st.sampled_from(own)), way, (draw(st.integers(0, 30)), draw(words), draw(values))))
    return end, changes


def spoil(prompt: Prompt, changes: list[tuple[str, str, Any]]) -> Prompt:
    for name, way, (number, word, value) in changes:
        inputs = prompt[name]["inputs"]
        key = sorted(inputs)[number % len(inputs)] if inputs else word
        if way == "set":
            inputs[key] = value
        elif way == "drop":
            inputs.pop(key, None)
        elif way == "add":
            inputs[word] = value
        else:
            kinds = ["StyleStrength", "PreviewAny", "LoadLoRAPair", "ZipLoRAOptimize", "no such node"]
            prompt[name]["class_type"] = kinds[number % len(kinds)]
    for name in {name for name, way, _ in changes if way in ("add", "class")}:
        inputs = prompt[name]["inputs"]
        prompt[name]["inputs"] = {key: value for key, value in inputs.items() if not dangles(prompt, value)}
    return prompt


def dangles(prompt: Prompt, value: Any) -> bool:
    """Whether a value is a link to a node that is not there.

    The host does not check the links of inputs that a node does not have, and its queue stands still ever after.
    """
    return isinstance(value, list) and len(value) == 2 and isinstance(value[0], str) and value[0] not in prompt


@pytest.fixture(scope="module")
def fuzzed(make_server: Callable[..., ComfyServer]) -> Iterator[tuple[ComfyServer, Counter[str]]]:
    """A server of this module's own, and how its prompts ended."""
    server, ends = make_server(), Counter[str]()
    before = files(server.base)
    yield server, ends
    print(f"\nprompts: {sum(ends.values())}; " + ", ".join(f"{end} {count}" for end, count in sorted(ends.items())))
    assert files(server.base) == before, "something was written outside of the folders for it"


def files(base: Path) -> set[Path]:
    """What lies in a server's folder where it has nothing to write, and beside it."""
    inside = {path for path in base.rglob("*") if path.relative_to(base).parts[0] not in KEPT}
    return inside | set(base.parent.iterdir())


def judge(server: ComfyServer, prompt: Prompt) -> str:
    """How a prompt ended: in one of the ways that it may."""
    answer = server.post("prompt", {"prompt": prompt, "client_id": server.client_id})
    assert answer.status_code in (200, 400), f"{answer.status_code}: {answer.text[:2000]}\n{server.log_tail()}"
    body = answer.json()
    if answer.status_code == 400:
        assert body["error"]["message"] and isinstance(body["node_errors"], dict)
        for name, found in body["node_errors"].items():
            for error in found["errors"]:
                more = error.get("extra_info", {})
                ours = any("custom_nodes" in line for line in more.get("traceback", ()))  # the host has its own
                assert not ours or more["exception_type"].endswith(ERRORS), f"{name}: {error}"
        return "refused"
    entry = server.wait(body["prompt_id"], 60)
    errors = [data for kind, data in entry["status"]["messages"] if kind == "execution_error"]
    if not errors:
        assert entry["status"]["status_str"] == "success"
        return "worked"
    (error,) = errors
    trace = "".join(error["traceback"])
    if error["node_id"] in OURS and "custom_nodes" in trace:  # the host itself fails at a linked input that no node has
        assert error["exception_type"].endswith(ERRORS), f"{error['exception_type']}: {trace}"
        says = error["exception_message"].strip()
        assert says.isprintable() and 0 < len(says) < 1000, repr(says)
    return "failed in words"


@given(spoilt=spoilings())
@settings(
    max_examples=CASES * max(TIMES, 1),
    derandomize=not TIMES,
    database=None,
    deadline=None,
    phases=[Phase.explicit, Phase.generate, *[Phase.shrink] * bool(TIMES)],
    suppress_health_check=list(HealthCheck),
)
def test_spoiled_prompts(
    fuzzed: tuple[ComfyServer, Counter[str]], content: Concept, style: Concept, spoilt: tuple[str, list]
) -> None:
    server, ends = fuzzed
    end, changes = spoilt
    whole = graph(content, style)
    prompt = spoil({name: whole[name] for name in (end, *ENDS[end])}, changes)
    ends[judge(server, prompt)] += 1


def test_the_server_works_afterwards(
    fuzzed: tuple[ComfyServer, Counter[str]], content: Concept, style: Concept
) -> None:
    """Last of this module: every whole graph does what it should."""
    server, _ = fuzzed
    for end in ("applied", "save", "export", "thinned", "sheet", "switched", "guided", "merged"):
        whole = graph(content, style)
        assert judge(server, {name: whole[name] for name in (end, *ENDS[end])}) == "worked", end
    for end in ("train", "unzip", "word", "whole"):
        whole = graph(content, style)
        assert judge(server, {name: whole[name] for name in (end, *ENDS[end])}) == "failed in words", end
