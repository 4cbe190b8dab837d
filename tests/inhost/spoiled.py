"""Strategies for what is not as it should be: JSON, names, tensors, and safetensors files at all their levels."""

from __future__ import annotations

import io
import json
import pickle
import struct
import zipfile
from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st
from safetensors.torch import save
from torch import Tensor

Tensors = dict[str, Tensor]
Draw = Callable[..., Any]

HUGE = (2**31 - 1, 2**31, 2**32, 2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 10**30)
DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.int8,
    torch.uint8, torch.int16, torch.int32, torch.int64, torch.bool, torch.complex64, torch.uint16, torch.uint32,
    torch.uint64,
]  # fmt: skip
DTYPE_NAMES = [
    "F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F6_E2M3", "F4", "C64", "I64", "I32", "I8", "U64",
    "U16", "U8", "BOOL", "f16", "Q4_K", "", "F128",
]  # fmt: skip

sizes = st.one_of(st.integers(0, 5), st.sampled_from([8, 32, 48, 64, 1024]), st.sampled_from(HUGE))
numbers = st.one_of(
    st.integers(-5, 5),
    st.sampled_from([*HUGE, *(-n for n in HUGE), int("9" * 400), 0.5, 1e300, float("inf"), float("-inf")]),
    st.just(float("nan")),
)
words = st.one_of(
    st.text(max_size=12),
    st.sampled_from(
        [
            "",
            " ",
            ".",
            "..",
            "../../x",
            "/etc/passwd",
            "C:\\x",
            "a\0b",
            "a\nb",
            "\u202etxt",
            "x" * 300,
            "x" * 5000,
            "\ud800",
            "None",
            "NaN",
            "%s%n",
            "{}",
            "__proto__",
            "con",
            "lora",
            "ł😀",
            "<object>",
        ]
    ),  # fmt: skip
)
anything = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, words),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(words, inner, max_size=3)),
    max_leaves=5,
)


class Pool(list):  # type: ignore[type-arg]
    """Hypothesis prints what a strategy was given: thousands of numbers."""

    def __repr__(self) -> str:
        return f"{len(self)} files"


def one(draw: Draw, options: Any) -> Any:
    return draw(st.sampled_from(list(options)))


# Tensors


@st.composite
def shapes(draw: Draw) -> tuple[int, ...]:
    shape = draw(st.lists(st.sampled_from([0, 1, 1, 2, 3, 4, 8, 32, 48, 64]), max_size=5))
    while torch.Size(shape).numel() > 2**15:
        shape.remove(max(shape))
    if draw(st.integers(0, 19)) == 0:
        shape = one(draw, [(20_000, 1), (1, 20_000), (1, 1, 1, 20_000), (20_000,), (1, 1, 140, 140), (2**40, 0)])
    return tuple(shape)


@st.composite
def tensors(draw: Draw) -> Tensor:
    """Any shape, any dtype, any numbers."""
    made = torch.full(draw(shapes()), 0.25)
    return spoiled_dtype(draw, spoiled_values(draw, made) if draw(st.booleans()) else made)


def spoiled_dtype(draw: Draw, tensor: Tensor) -> Tensor:
    return tensor.to(one(draw, DTYPES))


def spoiled_values(draw: Draw, tensor: Tensor) -> Tensor:
    number = one(draw, [float("nan"), float("inf"), float("-inf"), 0.0, -1.0, 65504.0, 3e38, -3e38, 1e-45])
    if tensor.numel() == 0:
        return tensor
    tensor = tensor.contiguous().clone()
    if draw(st.booleans()) or tensor.ndim == 0:
        return tensor.fill_(number) if tensor.dtype == torch.float32 else tensor
    tensor.view(-1)[draw(st.integers(0, tensor.numel() - 1))] = number if tensor.is_floating_point() else 0
    return tensor


def spoiled_shape(draw: Draw, tensor: Tensor) -> Tensor:
    ways: list[Callable[[], Tensor]] = [
        lambda: tensor.flatten(),
        lambda: tensor[None],
        lambda: tensor[..., None],
        lambda: tensor.reshape(*tensor.shape, 1, 1),
        lambda: tensor.transpose(0, -1) if tensor.ndim > 1 else tensor,
        lambda: tensor[:0],
        lambda: tensor[..., :0],
        lambda: tensor[..., :1],
        lambda: tensor[:-1],
        lambda: torch.cat([tensor, tensor]),
        lambda: tensor.flatten()[0] if tensor.numel() else tensor,
        lambda: draw(tensors()),
    ]
    return tensor if tensor.ndim == 0 else one(draw, ways)()


ALPHAS = [
    torch.tensor(float("nan")), torch.tensor(float("inf")), torch.tensor(-4.0), torch.tensor(0.0), torch.tensor(3e38),
    torch.tensor([4.0]), torch.tensor([[4.0]]), torch.tensor([1.0, 2.0]), torch.empty(0), torch.tensor(4),
    torch.tensor(True), torch.tensor(2**62), torch.tensor(4.0, dtype=torch.float16), torch.tensor(1 + 2j),
    torch.tensor(4.0).to(torch.float8_e4m3fn),
]  # fmt: skip
SUFFIXES = [
    ".lora_up.weight", ".lora_down.weight", ".lora_mid.weight", ".lora_A.weight", ".lora_B.weight", "_lora.up.weight",
    "_lora.down.weight", ".lora.up.weight", ".lora_A", ".lora_B", ".lora_B.default.weight", ".alpha", ".dora_scale",
    ".reshape_weight", ".diff", ".diff_b", ".w_norm", ".b_norm", ".set_weight", ".hada_w1_a", ".hada_w1_b",
    ".hada_w2_a", ".hada_t1", ".lokr_w1", ".lokr_w2", ".lokr_w1_a", ".lokr_w2_b", ".lokr_t2", ".a1.weight",
    ".b2.weight", ".oft_blocks", ".rescale", ".lora_linear_layer.up.weight", "",
]  # fmt: skip


def spoil_tensors(draw: Draw, file: Tensors, layers: list[str]) -> Tensors:
    """One change to what a file holds. layers: names, without suffix, that mean something."""
    file = dict(file)
    name = one(draw, file) if file else ""
    way = draw(st.integers(0, 9))
    if way == 0:
        file.pop(name, None)
    elif way in (1, 2) and file:
        file[name] = spoiled_shape(draw, file[name])
    elif way == 3 and file:
        file[name] = spoiled_values(draw, file[name])
    elif way == 4 and file:
        if draw(st.booleans()):
            file[name] = spoiled_dtype(draw, file[name])
        else:
            dtype = one(draw, DTYPES)
            file = {k: v.to(dtype) for k, v in file.items()}
    elif way == 5:
        file[one(draw, layers) + ".alpha"] = one(draw, ALPHAS)
    elif way == 6:
        file[one(draw, layers) + one(draw, SUFFIXES)] = draw(tensors())
    elif way == 7 and file:
        file[one(draw, layers) + one(draw, SUFFIXES)] = file[name]
    elif way == 8 and file:
        file[draw(words) + one(draw, SUFFIXES)] = file.pop(name)
    elif file:
        wanted = one(draw, [[2**40, 2**40], [64, 64], [], [-1], [0]])
        file[f"{name.split('.')[0]}.reshape_weight"] = torch.tensor(wanted)
    return file


# Headers and bytes


def to_bytes(file: Tensors, metadata: dict[str, str] | None = None) -> bytes:
    kept = {k: v.contiguous().clone() for k, v in file.items() if encodable(k)}
    return save(kept, metadata)


def encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def with_header(header: bytes, data: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header + data


def split(raw: bytes) -> tuple[dict[str, Any], bytes]:
    (length,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def dumped(value: Any) -> bytes:
    """JSON as Python writes it, NaN and lone surrogates too."""
    return json.dumps(value).encode()


def spoil_header(draw: Draw, raw: bytes) -> bytes:
    """One change to the table of tensors; the data stay."""
    try:
        header, data = split(raw)
    except (ValueError, struct.error):
        return raw
    if not isinstance(header, dict) or not header:
        return raw
    name = one(draw, header)
    entry = header[name]
    way = draw(st.integers(0, 10))
    if way <= 4 and isinstance(entry, dict):
        field = one(draw, ["dtype", "shape", "data_offsets", "extra"])
        made = {
            "dtype": st.one_of(st.sampled_from(DTYPE_NAMES), anything),
            "shape": st.one_of(st.lists(sizes, max_size=4), st.lists(numbers, max_size=3), anything),
            "data_offsets": st.one_of(st.lists(sizes, min_size=2, max_size=2), st.lists(numbers, max_size=3), anything),
        }
        header[name] = {**entry, field: draw(made.get(field, anything))}
        if draw(st.integers(0, 5)) == 0:
            del header[name][field]
    elif way == 5:
        header[name] = draw(anything)
    elif way == 6:
        header["__metadata__"] = draw(st.one_of(st.dictionaries(words, words, max_size=3), anything))
    elif way == 7:
        header[draw(words)] = header.pop(name)
    elif way == 8:  # a key twice
        twice = json.dumps(name) + ":" + json.dumps(draw(anything)) + ","
        return with_header(b"{" + twice.encode() + dumped(header)[1:], data)
    elif way == 9:
        filling = one(draw, [b" " * 64, b"\0" * 8, b"\n", b"x", b"\xff\xfe"])
        text = dumped(header)
        return with_header(text + filling if draw(st.booleans()) else filling + text, data)
    else:
        return with_header(dumped(draw(anything)), data)
    return with_header(dumped(header), data)


def spoil_bytes(draw: Draw, raw: bytes) -> bytes:
    """Cut off, flipped, spliced, or with another length in front."""
    body = bytearray(raw)
    way = draw(st.integers(0, 5))
    near = min(len(body), 600)
    if way == 0:
        return bytes(body[: draw(st.integers(0, len(body)))])
    if way <= 2 and body:
        for _ in range(draw(st.integers(1, 4))):
            place = draw(st.integers(0, (near if way == 1 else len(body)) - 1))
            body[place] ^= 1 << draw(st.integers(0, 7))
    elif way == 3:
        length = draw(st.one_of(st.sampled_from([n for n in HUGE if n < 2**64]), st.integers(0, 4000)))
        body[:8] = struct.pack("<Q", length)
    elif way == 4:
        start, end = sorted((draw(st.integers(0, near)), draw(st.integers(0, near))))
        body[start:end] = draw(st.binary(max_size=24))
    else:
        body += draw(st.binary(min_size=1, max_size=24))
    return bytes(body)


class Bait:
    """Unpickled, it would print."""

    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("unpickled",)


def _saved_by_torch(value: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


def _archive() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(Bait()))
    return buffer.getvalue()


_TENSOR = '"lora_unet_x.lora_up.weight":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
OTHERS: dict[str, bytes] = {
    "nothing": b"",
    "text": b"<!DOCTYPE html><html>404</html>" * 9,
    "pickle": pickle.dumps(Bait()),
    "pickle, protocol 0": pickle.dumps(Bait(), protocol=0),
    "torch.save": _saved_by_torch({"lora_unet_x.lora_up.weight": torch.ones(2, 1)}),
    "torch.save, old": _saved_by_torch(Bait(), _use_new_zipfile_serialization=False),
    "zip with a pickle": _archive(),
    "a header's length and no header": struct.pack("<Q", 100_000_000),
    "length near 2^63": struct.pack("<Q", 2**63 - 8) + b"{}",
    "length 2^64 - 1": b"\xff" * 8 + b"{}",
    "deep lists": with_header(b"[" * 50_000, b""),
    "deep tables": with_header(b'{"a":' * 50_000, b""),
    "deep metadata": with_header(b'{"__metadata__":' + b'{"a":' * 50_000 + b"1" + b"}" * 50_001, b""),
    "a number of 50,000 digits": with_header(('{"a":{"data_offsets":[0,' + "9" * 50_000 + "]}}").encode(), b""),
    "a tensor of terabytes": with_header(
        b'{"lora_up.weight":{"dtype":"F32","shape":[1048576,1048576],"data_offsets":[0,4398046511104]}}', b"\0" * 64
    ),
    "a shape that overflows": with_header(
        b'{"lora_up.weight":{"dtype":"F32","shape":[4294967296,4294967296,4],"data_offsets":[0,0]}}', b""
    ),
    "a hole": with_header(b'{"lora_up.weight":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}', b"\0" * 8),
    "an overlap": with_header(
        b'{"lora_up.weight":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
        b'"lora_down.weight":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        b"\0" * 4,
    ),
    "backwards": with_header(b'{"lora_up.weight":{"dtype":"F32","shape":[1],"data_offsets":[4,0]}}', b"\0" * 4),
    "a tensor twice": with_header(("{" + _TENSOR + "," + _TENSOR + "}").encode(), b"\0" * 4),
    "metadata twice": with_header(b'{"__metadata__":{},"__metadata__":{},' + _TENSOR.encode() + b"}", b"\0" * 4),
    "not UTF-8": with_header(b'{"\xff\xfe":1}', b""),
    "UTF-16": with_header("{}".encode("utf-16"), b""),
    "a number": with_header(b"17", b""),
    "NaN": with_header(b"NaN", b""),
}


@st.composite
def spoiled_files(draw: Draw, good: list[Tensors], layers: list[str]) -> bytes:
    """A file as trainers write it, changed up to three times: its tensors, then its header, then its bytes."""
    file = one(draw, good)
    for _ in range(one(draw, [0, 1, 1, 1, 2, 3])):
        file = spoil_tensors(draw, file, layers)
    raw = to_bytes(file, one(draw, [None, {"ss_network_dim": "4", "title": "é"}]))
    for _ in range(one(draw, [0, 0, 0, 1, 2])):
        raw = spoil_header(draw, raw)
    for _ in range(one(draw, [0, 0, 0, 1, 2])):
        raw = spoil_bytes(draw, raw)
    return raw


# JSON and what travels on sockets


def spoil_json(draw: Draw, value: Any) -> Any:
    """One change somewhere inside: another value, one more, one less."""
    if isinstance(value, dict) and value and draw(st.integers(0, 4)):
        key = one(draw, value)
        way = draw(st.integers(0, 6))
        if way == 0:
            return {k: v for k, v in value.items() if k != key}
        if way == 1:
            return {**value, draw(words): draw(anything)}
        return {**value, key: spoil_json(draw, value[key])}
    if isinstance(value, list | tuple) and value and draw(st.integers(0, 2)):
        place = draw(st.integers(0, len(value) - 1))
        way = draw(st.integers(0, 3))
        if way == 0:
            return [*value[:place], *value[place + 1 :]]
        return [*value[:place], spoil_json(draw, value[place]), *value[place + 1 :]]
    return draw(anything)


@st.composite
def spoiled_coefficients(draw: Draw, vectors: Tensors, about: dict[str, Any]) -> bytes:
    """A file of coefficients, changed up to three times: its vectors, what it says of itself, its header, its bytes."""
    file = vectors
    for _ in range(one(draw, [0, 0, 1, 1, 2])):
        file = spoil_tensors(draw, file, [*(k for k in vectors), "content.x", "style.", "content"])
    known = about
    for _ in range(one(draw, [0, 1, 1, 2])):
        known = spoil_json(draw, known)
    text = json.dumps(known) if draw(st.integers(0, 9)) else one(draw, ["", "[" * 5000, "{", '{"format": "ziplora 2"}'])
    metadata = {"ziplora": text} if draw(st.integers(0, 19)) else {"other": text}
    raw = to_bytes(file, metadata)
    if draw(st.integers(0, 5)) == 0:
        raw = spoil_header(draw, raw)
    if draw(st.integers(0, 5)) == 0:
        raw = spoil_bytes(draw, raw)
    return raw


def odd_tensors(*good: tuple[int, ...]) -> st.SearchStrategy[Any]:
    """Of a shape that is right or nearly so, with odd numbers and dtypes now and then; or nothing like a tensor."""

    @st.composite
    def make(draw: Draw) -> Any:
        if draw(st.integers(0, 9)) == 0:
            return draw(anything)
        shape = list(one(draw, good))
        for _ in range(one(draw, [0, 0, 0, 1, 2])):
            place = draw(st.integers(0, len(shape) - 1)) if shape else 0
            way = draw(st.integers(0, 3))
            if way == 0 and shape:
                shape[place] = one(draw, [0, 1, 2, 3, 5, 16, 77, 4096])
            elif way == 1 and shape:
                del shape[place]
            else:
                shape.insert(place, one(draw, [0, 1, 2]))
        if torch.Size(shape).numel() > 2**18:
            return torch.zeros(()).expand(*shape[:1], *(min(side, 64) for side in shape[1:]))
        made = torch.full(shape, 0.5)
        if draw(st.integers(0, 3)) == 0:
            made = spoiled_values(draw, made)
        return spoiled_dtype(draw, made) if draw(st.integers(0, 4)) == 0 else made

    return make()


@st.composite
def conditionings(draw: Draw, width: int, pooled: int | None) -> Any:
    context = draw(odd_tensors((1, 20, width), (1, 20, width), (1, 77, width)))
    options: dict[str, Any] = {} if pooled is None else {"pooled_output": draw(odd_tensors((1, pooled)))}
    for _ in range(one(draw, [0, 0, 0, 1, 2])):
        key = one(draw, [
            "area", "mask", "control", "gligen", "hooks", "pooled_output", "strength", "attention_mask", "guidance",
            "reference_latents", "concat_latent_image", "width", "height", "start_percent", "cross_attn_controlnet", "",
        ])  # fmt: skip
        options[key] = draw(st.one_of(numbers, tensors()))
    ways = [[[context, options]]] * 6 + [
        [], [[context, options]] * 2, [[context]], [context, options], [[context, None]], (context, options), None,
        [[options, context]], [None], context, {"a": 1}, "a sks dog", [[]],
    ]  # fmt: skip
    return one(draw, ways)


@st.composite
def latents(draw: Draw, channels: int) -> Any:
    samples = draw(odd_tensors((1, channels, 8, 8), (1, channels, 8, 8), (3, channels, 8, 16)))
    given: Any = {"samples": samples}
    if draw(st.integers(0, 5)) == 0:
        given[one(draw, ["noise_mask", "batch_index", "type", "samples "])] = draw(anything)
    return one(draw, [*[given] * 6, {}, {"sample": samples}, samples, None, [], "latent", {"samples": None}])


@st.composite
def pictures(draw: Draw) -> Any:
    return draw(odd_tensors((1, 16, 16, 3), (2, 16, 16, 3), (1, 16, 24, 4)))


prefixes = st.one_of(
    st.text(max_size=20),
    words,
    st.lists(
        st.sampled_from(
            [
                "..",
                ".",
                "/",
                "\\",
                "a",
                "loras",
                " ",
                "%date%",
                "%year%-%month%",
                "%width%",
                "%",
                "\0",
                "~",
                "$HOME",
                "|",
                "CON",
                "nul.txt",
                ":",
                "C:",
                "//host/share",
                "x" * 100,
                "é",
                "\u202e",
                "a_00001_",
                "*",
                "?",
                "-rf",
                "\n",
            ]
        ),  # fmt: skip
        max_size=6,
    ).map("/".join),
    st.lists(st.sampled_from(["..", "/", "a", "\\", "..\\", "../", "\ud800", "%2e%2e/"]), max_size=8).map("".join),
)
