"""Merges that were tried for the default: variants of the layer-wise solve, all without backpropagation.

python3 dev.py run benchmarks/quality.py --candidates --block choose --seeds 0 --results candidates.jsonl
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from benchmarks import moments
from benchmarks.methods import METHODS, Case, Merge, Method, timed
from benchmarks.studio import core

Coefficients = core.coefficients.Coefficients
CONCEPTS = core.lora_set.CONCEPTS


def softened(case: Case, mu: float, outputs: float = 0.0) -> tuple[Any, Any]:
    """(fitted, joined) of the pair after NP-LoRA, and after the same on what layers give out; the case's own for 0."""
    if mu == 0 and outputs == 0:
        return case.fitted, case.joined
    pair = core.direct.np_lora.soften(case.fitted.loras, mu)
    if outputs:
        layers = {name: _outputs_softened(layer, outputs) for name, layer in pair.layers.items()}
        pair = replace(pair, layers=layers)
    joined = core.branch.JoinedSet(pair, case.joined.device, case.joined.dtype)
    return replace(case.fitted, loras=pair), joined


def _outputs_softened(layer: Any, mu: float) -> Any:
    """A_c' = A_c − μ/(1+μ) · U Uᵀ A_c, U: an orthonormal basis of what the style update gives out."""
    if len(layer) < 2:
        return layer
    basis = torch.linalg.qr(layer["style"].up.double()).Q
    up = layer["content"].up.double()
    up = up - mu / (1 + mu) * basis @ (basis.T @ up)
    return {**layer, "content": replace(layer["content"], up=up.float())}


def layer_wise(
    mu: float = 0.0,
    style: float = 1.0,
    ridge: float = 1.0,
    pull: float = 1.0,
    identity: float = 0.0,
    outputs: float = 0.0,
    composed: float = 0.0,
    restyled: Sequence[str] = (),
    parts_of: str = "direct",
    alike: str = "",
    prior: float = 0.0,
    prompts: str = "",
    diagonal: bool = False,
    positions: int = 0,
) -> Method:
    """The closed form, changed.

    mu, outputs: of NP-LoRA and of the same on outputs, which soften the content LoRA first. style: how often the error
    under the style's reference counts. ridge: pull towards `pull`. identity: share of the identity (of the same trace)
    in the moments. composed: how often the distance from the direct merge under the composed prompt counts. restyled:
    concepts of which half the references are pictures of the composed prompt, seen with the concept's own prompt.
    parts_of: what errors are counted in: the direct merge's, what a LoRA itself adds ("own"), or nothing ("equal").
    alike: "layer" for one coefficient in a layer for each LoRA. prior: ridge of the solution with the identity's
    moments (shared columns) that this one is pulled towards. prompts: "kept" where layers that see the prompt keep its
    moments, "identity" where only these have the identity's. diagonal: moments without what inputs have in common, so
    that each column is a problem of its own. positions: of a layer's input that are kept of each row and pass; 0: all.
    """

    def run(case: Case) -> Merge:
        began = time.monotonic()
        fitted, joined = softened(case, mu, outputs)
        found: dict[str, dict[str, Tensor]] = {c: {} for c in CONCEPTS}
        with torch.inference_mode(False), torch.no_grad():
            seen_by = Sampled(positions) if positions else moments.Moments()
            record = moments.record(joined, case.predictor, case.references, case.seed, seen_by)
            if restyled:
                _restyle(record, case, joined, restyled)
            for (source, _), seen in record.sums.items():
                sees_prompt = ".attn2.to_" in source and ".to_q" not in source and ".to_out" not in source
                if prompts and sees_prompt != (prompts == "identity"):
                    continue
                trace = seen.total.diagonal().mean()
                seen.total = (1 - identity) * seen.total + identity * trace * torch.eye(len(seen.total)).to(seen.total)
                if diagonal:
                    seen.total = torch.diag(seen.total.diagonal())
            for name in record.source:
                layer = joined.layers[name]
                forms = record.forms(name, layer)
                direct = moments.error_at_direct(layer, forms)
                if parts_of != "direct":
                    sizes = {"content": direct["style"], "style": direct["content"]}
                    direct = sizes if parts_of == "own" else dict.fromkeys(direct, sum(direct.values()))
                weights = {c: 1 / e if e > 0 else 0.0 for c, e in direct.items()}
                weights["style"] *= style
                problem = moments.quadratic(layer, forms, weights)
                if composed:
                    problem = _held(problem, _composed_form(case, name, layer), composed)
                if alike:
                    spread = torch.block_diag(*[torch.ones(layer.columns, 1)] * len(moments.halves(layer)))
                    spread = spread.to(problem.q)
                    one = moments.Quadratic(spread.T @ problem.q @ spread, problem.b @ spread, problem.constant)
                    solution = spread @ _pulled(one, ridge, pull)
                else:
                    solution = _pulled(problem, ridge, _of_weights(joined, name, prior) if prior else pull)
                parts = torch.split(solution, layer.columns)
                for (concept, _), part in zip(moments.halves(layer), parts, strict=True):
                    found[concept][name] = part.cpu().float()
        ones = Coefficients.ones(joined.loras)
        merged = Coefficients({c: {**of, **found[c]} for c, of in ones.by_concept.items()})
        return Merge(fitted, merged, time.monotonic() - began)

    return run


class Sampled(moments.Moments):
    """Moments of some of a layer's positions, spread over its input by the golden ratio."""

    def __init__(self, positions: int):
        super().__init__()
        self.positions = positions

    def add(self, name: str, concept: str, rows: Tensor) -> None:
        if len(rows) > self.positions:
            start = self.sums[name, concept].count if (name, concept) in self.sums else 0
            places = (torch.arange(start, start + self.positions) * core.draws.GOLDEN % 1 * len(rows)).long()
            rows = rows[places.to(rows.device)]
        super().add(name, concept, rows)


def _restyle(record: Any, case: Case, joined: Any, concepts: Sequence[str]) -> None:
    """Add to concepts' moments as much of what their teachers see of composed pictures."""
    more = moments.record(joined, case.predictor, case.composed.references, case.seed + 1)
    for (name, concept), seen in record.sums.items():
        if concept in concepts:
            added = more.sums[name, concept]
            seen.total += added.total
            seen.count += added.count


@dataclass(frozen=True)
class Composed:
    """Pictures that the direct merge draws of the composed prompt, as references, and their moments under it."""

    references: Any
    moments: Any


def _composed_form(case: Case, name: str, layer: Any) -> Tensor:
    """H of a layer under the composed prompt."""
    seen = case.composed.moments
    mean = seen.sums[seen.source[name], "content"].mean
    if layer.down.ndim > 2:
        return mean
    halves = len(moments.halves(layer))
    return moments.gram(layer) * mean.repeat(halves, halves)


def _held(problem: Any, form: Tensor, weight: float) -> Any:
    """The problem + weight · (z − 1)ᵀ H (z − 1), in parts of what the direct merge adds there."""
    size = form.sum().item()
    held = form * (weight / size if size > 0 else 0.0)
    return moments.Quadratic(problem.q + held, problem.b + held.sum(1), problem.constant + held.sum().item())


class ComposedBranch(moments.MomentsBranch):
    """The direct merge, all of whose rows are recorded together, as the content's."""

    def __init__(self, joined: Any, record: Any):
        parts = {n: torch.ones(layer.columns * len(moments.halves(layer))) for n, layer in joined.layers.items()}
        core.branch.Branch.__init__(self, joined.layers, coefficients=parts)
        self._moments, self._recent = record, []

    def own(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x[:0]


def composed_moments(joined: Any, predictor: Any, references: Any, seed: int) -> Any:
    """What layers see of composed pictures under the composed prompt, which both of the predictor's prompts are."""
    record = moments.Moments()
    with torch.inference_mode(False), torch.no_grad():
        draws = core.draws.spread_batches(references, predictor, seed + 0xC0, core.layerwise.DRAWS)
        for batch in (batch for batches in draws for batch in batches):
            predictor(batch, ComposedBranch(joined, record))
    return record


def _of_weights(joined: Any, name: str, ridge: float) -> Tensor:
    """Shared columns of a layer, stacked as its columns are."""
    solved = core.shares.share(list(joined.loras.layers[name].values()), ridge)
    return torch.cat(solved.coefficients)


def _pulled(problem: Any, ridge: float, pull: float | Tensor) -> Tensor:
    """argmin of the problem + ridge · mean(diag Q) · ‖z − pull‖², by the core's own solve in z − pull + 1."""
    away = torch.as_tensor(pull, dtype=problem.q.dtype, device=problem.q.device) - 1
    moved = problem.q @ away.expand(len(problem.q))
    return moments.solve(moments.Quadratic(problem.q, problem.b - moved, problem.constant), ridge) + away


def stepped(method: Method) -> Method:
    """What a method finds, as the start of the node's gradient steps."""

    def run(case: Case) -> Merge:
        began = time.monotonic()
        start = method(case).coefficients
        settings = core.solver.Settings(seed=case.seed)
        solved = core.gradient.optimize(case.joined, case.predictor, case.references, settings, start=start)
        return Merge(case.fitted, solved.coefficients, time.monotonic() - began)

    return run


def routing(weight: float = 1.0, mu: float = 0.0, style: float = 1.0) -> Method:
    """Routing on the rank axis: M = (Σ P_k G_k + λ G_0)(Σ G_k + λ G_0)⁻¹ with G_k = E_k[z zᵀ], z = A x, G_0 = A Aᵀ.

    up = B, down = M A. λ (`weight`) → ∞ is the direct merge, λ → 0 SSR-Merge (arXiv 2606.10617).
    """

    def run(case: Case) -> Merge:
        began = time.monotonic()
        fitted, joined = softened(case, mu)
        layers = dict(fitted.loras.layers)
        with torch.inference_mode(False), torch.no_grad():
            record = moments.record(joined, case.predictor, case.references, case.seed)
            for name in record.source:
                layer = joined.layers[name]
                if layer.down.ndim > 2 or len(layer.parts) < 2:
                    continue
                up, down, rank = layer.up.double(), layer.down.double(), layer.ranks["content"]
                outs = up.T @ up
                grams = {}
                for c in CONCEPTS:
                    seen = record.sums[record.source[name], c].mean.double()
                    grams[c] = down @ seen @ down.T
                sizes = {c: float((outs * grams[c]).sum()) for c in CONCEPTS}
                zero = down @ down.T
                known = torch.zeros_like(zero)
                wanted = torch.zeros_like(zero)
                for c, part in (("content", slice(0, rank)), ("style", slice(rank, None))):
                    share = (style if c == "style" else 1.0) / max(sizes[c], 1e-30)
                    known += share * grams[c]
                    wanted[part] += share * grams[c][part]
                mean = known.diagonal().mean() / zero.diagonal().mean()
                shift = weight * mean * zero
                ridge = 1e-9 * known.diagonal().mean() * torch.eye(len(known), dtype=known.dtype)
                m = torch.linalg.solve((known + shift + ridge).T, (wanted + shift + ridge).T).T
                factors = core.lora_set.Factors(layer.up.float(), (m @ down).float())
                layers[name] = {"content": factors}
        pair = replace(fitted.loras, layers=layers)
        return Merge(replace(fitted, loras=pair), Coefficients.ones(pair), time.monotonic() - began)

    return run


CANDIDATES: dict[str, Method] = {
    **{
        name: METHODS[name]
        for name in ("direct 1/1", "direct .8/.8", "direct .6/.8", "NP-LoRA", "shared columns", "default")
    },
    "old default": stepped(layer_wise()),
    "layer-wise": layer_wise(),
    "layer-wise, style twice": layer_wise(style=2.0),
    "NP .2": layer_wise(mu=0.2),
    "NP .2, style twice": layer_wise(mu=0.2, style=2.0),
    "NP .35, style twice": layer_wise(mu=0.35, style=2.0),
    "NP .5": layer_wise(mu=0.5),
    "NP .5, style twice": layer_wise(mu=0.5, style=2.0),
    "NP 1": layer_wise(mu=1.0),
    "NP .5, outputs .5": layer_wise(mu=0.5, outputs=0.5),
    "composed": layer_wise(composed=1.0),
    "NP .5, composed": layer_wise(mu=0.5, composed=1.0),
    "NP .2, pull .8": layer_wise(mu=0.2, pull=0.8),
    "half identity": layer_wise(identity=0.5),
    "identity": layer_wise(identity=1.0),
    "NP .5, half identity": layer_wise(mu=0.5, identity=0.5),
    "NP .5, identity": layer_wise(mu=0.5, identity=1.0),
    "identity, pull .8": layer_wise(identity=1.0, pull=0.8),
    "identity, ridge 3": layer_wise(identity=1.0, ridge=3.0),
    "identity, ridge .1": layer_wise(identity=1.0, ridge=0.1),
    "identity, own, ridge .3": layer_wise(identity=1.0, ridge=0.3, parts_of="own"),
    "identity, equal, ridge .3": layer_wise(identity=1.0, ridge=0.3, parts_of="equal"),
    "identity by layer, ridge .3": layer_wise(identity=1.0, ridge=0.3, alike="layer"),
    "identity by layer, own, ridge .3": layer_wise(identity=1.0, ridge=0.3, alike="layer", parts_of="own"),
    "NP .5, identity, ridge .3": layer_wise(mu=0.5, identity=1.0, ridge=0.3),
    "identity, ridge .3, style 1.5": layer_wise(identity=1.0, ridge=0.3, style=1.5),
    "identity, ridge .3, prompts": layer_wise(identity=1.0, ridge=0.3, prompts="kept"),
    "layer-wise, prompts identity": layer_wise(identity=1.0, prompts="identity"),
    "layer-wise to identity, prompts identity": layer_wise(identity=1.0, prior=0.3, prompts="identity"),
    "layer-wise to identity": layer_wise(prior=0.3),
    "diagonal, ridge 1": layer_wise(diagonal=True),
    "diagonal, ridge .1": layer_wise(diagonal=True, ridge=0.1),
    "diagonal, pull .8": layer_wise(diagonal=True, pull=0.8),
    "diagonal to identity": layer_wise(diagonal=True, prior=0.3),
    "8 positions": layer_wise(prior=0.3, positions=8),
    "24 positions": layer_wise(prior=0.3, positions=24),
    "layer-wise to identity, ridge 3": layer_wise(prior=0.3, ridge=3.0),
    "NP .2, half identity, pull .7": layer_wise(mu=0.2, identity=0.5, pull=0.7),
    "layer-wise, pull .6": layer_wise(pull=0.6),
    "NP .2, identity, pull .8": layer_wise(mu=0.2, identity=1.0, pull=0.8),
    "direct .7/.7": timed(lambda case: case.ones.scaled(content=0.7, style=0.7)),
    "direct .8/.6": timed(lambda case: case.ones.scaled(content=0.8, style=0.6)),
    "direct .6/.6": timed(lambda case: case.ones.scaled(content=0.6, style=0.6)),
    "direct .5/.7": timed(lambda case: case.ones.scaled(content=0.5, style=0.7)),
    "NP .5, ridge 3": layer_wise(mu=0.5, ridge=3.0),
    "NP .5, ridge .3": layer_wise(mu=0.5, ridge=0.3),
    "restyled": layer_wise(restyled=CONCEPTS),
    "content restyled": layer_wise(restyled=("content",)),
    "NP .2, restyled": layer_wise(mu=0.2, restyled=CONCEPTS),
    "NP .5, restyled": layer_wise(mu=0.5, restyled=CONCEPTS),
    "routing": routing(),
    "NP .5, routing": routing(mu=0.5),
}
# These need pictures of the composed prompt, drawn by the direct merge.
COMPOSED = tuple(name for name in CANDIDATES if "composed" in name or "restyled" in name)
