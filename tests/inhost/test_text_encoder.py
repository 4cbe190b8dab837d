"""Text-encoder parts are merged directly and applied to `clip`, as the stock loader applies them."""

from __future__ import annotations

import tiny
import torch


def with_text_encoder(patcher, clip, seed: int) -> dict[str, torch.Tensor]:
    import comfy.lora

    lora = tiny.full_size.attention_lora(patcher.model, 2, seed, torch.float32)
    g = torch.Generator().manual_seed(seed)
    state = clip.cond_stage_model.state_dict()
    for name, key in comfy.lora.model_lora_keys_clip(clip.cond_stage_model, {}).items():
        if name.startswith(("lora_te1_", "lora_te2_")) and state[key].ndim == 2:
            out, columns = state[key].shape
            lora[f"{name}.lora_up.weight"] = torch.randn(out, 2, generator=g) * 0.3
            lora[f"{name}.lora_down.weight"] = torch.randn(2, columns, generator=g) * 0.3
    return lora


def test_applied_to_clip_as_the_stock_loader_does(pack, miniature):
    import comfy.sd

    patcher, clip = miniature.model, miniature.clip
    lora, Coefficients = pack.nodes.bridge.lora, pack.ziplora_core.coefficients.Coefficients
    files = [with_text_encoder(patcher, clip, seed) for seed in (1, 2)]
    assert any(k.startswith("lora_te2_") for k in files[0])
    sources = lora.loras.LoRASources(
        tiny.of_two(lora.loras.LoRASource("content", files[0], 0.7), lora.loras.LoRASource("style", files[1], 1.2))
    )
    fitted = pack.nodes.bridge.lora.fitting.fit(sources, patcher.model)
    assert fitted.notes == [], "text-encoder tensors are used, not reported as unused"
    zipped = lora.zipped.ZippedLoRA(sources, fitted, Coefficients.ones(fitted.loras))

    def encoded(text_encoder) -> torch.Tensor:
        with torch.inference_mode():
            return text_encoder.encode_from_tokens(text_encoder.tokenize("a red star in neon style")).clone()

    bare = encoded(clip)
    _, ours = pack.nodes.bridge.apply.apply(patcher, clip, zipped, 0.5)
    theirs = clip
    for source in (sources["content"], sources["style"]):
        _, theirs = comfy.sd.load_lora_for_models(patcher, theirs, source.tensors, 0, 0.5 * source.strength)
    assert not torch.allclose(encoded(theirs), bare, atol=1e-3), "the LoRAs change nothing: this tests nothing"
    torch.testing.assert_close(encoded(ours), encoded(theirs))
    torch.testing.assert_close(encoded(clip), bare)


def test_a_layer_under_two_names_is_exported_as_the_one_that_the_host_takes(pack, miniature):
    import comfy.lora

    patcher, clip = miniature.model, miniature.clip
    lora, Coefficients = pack.nodes.bridge.lora, pack.ziplora_core.coefficients.Coefficients
    kohya = "lora_te1_text_model_encoder_layers_0_mlp_fc1"
    names = (kohya, "text_encoder.text_model.encoder.layers.0.mlp.fc1", "base_model.model.text_encoder.text_model")
    known = comfy.lora.model_lora_keys_clip(clip.cond_stage_model, {})
    out, columns = clip.cond_stage_model.state_dict()[known[kohya]].shape
    for order in (names, names[::-1]):
        file = tiny.full_size.attention_lora(patcher.model, 2, 1, torch.float32)
        for name in order:
            full = name.replace("text_model", "text_model.encoder.layers.0.mlp.fc1") if "base" in name else name
            file[f"{full}.lora_up.weight"] = torch.full((out, 1), 1.0 + names.index(name))
            file[f"{full}.lora_down.weight"] = torch.ones(1, columns)
        (patch,) = comfy.lora.load_lora(file, known, log_missing=False).values()
        other = tiny.full_size.attention_lora(patcher.model, 2, 2, torch.float32)
        sources = lora.loras.LoRASources(
            tiny.of_two(lora.loras.LoRASource("content", file, 1.0), lora.loras.LoRASource("style", other, 1.0))
        )
        fitted = pack.nodes.bridge.lora.fitting.fit(sources, patcher.model)
        zipped = lora.zipped.ZippedLoRA(sources, fitted, Coefficients.ones(fitted.loras))
        tensors = pack.nodes.bridge.export.export_tensors(zipped, 0, "fp32", "kohya").tensors
        delta = tensors[f"{kohya}.lora_up.weight"] @ tensors[f"{kohya}.lora_down.weight"]
        torch.testing.assert_close(delta, patch.weights[0] @ patch.weights[1])


def test_report_and_apply_say_where_a_text_encoder_part_is_left_out(pack, miniature, caplog):
    """Only of the file that has one; not where clip is connected, nor where its LoRA is dialled to nothing."""
    import comfy.lora

    patcher, clip, bridge = miniature.model, miniature.clip, pack.nodes.bridge
    lora, core = bridge.lora, pack.ziplora_core
    rich = with_text_encoder(patcher, clip, 1)
    plain = {k: v for k, v in with_text_encoder(patcher, clip, 2).items() if not k.startswith("lora_te")}
    sources = lora.loras.LoRASources(
        tiny.of_two(
            lora.loras.LoRASource("rich.safetensors", rich, 1.0), lora.loras.LoRASource("p.safetensors", plain, 1.0)
        )
    )
    fitted = bridge.lora.fitting.fit(sources, patcher.model)
    ones = core.coefficients.Coefficients.ones(fitted.loras)
    known = comfy.lora.load_lora(rich, comfy.lora.model_lora_keys_clip(clip.cond_stage_model, {}), log_missing=False)
    assert (
        len(known)
        == bridge.lora.text_encoders.parts(sources["content"])
        > 0
        == bridge.lora.text_encoders.parts(sources["style"])
    )

    outcome = bridge.optimize.outcome.Outcome(sources, fitted, core.solver.Settings(), ones, core.solver.Result(ones))
    report = bridge.optimize.report.report(outcome)
    assert f"'rich.safetensors' also changes the text encoder ({len(known)} layers)" in report
    assert "a prompt does not tell which text encoder made it" in report and "'p.safetensors' also" not in report

    def warned(connected, **dials) -> bool:
        caplog.clear()
        bridge.apply.apply(patcher, connected, lora.zipped.ZippedLoRA(sources, fitted, ones, dials), 1.0)
        return "clip is not connected: the text-encoder part of 'rich.safetensors' is left out" in caplog.text

    assert warned(None) and not warned(clip) and not warned(None, content=0.0)


def test_nothing_is_said_of_files_without_one(pack, miniature, caplog):
    bridge, core, patcher = pack.nodes.bridge, pack.ziplora_core, miniature.model
    sources = tiny.sources(pack, patcher.model)
    fitted = bridge.lora.fitting.fit(sources, patcher.model)
    ones = core.coefficients.Coefficients.ones(fitted.loras)
    outcome = bridge.optimize.outcome.Outcome(sources, fitted, core.solver.Settings(), ones, core.solver.Result(ones))
    assert "text encoder" not in bridge.optimize.report.report(outcome)
    bridge.apply.apply(patcher, None, bridge.lora.zipped.ZippedLoRA(sources, fitted, ones), 1.0)
    assert "clip is not connected" not in caplog.text


def test_a_name_with_line_breaks_is_one_line_of_what_is_said(pack, miniature):
    """Of both files, though one name were the other's."""
    patcher, clip, bridge = miniature.model, miniature.clip, pack.nodes.bridge
    lora, core = bridge.lora, pack.ziplora_core
    name = "a\u2028b\n.safetensors"
    sources = lora.loras.LoRASources(
        tiny.of_two(*(lora.loras.LoRASource(name, with_text_encoder(patcher, clip, n), 1.0) for n in (1, 2)))
    )
    fitted = bridge.lora.fitting.fit(sources, patcher.model)
    zipped = lora.zipped.ZippedLoRA(sources, fitted, core.coefficients.Coefficients.ones(fitted.loras))
    notes = bridge.lora.text_encoders.notes(sources, zipped=False)
    assert len(notes) == 2 and all(line.isprintable() for line in notes)
    assert bridge.lora.text_encoders.left_out(zipped).isprintable()
    assert str(lora.loras._same_file(name, name)).isprintable()
