"""Bad input at scale: thousands of spoiled files and settings, each of which works or is refused in a sentence.

Each case is judged by `fuzzing.Judge`. A tenth of the cases is tried, the same in every run; `dev.py test --all` tries
all of them, and ZIPLORA_FUZZ=<n> draws new ones, n times as many, and looks for the simplest that fails.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import pickle
import socket
import tempfile
import time
from contextlib import suppress

import pytest
import torch
from families import FAMILIES
from fuzzing import Guard, Judge
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st
from spoiled import (
    HUGE,
    OTHERS,
    Pool,
    anything,
    conditionings,
    latents,
    one,
    pictures,
    prefixes,
    spoil_tensors,
    spoiled_coefficients,
    spoiled_files,
    to_bytes,
    words,
)
from test_dense_formats import CONVOLUTION, LINEAR, lora
from torch.utils._pytree import tree_leaves

TIMES = int(os.environ.get("ZIPLORA_FUZZ", "0"))
EVERY = 1 if TIMES or os.environ.get("ZIPLORA_ALL") else 10  # of so many cases one is tried
NUMBER = itertools.count()
LARGEST = 2**21  # bytes: what the tiny models' own tensors never reach


def many(count: int):
    """How often a test is tried, and how."""
    return settings(
        max_examples=count * max(TIMES, 1) // EVERY,
        derandomize=not TIMES,
        database=None,
        deadline=None,
        phases=[Phase.explicit, Phase.generate, *[Phase.shrink] * bool(TIMES)],
        print_blob=True,
        suppress_health_check=list(HealthCheck),
    )


@pytest.fixture(scope="module")
def fuzz(pack, tmp_path_factory):
    """Folders of the host's own, quiet logs, and the judge, who says at the end what was tried."""
    import folder_paths

    outside = tmp_path_factory.mktemp("fuzz")
    base = outside / "a" / "comfyui"
    for name in ("loras", "output/ziplora", "output/loras", "output/embeddings", "temp/user"):
        (base / name).mkdir(parents=True)
    with pytest.MonkeyPatch.context() as patch:
        registered = dict(folder_paths.folder_names_and_paths)
        registered["loras"] = ([str(base / "loras")], {".safetensors"})
        registered["embeddings"] = ([str(base / "output" / "embeddings")], {".safetensors"})
        registered["ziplora"] = ([str(base / "output" / "ziplora")], {".safetensors"})
        patch.setattr(folder_paths, "folder_names_and_paths", registered)
        patch.setattr(folder_paths, "filename_list_cache", {})
        patch.setattr(folder_paths, "output_directory", str(base / "output"))
        patch.setattr(folder_paths, "temp_directory", str(base / "temp"))
        patch.setattr(tempfile, "tempdir", str(base / "temp"))
        patch.setattr(folder_paths, "user_directory", str(base / "temp" / "user"))
        patch.setattr(torch, "load", lambda *_, **__: Guard.tell("torch.load"))
        logging.disable(logging.CRITICAL)
        files = pack.ziplora_core.files
        other_model = pack.nodes.bridge.lora.refusals.OtherModelError
        errors = (files.LoRAFileError, other_model, ValueError, FloatingPointError, OSError)
        judge = Judge([base / "output", base / "temp"], errors)
        judge.base, judge.outside = base, outside
        yield judge
        import matplotlib.font_manager  # writes into a cache of its own when it is first imported

        assert matplotlib.font_manager
        patch.setattr(torch, "load", lambda *_, **__: Guard.tell("torch.load"))
        logging.disable(logging.NOTSET)
        print("\n" + judge.table())


def small_unet():
    """SD 1.5's class with one block on the way down: linear layers, convolutions, norms and biases."""
    family = FAMILIES["SD 1.5"]
    smaller = {"num_res_blocks": [1], "channel_mult": [1], "transformer_depth": [1], "transformer_depth_output": [1, 1]}
    return type(family)(family.config, {**family.unet, **smaller}, family.latent, family.layers, pooled=False).patcher()


@pytest.fixture(scope="module")
def models():
    return {"U-Net": small_unet(), "Flux": FAMILIES["Flux"].patcher()}


UNET = {  # layers of the small U-Net: kohya's name -> shape
    "lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q": (32, 32),
    "lora_unet_input_blocks_1_1_transformer_blocks_0_attn2_to_k": (32, 48),
    "lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_out_0": (32, 32),
    "lora_unet_input_blocks_1_1_proj_in": (32, 32, 1, 1),
    "lora_unet_input_blocks_1_0_in_layers_2": (32, 32, 3, 3),
}
MORE = [  # other names that mean something there: a norm, diffusers' and the host's own names, a text encoder
    "diffusion_model.input_blocks.1.1.norm",
    "diffusion_model.input_blocks.1.1.norm.bias",
    "diffusion_model.out.2",
    "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor.to_q",
    "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
    "base_model.model.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
    "lora_te_text_model_encoder_layers_0_self_attn_q_proj",
    "text_encoder.text_model.encoder.layers.0.mlp.fc1",
]
TEXT = "lora_te1_text_model_encoder_layers_0_self_attn_q_proj"
FLUX = {
    "transformer.transformer_blocks.0.attn.to_q": (64, 64),
    "transformer.single_transformer_blocks.0.attn.to_q": (64, 64),
    "diffusion_model.single_blocks.0.linear1_qkv": (192, 64),
    "lora_unet_double_blocks_0_img_attn_qkv": (192, 64),
}


def unet_files() -> Pool:
    g = torch.Generator().manual_seed(1)
    made = []
    for name, shape in UNET.items():
        for write in (LINEAR if len(shape) == 2 else CONVOLUTION).values():
            made.append(write(g, name, *shape))
    made += [{**a, **b} for a, b in itertools.combinations(made[::3], 2)]
    peft = {k.replace("lora_up", "lora_B").replace("lora_down", "lora_A"): t for k, t in made[0].items()}
    passthrough = {f"{MORE[0]}.w_norm": torch.ones(32), "diffusion_model.out.2.diff_b": torch.ones(4)}
    return Pool([*made, peft, {**made[0], **passthrough}])


def flux_files() -> Pool:
    g = torch.Generator().manual_seed(2)
    made = [write(g, name, *shape) for name, shape in FLUX.items() for write in (lora, LINEAR["LoKr"], LINEAR["DoRA"])]
    return Pool([*made, {**made[0], **made[3]}])


Q, CONVOLVED, NORM = list(UNET)[0], list(UNET)[-1], MORE[0]
ROW, COLUMN = torch.ones(1, 20_000), torch.ones(20_000, 1)
GOOD = lora(torch.Generator().manual_seed(4), Q, 32, 32)
FOUND = {  # what the fuzzer found, each made as small as it can be: tensors, and what is said of them (None: they work)
    "of rank 0": ({f"{Q}.lora_up.weight": torch.ones(32, 0), f"{Q}.lora_down.weight": torch.ones(0, 32)}, "no two mat"),
    "vectors": ({f"{Q}.lora_up.weight": torch.ones(32), f"{Q}.lora_down.weight": torch.ones(32)}, "no two matrices"),
    "a LoRA of a norm": (lora(torch.Generator(), NORM, 32, 32), "does not fit a weight of shape .32,."),
    "another norm's": ({**GOOD, f"{NORM}.w_norm": torch.ones(31)}, "does not fit a weight of shape .32,."),
    "a bias that the layer has not": ({**GOOD, f"{Q}.diff_b": torch.ones(32)}, None),
    "integers": ({k: t.mul(9).to(torch.int8) if t.ndim else t for k, t in GOOD.items()}, None),
    "another shape": ({**GOOD, f"{Q}.reshape_weight": torch.tensor([2**40, 2**40])}, "changes the shape"),
    "half of LoKr": ({f"{Q}.lokr_w1": torch.ones(32, 32)}, "does not fit"),
    "numbers at the edge": ({k: t * 0 + 3e38 for k, t in LINEAR["DoRA"](torch.Generator(), Q, 32, 32).items()}, "NaN"),
    "a huge outer product, LoHa": (
        {f"{Q}.hada_w{i}_{half}": t for i in (1, 2) for half, t in (("a", COLUMN), ("b", ROW))}, "does not fit"
    ),
    "a huge outer product, LoKr": ({f"{Q}.lokr_w1": COLUMN, f"{Q}.lokr_w2": ROW}, "does not fit"),
    "a huge rotation": ({f"{Q}.oft_blocks": COLUMN[None]}, "does not fit"),
    "a huge core": (
        {
            f"{CONVOLVED}.lora_up.weight": torch.ones(32, 1),
            f"{CONVOLVED}.lora_down.weight": ROW,
            f"{CONVOLVED}.lora_mid.weight": torch.ones(1, 1, 140, 140),
        },
        "does not fit",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FOUND)
def test_found(pack, fuzz, models, name):
    tensors, says = FOUND[name]
    path = fuzz.base / "loras" / "found.safetensors"
    path.write_bytes(to_bytes(tensors))
    loras, fitting = pack.nodes.bridge.lora.loras, pack.nodes.bridge.lora.fitting
    try:
        with torch.inference_mode():
            found = fuzz(
                "found",
                lambda: fitting.fit_one(loras.load(path.name, 1.0), models["U-Net"].model),
                (path.name,),
                LARGEST,
            )
            assert (found is None) == (says is not None)
            if says is not None:
                with pytest.raises(ValueError, match=says):
                    fitting.fit_one(loras.load(path.name, 1.0), models["U-Net"].model)
    finally:
        path.unlink()


def try_file(pack, fuzz, models, kind: str, family: str, raw: bytes) -> None:
    """As Load LoRA Pair does when queued and when it runs, and as the first node after it does."""
    loras, fitting = pack.nodes.bridge.lora.loras, pack.nodes.bridge.lora.fitting
    name = f"spoiled{next(NUMBER)}.safetensors"
    path = fuzz.base / "loras" / name
    path.write_bytes(raw)
    room = LARGEST + 4 * len(raw)

    def whole_path():
        said = loras.check(name)
        if said is not None:
            fuzz.check_sentence(said, (name,))
        fitted = fitting.fit_one(loras.load(name, 0.8), models[family].model)
        assert said is None, f"refused when queued ({said}), and then it works"
        return fitted

    try:
        with torch.inference_mode():
            fuzz(kind, whole_path, (name,), room)
    finally:
        path.unlink()


def each_other(test):
    for raw in OTHERS.values():
        test = example(raw=raw)(test)
    return test


@each_other
@given(raw=spoiled_files(unet_files(), [*UNET, *MORE]))
@many(3000)
def test_lora_files(pack, fuzz, models, raw):
    try_file(pack, fuzz, models, "LoRA file for a U-Net", "U-Net", raw)


@given(raw=spoiled_files(flux_files(), list(FLUX)))
@many(1000)
def test_lora_files_of_fused_layers(pack, fuzz, models, raw):
    try_file(pack, fuzz, models, "LoRA file for Flux", "Flux", raw)


@pytest.fixture(scope="module")
def zipped(pack, fuzz, models):
    """A pair from two good files, zipped by sum."""
    for name, file in zip(("subject", "style"), (unet_files()[0], unet_files()[-1]), strict=True):
        (fuzz.base / "loras" / f"{name}.safetensors").write_bytes(to_bytes(file))
    with torch.inference_mode():
        sources, _ = pack.nodes.LoadLoRAPair.execute("subject.safetensors", "style.safetensors", 1.0, 0.7).args
        return pack.nodes.DirectMergeLoRA.execute(models["U-Net"], sources, "sum").args[0]


@pytest.fixture(scope="module")
def vectors(zipped):
    sides = zipped.coefficients.by_concept
    return {f"{side}.{name}": m.clone() for side, found in sides.items() for name, m in found.items()}


def swallowed(work):
    with suppress(Exception):
        work()


def while_seconds(seconds):
    began = time.process_time()
    while time.process_time() < began + seconds:
        pass


TRESPASSES = {
    "a huge tensor": (lambda base: torch.zeros(2**30), "allocate memory"),
    "one that is given up": (lambda base: swallowed(lambda: torch.zeros(2**30)), "allocate memory"),
    "a tensor that is too large": (lambda base: torch.zeros(2**23), "bytes was made"),
    "a huge buffer": (lambda base: bytearray(2**30), "MemoryError"),
    "a second": (lambda base: while_seconds(1.1), r"1\.\d+ s"),
    "a file elsewhere": (lambda base: (base / "x").write_text(""), "open .*x"),
    "a folder elsewhere": (lambda base: (base / "output2").mkdir(), "os.mkdir .*output2"),
    "a file that is moved out": (lambda base: (base / "output" / "loras").rename(base / "x"), "os.rename .*x"),
    "the network": (lambda base: socket.create_connection(("127.0.0.1", 9), 0.1), "socket.connect"),
    "a name that is looked up": (lambda base: swallowed(lambda: socket.getaddrinfo("localhost", 9)), "getaddrinfo"),
    "a pickle": (lambda base: pickle.loads(OTHERS["pickle"]), "pickle.find_class"),  # noqa: S301
    "torch.load": (lambda base: torch.load(base / "x"), "torch.load"),
    "another error": (lambda base: {}["x"], "KeyError"),
    "the host's own error": (lambda base: torch.zeros(2).reshape(3), "RuntimeError"),
    "an error that is a ValueError's child": (lambda base: "\ud800".encode(), "UnicodeEncodeError"),
}


@pytest.mark.parametrize("name", TRESPASSES)
def test_the_judge_lets_nothing_pass(pack, fuzz, name):
    work, says = TRESPASSES[name]
    judge = Judge(fuzz.folders, fuzz.errors)
    with pytest.raises(AssertionError, match=says):
        judge(name, lambda: work(fuzz.base), room=2**20)
    for path in (fuzz.base / "x", fuzz.base / "output2"):
        if path.name == "x" and path.is_dir():
            path.rename(fuzz.base / "output" / "loras")
        elif path.exists():
            path.rmdir() if path.is_dir() else path.unlink()


@pytest.mark.parametrize("ending", ["pt", "ckpt", "bin", "pth", "safetensors"])
@pytest.mark.parametrize("what", ["pickle", "torch.save", "torch.save, old", "zip with a pickle", "a LoRA"])
def test_nothing_is_unpickled(pack, fuzz, models, what, ending):
    """Whatever a file is called: it is safetensors, or it is refused. Training goes on from a LoRA of any name."""
    files = {**OTHERS, "a LoRA": to_bytes(lora(torch.Generator(), next(iter(UNET)), 32, 32), {"ziplora_settings": ""})}
    name = f"file.{ending}"
    path, beside = (fuzz.base / "loras" / n for n in (name, f"beside.{ending}"))
    path.write_bytes(files[what])
    beside.write_bytes(to_bytes(lora(torch.Generator().manual_seed(1), next(iter(UNET)), 32, 32)))
    try:
        for node, odd in (
            ("SparsifyLoRA", {"lora": name}),
            ("LoadLoRAPair", {"content_lora": name, "style_lora": beside.name}),
            ("LoadLoRAPair", {"content_lora": beside.name, "style_lora": name}),
        ):
            result = fuzz("unpickling", lambda n=node, o=odd: run(pack, fuzz, models, None, n, o), (name,))
            assert (result is not None) == (what == "a LoRA")
        done = fuzz("unpickling", lambda: pack.nodes.bridge.training.lora_file.steps_done(name), (name,))
        assert done == 0
    finally:
        path.unlink()
        beside.unlink()


@given(data=st.data())
@many(2000)
def test_coefficient_files(pack, fuzz, models, zipped, vectors, data):
    """As Load Zipped LoRA does when queued and when it runs, and what it loaded is applied and saved again."""
    about = json.loads(json.dumps(pack.ziplora_core.saved.SavedZip(
        {c: pack.nodes.bridge.disk.provenance.bound(source) for c, source in zipped.sources.by_concept.items()},
        {"content": 1.0, "style": 1.0}, "sum", {"steps": 3}, {"torch": "2"}, "what it did",
    ).as_table()))  # fmt: skip
    raw = data.draw(spoiled_coefficients(vectors, about))
    name = f"spoiled{next(NUMBER)}.safetensors"
    path = fuzz.base / "output" / "ziplora" / name
    path.write_bytes(raw)

    def whole_path():
        said = pack.nodes.LoadZippedLoRA.validate_inputs(name)
        if said is not True:
            fuzz.check_sentence(said, (name,))
        with suppress(*fuzz.errors):
            pack.nodes.LoadZippedLoRA.fingerprint_inputs(name)
        again, report = pack.nodes.LoadZippedLoRA.execute(models["U-Net"], name).args
        assert said is True and isinstance(report, str)
        pack.nodes.ApplyZippedLoRA.execute(models["U-Net"], again, 1.0)
        pack.nodes.SaveZippedLoRA.execute(again, "again")

    try:
        with torch.inference_mode():
            fuzz("coefficient file", whole_path, (name,), LARGEST + 4 * len(raw))
    finally:
        path.unlink()
        for written in path.parent.glob("again*"):
            written.unlink()


@pytest.fixture(scope="module")
def clip(fuzz, load_miniature):
    found = load_miniature().clip
    for name in ("clip_l", "clip_g"):
        getattr(found.tokenizer, name).embedding_directory = [str(fuzz.base / "output" / "embeddings")]
    return found


@given(data=st.data())
@many(500)
def test_pairs(pack, fuzz, models, zipped, clip, data):
    """Two LORA_MODELs of other nodes, spoiled, all the way: paired, merged, dialled, applied, exported, read again."""
    nodes, good, layers = pack.nodes, unet_files(), [*UNET, *MORE]
    given, width = [], clip.cond_stage_model.clip_l.transformer.text_model.final_layer_norm.weight.numel()
    for _ in range(2):
        write = LINEAR[one(data.draw, ["LoRA", "LoHa", "DoRA"])]
        text = write(torch.Generator().manual_seed(3), TEXT, width, width)
        file = {**one(data.draw, good), **one(data.draw, [{}, text])}
        for _ in range(one(data.draw, [0, 0, 1, 1, 2])):
            file = spoil_tensors(data.draw, file, [*layers, TEXT])
        given.append(file)
    method, form = one(data.draw, ["sum", "sum", "NP-LoRA"]), one(data.draw, ["kohya", "kohya", "diffusers"])
    dtype, rank = one(data.draw, ["fp32", "fp16", "bf16"]), one(data.draw, [0, 0, 1, 4])

    def whole_path():
        (sources,) = nodes.PairLoRAs.execute(*given, 1.0, -0.5).args
        (merged,) = nodes.DirectMergeLoRA.execute(models["U-Net"], sources, method).args
        (dialled,) = nodes.StyleStrength.execute(merged, 1.5, 0.5).args
        nodes.ApplyZippedLoRA.execute(models["U-Net"], dialled, 1.0, clip)
        nodes.ExportMergedLoRA.execute(dialled, "loras/pair", rank, dtype, form)
        (written,) = (fuzz.base / "output" / "loras").glob("pair*")
        return pack.ziplora_core.files.read_lora_file(written)

    try:
        with torch.inference_mode():
            fuzz("pair", whole_path, ("content", "style", "layer '", "diffusers"), 2**25)
    finally:
        for path in (fuzz.base / "output" / "loras").glob("pair*"):
            path.unlink()


@given(data=st.data())
@many(1500)
def test_conditionings_and_latents(pack, fuzz, models, zipped, data):
    """What ZipLoRA Optimize is given is refused before anything is loaded, or steps can be taken with it."""
    optimise, sources = pack.nodes.ZipLoRAOptimize, zipped.sources
    given = {}
    for name in ("content_positive", "style_positive"):
        given[name] = [[torch.full((1, 20, 48), 0.5), {}]]
    for name in ("content_latents", "style_latents"):
        given[name] = {"samples": torch.full((1, 4, 8, 8), 0.5)}
    for name in data.draw(st.sets(st.sampled_from(sorted(given)), min_size=1, max_size=2)):
        given[name] = data.draw(conditionings(48, None) if "positive" in name else latents(4))
    dials = {"learning_rate": 0.01, "similarity_lambda": 0.01, "batch_size": 1, "seed": 0}

    def whole_path(steps):
        with torch.inference_mode():
            optimise.check_lazy_status(models["U-Net"], sources, steps=steps, **given, **dials)
            return optimise.execute(models["U-Net"], sources, steps=steps, solver="gradient", **given, **dials)

    fine = fuzz("conditioning and latents", lambda: whole_path(0), tuple(given)) is not None
    tensors = [t for t in tree_leaves(given) if isinstance(t, torch.Tensor)]
    small = None not in given.values() and max(t.numel() for t in tensors) <= 2**12
    if fine and small and data.draw(st.integers(0, 9)) == 0:
        fuzz("conditioning and latents that pass, a step", lambda: whole_path(1), (*given, "loss"), 2**26, 20)


odd_floats = st.one_of(st.floats(), st.floats(-3, 3), st.sampled_from([0.0, 1.0, 2.0, -10.0, 1e30, -1e-30]))
odd_ints = st.one_of(st.integers(-3, 3), st.sampled_from([*HUGE, *(-n for n in HUGE)]), st.booleans())
captions = st.one_of(words, words.map(lambda text: f"a * {text}"), words.map(lambda text: f"{text}*\na * b"))
no_steps = st.one_of(st.integers(-3, 0), st.integers(min_value=10_001), st.sampled_from(HUGE))


@st.composite
def calls(draw):
    """A node with settings that a link or the API may bring, and the names of what is odd."""
    call = draw(st.sampled_from([
        ("LoadLoRAPair", {"content_lora": words, "style_lora": words, "content_strength": odd_floats,
                          "style_strength": odd_floats}),
        ("PairLoRAs", {"content_strength": odd_floats, "style_strength": odd_floats}),
        ("StyleStrength", {"style_strength": odd_floats, "content_strength": odd_floats}),
        ("ApplyZippedLoRA", {"strength": odd_floats}),
        ("DirectMergeLoRA", {"method": st.one_of(st.sampled_from(["sum", "NP-LoRA", "B-LoRA blocks"]), anything)}),
        ("LoadZippedLoRA", {"zipped": words}),
        ("SparsifyLoRA", {"lora": words, "keep": odd_floats}),
        ("ExportMergedLoRA", {"rank": odd_ints, "dtype": anything, "format": anything, "filename_prefix": prefixes}),
        ("SaveZippedLoRA", {"filename_prefix": prefixes}),
        ("ZipLoRAOptimize", {"steps": no_steps, "learning_rate": odd_floats, "similarity_lambda": odd_floats,
                             "batch_size": odd_ints, "seed": odd_ints, "objective": anything, "solver": anything,
                             "ridge": odd_floats, "drawn_references": odd_ints, "drawn_size": odd_ints}),
        ("BlindABSheet", {"name_a": words, "name_b": words, "seed": odd_ints, "filename_prefix": prefixes,
                          "images_a": pictures(), "images_b": pictures(), "subject_reference": pictures()}),
        ("TrainConceptLoRA", {"images": pictures(), "second_images": pictures(), "class_images": pictures(),
                              "prompt": words, "class_prompt": words, "second_prompt": words, "steps": odd_ints,
                              "learning_rate": odd_floats, "rank": odd_ints, "batch_size": odd_ints,
                              "resolution": odd_ints, "layers": anything, "seed": odd_ints,
                              "filename_prefix": prefixes, "class_count": odd_ints, "prior_weight": odd_floats,
                              "sample_every": odd_ints, "save_every": odd_ints, "continue_from": words}),
        ("UnZipLoRA", {"image": pictures(), "prompt": words, "content_prompt": words, "style_prompt": words,
                       "steps": odd_ints, "learning_rate": odd_floats, "merger_learning_rate": odd_floats,
                       "similarity_lambda": odd_floats, "column_share": odd_floats, "rank": odd_ints,
                       "batch_size": odd_ints, "resolution": odd_ints, "seed": odd_ints, "filename_prefix": prefixes,
                       "sample_every": odd_ints, "save_every": odd_ints, "continue_from": words,
                       "content_blocks": words, "style_blocks": words}),
        ("KLoRA", {"alpha": odd_floats, "beta": odd_floats}),
        ("TwoScaleGuider", {"text_scale": odd_floats, "style_scale": odd_floats}),
        ("TrainEmbedding", {"images": pictures(), "prompt": captions, "word": words, "initial_word": words,
                            "vectors": odd_ints, "steps": odd_ints, "learning_rate": odd_floats,
                            "batch_size": odd_ints, "resolution": odd_ints, "seed": odd_ints,
                            "filename_prefix": prefixes, "sample_every": odd_ints, "save_every": odd_ints}),
        ("SplitConcept", {"images": pictures(), "prompt": captions, "word": words, "initial_word": words,
                          "seeds": odd_ints, "steps": odd_ints, "learning_rate": odd_floats, "batch_size": odd_ints,
                          "resolution": odd_ints, "seed": odd_ints, "filename_prefix": prefixes,
                          "drawn_count": odd_ints, "sample_every": odd_ints}),
        ("TrainCustomDiffusion", {"images": pictures(), "second_images": pictures(), "class_images": pictures(),
                                  "prompt": captions, "second_prompt": captions, "class_prompt": words, "word": words,
                                  "initial_word": words, "second_initial_word": words, "steps": odd_ints,
                                  "learning_rate": odd_floats, "batch_size": odd_ints, "resolution": odd_ints,
                                  "seed": odd_ints, "filename_prefix": prefixes, "class_count": odd_ints,
                                  "prior_weight": odd_floats, "sample_every": odd_ints, "save_every": odd_ints}),
        ("MergeCustomDiffusion", {"prompts": words, "captions": words}),
        ("FuseTextEncoders", {"prompts": words}),
        ("TrainEDLoRA", {"images": pictures(), "prompt": captions, "word": words, "class_word": words,
                         "rare_word": words, "steps": odd_ints, "learning_rate": odd_floats,
                         "text_encoder_rate": odd_floats, "word_rate": odd_floats, "rank": odd_ints,
                         "batch_size": odd_ints, "resolution": odd_ints, "seed": odd_ints,
                         "filename_prefix": prefixes, "sample_every": odd_ints, "save_every": odd_ints}),
    ]))  # fmt: skip
    node, odd = call
    chosen = draw(st.sets(st.sampled_from(sorted(odd)), min_size=1, max_size=3))
    return node, {name: draw(odd[name]) for name in sorted(chosen)}


LISTS = ("TrainConceptLoRA", "TrainEmbedding", "SplitConcept", "TrainCustomDiffusion", "TrainEDLoRA")  # of lists


class Arrived(Exception):
    """A run has got as far as its encoders: everything that can be refused before them was fine."""


class Encoders:
    """In the place of a text encoder and a VAE."""

    def tokenize(self, text: str, return_word_ids: bool = False) -> dict:
        found = [(len(word), 1.0, number) for number, word in enumerate(text.split()[:19], 1)]
        return {"l": [[*found, *[(0, 1.0, 0)] * (20 - len(found))]]}

    def encode_from_tokens_scheduled(self, tokens: dict) -> list:
        seed = sum(token[0] for token in tokens["l"][0])
        return [[torch.randn(1, 20, 48, generator=torch.Generator().manual_seed(seed)), {}]]

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        raise Arrived


def with_a_lora(model):
    """A clone of a model with one update on it."""
    adapted = model.clone()
    name = "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight"
    adapted.add_patches({name: ("diff", (torch.ones(32, 32),))})
    return adapted


def run(pack, fuzz, models, zipped, node: str, odd: dict, clip=None):
    """A node's execute with good values for what is not odd. clip: of those that train words."""
    model, picture = models["U-Net"], torch.full((1, 16, 16, 3), 0.5)
    pair = None if zipped is None else zipped.sources
    content, style = ({}, {}) if pair is None else (pair["content"].tensors, pair["style"].tensors)
    training = {"clip": Encoders(), "vae": Encoders(), "prompt": "a sks dog", "steps": 1, "learning_rate": 1e-4,
                "rank": 4, "batch_size": 1, "resolution": 64, "seed": 0, "filename_prefix": "loras/x"}  # fmt: skip
    a_word = {**{name: value for name, value in training.items() if name != "rank"}, "clip": clip, "model": model,
              "images": picture, "prompt": "a * star", "word": "*", "initial_word": "star"}  # fmt: skip
    keys = {
        f"{list(UNET)[1]}.lora_{half}.weight": torch.ones(shape) for half, shape in (("up", (32, 1)), ("down", (1, 48)))
    }
    layer = "lora_te1_text_model_encoder_layers_0_self_attn_q_proj.lora"
    with_text = {**keys, f"{layer}_up.weight": torch.ones(32, 1), f"{layer}_down.weight": torch.ones(1, 32)}
    good = {
        "LoadLoRAPair": {"content_lora": "subject.safetensors", "style_lora": "style.safetensors",
                         "content_strength": 1.0, "style_strength": 1.0},
        "PairLoRAs": {"content_lora": content, "style_lora": style, "content_strength": 1.0, "style_strength": 1.0},
        "StyleStrength": {"zipped_lora": zipped, "style_strength": 1.0, "content_strength": 1.0},
        "ApplyZippedLoRA": {"model": model, "zipped_lora": zipped, "strength": 1.0},
        "DirectMergeLoRA": {"model": model, "lora_pair": pair, "method": "sum"},
        "LoadZippedLoRA": {"model": model, "zipped": "x"},
        "SparsifyLoRA": {"model": model, "lora": "subject.safetensors", "keep": 10.0},
        "ExportMergedLoRA": {"zipped_lora": zipped, "filename_prefix": "loras/x", "rank": 0, "dtype": "fp16",
                             "format": "kohya"},
        "SaveZippedLoRA": {"zipped_lora": zipped, "filename_prefix": "x"},
        "ZipLoRAOptimize": {"model": model, "lora_pair": pair, "steps": 0, "learning_rate": 0.01,
                            "content_positive": [[torch.zeros(1, 20, 48), {}]],
                            "style_positive": [[torch.zeros(1, 20, 48), {}]],
                            "similarity_lambda": 0.01, "batch_size": 1, "seed": 0},
        "BlindABSheet": {"images_a": picture, "images_b": picture, "subject_reference": picture,
                         "style_reference": picture, "name_a": "a", "name_b": "b", "seed": 0, "filename_prefix": "k"},
        "TrainConceptLoRA": {"model": model, "images": picture, **training, "layers": "attention"},
        "UnZipLoRA": {"model": model, "image": picture, **training, "content_prompt": "a sks dog",
                      "style_prompt": "szn style", "prompt": "a sks dog in szn style", "merger_learning_rate": 5e-3,
                      "similarity_lambda": 0.5, "column_share": 10.0, "content_blocks": "output_blocks.0",
                      "style_blocks": "output_blocks.1"},
        "KLoRA": {"model": model, "lora_pair": pair},
        "TwoScaleGuider": {"model": model, "adapted_model": with_a_lora(model), "text_scale": 6.0, "style_scale": 3.0,
                           "positive": [[torch.zeros(1, 20, 48), {}]], "negative": [[torch.zeros(1, 20, 48), {}]]},
        "TrainEmbedding": {**a_word, "vectors": 1},
        "SplitConcept": {**a_word, "seeds": 1},
        "TrainCustomDiffusion": a_word,
        "FuseTextEncoders": {"clip": clip, "prompts": "a dog\na cat",
                             "lora_pair": pack.nodes.PairLoRAs.execute(with_text, with_text, 1.0, 1.0).args[0]},
        "TrainEDLoRA": {**a_word, "rank": 4, "class_word": "star", "rare_word": "", "text_encoder_rate": 1e-5,
                        "word_rate": 1e-3},
        "MergeCustomDiffusion": {"model": model, "clip": Encoders(), "prompts": "a dog\na tiger", "captions": "a\nb c",
                                 "lora_pair": pack.nodes.PairLoRAs.execute(keys, keys, 1.0, 1.0).args[0]},
    }[node]  # fmt: skip
    given = {**good, **odd}
    if node in LISTS:
        given = {name: [value] for name, value in given.items()}
    with suppress(Arrived):
        return getattr(pack.nodes, node).execute(**given)


@given(call=calls())
@many(3000)
def test_settings(pack, fuzz, models, zipped, clip, call):
    """Every node with values that its widgets would not give: none writes outside of output, none trains for them."""
    node, odd = call
    before = set(fuzz.outside.rglob("*"))
    with torch.inference_mode():
        named = (*odd, "class_prompt", "second_prompt", "is missing", "no layer of the pair", "nothing to fuse")
        result = fuzz(f"settings of {node}", lambda: run(pack, fuzz, models, zipped, node, odd, clip), named, 2**28)
    if node == "StyleStrength" and result is not None:
        assert all(m.isfinite().all() for m in result.args[0].coefficients["style"].values())
    for path in sorted({*fuzz.outside.rglob("*")} - before, reverse=True):
        assert path.is_relative_to(fuzz.base / "output") or path.is_relative_to(fuzz.base / "temp"), path
        path.rmdir() if path.is_dir() else path.unlink()
