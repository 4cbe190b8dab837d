"""Training a LoRA: its gradient, its file, what it leaves behind, interrupts, going on, and what it refuses."""

from __future__ import annotations

import math
from typing import Any

import pytest
import test_gradient
import tiny
import torch
from families import FIRST

from devhost import full_size

RANK = 4
STEPS = 3


class PixelsAsLatents:
    """A VAE that stands for one: eight pixels a side to a number, four channels."""

    def encode(self, pixels):
        small = torch.nn.functional.avg_pool2d(pixels.movedim(-1, 1), 8)
        return torch.cat([small, small.mean(1, keepdim=True)], 1) * 2 - 1


class Words:
    """A text encoder that stands for one: random numbers for each text."""

    def tokenize(self, text):
        return text

    def encode_from_tokens_scheduled(self, text):
        with torch.inference_mode():
            return full_size.random_prompt(sum(map(ord, text)), width=96)


def pictures(count: int = 2, height: int = 64, width: int = 64, seed: int = 0):
    return torch.rand(count, height, width, 3, generator=torch.Generator().manual_seed(seed))


def task(pack, prompts=1, images=None, second=None, **changes) -> Any:
    bridge, Settings = pack.nodes.bridge.training, pack.ziplora_core.training.Settings
    settings = {"steps": STEPS, "learning_rate": 1e-3, "rank": RANK} | {
        k: changes.pop(k) for k in list(changes) if k in Settings.__dataclass_fields__
    }
    words = [f"a sks figure {i}" for i in range(prompts)]
    sets = [bridge.pictures.TrainingImages(images or [pictures()], words)] + ([second] if second else [])
    defaults = {"prefix": "loras/tiny", "resolution": 64}
    return bridge.concept.Task(sets, Settings(**settings), **{**defaults, **changes})


def train(pack, patcher, asked):
    with torch.inference_mode():
        return pack.nodes.bridge.training.concept.train_concept(patcher, Words(), PixelsAsLatents(), asked)


@pytest.fixture
def patcher():
    return tiny.tiny_patcher()


@pytest.fixture(autouse=True)
def output(tmp_path, monkeypatch):
    import folder_paths

    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path))
    folders, endings = folder_paths.folder_names_and_paths["loras"]
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", ([str(tmp_path / "loras"), *folders], endings))
    folder_paths.filename_list_cache.clear()
    return tmp_path


def with_denoiser(pack, patcher, asked, work):
    """work(denoiser, pictures, trained) with a LoRA whose up is not zero."""
    bridge = pack.nodes.bridge.training
    shapes = bridge.layers.trained_layers(patcher.model, asked.layers)

    def inside(denoiser, given, device):
        trained = pack.ziplora_core.trained_lora.TrainedLoRA(shapes, RANK, 0, device)
        with torch.no_grad():
            for i, up in enumerate(trained.up.values()):
                up.copy_(0.1 * torch.randn(up.shape, generator=torch.Generator().manual_seed(i)))
        work(denoiser, given, trained)

    with torch.inference_mode():
        made = bridge.concept.prepare(patcher, Words(), PixelsAsLatents(), asked)
        bridge.loading.with_denoiser(patcher, made, shapes, asked.settings, inside)


def dense_loss(patcher, denoiser, passes, updates):
    """DreamBooth's loss by ordinary autograd over a copied model with merged weights, row by row."""
    copied = test_gradient.plain_copy(patcher, torch.float32)
    total = 0.0
    for rows in passes:
        sigma = copied.model_sampling.sigmas[rows.timesteps]
        x = copied.model_sampling.noise_scaling(sigma, rows.noise, rows.latents, False)
        for i, prompt in enumerate(rows.prompts):
            c = denoiser._conditioning(prompt, rows.latents[i : i + 1])
            arguments = {k: (v.cond if hasattr(v, "cond") else v).clone() for k, v in c.items()}
            options = {"optimized_attention_override": lambda f, *a, **k: test_gradient.plain_attention(*a, **k)}
            weights = {f"model.{k}": copied.get_parameter(k) + delta for k, delta in updates.items()}
            at = (x[i : i + 1], sigma[i : i + 1], arguments, options)
            x0 = torch.func.functional_call(test_gradient.Apply(copied), weights, at)
            eps = (x[i : i + 1] - x0) / sigma[i].view(1, 1, 1, 1)
            total = total + rows.weights[i] * (eps - rows.noise[i : i + 1]).square().mean()
    return total


@pytest.mark.parametrize("case", ["one prompt", "class pictures", "checkpointed", "every layer"])
def test_gradient_equals_autograd_over_copied_weights(pack, monkeypatch, patcher, case):
    changes: dict[str, Any] = {"batch_size": 2}
    if case == "class pictures":
        changes |= {
            "class_prompt": "a figure",
            "class_pictures": [pictures(3, seed=5)],
            "prior_weight": 0.5,
        }
    if case == "every layer":
        changes["layers"] = "all linear"
    if case == "checkpointed":
        monkeypatch.setattr(pack.nodes.bridge.memory.plan, "room_for", lambda model: 0)
    asked, found = task(pack, **changes), {}

    def work(denoiser, given, trained):
        core = pack.ziplora_core.training
        passes = core.step_rows(given, denoiser, asked.settings, 0)
        assert sum(len(rows.latents) for rows in passes) == (4 if case == "class pictures" else 2)
        with torch.enable_grad():
            loss, _ = core._gradient(trained, denoiser, passes, 1.0, True)
            leaves = {n: (trained.up[n].detach().clone(), trained.down[n].detach().clone()) for n in trained.down}
            for up, down in leaves.values():
                up.requires_grad_(), down.requires_grad_()
            expected = dense_loss(patcher, denoiser, passes, {n: up @ down for n, (up, down) in leaves.items()})
            expected.backward()
        assert loss == pytest.approx(expected.item(), rel=1e-4)
        for name, (up, down) in leaves.items():
            found[name] = (trained.up[name].grad, up.grad, trained.down[name].grad, down.grad)

    with_denoiser(pack, patcher, asked, work)
    assert len(found) > 20
    largest = max(float(g.abs().max()) for grads in found.values() for g in grads)
    for name, (up, up_expected, down, down_expected) in found.items():
        for ours, theirs in ((up, up_expected), (down, down_expected)):
            torch.testing.assert_close(
                ours, theirs, rtol=1e-3, atol=1e-4 * largest, msg=lambda m, name=name: f"{name}: {m}"
            )


@pytest.mark.smoke
def test_the_file_is_a_lora_for_the_stock_loader(pack, patcher, output):
    """Its picture is that of the trained factors, formed densely into the weights."""
    import comfy.sd
    import comfy.utils

    done = train(pack, patcher, task(pack, learning_rate=1e-1))
    assert done.file.replace("\\", "/") == "loras/tiny_00001_.safetensors"
    tensors, about = comfy.utils.load_torch_file(str(output / done.file), safe_load=True, return_metadata=True)
    assert about["ss_steps"] == str(STEPS) and about["ss_network_dim"] == str(RANK)
    assert {k: t.shape for k, t in tensors.items()} == {k: t.shape for k, t in done.lora_model.items()}
    with torch.inference_mode():
        patched, _ = comfy.sd.load_lora_for_models(patcher, None, tensors, 1.0, 0.0)
    assert len(patched.patches) == len(tensors) / 3
    before, after = tiny.sample(patcher), tiny.sample(patched)
    assert not torch.equal(before, after)
    dense = tiny.tiny_patcher()
    names = pack.nodes.bridge.lora.keys.file_names(patcher.model)
    with torch.inference_mode():
        for key in patched.patches:
            layer = names.kohya(key)
            update = tensors[f"{layer}.lora_up.weight"].float() @ tensors[f"{layer}.lora_down.weight"].float()
            weight = dense.model.get_parameter(key)
            weight.copy_(weight + update)
    torch.testing.assert_close(tiny.sample(dense), after, rtol=1e-3, atol=1e-3)


def test_the_loss_falls_and_the_model_is_what_it_was(pack, patcher):
    before = tiny.sample(patcher)
    weights = {k: v.clone() for k, v in patcher.model.state_dict().items()}
    done = train(pack, patcher, task(pack, steps=40, learning_rate=1e-2, batch_size=4))
    losses = done.loss_map["loss"]
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])
    assert patcher.patches == {} and patcher.injections == {}
    assert all(torch.equal(v, weights[k]) for k, v in patcher.model.state_dict().items())
    assert not [n for n, m in patcher.model.named_modules() if "forward" in vars(m)]
    assert torch.equal(tiny.sample(patcher), before)


def test_one_seed_gives_one_lora(pack, patcher):
    first, again = (train(pack, patcher, task(pack)).lora_model for _ in range(2))
    other = train(pack, patcher, task(pack, seed=1)).lora_model
    assert all(torch.equal(t, again[k]) for k, t in first.items())
    assert not all(torch.equal(t, other[k]) for k, t in first.items())


def test_interrupted_run_is_saved_and_goes_on(pack, patcher, output, monkeypatch):
    import comfy.model_management as management

    before = tiny.sample(patcher)
    core = pack.ziplora_core.training
    rows = core.step_rows

    def strike(pictures, denoiser, settings, step):
        if step == 2:
            management.interrupt_current_processing()
        return rows(pictures, denoiser, settings, step)

    monkeypatch.setattr(core, "step_rows", strike)
    with pytest.raises(management.InterruptProcessingException):
        train(pack, patcher, task(pack, steps=5))
    monkeypatch.setattr(core, "step_rows", rows)
    assert torch.equal(tiny.sample(patcher), before)
    (file,) = (output / "loras").iterdir()
    assert pack.nodes.bridge.training.lora_file.steps_done(file.name) == 2
    seen = []
    monkeypatch.setattr(core, "step_rows", lambda p, d, s, step: seen.append(step) or rows(p, d, s, step))
    done = train(pack, patcher, task(pack, steps=5, go_on_from=file.name))
    assert seen == [2, 3, 4] and len(done.loss_map["loss"]) == 3 and "steps: 3 to 5" in done.report
    with pytest.raises(ValueError, match="has 2 steps already; expected steps above that"):
        train(pack, patcher, task(pack, steps=2, go_on_from=file.name))
    with pytest.raises(ValueError, match=f"'{file.name}' has .* rank {RANK}; expected .* of rank 8"):
        train(pack, patcher, task(pack, steps=5, rank=8, go_on_from=file.name))


def test_saves_on_the_way(pack, patcher, output, monkeypatch):
    written = []
    write = pack.nodes.bridge.training.lora_file.File.write
    monkeypatch.setattr(
        pack.nodes.bridge.training.lora_file.File,
        "write",
        lambda self, f, steps: written.append(steps) or write(self, f, steps),
    )
    train(pack, patcher, task(pack, steps=5, save_every=2, sample_every=3))
    assert written == [2, 4, 5]


def test_pictures_of_several_sizes_have_their_buckets(pack, patcher):
    bucket = pack.nodes.bridge.training.pictures.bucket
    assert bucket(3000, 2000, 1024) == (1280, 832) and bucket(500, 500, 1024) == (1024, 1024)
    assert bucket(10, 1000, 128) == (16, 1280)
    images = [pictures(1, 64, 96), pictures(1, 64, 64)]
    done = train(pack, patcher, task(pack, prompts=2, images=images, steps=4))
    assert "2 pictures, latents of 10 x 7, 8 x 8" in done.report


def test_prompts_belong_to_their_pictures(pack, patcher):
    asked = task(pack, prompts=2, steps=1)
    made = pack.nodes.bridge.training.concept.prepare(patcher, Words(), PixelsAsLatents(), asked)
    assert [e.prompt for e in made.pictures.sets[0]] == [0, 1]


def test_two_concepts_take_turns(pack, patcher):
    """Joint training: one LoRA, both sets."""
    bridge = pack.nodes.bridge.training.pictures
    second = bridge.TrainingImages([pictures(3, seed=9)], ["a house in szn style"])
    asked, seen = task(pack, second=second, batch_size=1), []

    def work(denoiser, given, trained):
        for step in range(4):
            (rows,) = pack.ziplora_core.training.step_rows(given, denoiser, asked.settings, step)
            seen.append(rows.prompts[0])

    with_denoiser(pack, patcher, asked, work)
    assert seen == [0, 1, 0, 1]
    assert "2 and 3 pictures" in train(pack, patcher, asked).report


def test_the_base_model_draws_the_class(pack, patcher):
    done = train(pack, patcher, task(pack, class_prompt="a figure", class_count=2))
    assert "class pictures: 2 drawn by the base model, weight 1" in done.report


def test_b_lora_trains_its_two_blocks(pack, patcher):
    bridge = pack.nodes.bridge.training.layers
    both = bridge.trained_layers(patcher.model, "B-LoRA")
    content = bridge.trained_layers(patcher.model, "B-LoRA content block")
    style = bridge.trained_layers(patcher.model, "B-LoRA style block")
    assert set(both) == set(content) | set(style) and not set(content) & set(style)
    assert all(".output_blocks.0.1." in name for name in content)
    assert all(".output_blocks.1.1." in name for name in style)
    assert len(bridge.trained_layers(full_size.sdxl_model(torch.float16, device="meta"), "B-LoRA")) == 2 * 10 * 8
    assert len(bridge.trained_layers(full_size.sdxl_model(torch.float16, device="meta"), "attention")) == 560


def test_b_lora_trains_the_blocks_that_a_task_names(pack, patcher):
    named = {"content": ("middle_block.",), "style": ("output_blocks.0.1.", "output_blocks.1.1.")}
    done = train(pack, patcher, task(pack, layers="B-LoRA", b_lora=named))
    starts = ("lora_unet_middle_block_", "lora_unet_output_blocks_0_1_", "lora_unet_output_blocks_1_1_")
    assert all(key.startswith(starts) for key in done.lora_model)
    assert all(any(key.startswith(start) for key in done.lora_model) for start in starts)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"images": [torch.zeros(0, 64, 64, 3)]}, "images holds no picture"),
        ({"images": [torch.zeros(1, 0, 64, 3)]}, r"images has shape \(1, 0, 64, 3\)"),
        ({"images": [torch.full((1, 64, 64, 3), math.nan)]}, "images holds NaN"),
        ({"prompts": 3}, "images holds 2 pictures and prompt 3 lines"),
        ({"prompts": 0}, "prompt is empty"),
        ({"class_pictures": [pictures()]}, "class_prompt is empty"),
        ({"layers": "none"}, "layers is 'none'; expected one of: attention"),
        ({"prefix": "../../elsewhere/x"}, "leads out of the folder"),
        ({"go_on_from": "missing.safetensors"}, "'missing.safetensors' is missing"),
    ],
)
def test_refuses_in_one_sentence_before_anything_is_loaded(pack, patcher, monkeypatch, changes, says):
    monkeypatch.setattr(pack.nodes.bridge.network.session, "with_network", None)
    with pytest.raises(ValueError, match=says):
        train(pack, patcher, task(pack, **changes))


def test_out_of_range_settings_are_named(pack):
    Settings = pack.ziplora_core.training.Settings
    for change in ({"steps": 0}, {"learning_rate": math.nan}, {"rank": 0}, {"batch_size": 65}, {"prior_weight": -1}):
        (name,) = change
        with pytest.raises(ValueError, match=f"{name} is "):
            Settings(**change)


def test_pairs_from_sockets_zip(pack, patcher):
    loras, optimise = pack.nodes.bridge.lora.loras, pack.nodes.bridge.optimize.zipping
    first, second = (train(pack, patcher, task(pack, seed=seed, learning_rate=1e-1)).lora_model for seed in (1, 2))
    pair = loras.pair(first, second, 1.0, 0.5)
    settings = pack.ziplora_core.solver.Settings(steps=1)
    with torch.inference_mode():
        zipped, *_ = optimise.optimize(patcher, pair, tiny.prompts(), tiny.latents(), settings)
        with pytest.raises(ValueError, match="content_lora comes from another node"):
            pack.nodes.bridge.saved.save(zipped, "x")
        with pytest.raises(ValueError, match="style_lora holds no LoRA"):
            loras.pair(first, {}, 1.0, 1.0)


def test_memory_is_planned_as_it_is_kept(pack, patcher):
    """What autograd keeps of a real pass, trained numbers apart, is what was rehearsed; less room, more run again."""
    asked, found = task(pack, batch_size=1), {}
    bridge = pack.nodes.bridge
    shapes = bridge.training.layers.trained_layers(patcher.model, asked.layers)

    def work(denoiser, given, trained):
        own = {p.untyped_storage()._cdata for p in trained.parameters()}
        storages = {}

        def keep(tensor):
            storage = tensor.untyped_storage()
            if storage._cdata not in own:
                storages[storage._cdata] = storage
            return tensor

        (rows,) = pack.ziplora_core.training.step_rows(given, denoiser, asked.settings, 0)
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            denoiser(rows, trained.branch(rows))
        found["kept"] = sum(storage.nbytes() for storage in storages.values())

    with_denoiser(pack, patcher, asked, work)
    with torch.inference_mode():
        made = bridge.training.concept.prepare(patcher, Words(), PixelsAsLatents(), asked)
    lora = pack.ziplora_core.trained_lora.TrainedLoRA(shapes, RANK, 0, "meta")
    rehearsed = bridge.memory.rehearsal.rehearse_training(patcher, made.prompts[0], made.largest, lora)
    assert rehearsed.kept(0) == pytest.approx(found["kept"], rel=0.05)
    plans = [
        bridge.memory.plan.make_for_training(patcher, shapes, made.prompts[0], made.largest, RANK, 1, room)
        for room in (0, 10**7, 10**12)
    ]
    assert plans[0].recomputed == plans[0].blocks > plans[-1].recomputed == 0
    assert plans[0].need <= plans[1].need <= plans[2].need


def test_full_size_training_is_planned_under_12_gb(pack):
    """SDXL in half precision at 1024 x 1024 with the defaults, weights and all, on a card that holds much more."""
    from comfy.model_patcher import ModelPatcher

    plan, training = pack.nodes.bridge.memory.plan, pack.nodes.bridge.training.layers
    model = ModelPatcher(full_size.sdxl_model(torch.float16, device="meta"), torch.device("cpu"), torch.device("cpu"))
    shapes = training.trained_layers(model.model, "attention")
    latents = full_size.random_latents(128, 0)["samples"]
    planned = plan.make_for_training(model, shapes, full_size.random_prompt(0), latents, 64, 1, 80 * 10**9)
    assert 8e9 < planned.need + model.model_size() < 12e9
    assert 0 < planned.recomputed < planned.blocks


@pytest.mark.parametrize("name", FIRST)
def test_every_family_is_trained(pack, monkeypatch, name):
    """A clip and a VAE that give the family's own prompts and latents; the file is one that the stock loader takes."""
    import comfy.lora

    family, bridge = FIRST[name], pack.nodes.bridge.training.concept
    patcher = family.patcher()

    class Clip(Words):
        def encode_from_tokens_scheduled(self, text):
            return family.prompts()["content"]

    class Vae:
        def encode(self, pixels):
            return family.latents()["content"]["samples"][:1].clone()

    asked = task(pack, images=[pictures(1)], steps=12, learning_rate=1e-2, batch_size=4, sample_every=12)
    before = {k: v.clone() for k, v in patcher.model.state_dict().items()}
    with torch.inference_mode():
        done = bridge.train_concept(patcher, Clip(), Vae(), asked)
    assert all(torch.equal(v, before[k]) for k, v in patcher.model.state_dict().items())
    patches = comfy.lora.load_lora(
        done.lora_model, comfy.lora.model_lora_keys_unet(patcher.model, {}), log_missing=False
    )
    assert len(patches) == len(done.lora_model) / 3 > 0
    assert any(float(t.abs().max()) > 0 for k, t in done.lora_model.items() if "lora_up" in k)
    assert sum(done.loss_map["loss"][-4:]) < sum(done.loss_map["loss"][:4])


def test_a_loss_that_is_not_finite_names_the_largest_update(pack, patcher, monkeypatch):
    core = pack.ziplora_core.training
    rows, spoiled = core.step_rows, "diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_v.weight"
    trained_lora, made = pack.ziplora_core.trained_lora, []
    lora = trained_lora.TrainedLoRA
    monkeypatch.setattr(trained_lora, "TrainedLoRA", lambda *a: made.append(lora(*a)) or made[-1])

    def spoil(pictures, denoiser, settings, step):
        if step == 1:
            with torch.no_grad():
                made[0].up[spoiled].fill_(float("nan"))
        return rows(pictures, denoiser, settings, step)

    monkeypatch.setattr(core, "step_rows", spoil)
    says = f"step 2: the loss is not finite; the largest update is that of layer '{spoiled}'; lower learning_rate"
    with pytest.raises(FloatingPointError, match=says):
        train(pack, patcher, task(pack, steps=3))
    pair = pack.ziplora_core.unzip.UnZip
    nothing = pair(
        {spoiled: (4, 4)}, pack.ziplora_core.unzip.Settings(rank=2), pack.ziplora_core.unzip.Separations(), None
    )
    assert nothing.largest() is None
    with torch.no_grad():
        nothing.trained["style"].up[spoiled].fill_(1.0)
    assert nothing.largest() == f"{spoiled} (style)"


def test_a_run_that_diverges_says_so_and_not_what_it_could_not_save(pack, patcher, monkeypatch):
    """A rate at which the numbers leave half precision: the loss is what is named."""
    Step, core = pack.ziplora_core.training.Step, pack.ziplora_core.training

    def diverge(trained, denoiser, given, settings, on_step, first, adam):
        on_step(Step(1, 3, 1.0))
        with torch.no_grad():
            next(iter(trained.up.values())).fill_(1e9)
        raise FloatingPointError("step 2: the loss is not finite")

    monkeypatch.setattr(core, "train", diverge)
    with pytest.raises(FloatingPointError, match="step 2: the loss is not finite"):
        train(pack, patcher, task(pack))
