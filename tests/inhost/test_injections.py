"""Beside other packs that replace the forward of a model's layers: each is left its own, and the model its forwards."""

from __future__ import annotations

import pytest
import tiny
import torch
from test_hosts import assert_equal_steps, one_step
from test_safety import disturb, optimise
from test_training import PixelsAsLatents, Words, output, pictures  # noqa: F401

RANK = 2


def factors(module, seed: int):
    """(up, down) of a small update, inference tensors as a LoRA file's are."""
    g = torch.Generator().manual_seed(seed)
    out, columns = module.weight.shape
    with torch.inference_mode():
        return (
            torch.randn(out, RANK, generator=g) * 0.3,
            torch.randn(RANK, columns, generator=g) / columns**0.5,
        )


class Bypass:
    """A LoRA beside the weights, as newer hosts' Load LoRA (Bypass): each layer's forward is replaced, and put back as
    an attribute even where it was none. It knows nothing of others."""

    def __init__(self, model, seed: int):
        self.layers = {
            name: (module, *factors(module, seed))
            for name, module in model.named_modules()
            if ".attn" in name and name.endswith(("to_q", "to_out.0"))
        }
        assert len(self.layers) > 4
        self.originals = {}

    def inject(self, *_):
        for name, (module, up, down) in self.layers.items():
            original = self.originals[name] = module.forward
            module.forward = lambda x, f=original, up=up, down=down: f(x) + x @ down.T @ up.T

    def eject(self, *_):
        for name, original in self.originals.items():
            self.layers[name][0].forward = original
        self.originals = {}

    def merged(self, patcher):
        for name, (_, up, down) in self.layers.items():
            with torch.inference_mode():
                patcher.model.get_submodule(name).weight.add_(up @ down)


def injected_before(patcher, seed: int):
    """By the host, as it loads the model."""
    from comfy.patcher_extension import PatcherInjection

    other = Bypass(patcher.model, seed)
    patcher.set_injections(f"other {seed}", [PatcherInjection(inject=other.inject, eject=other.eject)])


def injected_after(patcher, seed: int, until: str | None = "on_cleanup"):
    """In the first pass, over what is there, until the host's callback of that name; None: until the test says so."""
    from comfy.patcher_extension import WrappersMP

    other = Bypass(patcher.model, seed)

    def wrapper(executor, *args, **kwargs):
        if not other.originals:
            other.inject()
        return executor(*args, **kwargs)

    patcher.add_wrapper_with_key(WrappersMP.APPLY_MODEL, f"other {seed}", wrapper)
    if until is not None:
        patcher.add_callback_with_key(until, f"other {seed}", other.eject)
    return other


PLACES = {
    "before": [injected_before],
    "after": [injected_after],
    "on both sides": [injected_before, injected_after],
}


def drawn_by(patcher):
    return tiny.sample(patcher, steps=1)


def forwards(patcher):
    import comfy.model_management as management

    management.unload_all_models()
    return {name: module.forward for name, module in patcher.model.named_modules()}


def assert_as_before(patcher, before, drawn):
    """Each forward is the one from before, and a picture the same to the bit, loaded as it is and loaded anew."""
    assert torch.equal(drawn_by(patcher), drawn)
    assert forwards(patcher) == before
    assert torch.equal(drawn_by(patcher), drawn)


def shared(place: str):
    """(model with others' injections, its forwards, what it draws)."""
    patcher = tiny.tiny_patcher()
    for seed, put in enumerate(PLACES[place]):
        put(patcher, seed)
    drawn = drawn_by(patcher)
    return patcher, forwards(patcher), drawn


def step(pack, patcher):
    one_step(pack, patcher)


def zip_pair(pack, patcher):
    optimise(pack, patcher, steps=1)


def train(pack, patcher):
    core = pack.ziplora_core.training
    shown = pack.nodes.bridge.training.pictures.TrainingImages([pictures()], ["a sks figure"])
    settings = core.Settings(steps=1, learning_rate=1e-3, rank=2)
    task = pack.nodes.bridge.training.concept.Task([shown], settings, "loras/one", 64)
    with torch.inference_mode():
        pack.nodes.bridge.training.concept.train_concept(patcher, Words(), PixelsAsLatents(), task)


def unzip(pack, patcher):
    words = {"full": "a sks dog in szn style", "content": "a sks dog", "style": "szn style"}
    settings = pack.ziplora_core.unzip.Settings(steps=1, learning_rate=1e-3, rank=2)
    task = pack.nodes.bridge.unzip.Task(pictures(1), words, settings, "loras/two", 64)
    with torch.inference_mode():
        pack.nodes.bridge.unzip.unzip_picture(patcher, Words(), PixelsAsLatents(), task)


def out_of_memory(patcher):
    """In each forward pass with a gradient: in the middle of a run, and again where it is tried again."""
    layer = patcher.model.diffusion_model.middle_block[1].transformer_blocks[0].attn1.to_out[0]

    def strike(module, args, made):
        if made.requires_grad:
            raise RuntimeError("CUDA out of memory")

    return layer.register_forward_hook(strike)


ENDS = {
    "success": None,
    "error": lambda patcher: disturb(patcher, "error in backward", 1),
    "interrupt": lambda patcher: disturb(patcher, "interrupt in backward", 1),
    "out of memory": out_of_memory,
}


CASES = [(step, place, end) for place in PLACES for end in ENDS] + [
    (work, "on both sides", end) for work in (zip_pair, train, unzip) for end in ("success", "out of memory")
]


@pytest.mark.parametrize(("work", "place", "end"), CASES)
def test_every_forward_is_the_one_from_before(pack, work, place, end, output):  # noqa: F811
    import comfy.model_management as management

    patcher, before, drawn = shared(place)
    if ENDS[end] is None:
        work(pack, patcher)
    else:
        handle = ENDS[end](patcher)
        expected = management.InterruptProcessingException if end == "interrupt" else RuntimeError
        words = {"error": "struck", "out of memory": "memory", "interrupt": None}[end]
        with pytest.raises(expected, match=words):
            work(pack, patcher)
        handle.remove()
    assert_as_before(patcher, before, drawn)


def test_the_host_is_handed_no_injection(pack, monkeypatch):
    from comfy.model_patcher import ModelPatcher

    monkeypatch.setattr(ModelPatcher, "set_injections", None)
    optimise(pack, tiny.tiny_patcher(), steps=1)


def test_a_wrapper_that_is_kept_for_longer_goes_on_working(pack):
    """Over one of ours, which then only leads through to what it wrapped, and is gone after its first call."""
    bare = tiny.tiny_patcher()
    before, plain, patcher = forwards(bare), drawn_by(bare), bare.clone()
    other = injected_after(patcher, 0, until=None)
    drawn = drawn_by(patcher)
    other.eject()
    optimise(pack, patcher, steps=1)
    assert other.originals, "the other one is still there"
    with torch.no_grad():
        for name, (module, up, down) in other.layers.items():
            x = torch.randn(3, module.in_features, generator=torch.Generator().manual_seed(5))
            expected = torch.nn.functional.linear(x, module.weight, module.bias) + x @ down.T @ up.T
            torch.testing.assert_close(module.forward(x), expected, rtol=1e-4, atol=1e-5, msg=name)
    other.eject()
    assert torch.equal(drawn_by(patcher), drawn)
    other.eject()
    assert torch.equal(drawn_by(bare), plain)
    assert forwards(bare) == before


@pytest.mark.parametrize("recomputed", [0, 99])
@pytest.mark.parametrize("place", PLACES)
def test_the_gradient_is_that_of_what_the_other_does_too(pack, place, recomputed):
    """Against a model whose weights the same updates were added to."""
    merged, patcher = tiny.tiny_patcher(), tiny.tiny_patcher()
    sources = tiny.sources(pack, merged.model)
    for seed, put in enumerate(PLACES[place]):
        Bypass(merged.model, seed).merged(merged)
        put(patcher, seed)
    theirs, ours = (one_step(pack, p, sources, recomputed=recomputed) for p in (merged, patcher))
    assert_equal_steps(ours, theirs, 1e-4)


def test_the_hosts_own_bypass(pack):
    """Newer hosts' Load LoRA (Bypass), against its Load LoRA."""
    sd = pytest.importorskip("comfy.sd")
    if not hasattr(sd, "load_bypass_lora_for_models"):
        pytest.skip("this host has no such node")
    plain = tiny.tiny_patcher()
    before, sources = forwards(plain), tiny.sources(pack, plain.model)
    file = tiny.full_size.attention_lora(plain.model, 4, 9, torch.float32)
    with torch.inference_mode():
        file = {k: v.clone() for k, v in file.items()}
        beside, _ = sd.load_bypass_lora_for_models(plain, None, file, 0.7, 0.0)
        merged, _ = sd.load_lora_for_models(plain, None, file, 0.7, 0.0)
    drawn = drawn_by(beside)
    theirs, ours = (one_step(pack, p, sources) for p in (merged, beside))
    assert_equal_steps(ours, theirs, 1e-4)
    optimise(pack, beside, steps=2)
    assert torch.equal(drawn_by(beside), drawn)
    assert forwards(plain) == before


def test_what_the_host_takes_off_and_puts_back_meanwhile_is_still_below(pack):
    """As it does to move weights, where something else needs room in the middle of a run."""
    patcher, sources = tiny.tiny_patcher(), None
    injected_before(patcher, 0)
    sources = tiny.sources(pack, patcher.model)
    expected = one_step(pack, patcher, sources)
    predictor = pack.nodes.bridge.network.session
    real = predictor.Network.denoised

    def moving(self, *args):
        with self._model.current_patcher.use_ejected():
            pass
        return real(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(predictor.Network, "denoised", moving)
        assert_equal_steps(one_step(pack, patcher, sources), expected)
    assert not any("forward" in vars(m) and m.forward != type(m).forward.__get__(m) for m in patcher.model.modules())


def test_a_replaced_layer_without_a_gradient_is_named(pack):
    patcher = tiny.tiny_patcher()
    layer = patcher.model.diffusion_model.middle_block[1].transformer_blocks[0].ff.net[2]
    original = layer.forward
    layer.forward = lambda x: original(x).detach()
    with pytest.raises(ValueError, match=r"replaced the layer '.*ff\.net\.2' by one without a gradient; take it off"):
        one_step(pack, patcher)
    del layer.forward


def its_forward(module, change):
    original = module.forward
    module.forward = lambda *args, **kwargs: change(original(*args, **kwargs))
    return lambda: delattr(module, "forward")


def a_hook(module, change):
    return module.register_forward_hook(lambda module, args, made: change(made)).remove


def a_hook_before(module, change):
    return module.register_forward_pre_hook(lambda module, args: (change(args[0]), *args[1:])).remove


@pytest.mark.parametrize("put", [its_forward, a_hook, a_hook_before])
@pytest.mark.parametrize(("place", "recomputed"), [("", 0), ("middle_block.1.transformer_blocks.0", 99)])
def test_what_is_put_on_a_module_itself_may_do_what_sampling_allows(pack, place, put, recomputed):
    """With an inference tensor, and in place, on any module: neither needs one of the host's registers."""
    with torch.inference_mode():
        gain = torch.full((1,), 0.5)

    def change(value):
        made, weighed = value * gain, value.sigmoid()
        return made.add_(weighed.add_(1.0))

    def plain(value):
        return value * 0.5 + (value.sigmoid() + 1.0)

    patcher = tiny.tiny_patcher()
    sources, before = tiny.sources(pack, patcher.model), forwards(patcher)
    module = patcher.model.diffusion_model.get_submodule(place)
    take_off = put(module, plain)
    expected = one_step(pack, patcher, sources, recomputed=recomputed)
    take_off()
    take_off = put(module, change)
    assert_equal_steps(one_step(pack, patcher, sources, recomputed=recomputed), expected)
    take_off()
    assert forwards(patcher) == before
