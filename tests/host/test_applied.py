"""What ApplyZippedLoRA puts on a model, against the stock LoRA loader."""

from __future__ import annotations

import numpy as np
import pytest
from graphs import BASE, Concept, Prompt, is_whole_run, picture, stock_loader, zipped_picture

from devhost.server import ComfyServer


def two_loaders(content: Concept, style: Concept, strengths: tuple[float, float]) -> Prompt:
    """A picture of both LoRAs, each through a stock loader."""
    return {
        **picture(["style_loader", 0], content.prompt),
        "content_loader": stock_loader(content.lora, BASE, strengths[0]),
        "style_loader": stock_loader(style.lora, ["content_loader", 0], strengths[1]),
    }


def flipped(a: np.ndarray, b: np.ndarray) -> tuple[int, float]:
    """Largest difference of two 8-bit pictures, and the share of values that differ."""
    difference = np.abs(a.astype(int) - b.astype(int))
    return int(difference.max()), float((difference > 0).mean())


@pytest.mark.parametrize("strengths", [(1.0, 1.0), (0.8, 1.2)])
def test_no_steps_draw_what_two_stock_loaders_draw(
    server: ComfyServer, content: Concept, style: Concept, strengths: tuple[float, float]
) -> None:
    bare = server.run(picture(BASE, content.prompt)).images("save")[0]
    stock = server.run(two_loaders(content, style, strengths)).images("save")[0]
    settings = {"steps": 0, "content_strength": strengths[0], "style_strength": strengths[1]}
    result = server.run(zipped_picture(content, style, **settings))
    ours = result.images("save")[0]
    assert flipped(bare, stock)[1] > 0.1, "the LoRAs changed nothing, so the comparison shows nothing"
    # One LoRA of rank r_c + r_s against two of rank r: float32 sums in another order may flip a rounding.
    largest, share = flipped(ours, stock)
    assert largest <= 1 and share < 1e-3
    assert result.progress("optimise") == []


def test_another_lora_on_the_model_stays_on_it(server: ComfyServer, content: Concept, style: Concept) -> None:
    """Zipped on top of a stock loader with no steps: what three stock loaders draw; and optimising there works."""
    other = {"other": stock_loader(style.lora, BASE, 0.3)}
    three = {
        **picture(["style_loader", 0], content.prompt),
        **other,
        "content_loader": stock_loader(content.lora, ["other", 0]),
        "style_loader": stock_loader(style.lora, ["content_loader", 0]),
    }
    stock = server.run(three).images("save")[0]
    direct = server.run({**zipped_picture(content, style, ["other", 0], steps=0), **other}).images("save")[0]
    largest, share = flipped(direct, stock)
    assert largest <= 1 and share < 1e-3
    result = server.run({**zipped_picture(content, style, ["other", 0], steps=2, learning_rate=0.05), **other})
    assert is_whole_run(result, 2)
    assert flipped(result.images("save")[0], direct)[1] > 0
