"""The report's picture: what is on it, read back from its pixels."""

from __future__ import annotations

import sys

import pytest
import tiny
import torch


def colour(name: str) -> torch.Tensor:
    return torch.tensor([int(name[i : i + 2], 16) / 255 for i in (1, 3, 5)])


def shows(picture: torch.Tensor, name: str) -> bool:
    return bool(((picture - colour(name)).abs().amax(-1) < 0.02).sum() > 50)


@pytest.fixture(scope="module")
def zipped(pack):
    patcher = tiny.tiny_patcher()
    settings = pack.ziplora_core.solver.Settings(steps=3, solver="layerwise, then gradient")
    with torch.inference_mode():
        return pack.nodes.bridge.optimize.zipping.optimize(
            patcher, tiny.sources(pack, patcher.model), tiny.prompts(), tiny.latents(), settings
        )[:2]


def draw(pack, zipped, losses, apart):
    figures = pack.nodes.report.draw.__globals__
    subject = figures["Subject"](zipped.fitted.loras, zipped.coefficients, losses)
    with torch.inference_mode():
        return figures["draw"](subject, apart)


def test_one_picture_holds_every_panel(pack, zipped):
    image = draw(pack, *zipped, apart=False)
    assert image.shape[0] == 1 and image.shape[3] == 3 and image.dtype == torch.float32
    assert 0 <= image.min() and image.max() <= 1 and min(image.shape[1:3]) > 1000
    figures = pack.nodes.report.draw.__globals__
    for name in ("CONTENT", "STYLE", "BOTH", "INK"):
        assert shows(image[0], figures[name]), name
    corner = image[0, :5, :5].reshape(-1, 3)
    assert (corner - colour(figures["GROUND"])).abs().max() < 0.01


def test_panels_apart_are_a_batch(pack, zipped):
    figures = pack.nodes.report.draw.__globals__
    images = draw(pack, *zipped, apart=True)
    assert len(images) == len(figures["PANELS"]) == 5
    assert len({tuple(image.flatten()[::997].tolist()) for image in images}) == 5
    without = draw(pack, zipped[0], None, apart=True)
    same = [torch.equal(a, b) for a, b in zip(images, without, strict=True)]
    assert same == [True, True, False, True, True], "only the losses come from the loss map"


def test_a_solver_without_steps_and_a_single_lora_are_drawn_too(pack, zipped):
    pair = zipped[0].fitted.loras
    left = draw(pack, zipped[0], {"loss": [0.5, 0.2], "left": [0.5, 0.2]}, apart=True)
    assert not torch.equal(left[2], draw(pack, zipped[0], {"loss": []}, apart=True)[2])
    sets, coefficients = pack.ziplora_core.lora_set, pack.ziplora_core.coefficients
    alone = sets.LoRASet(pair.concepts, {k: {"content": v["content"]} for k, v in pair.layers.items()})
    figures = pack.nodes.report.draw.__globals__
    subject = figures["Subject"](alone, coefficients.Coefficients.ones(alone), None)
    assert len(figures["draw"](subject, True)) == 5


def many(pack, count: int, shared: bool = True):
    """A subject for the figures: this many random LoRAs, of one layer or of one each."""
    core, figures = pack.ziplora_core, pack.nodes.report.draw.__globals__
    g = torch.Generator().manual_seed(0)
    names = tuple(f"other {i}" for i in range(count))
    factors = {n: core.lora_set.Factors(*(torch.randn(s, generator=g) for s in ((16, 2), (2, 16)))) for n in names}
    layers = {"all": factors} if shared else {n: {n: f} for n, f in factors.items()}
    loras = core.lora_set.LoRASet(names, layers)
    return figures["Subject"](loras, core.coefficients.Coefficients.ones(loras), None), figures


@pytest.mark.parametrize("count", [2, 3, 9])
def test_a_legend_of_many_stands_beside_its_panel(pack, count):
    """Where its lines would hide the curves; all of it is on the picture."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    subject, figures = many(pack, count)
    for panel in ("elements", "histogram", "ownership"):
        figure = Figure(figsize=figures["_PANEL"], layout="constrained")
        canvas = FigureCanvasAgg(figure)
        axes = figure.subplots()
        figures[panel](axes, subject)
        canvas.draw()
        legend, plot = axes.get_legend().get_window_extent(), axes.get_window_extent()
        beside = len(axes.get_legend_handles_labels()[0]) > 4
        assert (legend.x0 >= plot.x1) == beside, panel
        assert 0 <= legend.x0 and legend.x1 <= figure.bbox.x1 and 0 <= legend.y0 and legend.y1 <= figure.bbox.y1
        assert plot.width > 0.4 * figure.bbox.width


@pytest.mark.parametrize(
    ("count", "says"),
    [
        (1, "one LoRA alone: there is no other to share a layer with"),
        (2, "no layer is changed by both LoRAs"),
        (3, "no layer is changed by two of the LoRAs"),
    ],
)
def test_what_is_not_shared_is_said_by_its_number(pack, count, says):
    from matplotlib.figure import Figure

    subject, figures = many(pack, count, shared=False)
    for panel in ("interference", "ownership"):
        axes = Figure().subplots()
        figures[panel](axes, subject)
        assert [text.get_text() for text in axes.texts] == [says]
    assert len(figures["draw"](subject, True)) == 5


def test_the_loss_map_is_the_losses(pack, zipped):
    losses = zipped[1]
    assert set(losses) == {"loss", "content", "style", "overlap"} and len(losses["loss"]) == 3
    for total, *terms in zip(*(losses[k] for k in ("loss", "content", "style", "overlap")), strict=True):
        assert total == pytest.approx(sum(terms))


def test_interference_of_the_miniatures_loras_is_the_dense_one(pack, miniature, lora_files):
    """The panel's numbers, before and after, against whole columns in float64."""
    from safetensors.torch import load_file

    loras, analysis = pack.nodes.bridge.lora.loras, pack.ziplora_core.analysis
    files = {concept: load_file(lora_files[name]) for concept, name in (("content", "octopus"), ("style", "chalk"))}
    sources = loras.LoRASources(tiny.of_two(*(loras.LoRASource(c, file, 1.0) for c, file in files.items())))
    pair = pack.nodes.bridge.lora.fitting.fit(sources, miniature.model.model).loras
    ones = pack.ziplora_core.coefficients.Coefficients.ones(pair)
    g = torch.Generator().manual_seed(0)
    wild = {c: {k: torch.randn(m.shape, generator=g) for k, m in ones[c].items()} for c in files}
    for coefficients in (ones, type(ones)(wild)):
        found = analysis.column_interference(pair, coefficients)
        assert len(found) == 56
        for name, layer in pair.layers.items():
            columns = [f.scale * f.up.double() @ f.down.double() for _, f in layer.items()]
            cosines = torch.nn.functional.cosine_similarity(*columns, dim=0, eps=0)
            weights = coefficients["content"][name].double() * coefficients["style"][name].double()
            assert found[name] == pytest.approx((cosines * weights).abs().mean().item(), rel=1e-6)


def test_without_matplotlib_it_says_what_to_do(pack, zipped, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        draw(pack, *zipped, apart=False)


def losses_panel(pack, losses):
    """(title, label of x, labels of the curves, the curves' x) of the panel for a loss map."""
    from matplotlib.figure import Figure

    figures = pack.nodes.report.draw.__globals__
    axes = Figure().subplots()
    pair = pack.ziplora_core.lora_set.LoRASet(("content", "style"), {})
    figures["losses"](axes, figures["Subject"](pair, None, losses))
    lines = axes.get_lines()
    return axes.get_title(loc="left"), axes.get_xlabel(), [c.get_label() for c in lines], list(lines[0].get_xdata())


@pytest.mark.parametrize("merged", [False, True])
def test_the_losses_of_training_are_not_called_errors_of_layers(pack, merged):
    """As Train Concept LoRA and UnZip LoRA hand them on, of a run that went on from step 7."""
    run = pack.nodes.bridge.training.run.Run(7)
    run.history += [pack.ziplora_core.training.Step(8 + i, 9, 0.5 - 0.1 * i, 0.2) for i in range(2)]
    known = run.loss_map() | ({"overlap": [step.penalty for step in run.history]} if merged else {})
    curves = ["training loss", *(["overlap x lambda"] if merged else [])]
    assert losses_panel(pack, known) == ("Training loss over the steps", "step", curves, [8.0, 9.0])


def test_every_other_loss_map_has_its_own_title(pack, zipped):
    assert losses_panel(pack, zipped[1])[:3] == (
        "Losses over the steps",
        "step",
        ["content", "style", "overlap x lambda"],
    )
    patcher = tiny.tiny_patcher()
    settings = pack.ziplora_core.solver.Settings(solver="layerwise")
    with torch.inference_mode():
        layerwise = pack.nodes.bridge.optimize.zipping.optimize(
            patcher, tiny.sources(pack, patcher.model), tiny.prompts(), tiny.latents(), settings
        )[1]
    assert losses_panel(pack, layerwise)[:2] == ("What is left of each layer's error", "layer")
    assert losses_panel(pack, {"loss": [1.0, 0.5]})[0] == "Training loss over the steps", "the host's own Train LoRA"
