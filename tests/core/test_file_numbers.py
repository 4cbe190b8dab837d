"""LoRA files number by number: every kind of number and name that is read, what is refused; coefficients' too."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from toys import of_two, toy_pair

from ziplora_core import files, saved
from ziplora_core.coefficients import Coefficients
from ziplora_core.files import LoRAFileError

KINDS = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)


def halves(tensor, stem="lora_unet_x"):
    return {f"{stem}.lora_up.weight": tensor, f"{stem}.lora_down.weight": tensor.clone()}


@pytest.mark.parametrize("dtype", KINDS, ids=str)
def test_every_kind_of_number_is_read_as_it_is_with_what_the_file_says_of_itself(tmp_path, dtype):
    tensors = halves(torch.tensor([[-1.5, 0.25], [0.0, 448.0]]).to(dtype))
    save_file(tensors, tmp_path / "a.safetensors", {"ss_tag": "sks"})
    read = files.read_lora_file(tmp_path / "a.safetensors")
    assert all(read[k].dtype == dtype and torch.equal(read[k].double(), t.double()) for k, t in tensors.items())
    assert files.read_metadata(tmp_path / "a.safetensors") == {"ss_tag": "sks"}


@pytest.mark.parametrize("dtype", [k for k in KINDS if k != torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_one_number_that_is_none_is_found_in_every_kind(dtype, value):
    spoiled = torch.linspace(-1, 1, 1000)
    spoiled[500] = value
    assert files.all_finite(torch.linspace(-1, 1, 1000).to(dtype)) and files.all_finite(torch.zeros(0, dtype=dtype))
    assert not files.all_finite(spoiled.to(dtype))
    with pytest.raises(LoRAFileError, match="'it' holds NaN or infinite numbers .tensor 'a.lora_up.weight'"):
        files.check_tensors("it", halves(spoiled.to(dtype), "a"))


@pytest.mark.parametrize(
    "names",
    [
        ("lora_A.weight", "lora_B.weight"),
        ("lora_A.default.weight", "lora_B.default.weight"),
        ("lora_A", "lora_B"),
        ("lora_up.weight", "lora_down.weight"),
        ("lora.up.weight", "lora.down.weight"),
        ("lora_linear_layer.up.weight", "lora_linear_layer.down.weight"),
        ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"),
        ("lokr_w1_a", "lokr_w1_b"),
        ("lokr_w2_a", "lokr_w2_b"),
        ("a1.weight", "a2.weight", "b1.weight", "b2.weight"),
    ],
)
def test_matrices_that_are_multiplied_come_together(tmp_path, names):
    whole = {f"unet.x.{name}": torch.ones(2, 2) for name in names}
    path = tmp_path / "a.safetensors"
    save_file(whole, path)
    assert files.read_lora_file(path).keys() == whole.keys()
    for name in names:
        save_file({k: t for k, t in whole.items() if k != f"unet.x.{name}"}, path)
        with pytest.raises(LoRAFileError, match=f"without a '.{name}' beside it"):
            files.read_lora_file(path)


@pytest.mark.parametrize(
    "name", ["x.diff", "x.diff_b", "x.set_weight", "x.w_norm", "x.LORA_mid", "lycoris_x", "x.dora_scale"]
)
def test_names_of_patches_are_those_of_a_lora(tmp_path, name):
    save_file({name: torch.ones(2)}, tmp_path / "a.safetensors")
    files.check_lora_file(tmp_path / "a.safetensors")
    save_file(
        {f"{name}.different.weight".replace("lora", "l").replace("LORA", "L"): torch.ones(2)},
        tmp_path / "b.safetensors",
    )
    if name not in ("lycoris_x", "x.dora_scale"):
        with pytest.raises(LoRAFileError, match="holds no LoRA"):
            files.check_lora_file(tmp_path / "b.safetensors")


@pytest.mark.parametrize("shape", [(0,), (2,), (1, 2)])
def test_an_alpha_is_one_number(shape):
    tensors = {**halves(torch.ones(2, 2), "a"), "a.alpha": torch.ones(shape)}
    with pytest.raises(LoRAFileError, match="'a.alpha' has shape .*, expected one number"):
        files.check_tensors("it", tensors)
    files.check_tensors("it", {**tensors, "a.alpha": torch.ones(1, 1)})


def test_what_is_shown_of_a_name_is_short_and_printable():
    assert files.shown("a" * 5, 5) == "a" * 5
    assert files.shown("a" * 6, 5) == "a" * 5 + "…"
    assert files.shown("a\nb\x1b[31m\u2028c") == "a\ufffdb\ufffd[31m\ufffdc"


@pytest.mark.parametrize("size", [0, 10, 2**20, 2**20 + 1, 3 * 2**20 + 7])
def test_a_hash_is_of_every_byte(tmp_path, size):
    data = bytes(i * 31 % 251 for i in range(1000)) * (size // 1000 + 1)
    (tmp_path / "a").write_bytes(data[:size])
    assert files.sha256(tmp_path / "a") == hashlib.sha256(data[:size]).hexdigest()


def zipped():
    pair = toy_pair()
    sides = {}
    for seed, (concept, side) in enumerate(Coefficients.ones(pair).by_concept.items()):
        g = torch.Generator().manual_seed(seed)
        sides[concept] = {n: torch.randn(m.shape, generator=g) for n, m in side.items()}
    about = saved.SavedZip(
        of_two(
            saved.SavedLoRA("c.safetensors", "aa", 11, 0.5),
            saved.SavedLoRA("s.safetensors", "bb", 22, 0.75),
        ),
        of_two(1.5, 0.25),
        "ZipLoRA",
        {"steps": 3},
        {"pack": "1"},
        "a report",
    )
    return pair, Coefficients(sides), about


def test_a_zipped_pair_is_read_as_it_was_written(tmp_path):
    pair, m, about = zipped()
    path = tmp_path / "z.safetensors"
    saved.write(path, m, about, {"workflow": "{}"})
    found, _, said = saved.read(path)
    assert said == saved.read_about(path) == about
    for concept in ("content", "style"):
        side = found[concept]
        assert side.keys() == m[concept].keys()
        assert all(torch.equal(side[n], v) and side[n].dtype == torch.float32 for n, v in m[concept].items())
    assert files.read_metadata(path)["workflow"] == "{}"
    saved.check_fits("z", found, pair)
    double = Coefficients({**m.by_concept, "content": {n: v.double() for n, v in m["content"].items()}})
    saved.write(path, double, about)
    assert torch.equal(saved.read(path)[0]["content"]["first"], m["content"]["first"])


@pytest.mark.parametrize(
    "spoiled",
    [
        torch.tensor([1.0, math.nan]),
        torch.tensor([-math.inf]),
        torch.ones(2, 2),
        torch.ones(2).half(),
        torch.ones(1).int(),
    ],
)
def test_numbers_that_are_no_coefficients_are_refused(tmp_path, spoiled):
    _, m, about = zipped()
    path = tmp_path / "z.safetensors"
    saved.write(path, m, about)
    save_file({**load_file(path), "style.first": spoiled}, path, files.read_metadata(path))
    with pytest.raises(LoRAFileError, match="'z.safetensors' holds no usable coefficients at 'style.first'"):
        saved.read(path)


def test_a_file_of_another_format_is_refused(tmp_path):
    _, m, about = zipped()
    path = tmp_path / "z.safetensors"
    saved.write(path, m, about)
    said = json.loads(files.read_metadata(path)["ziplora"])
    save_file(load_file(path), path, {"ziplora": json.dumps({**said, "format": "ziplora 5"})})
    for read in (saved.read, saved.read_about):
        with pytest.raises(LoRAFileError, match="format 'ziplora 5', this version reads 'ziplora 1', 'ziplora 2', 'z"):
            read(path)


@pytest.mark.parametrize("change", ["longer", "shorter", "more", "fewer"])
@pytest.mark.parametrize("concept", ["content", "style"])
def test_coefficients_of_another_pair_do_not_fit(change, concept):
    pair, m, _ = zipped()
    sides = {"content": dict(m["content"]), "style": dict(m["style"])}
    side = sides[concept]
    if change == "more":
        side["elsewhere"] = torch.ones(3)
    elif change == "fewer":
        del side["second"]
    else:
        side["second"] = torch.ones(8 if change == "longer" else 6)
    with pytest.raises(LoRAFileError, match=f"'z' was zipped for another model: it has . {concept} coefficients"):
        saved.check_fits("z", Coefficients(sides), pair)


def test_strengths_and_dials_are_numbers():
    _, _, about = zipped()
    for value in (math.nan, math.inf):
        with pytest.raises(ValueError, match="a strength"):
            dataclasses.replace(about.sources["content"], strength=value)
        for dials in ((value, 1.0), (1.0, value)):
            with pytest.raises(ValueError, match="expected dials"):
                dataclasses.replace(about, dials=of_two(*dials))
