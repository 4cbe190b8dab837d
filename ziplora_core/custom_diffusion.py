"""Custom Diffusion's merge in closed form (arXiv 2212.04488, Sec. 3.3, Eq. 4 and 5).

Of a layer that reads the prompt, with weight W0 (out, in), concepts' own weights W_i = W0 + ΔW_i, the features of the
captions that stand for them, C (s, in), and of ordinary captions, C_reg (n, in):

    W = argmin ‖W·C_regᵀ - W0·C_regᵀ‖²   with   W·Cᵀ = V,   V = [ W_1·C_1ᵀ | W_2·C_2ᵀ | … ]
      = W0 + (V - W0·Cᵀ)·(d·Cᵀ)⁻¹·d      with   d = C·M⁻¹,  M = C_regᵀ·C_reg

V - W0·Cᵀ is what the updates alone answer to their captions, so W0 is not needed, and W - W0 has rank s.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .lora_set import Factors

RIDGE = 1e-4  # of the mean square of a feature: ordinary captions leave some directions out


def second_moment(captions: Tensor, ridge: float = RIDGE) -> Tensor:
    """M (in, in), float64, of the features of ordinary captions (n, in), over n; with ridge times the mean of its
    diagonal on the diagonal. Raises ValueError where there are none, or where they are not finite."""
    rows = captions.double()
    if not len(rows) or not bool(torch.isfinite(rows).all()):
        raise ValueError(f"expected features of ordinary captions, found {tuple(rows.shape)} or numbers not finite")
    moment = rows.T @ rows / len(rows)
    moment.diagonal().add_(ridge * moment.diagonal().mean())
    return moment


def kept(answers: Tensor, targets: Tensor, moment: Tensor) -> Factors:
    """The update D (out, in), as factors of rank s, float64, that answers to targets as it must, D·Cᵀ = answers, and
    least to what M is the moment of: it minimises tr(D·M·Dᵀ).

    answers: (out, s). targets: (s, in). Targets that depend on each other are kept in the sense of least squares.
    """
    lower = torch.linalg.cholesky(moment.double())
    whitened = torch.linalg.solve_triangular(lower, targets.double().T, upper=False)  # L⁻¹·Cᵀ, (in, s)
    inverse = torch.linalg.pinv(whitened)  # (s, in)
    down = torch.linalg.solve_triangular(lower, inverse, upper=False, left=False)  # inverse·L⁻¹
    return Factors(answers.double(), down)


def merge_layer(updates: Sequence[Tensor], targets: Sequence[Tensor], moment: Tensor) -> Factors:
    """One layer's merge of any number of concepts. updates: ΔW_i (out, in). targets: of each, features (s_i, in) of its
    captions. Raises ValueError where an update and its targets do not fit each other."""
    for update, target in zip(updates, targets, strict=True):
        if update.shape[1] != target.shape[1]:
            raise ValueError(f"an update of {update.shape[1]} columns and captions of {target.shape[1]} features")
    answers = [update.double() @ target.double().T for update, target in zip(updates, targets, strict=True)]
    return kept(torch.cat(answers, 1), torch.cat([t.double() for t in targets]), moment)


def merge(
    layers: Mapping[str, Mapping[str, Tensor]], targets: Mapping[str, Tensor], captions: Tensor, ridge: float = RIDGE
) -> dict[str, Factors]:
    """Layer -> the merged update, of layers that read the prompt. layers: layer -> concept -> ΔW. targets: concept ->
    features of its captions. A concept that leaves a layer alone answers to its captions there as the base does."""
    moment = second_moment(captions, ridge)
    merged = {}
    for name, own in layers.items():
        like = next(iter(own.values()))
        updates = [own.get(concept, torch.zeros_like(like)) for concept in targets]
        merged[name] = merge_layer(updates, list(targets.values()), moment)
    return merged
