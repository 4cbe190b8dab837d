"""A training run that memory runs out on: the second try goes on from the first, and no file loses steps."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import test_training
import test_unzip
import tiny
import torch
from safetensors import safe_open
from test_training import output, patcher  # noqa: F401

STEPS, FULL = 4, 2  # the step, from 0, before which memory runs out


def _train(pack, patcher):  # noqa: F811
    done = test_training.train(pack, patcher, test_training.task(pack, steps=STEPS, learning_rate=1e-2))
    return done.lora_model, done.loss_map["loss"], done.report


def _unzip(pack, patcher):  # noqa: F811
    done = test_unzip.take_apart(pack, patcher, test_unzip.task(pack, steps=STEPS, learning_rate=1e-2))
    made = {f"{c} {k}": t for c, source in done.pair.by_concept.items() for k, t in source.tensors.items()}
    return made, done.loss_map["loss"], done.report


NODES = {"Train Concept LoRA": _train, "UnZip LoRA": _unzip}


@pytest.fixture(params=NODES)
def node(request, pack):
    """Its run, and what to do at the start of a try's pass: `at(number of the try, step)`."""
    core, tried = pack.ziplora_core.training, SimpleNamespace(number=0, steps=[])
    made = SimpleNamespace(run=NODES[request.param], at=lambda number, step: None, tried=tried)
    rows, network = core.step_rows, pack.nodes.bridge.network.session.with_network

    def watched(pictures, denoiser, settings, step):
        made.at(tried.number, step)
        tried.steps.append(step)
        return rows(pictures, denoiser, settings, step)

    def entered(*given):
        tried.number += 1
        return network(*given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(core, "step_rows", watched)
        patch.setattr(pack.nodes.bridge.network.session, "with_network", entered)
        yield made


def out_of_memory(number, step):
    if (number, step) == (1, FULL):
        raise RuntimeError("out of memory")


def saved_steps(output):  # noqa: F811
    found = []
    for path in (output / "loras").iterdir():
        with safe_open(path, "pt") as file:
            found.append(int(file.metadata()["ss_steps"]))
    return found


def test_the_second_try_ends_where_one_try_would(pack, patcher, output, node):  # noqa: F811
    """The factors, Adam's numbers, UnZip's columns and mergers, the noise: all go on."""
    before = tiny.sample(patcher)
    expected, losses, _ = node.run(pack, patcher)
    steps = node.tried.steps
    node.at, node.tried.number, node.tried.steps = out_of_memory, 0, []
    found, ours, report = node.run(pack, patcher)
    assert node.tried.number == 2
    assert node.tried.steps == steps, "a step was taken twice"
    assert ours == pytest.approx(losses, rel=1e-4) and f"1 to {STEPS}" in report
    assert set(found) == set(expected)
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key].float(), tensor.float(), rtol=2e-3, atol=1e-5, msg=lambda m, k=key: k + m)
    assert torch.equal(tiny.sample(patcher), before)


@pytest.mark.parametrize("room", ["room", "none"])
def test_an_interrupt_of_the_second_try_takes_no_steps_away(pack, patcher, output, node, monkeypatch, room):  # noqa: F811
    """Also where what was done could not be kept beside the model, so that the second try starts anew."""
    import comfy.model_management as management

    def strike(number, step):
        out_of_memory(number, step)
        second.update([step] if number == 2 else [])
        if len(second) > 1:
            management.interrupt_current_processing()

    second: set[int] = set()
    if room == "none":
        monkeypatch.setattr(pack.ziplora_core.standing, "_copy", lambda value: torch.empty(2**62))
    node.at = strike
    with pytest.raises(management.InterruptProcessingException):
        node.run(pack, patcher)
    assert node.tried.number == 2
    assert set(saved_steps(output)) == {FULL + 1 if room == "room" else FULL}
