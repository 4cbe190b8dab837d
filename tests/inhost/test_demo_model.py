"""The miniature, untrained: ComfyUI's own loader reads its checkpoint and computes the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import comfy.lora
import comfy.model_base
import comfy.sd
import pytest
import torch

PROMPTS = ["a noto octopus on the left on a blue ground in neon style", "grapes", ""]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory, miniature_extension: Any) -> tuple[Any, Path]:
    """A miniature of random weights, none of them zero, and its checkpoint, put together as the training does."""
    from demo import autoencoder, miniature
    from demo.training import assemble, fit_base, fit_vae
    from demo.training.averages import Averages

    torch.manual_seed(0)
    mini = miniature.Miniature(autoencoder.Autoencoder((3, 3, 2, 1)).state_dict())
    with torch.no_grad():
        for weight in mini.parameters():
            if not weight.any():
                weight.normal_(std=0.02)
    work = tmp_path_factory.mktemp("art")
    fit_vae.save(mini.vae.state_dict(), work / "weights" / "vae.pt")
    fit_base.write(mini, Averages([], 0.9), work / "weights" / "base.safetensors", "hash", 7)
    return mini.requires_grad_(False), assemble.assemble(work)


@pytest.fixture(scope="module")
def hosted(written: tuple[Any, Path]) -> tuple[Any, Any, Any]:
    """model, clip and vae as CheckpointLoaderSimple gives them."""
    options = {"dtype": torch.float32}
    return comfy.sd.load_checkpoint_guess_config(str(written[1]), model_options=options)[:3]


def test_it_is_an_sdxl_of_v_prediction(hosted: tuple[Any, Any, Any]) -> None:
    model = hosted[0].model
    assert isinstance(model, comfy.model_base.SDXL) and model.model_type == comfy.model_base.ModelType.V_PREDICTION
    assert 5e6 < sum(weight.numel() for weight in model.diffusion_model.parameters()) < 8e6


def test_the_host_reads_prompts_as_the_training_does(written: tuple[Any, Path], hosted: tuple[Any, Any, Any]) -> None:
    from demo.training import fit_base

    mini, clip = written[0], hosted[1]
    assert fit_base.Tokens(mini)(PROMPTS).equal(mini.tokens(PROMPTS))
    context, pooled = mini.encode_tokens(mini.tokens(PROMPTS))
    for i, prompt in enumerate(PROMPTS):
        given, extra = clip.encode_from_tokens(clip.tokenize(prompt), return_pooled=True)
        torch.testing.assert_close(given[0].float(), context[i], atol=2e-2, rtol=2e-2)
        torch.testing.assert_close(extra[0].float(), pooled[i], atol=2e-2, rtol=2e-2)
    with pytest.raises(ValueError, match="15 words"):
        fit_base.Tokens(mini)(["a " * 15])


def test_hidden_matrices_turn_and_the_rest_is_adams() -> None:
    """Each singular value of a step on a matrix is about one, at the size that Adam's would have."""
    from demo.miniature import Miniature
    from demo.training import fit_base

    torch.manual_seed(0)
    mini = Miniature()
    mini.unet.to(memory_format=torch.channels_last)
    trained = mini.trained_parameters()
    settings = fit_base.BaseSettings()
    optimizers = fit_base.optimizers_of(mini, settings)
    hidden = [p for p, _ in optimizers.hidden]
    assert 0.9 < sum(p.numel() for p in hidden) / sum(p.numel() for p in trained) < 1
    assert all(p.data_ptr() == matrix.data_ptr() for p, matrix in optimizers.hidden)
    adams = [p for group in optimizers.each[1][0].param_groups for p in group["params"]]
    assert {id(p) for p in hidden} | {id(p) for p in adams} == {id(p) for p in trained}
    chosen = [hidden[0], next(p for p in hidden if p.ndim == 4), adams[0]]
    before = [p.detach().clone() for p in chosen]
    for p in trained:
        p.grad = torch.randn_like(p)
    optimizers.step(0.5)
    for p, old in zip(chosen[:2], before, strict=False):
        moved = (p.detach() - old).flatten(1).double()
        values = torch.linalg.svdvals(moved) / (0.5 * settings.learning_rate * 0.2 * max(moved.shape) ** 0.5)
        assert 0.4 < float(values.min()) and float(values.max()) < 1.6
    moved = (chosen[2].detach() - before[2]).abs()
    assert float(moved.median()) == pytest.approx(0.5 * settings.adam_rate, rel=0.05)


def test_the_host_predicts_and_decodes_the_same(written: tuple[Any, Path], hosted: tuple[Any, Any, Any]) -> None:
    from demo.miniature import load_miniature

    read, (patcher, _, vae) = load_miniature(str(written[1])), hosted
    context, vector = read.conditions(PROMPTS)
    latents = torch.randn(3, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    steps = torch.tensor([10.0, 500.0, 990.0])
    ours = read.predict(latents, steps, context, vector)
    theirs = patcher.model.diffusion_model(latents, timesteps=steps, context=context, y=vector)
    torch.testing.assert_close(theirs, ours, atol=1e-3, rtol=1e-3)
    shown = vae.decode(patcher.model.process_latent_out(latents))
    torch.testing.assert_close(shown.movedim(-1, 1).float(), read.vae.decode(latents).clamp(0, 1), atol=1e-2, rtol=0)


@pytest.mark.parametrize("targets", ["TARGETS", "WIDE"])
def test_the_hosts_lora_loader_gives_what_training_saw(
    written: tuple[Any, Path], hosted: tuple[Any, Any, Any], targets: str
) -> None:
    from demo import lora
    from demo.miniature import load_miniature

    read, patcher = load_miniature(str(written[1])), hosted[0].clone()
    torch.manual_seed(4)
    branches = lora.attach(read.unet, 3, 6.0, getattr(lora, targets))
    for branch in branches.values():
        branch.up.data.normal_(std=0.5)
    state = lora.state(branches)
    lora.detach(read.unet, branches)
    plain = _predicted(read.unet)
    assert len(lora.attach_file(read.unet, state)) == len(branches)
    patches = comfy.lora.load_lora(state, comfy.lora.model_lora_keys_unet(patcher.model, {}), log_missing=False)
    assert {key for adapter in patches.values() for key in adapter.loaded_keys} == set(state)
    patcher.add_patches(patches, 1.0)
    patcher.patch_model()
    try:
        theirs = _predicted(patcher.model.diffusion_model)
    finally:
        patcher.unpatch_model()
    ours = _predicted(read.unet)
    torch.testing.assert_close(theirs, ours, atol=1e-3, rtol=1e-3)
    assert (ours - plain).abs().max() > 0.1


def _predicted(unet: Any) -> torch.Tensor:
    from demo import miniature

    g = torch.Generator().manual_seed(1)
    latents, context = torch.randn(2, 4, 16, 16, generator=g), torch.randn(2, 15, miniature.CONTEXT, generator=g)
    vector = torch.randn(2, miniature.POOLED + 6 * 256, generator=g)
    with torch.no_grad():
        return unet(latents, timesteps=torch.tensor([10.0, 500.0]), context=context, y=vector)


def test_a_shortened_lora_is_the_nearest_of_its_rank() -> None:
    """The update less the shortened one is what the smaller singular values hold, by a dense SVD in float64."""
    from demo import lora

    torch.manual_seed(5)
    layers = {"to_q": torch.nn.Linear(12, 20), "to_k": torch.nn.Linear(30, 9)}
    branches = lora.attach(torch.nn.ModuleDict({"block": torch.nn.ModuleDict(layers)}), 6, 3.0)
    assert len(branches) == 2
    whole = {}
    for name, branch in branches.items():
        branch.up.data.normal_()
        whole[name] = branch.up.detach().double() @ branch.down.detach().double()
    lora.shorten(branches, 4)
    for name, branch in branches.items():
        assert branch.down.shape[0] == branch.up.shape[1] == 4 and branch.scale == 0.5
        left, sizes, right = torch.linalg.svd(whole[name], full_matrices=False)
        nearest = left[:, :4] * sizes[:4] @ right[:4]
        kept = branch.up.detach().double() @ branch.down.detach().double()
        torch.testing.assert_close(kept, nearest, atol=1e-5, rtol=1e-5)


def test_loras_start_from_factors_of_their_own(written: tuple[Any, Path]) -> None:
    """And one LoRA always from the same. In a first step `down` has no gradient, since `up` is zero."""
    from demo import lora
    from demo.training import fit_lora

    mini, pictures = written[0], torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(1))
    downs = []
    for prompt in ("a bax octopus", "a goat in ozk style", "a bax octopus"):
        branches = fit_lora.fit(mini, pictures, [prompt], fit_lora.LoRASettings(rank=4, steps=1, references=1))
        lora.detach(mini.unet, branches)
        downs.append(torch.cat([branch.down.detach().flatten() for branch in branches.values()]))
    subject, style, again = downs
    assert torch.equal(subject, again)
    assert abs(float(torch.cosine_similarity(subject, style, dim=0))) < 0.1


def test_a_decoder_of_another_encoder_is_refused(written: tuple[Any, Path]) -> None:
    from demo import autoencoder
    from demo.training import assemble, fit_vae

    folder = written[1].parent
    fit_vae.save(autoencoder.Autoencoder().state_dict(), folder / "decoder.pt")
    try:
        with pytest.raises(ValueError, match="another encoder"):
            assemble.assemble(folder.parent)
    finally:
        (folder / "decoder.pt").unlink()


def test_a_decoder_that_grows_shows_the_same_at_first() -> None:
    from demo import autoencoder

    torch.manual_seed(0)
    small = autoencoder.Autoencoder()
    large = autoencoder.load(small.state_dict(), (3, 3, 2, 1))
    assert autoencoder.blocks_of(small.state_dict()) == (3, 2, 1, 1)
    assert autoencoder.blocks_of(large.state_dict()) == (3, 3, 2, 1)
    latents = torch.randn(2, 4, 4, 4)
    torch.testing.assert_close(small.decode(latents), large.decode(latents))
