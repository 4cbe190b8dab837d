"""Compare Merges draws bit for bit what its user would get of the stock nodes, and changes nothing that came in."""

from __future__ import annotations

import re

import pytest
import torch
from test_apply import largest_difference, weights
from test_zip import DRAWN, WORDS, file, folder  # noqa: F401

OTHER = "an octopus on the left in chalk style"
HOW = {"seed": 11, "steps": 3, "cfg": 3.0, "sampler_name": "euler_ancestral", "scheduler": "karras"}
STRENGTHS = {"te_octopus": 0.9, "te_chalk": 1.1, "gilded": 0.7}


def merged(pack, miniature, *, three: bool = False, roles: str = "subject, style"):
    """A zip of files of which two have text-encoder parts, without a pass of the model."""
    names = list(STRENGTHS)[: 2 + three]
    halved = {"te_chalk": 2}
    stack = [(file(name), STRENGTHS[name], STRENGTHS[name] / halved.get(name, 1)) for name in names]
    sources = pack.nodes.LoadLoRAStack.execute(stack, roles).args[0]
    method = "shared columns"
    return pack.nodes.DirectMergeLoRA.execute(miniature.model, sources, method).args[0], stack


def stock(model, clip, vae, prompt: str, width: int, height: int) -> torch.Tensor:
    """One picture by the nodes that a user would have."""
    import nodes

    positive, negative = (nodes.CLIPTextEncode().encode(clip, text)[0] for text in (prompt, "a tree"))
    empty = nodes.EmptyLatentImage().generate(width, height, 1)[0]
    how = [HOW[name] for name in ("seed", "steps", "cfg", "sampler_name", "scheduler")]
    sampled = nodes.KSampler().sample(model, *how, positive, negative, empty, 1.0)[0]
    return nodes.VAEDecode().decode(vae, sampled)[0]


def loaded(miniature, stack):
    """(model, clip) of Load LoRA nodes in a row."""
    import nodes

    model, clip = miniature.model, miniature.clip
    for entry in stack:
        model, clip = nodes.LoraLoader().load_lora(model, clip, *entry)
    return model, clip


def compare(pack, miniature, zipped, **changed):
    given = {"prompts": f"{DRAWN}\n\n {OTHER}", "negative": "a tree", "dials": "0.5, 1", "width": 96, "height": 64}
    return pack.nodes.CompareMerges.execute(
        miniature.model, miniature.clip, miniature.vae, zipped, **{**given, **HOW, **changed}
    )


@pytest.mark.parametrize("three", [False, True], ids=["two", "three"])
def test_each_picture_is_that_of_the_stock_nodes(pack, miniature, folder, three):  # noqa: F811
    """Alone, stacked and zipped at a dial, under two prompts, and an ancestral sampler, whose noise is of a batch."""
    nodes = pack.nodes
    with torch.inference_mode():
        before = weights(miniature.model), miniature.clip.encode_from_tokens(miniature.clip.tokenize(DRAWN))
        zipped, stack = merged(pack, miniature, three=three)
        strip, pictures = compare(pack, miniature, zipped).args
        variants = [loaded(miniature, [entry]) for entry in stack] + [loaded(miniature, stack)]
        for dial in (0.5, 1.0):
            turned = nodes.StyleStrength.execute(zipped, dial, 1.0).args[0]
            variants.append(nodes.ApplyZippedLoRA.execute(miniature.model, turned, 1.0, miniature.clip).args)
        expected = [stock(*variant, miniature.vae, prompt, 96, 64) for prompt in (DRAWN, OTHER) for variant in variants]
    assert pictures.shape == (2 * len(variants), 64, 96, 3)
    for place, theirs in enumerate(expected):
        assert torch.equal(pictures[place : place + 1], theirs), place
        assert all((pictures[other] - theirs[0]).abs().max() > 0.01 for other in range(place)), "two of them are one"
    assert strip.shape[0] == 1 and strip.shape[-1] == 3 and float(strip.min()) >= 0 and float(strip.max()) <= 1
    assert miniature.model.patches == {} and miniature.clip.patcher.patches == {}
    assert largest_difference(weights(miniature.model), before[0]) == 0
    assert torch.equal(miniature.clip.encode_from_tokens(miniature.clip.tokenize(DRAWN)), before[1])


def headings(pack, zipped, *dials: float) -> list[str]:
    return [column.heading for column in pack.nodes.bridge.compare.columns(zipped, dials)]


def test_columns_say_what_they_are(pack, miniature, folder):  # noqa: F811
    with torch.inference_mode():
        pair, _ = merged(pack, miniature)
        three, _ = merged(pack, miniature, three=True)
        styles, _ = merged(pack, miniature, three=True, roles="subject, style, style")
        others, _ = merged(pack, miniature, roles="other, other")
        one = pack.nodes.LoadLoRAStack.execute([(file("gilded"), 1, 1)], "style").args[0]
        alone = pack.nodes.DirectMergeLoRA.execute(miniature.model, one, "shared columns").args[0]
    assert headings(pack, pair, 0.5, 1) == [
        "te_octopus",
        "te_chalk",
        "stacked",
        "zipped, style 0.5",
        "zipped, style 1",
    ]
    assert headings(pack, three, 1)[:4] == ["te_octopus", "te_chalk", "gilded", "stacked"]
    assert headings(pack, pair.dialled({"style": 1.2}), 0.5)[-1] == "zipped, style 0.6"
    assert headings(pack, styles, 0.5)[-1] == "zipped, style 0.5"
    assert headings(pack, styles.dialled({"style 2": 2.0}), 0.5)[-1] == "zipped, styles times 0.5"
    assert headings(pack, others, 0.5)[-1] == "zipped, strength 0.5"
    assert headings(pack, alone, 1) == ["gilded", "zipped, style 1"], "one LoRA alone is its own stack"


def test_several_styles_and_none_are_dialled_as_the_tooltip_says(pack, miniature, folder):  # noqa: F811
    columns, nodes = pack.nodes.bridge.compare.columns, pack.nodes
    with torch.inference_mode():
        styles, _ = merged(pack, miniature, three=True, roles="subject, style, style")
        others, _ = merged(pack, miniature, roles="other, other")
        turned = nodes.StyleStrength.execute(styles, 0.4, 1.0).args[0]
        for zipped, theirs in ((styles, (turned, 1.0)), (others, (others, 0.4))):
            ours = weights(columns(zipped, [0.4])[-1].put(miniature.model, miniature.clip)[0])
            expected = weights(nodes.ApplyZippedLoRA.execute(miniature.model, *theirs, miniature.clip).args[0])
            assert largest_difference(ours, expected) == 0
            assert largest_difference(ours, weights(miniature.model)) > 1e-3


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"prompts": " \n\n"}, "^prompts is empty; write what to draw"),
        ({"prompts": "a\n" * 65}, "^prompts: 65 lines are too many rows"),
        ({"prompts": "a\nhalf \ud800"}, "^prompts: line 2 holds half a character"),
        ({"negative": "half \ud800"}, "^negative holds half a character"),
        ({"dials": "0.5, x"}, "^dials: 'x' is no number"),
        ({"dials": "nan"}, "^dials: 'nan' is no number"),
        ({"dials": "1e9"}, "^dials is 1000000000.0; expected a number from -100 to 100"),
        ({"dials": " , "}, "^dials is empty"),
        ({"dials": ", ".join(map(str, range(22)))}, "^dials: 22 numbers beside 3 columns of 2 LoRAs are too many"),
        ({"dials": " ".join(map(str, range(25)))}, "^dials: 25 numbers are too many columns"),
        ({"steps": 0}, "^steps is 0"),
        ({"cfg": float("nan")}, "^cfg is nan"),
        ({"sampler_name": "pen"}, "^sampler_name is 'pen'; expected one of"),
        ({"width": 8}, "^width is 8"),
        ({"seed": -1}, "^seed is -1"),
    ],
)
def test_what_cannot_be_drawn_is_refused_before_work(pack, miniature, folder, monkeypatch, changed, says):  # noqa: F811
    monkeypatch.setattr(pack.nodes.bridge.compare, "_encoded", lambda *_: pytest.fail("work has begun"))
    zipped, _ = merged(pack, miniature)
    with pytest.raises(ValueError, match=says):
        compare(pack, miniature, zipped, **changed)


def test_words_are_refused_before_anything_is_loaded(pack):
    """When a graph is queued, and where another node makes the words, before the sockets' nodes run."""
    node = pack.nodes.CompareMerges
    assert node.validate_inputs("a", "", "1") is True and node.validate_inputs(None, None, None) is True
    assert node.validate_inputs("a", "", "x").startswith("dials: 'x' is no number")
    sockets = {"model": None, "clip": None, "vae": None, "zipped_lora": None}
    assert node.check_lazy_status(prompts="a", negative="", dials="1", seed=0, **sockets) == list(sockets)
    with pytest.raises(ValueError, match="prompts is empty"):
        node.check_lazy_status(prompts="", negative="", dials="1", **sockets)


def test_sockets_of_something_else_are_named_before_work(pack, miniature, folder, monkeypatch):  # noqa: F811
    bridge = pack.nodes.bridge.compare
    monkeypatch.setattr(bridge, "_encoded", lambda *_: pytest.fail("work has begun"))
    zipped, _ = merged(pack, miniature)
    once = pack.nodes.ApplyZippedLoRA.execute(miniature.model, zipped.dialled({"style": 0.3}), 1.0).args[0]
    with pytest.raises(ValueError, match="^model carries the zip already"):
        compare(pack, miniature._replace(model=once), zipped)
    with pytest.raises(ValueError, match="^vae is not connected"):
        compare(pack, miniature._replace(vae=None), zipped)
    monkeypatch.setattr(miniature.vae, "latent_channels", 16)
    with pytest.raises(ValueError, match="^vae takes latents of 16 channels, this model draws"):
        compare(pack, miniature, zipped)


def test_one_bar_over_all_pictures(pack, miniature, folder, monkeypatch):  # noqa: F811
    """Every step of every picture moves it; it never falls and is full at the end only."""
    import comfy.utils

    seen, said, given, send = [], [], [], comfy.utils.ProgressBar.update_absolute
    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", lambda value, total, *_, **__: seen.append((value, total)))

    def update(bar, value, *more):  # newer hosts hand on a few of them a second
        given.append(value)
        send(bar, value, *more)

    monkeypatch.setattr(comfy.utils.ProgressBar, "update_absolute", update)
    monkeypatch.setattr(pack.nodes.bridge.progress.bar, "tell", said.append)
    with torch.inference_mode():
        zipped, _ = merged(pack, miniature)
        pictures = compare(pack, miniature, zipped).args[1]
    values = [value for value, _ in seen]
    assert values == sorted(values) and {total for _, total in seen} == {1000}
    assert values.count(1000) == 1 and values[-1] == 1000
    assert set(values) <= set(given) and len(set(given)) >= len(pictures) * HOW["steps"]
    assert any(re.match(r"drawing '.+', picture \d+ of 10", text) for text in said), said


def test_an_interrupt_ends_it_within_a_step(pack, miniature, folder):  # noqa: F811
    import comfy.model_management as management

    calls = []

    def strike(*_):
        calls.append(1)
        if len(calls) == 5:
            management.interrupt_current_processing()

    zipped, _ = merged(pack, miniature)
    handle = miniature.model.model.diffusion_model.register_forward_pre_hook(strike)
    with torch.inference_mode(), pytest.raises(management.InterruptProcessingException):
        compare(pack, miniature, zipped)
    handle.remove()
    assert len(calls) <= 6, "at most the rest of the step that it was in"
    assert miniature.model.patches == {}
    with torch.inference_mode():
        assert len(compare(pack, miniature, zipped, prompts=DRAWN, dials="1").args[1]) == 4, "the next run works"


def test_a_strip_shortens_what_is_too_long_and_ends_where_webp_does(pack):
    """Nothing is written over another column, and no side is longer than a browser's preview can be."""
    sheet = pack.nodes.sheet
    plain = torch.full((4, 64, 64, 3), 0.5)
    strip = sheet.strip(["x" * 500, "b"], ["word " * 500, "c"], plain)
    assert strip.shape[1:] == (50 + 2 * (50 + 512 + 8), 8 + 2 * (512 + 8), 3)
    ink = (strip[0] < 0.45).any(-1)
    assert ink[:50, 8:520].any() and not ink[:50, 520:528].any()
    assert ink[50:100].any() and not ink[:, -8:].any()
    for columns, rows in ((24, 1), (1, 64)):
        strip = sheet.strip(["a"] * columns, ["b"] * rows, plain[:1].expand(columns * rows, -1, -1, -1))
        assert max(strip.shape) <= 16_000
    short = pack.nodes.bridge.progress.lettering.shortened
    font = pack.nodes.bridge.progress.lettering.font(22)
    assert short("a sks dog", 400, font) == "a sks dog"
    cut = short("a sks dog in szn style, riding a bicycle", 200, font)
    assert cut.endswith("...") and "a sks dog".startswith(cut[:9]) and font.getlength(cut) <= 200
