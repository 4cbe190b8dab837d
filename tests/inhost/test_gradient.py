"""The gradient through frozen operations against ordinary autograd over copied, densely merged weights."""

from __future__ import annotations

import pytest
import tiny
import torch

LAMBDA = 0.01
DTYPES = {  # storage, compute (None: the same), relative difference allowed by the compute dtype
    "fp32": (torch.float32, None, 1e-4),
    "fp16": (torch.float16, None, 2e-2),
    "bf16": (torch.bfloat16, None, 1e-1),
    "fp16 storage": (torch.float16, torch.float32, 1e-4),
    "fp8": (torch.float8_e4m3fn, torch.float32, 1e-4),
}


def eps_of(x, x0, sigma):
    return (x - x0) / sigma


def dense_loss(pack, copied, fitted, m, references, batch, conditioning, raw=eps_of):
    """Eq. 3 by ordinary autograd: every weight of a copied model replaced by W0 + dense update.

    raw: what the network gave, by its formula.
    """
    sampling = copied.model_sampling
    sigma = sampling.sigmas[batch.timesteps]
    x = sampling.noise_scaling(sigma, batch.noise, batch.latents, False)
    dtype = x.dtype

    def predicted(row: int, updates: dict):
        weights = {k: copied.get_parameter(k).to(dtype) + u for k, u in updates.items()}
        concept = ("content", "style")[batch.concept_index[row]]
        c = {k: v.process_cond(batch_size=1, area=None) for k, v in conditioning[concept].items()}
        arguments = {k: v.cond.clone().to(dtype) for k, v in c.items()}
        x_row, sigma_row = x[row : row + 1], sigma[row : row + 1]
        options = {"optimized_attention_override": lambda f, *a, **k: plain_attention(*a, **k)}
        x0 = torch.func.functional_call(
            Apply(copied), {f"model.{k}": w for k, w in weights.items()}, (x_row, sigma_row, arguments, options)
        )
        return raw(x_row, x0, sigma_row)

    own, merged = {"content": {}, "style": {}}, {}
    for name, layer in fitted.loras.layers.items():
        for concept, f in layer.items():
            delta = (f.scale * f.up.clone() @ f.down.clone()).to(dtype)
            own[concept][name] = delta
            merged[name] = merged.get(name, 0) + delta * m[concept][name].to(dtype)
    loss = 0.0
    for row, place in enumerate(batch.concept_index.tolist()):
        with torch.no_grad():
            teacher = predicted(row, own[("content", "style")[place]])
        loss = loss + (predicted(row, merged) - teacher).flatten().norm()
    return loss + LAMBDA * sum((m["content"][k] @ m["style"][k]).abs() for k in m["content"])


class Apply(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x, sigma, arguments, options):
        return self.model.apply_model(x, sigma, **arguments, transformer_options=options)


def plain_attention(q, k, v, heads, *_, **__):
    b, _, width = q.shape
    q, k, v = (t.view(b, -1, heads, width // heads).transpose(1, 2) for t in (q, k, v))
    weights = (q @ k.transpose(-1, -2) / (width // heads) ** 0.5).softmax(-1)
    return (weights @ v).transpose(1, 2).reshape(b, -1, width)


def plain_copy(patcher, dtype):
    """The same network in ordinary float weights that ordinary autograd may save."""
    with torch.inference_mode(False):
        copied = tiny.full_size.sdxl_model(dtype, **tiny.CHANGES)
        state = {k: v.clone().to(dtype) for k, v in patcher.model.state_dict().items()}
        copied.load_state_dict(state, strict=False)
        copied.requires_grad_(False)
        copied.model_sampling.sigmas = copied.model_sampling.sigmas.clone()
        return copied


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("extras", ["alone", "another LoRA", "low VRAM", "checkpointed"])
def test_equals_autograd_over_copied_weights(pack, monkeypatch, name, extras):
    import comfy.lora
    import comfy.model_management as management

    storage, compute, tolerance = DTYPES[name]
    bridge, core = pack.nodes.bridge, pack.ziplora_core
    patcher = tiny.tiny_patcher(storage, compute)
    fitted = bridge.lora.fitting.fit(tiny.sources(pack, patcher.model), patcher.model)
    expected_weights = patcher
    if extras == "another LoRA":
        names = comfy.lora.model_lora_keys_unet(patcher.model, {})
        other = tiny.full_size.attention_lora(patcher.model, 4, 99, torch.float32)
        patcher.add_patches(comfy.lora.load_lora(other, names), 0.8)
    if extras == "low VRAM":  # the host offloads no model whose device is the CPU: tell it that this one may be
        monkeypatch.setattr(management, "is_device_cpu", lambda device: False)
        monkeypatch.setattr(management, "vram_state", management.VRAMState.NO_VRAM)
    found = {}
    paper = core.solver.Settings(similarity_lambda=LAMBDA, objective=pack.ziplora_core.objective.PAPER)
    plain = {"content": 1.0, "style": 1.0}

    def work(predict, joined, references):
        torch.manual_seed(0)
        flat = torch.rand(fitted.loras.coefficient_count) + 0.5
        batch = next(core.draws.training_batches(references, predict, core.solver.Settings()))
        assert len(batch) == 1
        flat.requires_grad_()
        with torch.enable_grad():
            losses = core.gradient.accumulate_gradient(joined, predict, flat, batch, paper, plain, predict.loss_scale)
        flat.grad /= predict.loss_scale
        if extras == "low VRAM":
            assert predict._model.model_lowvram, "the host did not offload: this case tests nothing"
        loaded = patcher if extras != "another LoRA" else predict._model.current_patcher
        copied = plain_copy(loaded, torch.float32)
        other = flat.detach().clone().requires_grad_()
        with torch.enable_grad():
            reference = dense_loss(
                pack,
                copied,
                fitted,
                joined.split(other),
                references,
                batch[0],
                {c: predict._conds[c, c] for c in ("content", "style")},
            )
            reference.backward()
        found.update(loss=(losses.total, reference.item()), gradient=(flat.grad, other.grad))

    with torch.inference_mode():
        bridge.network.predictor.with_predictor(
            expected_weights,
            fitted.loras,
            tiny.prompts(),
            {c: v["samples"] for c, v in tiny.latents().items()},
            work,
            recomputed=99 if extras == "checkpointed" else 0,
        )
    got, expected = found["gradient"]
    assert found["loss"][0] == pytest.approx(found["loss"][1], rel=tolerance)
    difference = (got - expected).norm() / expected.norm()
    assert expected.norm() > 0 and difference < tolerance, f"relative difference {difference:.2e}"
