"""A pass of a zip or a training is the pass that the host itself would make of the user's model."""

from __future__ import annotations

import pytest
import tiny
import torch
from test_hosts import assert_equal_steps, one_step
from test_safety import optimise
from test_training import task, with_denoiser


def halved(prompts):
    return {c: [[context * 0.5, options]] for c, [[context, options]] in prompts.items()}


def halve_in_attention(patcher):
    patcher.set_model_attn2_patch(lambda n, context, value, options: (n, context * 0.5, value * 0.5))


def halve_in_a_wrapper(patcher):
    def wrapper(apply_model, call):
        conditioning = {**call["c"], "c_crossattn": call["c"]["c_crossattn"] * 0.5}
        assert len(call["cond_or_uncond"]) == len(call["input"]) == len(call["timestep"])
        return apply_model(call["input"], call["timestep"], **conditioning)

    patcher.set_model_unet_function_wrapper(wrapper)


def halve_in_a_newer_wrapper(patcher):
    from comfy.patcher_extension import WrappersMP

    def wrapper(executor, x, timesteps, context, *args, **kwargs):
        return executor(x, timesteps, context * 0.5, *args, **kwargs)

    patcher.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "half", wrapper)


@pytest.mark.parametrize("recomputed", [0, 99])
@pytest.mark.parametrize("patch", [halve_in_attention, halve_in_a_wrapper, halve_in_a_newer_wrapper])
def test_what_other_packs_put_on_a_model_is_there(pack, patch, recomputed):
    """Here each halves the prompt, as if a prompt half as strong had been given."""
    patcher = tiny.tiny_patcher()
    with torch.inference_mode():
        prompts = halved(tiny.prompts())
    sources = tiny.sources(pack, patcher.model)
    theirs = one_step(pack, patcher, sources, prompts)
    bare = one_step(pack, patcher, sources)
    patch(patcher)
    ours = one_step(pack, patcher, sources, recomputed=recomputed)
    assert_equal_steps(ours, theirs, 1e-4)
    assert ours[0] != pytest.approx(bare[0], rel=1e-3)


class Adapter(torch.nn.Module):
    """As an image prompt's: attends to tokens of its own with weights that were loaded for sampling, and changes what
    it is given in place."""

    def __init__(self, width: int):
        super().__init__()
        g = torch.Generator().manual_seed(3)
        self.tokens = torch.randn(1, 4, 8, generator=g)
        self.key, self.value = (torch.randn(8, width, generator=g) * 0.3 for _ in range(2))

    def forward(self, q, k, v, options):
        from comfy.ldm.modules.attention import attention_pytorch

        heads = options["n_heads"]
        out = attention_pytorch(q, k, v, heads)
        k, v = (self.tokens.repeat(len(q), 1, 1) @ weight for weight in (self.key, self.value))
        out += 0.7 * attention_pytorch(q, k, v, heads)
        return out


@pytest.mark.parametrize("recomputed", [0, 99])
def test_inference_tensors_of_other_packs_have_their_gradient(pack, recomputed):
    """Against the same in ordinary tensors."""
    losses = []
    for inference in (False, True):
        patcher = tiny.tiny_patcher()
        width = patcher.model.diffusion_model.middle_block[1].transformer_blocks[0].attn2.to_q.out_features
        with torch.inference_mode(inference):
            adapter = Adapter(width)
        patcher.set_model_attn2_replace(adapter, "middle", 0, 0)
        losses.append(one_step(pack, patcher, recomputed=recomputed * inference))
    assert_equal_steps(losses[1], losses[0], 1e-5)
    assert losses[0][0] != pytest.approx(one_step(pack, tiny.tiny_patcher())[0], rel=1e-4)


def change_kept(patcher):
    """In place, where autograd keeps what is changed: an output block's input, and a view of it."""

    def patch(h, skip, options):
        kept = h * h
        h[:, ::2] = h[:, ::2] * h[:, 1::2].sigmoid()
        skip.mul_(skip.sigmoid())
        return h + 0.1 * kept, skip

    patcher.set_model_output_block_patch(patch)


def change_copies(patcher):
    def patch(h, skip, options):
        kept = h * h
        changed = torch.stack([h[:, ::2] * h[:, 1::2].sigmoid(), h[:, 1::2]], 2).flatten(1, 2)
        return changed + 0.1 * kept, skip * skip.sigmoid()

    patcher.set_model_output_block_patch(patch)


def test_what_is_changed_in_place_is_kept_as_it_was(pack):
    """Against the same patch written without a change in place."""
    steps = []
    for patch in (change_copies, change_kept):
        patcher = tiny.tiny_patcher()
        patch(patcher)
        steps.append(one_step(pack, patcher))
    assert_equal_steps(steps[1], steps[0], 1e-5)


def test_chance_within_patches_is_the_same_for_teacher_student_and_a_second_run(pack):
    """And what the user's other nodes draw by chance is not touched by it."""

    def patch(n, context, value, options):
        return n * (1 + 0.5 * torch.rand(n.shape[-1], device=n.device)), context, value

    steps, states = [], []
    for recomputed in (0, 0, 99):
        patcher = tiny.tiny_patcher()
        patcher.set_model_attn1_patch(patch)
        torch.manual_seed(len(steps))
        states.append(torch.get_rng_state())
        steps.append(one_step(pack, patcher, recomputed=recomputed))
    for other in steps[1:]:
        assert_equal_steps(other, steps[0], 1e-5)


def test_what_patches_keep_is_given_back(pack):
    """A pass whose gradient nobody asks for leaves nothing behind."""
    import gc
    import weakref

    seen = []

    def patch(h, skip, options):
        made = h.exp()  # keeps its own output
        seen.append(weakref.ref(made.untyped_storage()))
        return made, skip

    patcher = tiny.tiny_patcher()
    patcher.set_model_output_block_patch(patch)
    pair = pack.nodes.bridge.lora.fitting.fit(tiny.sources(pack, patcher.model), patcher.model).loras
    tiny.kept_for_backward(pack, patcher, pair, tiny.prompts(), plain_latents(), 0)
    gc.collect()
    assert seen and not any(ref() for ref in seen)


def plain_latents():
    return {c: v["samples"] for c, v in tiny.latents().items()}


def gradients_at_the_output(pack, dtype) -> float:
    patcher, norms = tiny.tiny_patcher(dtype), []

    def look(module, args, made):
        if made.requires_grad:
            made.register_hook(lambda grad: norms.append(grad.double().norm().item()))

    hook = patcher.model.diffusion_model.register_forward_hook(look)
    optimise(pack, patcher, steps=1)
    hook.remove()
    return norms[0]


def test_half_precision_runs_backward_from_a_scaled_loss(pack):
    assert gradients_at_the_output(pack, torch.float16) == pytest.approx(
        1024 * gradients_at_the_output(pack, torch.float32), rel=0.2
    )


@pytest.mark.parametrize(
    ("storage", "compute", "scale"),
    [(torch.float16, None, 1024.0), (torch.float16, torch.float32, 1.0), (torch.bfloat16, None, 1.0)],
)
def test_so_does_training_where_it_computes_in_it(pack, storage, compute, scale):
    scales = []
    with_denoiser(
        pack, tiny.tiny_patcher(storage, compute), task(pack), lambda denoiser, *_: scales.append(denoiser.loss_scale)
    )
    assert scales == [scale]


@pytest.mark.parametrize("recomputed", [0, 99])
def test_an_interrupt_in_backward_is_noticed_at_the_next_layer(pack, recomputed):
    import comfy.model_management as management

    patcher, after = tiny.tiny_patcher(), []
    net = patcher.model.diffusion_model

    def strike(module, args, made):
        if made.requires_grad:
            made.register_hook(lambda _: management.interrupt_current_processing())

    def note(module, args, made):
        if made.requires_grad:
            made.register_hook(lambda _: after.append(1))

    hooks = [
        net.output_blocks[-1][0].out_layers[3].register_forward_hook(strike),
        net.middle_block[0].in_layers[2].register_forward_hook(note),
    ]
    with pytest.raises(management.InterruptProcessingException):
        one_step(pack, patcher, recomputed=recomputed)
    for hook in hooks:
        hook.remove()
    assert after == []


def test_latents_are_brought_into_the_models_own_space(pack):
    import comfy.latent_formats

    patcher, found = tiny.tiny_patcher(), []
    given = plain_latents()
    pair = pack.nodes.bridge.lora.fitting.fit(tiny.sources(pack, patcher.model), patcher.model).loras
    with torch.inference_mode():
        pack.nodes.bridge.network.predictor.with_predictor(
            patcher, pair, tiny.prompts(), given, lambda predict, joined, references: found.append(references)
        )
    scale = comfy.latent_formats.SDXL().scale_factor
    assert scale != 1
    torch.testing.assert_close(found[0]["content"], given["content"].clone() * scale)
    torch.testing.assert_close(found[0]["style"], given["style"].clone() * scale)


def test_so_are_the_pictures_of_a_training(pack):
    import comfy.latent_formats
    from test_training import PixelsAsLatents, pictures

    found = []
    shown = pictures()
    with_denoiser(pack, tiny.tiny_patcher(), task(pack, images=[shown]), lambda _, given, __: found.append(given))
    scale = comfy.latent_formats.SDXL().scale_factor
    for example, picture in zip(found[0].sets[0], shown, strict=False):
        torch.testing.assert_close(
            example.latents, PixelsAsLatents().encode(picture[None]) * scale, rtol=0, atol=scale / 100
        )
