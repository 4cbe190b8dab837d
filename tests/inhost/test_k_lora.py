"""K-LoRA on a model against the host's own loader, which puts on each layer the LoRA that the formulas choose."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import tiny
import torch
from families import FAMILIES
from test_apply import stock
from test_formats import as_sources
from test_safety import left_behind

STEPS = 6
CONVOLUTIONS = ("input_blocks.1.0.in_layers.2", "input_blocks.3.0.op")  # the second has a stride
ALONE = "middle_block_1_proj_in"  # which the style LoRA alone changes


def kohya_file(model, rank: int, seed: int, alone: bool) -> dict[str, torch.Tensor]:
    """Of attention and two convolutions, with layers of very unequal size, and a bias."""
    lora = tiny.full_size.attention_lora(model, rank, seed, torch.float32)
    g = torch.Generator().manual_seed(100 + seed)
    for name in CONVOLUTIONS:
        key, shape = "lora_unet_" + name.replace(".", "_"), model.diffusion_model.get_parameter(f"{name}.weight").shape
        lora[f"{key}.lora_up.weight"] = torch.randn(shape[0], rank, 1, 1, generator=g) * 0.05
        lora[f"{key}.lora_down.weight"] = torch.randn(rank, *shape[1:], generator=g) * 0.05
        lora[f"{key}.alpha"] = torch.tensor(rank / 2)
    if alone:
        side = model.diffusion_model.get_parameter("middle_block.1.proj_in.weight").shape[0]
        lora[f"lora_unet_{ALONE}.lora_up.weight"] = torch.randn(side, rank, generator=g) * 0.1
        lora[f"lora_unet_{ALONE}.lora_down.weight"] = torch.randn(rank, side, generator=g) * 0.1
        lora[f"lora_unet_{ALONE}.diff_b"] = torch.randn(side, generator=g) * 0.1
    for key in [k for k in lora if k.endswith("lora_up.weight") and ALONE not in k]:
        lora[key] *= math.exp(torch.randn((), generator=g))
    return lora


def layers_of(lora) -> dict[str, torch.Tensor]:
    """Layer -> ΔW as a matrix, float64."""
    found = {}
    for key in [k.removesuffix(".lora_up.weight") for k in lora if k.endswith(".lora_up.weight")]:
        up, down = (lora[f"{key}.lora_{which}.weight"].double().flatten(1) for which in ("up", "down"))
        found[key] = up @ down * float(lora.get(f"{key}.alpha", torch.tensor(float(len(down))))) / len(down)
    return found


class Files:
    """A pair as files, at strengths, and what the paper's formulas choose of it."""

    alpha, beta = 1.5, 0.5

    def __init__(self, pack, model, strengths=(0.8, 1.2), dtype=torch.float32):
        self.tensors = {
            c: {k: t.to(dtype) for k, t in kohya_file(model, r, i, bool(i)).items()}
            for i, (c, r) in enumerate({"content": 3, "style": 5}.items())
        }
        self.strengths = dict(zip(self.tensors, strengths, strict=True))
        loras = pack.nodes.bridge.lora.loras
        self.sources = loras.LoRASources(
            {c: loras.LoRASource(c, lora, self.strengths[c]) for c, lora in self.tensors.items()}
        )
        content, style = (layers_of(lora) for lora in self.tensors.values())
        self.common = [key for key in content if key in style]
        sizes = [sum(of[key].abs().sum() for key in self.common) for of in (content, style)]
        self.ratios = {}
        for key in self.common:
            tops = [of[key].abs().flatten().sort(descending=True).values[:15].sum() for of in (content, style)]
            self.ratios[key] = float(tops[0] / tops[1] / (sizes[0] / sizes[1]))

    def chosen(self, progress: float) -> dict[str, str]:
        scale = self.alpha * progress + self.beta
        return {k: "content" if ratio > scale else "style" for k, ratio in self.ratios.items()}

    def stock(self, patcher, progress: float):
        """The model with the chosen LoRA alone on each layer, by the host's loader."""
        import comfy.sd

        chosen = self.chosen(progress)
        for concept, lora in self.tensors.items():
            kept = {k: t for k, t in lora.items() if chosen.get(k.split(".")[0], concept) == concept}
            patcher = comfy.sd.load_lora_for_models(patcher, None, kept, self.strengths[concept], 0)[0]
        return patcher


@pytest.fixture
def patcher():
    return tiny.tiny_patcher()


@pytest.fixture
def files(pack, patcher):
    return Files(pack, patcher.model)


def k_lora(pack, patcher, files, **settings):
    execute = next(node for node in pack.nodes.NODES if node.__name__ == "KLoRA").execute
    with torch.inference_mode():
        return execute(patcher, files.sources, **settings).args


def sampler_sigmas(patcher) -> torch.Tensor:
    import comfy.samplers

    return comfy.samplers.calculate_sigmas(patcher.get_model_object("model_sampling"), "normal", STEPS)


def looks(patcher, at, sigmas=None, rows: int = 1, alter=lambda options: None) -> dict[float, torch.Tensor]:
    """What the model predicts of one noise at each of some noise levels, within the host's own sampling."""
    import comfy.samplers

    found = {}

    class Look(comfy.samplers.Sampler):
        def sample(self, model_wrap, sigmas, extra_args, callback, noise, *_, **__):
            alter(extra_args["model_options"])
            for sigma in at:
                found[float(sigma)] = model_wrap(noise * sigma, sigma.expand(len(noise)), **extra_args).clone()
            return noise

    with torch.inference_mode():
        guider = comfy.samplers.CFGGuider(patcher)
        guider.set_conds(tiny.prompts()["content"], tiny.prompts()["style"])
        guider.set_cfg(3.0)
        noise = torch.randn(rows, 4, 8, 8, generator=torch.Generator().manual_seed(5))
        sigmas = sampler_sigmas(patcher) if sigmas is None else sigmas
        guider.sample(noise, torch.zeros_like(noise), Look(), sigmas, seed=0, disable_pbar=True)
    return found


def assert_near(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.smoke
def test_each_pass_is_that_of_the_chosen_loras_alone(pack, patcher, files):
    sigmas = sampler_sigmas(patcher)
    before = tiny.sample(patcher)
    ours, clip, report = k_lora(pack, patcher, files)
    assert clip is None
    order = [3, 0, 5, 1, 4, 2]  # no matter in which one: nothing counts
    found = looks(ours, [sigmas[i] for i in order])
    styles = []
    for step in range(STEPS):
        chosen = list(files.chosen(step / STEPS).values())
        styles.append(chosen.count("style"))
        (expected,) = looks(files.stock(patcher, step / STEPS), [sigmas[step]]).values()
        assert_near(found[float(sigmas[step])], expected)
    assert 0 < styles[0] < styles[2] < styles[-1] < len(files.common), "every choice is the same: this tests nothing"
    (other,) = looks(files.stock(patcher, 0.5), [sigmas[0]]).values()
    assert (other - found[float(sigmas[0])]).abs().max() > 0.01
    content = len(files.common) - styles[0]
    assert report.startswith(f"The subject's LoRA acts in {content} of {len(files.common)} layers in the first step")
    assert left_behind(patcher) == [] and torch.equal(tiny.sample(patcher), before)


def test_what_euler_draws_is_what_stock_models_draw_one_after_another(pack, patcher, files):
    import comfy.sample

    ours, *_ = k_lora(pack, patcher, files)

    def drawn(model, latent, start: int, last: int):
        with torch.inference_mode():
            noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
            noise = noise if start == 0 else torch.zeros_like(noise)
            return comfy.sample.sample(
                model, noise, STEPS, 3.0, "euler", "normal", tiny.prompts()["content"], tiny.prompts()["style"], latent,
                disable_noise=start > 0, start_step=start, last_step=last, force_full_denoise=last == STEPS, seed=1,
                disable_pbar=True,
            )  # fmt: skip

    latent = torch.zeros(1, 4, 8, 8)
    for step in range(STEPS):
        latent = drawn(files.stock(patcher, step / STEPS), latent, step, step + 1)
    assert_near(drawn(ours, torch.zeros(1, 4, 8, 8), 0, STEPS), latent)


def test_between_two_of_the_samplers_levels_the_step_goes_on(pack, patcher, files):
    sigmas = sampler_sigmas(patcher)
    ours, *_ = k_lora(pack, patcher, files)
    between = (sigmas[2] + sigmas[3]) / 2
    assert_near(looks(ours, [between]), looks(files.stock(patcher, 2 / STEPS), [between]))


def test_rows_and_prompts_in_one_pass_or_each_in_its_own(pack, patcher, files):
    sigmas = sampler_sigmas(patcher)
    ours, *_ = k_lora(pack, patcher, files)
    sizes = []

    def one_by_one(options):
        def wrapper(apply_model, given):
            x, sigma = given["input"], given["timestep"]
            rows = [
                apply_model(
                    x[i : i + 1],
                    sigma[i : i + 1],
                    **{k: v[i : i + 1] if isinstance(v, torch.Tensor) else v for k, v in given["c"].items()},
                )
                for i in range(len(x))
            ]
            sizes.append(len(rows))
            return torch.cat(rows)

        options["model_function_wrapper"] = wrapper

    whole = looks(ours, sigmas[:-1], rows=2)
    parts = looks(ours, sigmas[:-1], rows=2, alter=one_by_one)
    assert set(sizes) == {4}, "two rows of two prompts"
    for sigma, expected in whole.items():
        torch.testing.assert_close(parts[sigma], expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float16])
def test_files_of_any_precision(pack, patcher, files, dtype):
    rounded = Files(pack, patcher.model, dtype=dtype)
    sigmas = sampler_sigmas(patcher)
    ours, *_ = k_lora(pack, patcher, rounded)
    (found,) = looks(ours, [sigmas[3]]).values()
    (expected,) = looks(rounded.stock(patcher, 3 / STEPS), [sigmas[3]]).values()
    (exact,) = looks(files.stock(patcher, 3 / STEPS), [sigmas[3]]).values()
    assert_near(found, expected)
    assert (found - exact).abs().max() > 1e-3 or dtype == torch.float16


def test_a_step_is_told_without_float64(pack, patcher, files, monkeypatch):
    """Which Apple's GPUs have not, where the sampler's noise levels lie."""
    switch = pack.nodes.bridge.k_lora.Switch
    own = switch.chosen

    class NoFloat64(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            made = func(*args, **(kwargs or {}))
            if isinstance(made, torch.Tensor) and made.dtype == torch.float64:
                raise TypeError("Cannot convert a MPS Tensor to float64")
            return made

    def chosen(*given):
        with NoFloat64():
            return own(*given)

    monkeypatch.setattr(switch, "chosen", chosen)
    sigmas = sampler_sigmas(patcher)
    ours, *_ = k_lora(pack, patcher, files)
    assert_near(looks(ours, [sigmas[3]]), looks(files.stock(patcher, 3 / STEPS), [sigmas[3]]))


def test_without_a_samplers_levels_the_models_own_say_the_time(pack, patcher, files):
    ours, *_ = k_lora(pack, patcher, files)
    table = patcher.get_model_object("model_sampling").sigmas

    def forget(options):
        del options["transformer_options"]["sample_sigmas"]

    for index in (990, 500, 20):
        sigma = table[index]
        found = looks(ours, [sigma], alter=forget)
        assert_near(found, looks(files.stock(patcher, (999 - index) / 999), [sigma]))


def test_settings_are_the_papers_two_numbers(pack, patcher, files):
    sigmas = sampler_sigmas(patcher)
    shares = []
    for files.alpha, files.beta in ((0.0, 0.0), (0.0, 1.0), (4.0, 0.25)):
        ours, *_ = k_lora(pack, patcher, files, alpha=files.alpha, beta=files.beta)
        shares.append(list(files.chosen(0.5).values()).count("style"))
        assert_near(looks(ours, [sigmas[3]]), looks(files.stock(patcher, 0.5), [sigmas[3]]))
    assert 0 == shares[0] < shares[1] < shares[2]
    with pytest.raises(ValueError, match="alpha is -1.0; expected a number from 0 to 10"):
        k_lora(pack, patcher, files, alpha=-1.0)


def test_convolutions_that_another_pack_makes_seamless(pack, patcher, files):
    """By padding with the picture's other side."""
    convolutions = [m for m in patcher.model.diffusion_model.modules() if isinstance(m, torch.nn.Conv2d)]
    before = looks(patcher, sampler_sigmas(patcher)[:1])
    for module in convolutions:
        module.padding_mode = "circular"
    at = sampler_sigmas(patcher)[:1]
    assert_near(looks(k_lora(pack, patcher, files)[0], at), looks(files.stock(patcher, 0.0), at))
    assert not torch.equal(*(next(iter(found.values())) for found in (before, looks(patcher, at))))


def test_other_loras_and_a_second_one_live_beside_it(pack, patcher, files):
    import comfy.sd

    sigmas = sampler_sigmas(patcher)
    other = tiny.full_size.attention_lora(patcher.model, 4, 99, torch.float32)

    def with_other(model):
        return comfy.sd.load_lora_for_models(model, None, other, 1.0, 0)[0]

    expected = looks(with_other(files.stock(patcher, 0.5)), [sigmas[3]])
    after, before = with_other(k_lora(pack, patcher, files)[0]), k_lora(pack, with_other(patcher), files)[0]
    assert_near(looks(after, [sigmas[3]]), expected)
    assert_near(looks(before, [sigmas[3]]), expected)

    second = Files(pack, patcher.model, (-0.5, 0.7))
    both, *_ = k_lora(pack, k_lora(pack, patcher, files)[0], second)
    assert_near(looks(both, [sigmas[3]]), looks(second.stock(files.stock(patcher, 0.5), 0.5), [sigmas[3]]))
    assert len(both.additional_models) == 2


def test_the_host_counts_its_memory_with_the_models(pack, patcher, files):
    ours, *_ = k_lora(pack, patcher, files)
    (held,) = ours.get_additional_models()
    common = tuple(files.common)
    count = sum(
        t.numel()
        for lora in files.tensors.values()
        for k, t in lora.items()
        if k.startswith(common) and "lora_" in k[9:]
    )
    assert held.model_size() == 4 * count
    assert not patcher.additional_models and not any(patcher.wrappers.values())


def test_layers_kept_whole_are_held_once(pack):
    core, bridge = pack.ziplora_core, pack.nodes.bridge.k_lora
    g = torch.Generator().manual_seed(0)
    whole = core.lora_set.Factors(torch.eye(6), torch.randn(6, 5, generator=g), 0.5)
    low = core.lora_set.Factors(torch.randn(6, 2, generator=g), torch.randn(2, 5, generator=g), 0.5)
    x = torch.randn(3, 4, 5, generator=g)
    for factors, held in ((whole, 1), (low, 2)):
        update = bridge.Update(factors, torch.float32)
        assert len(list(update.parameters())) == held
        torch.testing.assert_close(update(x, {}), x @ (0.5 * factors.up @ factors.down).T)


def test_nothing_stays_on_the_model_where_a_pass_fails(pack, patcher, files):
    ours, *_ = k_lora(pack, patcher, files)
    before = tiny.sample(ours)
    layer = patcher.model.diffusion_model.middle_block[1].transformer_blocks[0].attn1.to_out[0]

    def strike(*_):
        raise RuntimeError("struck")

    handle = layer.register_forward_pre_hook(strike)
    with pytest.raises(RuntimeError, match="struck"):
        tiny.sample(ours)
    handle.remove()
    assert left_behind(patcher) == []
    assert torch.equal(tiny.sample(ours), before)


def test_rows_of_different_noise_are_refused(pack, patcher, files):
    """As where a model is zipped or trained with K-LoRA on it."""
    ours, *_ = k_lora(pack, patcher, files)
    with torch.inference_mode(), pytest.raises(ValueError, match="K-LoRA is on the model.*Take it off"):
        pack.nodes.bridge.optimize.zipping.optimize(
            ours, tiny.sources(pack, patcher.model), tiny.prompts(), tiny.latents(),
            pack.ziplora_core.solver.Settings(steps=1, solver="gradient"),
        )  # fmt: skip
    assert left_behind(patcher) == []


def test_three_loras_and_loaders_of_the_same_files_are_refused(pack, patcher, files):
    import comfy.sd

    loras = pack.nodes.bridge.lora.loras
    three = dict(files.sources.by_concept) | {"other": files.sources["style"]}
    files.sources, pair = loras.LoRASources(three), files.sources
    with pytest.raises(ValueError, match="one content and one style LoRA; found 3"):
        k_lora(pack, patcher, files)
    files.sources = pair
    loaded = patcher
    for lora in files.tensors.values():
        loaded = comfy.sd.load_lora_for_models(loaded, None, lora, 1.0, 0)[0]
    with pytest.raises(ValueError, match="on it already, by LoRA loaders"):
        k_lora(pack, loaded, files)


@pytest.mark.parametrize("method", ["sum", "TIES", "KnOTS", "NP-LoRA"])
def test_a_merge_of_the_same_files_is_refused_and_of_others_is_not(pack, patcher, files, method):
    direct, apply = pack.nodes.DirectMergeLoRA, pack.nodes.ApplyZippedLoRA
    with torch.inference_mode():
        (zipped,) = direct.execute(patcher, files.sources, method).args
        others = direct.execute(patcher, tiny.sources(pack, patcher.model), "sum").args[0]
        on_it, beside = (apply.execute(patcher, merge, 1.0).args[0] for merge in (zipped, others))
    with pytest.raises(ValueError, match="a merge of these LoRAs is on the model already.*before that node"):
        k_lora(pack, on_it, files)
    sigmas = sampler_sigmas(patcher)
    found, expected = (looks(m, [sigmas[3]]) for m in (k_lora(pack, beside, files)[0], files.stock(beside, 0.5)))
    assert_near(found, expected)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_draws_with_the_one_lora_that_is_chosen_everywhere(pack, name, monkeypatch):
    family = FAMILIES[name]
    family.shrink(monkeypatch)
    patcher = family.patcher()
    files = SimpleNamespace(
        sources=as_sources(pack, family.lora(patcher.model, 4, 1), family.lora(patcher.model, 2, 2))
    )
    ours, *_ = k_lora(pack, patcher, files, alpha=0.0, beta=0.0)
    content, style = (files.sources[concept].tensors for concept in ("content", "style"))
    before = {key: tensor for key, tensor in style.items() if "llm_adapter" in key}  # runs ahead of every step
    expected = family.sample(stock(stock(patcher, content), before))
    found, bare = family.sample(ours), family.sample(patcher)
    assert (found - expected).norm() < 0.01 * (expected - bare).norm()
    assert left_behind(patcher) == []
