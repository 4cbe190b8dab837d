"""The text encoders' half of Mix-of-Show's fusion: against least squares on what the host's own encoders see."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import tiny
import torch
from test_text_encoder import with_text_encoder

PROMPTS = {"content": ["a red star", "star"], "style": ["a circle in neon style"]}
STRENGTHS = {"content": 0.7, "style": 1.2}


def sources_of(pack, miniature, **changes):
    loras = pack.nodes.bridge.lora.loras
    files = {c: with_text_encoder(miniature.model, miniature.clip, i) for i, c in enumerate(STRENGTHS, 1)}
    for tensors in files.values():  # of a projection that the miniature's checkpoint lacks: its memory holds anything
        for key in [key for key in tensors if key.startswith("lora_te1_text_projection")]:
            del tensors[key]
    for concept, tensors in changes.items():
        files[concept] = {k: v for k, v in {**files[concept], **tensors}.items() if v is not None}
    return loras.LoRASources({c: loras.LoRASource(c, files[c], STRENGTHS[c]) for c in STRENGTHS})


def fuse(pack, miniature, sources, prompts=PROMPTS):
    with torch.inference_mode():
        return pack.nodes.bridge.text_fusion.fuse(miniature.clip, sources, prompts)


def loaded(clip, *sources):
    """Text encoders as stock loaders leave them."""
    import comfy.sd

    for source in sources:
        clip = comfy.sd.load_lora_for_models(None, clip, source.tensors, 0, source.strength)[1]
    return clip


def weights(clip) -> dict[str, torch.Tensor]:
    clip.load_model()
    state = {k: v.detach().clone().float() for k, v in clip.cond_stage_model.state_dict().items() if v.ndim == 2}
    return state


def seen_by_hooks(clip, texts) -> dict[str, torch.Tensor]:
    """Up to the end of each text, by the tokens of the host's own tokenizers."""
    found: dict[str, list[torch.Tensor]] = {}
    for text in texts:
        tokens = clip.tokenize(text)
        length = {}
        for kind, (batch,) in tokens.items():
            ids = [token for token, _ in batch]
            length[kind] = 1 + ids.index(getattr(clip.tokenizer, f"clip_{kind}").end_token)

        def note(name, x, length=length):
            own = x[0, : length[name.split(".")[0][-1]]] if x.ndim == 3 else x[:1]
            found.setdefault(name, []).append(own.clone())

        hooks = [
            module.register_forward_pre_hook(lambda _, given, name=name: note(f"{name}.weight", given[0]))
            for name, module in clip.cond_stage_model.named_modules()
            if isinstance(module, torch.nn.Linear)
        ]
        with torch.inference_mode():
            clip.encode_from_tokens_scheduled(tokens)
        for hook in hooks:
            hook.remove()
    return {name: torch.cat(rows).double() for name, rows in found.items()}


def test_it_is_least_squares_on_what_hooks_see(pack, miniature):
    """From updates as the stock loader writes them, and put on by it; prompts in other weights see the same."""
    sources, clip = sources_of(pack, miniature), miniature.clip
    bare = weights(clip)
    alone = {c: weights(loaded(clip, source)) for c, source in sources.by_concept.items()}
    seen = {c: seen_by_hooks(loaded(clip, source), PROMPTS[c]) for c, source in sources.by_concept.items()}
    done = fuse(pack, miniature, sources)
    ours = weights(loaded(clip, *done.sources.by_concept.values()))
    on_clip = weights(done.clip)
    moved, compared = 0.0, 0
    for name in done.errors:
        x = {c: of[name] for c, of in seen.items()}
        updates = {c: (alone[c][name] - bare[name]).double() for c in x}
        moments = {c: of.T @ of / len(of) for c, of in x.items()}
        whole = sum(moments.values())
        whole += pack.ziplora_core.fusion.RIDGE * whole.trace() / len(whole) * torch.eye(len(whole)).double()
        expected = torch.linalg.solve(whole, sum(updates[c] @ m for c, m in moments.items()).T).T
        found = (ours[name] - bare[name]).double()
        assert (found - expected).norm() < 2e-3 * expected.norm(), name
        torch.testing.assert_close(on_clip[name], ours[name])
        moved = max(moved, float((expected - sum(updates.values())).norm() / expected.norm()))
        compared += 1
    assert compared > 20 and moved > 0.1, "near the sum the comparison shows little"
    assert {name.split(".")[0] for name in done.errors} == {"clip_l", "clip_g"}
    weighted = fuse(pack, miniature, sources, {**PROMPTS, "content": ["a red (star:1.3)", "(star:0.8)"]})
    for concept, source in done.sources.by_concept.items():
        for key, tensor in source.tensors.items():
            torch.testing.assert_close(weighted.sources[concept].tensors[key], tensor, rtol=1e-3, atol=1e-4)


def test_a_lora_alone_reads_its_prompts_as_before(pack, miniature):
    """By other downs, which do nothing for what its prompts do not show."""
    sources, clip = sources_of(pack, miniature), miniature.clip
    alone = pack.nodes.bridge.lora.loras.LoRASources({"content": sources["content"]})
    done = fuse(pack, miniature, alone, {"content": ["a red star"]})

    def said(encoder, text="a red star"):
        with torch.inference_mode():
            return encoder.encode_from_tokens_scheduled(encoder.tokenize(text))[0][0][0, :5]

    own, bare, ours = (said(one) for one in (loaded(clip, sources["content"]), clip, done.clip))
    assert (ours - own).norm() < 0.02 * (own - bare).norm()
    other = [said(one, "neon house") for one in (loaded(clip, sources["content"]), done.clip)]
    assert (other[0] - other[1]).norm() > 0.1 * other[0].norm()


def test_compared_alone_and_stacked_each_file_has_its_own_half(pack, miniature):
    """Also once the strengths are turned, and fused twice; the zip has the fused ones."""
    bridge, sources, clip = pack.nodes.bridge, sources_of(pack, miniature), miniature.clip
    own = [*sources.by_concept.values()]
    done = fuse(pack, miniature, fuse(pack, miniature, sources).sources)
    turned = {c: of.times(2.0) for c, of in done.sources.by_concept.items()}
    for given, files in ((done.sources.by_concept, own), (turned, [of.times(2.0) for of in own])):
        with torch.inference_mode():
            zipped = bridge.direct.merge(miniature.model, pack.nodes.bridge.lora.loras.LoRASources(given), "sum")
            found = [column.put(miniature.model, clip)[1] for column in bridge.compare.columns(zipped, [1.0])]
        stacked, fused = loaded(clip, *files), loaded(clip, *given.values())
        expected = [*(loaded(clip, one) for one in files), stacked, fused]
        for ours, theirs in zip(found, expected, strict=True):
            wanted = weights(theirs)
            for name, weight in weights(ours).items():  # the host leaves CLIP-L's projection as memory was: maybe NaN
                torch.testing.assert_close(weight, wanted[name], rtol=0, atol=0, equal_nan=True, msg=name)
        name = next(iter(done.errors))
        assert not torch.equal(weights(stacked)[name], weights(fused)[name])


def test_nothing_that_came_in_is_changed(pack, miniature):
    sources, model = sources_of(pack, miniature), miniature.clip.cond_stage_model
    tensors = {c: {k: v.clone() for k, v in of.tensors.items()} for c, of in sources.by_concept.items()}
    before = weights(miniature.clip)
    done = fuse(pack, miniature, sources)
    after = weights(miniature.clip)
    assert all(torch.equal(after[k].nan_to_num(), v.nan_to_num()) for k, v in before.items())
    assert not any(module._forward_pre_hooks for module in model.modules()) and miniature.clip.patcher.patches == {}
    for concept, of in sources.by_concept.items():
        assert all(torch.equal(of.tensors[k], v) for k, v in tensors[concept].items())
        unet = {k for k in of.tensors if not k.startswith("lora_te")}
        assert all(done.sources[concept].tensors[k] is of.tensors[k] for k in unet)
        assert done.sources[concept].sha256 is None is done.sources[concept].version


def test_a_layer_that_is_no_plain_lora_stays_as_it_is(pack, miniature):
    name = "lora_te1_text_model_encoder_layers_0_mlp_fc1"
    key = "clip_l.transformer.text_model.encoder.layers.0.mlp.fc1.weight"
    shape = miniature.clip.cond_stage_model.state_dict()[key].shape
    changes = {f"{name}.diff": torch.ones(shape), f"{name}.lora_up.weight": None, f"{name}.lora_down.weight": None}
    sources = sources_of(pack, miniature, content=changes)
    done = fuse(pack, miniature, sources)
    assert key not in done.errors and "1 text-encoder layers are added as they are" in "\n".join(done.lines())
    assert torch.equal(done.sources["content"].tensors[f"{name}.diff"], torch.ones(shape))
    down = f"{name}.lora_down.weight"
    assert torch.equal(done.sources["style"].tensors[down], sources["style"].tensors[down])


def test_loras_without_a_text_encoders_half_are_refused(pack, miniature):
    with pytest.raises(ValueError, match="has a text-encoder part of low rank for this clip"):
        fuse(pack, miniature, tiny.sources(pack, miniature.model.model))


def test_the_node_fuses_what_its_lines_say(pack, miniature):
    sources = sources_of(pack, miniature)
    text = "a red star // star\n\na circle in neon style"
    with torch.inference_mode():
        pair, clip, report = pack.nodes.FuseTextEncoders.execute(miniature.clip, sources, text).args
    done = fuse(pack, miniature, sources)
    for concept, source in done.sources.by_concept.items():
        assert all(torch.equal(pair[concept].tensors[key], tensor) for key, tensor in source.tensors.items())
    assert f"{len(done.errors)} text-encoder layers fused" in report and clip is not miniature.clip
    (note,) = pair["style"].notes
    assert "'style' is fused" in note


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a star", "prompts has 1 lines and there are 2 LoRAs"),
        ("a star\n // ", "the line of 'style' in prompts says nothing"),
        ("a star\na \ud800", "prompts holds half a character"),
        ("a star\na embedding:gone house", r"prompts: not every embedding.*was found \(0 of 1\)"),
    ],
)
def test_lines_are_refused(pack, miniature, text, says):
    with pytest.raises(ValueError, match=says):
        pack.nodes.FuseTextEncoders.execute(miniature.clip, sources_of(pack, miniature), text)


def test_a_clip_that_has_the_loras_already_is_refused(pack, miniature):
    """As behind LoRA loaders: their text-encoder parts would count twice. One of the two may be meant."""
    sources = sources_of(pack, miniature)
    both = SimpleNamespace(clip=loaded(miniature.clip, *sources.by_concept.values()))
    with pytest.raises(ValueError, match="has 'content' and 'style' on it already, by LoRA loaders"):
        fuse(pack, both, sources)
    fuse(pack, SimpleNamespace(clip=loaded(miniature.clip, sources["style"])), sources)
