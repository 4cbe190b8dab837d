"""What a step costs, counted and not timed: passes, operations, what is kept for backward, what is never made."""

from __future__ import annotations

import gc

import pytest
import tiny
import torch
from torch.autograd.function import BackwardCFunction
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

SIDE = 128  # latents of a picture of 1024 x 1024


@pytest.fixture(scope="module")
def sdxl(pack):
    """(stage, patcher, zipped): full-size SDXL without memory, with two LoRAs of rank 64 that have theirs."""
    from comfy.model_patcher import ModelPatcher

    full_size, bridge = tiny.full_size, pack.nodes.bridge
    cpu = torch.device("cpu")
    patcher = ModelPatcher(full_size.sdxl_model(torch.bfloat16, device="meta"), cpu, cpu)
    with torch.inference_mode():
        loras = [full_size.attention_lora(patcher.model, 64, seed, torch.bfloat16) for seed in (0, 1)]
        sources = bridge.lora.loras.LoRASources(
            tiny.of_two(
                *(
                    bridge.lora.loras.LoRASource(n, lora, 1.0)
                    for n, lora in zip(("content", "style"), loras, strict=True)
                )
            )
        )
        prompts = {c: full_size.random_prompt(0) for c in ("content", "style")}
        latents = {c: full_size.random_latents(SIDE, 0)["samples"] for c in ("content", "style")}
    fitted = bridge.lora.fitting.fit(sources, patcher.model)
    zipped = bridge.lora.zipped.ZippedLoRA(
        sources, fitted, pack.ziplora_core.coefficients.Coefficients.ones(fitted.loras)
    )
    return bridge.memory.rehearsal.MetaSet(patcher, fitted.loras, prompts, latents), patcher, zipped


def step(stage):
    """Teacher, student and backward of both references."""
    batch = stage.batch("content", "style")
    with torch.no_grad():
        teacher = stage.predict(batch, stage.joined.teacher(batch.concept_index))
    flat = stage.coefficients()
    with torch.enable_grad():
        student = stage.predict(batch, stage.joined.student(flat))
        (student - teacher).flatten(1).norm(dim=1).mean().backward()
    return flat.grad


class Shapes(TorchDispatchMode):
    """Shapes of everything that is made; views, and what is changed in place, left out."""

    def __init__(self):
        super().__init__()
        self.made = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for made, returned in zip(out if isinstance(out, tuple) else (out,), func._schema.returns, strict=False):
            if isinstance(made, torch.Tensor) and returned.alias_info is None:
                self.made.add(tuple(made.shape))
        return out


@pytest.fixture(scope="module")
def forward(pack, sdxl):
    """Operations of one row's forward pass, in 10^12."""
    stage, *_ = sdxl
    with stage.injected():
        stage.injection.branch = None
        x, context, vector = (torch.empty(1, *shape, device="meta") for shape in ((4, SIDE, SIDE), (77, 2048), (2816,)))
        options = {"optimized_attention_override": pack.nodes.bridge.network.session.attention_with_gradient}
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            stage.base.apply_model(
                x, torch.empty(1, device="meta"), c_crossattn=context, y=vector, transformer_options=options
            )
    return counter.get_total_flops() / 1e12


@pytest.fixture(scope="module")
def one_step(sdxl):
    """(operations in 10^12, shapes of what is made) of a step that runs no block again; two tests look at it."""
    stage, *_ = sdxl
    with stage.injected(), FlopCounterMode(display=False) as counter, Shapes() as shapes:
        assert step(stage).shape == (1_571_840,)
    return counter.get_total_flops() / 1e12, shapes.made


def check_operations(forward, tflop, forwards, most):
    """design.md, section 7: 2 teacher, 2 student, 2 backward, and 2 where blocks are run again, in forward passes."""
    share = tflop / forward / forwards
    print(f"forward {forward:.2f} TFLOP a row, step {tflop:.1f}: {share:.3f} of {forwards} forward passes")
    assert 5 < forward < 7.5
    assert share <= 1.25
    assert tflop <= 1.25 * most


def test_a_step_counts_no_more_operations_than_the_design_allows(forward, one_step):
    check_operations(forward, one_step[0], 6, 36)


def test_nor_does_a_step_that_runs_every_block_again(sdxl, forward):
    stage, *_ = sdxl
    with stage.injected(70), FlopCounterMode(display=False) as counter:
        assert step(stage).shape == (1_571_840,)
    check_operations(forward, counter.get_total_flops() / 1e12, 8, 48)


def test_no_update_is_ever_formed(pack, sdxl, one_step):
    """Neither while optimising, nor in applying, nor in exporting a plain pair: no tensor of any ΔW's shape."""
    stage, patcher, zipped = sdxl
    updates = {factors.shape for layer in zipped.fitted.loras.layers.values() for _, factors in layer.items()}
    assert updates == {(1280, 1280), (1280, 2048), (640, 640), (640, 2048)}
    bridge, seen = pack.nodes.bridge, [one_step[1]]
    for work in (
        lambda: [patch[0][1].weights for patch in bridge.apply.apply(patcher, None, zipped, 1.0)[0].patches.values()],
        lambda: bridge.export.export_tensors(zipped, 0, "fp16", "kohya"),
    ):
        with stage.injected(), Shapes() as shapes:
            work()
        seen.append(shapes.made)
    for made in seen:
        assert made
        assert not made & updates, made & updates


def test_two_passes_a_step_and_only_one_has_a_gradient(pack):
    patcher, steps, passes = tiny.tiny_patcher(), 3, []
    record = patcher.model.diffusion_model.register_forward_pre_hook(
        lambda _, args: passes.append((len(args[0]), torch.is_grad_enabled()))
    )
    settings = pack.ziplora_core.solver.Settings(steps=steps, solver="gradient")
    held_out = 4 * 3  # draws of a teacher, the direct merge and the zipped pair
    direct = 4 * 2  # what the direct merge loses, which the balanced objective is relative to
    prompts = 3 * 2 * 3  # draws, with each LoRA and without, of three prompts: none wakes LoRAs of random numbers
    with torch.inference_mode():
        pack.nodes.bridge.optimize.zipping.optimize(
            patcher, tiny.sources(pack, patcher.model), tiny.prompts(), tiny.latents(), settings
        )
    record.remove()
    assert {rows for rows, _ in passes} == {2}
    measured = [False] * (held_out + prompts)
    assert [grad for _, grad in passes] == [False] * direct + [False, True] * steps + measured


@pytest.mark.parametrize("recomputed", [0, 2, 99])
def test_the_rehearsal_counts_what_a_real_pass_keeps(pack, recomputed):
    patcher, bridge = tiny.tiny_patcher(), pack.nodes.bridge
    pair = bridge.lora.fitting.fit(tiny.sources(pack, patcher.model), patcher.model).loras
    latents = {c: v["samples"] for c, v in tiny.latents(16).items()}
    rehearsed = bridge.memory.rehearsal.rehearse(patcher, pair, tiny.prompts(), latents)
    kept = tiny.kept_for_backward(pack, patcher, pair, tiny.prompts(), latents, recomputed)
    count = len(rehearsed.inside)
    assert count == len(bridge.network.injection.blocks(patcher.model)) > 2
    expected = rehearsed.outside + sum(rehearsed.inputs) + sum(rehearsed.inside[recomputed:])
    assert 2 * expected == pytest.approx(kept, rel=0.05)


def test_a_rehearsal_leaves_no_step_of_its_pass_alive(pack):
    patcher, bridge = tiny.tiny_patcher(), pack.nodes.bridge
    pair = bridge.lora.fitting.fit(tiny.sources(pack, patcher.model), patcher.model).loras
    latents = {c: v["samples"] for c, v in tiny.latents().items()}

    def steps() -> int:
        gc.collect()
        return sum(issubclass(type(thing), BackwardCFunction) for thing in gc.get_objects())

    before = steps()
    bridge.memory.rehearsal.rehearse(patcher, pair, tiny.prompts(), latents)
    assert steps() == before


def stepped(pack):
    """Settings with a backward pass in them."""
    return pack.ziplora_core.solver.Settings(solver="layerwise, then gradient")


def plans(pack, monkeypatch, rooms, **settings):
    patcher, bridge = tiny.tiny_patcher(), pack.nodes.bridge
    pair = bridge.lora.fitting.fit(tiny.sources(pack, patcher.model), patcher.model).loras
    rehearsed = bridge.memory.rehearsal.Rehearsal(outside=10**9, inputs=[10**8] * 10, inside=[10**9] * 10)
    monkeypatch.setattr(bridge.memory.rehearsal, "rehearse", lambda *_: rehearsed)
    latents = {c: v["samples"] for c, v in tiny.latents().items()}
    settings = pack.ziplora_core.solver.Settings(**{"solver": "layerwise, then gradient", **settings})
    return [bridge.memory.plan.make(patcher, pair, tiny.prompts(), latents, settings, int(room)) for room in rooms]


def test_the_plan_is_the_fastest_that_fits(pack, monkeypatch):
    rooms = (1e12, 2e10, 1e10, 7e9, 5e9, 1e9, 0)
    found = plans(pack, monkeypatch, rooms)
    assert (found[0].together, found[0].recomputed) == (True, 0)
    for plan, room in zip(found, rooms, strict=True):
        assert plan.need <= room or (plan.together, plan.recomputed) == (False, 10)
    times = [(not p.together, p.recomputed) for p in found]
    assert times == sorted(times) and len(set(times)) > 3
    assert "both references in one pass, 0 of 10 transformer blocks" in found[0].line()


def test_without_gradient_steps_nothing_is_rehearsed(pack, monkeypatch):
    (plan,) = plans(pack, monkeypatch, [1e12], solver="layerwise")
    assert plan.blocks == 0 and plan.need > 0


def test_a_model_that_cannot_be_rehearsed_is_run_sparingly(pack, monkeypatch, caplog):
    def fails(*_):
        raise NotImplementedError("no meta kernel")

    patcher, bridge = tiny.tiny_patcher(), pack.nodes.bridge
    pair = bridge.lora.fitting.fit(tiny.sources(pack, patcher.model), patcher.model).loras
    monkeypatch.setattr(bridge.memory.rehearsal, "rehearse", fails)
    latents = {c: v["samples"] for c, v in tiny.latents().items()}
    plan = bridge.memory.plan.make(patcher, pair, tiny.prompts(), latents, stepped(pack), 10**12)
    assert plan.together and plan.recomputed == plan.blocks > 0 and plan.need > 0
    assert "no meta kernel" in caplog.text


def test_an_interrupt_while_rehearsing_interrupts(pack):
    import comfy.model_management as management

    patcher, bridge = tiny.tiny_patcher(), pack.nodes.bridge
    pair = bridge.lora.fitting.fit(tiny.sources(pack, patcher.model), patcher.model).loras
    latents = {c: v["samples"] for c, v in tiny.latents().items()}
    management.interrupt_current_processing()
    with pytest.raises(management.InterruptProcessingException):
        bridge.memory.plan.make(patcher, pair, tiny.prompts(), latents, stepped(pack), 10**12)


@pytest.mark.parametrize("times", [1, 2])
def test_out_of_memory_steps_down_once_and_then_says_what_to_change(pack, monkeypatch, times):
    import comfy.model_management as management

    bridge, solver = pack.nodes.bridge, pack.ziplora_core.solver
    patcher, settings = tiny.tiny_patcher(), solver.Settings(steps=2, solver="gradient")
    before = tiny.sample(patcher)
    real, calls, struck = bridge.network.predictor.HostPredictor.__call__, [], []

    def call(self, batch, branch):
        calls.append(len(batch.concept_index))
        if len(struck) < times and torch.is_grad_enabled() and not batch.latents.is_meta:
            struck.append(1)
            raise management.OOM_EXCEPTION("CUDA out of memory. Tried to allocate 2.00 GiB")
        return real(self, batch, branch)

    def zipped():
        with torch.inference_mode():
            return bridge.optimize.zipping.optimize(
                patcher, tiny.sources(pack, patcher.model), tiny.prompts(), tiny.latents(), settings
            )

    count = len(bridge.network.injection.blocks(patcher.model))
    with monkeypatch.context() as patched:
        patched.setattr(bridge.memory.plan, "make", lambda *_: bridge.memory.plan.Plan(False, count, count))
        expected = zipped()[0].coefficients
    monkeypatch.setattr(bridge.network.predictor.HostPredictor, "__call__", call)
    if times == 2:
        with pytest.raises(management.OOM_EXCEPTION, match="not enough memory to zip: about .* GB .* lower batch_size"):
            zipped()
    else:
        result, _, report, _ = zipped()
        assert all(torch.equal(m, expected["style"][k]) for k, m in result.coefficients["style"].items())
        assert "one reference at a time" in report
        assert f"{count} of {count} transformer blocks run again" in report
    assert torch.equal(tiny.sample(patcher), before) and patcher.injections == {}


def test_a_second_try_is_the_least(pack):
    plan = pack.nodes.bridge.memory.plan.Plan(blocks=10)
    least = plan.least()
    assert (least.together, least.recomputed) == (False, 10)
    assert least.least() is None, "there is no third"


def test_the_published_algorithm_of_the_benchmark_has_the_same_losses_and_gradient(pack):
    """Whole updates formed into the weights, each reference apart: what benchmarks/sdxl.py compares with."""
    from benchmarks.dense import dense_pair

    patcher, bridge, core = tiny.tiny_patcher(), pack.nodes.bridge, pack.ziplora_core
    pair = bridge.lora.fitting.fit(tiny.sources(pack, patcher.model), patcher.model).loras
    latents = {c: v["samples"] for c, v in tiny.latents().items()}
    settings = core.solver.Settings(objective=core.objective.PAPER)
    found = []

    def work(predict, joined, references):
        for chosen, joins in ((joined, True), (dense_pair(joined, bridge.network.weights.cast), False)):
            predict.joins = joins
            batches = next(core.draws.training_batches(references, predict, settings))
            assert len(batches) == (1 if joins else 2)
            flat = joined.flatten(core.coefficients.Coefficients.ones(pair)).requires_grad_()
            with torch.enable_grad():
                losses = core.gradient.accumulate_gradient(
                    chosen, predict, flat, batches, settings, {"content": 1.0, "style": 1.0}
                )
            found.append((losses, flat.grad))

    with torch.inference_mode():
        bridge.network.predictor.with_predictor(patcher, pair, tiny.prompts(), latents, work)
    (ours, gradient), (published, expected) = found
    assert ours.retention == pytest.approx(published.retention, rel=1e-4)
    assert (gradient - expected).norm() < 1e-3 * expected.norm()
