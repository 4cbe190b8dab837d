"""What hosts of different age do differently, one difference at a time, faked on whichever host runs the tests."""

from __future__ import annotations

import json

import pytest
import tiny
import torch
from families import FAMILIES
from test_apply import largest_difference, weights
from test_dense_formats import written
from test_formats import as_sources
from test_training import PixelsAsLatents, Words, output, pictures  # noqa: F401


def one_step(pack, patcher, sources=None, prompts=None, latents=None, recomputed: int = 0):
    """(loss, gradient of all coefficients) of one step on a model."""
    bridge, core = pack.nodes.bridge, pack.ziplora_core
    fitted = bridge.lora.fitting.fit(sources or tiny.sources(pack, patcher.model), patcher.model)
    settings = core.solver.Settings(objective=pack.ziplora_core.objective.PAPER)
    found = []

    def work(predict, joined, references):
        flat = torch.rand(fitted.loras.coefficient_count, generator=torch.Generator().manual_seed(0)) + 0.5
        flat.requires_grad_()
        batch = next(core.draws.training_batches(references, predict, settings))
        with torch.enable_grad():
            losses = core.gradient.accumulate_gradient(
                joined, predict, flat, batch, settings, {"content": 1.0, "style": 1.0}, predict.loss_scale
            )
        found.append((losses.total, flat.grad / predict.loss_scale))

    with torch.inference_mode():
        given = {c: v["samples"] for c, v in (latents or tiny.latents()).items()}
        bridge.network.predictor.with_predictor(
            patcher, fitted.loras, prompts or tiny.prompts(), given, work, recomputed=recomputed
        )
    return found[0]


def family_step(pack, family, patcher, recomputed: int = 0):
    sources = as_sources(pack, family.lora(patcher.model, 4, 1), family.lora(patcher.model, 2, 2))
    return one_step(pack, patcher, sources, family.prompts(), family.latents(), recomputed)


def assert_equal_steps(ours, theirs, tolerance: float = 1e-5):
    assert theirs[1].norm() > 0
    assert ours[0] == pytest.approx(theirs[0], rel=tolerance)
    assert (ours[1] - theirs[1]).norm() < tolerance * theirs[1].norm()


class ReusedBuffers:
    """Newer hosts cast every offloaded weight into one buffer, which the next cast overwrites."""

    def __init__(self, monkeypatch):
        import comfy.ops

        self.cast, self.uncast = comfy.ops.cast_bias_weight, comfy.ops.uncast_bias_weight
        self.buffers, self.count = {}, 0
        monkeypatch.setattr(comfy.ops, "cast_bias_weight", self.cast_bias_weight)
        monkeypatch.setattr(comfy.ops, "uncast_bias_weight", self.uncast_bias_weight)

    def _into_buffer(self, name, tensor):
        if tensor is None:
            return None
        key = name, tensor.dtype
        if key not in self.buffers or self.buffers[key].numel() < tensor.numel():
            self.buffers[key] = torch.empty(tensor.numel(), dtype=tensor.dtype)
        with torch.no_grad():
            return self.buffers[key][: tensor.numel()].view(tensor.shape).copy_(tensor.detach())

    def cast_bias_weight(self, *args, **kwargs):
        self.count += 1
        weight, bias, *rest = self.cast(*args, **kwargs)
        return self._into_buffer("weight", weight), self._into_buffer("bias", bias), *rest

    def uncast_bias_weight(self, *args):
        for buffer in self.buffers.values():
            buffer.fill_(float("nan"))
        return self.uncast(*args)


@pytest.mark.parametrize("recomputed", [0, 99])
def test_a_cast_buffer_that_is_overwritten_changes_no_gradient(pack, monkeypatch, recomputed):
    patcher = tiny.tiny_patcher(torch.float16, torch.float32)  # whose weights are cast for every use
    expected = one_step(pack, patcher, recomputed=recomputed)
    buffers = ReusedBuffers(monkeypatch)
    assert_equal_steps(one_step(pack, patcher, recomputed=recomputed), expected)
    assert buffers.count > 100


@pytest.mark.parametrize("name", ["SD 3", "Flux", "Lumina 2", "Qwen-Image"])
def test_nor_on_any_family(pack, monkeypatch, name):
    family = FAMILIES[name]
    patcher = family.patcher()
    for module in patcher.model.modules():  # as the host does where it offloads
        if hasattr(module, "comfy_cast_weights"):
            module.comfy_cast_weights = True
    expected = family_step(pack, family, patcher)
    ReusedBuffers(monkeypatch)
    assert_equal_steps(family_step(pack, family, patcher), expected)


def test_nor_a_zipped_pair_a_trained_lora_or_an_unzipped_one(pack, monkeypatch, output):  # noqa: F811
    bridge, core = pack.nodes.bridge, pack.ziplora_core
    patcher = tiny.tiny_patcher(torch.float16, torch.float32)

    def made():
        with torch.inference_mode():
            zipped = bridge.optimize.zipping.optimize(
                patcher,
                tiny.sources(pack, patcher.model),
                tiny.prompts(),
                tiny.latents(),
                core.solver.Settings(steps=2, solver="layerwise, then gradient"),
            )[0]
            training = core.training.Settings(steps=2, learning_rate=1e-3, rank=2)
            shown = bridge.training.pictures.TrainingImages([pictures()], ["a sks figure"])
            task = bridge.training.concept.Task([shown], training, "loras/one", 64)
            trained = bridge.training.concept.train_concept(patcher, Words(), PixelsAsLatents(), task)
            words = {"full": "a sks dog in szn style", "content": "a sks dog", "style": "szn style"}
            unzip = core.unzip.Settings(steps=2, learning_rate=1e-3, rank=2)
            task = bridge.unzip.Task(pictures(1), words, unzip, "loras/two", 64)
            apart = bridge.unzip.unzip_picture(patcher, Words(), PixelsAsLatents(), task).zipped
        ours, taken = zipped.coefficients["content"].values(), apart.coefficients["style"].values()
        return [*ours, *trained.lora_model.values(), *taken]

    expected = made()
    ReusedBuffers(monkeypatch)
    for ours, theirs in zip(made(), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("newer", [False, True])
def test_the_hosts_call_before_each_pass_takes_options_or_not(pack, monkeypatch, newer):
    from comfy.model_patcher import ModelPatcher

    seen = []
    if newer:
        monkeypatch.setattr(
            ModelPatcher, "prepare_state", lambda self, timestep, model_options: seen.append(model_options)
        )
    else:
        monkeypatch.setattr(ModelPatcher, "prepare_state", lambda self, timestep: seen.append(timestep))
    one_step(pack, tiny.tiny_patcher())
    assert len(seen) == 2, "teacher and student"
    assert all("transformer_options" in options for options in seen) if newer else seen[0].shape == (2,)


@pytest.mark.parametrize("ends", ["well", "badly"])
def test_training_is_said_where_the_host_asks_and_taken_back(pack, monkeypatch, ends):
    import comfy.model_management as management

    monkeypatch.setattr(management, "in_training", False, raising=False)
    patcher, seen = tiny.tiny_patcher(), []

    def look(*_):
        seen.append(management.in_training)
        if ends == "badly":
            raise RuntimeError("struck")

    hook = patcher.model.diffusion_model.register_forward_pre_hook(look)
    if ends == "badly":
        with pytest.raises(RuntimeError, match="struck"):
            one_step(pack, patcher)
    else:
        one_step(pack, patcher)
    hook.remove()
    assert seen and all(seen) and management.in_training is False
    tiny.sample(patcher)
    assert management.in_training is False


def test_a_host_without_that_flag_gets_none(pack, monkeypatch):
    import comfy.model_management as management

    monkeypatch.delattr(management, "in_training", raising=False)
    with pack.nodes.bridge.network.differentiable.with_gradient():
        pass
    assert not hasattr(management, "in_training")


def test_a_fused_kernel_without_a_gradient_is_left_out(pack, monkeypatch):
    """Flux's rotary embedding: newer hosts fuse it, but not while something is trained."""
    import comfy.ldm.flux.math as math
    import comfy.model_management as management

    monkeypatch.setattr(management, "in_training", False, raising=False)
    family, plain = FAMILIES["Flux"], math._apply_rope if hasattr(math, "_apply_rope") else math.apply_rope
    patcher = family.patcher()
    monkeypatch.setattr(math, "apply_rope", plain)
    expected = family_step(pack, family, patcher)

    def fused(q, k, freqs):
        if management.in_training:
            return plain(q, k, freqs)
        return tuple(t.detach() for t in plain(q, k, freqs))

    monkeypatch.setattr(math, "apply_rope", fused)
    assert_equal_steps(family_step(pack, family, patcher), expected)


def test_a_layer_may_give_a_view(pack, monkeypatch):
    """torch up to 2.11 gives the output of a linear layer so, and the host adds to it in place."""
    import comfy.ops

    family, real = FAMILIES["Flux"], comfy.ops.disable_weight_init.Linear.forward
    patcher = family.patcher()
    expected = family_step(pack, family, patcher)
    monkeypatch.setattr(comfy.ops.disable_weight_init.Linear, "forward", lambda self, x: real(self, x)[None][0])
    assert_equal_steps(family_step(pack, family, patcher), expected)


def zipped_on(pack, patcher):
    sources = tiny.sources(pack, patcher.model)
    fitted = pack.nodes.bridge.lora.fitting.fit(sources, patcher.model)
    ones = pack.ziplora_core.coefficients.Coefficients.ones(fitted.loras)
    return pack.nodes.bridge.lora.zipped.ZippedLoRA(sources, fitted, ones)


def test_the_host_may_copy_what_it_applies(pack):
    """Where it pages weights, it moves an adapter's tensors, and makes another adapter of the same class of them."""
    import comfy.lora

    patcher = tiny.tiny_patcher()
    applied, _ = pack.nodes.bridge.apply.apply(patcher, None, zipped_on(pack, patcher), 0.8)
    moved = applied.clone()
    for patches in moved.patches.values():
        for i, (strength, adapter, *rest) in enumerate(patches):
            patches[i] = (strength, copied(comfy.lora, adapter), *rest)
    assert largest_difference(weights(applied), weights(patcher)) > 0.01
    assert largest_difference(weights(moved), weights(applied)) < 2e-6


def copied(lora, adapter):
    prefetch = getattr(lora, "prefetch_prepared_value", None)
    if prefetch is None:
        made = tuple(None if t is None else t.clone() for t in adapter.weights)
        return type(adapter)(adapter.loaded_keys, made)
    needed = [0]
    prefetch(adapter, needed, None, None, False)
    return prefetch(adapter, [0], torch.empty(needed[0], dtype=torch.uint8), None, True)


def test_a_model_that_may_be_dynamic_is_rehearsed(pack, monkeypatch):
    """Newer hosts ask the patcher before each pass whether it pages weights."""
    from comfy.model_base import BaseModel
    from comfy.model_patcher import ModelPatcher

    monkeypatch.setattr(ModelPatcher, "is_dynamic", lambda self: False, raising=False)
    real, asked = BaseModel._apply_model, []

    def apply(self, *args, **kwargs):
        asked.append(self.current_patcher.is_dynamic())
        return real(self, *args, **kwargs)

    monkeypatch.setattr(BaseModel, "_apply_model", apply)
    patcher = tiny.tiny_patcher()
    assert rehearsed(pack, patcher).outside > 0 and asked == [False]


def rehearsed(pack, patcher, sources=None):
    bridge = pack.nodes.bridge
    pair = bridge.lora.fitting.fit(sources or tiny.sources(pack, patcher.model), patcher.model).loras
    return bridge.memory.rehearsal.rehearse(
        patcher, pair, tiny.prompts(), {c: v["samples"] for c, v in tiny.latents().items()}
    )


def test_linear_layers_may_have_no_weight_before_a_file_is_loaded(pack, monkeypatch):
    """As newer hosts make them where they page weights."""
    import comfy.ops

    patcher = tiny.tiny_patcher()
    expected = rehearsed(pack, patcher)

    def without_weight(self, in_features, out_features, bias=True, device=None, dtype=None):
        torch.nn.Module.__init__(self)
        self.in_features, self.out_features, self.weight, self.bias = in_features, out_features, None, None

    monkeypatch.setattr(comfy.ops.disable_weight_init.Linear, "__init__", without_weight)
    assert rehearsed(pack, patcher) == expected


def test_newer_hosts_know_more_kinds_of_out_of_memory(pack, monkeypatch):
    import comfy.model_management as management

    class Spent(RuntimeError):
        pass

    plan = pack.nodes.bridge.memory.retry
    assert not plan.is_out_of_memory(Spent("code 2"))
    monkeypatch.setattr(management, "is_oom", lambda error: isinstance(error, Spent), raising=False)
    assert plan.is_out_of_memory(Spent("code 2")) and not plan.is_out_of_memory(ValueError("code 2"))
    assert plan.is_out_of_memory(RuntimeError("CUDA out of memory"))


@pytest.mark.parametrize("base", [Exception, BaseException])
def test_an_interrupt_may_be_no_ordinary_exception(pack, monkeypatch, base):
    import comfy.model_management as management

    class Interrupt(base):
        pass

    monkeypatch.setattr(management, "InterruptProcessingException", Interrupt)
    patcher = tiny.tiny_patcher()
    hook = patcher.model.diffusion_model.register_forward_hook(lambda *_: management.interrupt_current_processing())
    with torch.inference_mode(), pytest.raises(Interrupt):
        pack.nodes.bridge.optimize.zipping.optimize(
            patcher,
            tiny.sources(pack, patcher.model),
            tiny.prompts(),
            tiny.latents(),
            pack.ziplora_core.solver.Settings(),
        )
    hook.remove()
    assert patcher.injections == {} and not any("forward" in vars(m) for m in patcher.model.modules())


def test_the_host_is_asked_for_the_memory_that_is_planned(pack, monkeypatch):
    """However it loads: with or without `force_full_load`, which is its own affair."""
    import comfy.model_management as management

    asked, real = [], management.load_models_gpu

    def load(models, memory_required=0, **kwargs):
        asked.append(memory_required)
        return real(models, memory_required=memory_required, **kwargs)

    monkeypatch.setattr(management, "load_models_gpu", load)
    patcher, bridge = tiny.tiny_patcher(), pack.nodes.bridge
    pair = bridge.lora.fitting.fit(tiny.sources(pack, patcher.model), patcher.model).loras
    need = 50 * 2**20
    with torch.inference_mode():
        given = {c: v["samples"] for c, v in tiny.latents().items()}
        bridge.network.predictor.with_predictor(patcher, pair, tiny.prompts(), given, lambda *_: None, need=need)
    assert max(asked) >= need


FP8 = torch.float8_e4m3fn


def coded_forms() -> list[str]:
    """Of the host that runs the tests: formats of its own kind of tensor, and the older ones' "scaled fp8"."""
    import comfy.ops
    import comfy.quant_ops

    found = [f for f in ("float8_e4m3fn", "int8_tensorwise", "nvfp4") if f in comfy.quant_ops.QUANT_ALGOS]
    return [*found, *["scaled fp8"] * hasattr(comfy.ops, "scaled_fp8_ops")]


def coded_model(form: str):
    """(ModelPatcher over SDXL whose linear layers are coded, one with the same numbers as ordinary floats)."""
    import comfy.supported_models

    plain = tiny.tiny_patcher()
    own = plain.model.diffusion_model
    file = {k: w.clone() for k, w in own.state_dict().items()}
    layers = [name for name, module in own.named_modules() if isinstance(module, torch.nn.Linear)]
    config = comfy.supported_models.SDXL({**tiny.full_size.SDXL_UNET, **tiny.CHANGES})
    config.set_inference_dtype(torch.float32, torch.float32)
    for layer in layers:
        coded, numbers = code(form, layer, file[f"{layer}.weight"])
        file |= coded
        own.get_parameter(f"{layer}.weight").data.copy_(numbers)
    if form == "scaled fp8":
        config.scaled_fp8 = FP8
    elif hasattr(type(config), "layer_quant_config"):
        config.layer_quant_config = {layer: {"format": form} for layer in layers}
    else:
        config.quant_config = {"mixed_ops": True}
    model = config.get_model({}, device="cpu")
    model.load_model_weights({f"unet.{k}": w for k, w in file.items()}, "unet.")
    return type(plain)(model, plain.load_device, plain.offload_device), plain


def code(form: str, layer: str, weight: torch.Tensor):
    """(what a file holds of a layer, the numbers that it stands for)."""
    from comfy.quant_ops import QUANT_ALGOS, QuantizedTensor

    if form in ("scaled fp8", "float8_e4m3fn"):
        scale = weight.abs().amax() / torch.finfo(FP8).max
        stored = (weight / scale).to(FP8)
        name = "scale_weight" if form == "scaled fp8" else "weight_scale"
        file, numbers = {f"{layer}.weight": stored, f"{layer}.{name}": scale}, stored.float() * scale
    else:
        made = QuantizedTensor.from_float(weight, QUANT_ALGOS[form]["comfy_tensor_layout"])
        file, numbers = made.state_dict(f"{layer}.weight"), made.dequantize()
    if form != "scaled fp8":
        file[f"{layer}.comfy_quant"] = torch.tensor(list(json.dumps({"format": form}).encode()), dtype=torch.uint8)
    return file, numbers


@pytest.fixture(params=coded_forms())
def coded(request):
    """(form, coded model, the same in floats)."""
    with torch.inference_mode():
        return request.param, *coded_model(request.param)


TOLERANCE = {"int8_tensorwise": 0.1}  # rounds the inputs of layers too; measured .06


@pytest.mark.parametrize("recomputed", [0, 99])
def test_the_gradient_is_of_the_numbers_that_coded_weights_stand_for(pack, coded, recomputed):
    form, patcher, plain = coded
    sources = tiny.sources(pack, plain.model)  # a coded model's file may have other shapes
    ours, theirs = (one_step(pack, model, sources, recomputed=recomputed) for model in (patcher, plain))
    assert_equal_steps(ours, theirs, TOLERANCE.get(form, 1e-4))


def test_what_is_cast_is_these_numbers_in_an_ordinary_tensor(pack, coded):
    _, patcher, plain = coded
    with torch.inference_mode(False), torch.no_grad():
        for name, module in plain.model.diffusion_model.named_modules():
            if isinstance(module, torch.nn.Linear):
                own = patcher.model.diffusion_model.get_submodule(name)
                with pack.nodes.bridge.network.weights.cast(own, torch.empty(0)) as (weight, _):
                    assert type(weight) in (torch.Tensor, torch.nn.Parameter)
                    torch.testing.assert_close(weight, module.weight, rtol=1e-5, atol=1e-6, check_dtype=False)


def test_updates_are_of_these_numbers_too(pack, coded):
    """DoRA's depends on the weight."""
    _, patcher, plain = coded
    file = written(plain.model, "linear", "DoRA")
    other = tiny.full_size.attention_lora(plain.model, 2, 1, torch.float32)
    ours, theirs = (
        pack.nodes.bridge.lora.fitting.fit(as_sources(pack, file, other), m.model) for m in (patcher, plain)
    )
    for key, layer in theirs.loras.layers.items():
        if "content" in layer:
            got = ours.loras.layers[key]["content"]
            torch.testing.assert_close(got.down.float(), layer["content"].down, rtol=1e-3, atol=1e-4)


def test_coded_models_are_rehearsed(pack, coded):
    _, patcher, plain = coded
    sources = tiny.sources(pack, plain.model)
    ours, theirs = rehearsed(pack, patcher, sources), rehearsed(pack, plain, sources)
    assert ours.inputs == theirs.inputs and ours.inside == theirs.inside


def test_a_layer_may_smooth_its_input(pack):
    """Newer hosts multiply it with numbers that the file keeps beside a quantised weight."""
    g = torch.Generator().manual_seed(3)
    smoothing, patchers = {}, [tiny.tiny_patcher(), tiny.tiny_patcher()]
    for name, module in patchers[0].model.named_modules():
        if name.endswith(".to_q"):
            smoothing[name] = torch.rand(module.in_features, generator=g) + 0.5
            module.pre_quant_scale = smoothing[name]
            module.comfy_cast_weights = True
            module.forward = lambda x, m=module: type(m).forward(m, x * m.pre_quant_scale)
    for name, scale in smoothing.items():
        patchers[1].model.get_submodule(name).weight.data.mul_(scale)
    ours, theirs = (one_step(pack, patcher) for patcher in patchers)
    assert_equal_steps(ours, theirs, 1e-4)


def test_a_dynamic_patcher_is_injected_loaded_and_left_as_any(pack, monkeypatch):
    """The host's own, on a device that it pages nothing to."""
    import comfy.model_patcher

    dynamic = getattr(comfy.model_patcher, "ModelPatcherDynamic", None)
    if dynamic is None:
        pytest.skip("this host pages no weights")

    class Unpaged(dynamic):
        def __new__(cls, *_, **__):  # the host's own would give the ordinary patcher here
            return object.__new__(cls)

        def partially_unload(self, device_to, memory_to_free=0, force_patch_weights=False):
            return self.restore_loaded_backups()

    class HostBuffer:
        def __init__(self, *_):
            self.size = 0

    monkeypatch.setattr(comfy.model_patcher.comfy_aimdo.host_buffer, "HostBuffer", HostBuffer)
    plain = tiny.tiny_patcher()
    expected = one_step(pack, plain)
    with torch.inference_mode():
        patcher = Unpaged(tiny.tiny_patcher().model, plain.load_device, plain.offload_device)
    before = tiny.sample(patcher)
    assert patcher.is_dynamic()
    assert_equal_steps(one_step(pack, patcher), expected)
    assert rehearsed(pack, patcher) == rehearsed(pack, plain)
    assert patcher.injections == {} and not any("forward" in vars(m) for m in patcher.model.modules())
    assert torch.equal(tiny.sample(patcher), before)


def test_a_configuration_may_answer_none_to_every_name(pack, monkeypatch):
    """Newer hosts' do, for what they have not."""
    from comfy.supported_models_base import BASE

    monkeypatch.setattr(BASE, "__getattr__", lambda self, name: None, raising=False)
    assert pack.nodes.bridge.drawing.sampling.best_side(tiny.tiny_patcher()) == 1024


def test_coded_models_are_told_by_their_content(pack, coded):
    """So their zips are remembered: of another load too, and not of other numbers."""
    content = pack.nodes.bridge.disk.content
    form, patcher, plain = coded
    with torch.inference_mode():
        again = coded_model(form)[0]
    first = content.digest(content.of_model(patcher))
    assert content.digest(content.of_model(again)) == first != content.digest(content.of_model(plain))
