"""Merges that mix a layer's rank axis, so that an input reaches the LoRA whose references it looks like.

With x the input of a layer, C_r = E_r[x xᵀ] under reference r and ΔW_r = B_r A_r, the linear map that is nearest to
what each LoRA alone does under its own reference, and nearest to `pull` times the plain sum where no reference says
anything,

    min over ΔW of  Σ_r w_r E_r‖(ΔW − ΔW_r) x‖²  +  ridge · q · ‖ΔW − pull · Σ_r ΔW_r‖²

is ΔW = Σ_r B_r A_r (w_r C_r + ridge · q · pull) S⁻¹, S = Σ_r w_r C_r + ridge · q (RegMean, arXiv 2212.09849, with a
ridge). Its rank is the sum of the LoRAs'. `routed` sees z = A x alone, of all LoRAs' rows A, in the place of x. The
pack's own is `ziplora_core/routing.py`; these were tried beside it.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from benchmarks import moments
from benchmarks.methods import Case, Merge, Method
from benchmarks.studio import core

Coefficients = core.coefficients.Coefficients


def weights_of(layer: Any, means: dict[str, Tensor]) -> dict[str, float]:
    """As shared columns weigh LoRAs: each by what it adds under the references of the others."""
    sizes = {}
    for concept, factors in layer.items():
        update = factors.scale * factors.up.double() @ factors.down.double()
        others = [c for c in layer if c != concept]
        seen = (
            sum((means[c] for c in others), torch.zeros_like(next(iter(means.values())))) if others else means[concept]
        )
        sizes[concept] = float((update @ seen * update).sum())
    total = sum(sizes.values())
    return {c: size / total if total > 0 else 1 / len(sizes) for c, size in sizes.items()}


def regmean(
    ridge: float = 0.1,
    pull: float = 1.0,
    routed: bool = False,
    rest: str = "columns",
    to_columns: bool = False,
    prompts: bool = False,
) -> Method:
    """rest: layers that are no matrices get shared columns by activity ("columns") or the plain sum ("sum").
    to_columns: where no reference says anything, shared columns by activity in the place of the plain sum."""

    def run(case: Case) -> Merge:
        began = time.monotonic()
        with torch.inference_mode(False), torch.no_grad():
            record = moments.record(case.joined, case.predictor, case.references, case.seed)
            coefficients = (
                core.layerwise.merge(case.joined, case.predictor, case.references, case.seed)
                if rest == "columns"
                else case.ones
            )
            layers, sides = dict(case.fitted.loras.layers), {c: dict(of) for c, of in coefficients.by_concept.items()}
            for name, layer in layers.items():
                first = next(iter(layer.values()))
                if first.down.ndim > 2 or len(layer) < 2 or name not in record.source:
                    continue
                if prompts and not (".attn2.to_k" in name or ".attn2.to_v" in name):
                    continue
                source = record.source[name]
                means = {c: record.sums[source, c].mean.double().cpu() for c in layer}
                weights = weights_of(layer, means)
                rows = {c: f.down.double() for c, f in layer.items()}
                start = dict(rows)
                if to_columns:
                    start = {c: a * coefficients.by_concept[c][name].double() for c, a in rows.items()}
                every = torch.cat(list(start.values())) if routed else torch.eye(first.down.shape[1]).double()
                seen = {c: every @ m @ every.T for c, m in means.items()}
                base = every @ every.T
                whole = sum(weights[c] * m for c, m in seen.items())
                base = base * (ridge * whole.diagonal().sum() / base.diagonal().sum())
                inverse = torch.linalg.pinv(whole + base, hermitian=True)
                changed, at = {}, 0
                for concept, factors in layer.items():
                    aimed = weights[concept] * rows[concept] @ means[concept] @ every.T
                    kept = base[at : at + len(factors.down)] if routed else start[concept] @ base
                    at += len(factors.down)
                    changed[concept] = replace(factors, down=((aimed + pull * kept) @ inverse @ every).float())
                    sides[concept][name] = torch.ones(first.down.shape[1])
                layers[name] = changed
        merged_set = replace(case.fitted.loras, layers=layers)
        return Merge(replace(case.fitted, loras=merged_set), Coefficients(sides), time.monotonic() - began)

    return run


ROUTING: dict[str, Method] = {
    "RegMean, ridge .1": regmean(0.1),
    "RegMean, ridge .01": regmean(0.01),
    "RegMean, ridge .01, to 0": regmean(0.01, pull=0.0),
    "RegMean, ridge .001": regmean(0.001),
    "to columns, ridge 1": regmean(1.0, to_columns=True),
    "to columns, ridge .1": regmean(0.1, to_columns=True),
    "to columns, ridge .03": regmean(0.03, to_columns=True),
    "to columns, ridge .01": regmean(0.01, to_columns=True),
    "prompts to columns, ridge .1": regmean(0.1, to_columns=True, prompts=True),
    "prompts to columns, ridge .01": regmean(0.01, to_columns=True, prompts=True),
    "routed, ridge .01": regmean(0.01, routed=True),
    "routed, ridge .06": regmean(0.06, routed=True),
    "routed, ridge .02": regmean(0.02, routed=True),
    "routed, ridge .1, pull .6": regmean(0.1, pull=0.6, routed=True),
    "routed, ridge .06, pull .4": regmean(0.06, pull=0.4, routed=True),
    "routed, ridge .2, pull .4": regmean(0.2, pull=0.4, routed=True),
    "routed to columns, ridge .02": regmean(0.02, routed=True, to_columns=True),
    "routed, ridge .3": regmean(0.3, routed=True),
    "routed, ridge 1": regmean(1.0, routed=True),
    "routed to columns, ridge .03": regmean(0.03, routed=True, to_columns=True),
    "routed to columns, ridge .1": regmean(0.1, routed=True, to_columns=True),
    "routed to columns, ridge .3": regmean(0.3, routed=True, to_columns=True),
    "routed to columns, ridge 1": regmean(1.0, routed=True, to_columns=True),
    "routed, ridge .1": regmean(0.1, routed=True),
    "routed, ridge .001": regmean(0.001, routed=True),
}
