"""Textual Inversion: its gradient, its file in the host's own prompts, and what it leaves behind."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import test_gradient
import torch
from PIL import Image
from safetensors.torch import load_file
from test_training import pictures

from devhost.base import ROOT

WORD, PROMPTS = "*", ["a * in flat style", "a red * on the left in neon style"]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    import folder_paths

    endings, own = folder_paths.folder_names_and_paths["embeddings"][1], tmp_path / "embeddings"
    own.mkdir()  # the host looks for an embedding in every folder below
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "embeddings", ([str(own)], endings))
    folder_paths.filename_list_cache.clear()
    return own


@pytest.fixture
def clip(miniature, folder):
    for name in ("clip_l", "clip_g"):
        getattr(miniature.clip.tokenizer, name).embedding_directory = [str(folder)]
    return miniature.clip


def task(pack, **changes) -> Any:
    Settings = pack.ziplora_core.trained_embedding.Settings
    settings = {"steps": 3, "learning_rate": 1e-2, "vectors": 2} | {
        k: changes.pop(k) for k in list(changes) if k in Settings.__dataclass_fields__
    }
    defaults = {"pictures": [pictures(2, 128, 128)], "prompts": PROMPTS, "initial": "star", "resolution": 128}
    return pack.nodes.bridge.training.embedding.Task(settings=Settings(**settings), **{**defaults, **changes})


def train(pack, loaded, asked):
    with torch.inference_mode():
        return pack.nodes.bridge.training.embedding.train_embedding(loaded.model, loaded.clip, loaded.vae, asked)


def encoded(clip, text: str) -> list:
    with torch.inference_mode():
        return clip.encode_from_tokens_scheduled(clip.tokenize(text))


def plain(module):
    """A copy in ordinary float weights that ordinary autograd may save."""
    with torch.inference_mode(False):
        shared = [getattr(module, name, None) for name in ("model_config", "current_patcher")]
        copied = copy.deepcopy(module, {id(s): s for s in shared if s}).float().requires_grad_(False)
        for part in copied.modules():
            for kept in (part._parameters, part._buffers):
                for name, value in kept.items():
                    if value is not None and value.is_inference():
                        kept[name] = value.clone()
        return copied


def plainly_encoded(copied, tokens, rows):
    """By the host's encoders in plain weights; rows: what stands in place of the file's, by encoder."""
    found = dict.fromkeys(rows, 0)

    def filled(kind, token):
        if not isinstance(token[0], torch.Tensor):
            return token
        key = f"clip_{kind}"
        found[key] += 1
        return (rows[key][(found[key] - 1) % len(rows[key])], *token[1:])

    given = {kind: [[filled(kind, t) for t in b] for b in batches] for kind, batches in tokens.items()}
    copied.reset_clip_options()
    return copied.encode_token_weights(given)[:2]


def first_gradient(pack, run) -> dict[str, Any]:
    """Of the first step of what `run` trains, and what it was taken of: passes, and the vectors at the start."""
    core, found = pack.ziplora_core, {}

    def stop(trained, denoiser, given, settings, on_step, first, adam):
        passes = core.training.step_rows(given, denoiser, settings, 0)
        with torch.inference_mode(False), torch.enable_grad():
            found["loss"], _ = core.training._gradient(trained, denoiser, passes, 1.0, True)
            found["ours"] = {key: rows.grad.clone() for key, rows in trained.rows.items()}
            found["passes"] = passes
            found["start"] = trained.learned()
        raise InterruptedError

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(core.training, "train", stop)
        with pytest.raises(InterruptedError):
            run()
    return found


def compare_with_autograd(miniature, clip, folder, found, prompts):
    """Through copies of the UNet and of both text encoders, from the host's own tokens of an embedding file."""
    from safetensors.torch import save_file

    save_file(found["start"], folder / "start.safetensors")
    text_encoders, network = plain(clip.cond_stage_model), plain(miniature.model.model)
    network.manual_cast_dtype, network.diffusion_model.dtype = None, torch.float32
    rows = {key: start.clone().requires_grad_() for key, start in found["start"].items()}
    options = {"optimized_attention_override": lambda f, *a, **k: test_gradient.plain_attention(*a, **k)}
    total = 0.0
    mutable = torch.autograd.graph.allow_mutation_on_saved_tensors()  # the host's encoders add in place
    with torch.inference_mode(False), torch.enable_grad(), mutable:
        for part in found["passes"]:
            sigma = network.model_sampling.sigmas.clone()[part.timesteps]
            x = network.model_sampling.noise_scaling(sigma, part.noise, part.latents, False)
            for i, prompt in enumerate(part.prompts):
                tokens = clip.tokenize(prompts[prompt].replace("*", "embedding:start"))
                context, pooled = plainly_encoded(text_encoders, tokens, rows)
                side = 8 * part.latents.shape[-1]
                sizes = {"width": side, "height": side, "crop_w": 0, "crop_h": 0}
                vector = network.encode_adm(device="cpu", pooled_output=pooled, **sizes)
                given = {"c_crossattn": context, "y": vector}
                x0 = network.apply_model(x[i : i + 1], sigma[i : i + 1], **given, transformer_options=options)
                zeros, ones = torch.zeros_like(x0), torch.ones_like(x0)
                offset = network.model_sampling.calculate_denoised(sigma[i : i + 1], zeros, x[i : i + 1])
                slope = network.model_sampling.calculate_denoised(sigma[i : i + 1], ones, zeros)
                errors = ((x0 - part.latents[i : i + 1]) / slope).square().mean()
                total = total + part.weights[i] * errors
        assert isinstance(total, torch.Tensor) and bool(torch.isfinite(offset).all())
        total.backward()
    assert found["loss"] == pytest.approx(total.item(), rel=1e-3)
    for key, ours in found["ours"].items():
        theirs = rows[key].grad
        assert theirs is not None and float(theirs.abs().min(1).values.min()) >= 0 and float(theirs.abs().max()) > 0
        torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=2e-3 * float(theirs.abs().max()))


def test_gradient_equals_autograd_over_copied_weights(pack, miniature, clip, folder):
    asked = task(pack, batch_size=2)
    compare_with_autograd(miniature, clip, folder, first_gradient(pack, lambda: train(pack, miniature, asked)), PROMPTS)


def test_the_file_says_in_the_hosts_prompts_what_was_trained(pack, miniature, clip, folder):
    import comfy.utils

    seen = []
    bridge = pack.nodes.bridge
    encode = bridge.network.text_gradient.WordEncoder.encode

    def noted(self, tokens, rows, load=False):
        said = encode(self, tokens, rows, load)
        seen.append(({key: t.detach().clone() for key, t in rows.items()}, said[0][0].detach().clone()))
        return said

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(bridge.network.text_gradient.WordEncoder, "encode", noted)
        done = train(pack, miniature, task(pack, steps=4, sample_every=4, prompts=PROMPTS[:1]))
    assert done.embedding == "embedding:concept_00001_"
    tensors, about = comfy.utils.load_torch_file(str(folder / done.file), safe_load=True, return_metadata=True)
    assert {key: tuple(rows.shape) for key, rows in tensors.items()} == {"clip_l": (2, 48), "clip_g": (2, 80)}
    assert about["ss_steps"] == "4"
    last, context = seen[-1]  # of the sample, drawn with what was learned
    assert all(torch.equal(last[key], tensors[key]) for key in tensors)
    assert not any(torch.equal(seen[0][0][key], tensors[key]) for key in tensors), "nothing was learned"
    ((used, options),) = encoded(clip, PROMPTS[0].replace("*", done.embedding))
    assert torch.equal(used, context)
    assert not torch.equal(used, seen[0][1]) and options["pooled_output"] is not None


def witness(loaded):
    import comfy.sample

    with torch.inference_mode():
        noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
        prompt = encoded(loaded.clip, "a red star in neon style")
        drawn = comfy.sample.sample(
            loaded.model, noise, 3, 3.0, "euler", "normal", prompt, prompt, torch.zeros(1, 4, 16, 16), seed=0,
            disable_pbar=True,
        )  # fmt: skip
    return [prompt[0][0], prompt[0][1]["pooled_output"], drawn]


def as_bytes(weight: torch.Tensor) -> torch.Tensor:
    """The miniature's checkpoint has no projection for one encoder, whose memory then holds anything, also NaN."""
    return weight.reshape(-1).view(torch.uint8)


@pytest.mark.parametrize("interrupted", [False, True])
def test_model_and_clip_are_what_they_were(pack, miniature, clip, folder, monkeypatch, interrupted):
    """Bit for bit, also after an interrupt, whose steps are in the file."""
    import comfy.model_management as management

    parts = (miniature.model.model, clip.cond_stage_model)
    before = witness(miniature)
    weights = [{k: v.clone() for k, v in part.state_dict().items()} for part in parts]
    directories = clip.tokenizer.clip_l.embedding_directory
    core = pack.ziplora_core.training
    rows = core.step_rows

    def strike(given, denoiser, settings, step):
        if step == 2 and interrupted:
            management.interrupt_current_processing()
        return rows(given, denoiser, settings, step)

    monkeypatch.setattr(core, "step_rows", strike)
    if interrupted:
        with pytest.raises(management.InterruptProcessingException):
            train(pack, miniature, task(pack, steps=5))
    else:
        train(pack, miniature, task(pack, steps=3))
    (file,) = folder.iterdir()
    assert pack.ziplora_core.files.read_metadata(str(file))["ss_steps"] == ("2" if interrupted else "3")
    for part, kept in zip(parts, weights, strict=True):
        assert [k for k, v in part.state_dict().items() if not torch.equal(as_bytes(v), as_bytes(kept[k]))] == []
        assert not [n for n, m in part.named_modules() if "forward" in vars(m)]
    assert miniature.model.additional_models == {} and "load_model" not in vars(clip)
    assert clip.tokenizer.clip_l.embedding_directory is directories
    assert all(map(torch.equal, witness(miniature), before))


def drawings(name: str) -> torch.Tensor:
    files = sorted((ROOT / "demo" / "pictures" / name).iterdir())
    return torch.stack([torch.from_numpy(np.array(Image.open(f).convert("RGB"))) for f in files]).float() / 255


def test_what_is_learned_foretells_the_pictures_better(pack, miniature, clip):
    """On the same noise and timesteps, against the word that it started from; so also: a run goes on from a file."""

    def losses(initial: str, prefix: str, **settings):
        changes = {"initial": initial, "prefix": prefix, "prompts": ["a * octopus in flat style"], **settings}
        return train(pack, miniature, task(pack, pictures=[drawings("octopus")], **changes))

    losses("star", "learned", steps=30, learning_rate=3e-2, batch_size=4, seed=1)
    still: dict[str, Any] = {"steps": 4, "learning_rate": 1e-8, "batch_size": 16, "seed": 2}
    before, after = (losses(word, "scored", **still).loss_map["loss"] for word in ("star", "embedding:learned_00001_"))
    assert sum(after) < 0.95 * sum(before)
    assert all(b < a for a, b in zip(before, after, strict=True))


def one_encoder(folder):
    """SD 1.5's text encoder in every joint, 32 wide."""
    import comfy.sd
    from comfy.sd1_clip import SD1ClipModel, SD1Tokenizer

    config = {
        "hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 64,
    }  # fmt: skip
    target = SimpleNamespace(params={}, clip=SD1ClipModel, tokenizer=SD1Tokenizer)
    with torch.inference_mode():
        made = comfy.sd.CLIP(target, [str(folder)], model_options={"clip_l_model_config": config})
        for i, weight in enumerate(made.cond_stage_model.parameters()):
            weight.copy_(0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(i)))
    return made


def t5(folder):
    """PixArt's text encoder in every joint, 32 wide."""
    import comfy.sd
    from comfy.text_encoders.pixart_t5 import PixArtTokenizer, pixart_te

    config = {"d_ff": 64, "d_kv": 16, "d_model": 32, "num_heads": 2, "num_layers": 2}
    target = SimpleNamespace(params={}, clip=pixart_te(), tokenizer=PixArtTokenizer)
    with torch.inference_mode():
        made = comfy.sd.CLIP(target, [str(folder)], model_options={"t5xxl_model_config": config})
        for i, weight in enumerate(made.cond_stage_model.parameters()):
            weight.copy_(0.3 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(i)))
    return made


@pytest.mark.parametrize("kind", ["miniature", "one encoder", "weights", "T5"])
def test_the_text_encoders_gradient_is_the_difference_of_their_outputs(pack, miniature, clip, folder, kind):
    clip = {"one encoder": one_encoder, "T5": t5}.get(kind, lambda _: clip)(folder)
    with torch.inference_mode(False):
        words = pack.nodes.bridge.network.text_gradient.WordEncoder(clip)
        start = words.start("red star", 2)
        tokens = words.tokens("a (*:1.3), in flat style" if kind == "weights" else "a *, in flat style", "*", 2)

        def said(rows):
            context, options = words.encode(tokens, rows, load=True)[0]
            weights = torch.linspace(-1, 1, context[0].numel()).view(context.shape)
            pooled = options.get("pooled_output")
            return (context * weights).mean() + (0.0 if pooled is None else pooled.mean())

        rows = {key: t.clone().requires_grad_() for key, t in start.items()}
        with torch.enable_grad(), words.injected():
            said(rows).backward()
        for key, t in rows.items():
            assert t.grad is not None
            way = torch.sign(t.grad) * 1e-2
            with torch.no_grad():
                ends = [said({**start, key: start[key] + side * way}) for side in (1, -1)]
            difference = float(ends[0] - ends[1]) / 2
            assert difference == pytest.approx(float((t.grad * way).sum()), rel=0.02)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"prompts": ["a star"]}, "lacks the word"),
        ({"prompts": []}, "prompt is empty"),
        ({"word": "two words"}, "expected one word"),
        ({"initial": " "}, "initial_word is empty"),
        ({"initial": "()"}, "is no word"),
        ({"prefix": "../above"}, "leads out of the folder"),
        ({"prefix": "mine/my dog"}, "filename_prefix 'mine/my dog' holds ' ', at which an embedding's name ends"),
        ({"prefix": "dog\N{NO-BREAK SPACE}2"}, "at which an embedding's name ends"),
        *(({"prefix": f"dog{sign}1"}, "at which an embedding's name ends in prompts") for sign in "()[]<>"),
        ({"prompts": ["a\0star" * 999]}, "the prompt 'a\N{REPLACEMENT CHARACTER}stara.{100,180}…' lacks the word"),
        ({"word": "*\ud800"}, "word holds half a character"),
        ({"initial": "a \ud800"}, "initial_word holds half a character"),
    ],
)
def test_refused(pack, miniature, clip, changes, says):
    with pytest.raises(ValueError, match=says):
        train(pack, miniature, task(pack, **changes))


def test_where_memory_runs_out_it_names_what_this_node_has(pack, miniature, clip, folder, monkeypatch):
    def full(*given):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(pack.nodes.bridge.training.loading.session, "with_network", full)
    with pytest.raises(RuntimeError, match="^not enough memory to train: .*; lower resolution or batch_size$"):
        train(pack, miniature, task(pack))
    assert not list(folder.iterdir())


def test_an_embedding_of_another_model_is_no_start(pack, miniature, clip, folder):
    """Of one text encoder alone, as SD 1.5's: the host takes its numbers for the other's too, which have another
    width."""
    from safetensors.torch import save_file

    width = clip.tokenizer.clip_l.embedding_size
    save_file({"clip_l": torch.randn(1, width)}, folder / "old.safetensors")
    with pytest.raises(ValueError, match=f"initial_word 'embedding:old' has vectors of {width} numbers where.*clip_g"):
        train(pack, miniature, task(pack, initial="embedding:old"))
    with pytest.raises(ValueError, match="has vectors of"):
        train(pack, miniature, task(pack, initial="star embedding:old"))
    assert [file.name for file in folder.iterdir()] == ["old.safetensors"]


def test_the_hosts_prompts_name_what_any_other_prefix_writes(pack, miniature, clip, folder):
    for prefix in ("mine/dög,2.1-b", "a'b:c", "{x}^$*+?~"):
        name = train(pack, miniature, task(pack, steps=1, vectors=1, prefix=prefix)).embedding
        for prompt in (f"a red {name} star", f"({name}:1.2), star"):
            tokens = [token for batches in clip.tokenize(prompt).values() for batch in batches for token, _ in batch]
            vectors = [token for token in tokens if isinstance(token, torch.Tensor)]
            assert len(vectors) == 2, f"{prompt} does not name the embedding in both text encoders"


def test_runs_of_several_processes_under_one_name_have_a_file_each(pack, miniature, clip, folder, monkeypatch):
    """One is training, and says so; another, which says nothing, is done before this one."""
    bridge = pack.nodes.bridge.training.embedding
    (folder / ".concept_00001_.safetensors.ziplora.part").touch()
    others, prepare = folder / "concept_00002_.safetensors", bridge.prepare

    def meanwhile(*given):
        others.write_bytes(b"another's")
        return prepare(*given)

    monkeypatch.setattr(bridge, "prepare", meanwhile)
    done = train(pack, miniature, task(pack, steps=1))
    assert done.embedding == "embedding:concept_00003_"
    assert others.read_bytes() == b"another's" and not (folder / "concept_00001_.safetensors").exists()
    assert (folder / done.file).name == "concept_00003_.safetensors"
    assert load_file(folder / done.file).keys() == done.tensors.keys()


def test_a_clip_that_reads_no_embeddings_is_refused(pack, miniature):
    for name in ("clip_l", "clip_g"):
        getattr(miniature.clip.tokenizer, name).embedding_directory = None
    with pytest.raises(ValueError, match="takes embeddings"):
        train(pack, miniature, task(pack))


def test_a_clip_with_hooks_is_refused(pack, miniature, clip):
    import comfy.hooks

    clip.patcher.forced_hooks = comfy.hooks.HookGroup()
    with pytest.raises(ValueError, match="carries hooks"):
        train(pack, miniature, task(pack))


def test_word_is_found_whole(pack, clip):
    words = pack.nodes.bridge.network.text_gradient.WordEncoder(clip)
    for text in ("many stars", "a superstar"):
        with pytest.raises(ValueError, match="lacks the word 'star'"):
            words.tokens(text, "star", 1)
    tokens = words.tokens("a star, and a star", "star", 1)
    places = [t for batch in tokens["l"] for t, *_ in batch if not isinstance(t, int)]
    assert len(places) == 2


def test_a_word_starts_from_the_vectors_of_others_in_turn(pack, clip):
    words = pack.nodes.bridge.network.text_gradient.WordEncoder(clip)
    red, star = words.start("red", 1), words.start("star", 1)
    for key, rows in words.start("red star", 3).items():
        assert torch.equal(rows, torch.cat([red[key], star[key], red[key]])) and not torch.equal(red[key], star[key])


def test_the_node_trains_with_what_it_is_given(pack, miniature, clip, folder, monkeypatch):
    """Its inputs are lists; several prompts, of a list or of lines, are as many captions."""
    tasks = []
    bridge = pack.nodes.bridge.training.embedding
    own = bridge.train_embedding
    monkeypatch.setattr(bridge, "train_embedding", lambda *a: tasks.append(a[3]) or own(*a))
    given = {
        "prompt": "a * apple\n\nin a * style", "word": "*", "initial_word": "house", "vectors": 2, "steps": 2,
        "learning_rate": 1e-3, "batch_size": 1, "resolution": 128, "seed": 5, "filename_prefix": "mine",
        "sample_every": 0, "save_every": 1,
    }  # fmt: skip
    lists = {name: [value] for name, value in given.items()} | {"images": [pictures(1, 128, 96), pictures(2, 96, 128)]}
    parts = {"model": [miniature.model], "clip": [clip], "vae": [miniature.vae]}
    with torch.inference_mode():
        done = pack.nodes.TrainEmbedding.execute(**lists, **parts)
    embedding, loss_map, report = done.args
    assert embedding == "embedding:mine_00001_" and len(loss_map["loss"]) == 2
    assert "3 pictures, 2 prompts" in report and "2 vectors (clip_l 48, clip_g 80)" in report
    (asked,) = tasks
    assert asked.prompts == ["a * apple", "in a * style"] and asked.initial == "house"
    settings = asked.settings
    assert (settings.vectors, settings.steps, settings.learning_rate, settings.seed) == (2, 2, 1e-3, 5)
    assert (asked.sample_every, asked.save_every) == (0, 1)


def test_a_disk_that_takes_no_file_is_an_error(pack, miniature, clip, monkeypatch):
    def full(path, tensors, metadata):
        raise OSError("no space left")

    monkeypatch.setattr(pack.nodes.bridge.training.lora_file, "write_tensors", full)
    with pytest.raises(OSError, match="could not be written: no space left"):
        train(pack, miniature, task(pack))


def test_memory_is_planned_for_a_prompt_that_is_trained(pack, miniature):
    """The rehearsal keeps what backward to the prompt takes: most of what a LoRA takes, though no layer is trained."""
    rehearsal, bridge = pack.nodes.bridge.memory.rehearsal, pack.nodes.bridge.training
    TrainedLoRA = pack.ziplora_core.trained_lora.TrainedLoRA
    prompt, latents = encoded(miniature.clip, "a star"), torch.zeros(1, 4, 16, 16)
    every = bridge.layers.trained_layers(miniature.model.model, "attention")
    with torch.inference_mode(False):
        nothing, lora = TrainedLoRA({}, 1, 0, "meta"), TrainedLoRA(every, 4, 0, "meta")
    word = rehearsal.rehearse_training(miniature.model, prompt, latents, nothing).kept(0)
    whole = rehearsal.rehearse_training(miniature.model, prompt, latents, lora).kept(0)
    assert 0.5 * whole < word < 1.5 * whole
