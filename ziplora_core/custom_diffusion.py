"""Custom Diffusion's merge in closed form (arXiv 2212.04488, Sec. 3.3, Eq. 4 and 5).

Of a layer that reads the prompt, with weight W0 (out, in), concepts' own weights W_i = W0 + ΔW_i, the features of the
captions that stand for them, C (s, in), and of ordinary captions, C_reg (n, in):

    W = argmin ‖W·C_regᵀ - W0·C_regᵀ‖²   with   W·Cᵀ = V,   V = [ W_1·C_1ᵀ | W_2·C_2ᵀ | … ]
      = W0 + (V - W0·Cᵀ)·(d·Cᵀ)⁻¹·d      with   d = C·M⁻¹,  M = C_regᵀ·C_reg

V - W0·Cᵀ is what the updates alone answer to their captions, so W0 is not needed, and W - W0 has rank s.
"""

from __future__ import annotations

from collections.abc import Mapping

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


def answering(targets: Tensor, moment: Tensor) -> Tensor:
    """Down factors A (s, in), float64: with any answers U (out, s), the update U·A is the one that answers so to the
    targets, U·A·Cᵀ = U, and least to what M is the moment of: it minimises tr(U·A·M·Aᵀ·Uᵀ).

    targets: C (s, in). Targets that depend on each other are kept in the sense of least squares.
    """
    lower = torch.linalg.cholesky(moment.double())
    whitened = torch.linalg.solve_triangular(lower, targets.double().T, upper=False)  # L⁻¹·Cᵀ
    down: Tensor = torch.linalg.solve_triangular(lower, torch.linalg.pinv(whitened), upper=False, left=False)
    return down


def answer(factors: Factors, inputs: Tensor) -> Tensor:
    """What an update adds for inputs (n, in): (out, n), float64."""
    return factors.scale * (factors.up.double() @ (factors.down.double() @ inputs.double().T))


def merge_layer(updates: Mapping[str, Factors], targets: Mapping[str, Tensor], down: Tensor) -> Factors:
    """One layer's merge: what each concept's update answers to its own captions. A concept that leaves the layer alone
    answers there as the base does. targets: concept -> features (s_i, in). down: `answering` of all of them, in this
    order. Raises ValueError where an update has other columns than captions have features."""
    like = next(iter(updates.values()))
    answers = []
    for concept, rows in targets.items():
        factors = updates.get(concept)
        if factors is not None and factors.down.shape[1] != rows.shape[1]:
            raise ValueError(f"an update of {factors.down.shape[1]} columns and captions of {rows.shape[1]} features")
        empty = torch.zeros(like.up.shape[0], len(rows), dtype=torch.float64, device=like.up.device)
        answers.append(empty if factors is None else answer(factors, rows))
    return Factors(torch.cat(answers, 1), down)


def merge(
    layers: Mapping[str, Mapping[str, Factors]], targets: Mapping[str, Tensor], captions: Tensor, ridge: float = RIDGE
) -> dict[str, Factors]:
    """Layer -> the merged update, of any number of concepts, in layers that read the prompt. layers: layer -> concept
    -> its update. targets: concept -> features of its captions. captions: of ordinary ones, (n, in)."""
    down = answering(torch.cat(list(targets.values())), second_moment(captions, ridge))
    return {name: merge_layer(updates, targets, down) for name, updates in layers.items()}
