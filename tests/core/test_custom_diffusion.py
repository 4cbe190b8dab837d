"""Custom Diffusion's merge against the constrained least-squares problem that it solves."""

from __future__ import annotations

import pytest
import torch

from ziplora_core import custom_diffusion
from ziplora_core.lora_set import Factors

OUT, IN, CAPTIONS = 7, 12, 40


def numbers(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def problem(lengths: tuple[int, ...]):
    """W0, updates and targets of each concept, ordinary captions."""
    updates = {f"c{i}": 0.3 * numbers(OUT, IN, seed=10 + i) for i in range(len(lengths))}
    targets = {f"c{i}": numbers(length, IN, seed=20 + i) for i, length in enumerate(lengths)}
    return (
        numbers(OUT, IN, seed=1),
        updates,
        targets,
        numbers(CAPTIONS, IN, seed=2) @ torch.diag(torch.linspace(0.1, 3, IN, dtype=torch.float64)),
    )


def update_of(factors) -> torch.Tensor:
    return factors.up @ factors.down * factors.scale


def merged_of(updates, targets, captions, **settings) -> Factors:
    """Of dense updates, by way of factors with a scale."""
    own = {c: Factors(update / 2, torch.eye(IN, dtype=torch.float64), 2.0) for c, update in updates.items()}
    return custom_diffusion.merge({"layer": own}, targets, captions, **settings)["layer"]


def solved_by_kkt(base, goal, targets, captions, ridge):
    """Row by row: min ‖(w - w0)·Rᵀ‖² with w·Cᵀ = v, R the captions and the ridge, as one dense linear system."""
    square = (captions**2).mean()
    rows = torch.cat([captions / len(captions) ** 0.5, (ridge * square) ** 0.5 * torch.eye(IN, dtype=torch.float64)])
    count = len(targets)
    system = torch.zeros(IN + count, IN + count, dtype=torch.float64)
    system[:IN, :IN] = 2 * rows.T @ rows
    system[:IN, IN:], system[IN:, :IN] = targets.T, targets
    right = torch.cat([2 * rows.T @ (rows @ base.T), goal.T])
    return torch.linalg.solve(system, right)[:IN].T


@pytest.mark.parametrize("lengths", [(2,), (3, 2), (2, 1, 3)])
def test_equals_the_constrained_least_squares_solution(lengths: tuple[int, ...]) -> None:
    base, updates, targets, captions = problem(lengths)
    merged = merged_of(updates, targets, captions, ridge=1e-3)
    every = torch.cat(list(targets.values()))
    goal = torch.cat([(base + updates[c]) @ targets[c].T for c in targets], 1)
    weight = base + update_of(merged)
    torch.testing.assert_close(weight, solved_by_kkt(base, goal, every, captions, 1e-3), rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(weight @ every.T, goal, rtol=1e-9, atol=1e-9)
    assert merged.rank == sum(lengths)


def test_equals_the_papers_formula() -> None:
    base, updates, targets, captions = problem((3, 2))
    merged = merged_of(updates, targets, captions, ridge=0.0)
    every = torch.cat(list(targets.values()))
    goal = torch.cat([(base + updates[c]) @ targets[c].T for c in targets], 1)
    d = every @ torch.linalg.inv(captions.T @ captions)
    expected = base + (goal - base @ every.T) @ torch.linalg.inv(d @ every.T) @ d
    torch.testing.assert_close(base + update_of(merged), expected, rtol=1e-8, atol=1e-8)


def test_drifts_less_on_ordinary_captions_than_the_sum_and_than_another_that_keeps_the_targets() -> None:
    _, updates, targets, captions = problem((2, 2))
    merged = update_of(merged_of(updates, targets, captions))
    every = torch.cat(list(targets.values()))
    answers = torch.cat([updates[c] @ targets[c].T for c in targets], 1)
    other = answers @ torch.linalg.pinv(every.T)  # the least update, whatever the captions

    def drift(update: torch.Tensor) -> float:
        return float((update @ captions.T).norm())

    torch.testing.assert_close(other @ every.T, answers)
    assert drift(merged) < 0.9 * drift(other) and drift(merged) < 0.9 * drift(sum(updates.values()))


def test_one_concept_on_all_directions_is_itself() -> None:
    _, updates, _, captions = problem((2,))
    targets = {"c0": numbers(IN, IN, seed=5)}
    merged = merged_of(updates, targets, captions)
    torch.testing.assert_close(update_of(merged), updates["c0"], rtol=1e-6, atol=1e-6)


def test_a_concept_that_leaves_a_layer_alone_stays_alone_there() -> None:
    _, updates, targets, captions = problem((2, 2))
    merged = update_of(merged_of({"c0": updates["c0"]}, targets, captions))
    torch.testing.assert_close(merged @ targets["c0"].T, updates["c0"] @ targets["c0"].T)
    assert float((merged @ targets["c1"].T).abs().max()) < 1e-9


def test_a_caption_that_is_given_twice_changes_nothing() -> None:
    _, updates, targets, captions = problem((2, 2))
    once = update_of(merged_of(updates, targets, captions))
    doubled = {concept: torch.cat([rows, rows]) for concept, rows in targets.items()}
    twice = update_of(merged_of(updates, doubled, captions))
    torch.testing.assert_close(twice, once, rtol=1e-7, atol=1e-7)


def test_directions_that_no_caption_has_are_left_to_the_ridge() -> None:
    """Fewer captions than features: without a ridge the moment has no inverse."""
    _, updates, targets, captions = problem((2, 1))
    few = captions[:5]
    merged = update_of(merged_of(updates, targets, few))
    for concept, rows in targets.items():
        torch.testing.assert_close(merged @ rows.T, updates[concept] @ rows.T, rtol=1e-6, atol=1e-6)


def test_refused() -> None:
    _, updates, targets, captions = problem((2,))
    with pytest.raises(ValueError, match="expected features of ordinary captions"):
        merged_of(updates, targets, captions[:0])
    with pytest.raises(ValueError, match="an update of 12 columns and captions of 5 features"):
        merged_of(updates, {"c0": targets["c0"][:, :5]}, captions[:, :5])
