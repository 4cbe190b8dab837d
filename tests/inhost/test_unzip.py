"""UnZipLoRA on the host's own SDXL class: its gradient, its files, what it refuses."""

from __future__ import annotations

import pytest
import test_gradient
import tiny
import torch
from safetensors.torch import load_file, save_file
from test_training import PixelsAsLatents, Words, output, patcher, pictures  # noqa: F401

PROMPTS = {"full": "a sks dog in szn style", "content": "a sks dog", "style": "szn style"}
RANK = 3


def task(pack, prompts=None, **changes):
    bridge, core = pack.nodes.bridge.unzip, pack.ziplora_core.unzip
    settings = {"steps": 3, "learning_rate": 1e-3, "rank": RANK, "share": 0.15} | {
        k: changes.pop(k) for k in list(changes) if k in core.Settings.__dataclass_fields__
    }
    given = {"picture": pictures(1), "prefix": "loras/apart", "resolution": 64, **changes}
    return bridge.Task(prompts={**PROMPTS, **(prompts or {})}, settings=core.Settings(**settings), **given)


def take_apart(pack, patcher, asked):  # noqa: F811
    with torch.inference_mode():
        return pack.nodes.bridge.unzip.unzip_picture(patcher, Words(), PixelsAsLatents(), asked)


@pytest.mark.parametrize("room", [None, 0], ids=["kept", "checkpointed"])
@pytest.mark.parametrize(
    "changes",
    [{"as_used": False}, {"batch_size": 6}, {"prompts_apart": False}],
    ids=["three prompts", "as used", "one prompt"],
)
def test_gradient_equals_autograd_over_copied_weights(pack, monkeypatch, patcher, room, changes):  # noqa: F811
    """W0·x(full) + ΔW_c·x(content) + ΔW_s·x(style) formed densely, by ordinary autograd."""
    core = pack.ziplora_core
    if room is not None:
        monkeypatch.setattr(pack.nodes.bridge.memory.plan, "room_for", lambda model: room)
    train, found, told = core.training.train, {}, set()

    def instead(trained, denoiser, given, settings, on_step, first, adam):
        g = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for lora in trained.trained.values():
                for up in lora.up.values():
                    up.copy_(0.1 * torch.randn(up.shape, generator=g))
            for masks in trained.masks.values():
                for mask in masks.values():
                    mask |= torch.rand(mask.shape, generator=g) < 0.4
        passes = core.training.step_rows(given, denoiser, settings, 0)
        told.update(prompt for rows in passes for prompt in rows.prompts)
        with torch.enable_grad():
            loss, _ = core.training._gradient(trained, denoiser, passes, 1.0, False)
            expected, leaves = dense(patcher, denoiser, passes, trained)
            expected.backward()
        assert loss == pytest.approx(expected.item(), rel=1e-4)
        for concept, lora in trained.trained.items():
            for name in lora.down:
                up, down, m = leaves[concept, name]
                found[concept, name] = [
                    (lora.up[name].grad, up.grad),
                    (lora.down[name].grad, down.grad),
                    (trained.mergers[concept][name].grad, m.grad),
                ]
        monkeypatch.setattr(core.training, "train", train)
        return train(trained, denoiser, given, settings, on_step)

    monkeypatch.setattr(core.training, "train", instead)
    take_apart(pack, patcher, task(pack, steps=1, **changes))
    assert changes != {"batch_size": 6} or told == {0, 3, 4}, "parted, whole and empty"
    assert {concept for concept, _ in found} == {"content", "style"}
    for place in range(3):
        largest = max(float(grads[place][1].abs().max()) for grads in found.values())
        assert largest > 0
        for key, grads in found.items():
            ours, theirs = grads[place]
            torch.testing.assert_close(
                ours, theirs, rtol=1e-3, atol=2e-4 * largest, msg=lambda m, key=key: f"{key}: {m}"
            )
    blocks = core.blocks
    assert blocks.block_owners(found_layers(found), blocks.UNZIPLORA_BLOCKS) != {}


def found_layers(found):
    return {name for _, name in found}


def dense(patcher, denoiser, passes, trained):  # noqa: F811
    copied = test_gradient.plain_copy(patcher, torch.float32)
    leaves, weights, total, now = {}, {}, 0.0, []
    for concept, lora in trained.trained.items():
        for name in lora.down:
            parts = (lora.up[name], lora.down[name], trained.mergers[concept][name])
            leaves[concept, name] = [p.detach().clone().requires_grad_() for p in parts]

    def update(concept, name):
        up, down, m = leaves[concept, name]
        return up @ (down * m * trained.masks[concept][name])

    contexts = trained._apart.contexts
    for name in {name for _, name in leaves}:
        own = [c for c in trained.trained if (c, name) in leaves]
        weight = copied.get_parameter(name)
        if contexts is not None and ".attn2.to_k." in name or contexts is not None and ".attn2.to_v." in name:
            module = copied.get_submodule(name.removesuffix(".weight"))

            def forward(x, weight=weight, own=own, name=name):
                parted = [prompt == 0 for prompt in now[-1].prompts]
                y = x @ weight.T
                for c in own:
                    seen = torch.stack([contexts[c][0] if p else row for p, row in zip(parted, x, strict=True)])
                    y = y + seen @ update(c, name).T
                return y

            module.forward = forward
        else:
            weights[f"model.{name}"] = weight + sum(update(c, name) for c in own)
    for rows in passes:
        sigma = copied.model_sampling.sigmas[rows.timesteps]
        x = copied.model_sampling.noise_scaling(sigma, rows.noise, rows.latents, False)
        now.append(rows)
        each = [denoiser._conditioning(p, rows.latents[:1]) for p in rows.prompts]
        arguments = {k: torch.cat([c[k].cond for c in each]).clone() for k in each[0]}
        options = {"optimized_attention_override": lambda f, *a, **k: test_gradient.plain_attention(*a, **k)}
        x0 = torch.func.functional_call(test_gradient.Apply(copied), weights, (x, sigma, arguments, options))
        eps = (x - x0) / sigma.view(-1, 1, 1, 1)
        total = total + (rows.weights * (eps - rows.noise).square().flatten(1).mean(1)).sum()
    return total, leaves


def test_two_ordinary_files_and_a_zipped_pair(pack, patcher, output):  # noqa: F811
    import comfy.lora
    import comfy.utils

    before = tiny.sample(patcher)
    done = take_apart(pack, patcher, task(pack, learning_rate=3e-2))
    assert torch.equal(tiny.sample(patcher), before)
    names = comfy.lora.model_lora_keys_unet(patcher.model, {})
    for file in done.files:
        tensors = comfy.utils.load_torch_file(str(output / file), safe_load=True)
        patches = comfy.lora.load_lora(tensors, names, log_missing=False)
        assert len(patches) == len(tensors) / 3
    pair, m = done.zipped.fitted.loras, done.zipped.coefficients
    for name, layer in pair.layers.items():
        if len(layer) < 2:
            continue
        empty = [(f.down == 0).all(0) for _, f in layer.items()]
        assert (empty[0] | empty[1]).all(), f"{name}: a column of both"
        assert 0.4 <= float((~empty[0]).float().mean()) <= 0.5
        assert (m["content"][name][empty[0]] == 0).all() and (m["style"][name][empty[1]] == 0).all()
    for block, concept in (("output_blocks.0.1.", "content"), ("output_blocks.1.1.", "style")):
        owned = [layer for name, layer in pair.layers.items() if f".{block}" in name]
        assert owned and all([c for c, _ in layer.items()] == [concept] for layer in owned)
    for needed in ("apart: prompts, columns, blocks", "overlap 0.000", "memory:"):
        assert needed in done.report
    assert len(done.loss_map["loss"]) == 3


def test_blocks_that_a_task_names_belong_to_one_concept(pack, patcher):  # noqa: F811
    named = {"content": ("output_blocks.1.1.",), "style": ("middle_block.", "input_blocks.")}
    done = take_apart(pack, patcher, task(pack, blocks=named))
    for name, layer in done.zipped.fitted.loras.layers.items():
        own = [concept for concept, blocks in named.items() if any(f".{block}" in name for block in blocks)]
        assert [concept for concept, _ in layer.items()] == (own or ["content", "style"]), name


def test_blocks_are_read_and_refused_by_name(pack, patcher):  # noqa: F811
    blocks = pack.ziplora_core.blocks
    layers = pack.nodes.bridge.training.layers.trained_layers(patcher.model, "attention")
    said = blocks.read_blocks("output_blocks.1.1.\n middle_block", "output_blocks.0.1,output_blocks.2")
    assert said == {
        "content": ("output_blocks.1.1.", "middle_block."),
        "style": ("output_blocks.0.1.", "output_blocks.2."),
    }
    found = blocks.block_owners(layers, said)
    assert {c for n, c in found.items() if ".middle_block.1." in n} == {"content"}
    assert {n for n in layers if ".output_blocks.2." in n} <= {n for n, c in found.items() if c == "style"}
    for content, style, says in (
        ("", "output_blocks.1", "content_blocks is empty; name a block, or turn block_separation off"),
        ("output_blocks.1", "output_blocks.11",
         r"style_blocks: this model has no attention in 'output_blocks.11'; "
         r"name its own blocks \(it has input_blocks.*middle_block.1, .*\), or turn"),
        ("middle_block", "middle_block.1", "'middle_block.1' is in content_blocks and in style_blocks; choose one"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=says):
            blocks.block_owners(layers, blocks.read_blocks(content, style))


def test_the_zipped_pair_is_saved_and_loaded(pack, patcher, output, monkeypatch):  # noqa: F811
    import folder_paths

    monkeypatch.setitem(folder_paths.folder_names_and_paths, "ziplora", ([str(output / "ziplora")], {".safetensors"}))
    done = take_apart(pack, patcher, task(pack, learning_rate=3e-2))
    with torch.inference_mode():
        name = pack.nodes.bridge.saved.save(done.zipped, "kept")
        folder_paths.filename_list_cache.clear()
        again = pack.nodes.bridge.saved.load(patcher, name)
    for side in ("content", "style"):
        kept, loaded = done.zipped.coefficients[side], again.coefficients[side]
        assert all(torch.equal(m, loaded[n]) for n, m in kept.items())


def test_nothing_apart_is_two_loras_of_everything(pack, patcher):  # noqa: F811
    asked = task(pack, prompts_apart=False, columns_apart=False, blocks_apart=False)
    done = take_apart(pack, patcher, asked)
    assert "apart: nothing" in done.report and len(done.loss_map["overlap"]) == 3
    assert all(len(layer) == 2 for layer in done.zipped.fitted.loras.layers.values())


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"picture": torch.zeros(0, 64, 64, 3)}, "image holds no picture"),
        ({"picture": torch.zeros(1, 0, 0, 3)}, "image has shape"),
        ({"picture": pictures(2)}, "image holds 2 pictures; UnZipLoRA learns from one"),
        ({"prompts": {"content": "  "}}, "content_prompt is empty"),
        ({"prompts": {"full": ""}}, "^prompt is empty"),
        ({"prompts": {"full": "a dog in szn style"}}, "prompt lacks 'sks', which content_prompt has"),
        ({"prompts": {"full": "a sks dog in style"}}, "prompt lacks 'szn', which style_prompt has"),
        ({"prompts": {"style": "style"}}, "'szn' stands in prompt, but neither in content_prompt nor in style_prompt"),
    ],
)
def test_refuses_in_one_sentence_before_anything_is_loaded(pack, patcher, monkeypatch, changes, says):  # noqa: F811
    monkeypatch.setattr(pack.nodes.bridge.network.session, "with_network", None)
    with pytest.raises(ValueError, match=says):
        take_apart(pack, patcher, task(pack, **changes))


@pytest.mark.parametrize("half", ["content", "style"])
def test_an_interrupted_run_goes_on_from_either_file(pack, patcher, output, monkeypatch, half):  # noqa: F811
    import comfy.model_management as management

    rows = pack.ziplora_core.training.step_rows

    def strike(pictures, denoiser, settings, step):
        if step == 2:
            management.interrupt_current_processing()
        return rows(pictures, denoiser, settings, step)

    monkeypatch.setattr(pack.ziplora_core.training, "step_rows", strike)
    before = tiny.sample(patcher)
    with pytest.raises(management.InterruptProcessingException):
        take_apart(pack, patcher, task(pack, steps=6, learning_rate=3e-2))
    assert torch.equal(tiny.sample(patcher), before)
    files = {c: f"apart_{c}_00001_.safetensors" for c in ("content", "style")}
    assert sorted(f.name for f in (output / "loras").iterdir()) == sorted(files.values())
    left = {c: load_file(output / "loras" / name) for c, name in files.items()}

    seen = []
    monkeypatch.setattr(
        pack.ziplora_core.training, "step_rows", lambda p, d, s, step: seen.append(step) or rows(p, d, s, step)
    )
    done = take_apart(pack, patcher, task(pack, steps=6, learning_rate=3e-2, go_on_from=files[half]))
    assert seen == [2, 2, 3, 4, 4, 5], "each period starts with a step that only scores"
    assert "steps 3 to 6" in done.report and len(done.loss_map["loss"]) == 4
    for concept, source in done.pair.by_concept.items():
        for key, tensor in left[concept].items():
            if key.endswith("down.weight"):
                assert (source.tensors[key] != 0).any(0)[(tensor != 0).any(0)].all(), f"{key}: a column was taken away"

    with pytest.raises(ValueError, match="has 2 steps already; expected steps above that"):
        take_apart(pack, patcher, task(pack, steps=2, go_on_from=files[half]))
    with pytest.raises(ValueError, match=f"rank {RANK}; expected .* of rank 8"):
        take_apart(pack, patcher, task(pack, steps=6, rank=8, go_on_from=files[half]))
    with pytest.raises(ValueError, match="'apart_content_00001_.safetensors' has .* layers .*; expected the"):
        named = {"content": ("output_blocks.1.1.",), "style": ("middle_block.",)}
        take_apart(pack, patcher, task(pack, steps=6, blocks=named, go_on_from=files[half]))
    other = files["style" if half == "content" else "content"]
    (output / "loras" / other).unlink()
    with pytest.raises(ValueError, match=f"'{other}' is missing"):
        take_apart(pack, patcher, task(pack, steps=6, go_on_from=files[half]))


def test_goes_on_only_from_its_own_files(pack, patcher, output):  # noqa: F811
    (output / "loras").mkdir(exist_ok=True)
    save_file({"lora_unet_a.lora_up.weight": torch.zeros(2, 2)}, output / "loras" / "other.safetensors")
    with pytest.raises(ValueError, match="'other.safetensors' is not UnZip LoRA's; continue_from takes either"):
        take_apart(pack, patcher, task(pack, go_on_from="other.safetensors"))


def test_saves_both_on_the_way(pack, patcher, output, monkeypatch):  # noqa: F811
    written = []
    file = pack.nodes.bridge.training.lora_file.File
    write = file.write
    monkeypatch.setattr(file, "write", lambda self, f, steps: written.append(steps) or write(self, f, steps))
    take_apart(pack, patcher, task(pack, steps=5, save_every=2))
    assert written == [2, 2, 4, 4, 5, 5]
