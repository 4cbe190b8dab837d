"""The names that LoRA files give layers and matrices: a table of the forms, and what follows from it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Form:
    """One way to write an update of a layer.

    endings: pattern of what follows the layer's name. together: endings that a layer has all or none of. mark: pattern
    of what a name holds that is a LoRA's and no checkpoint's, in any case; empty where another form's says it too.
    beside: endings that are no update by themselves.
    """

    endings: str
    together: tuple[tuple[str, ...], ...] = ()
    mark: str = ""
    beside: tuple[str, ...] = ()


MAGNITUDES = (
    ".lora_magnitude_vector", ".lora_magnitude_vector.weight",
    ".lora_magnitude_vector.default", ".lora_magnitude_vector.default.weight",
)  # fmt: skip

FORMS = (
    Form(r"\.lora_(?:up|down|mid)\.weight", ((".lora_up.weight", ".lora_down.weight"),), "lora"),  # kohya's
    Form(  # peft's
        r"\.lora_[ABE](?:\.default)?(?:\.weight)?",  # E: AdaLoRA's
        (
            (".lora_B.weight", ".lora_A.weight"),
            (".lora_B.default.weight", ".lora_A.default.weight"),
            (".lora_B", ".lora_A"),
        ),
        beside=(".lora_E", ".lora_E.default"),
    ),
    Form(  # diffusers'
        r"[._]lora\.(?:up|down)\.weight",
        ((".lora.up.weight", ".lora.down.weight"), ("_lora.up.weight", "_lora.down.weight")),
    ),
    Form(
        r"\.lora_linear_layer\.(?:up|down)\.weight",
        ((".lora_linear_layer.up.weight", ".lora_linear_layer.down.weight"),),
    ),
    Form(  # LoHa
        r"\.hada_[wt]\d(?:_[ab])?",
        ((".hada_w1_a", ".hada_w1_b", ".hada_w2_a", ".hada_w2_b"), (".hada_t1", ".hada_t2")),
        "lycoris|hada_",
    ),
    Form(  # LoKr
        r"\.lokr_[wt]\d(?:_[ab])?",
        ((".lokr_w1_a", ".lokr_w1_b"), (".lokr_w2_a", ".lokr_w2_b")),
        "lokr_",
    ),
    Form(r"\.oft_\w+(?:\.default)?(?:\.weight)?", mark="oft_", beside=(".oft_terms",)),  # OFT, BOFT
    Form(r"\.ia3_(?:l(?:\.default)?|axis)", mark=r"\.ia3_l", beside=(".ia3_axis",)),
    Form(r"\.vera_lambda_[bd]", ((".vera_lambda_b", ".vera_lambda_d"),), "vera_lambda_"),
    Form(  # GLoRA
        r"\.[ab][12]\.weight",
        ((".a1.weight", ".a2.weight", ".b1.weight", ".b2.weight"),),
        r"\.[ab][12]\.weight$",
    ),
    Form(r"\.diff|\.diff_b", mark=r"\.diff(_b)?$", beside=(".diff_b",)),  # differences of a weight, and of its bias
    Form(r"\.[wb]_norm", mark=r"\.[wb]_norm$", beside=(".b_norm",)),
    Form(r"\.set_weight", mark=r"\.set_weight$"),
    Form(
        r"\.alpha|\.dora_scale|\.reshape_weight|\.rescale",
        mark="dora_scale",
        beside=(".alpha", ".dora_scale", ".reshape_weight", ".rescale"),
    ),
    Form(rf"(?:{'|'.join(map(re.escape, MAGNITUDES))})", beside=MAGNITUDES),  # DoRA's, of peft and diffusers
)
TOGETHER = tuple(endings for form in FORMS for endings in form.together)
BESIDE_AN_UPDATE = tuple(ending for form in FORMS for ending in form.beside)
_ENDING = re.compile(f"(?:{'|'.join(form.endings for form in FORMS)})$")
_MARK = re.compile("|".join(form.mark for form in FORMS if form.mark), re.IGNORECASE)

# Prefixes that diffusers and peft put before a module's diffusers name. On SDXL the host maps the
# `processor` names only, so files of the diffusers DreamBooth scripts and of B-LoRA load as nothing.
DIFFUSERS_PREFIXES = ("", "unet.", "unet.unet.", "base_model.model.", "unet.base_model.model.")
TRANSFORMER_PREFIXES = (
    "", "transformer.", "diffusion_model.", "base_model.model.", "transformer.base_model.model.",
)  # fmt: skip
JOINED_PREFIXES = ("lora_transformer_", "lycoris_")  # OneTrainer's and SimpleTuner's, before names without dots

_TEXT_ENCODER = re.compile(r"^(?:lora_te|lora_prior_te|text_encoder|text_encoders|te\d?[._]|base_model\.model\.text)")


def is_lora_name(name: str) -> bool:
    """Whether a tensor of this name is a LoRA's, and no checkpoint's."""
    return _MARK.search(name) is not None


def layer_name(key: str) -> str:
    """The layer that a tensor of a LoRA file belongs to: its name without `.lora_up.weight` and the like."""
    return _ENDING.sub("", key)


def is_text_encoder(key: str) -> bool:
    return _TEXT_ENCODER.match(key) is not None


def is_elsewhere(key: str) -> bool:
    """Whether a tensor is no layer's of the model: a text encoder's, or one that layers share."""
    return is_text_encoder(key) or re.search(r"(?:^|\.)vera_[AB](?:\.|$)", key) is not None


def is_text_encoder_alone(names: Iterable[str]) -> bool:
    """Whether a LoRA file with these tensors changes no layer of a model."""
    return all(map(is_text_encoder, names))


_TE_PREFIXES = (  # before a text encoder's module names, and kohya's names for the same
    (re.compile(r"^(?:base_model\.model\.)?text_encoder_2\.(?:base_model\.model\.)?"), "lora_te2_"),
    (re.compile(r"^(?:base_model\.model\.)?text_encoder\.(?:base_model\.model\.)?"), "lora_te1_"),
)


def kohya_text_encoder(layer: str) -> str:
    """kohya's name of a text-encoder layer of a LoRA file; names of other forms stay as they are.

    Newer releases of transformers have no `text_model` in the names of CLIP's layers.
    """
    for pattern, prefix in _TE_PREFIXES:
        if pattern.match(layer):
            inner = re.sub(r"^(?=encoder\.layers\.)", "text_model.", pattern.sub("", layer))
            return prefix + inner.replace(".", "_")
    return layer


def text_encoder_layers(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Text-encoder layer of a LoRA file -> kohya's name of it.

    Of several names of one layer the last counts, as in the host's loader: names that it does not know come first,
    then kohya's, then diffusers'.
    """

    def place(layer: str) -> int:
        return 1 if layer.startswith("lora_te") else 2 if re.match(r"text_encoder(_2)?\.text_model\.", layer) else 0

    return {k: kohya_text_encoder(k) for k in sorted(map(layer_name, filter(is_text_encoder, tensors)), key=place)}


def diffusers_text_encoder(name: str) -> str:
    """peft's module name of a text-encoder layer in kohya's: `text_encoder.text_model.encoder.layers.0.….q_proj`."""
    for prefix, module in (
        ("lora_te2_", "text_encoder_2."),
        ("lora_te1_", "text_encoder."),
        ("lora_te_", "text_encoder."),
    ):
        if name.startswith(prefix):
            inner = name.removeprefix(prefix)
            for joined, dotted in _TE_WORDS.items():
                inner = inner.replace(joined, dotted)
            return module + inner
    return name


_TE_WORDS = {
    "text_model_encoder_layers_": "text_model.encoder.layers.",
    "_self_attn_": ".self_attn.",
    "_mlp_fc": ".mlp.fc",
}


_FAMILIES = (  # what only one family's names hold, in this order
    ("HunyuanVideo or HunyuanImage", r"individual_token_refiner"),
    ("Anima or Cosmos Predict2", r"blocks[._]\d+[._](?:cross_attn|self_attn)[._](?:[qkv]|output)_proj"),
    ("Wan", r"blocks[._]\d+[._](?:cross_attn|self_attn)[._]"),
    ("HiDream", r"(?:double|single)_stream_blocks[._]\d"),
    ("Krea 2", r"blocks[._]\d+[._]attn[._]w[qkvo][._]"),
    ("HunyuanDiT", r"blocks[._]\d+[._]attn[12][._](?:Wqkv|kv_proj)"),
    ("Qwen-Image", r"transformer_blocks[._]\d+[._](?:img_mlp|txt_mlp|img_mod)"),
    ("Flux or Flux 2 or Chroma", r"(?:double_blocks|single_blocks|single_transformer_blocks)[._]\d"),
    ("SD 3", r"joint_blocks[._]\d|transformer_blocks[._]\d+[._]ff_context"),
    ("SD 3 or Qwen-Image", r"transformer_blocks[._]\d+[._]attn[._]add_[qkv]_proj"),
    ("LTX-Video", r"^(?:lora_unet_|diffusion_model\.|transformer\.)?transformer_blocks[._]\d+[._]attn[12][._]"),
    ("Lumina 2 or Z-Image", r"(?:noise_refiner|context_refiner)[._]\d|layers[._]\d+[._](?:attention|adaLN_modulation)"),
)
_CONTEXT_WIDTHS = {768: "SD 1.5", 1024: "SD 2", 1280: "SDXL refiner", 2048: "SDXL"}


_UNREAD = (  # kinds of update that neither the host nor this pack makes matrices of
    ("BOFT of peft", r"\.boft_[RSs]"),
    ("OFT of an old peft", r"\.oft_r(?:\.|$)"),
    ("IA³ of LyCORIS", r"\.on_input$"),
    ("VB-LoRA", r"vblora_"),
    ("FourierFT", r"\.fourierft_"),
    ("RandLoRA", r"randlora_"),
    ("HRA", r"\.hra_u"),
    ("MiSS or Bone", r"\.(?:miss|bone)_block"),
    ("LoRA with shared or gated parts", r"\.(?:gralora_|hira_|road_|c3a_|delora_)"),
)


def unread_kind(names: Iterable[str]) -> tuple[str, str] | None:
    """(A kind of update that is not read, a tensor that shows it), of the first that a file's names hold."""
    for name in names:
        for kind, pattern in _UNREAD:
            if re.search(pattern, name):
                return kind, name
    return None


def looks_like(tensors: Mapping[str, Tensor]) -> str | None:
    """Which model family a LoRA file was made for, from its names and the width of its prompts; None where unclear."""
    for family, pattern in _FAMILIES:
        if any(re.search(pattern, name) for name in tensors if not is_text_encoder(name)):
            return family
    for name, tensor in tensors.items():
        if re.search(r"attn2[._](?:processor[._])?to_k.*(?:down|lora_A)", name) and tensor.ndim >= 2:
            return _CONTEXT_WIDTHS.get(tensor.shape[1])
    return None
