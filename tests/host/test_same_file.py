"""One LoRA as both content and style is refused before anything long, under whatever names it comes."""

from __future__ import annotations

import pytest
from graphs import Concept, optimised

from devhost.answers import ExecutionFailed, PromptRefused
from devhost.server import ComfyServer

SAYS = "both the content and the style LoRA, so there is nothing to zip; choose the subject's file in content_lora"


def test_the_combos_default_is_refused_when_it_is_queued(server: ComfyServer, content: Concept, style: Concept) -> None:
    graph = optimised(content, style, seed=71)
    folder = server.base / "models" / "loras"
    first = server.put_lora(folder / content.lora, "!first.safetensors")  # whatever other tests have left there
    required = server.object_info("LoadLoRAPair")["input"]["required"]
    defaults = {}
    for name in ("content_lora", "style_lora"):
        kind, options = required[name]
        defaults[name] = (kind if isinstance(kind, list) else options["options"])[0]
    assert set(defaults.values()) == {first}, "a new node no longer names one file twice: this tests nothing"
    graph["pair"]["inputs"] |= defaults
    with pytest.raises(PromptRefused) as caught:
        server.queue(graph)
    (folder / first).unlink()
    assert SAYS in caught.value.messages("pair")


@pytest.mark.parametrize("how", ["copy", "link"])
def test_another_name_for_the_same_numbers_is_refused_too(
    server: ComfyServer, content: Concept, style: Concept, how: str
) -> None:
    folder = server.base / "models" / "loras"
    other = folder / f"{how}.safetensors"
    if how == "link":
        other.symlink_to(folder / content.lora)
    else:
        server.put_lora(folder / content.lora, other.name)
    graph = optimised(content, Concept(other.name, style.prompt, style.picture), seed=72)
    expected = PromptRefused if how == "link" else ExecutionFailed
    with pytest.raises(expected) as caught:
        server.run(graph)
    other.unlink()
    says = caught.value.messages("pair") if how == "link" else caught.value.text
    assert f"'{content.lora}' and '{other.name}' hold the same LoRA" in says and SAYS in says
    if how == "copy":
        assert caught.value.node == "pair" and "checkpoint" not in caught.value.result.outputs
