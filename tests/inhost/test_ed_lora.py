"""ED-LoRA: the gradient of all that is trained, its files in the stock loaders, and what it leaves behind."""

from __future__ import annotations

from typing import Any

import pytest
import test_embedding
import test_gradient
import test_training
import torch
from safetensors.torch import load_file, save_file
from test_embedding import as_bytes, encoded, one_encoder, plain, plainly_encoded, t5, witness
from test_training import pictures

folder, clip, output = test_embedding.folder, test_embedding.clip, test_training.output  # fixtures

PROMPTS = ["a * in flat style", "a red * on the left in neon style"]


def task(pack, **changes) -> Any:
    Settings = pack.ziplora_core.trained_ed_lora.Settings
    settings = {"steps": 3, "learning_rate": 1e-3, "text_encoder_rate": 1e-3, "word_rate": 1e-2, "batch_size": 2} | {
        k: changes.pop(k) for k in list(changes) if k in Settings.__dataclass_fields__
    }
    defaults = {"pictures": [pictures(2, 128, 128)], "prompts": PROMPTS, "class_word": "star", "resolution": 128}
    return pack.nodes.bridge.training.ed_lora.Task(settings=Settings(**settings), **{**defaults, **changes})


def train(pack, loaded, asked):
    with torch.inference_mode():
        return pack.nodes.bridge.training.ed_lora.train(loaded.model, loaded.clip, loaded.vae, asked)


def first_gradient(pack, loaded, asked) -> dict[str, Any]:
    """Of the first step, of updates that are not zero: what is trained, with its gradients, and the passes."""
    core, found = pack.ziplora_core, {}

    def stop(trained, denoiser, given, settings, on_step, first, adam):
        with torch.no_grad():
            ups = [*trained.unet.up.values(), *trained.text.up.values()]
            for i, up in enumerate(ups):
                up.copy_(0.05 * torch.randn(up.shape, generator=torch.Generator().manual_seed(i)))
        passes = core.training.step_rows(given, denoiser, settings, 0)
        with torch.inference_mode(False), torch.enable_grad():
            loss, _ = core.training._gradient(trained, denoiser, passes, 1.0, True)
        found.update(trained=trained, passes=passes, loss=loss)
        raise InterruptedError

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(core.training, "train", stop)
        with pytest.raises(InterruptedError):
            train(pack, loaded, asked)
    return found


class Encoders(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, tokens, rows):
        return plainly_encoded(self.model, tokens, rows)


def copies(tensors):
    return {key: t.detach().clone().requires_grad_() for key, t in tensors.items()}


def test_gradient_equals_autograd_over_copied_weights(pack, miniature, clip, folder):
    """Of both factors of every layer of the UNet and of both text encoders, each weight W + up · down, and of the
    word."""
    found = first_gradient(pack, miniature, task(pack))
    trained, text_encoders, network = found["trained"], plain(clip.cond_stage_model), plain(miniature.model.model)
    network.manual_cast_dtype, network.diffusion_model.dtype = None, torch.float32
    save_file(trained.word.learned(), folder / "start.safetensors")
    rows = copies(trained.word.rows)
    unet, text = ((copies(part.up), copies(part.down)) for part in (trained.unet, trained.text))

    def weights(module, up, down):
        return {f"model.{key}": module.get_parameter(key) + up[key] @ down[key] for key in up}

    options = {"optimized_attention_override": lambda f, *a, **k: test_gradient.plain_attention(*a, **k)}
    total: Any = 0.0
    mutable = torch.autograd.graph.allow_mutation_on_saved_tensors()  # the host's encoders add in place
    with torch.inference_mode(False), torch.enable_grad(), mutable:
        for part in found["passes"]:
            sigma = network.model_sampling.sigmas.clone()[part.timesteps]
            x = network.model_sampling.noise_scaling(sigma, part.noise, part.latents, False)
            for i, prompt in enumerate(part.prompts):
                tokens = clip.tokenize(PROMPTS[prompt].replace("*", "embedding:start"))
                context, pooled = torch.func.functional_call(
                    Encoders(text_encoders), weights(text_encoders, *text), (tokens, rows)
                )
                sizes = {"width": 128, "height": 128, "crop_w": 0, "crop_h": 0}
                vector = network.encode_adm(device="cpu", pooled_output=pooled, **sizes)
                at = (x[i : i + 1], sigma[i : i + 1], {"c_crossattn": context, "y": vector}, options)
                x0 = torch.func.functional_call(test_gradient.Apply(network), weights(network, *unet), at)
                zeros, ones = torch.zeros_like(x0), torch.ones_like(x0)
                slope = network.model_sampling.calculate_denoised(sigma[i : i + 1], ones, zeros)
                total = total + part.weights[i] * ((x0 - part.latents[i : i + 1]) / slope).square().mean()
        total.backward()
    assert found["loss"] == pytest.approx(total.item(), rel=1e-3)
    assert {key.split(".")[0] for key in trained.text.up} == {"clip_l", "clip_g"}
    parts = [
        *((trained.unet.up, unet[0]), (trained.unet.down, unet[1])),
        *((trained.text.up, text[0]), (trained.text.down, text[1]), (trained.word.rows, rows)),
    ]
    for ours, theirs in parts:
        largest = max(float(t.grad.abs().max()) for t in theirs.values() if t.grad is not None)
        assert largest > 0
        for key, t in theirs.items():
            if t.grad is None or not t.grad.any():  # of an encoder's layers that nothing is read of
                assert ours[key].grad is None or not ours[key].grad.any()
            else:
                torch.testing.assert_close(ours[key].grad, t.grad, rtol=2e-3, atol=2e-3 * largest)


def test_gradient_through_a_layer_that_another_pack_has_replaced(pack, miniature, clip, folder):
    expected = first_gradient(pack, miniature, task(pack))["trained"]
    layer = clip.cond_stage_model.clip_g.transformer.text_model.encoder.layers[0].self_attn.v_proj
    own = layer.forward
    layer.forward = lambda x: own(x)
    found = first_gradient(pack, miniature, task(pack))["trained"]
    for ours, theirs in zip(found.tensors(), expected.tensors(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None)
        if theirs.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)


def test_the_files_draw_by_the_stock_loaders_what_the_sample_showed(pack, miniature, clip, folder, output, monkeypatch):
    import comfy.lora
    import comfy.sample
    import comfy.sd
    import comfy.utils

    bridge, seen = pack.nodes.bridge, []
    denoiser, encoder = bridge.training.denoiser.WordDenoiser, bridge.network.text_gradient.WordEncoder
    sample, encode = denoiser.sample, encoder.encode

    def drawn(self, prompt, latents, branch, seed):
        seen.append(sample(self, prompt, latents, branch, seed))
        return seen[-1]

    def said(self, tokens, rows, load=False):
        contexts.append(encode(self, tokens, rows, load))
        return contexts[-1]

    contexts: list[Any] = []
    monkeypatch.setattr(denoiser, "sample", drawn)
    monkeypatch.setattr(encoder, "encode", said)
    done = train(pack, miniature, task(pack, steps=4, sample_every=4, prompts=PROMPTS[:1], text_encoder_rate=1e-2))
    assert done.file.replace("\\", "/") == "loras/ed_00001_.safetensors"
    assert done.embedding == "embedding:ed_00001_"
    tensors, about = comfy.utils.load_torch_file(str(output / done.file), safe_load=True, return_metadata=True)
    assert about["ss_steps"] == "4" and about["ziplora_prompt"] == "a embedding:ed_00001_ in flat style"
    rows = load_file(folder / "ed_00001_.safetensors")
    assert {key: tuple(t.shape) for key, t in rows.items()} == {"clip_l": (2, 48), "clip_g": (2, 80)}
    loras = {key.split(".")[0] for key in tensors}
    known = {**comfy.lora.model_lora_keys_unet(miniature.model.model, {})}
    known = comfy.lora.model_lora_keys_clip(clip.cond_stage_model, known)
    assert set(known) >= loras and {name.split("_")[1] for name in loras} == {"unet", "te1", "te2"}
    bare = encoded(clip, PROMPTS[0].replace("*", done.embedding))[0]
    with torch.inference_mode():
        model, text = comfy.sd.load_lora_for_models(miniature.model, clip, tensors, 1.0, 1.0)
        positive = encoded(text, PROMPTS[0].replace("*", done.embedding))
        recipe = bridge.drawing.recipes.of(miniature.model)
        noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
        latents = comfy.sample.sample(
            model, noise, recipe.steps, recipe.cfg, "euler", recipe.scheduler, positive,
            bridge.network.empty_prompt.zeros(positive), torch.zeros(1, 4, 16, 16), seed=0, disable_pbar=True,
        )  # fmt: skip
    last = contexts[-1]
    largest = float((positive[0][0] - bare[0]).abs().max())
    torch.testing.assert_close(positive[0][0], last[0][0], rtol=1e-3, atol=1e-2 * largest)
    torch.testing.assert_close(positive[0][1]["pooled_output"], last[0][1]["pooled_output"], rtol=1e-3, atol=1e-3)
    assert largest > 0.05, "the text encoders' half does little"
    expected = miniature.model.model.process_latent_out(seen[0].cpu())
    torch.testing.assert_close(latents, expected, rtol=1e-2, atol=1e-2 * float(expected.abs().max()))


@pytest.mark.parametrize("interrupted", [False, True])
def test_model_and_clip_are_what_they_were(pack, miniature, clip, folder, output, monkeypatch, interrupted):
    """Bit for bit, also after an interrupt, whose steps are in both files."""
    import comfy.model_management as management

    parts = (miniature.model.model, clip.cond_stage_model)
    before = witness(miniature)
    weights = [{k: v.clone() for k, v in part.state_dict().items()} for part in parts]
    core = pack.ziplora_core.training
    rows = core.step_rows

    def strike(given, denoiser, settings, step):
        if step == 2 and interrupted:
            management.interrupt_current_processing()
        return rows(given, denoiser, settings, step)

    monkeypatch.setattr(core, "step_rows", strike)
    if interrupted:
        with pytest.raises(management.InterruptProcessingException):
            train(pack, miniature, task(pack))
    else:
        train(pack, miniature, task(pack))
    files = [*folder.glob("*.safetensors"), *(output / "loras").iterdir()]
    steps = [pack.ziplora_core.files.read_metadata(str(file))["ss_steps"] for file in files]
    assert steps == ["2" if interrupted else "3"] * 2
    for part, kept in zip(parts, weights, strict=True):
        assert [k for k, v in part.state_dict().items() if not torch.equal(as_bytes(v), as_bytes(kept[k]))] == []
        assert not [n for n, m in part.named_modules() if "forward" in vars(m)]
    assert miniature.model.patches == {} == clip.patcher.patches and all(map(torch.equal, witness(miniature), before))


def test_each_part_has_its_own_rate(pack, miniature, clip, folder, output):
    """Adam's first step is as long as its rate in every number whose gradient is not tiny; up and word are told apart
    from where they started."""
    rates = {"learning_rate": 1e-3, "text_encoder_rate": 2e-4, "word_rate": 5e-3}
    done = train(pack, miniature, task(pack, steps=1, rare_word="ring", **rates))
    start = [pack.nodes.bridge.network.text_gradient.WordEncoder(clip).start(word, 1) for word in ("ring", "star")]
    rows = load_file(folder / "ed_00001_.safetensors")
    moved = {
        "learning_rate": [t for key, t in done.lora_model.items() if "unet" in key and "lora_up" in key],
        "text_encoder_rate": [t for key, t in done.lora_model.items() if "te2" in key and "lora_up" in key],
        "word_rate": [rows[key][i : i + 1] - of[key] for i, of in enumerate(start) for key in rows],
    }
    for name, tensors in moved.items():
        numbers = torch.cat([t.float().flatten() for t in tensors])
        assert float(numbers.abs().median()) == pytest.approx(rates[name], rel=0.05), name


def test_it_starts_from_random_numbers_of_the_tables_spread_and_the_class_word(pack, miniature, clip, folder, output):
    encoder = pack.nodes.bridge.network.text_gradient.WordEncoder(clip)
    for key, rows in encoder.random(500, 3).items():
        table = getattr(clip.cond_stage_model, key).transformer.get_input_embeddings().weight
        assert float(rows.std()) == pytest.approx(float(table.float().std()), rel=0.1)
        assert abs(float(rows.mean())) < 0.05 * float(rows.std())
    started = [pack.nodes.bridge.training.ed_lora._start(encoder, task(pack, seed=seed)) for seed in (1, 1, 2)]
    star = encoder.start("star", 1)
    for key, rows in started[0].items():
        assert torch.equal(rows[1:], star[key]) and torch.equal(rows, started[1][key])
        assert not torch.equal(rows[0], started[2][key][0])


def test_after_memory_ran_out_it_goes_on_where_it_was(pack, miniature, clip, folder, output, monkeypatch):
    whole = train(pack, miniature, task(pack, prefix="loras/whole"))
    core, struck = pack.ziplora_core.training, []
    rows = core.step_rows

    def strike(given, denoiser, settings, step):
        if step == 2 and not struck:
            struck.append(step)
            raise torch.OutOfMemoryError("CUDA out of memory")
        return rows(given, denoiser, settings, step)

    monkeypatch.setattr(core, "step_rows", strike)
    again = train(pack, miniature, task(pack, prefix="loras/again"))
    assert struck and again.loss_map == whole.loss_map
    for key, tensor in whole.lora_model.items():
        torch.testing.assert_close(again.lora_model[key], tensor, rtol=1e-3, atol=1e-5)


def test_names_of_a_single_text_encoder(pack, folder):
    import comfy.lora

    clip = one_encoder(folder)
    names = pack.nodes.bridge.lora.text_encoders.kohya_names(clip.cond_stage_model)
    known = comfy.lora.model_lora_keys_clip(clip.cond_stage_model, {})
    layers = pack.nodes.bridge.training.layers.text_layers(clip)
    assert len(layers) == 8 and all(".self_attn." in key for key in layers)
    assert all(names[key].startswith("lora_te_") and known[names[key]] == key for key in layers)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"prompts": ["a star"]}, "lacks the word"),
        ({"class_word": " "}, "class_word is empty"),
        ({"class_word": "()"}, r"class_word '\(\)' is no word"),
        ({"rare_word": "()"}, r"rare_word '\(\)' is no word"),
        ({"rare_word": "a \ud800"}, "rare_word holds half a character"),
        ({"text_encoder_rate": 2.0}, "text_encoder_rate"),
        ({"prefix": "loras/my dog"}, "at which an embedding's name ends in prompts"),
    ],
)
def test_refused(pack, miniature, clip, changes, says):
    with pytest.raises(ValueError, match=says):
        train(pack, miniature, task(pack, **changes))


def test_a_clip_without_layers_to_train_is_refused(pack, miniature, folder):
    with pytest.raises(ValueError, match=r"this clip \(PixArt\w*\) has no attention layers that LoRA files can name"):
        train(pack, miniature._replace(clip=t5(folder)), task(pack))


def test_the_node_trains_with_what_it_is_given(pack, miniature, clip, folder, output, monkeypatch):
    """Its inputs are lists; several prompts, of a list or of lines, are as many captions."""
    tasks = []
    bridge = pack.nodes.bridge.training.ed_lora
    own = bridge.train
    monkeypatch.setattr(bridge, "train", lambda *a: tasks.append(a[3]) or own(*a))
    given = {
        "prompt": "a * apple\n\nin a * style", "word": "*", "class_word": "house", "rare_word": "ring", "steps": 2,
        "learning_rate": 1e-3, "text_encoder_rate": 2e-3, "word_rate": 3e-3, "rank": 3, "batch_size": 1,
        "resolution": 128, "seed": 5, "filename_prefix": "loras/mine", "sample_every": 0, "save_every": 1,
    }  # fmt: skip
    lists = {name: [value] for name, value in given.items()} | {"images": [pictures(1, 128, 96), pictures(2, 96, 128)]}
    parts = {"model": [miniature.model], "clip": [clip], "vae": [miniature.vae]}
    with torch.inference_mode():
        done = pack.nodes.TrainEDLoRA.execute(**lists, **parts)
    lora, embedding, loss_map, report, file = done.args
    assert embedding == "embedding:mine_00001_" and len(loss_map["loss"]) == 2 and (output / file).is_file()
    assert "3 pictures, 2 prompts" in report and "rank 3" in report and "from 'ring' and 'house'" in report
    assert {t.shape[0] for key, t in lora.items() if key.endswith("lora_down.weight")} == {3}
    (asked,) = tasks
    settings = asked.settings
    assert (settings.learning_rate, settings.text_encoder_rate, settings.word_rate) == (1e-3, 2e-3, 3e-3)
    assert asked.prompts == ["a * apple", "in a * style"] and (asked.class_word, asked.rare_word) == ("house", "ring")
    assert (settings.steps, settings.seed, asked.sample_every, asked.save_every) == (2, 5, 0, 1)


@pytest.mark.parametrize("of", ["the word", "the LoRA"])
def test_on_a_full_disk_the_lora_that_is_returned_is_the_one_that_was_learned(
    pack, miniature, clip, folder, output, monkeypatch, of
):
    from test_custom_diffusion import full

    full(pack, monkeypatch, lambda path, steps: steps == 4 and ("embeddings" in path) == (of == "the word"))
    done = train(pack, miniature, task(pack, steps=4, save_every=1, sample_every=0))
    assert "could not be written: no space left" in done.report
    monkeypatch.undo()
    expected = train(pack, miniature, task(pack, steps=4, sample_every=0)).lora_model
    assert done.lora_model.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in done.lora_model.items())
