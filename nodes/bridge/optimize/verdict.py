"""What came of a zip in plain words, and the last thing that the node shows: references that were drawn, then these."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor

from ....ziplora_core.files import shown
from ....ziplora_core.lora_set import CONCEPTS, is_pair
from ..lora.described import ALONE
from ..lora.loras import role
from ..progress import lettering
from ..progress.plots import GROUND, concept_colors
from .outcome import Outcome, Tried, share_left

_WIDTH, _LINE, _MARGIN, _GAP, _FONT = 512, 28, 10, 6, 20
_TEXT = "white"
APART = "These LoRAs share no layer of the model, so there is little to settle between them."
_GAIN = 0.05  # a dial is advised where the worst share of the direct merge's loss falls by so much


def lines(outcome: Outcome) -> list[str]:
    """The verdict with its warnings, how well each LoRA is kept, and advice where there is some: a line each.

    Where there are more than the pair's two, a line says whose files the others are.
    """
    found = [" ".join([verdict(outcome), *warnings(outcome)])]
    if outcome.retention:
        found.append(kept(*outcome.retention))
    sources = outcome.sources.by_concept
    others = [f"{role(c)}: '{shown(of.title, 60)}'" for c, of in sources.items() if c not in CONCEPTS]
    if others and len(sources) > 1:
        found.append(", ".join(others))
    return [*found, *advice(outcome)]


def verdict(outcome: Outcome) -> str:
    """One sentence."""
    if len(outcome.sources.by_concept) == 1:
        return ALONE
    if not outcome.retention:
        if outcome.settings.steps == 0:
            return "Nothing was learned, as steps is 0: this is plain stacking, as LoRA loaders in a row do it."
        return "The run stopped before its end: this is what it had learned last, and nothing was measured of it."
    if not outcome.finite:
        return "It cannot be told whether zipping helped: what was measured is not finite."
    if not outcome.shared:
        return APART
    before, after = outcome.retention
    if sum(after.values()) >= sum(before.values()):
        return "Zipping did not help: on the whole, plain stacking keeps these LoRAs as well or better."
    change = {concept: _percent(loss, after[concept]) for concept, loss in before.items()}
    better = [role(concept) for concept, percent in change.items() if percent > 0]
    worse = [role(concept) for concept, percent in change.items() if percent < 0]
    if worse:
        return f"Zipping helped on the whole, but {_these(worse, 'is', 'are')} kept worse than by plain stacking."
    if not better:
        return "Zipping changed next to nothing: these LoRAs are kept as by plain stacking."
    if len(better) < len(change):
        return f"Zipping helped: {_these(better, 'is', 'are')} kept better than by plain stacking, and none is worse."
    every = f"all {len(better)} LoRAs are" if len(better) > 2 else f"{' and '.join(better)} are both"
    return f"Zipping helped: {every} kept better than by plain stacking."


def warnings(outcome: Outcome) -> list[str]:
    """Of prompts, a sentence at the most: the figures were taken under these."""
    if outcome.swapped:
        return ["But the two prompts seem to be swapped: each wakes the other LoRA."]
    asleep = [role(concept) for concept in outcome.asleep]
    if not asleep:
        return []
    one = len(asleep) == 1
    return [
        f"But the {_listed(asleep)} {'prompt does' if one else 'prompts do'} not seem to wake "
        f"{'its LoRA' if one else 'their LoRAs'}."
    ]


def kept(before: Mapping[str, float], after: Mapping[str, float]) -> str:
    """How much of what plain stacking loses of each LoRA is gone, in percent: "worse" where it has grown."""
    change = {}
    for concept, loss in before.items():
        finite = math.isfinite(loss) and math.isfinite(after[concept])
        change[role(concept)] = _percent(loss, after[concept]) if finite else None
    known = {who: percent for who, percent in change.items() if percent is not None}
    one_way = all(percent > 0 for percent in known.values()) or all(percent < 0 for percent in known.values())
    said: list[str] = []
    for who, percent in known.items():
        how = _much(percent)
        if not said:
            how = f"kept {how} {'than' if percent else 'as by'} stacking"
        elif one_way and math.isfinite(percent):
            how = f"{abs(percent):.0f} %"
        said.append(f"{who} {how}")
    said += [f"{who} not measured (not finite)" for who, percent in change.items() if percent is None]
    return ", ".join(said)


def advice(outcome: Outcome) -> list[str]:
    """One line on what to do next, where something measured says so."""
    if len(outcome.sources.by_concept) == 1:
        return []
    if not outcome.retention:
        return ["Try steps 1 or more, to have it learned."] if outcome.settings.steps == 0 else []
    if not outcome.finite:
        return ["Try the model in bf16 or fp32."]
    if outcome.swapped:
        return ["Try the two prompts the other way round, and zip again."]
    if outcome.asleep:
        return ["Try the words, trigger word included, that the LoRA was trained with, and zip again."]
    before, after = outcome.retention
    if outcome.shared and sum(after.values()) >= sum(before.values()):
        return ["Try plain stacking for these: LoRA loaders in a row."]
    return _dial(outcome)


def _dial(outcome: Outcome) -> list[str]:
    """The best of the dials that were measured, where it is clearly better than none."""

    def worst(tried: Tried) -> float:
        shares = outcome.left(tried.retention).values()
        return max(shares) if all(map(math.isfinite, shares)) else math.inf

    best = min(outcome.tried, key=worst, default=None)
    if best is None or not worst(best) <= max(outcome.left(outcome.retention[1]).values()) - _GAIN:
        return []
    if is_pair(outcome.sources.by_concept):
        how = f"{best.concept}_strength {best.strength:g} in Style Strength"
    else:
        how = f"'{role(best.concept)}: {best.strength:g}' in Concept Strengths"
    return [f"Try {how}: measured so, {kept(outcome.retention[0], best.retention)}."]


def _percent(before: float, after: float) -> float:
    """How much of a loss is gone: whole percent, below 0 where it has grown."""
    gone = 100 * (1 - share_left(before, after))
    return float(round(gone)) + 0.0 if math.isfinite(gone) else gone


def _much(percent: float) -> str:
    way = "better" if percent > 0 else "worse"
    if not percent:
        return "the same"
    return f"{abs(percent):.0f} % {way}" if math.isfinite(percent) else way


def _listed(names: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def _these(names: Sequence[str], one: str, several: str) -> str:
    return f"the {_listed(names)} {one if len(names) == 1 else several}"


def picture(
    said: Sequence[str], curves: Image.Image | None, drawn: Mapping[str, Tensor], concepts: Iterable[str] = ()
) -> Image.Image:
    """The lines below the references that were drawn, or below the losses where a user brought all of them.

    said: broken where they are wider than the picture. drawn: pictures (N, H, W, 3) in 0..1 of each concept whose
    references were drawn, as a row each. concepts: all that there are, in their order, where others have none.
    """
    colors = concept_colors(dict.fromkeys([*concepts, *drawn]))
    rows = [_row(concept, colors[concept], pictures) for concept, pictures in drawn.items()] or (
        [curves] if curves else []
    )
    width = _WIDTH if drawn or not rows else rows[0].width
    font = lettering.font(_FONT)
    broken = [part for line in said for part in lettering.broken(line, width - 2 * _MARGIN, font)]
    height = sum(row.height for row in rows) + _LINE * len(broken) + 2 * _MARGIN
    whole = Image.new("RGB", (width, height), GROUND)
    top = 0
    for row in rows:
        whole.paste(row, (0, top))
        top += row.height
    draw = ImageDraw.Draw(whole)
    for number, line in enumerate(broken):
        draw.text((_MARGIN, top + _MARGIN + number * _LINE), line, fill=_TEXT, font=font)
    return whole


def _row(concept: str, color: str, pictures: Tensor) -> Image.Image:
    """Pictures beside each other, as wide as the whole, below a heading."""
    columns = min(len(pictures), 4)
    lines_of_pictures = math.ceil(len(pictures) / columns)
    side = (_WIDTH - 2 * _MARGIN - (columns - 1) * _GAP) // columns
    side = min(side, _WIDTH // 3)
    tall = max(1, round(side * pictures.shape[1] / pictures.shape[2]))
    row = Image.new("RGB", (_WIDTH, _MARGIN + _LINE + lines_of_pictures * (tall + _GAP)), GROUND)
    heading = f"{role(concept)} references, drawn by its LoRA"
    ImageDraw.Draw(row).text((_MARGIN, _MARGIN), heading, fill=color, font=lettering.font(_FONT))
    for number, tensor in enumerate(pictures):
        pixels = Image.fromarray((tensor.float().clamp(0, 1) * 255).round().cpu().numpy().astype(np.uint8))
        left = _MARGIN + number % columns * (side + _GAP)
        row.paste(pixels.resize((side, tall)), (left, _MARGIN + _LINE + number // columns * (tall + _GAP)))
    return row
