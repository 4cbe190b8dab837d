"""Which layers of files that libraries write are read, and as whom: by the stock loader, here, as the library has them.

python3 dev.py run tests/inhost/library_table.py            one line for each writer and kind, and the sums
python3 dev.py run tests/inhost/library_table.py --every    one line for each file
"""

from __future__ import annotations

import argparse
import logging
import re
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    from devhost.inprocess import load_pack

    load_pack()

import libraries
import torch
import twins
from libraries import by_diffusers, by_lycoris, by_peft
from safetensors.torch import load_file
from torch import Tensor

R = {"r": 4, "lora_alpha": 2}
PATTERNS = {"rank_pattern": {"attn2.to_k": 2, "attn1.to_v": 6}, "alpha_pattern": {"attn2.to_k": 8, "attn1.to_v": 3}}
CONVOLUTIONS = {"target_modules": [*libraries.ATTENTION, "conv1", "ff.net.2", "proj_in"]}

# file -> (who writes it, settings, whose update it must be)
FILES = {
    "diffusers, alpha in the header": (by_diffusers, R),
    "diffusers, alpha above the rank": (by_diffusers, {"r": 4, "lora_alpha": 8}),
    "diffusers, patterns in the header": (by_diffusers, {**R, **PATTERNS}),
    "diffusers, rsLoRA": (by_diffusers, {"r": 4, "lora_alpha": 2, "use_rslora": True}),
    "diffusers, of one model": (by_diffusers, {**R, **PATTERNS, "how": "model"}),
    "diffusers, convolutions": (by_diffusers, {**R, **CONVOLUTIONS}),
    "diffusers, DoRA": (by_diffusers, {**R, "use_dora": True}),
    "diffusers, DoRA of convolutions": (by_diffusers, {**R, **CONVOLUTIONS, "use_dora": True}),
    "peft": (by_peft, R),
    "peft, patterns": (by_peft, {**R, **PATTERNS}),
    "peft, rsLoRA": (by_peft, {**R, "use_rslora": True}),
    "peft, DoRA": (by_peft, {**R, "use_dora": True}),
    "peft, LoHa": (by_peft, {"kind": "LoHaConfig", "r": 4, "alpha": 2}),
    "peft, LoHa of convolutions": (
        by_peft, {"kind": "LoHaConfig", "r": 4, "alpha": 2, "use_effective_conv2d": True, **CONVOLUTIONS}
    ),
    "peft, LoKr": (by_peft, {"kind": "LoKrConfig", "r": 4, "alpha": 2}),
    "peft, LoKr of whole factors": (by_peft, {"kind": "LoKrConfig", "r": 64, "alpha": 2}),
    "peft, LoKr of convolutions": (
        by_peft, {"kind": "LoKrConfig", "r": 2, "alpha": 3, "use_effective_conv2d": True, "decompose_both": True,
                  **CONVOLUTIONS}
    ),
    "peft, AdaLoRA": (by_peft, {"kind": "AdaLoraConfig", "init_r": 4, "lora_alpha": 3, "total_step": 10}),
    "peft, OFT": (by_peft, {"kind": "OFTConfig", "r": 0, "oft_block_size": 8}),
    "peft, OFT by an inverse": (
        by_peft, {"kind": "OFTConfig", "r": 4, "oft_block_size": 0, "use_cayley_neumann": False}
    ),
    "peft, OFT of three terms": (
        by_peft, {"kind": "OFTConfig", "r": 0, "oft_block_size": 8, "num_cayley_neumann_terms": 3}
    ),
    "peft, OFT of shared and constrained blocks": (
        by_peft, {"kind": "OFTConfig", "r": 0, "oft_block_size": 8, "block_share": True, "coft": True, "eps": 0.5}
    ),
    "peft, OFT of convolutions": (by_peft, {"kind": "OFTConfig", "r": 0, "oft_block_size": 8, **CONVOLUTIONS}),
    "peft, IA³": (by_peft, {"kind": "IA3Config", "feedforward_modules": []}),
    "peft, IA³ of what goes in": (by_peft, {"kind": "IA3Config", "feedforward_modules": ["to_out.0", "to_k"]}),
    "peft, IA³ of convolutions": (
        by_peft, {"kind": "IA3Config", "feedforward_modules": ["conv1", "ff.net.2"], **CONVOLUTIONS}
    ),
    "peft, VeRA": (by_peft, {"kind": "VeraConfig", "r": 6}),
    "lycoris, LoCon": (by_lycoris, {"algo": "locon"}),
    "lycoris, LoCon with Tucker core": (by_lycoris, {"algo": "locon", "use_tucker": True}),
    "lycoris, LoHa": (by_lycoris, {"algo": "loha"}),
    "lycoris, LoHa with Tucker core": (by_lycoris, {"algo": "loha", "use_tucker": True}),
    "lycoris, LoKr": (by_lycoris, {"algo": "lokr"}),
    "lycoris, LoKr with Tucker core": (
        by_lycoris, {"algo": "lokr", "use_tucker": True, "linear_dim": 2, "conv_dim": 2, "conv_alpha": 3.0}
    ),
    "lycoris, full": (by_lycoris, {"algo": "full"}),
    "lycoris, GLoRA": (by_lycoris, {"algo": "glora"}),
    "lycoris, OFT": (by_lycoris, {"algo": "diag-oft"}),
    "lycoris, BOFT": (by_lycoris, {"algo": "boft"}),
    "lycoris, DoRA on the input axis": (by_lycoris, {"algo": "locon", "dora_wd": True, "wd_on_output": False}),
    "SimpleTuner, LoKr": (by_lycoris, {"algo": "lokr", "names": "SimpleTuner"}),
    "OneTrainer, DoRA on the output axis": (by_lycoris, {"algo": "locon", "dora_wd": True, "names": "OneTrainer"}),
}  # fmt: skip

# where the stock loader computes another update than the library, and is followed
AS_STOCK = {
    "lycoris, DoRA on the output axis": (by_lycoris, {"algo": "locon", "dora_wd": True, "preset": "attn-only"}),
    "lycoris, DoRA of LoHa on the output axis": (by_lycoris, {"algo": "loha", "dora_wd": True, "preset": "attn-only"}),
}

TRANSFORMERS = {
    "Flux": (
        twins.flux,
        ["to_q", "add_k_proj", "to_add_out", "ff.net.2", "proj_mlp", "norm_out.linear", "x_embedder"],
    ),
    "SD 3": (twins.sd3, ["to_q", "add_v_proj", "to_out.0", "ff_context.net.0.proj", "norm_out.linear", "proj_out"]),
    "Qwen-Image": (twins.qwen, ["to_k", "add_q_proj", "img_mlp.net.2", "img_in"]),
    "Z-Image": (twins.z_image, ["to_q", "to_v", "to_out.0", "w2"]),
    "Lumina 2": (twins.lumina, ["to_q", "to_k", "to_v", "to_out.0", "linear_2", "norm1.linear", "linear_1"]),
}
WAYS = {
    "pipeline": (by_diffusers, {}),
    "model": (by_diffusers, {"how": "model"}),
    "DoRA": (by_diffusers, {"use_dora": True}),
    "peft": (by_peft, {}),
    "AdaLoRA": (by_peft, {"kind": "AdaLoraConfig", "init_r": 4, "total_step": 10}),
}

# file -> (makes the model, writes the file and says what its library makes of it)
Case = tuple[Callable[[], twins.Twins], Callable[[twins.Twins, Path], dict[str, Tensor]]]
ALIKE = 1e-5  # the stock loader computes in float32


def cases() -> dict[str, Case]:
    """Every file that the tests have a library write, by name: writer, kind."""
    found: dict[str, Case] = {}
    for name, (write, settings) in {**FILES, **AS_STOCK}.items():
        found[name] = (twins.sdxl, lambda model, folder, w=write, s=settings: w(model, folder, **s))
    for family, (make, layers) in TRANSFORMERS.items():
        for way, (write, settings) in WAYS.items():
            given = {**R, **settings, "target_modules": layers}
            name = f"{write.__name__.removeprefix('by_')}, {way if 'oRA' in way else 'LoRA'} of {family} ({way})"
            found[name] = (make, lambda model, folder, w=write, s=given: w(model, folder, **s))
    return found


@dataclass(frozen=True)
class Row:
    """Counts of layers, of one file or of several.

    layers: that the file's library changes, or the stock loader. stock, ours: read by the stock loader, and here.
    as_stock, as_library: read here with their update. lost: read by the stock loader, and not here. silent: read here
    unlike one of them, and no note says so. refused: why the file is.
    """

    files: int = 1
    layers: int = 0
    stock: int = 0
    ours: int = 0
    as_stock: int = 0
    as_library: int = 0
    lost: int = 0
    silent: int = 0
    refused: tuple[str, ...] = ()

    def __add__(self, other: Row) -> Row:
        return Row(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))


def alike(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and bool((one - other).norm() <= ALIKE * other.norm())


def by_stock(patcher: Any, path: Path) -> dict[str, Tensor]:
    """Weight -> what the stock loader makes of a file, where that is not nothing."""
    import comfy.lora
    import comfy.sd

    patched = comfy.sd.load_lora_for_models(patcher, None, load_file(path), 1.0, 0)[0]
    return _changes(patcher, patched.patches, comfy.lora.calculate_weight)


def by_us(pack: Any, patcher: Any, name: str) -> tuple[dict[str, Tensor], list[str]]:
    """(Weight -> what the pack makes of a file in the loras folder, its notes). Raises LoRAFileError."""
    import comfy.lora

    bridge = pack.nodes.bridge
    source = bridge.lora.loras.load(name, 1.0)
    fitting = bridge.lora.fitting.fit_one(source, patcher.model)
    state = patcher.model.state_dict()
    found = {
        key: (f.scale * (f.up.double() @ f.down.double().flatten(1))).reshape(state[key].shape)
        for key, f in fitting.factors.items()
    }
    beside = {key: [(1.0, patch, 1.0, None, None)] for key, patch in fitting.passthrough.items()}
    found |= _changes(patcher, beside, comfy.lora.calculate_weight)
    return found, [*source.notes, *fitting.unused, *fitting.notes()]


def _changes(patcher: Any, patches: Mapping[str, list], calculate: Callable[..., Tensor]) -> dict[str, Tensor]:
    state, found = patcher.model.state_dict(), {}
    for key, of_weight in patches.items():
        before = state[key].float()
        delta = calculate(of_weight, before.clone(), key).double() - before.double()
        if delta.any():
            found[key] = delta
    return found


def row(pack: Any, patcher: Any, path: Path, wanted: Mapping[str, Tensor]) -> Row:
    """A file of the loras folder, counted. wanted: what its library makes of it, by weight of the model."""
    stock = by_stock(patcher, path)
    layers, refused = len(wanted.keys() | stock.keys()), ()
    try:
        ours, notes = by_us(pack, patcher, f"{path.parent.name}/{path.name}")
    except pack.ziplora_core.files.LoRAFileError as error:
        ours, notes, refused = {}, [], (str(error),)
    said = any("ComfyUI's own" in note for note in notes)
    as_stock = {key for key in ours if key in stock and alike(ours[key], stock[key])}
    as_library = {key for key in ours if key in wanted and alike(ours[key], wanted[key])}
    unlike = (ours.keys() & stock.keys() - as_stock) | (ours.keys() & wanted.keys() - as_library)
    silent = ours.keys() - as_stock - as_library | (set() if said else unlike)
    return Row(
        1, layers, len(stock), len(ours), len(as_stock), len(as_library),
        len(stock.keys() - ours.keys()), len(silent), refused,
    )  # fmt: skip


def rows(pack: Any, names: Iterable[str] | None = None) -> dict[str, Row]:
    """Files, all that there are where none is named, each written by its library into a folder of its own."""
    import folder_paths

    known, found = cases(), {}
    before = folder_paths.folder_names_and_paths["loras"]
    for name in known if names is None else names:
        make, write = known[name]
        with tempfile.TemporaryDirectory() as place:
            folder_paths.folder_names_and_paths["loras"] = ([place], {".safetensors"})
            folder_paths.filename_list_cache.clear()
            try:
                folder = Path(place) / "one"
                folder.mkdir()
                model = make()
                wanted = model.placed(write(model, folder))
                found[name] = row(pack, model.patcher, folder / "subject.safetensors", wanted)
            finally:
                folder_paths.folder_names_and_paths["loras"] = before
                folder_paths.filename_list_cache.clear()
    return found


def by_kind(of: Mapping[str, Row]) -> dict[str, Row]:
    """The same, one for each writer and kind of update."""
    found: dict[str, Row] = {}
    for name, one in of.items():
        writer, _, rest = name.partition(", ")
        kind = re.search("DoRA|LoCon|LoHa|LoKr|GLoRA|BOFT|OFT|IA³|VeRA|AdaLoRA|full", rest)
        group = f"{writer}, {kind[0] if kind else 'LoRA'}"
        found[group] = found[group] + one if group in found else one
    return found


def total(of: Iterable[Row]) -> Row:
    return sum(of, Row(0))


COLUMNS = ("files", "layers", "stock", "ours", "as_stock", "as_library", "lost", "silent")
HEADINGS = ("Files", "Layers", "ComfyUI reads", "Read here", "as ComfyUI", "as the library", "Lost", "Silently unlike")


def table(of: Mapping[str, Row]) -> str:
    """In Markdown, with a line of sums."""
    lines = [f"| Written by | {' | '.join(HEADINGS)} |", f"|---|{'---:|' * len(HEADINGS)}"]
    for name, one in [*of.items(), ("**all**", total(of.values()))]:
        refused = f" (refused: {one.refused[0]})" if one.refused and name != "**all**" else ""
        lines.append(f"| {name}{refused} | {' | '.join(str(getattr(one, c)) for c in COLUMNS)} |")
    return "\n".join(lines)


def main(arguments: list[str]) -> int:
    """1 where a layer that the stock loader reads is lost, or one is silently different."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--every", action="store_true", help="a line for each file")
    given = parser.parse_args(arguments)
    logging.disable(logging.ERROR)
    torch.set_num_threads(1)
    found = rows(sys.modules["ziplora_pack"])
    print(table(found if given.every else by_kind(found)))
    sums = total(found.values())
    print(
        f"\n{sums.files} files, {sums.layers} layers, {sums.stock} of them read by ComfyUI's own loader: {sums.lost} "
        f"of these lost here; {sums.ours} read here, {sums.silent} of them silently different; "
        f"{len(sums.refused)} files refused"
    )
    return 1 if sums.lost or sums.silent else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
