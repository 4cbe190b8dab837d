"""The host's own nodes on the model that is zipped: what acts inside a pass acts, and has its gradient; what acts on
guidance has no part in it; what would do harm is left out, or refused, in words.

The witness is ordinary autograd over copied weights with the same patches: the network's output by a hook.
"""

from __future__ import annotations

import importlib
import logging
import uuid
from dataclasses import dataclass, field
from typing import Any

import pytest
import tiny
import torch
from test_gradient import Apply, plain_attention
from torch import Tensor

CHANGES = {  # with attention at full size, where ToMe acts; SDXL's heads are 64 wide
    "model_channels": 64,
    "channel_mult": [1, 1, 2],
    "num_res_blocks": [1, 1, 1],
    "transformer_depth": [1, 1, 1],
    "transformer_depth_middle": 1,
    "transformer_depth_output": [1] * 6,
    "context_dim": 96,
}


@dataclass(frozen=True)
class Node:
    """One of the host's. acts: inside a pass, so that a loss is another one. says: of what is left out, in the log."""

    file: str
    name: str
    inputs: dict[str, Any] = field(default_factory=dict)
    acts: bool = False
    says: str = ""

    def __str__(self) -> str:
        return "-".join([self.name, *(str(value) for value in self.inputs.values() if isinstance(value, str))])

    def on(self, patcher):
        """The patched model, by the node itself with its default inputs but for ours. Skips where there is none."""
        try:
            module = importlib.import_module(self.file)
        except ImportError as error:
            pytest.skip(f"this host has no {self.file}: {error}")
        node = getattr(module, self.name, None)
        if node is None:
            pytest.skip(f"this host has no {self.name}")
        given = {"model": patcher}
        for name, (kind, *options) in node.INPUT_TYPES()["required"].items():
            options = options[0] if options else {}
            if name not in given:
                first = kind[0] if isinstance(kind, list) else (options.get("options") or [None])[0]
                given[name] = options.get("default", first)
        given |= self.inputs
        with torch.inference_mode():
            made = getattr(node(), node.FUNCTION)(**given)
        return getattr(made, "args", made)[0]


extras = "comfy_extras.nodes_"
ACTING = [
    Node(extras + "freelunch", "FreeU", acts=True),
    Node(extras + "freelunch", "FreeU_V2", acts=True),
    Node(extras + "hypertile", "HyperTile", {"tile_size": 32, "swap_size": 1, "max_depth": 1}, acts=True),
    Node(extras + "tomesd", "TomePatchModel", {"ratio": 0.5}, acts=True),
    Node(extras + "model_downscale", "PatchModelAddDownscale", {"block_number": 1, "end_percent": 1.0}, acts=True),
    Node(extras + "attention_multiply", "UNetSelfAttentionMultiply", {"q": 1.3, "out": 0.8}, acts=True),
    Node(extras + "attention_multiply", "UNetCrossAttentionMultiply", {"v": 1.3}, acts=True),
    Node(extras + "model_advanced", "ModelSamplingDiscrete", {"sampling": "eps", "zsnr": True}, acts=True),
    Node(extras + "model_advanced", "ModelSamplingDiscrete", {"sampling": "v_prediction", "zsnr": True}, acts=True),
    Node(extras + "model_advanced", "ModelSamplingDiscrete", {"sampling": "x0", "zsnr": False}),
    Node(extras + "model_advanced", "ModelSamplingContinuousEDM", acts=True),
]
GUIDANCE = [
    Node(extras + "pag", "PerturbedAttentionGuidance"),
    Node(extras + "sag", "SelfAttentionGuidance"),
    Node(extras + "model_advanced", "RescaleCFG"),
    Node(extras + "slg", "SkipLayerGuidanceDiT"),
    Node(extras + "sd3", "SkipLayerGuidanceSD3"),
    Node(extras + "apg", "APG"),
    Node(extras + "cfg", "CFGZeroStar"),
    Node(extras + "cfg", "CFGNorm"),
    Node(extras + "mahiro", "Mahiro"),
    Node(extras + "tcfg", "TCFG"),
    Node(extras + "fresca", "FreSca"),
    Node(extras + "eps", "EpsilonScaling"),
    Node(extras + "eps", "TemporalScoreRescaling"),
    Node(extras + "lumina2", "RenormCFG"),
    Node(extras + "nag", "NAGuidance"),
    Node(extras + "video_model", "VideoLinearCFGGuidance"),
    Node(extras + "video_model", "VideoTriangleCFGGuidance"),
    Node(extras + "differential_diffusion", "DifferentialDiffusion"),
    Node(extras + "context_windows", "ContextWindowsManualNode"),
    Node(extras + "model_advanced", "ModelComputeDtype", {"dtype": "fp32"}),
]
LEFT_OUT = [
    Node(extras + "easycache", "EasyCacheNode", {"reuse_threshold": 3.0}, says="EasyCache"),
    Node(extras + "easycache", "LazyCacheNode", {"reuse_threshold": 3.0}, says="LazyCache"),
    Node(extras + "torch_compile", "TorchCompileModel", says=r"torch\.compile"),
]


def table_patcher(dtype: torch.dtype = torch.float32):
    torch.manual_seed(0)
    with torch.inference_mode():
        return tiny.full_size.sdxl_patcher(dtype, **CHANGES)


@pytest.fixture
def without_chance(monkeypatch):
    """Of what nodes draw by chance, the first: the witness draws for one row where we draw for two."""
    real = torch.randint

    def first(*args, **kwargs):
        own = kwargs.get("generator") is not None  # of the solver, not of a node
        return real(*args, **kwargs) if own else torch.zeros(kwargs["size"], dtype=torch.int64)

    monkeypatch.setattr(torch, "randint", first)


class Witness:
    """Ordinary autograd over copies of a loaded model's weights, with a patched model's own options."""

    def __init__(self, predict, patched, left_out: bool):
        loaded = predict._model
        self.copied = tiny.full_size.sdxl_model(torch.float32, **CHANGES)
        self.copied.load_state_dict({k: v.clone() for k, v in loaded.state_dict().items()}, strict=False)
        self.copied.requires_grad_(False)
        self.copied.model_sampling = loaded.model_sampling
        self.outputs: list[Tensor] = []
        self.copied.diffusion_model.register_forward_hook(lambda module, args, made: self.outputs.append(made))
        self.options = {} if left_out else dict(patched.model_options["transformer_options"])
        self.conditioning = {c: predict._conds[c, c] for c in ("content", "style")}

    def raw(self, concept: str, x: Tensor, sigma: Tensor, updates: dict[str, Tensor]) -> Tensor:
        arguments = {
            k: v.process_cond(batch_size=1, area=None).cond.clone() for k, v in self.conditioning[concept].items()
        }
        options = {
            **self.options,
            "optimized_attention_override": lambda f, *a, **k: plain_attention(*a, **k),
            "cond_or_uncond": [0],
            "uuids": [uuid.uuid4()],
            "sigmas": sigma,
        }
        weights = {f"model.{k}": self.copied.get_parameter(k) + u for k, u in updates.items()}
        torch.func.functional_call(Apply(self.copied), weights, (x, sigma, arguments, options))
        return self.outputs.pop()

    def loss(self, fitted, m: dict[str, dict[str, Tensor]], x: Tensor, sigma: Tensor, places: Tensor) -> Tensor:
        """Both retention terms of Eq. 3, row by row."""
        own: dict[str, dict[str, Tensor]] = {"content": {}, "style": {}}
        merged: dict[str, Tensor] = {}
        for name, layer in fitted.loras.layers.items():
            for concept, f in layer.items():
                own[concept][name] = f.scale * f.up.clone() @ f.down.clone()
                merged[name] = merged.get(name, 0) + own[concept][name] * m[concept][name]
        total = torch.zeros(())
        for row, place in enumerate(places.tolist()):
            concept, at = ("content", "style")[place], slice(row, row + 1)
            with torch.no_grad():
                teacher = self.raw(concept, x[at], sigma[at], own[concept])
            student = self.raw(concept, x[at], sigma[at], merged)
            total = total + (student - teacher).flatten().norm()
        return total


def both_ways(pack, patched, recomputed: int = 0, left_out: bool = False):
    """(our losses and gradient, the witness's) of one step on a patched model."""
    bridge, core = pack.nodes.bridge, pack.ziplora_core
    fitted = bridge.lora.fitting.fit(tiny.sources(pack, patched.model), patched.model)
    settings = core.solver.Settings(objective=pack.ziplora_core.objective.PAPER, similarity_lambda=0.0)
    found = []

    def work(predict, joined, references):
        flat = torch.rand(fitted.loras.coefficient_count, generator=torch.Generator().manual_seed(0)) + 0.5
        flat.requires_grad_()
        other = flat.detach().clone().requires_grad_()
        (batch,) = next(core.draws.training_batches(references, predict, settings))
        with torch.enable_grad():
            ours = core.gradient.accumulate_gradient(
                joined, predict, flat, [batch], settings, {"content": 1.0, "style": 1.0}, predict.loss_scale
            )
            witness = Witness(predict, patched, left_out)
            x, sigma = predict.noised(batch.latents, batch.noise, batch.timesteps)
            with torch.autograd.graph.allow_mutation_on_saved_tensors():  # FreeU_V2
                theirs = witness.loss(fitted, joined.split(other), x, sigma, batch.concept_index)
                theirs.backward()
        found.append(((ours.total, flat.grad), (theirs.item(), other.grad)))

    with torch.inference_mode():
        latents = {c: v["samples"] for c, v in tiny.latents().items()}
        bridge.network.predictor.with_predictor(
            patched, fitted.loras, tiny.prompts(), latents, work, recomputed=recomputed
        )
    return found[0]


def assert_same(ours, theirs):
    assert ours[0] == pytest.approx(theirs[0], rel=1e-4) and ours[1].isfinite().all()
    assert theirs[1].norm() > 0
    difference = (ours[1] - theirs[1]).norm() / theirs[1].norm()
    assert difference < 1e-3, f"relative difference {difference:.2e}"


@pytest.fixture(scope="module")
def bare(pack):
    """The loss of a step on the model without any node."""
    return both_ways(pack, table_patcher())[0][0]


@pytest.mark.parametrize("recomputed", [0, 99])
@pytest.mark.parametrize("node", ACTING, ids=str)
def test_what_acts_inside_a_pass_is_zipped_with(pack, node, recomputed, bare, without_chance):
    patched = node.on(table_patcher())
    ours, theirs = both_ways(pack, patched, recomputed)
    assert_same(ours, theirs)
    if node.acts:
        assert ours[0] != pytest.approx(bare, rel=1e-3), "the node did nothing: this case tests nothing"


@pytest.mark.parametrize("node", GUIDANCE, ids=str)
def test_what_acts_on_guidance_changes_nothing(pack, node, bare):
    patched = node.on(table_patcher())
    ours, theirs = both_ways(pack, patched)
    assert_same(ours, theirs)
    assert ours[0] == pytest.approx(bare, rel=1e-5)


@pytest.mark.parametrize("node", LEFT_OUT, ids=str)
def test_what_would_do_harm_is_left_out_and_said(pack, node, bare, caplog):
    patched = node.on(table_patcher())
    wrappers = {kind: {k: list(w) for k, w in keyed.items()} for kind, keyed in patched.wrappers.items()}
    with caplog.at_level(logging.WARNING):
        ours, theirs = both_ways(pack, patched, left_out=True)
    assert_same(ours, theirs)
    assert ours[0] == pytest.approx(bare, rel=1e-5)
    (said,) = [record.getMessage() for record in caplog.records if "left out" in record.getMessage()]
    assert node.says.replace("\\", "") in said and "keeps it for sampling" in said
    assert patched.wrappers == wrappers, "the user's model keeps it"


def test_compiled_parts_put_on_as_objects_are_left_out_too(pack, bare, caplog):
    """As other packs do."""
    patched = table_patcher().clone()
    part = torch.compile(patched.get_model_object("diffusion_model.middle_block"))
    patched.add_object_patch("diffusion_model.middle_block", part)
    with caplog.at_level(logging.WARNING):
        ours, _ = both_ways(pack, patched, left_out=True)
    assert ours[0] == pytest.approx(bare, rel=1e-5) and "torch.compile" in caplog.text
    assert patched.object_patches == {"diffusion_model.middle_block": part}


class Cache:
    """Of any other pack: it answers a pass, or a part of one, from the last."""

    def __init__(self, patcher, part: str | None):
        self.calls, self.kept = 0, None
        self.part = part and patcher.get_model_object(part)
        if part is None:
            patcher.set_model_unet_function_wrapper(lambda apply, call: self(apply, call["input"], call))
        else:
            original = self.part.forward
            patcher.add_object_patch(f"{part}.forward", lambda x, *args, **kw: self(original, x, *args, **kw))

    def __call__(self, forward, x, *args, **kwargs):
        self.calls += 1
        if self.calls % 2:
            call = args[0] if self.part is None else None
            self.kept = forward(x, call["timestep"], **call["c"]) if call else forward(x, *args, **kwargs)
        return self.kept


@pytest.mark.parametrize("part", [None, "diffusion_model.middle_block.1"])
def test_a_cache_of_another_pack_is_told_by_what_did_not_run(pack, part):
    patched = table_patcher().clone()
    Cache(patched, part)
    with pytest.raises(ValueError, match=r"answered a pass without running .*take it off the model"):
        both_ways(pack, patched)


def test_hooks_are_refused_in_words(pack):
    import comfy.hooks

    prompt = tiny.prompts()["style"]
    group = comfy.hooks.HookGroup()
    group.add(comfy.hooks.WeightHook())
    hooked = comfy.hooks.set_hooks_for_conditioning(prompt, group)
    with pytest.raises(ValueError, match=r"style_positive carries hooks.*connect a text encode node"):
        pack.nodes.bridge.network.checks.check_conditioning("style_positive", hooked)
