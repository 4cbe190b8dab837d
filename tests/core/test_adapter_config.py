"""Alphas from peft's configuration: against its formulas, written out."""

from __future__ import annotations

import json
import random
import re
import time

import pytest
import torch

from ziplora_core import adapter_config
from ziplora_core.adapter_config import AdapterConfig


def header(**table) -> dict[str, str]:
    return {"lora_adapter_metadata": json.dumps(table)}


@pytest.mark.parametrize(
    ("layer", "rank", "scale"),
    [
        ("down_blocks.0.attn1.to_q", 4, 3 / 4),
        ("down_blocks.0.attn1.to_k", 4, 10 / 4),  # by the end of its name
        ("down_blocks.0.cattn1.to_k", 4, 3 / 4),  # which begins at a dot
        ("mid.to_v", 4, 7 / 4),  # a regular expression
        ("mid.0.to_v.extra", 4, 3 / 4),
        ("conv_in", 16, 5 / 16),  # of the whole name
        ("x.conv_in", 16, 3 / 16),
    ],
)
def test_patterns_are_endings_of_names(layer, rank, scale):
    patterns = {"attn1.to_k": 10, r"mid(?:\.\d+)?\.to_v": 7, "^conv_in": 5}
    config = AdapterConfig(4, 3.0, {"conv_in": 16}, patterns)
    assert config.scale(layer, rank) == pytest.approx(scale)
    assert config.scale(layer) == pytest.approx(scale if rank == config.rank_of(layer) else scale * rank / 16)


def pefts(patterns, layer, otherwise):
    """As peft's `get_pattern_key` has it."""
    key = next((key for key in patterns if re.match(rf"(.*\.)?({key})$", layer)), None)
    return otherwise if key is None else patterns[key]


@pytest.mark.parametrize("seed", range(5))
def test_the_first_pattern_counts_as_in_peft(seed):
    """Names and regular expressions in any order, several of which a layer ends with."""
    draw = random.Random(seed)
    parts = ["a", "b", "to_k", "0", "1"]
    layers = [".".join(draw.choices(parts, k=draw.randint(1, 4))) for _ in range(300)]
    names = [".".join(draw.choices(parts, k=draw.randint(1, 3))) for _ in range(30)]
    patterns = [*names, *(f"^{name}" for name in names[:9]), r"a\.\d+", r"to_k|b\.1", r"[ab]\.to_k", "^a(?:\\.b)?"]
    table = {pattern: 1 + place for place, pattern in enumerate(draw.sample(patterns, len(patterns)))}
    config = AdapterConfig(1, 1, {}, table)
    wanted = [pefts(table, layer, 1) for layer in layers]
    assert len(set(wanted)) > 10
    assert [config.scale(layer, 1) for layer in layers] == wanted


def test_hundreds_of_patterns_take_no_time():
    """As many as a model has layers, of each of which Python's own cache of expressions would lose every one."""
    names = [f"blocks.{n}.attn.to_k" for n in range(2000)]
    table = {"r": 4, "lora_alpha": 2, "alpha_pattern": dict.fromkeys(names, 8) | {r"x\d": 1}}
    (config,) = adapter_config.in_header(header(**table)).values()
    began = time.process_time()
    assert {config.scale(f"model.{name}") for name in names} == {2.0}
    assert time.process_time() - began < 2
    table["alpha_pattern"] = {rf"blocks\.{n}\.to_k": 8 for n in range(101)}
    assert adapter_config.in_header(header(**table)) == {}, "each is tried on each layer"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("{", "no table"), ("[1]", "no table"), ('{"r": 4}', "no r and lora_alpha"),
        ('{"r": 4, "lora_alpha": 2, "rank_pattern": {"(a+)+": 1}}', "patterns"),
    ],
)  # fmt: skip
def test_why_a_file_is_of_no_use(text, why):
    assert adapter_config.in_file(text) == {} and why in adapter_config.why_unusable(text)


def test_each_part_of_a_pipeline_has_its_own():
    table = {"unet.r": 4, "unet.lora_alpha": 8, "text_encoder.r": 2, "text_encoder.lora_alpha": 1,
             "text_encoder.use_rslora": True}  # fmt: skip
    configs = adapter_config.in_header(header(**table))
    tensors = {
        "unet.mid.to_q.lora_A.weight": torch.ones(4, 3),
        "text_encoder.text_model.mlp.fc1.lora_A.weight": torch.ones(2, 3),
        "text_encoder_2.text_model.mlp.fc1.lora_A.weight": torch.ones(2, 3),
        "unet.mid.to_k.lora_A.weight": torch.ones(4, 3),
        "unet.mid.to_k.alpha": torch.tensor(1.0),
    }
    found, scales = adapter_config.with_alphas(tensors, configs)
    assert {k: v.item() for k, v in found.items() if k.endswith("alpha")} == {
        "unet.mid.to_q.alpha": 8.0,
        "text_encoder.text_model.mlp.fc1.alpha": pytest.approx(2**0.5),
        "unet.mid.to_k.alpha": 1.0,
    }
    assert scales == pytest.approx({"unet.mid.to_q": 2.0, "text_encoder.text_model.mlp.fc1": 1 / 2**0.5})
    assert "unet.mid.to_q.alpha" not in tensors, "what came in is changed"


def test_what_counts_once_stays_as_it_is():
    tensors = {"mid.to_q.lora_A.weight": torch.ones(4, 3), "mid.to_k.lokr_w1": torch.ones(2, 2)}
    assert adapter_config.with_alphas(tensors, {"": AdapterConfig(4, 4.0)}) == (tensors, {})
    assert adapter_config.with_alphas(tensors, {}) == (tensors, {})


def test_lokr_has_its_first_factor_scaled():
    tensors = {"mid.to_k.lokr_w1": torch.ones(2, 2).half(), "mid.to_k.lokr_w2": torch.ones(2, 2)}
    found, scales = adapter_config.with_alphas(tensors, {"": AdapterConfig(8, 2.0)})
    assert torch.equal(found["mid.to_k.lokr_w1"], torch.full((2, 2), 0.25)) and scales == {"mid.to_k": 0.25}
    assert "mid.to_k.alpha" not in found and torch.equal(found["mid.to_k.lokr_w2"], torch.ones(2, 2))


@pytest.mark.parametrize(
    "table",
    [
        {}, {"r": 4}, {"r": 0, "lora_alpha": 2}, {"r": "4", "lora_alpha": 2}, {"r": 4, "lora_alpha": float("nan")},
        {"r": 4, "lora_alpha": 2, "alpha_pattern": {"(a+)+": 1}}, {"r": 4, "lora_alpha": 2, "alpha_pattern": [1]},
        {"r": 4, "lora_alpha": 2, "rank_pattern": {"a": -1}}, {"r": 4, "lora_alpha": 2, "rank_pattern": {"(": 1}},
        {"r": True, "lora_alpha": 2}, {"r": 4, "lora_alpha": 2, "alpha_pattern": {"a" * 201: 1}},
    ],
)  # fmt: skip
def test_what_is_no_configuration_is_none(table):
    assert adapter_config.in_header(header(**table)) == {} == adapter_config.in_file(json.dumps(table))


@pytest.mark.parametrize("text", ["", "[", "[1]", "null", "[" * 100_000, " " * 2**20 + "{}"])
def test_what_is_no_table_is_none(text):
    assert adapter_config.in_file(text) == {} == adapter_config.in_header({"lora_adapter_metadata": text})


def test_ranks_tell_another_loras_configuration():
    tensors = {"mid.to_q.lora_A.weight": torch.ones(4, 3), "mid.to_k.lora_A.weight": torch.ones(2, 3)}
    assert adapter_config.fits(tensors, {"": AdapterConfig(4, 2.0, {"to_k": 2})})
    assert not adapter_config.fits(tensors, {"": AdapterConfig(4, 2.0)})
    assert adapter_config.fits(tensors, {})


@pytest.mark.parametrize(
    ("names", "lacks"),
    [
        (["base_model.model.mid.to_q.lora_A.weight"], True),
        (["base_model.model.mid.to_q.lora_A.weight", "base_model.model.mid.to_q.alpha"], False),
        (["unet.mid.to_q.lora_A.weight"], False),
    ],
)
def test_only_pefts_own_files_keep_alpha_elsewhere(names, lacks):
    assert adapter_config.lacks_alpha({name: torch.ones(1) for name in names}) == lacks
