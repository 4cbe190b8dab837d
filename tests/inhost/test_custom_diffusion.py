"""Custom Diffusion: its gradient, its patch in the host's LoRA loader, and what it leaves behind."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import test_embedding
import test_training
import torch
from test_embedding import as_bytes, encoded, plain, plainly_encoded, witness
from test_training import pictures

folder, clip, output = test_embedding.folder, test_embedding.clip, test_training.output  # fixtures

PROMPT, SECOND = "a * apple in flat style", "a * house in neon style"


def task(pack, concepts=1, class_prompt="", **changes) -> Any:
    bridge = pack.nodes.bridge.training.custom_diffusion
    Settings = pack.ziplora_core.trained_weights.Settings
    settings = {"steps": 3, "learning_rate": 1e-3, "batch_size": 2} | {
        k: changes.pop(k) for k in list(changes) if k in Settings.__dataclass_fields__
    }
    given = [
        bridge.Concept([pictures(2, 128, 128, seed=i)], [text], class_prompt=class_prompt)
        for i, text in enumerate((PROMPT, SECOND)[:concepts])
    ]
    return bridge.Task(given, Settings(**settings), resolution=128, class_count=3, **changes)


def train(pack, loaded, asked):
    with torch.inference_mode():
        return pack.nodes.bridge.training.custom_diffusion.train(loaded.model, loaded.clip, loaded.vae, asked)


def test_gradient_equals_autograd_over_copied_weights(pack, miniature, clip, folder):
    """Of updates that are not zero, and of both words, with class pictures."""
    import test_gradient
    from safetensors.torch import save_file

    asked, core, found = task(pack, 2, "a apple"), pack.ziplora_core, {}

    def compare(trained, denoiser, given, settings, on_step, first, adam):
        with torch.no_grad():
            for i, update in enumerate(trained.updates.values()):
                update.copy_(0.05 * torch.randn(update.shape, generator=torch.Generator().manual_seed(i)))
        passes = core.training.step_rows(given, denoiser, settings, 0)
        with torch.inference_mode(False), torch.enable_grad():
            found["loss"], _ = core.training._gradient(trained, denoiser, passes, 1.0, True)
        found.update(passes=passes, updates=trained.updates, words=trained.words)
        raise InterruptedError

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(core.training, "train", compare)
        with pytest.raises(InterruptedError):
            train(pack, miniature, asked)
    text_encoders, network = plain(clip.cond_stage_model), plain(miniature.model.model)
    network.manual_cast_dtype, network.diffusion_model.dtype = None, torch.float32
    rows = [{k: t.detach().clone().requires_grad_() for k, t in word.rows.items()} for word in found["words"]]
    updates = {k: t.detach().clone().requires_grad_() for k, t in found["updates"].items()}
    weights = {f"model.{k}": network.get_parameter(k) + update for k, update in updates.items()}
    for i, word in enumerate(rows):
        save_file({k: t.detach().contiguous() for k, t in word.items()}, folder / f"word{i}.safetensors")
    said = [(0, PROMPT.replace("*", "embedding:word0")), (1, SECOND.replace("*", "embedding:word1"))]
    said += [(0, "a apple"), (0, "a apple")]
    options = {"optimized_attention_override": lambda f, *a, **k: test_gradient.plain_attention(*a, **k)}
    total: Any = 0.0
    counted = 0
    mutable = torch.autograd.graph.allow_mutation_on_saved_tensors()  # the host's encoders add in place
    with torch.inference_mode(False), torch.enable_grad(), mutable:
        for part in found["passes"]:
            sigma = network.model_sampling.sigmas.clone()[part.timesteps]
            x = network.model_sampling.noise_scaling(sigma, part.noise, part.latents, False)
            for i, prompt in enumerate(part.prompts):
                counted += 1
                whose, text = said[prompt]
                context, pooled = plainly_encoded(text_encoders, clip.tokenize(text), rows[whose])
                sizes = {"width": 128, "height": 128, "crop_w": 0, "crop_h": 0}
                vector = network.encode_adm(device="cpu", pooled_output=pooled, **sizes)
                at = (x[i : i + 1], sigma[i : i + 1], {"c_crossattn": context, "y": vector}, options)
                x0 = torch.func.functional_call(test_gradient.Apply(network), weights, at)
                zeros, ones = torch.zeros_like(x0), torch.ones_like(x0)
                slope = network.model_sampling.calculate_denoised(sigma[i : i + 1], ones, zeros)
                total = total + part.weights[i] * ((x0 - part.latents[i : i + 1]) / slope).square().mean()
        total.backward()
    assert counted == 4
    assert found["loss"] == pytest.approx(total.item(), rel=1e-3)
    largest = max(float(t.grad.abs().max()) for t in updates.values())
    assert largest > 0 and len(updates) == 14
    for name, theirs in updates.items():
        torch.testing.assert_close(found["updates"][name].grad, theirs.grad, rtol=2e-3, atol=2e-3 * largest)
    for word, own in zip(found["words"], rows, strict=True):
        for key, theirs in own.items():
            torch.testing.assert_close(
                word.rows[key].grad, theirs.grad, rtol=2e-3, atol=2e-3 * float(theirs.grad.abs().max())
            )


def test_the_file_is_a_patch_for_the_stock_loader(pack, miniature, clip, folder, output):
    """With the update that was trained, and the words in the host's own prompts."""
    import comfy.lora
    import comfy.sd
    import comfy.utils

    learned = []
    TrainedWeights = pack.ziplora_core.trained_weights.TrainedWeights
    own = TrainedWeights.learned
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(TrainedWeights, "learned", lambda self: learned.append(own(self)) or learned[-1])
        done = train(pack, miniature, task(pack, 2))
    assert done.file.replace("\\", "/") == "loras/custom_00001_.safetensors"
    assert done.embeddings == ["embedding:custom_00001_", "embedding:custom_00002_"]
    read = pack.ziplora_core.files.read_metadata
    prompts = [read(str(folder / f"custom_0000{i}_.safetensors"))["ziplora_prompt"] for i in (1, 2)]
    assert prompts == [PROMPT, SECOND]
    offered = "a embedding:custom_00001_ apple in flat style"  # where the LoRA is chosen: what wakes it
    assert read(str(output / done.file))["ziplora_prompt"] == offered
    tensors = comfy.utils.load_torch_file(str(output / done.file), safe_load=True)
    assert {k: t.shape for k, t in tensors.items()} == {k: t.shape for k, t in done.lora_model.items()}
    names = comfy.lora.model_lora_keys_unet(miniature.model.model, {})
    patches = comfy.lora.load_lora(tensors, names, log_missing=False)
    assert set(patches) == set(learned[-1]) and len(patches) == 14
    with torch.inference_mode():
        patched, _ = comfy.sd.load_lora_for_models(miniature.model, None, tensors, 1.0, 0.0)
        for key, update in learned[-1].items():
            weight = miniature.model.model.get_parameter(key).float()
            got = comfy.lora.calculate_weight(patched.patches[key], weight.clone(), key)
            torch.testing.assert_close(got - weight, update, rtol=2e-3, atol=2e-5)
            assert float(update.abs().max()) > 1e-4
    first, second = (encoded(clip, f"a {name} apple")[0][0] for name in done.embeddings)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_the_rate_is_of_each_picture_of_a_step(pack, miniature, clip, folder, output, batch_size):
    """Adam's first step is as long as its rate in every number whose gradient is not tiny."""
    done = train(pack, miniature, task(pack, steps=1, learning_rate=1e-3, batch_size=batch_size))
    updates = torch.cat([t.float().flatten() for t in done.lora_model.values()])
    assert float(updates.abs().median()) == pytest.approx(1e-3 * batch_size, rel=0.05)


@pytest.mark.parametrize("interrupted", [False, True])
def test_model_and_clip_are_what_they_were(pack, miniature, clip, folder, output, monkeypatch, interrupted):
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
    steps = "2" if interrupted else "3"
    for file in (*folder.glob("*.safetensors"), *(output / "loras").iterdir()):
        assert pack.ziplora_core.files.read_metadata(str(file))["ss_steps"] == steps
    for part, kept in zip(parts, weights, strict=True):
        assert [k for k, v in part.state_dict().items() if not torch.equal(as_bytes(v), as_bytes(kept[k]))] == []
        assert not [n for n, m in part.named_modules() if "forward" in vars(m)]
    assert miniature.model.patches == {} and all(map(torch.equal, witness(miniature), before))


def test_the_rate_is_of_each_picture(pack):
    weights = pack.ziplora_core.trained_weights
    (group,) = weights.TrainedWeights({"layer": (2, 3)}, [], scale=8).groups(1e-5)
    assert group["lr"] == pytest.approx(8e-5)


def test_a_number_that_does_not_fit_is_refused(pack, miniature):
    training = pack.nodes.bridge.training
    name = next(iter(training.layers.prompt_readers(miniature.model.model)))
    with pytest.raises(ValueError, match="does not fit into"):
        training.custom_diffusion.patch_tensors(miniature.model, {name: torch.full((2, 2), 1e6)})


def test_refused(pack, miniature, clip, monkeypatch):
    with pytest.raises(ValueError, match="class_prompt is empty"):
        train(pack, miniature, task(pack, class_pictures=[pictures(1)]))
    for initial, said in ((" ", "second_initial_word is empty"), ("()", r"second_initial_word '\(\)' is no word")):
        asked = task(pack, concepts=2)
        asked.concepts[1] = replace(asked.concepts[1], initial=initial)
        with pytest.raises(ValueError, match=f"^{said}"):
            train(pack, miniature, asked)
    with pytest.raises(ValueError, match="at which an embedding's name ends in prompts"):
        train(pack, miniature, task(pack, prefix="loras/dog (new)"))
    monkeypatch.setattr(pack.nodes.bridge.training.layers, "UNetModel", torch.nn.Linear)
    with pytest.raises(ValueError, match="has no layers that read the prompt alone"):
        train(pack, miniature, task(pack))


def test_the_nodes_train_and_merge_with_what_they_are_given(pack, miniature, clip, folder, output, monkeypatch):
    tasks = []
    bridge = pack.nodes.bridge.training.custom_diffusion
    own = bridge.train
    monkeypatch.setattr(bridge, "train", lambda *a: tasks.append(a[3]) or own(*a))
    given = {
        "prompt": "a * apple", "word": "*", "initial_word": "house", "steps": 2, "learning_rate": 1e-3,
        "batch_size": 2, "resolution": 128, "seed": 5, "filename_prefix": "loras/mine", "sample_every": 0,
        "save_every": 0, "class_prompt": "a apple\na key", "class_count": 1, "prior_weight": 0.5,
        "second_prompt": "a * key", "second_initial_word": "book",
    }  # fmt: skip
    lists = {name: [value] for name, value in given.items()}
    images = {
        name: [pictures(1, 128, 128, seed=i)] for i, name in enumerate(("images", "second_images", "class_images"))
    }
    parts = {"model": [miniature.model], "clip": [clip], "vae": [miniature.vae]}
    with torch.inference_mode():
        done = pack.nodes.TrainCustomDiffusion.execute(**lists, **images, **parts)
    lora, embedding, loss_map, report, file = done.args
    assert embedding.splitlines() == ["embedding:mine_00001_", "embedding:mine_00002_"] and len(loss_map["loss"]) == 2
    assert (output / file).is_file() and "class pictures: 2, weight 0.5" in report and len(lora) == 14
    (asked,) = tasks
    first, second = asked.concepts
    assert (first.initial, second.initial) == ("house", "book") and second.prompts == ["a * key"]
    assert (first.class_prompt, second.class_prompt) == ("a apple", "a key")
    with torch.inference_mode():
        pair = pack.nodes.PairLoRAs.execute(lora, {k: 2 * t for k, t in lora.items()}, 1.0, 1.0).args[0]
        words = "\n".join(f"{name} apple" for name in embedding.splitlines())
        merged, said = pack.nodes.MergeCustomDiffusion.execute(miniature.model, clip, pair, words, "a key").args
    assert len(merged) == 3 * 14 and "rank 4" in said and "1 ordinary captions" in said
    with pytest.raises(ValueError, match="second_prompt has no pictures"):
        pack.nodes.TrainCustomDiffusion.execute(**lists, images=images["images"], **parts)


@pytest.mark.parametrize(
    ("text", "second", "classes"),
    [
        ("a dog", False, ["a dog"]),
        ("\na dog\n", False, ["a dog"]),
        ("", True, ["", ""]),
        ("a dog\n", True, ["a dog", ""]),
        ("\na cat", True, ["", "a cat"]),
        ("a dog\n\n a cat", True, ["a dog", "a cat"]),
    ],
)
def test_each_concept_has_the_class_of_its_line(pack, text, second, classes):
    given = {"prompt": "a * apple", "word": "*", "initial_word": "house", "steps": 2, "learning_rate": 1e-3}
    given |= {"batch_size": 2, "resolution": 128, "seed": 5, "filename_prefix": "mine", "class_prompt": text}
    read_task = pack.nodes.custom_diffusion.read_task
    images = [pictures(1)]
    asked = read_task(images, images if second else None, None, **given, second_prompt="a * key" if second else "")
    assert [concept.class_prompt for concept in asked.concepts] == classes
    more = {**given, "class_prompt": "a dog\na cat" + "\na house" * second}
    with pytest.raises(ValueError, match=f"class_prompt has {2 + second} lines, and {1 + second}"):
        read_task(images, images if second else None, None, **more)


def merge(pack, miniature, prompts: str, captions: str = "a blue key\na green book in sketch style", **strengths):
    """Of two random patches, as a pair; with what was merged, by layer."""
    lora = pack.nodes.bridge.lora
    readers = pack.nodes.bridge.training.layers.prompt_readers(miniature.model.model)
    names = lora.keys.file_names(miniature.model.model)
    updates = [
        {
            name: 0.1 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))
            for name, shape in readers.items()
        }
        for seed in (1, 2)
    ]
    sources = lora.loras.LoRASources(
        {
            concept: lora.loras.LoRASource(concept, {f"{names.kohya(k)}.diff": t for k, t in own.items()}, strength)
            for concept, own, strength in zip(("content", "style"), updates, (1.0, 0.5), strict=True)
        }
    )
    with torch.inference_mode():
        made = pack.nodes.bridge.custom_diffusion.merge(miniature.model, miniature.clip, sources, prompts, captions)
    return made, updates


def assert_answered(miniature, tensors, updates, prompts, first: int) -> None:
    """That a merge, by the stock loader, answers as each patch does to the words of its prompt, from the first on, in
    the context that the host makes of them."""
    import comfy.lora
    import comfy.sd

    with torch.inference_mode():
        patched, _ = comfy.sd.load_lora_for_models(miniature.model, None, tensors, 1.0, 0.0)
        assert set(patched.patches) == set(updates[0])
        for text, own, strength in zip(prompts, updates, (1.0, 0.5), strict=True):
            words = encoded(miniature.clip, text)[0][0][0][1 + first : 1 + len(text.split())].float()
            for key, update in own.items():
                weight = miniature.model.model.get_parameter(key).float()
                merged = comfy.lora.calculate_weight(patched.patches[key], weight.clone(), key) - weight
                expected = words @ (strength * update).T
                torch.testing.assert_close(
                    words @ merged.T, expected, rtol=2e-2, atol=5e-3 * float(expected.abs().max())
                )


def test_a_merge_answers_each_prompt_as_its_own_patch_does(pack, miniature):
    prompts = ["blue apple", "house in neon style"]
    (tensors, report), updates = merge(pack, miniature, "\n".join(prompts))
    assert "14 layers" in report and "rank 6" in report and "2 ordinary captions" in report
    assert_answered(miniature, tensors, updates, prompts, 0)


@pytest.mark.parametrize(
    ("prompts", "captions", "says"),
    [
        ("blue apple", "a blue key", "prompts has 1 lines and there are 2 LoRAs"),
        ("blue apple\nhouse", " ", "captions is empty"),
        ("blue apple\n()", "a blue key", "has no words"),
        ("embedding:gone apple\nhouse", "a key", r"prompts: not every embedding.*apple' names was found \(0 of 1\)"),
        ("blue apple\na (embedding:gone:1.2)", "a blue key", "not every embedding"),
        ("blue apple\nhouse", "a embedding:gone key", "captions: not every embedding"),
        ("blue apple\n\ud800", "a blue key", "prompts holds half a character"),
        ("blue apple\nhouse", "a \ud800", "captions holds half a character"),
    ],
)
def test_a_merge_is_refused(pack, miniature, prompts, captions, says):
    with pytest.raises(ValueError, match=says):
        merge(pack, miniature, prompts, captions)


def test_a_merge_of_other_layers_is_refused(pack, miniature, monkeypatch):
    monkeypatch.setattr(pack.nodes.bridge.custom_diffusion, "prompt_readers", lambda model: {"other": (1, 2)})
    with pytest.raises(ValueError, match="change no keys or values of cross-attention"):
        merge(pack, miniature, "blue apple\nhouse")


def test_words_with_which_lines_begin_alike_belong_to_neither(pack, miniature):
    """They are read alike, so what both LoRAs answer to them cannot be kept; the others' answers are."""
    prompts = ["a star in flat style", "a star in neon style"]
    (tensors, report), updates = merge(pack, miniature, "\n".join(prompts))
    assert "rank 4" in report and "'a star in flat style' 2, 'a star in neon style' 2 words, kept" in report
    assert "; 6 with which lines begin alike stay as ordinary ones" in report
    assert_answered(miniature, tensors, updates, prompts, 3)


@pytest.mark.parametrize("prompts", ["blue apple\nblue apple", "blue apple\nblue"])
def test_a_line_without_words_of_its_own_is_refused(pack, miniature, prompts):
    with pytest.raises(ValueError, match="in prompts is the beginning of another's, or the same"):
        merge(pack, miniature, prompts)


def test_a_merge_says_that_text_encoders_are_left_out(pack, miniature):
    from test_text_fusion import sources_of

    sources = sources_of(pack, miniature)
    with torch.inference_mode():
        made, report = pack.nodes.bridge.custom_diffusion.merge(
            miniature.model, miniature.clip, sources, "blue apple\nhouse", "a blue key"
        )
    assert not any("lora_te" in key for key in made)
    for name in ("content", "style"):
        assert f"the text-encoder part of '{name}' is left out: put it on the clip with Load LoRA" in report


def full(pack, monkeypatch, refuses):
    """A disk that takes no file of which `refuses(path, steps)`."""
    lora_file = pack.nodes.bridge.training.lora_file
    real = lora_file.write_tensors

    def write(path, tensors, about):
        if refuses(str(path), int(about["ss_steps"])):
            raise OSError("no space left")
        return real(path, tensors, about)

    monkeypatch.setattr(lora_file, "write_tensors", write)


def test_a_full_disk_loses_no_patch_where_its_word_is_written(pack, miniature, clip, folder, output, monkeypatch):
    full(pack, monkeypatch, lambda path, steps: "embeddings" not in path)
    done = train(pack, miniature, task(pack))
    assert done.file == "" and "could not be written: no space left; save what was learned" in done.report
    monkeypatch.undo()
    expected = train(pack, miniature, task(pack)).lora_model
    assert all(torch.equal(tensor, expected[key]) for key, tensor in done.lora_model.items()) and done.lora_model


def test_a_word_that_is_behind_its_patch_is_said(pack, miniature, clip, folder, output, monkeypatch):
    full(pack, monkeypatch, lambda path, steps: "embeddings" in path and steps == 3)
    done = train(pack, miniature, task(pack, save_every=1))
    assert "custom_00001_.safetensors could not be written: no space left; it has 2 of 3 steps" in done.report
    assert "written: " in done.report


def test_long_texts_that_begin_alike_are_told_as_well(pack):
    """Distances of many rows are not exact by products."""
    own_words = pack.nodes.bridge.custom_diffusion._own_words
    rows = 30 * torch.randn(60, 768, generator=torch.Generator().manual_seed(0))
    found = own_words({"one": rows[:40], "other": torch.cat([rows[:30], rows[40:]])})
    assert torch.equal(found["one"], rows[30:40]) and torch.equal(found["other"], rows[40:])
    assert torch.equal(own_words({"alone": rows})["alone"], rows)
