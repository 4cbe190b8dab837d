"""Every term of the memory plan, by what one more of each thing adds to it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import tiny
import torch
from test_training import PixelsAsLatents, Words, output, pictures, task  # noqa: F401

HUGE = 10**15
GB = 10**9


@pytest.fixture(scope="module")
def patcher():
    return tiny.tiny_patcher(torch.bfloat16)


def pair_of(pack, patcher, ranks=(4, 8)):
    return pack.nodes.bridge.lora.fitting.fit(tiny.sources(pack, patcher.model, ranks), patcher.model).loras


def planned(pack, patcher, room=HUGE, ranks=(4, 8), sides=(8, 8), pair=None, **settings):
    with torch.inference_mode():
        latents = {c: torch.randn(1, 4, s, s) for c, s in zip(("content", "style"), sides, strict=True)}
    settings = pack.ziplora_core.solver.Settings(**{"solver": "gradient", **settings})
    pair = pair or pair_of(pack, patcher, ranks)
    return pack.nodes.bridge.memory.plan.make(patcher, pair, tiny.prompts(), latents, settings, room)


def rehearsed_as(pack, monkeypatch, outside=0, inputs=(), inside=()):
    found = pack.nodes.bridge.memory.rehearsal.Rehearsal(outside, list(inputs), list(inside))
    for name in ("rehearse", "rehearse_training"):
        monkeypatch.setattr(pack.nodes.bridge.memory.rehearsal, name, lambda *_: found)


@pytest.fixture
def workspace(monkeypatch, patcher):
    """The host's own estimate for one picture of this side, where its attention keeps no scores."""
    import comfy.model_management as management

    monkeypatch.setattr(management, "pytorch_attention_flash_attention", lambda: True)
    return lambda side, rows=1: int(patcher.model.memory_required([rows, 4, side, side]))


def numbers(pair):
    return sum(f.up.numel() + f.down.numel() for layer in pair.layers.values() for _, f in layer.items())


def test_without_steps_it_is_the_factors_the_coefficients_and_forward_passes(pack, patcher, workspace):
    pair = pair_of(pack, patcher)
    factors, passes = 2 * numbers(pair), 2 * workspace(16)
    vectors = (planned(pack, patcher, steps=0, sides=(16, 16)).need - factors - passes) / (4 * pair.coefficient_count)
    assert 6 <= vectors <= 12, "a start, a step, a gradient, Adam's two, a mean, in float32, and little more"
    larger = planned(pack, patcher, steps=0, ranks=(64, 64)).need - planned(pack, patcher, steps=0).need
    assert larger == 2 * (numbers(pair_of(pack, patcher, (64, 64))) - numbers(pair))
    more = planned(pack, patcher, steps=0, sides=(64, 64)).need - planned(pack, patcher, steps=0).need
    assert more == pytest.approx(2 * (workspace(64) - workspace(8)), abs=4)


def test_the_layer_wise_solve_needs_no_more_than_forward_passes(pack, patcher):
    none, layerwise = (planned(pack, patcher, **s) for s in ({"steps": 0}, {"solver": "layerwise"}))
    assert layerwise == none


def test_a_step_needs_three_times_a_pass_and_what_is_kept(pack, patcher, monkeypatch, workspace):
    side = 128
    fixed = planned(pack, patcher, steps=0, sides=(side, side)).need - 2 * workspace(side)
    rehearsed_as(pack, monkeypatch)
    for batch in (1, 3):
        need = planned(pack, patcher, batch_size=batch, sides=(side, side)).need
        assert need - fixed == pytest.approx(2 * 3 * workspace(side, batch), rel=1e-6)
    kept = {"outside": 7 * GB, "inputs": [GB, 2 * GB], "inside": [30 * GB, 40 * GB]}
    rehearsed_as(pack, monkeypatch, **kept)
    everything = sum(map(sum, (kept["inputs"], kept["inside"]))) + kept["outside"]
    for batch in (1, 3):
        need = planned(pack, patcher, batch_size=batch, sides=(8, 8)).need
        assert need == pytest.approx(2 * batch * (everything + 40 * GB), rel=1e-2), (
            "with gradients of the largest block"
        )
        least = planned(pack, patcher, 0, batch_size=batch, sides=(8, 8))
        assert (least.together, least.recomputed) == (False, 2)
        assert least.need == pytest.approx(batch * (10 * GB + 2 * 40 * GB), rel=1e-2), "a block at a time, run again"


def test_a_tenth_of_the_room_stays_free(pack, patcher, monkeypatch):
    rehearsed_as(pack, monkeypatch, GB, [GB], [20 * GB])
    need = planned(pack, patcher).need
    tight, enough = (planned(pack, patcher, int(need * more)) for more in (1.05, 1.2))
    assert (enough.together, enough.recomputed) == (True, 0) and tight.need < need


def test_the_larger_reference_counts_whichever_it_is(pack, patcher, monkeypatch, workspace):
    pair, latents = pair_of(pack, patcher), {side: torch.randn(1, 4, side, side) for side in (8, 24)}
    with torch.inference_mode():
        kept = [
            pack.nodes.bridge.memory.rehearsal.rehearse(
                patcher, pair, tiny.prompts(), {"content": latents[a], "style": latents[b]}
            )
            for a, b in ((24, 8), (24, 24))
        ]
    assert kept[0] == kept[1]
    rehearsed_as(pack, monkeypatch)
    needs = [planned(pack, patcher, sides=sides, pair=pair).need for sides in ((8, 24), (24, 8), (24, 24), (8, 8))]
    assert needs[0] == needs[1] == needs[2] > needs[3]


def test_one_reference_at_a_time_is_carried_out(pack, patcher):
    """What is planned for one reference at a time sees one in each pass, though both would fit together."""
    pair, passes = pair_of(pack, patcher), []
    hook = patcher.model.diffusion_model.register_forward_pre_hook(lambda _, args: passes.append(len(args[0])))
    draws = pack.ziplora_core.draws

    def work(predict, joined, references):
        for batch in next(draws.spread_batches(references, predict, 0, 1)):
            predict(batch, joined.teacher(batch.concept_index))

    given = {c: v["samples"] for c, v in tiny.latents().items()}
    with torch.inference_mode():
        for together in (True, False):
            pack.nodes.bridge.network.predictor.with_predictor(
                patcher, pair, tiny.prompts(), given, work, together=together
            )
    hook.remove()
    assert passes == [2, 1, 1]


def test_blocks_that_are_run_again_are_the_first(pack, patcher):
    """As the plan reckons: the rest keeps what it needs."""
    frozen = pack.nodes.bridge.network.injection
    pair, calls = pair_of(pack, patcher), {}
    network = frozen.blocks(patcher.model)
    core = pack.ziplora_core
    hooks = [
        block.attn1.to_q.register_forward_pre_hook(lambda *_, i=i: calls.update({i: calls.get(i, 0) + 1}))
        for i, block in enumerate(network)
    ]

    def work(predict, joined, references):
        flat = joined.flatten(core.coefficients.Coefficients.ones(pair)).requires_grad_()
        with torch.enable_grad():
            for batch in next(core.draws.spread_batches(references, predict, 0, 1)):
                predict(batch, joined.student(flat)).square().sum().backward()

    given = {c: v["samples"] for c, v in tiny.latents().items()}
    with torch.inference_mode():
        pack.nodes.bridge.network.predictor.with_predictor(patcher, pair, tiny.prompts(), given, work, recomputed=2)
    for hook in hooks:
        hook.remove()
    assert [calls[i] for i in range(len(network))] == [2, 2] + [1] * (len(network) - 2)


def test_the_room_is_what_the_card_has_without_other_models_less_this_one_and_the_hosts_reserve(pack, monkeypatch):
    import comfy.model_management as management

    card, other = torch.device("cuda", 0), torch.device("cpu")
    loaded = [
        SimpleNamespace(device=device, model_loaded_memory=lambda size=size: size)
        for device, size in ((card, 50), (card, 20), (other, 1000))
    ]
    monkeypatch.setattr(management, "get_free_memory", lambda device: 100)
    monkeypatch.setattr(management, "current_loaded_models", loaded)
    monkeypatch.setattr(management, "extra_reserved_memory", lambda: 7)
    room = [
        pack.nodes.bridge.memory.plan.room_for(SimpleNamespace(load_device=card, model_size=lambda size=size: size))
        for size in (30, 10_000)
    ]
    assert room == [100 + 50 + 20 - 30 - 7, 0]


def training_plan(pack, patcher, shapes, rank=4, rows=1, side=8):
    with torch.inference_mode():
        latents = torch.randn(1, 4, side, side)
        return pack.nodes.bridge.memory.plan.make_for_training(
            patcher, shapes, tiny.prompts()["content"], latents, rank, rows, HUGE
        )


def test_training_needs_what_is_trained_and_three_times_a_pass(pack, patcher, monkeypatch, workspace):
    shapes = pack.nodes.bridge.training.layers.trained_layers(patcher.model, "attention")
    rehearsed_as(pack, monkeypatch)
    need = {rank: training_plan(pack, patcher, shapes, rank).need for rank in (1, 65)}
    trained = 64 * sum(out + columns for out, columns in shapes.values())
    assert 16 <= (need[65] - need[1]) / trained <= 24, "float32: itself, its gradient, Adam's two, and one that passes"
    for rows in (1, 3):
        alone = training_plan(pack, patcher, {}, rows=rows, side=128).need
        assert alone == pytest.approx(3 * workspace(128, rows), rel=1e-6)
    rehearsed_as(pack, monkeypatch, GB, [GB], [20 * GB])
    assert training_plan(pack, patcher, {}, rows=3).need == pytest.approx(3 * (2 * GB + 2 * 20 * GB), rel=1e-2)


def test_class_pictures_are_planned_for_as_so_many_more_rows(pack):
    """And two LoRAs that are trained at once as one of twice the rank."""
    patcher, bridge, asked_for = tiny.tiny_patcher(), pack.nodes.bridge, []
    real = bridge.memory.plan.make_for_training

    def make(model, shapes, conditioning, latents, rank, rows, room, is_whole):
        asked_for.append((rank, rows))
        return real(model, shapes, conditioning, latents, rank, rows, room, is_whole)

    bridge.memory.plan.make_for_training = make
    try:
        with torch.inference_mode():
            words, vae = Words(), PixelsAsLatents()
            for given in ({}, {"class_prompt": "a figure", "class_pictures": [pictures(1)]}):
                bridge.training.concept.train_concept(patcher, words, vae, task(pack, steps=1, batch_size=3, **given))
            prompts = {"full": "a sks dog in szn style", "content": "a sks dog", "style": "szn style"}
            settings = pack.ziplora_core.unzip.Settings(steps=1, rank=5)
            bridge.unzip.unzip_picture(
                patcher, words, vae, bridge.unzip.Task(pictures(1), prompts, settings, "loras/apart", 64)
            )
    finally:
        bridge.memory.plan.make_for_training = real
    assert asked_for == [(4, 3), (4, 6), (10, 1)]
