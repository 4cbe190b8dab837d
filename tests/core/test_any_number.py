"""One LoRA, three, five: the same algebra as of two, against dense float64 and autograd."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from test_descent import dense_updates
from test_objective import dense_forward
from toys import NAMES, ToyPredictor, of_two, references_of, toy_pair, toy_set

from ziplora_core import analysis, direct, files, layerwise, prompts, saved, shares
from ziplora_core.branch import JoinedSet
from ziplora_core.coefficients import Coefficients, owners
from ziplora_core.draws import training_batches
from ziplora_core.gradient import accumulate_gradient, optimize
from ziplora_core.lora_set import LoRASet
from ziplora_core.merge import merged_factors
from ziplora_core.objective import BALANCED, PAPER
from ziplora_core.retention import measure_retention
from ziplora_core.solver import SOLVERS, Settings
from ziplora_core.zipper import solve

COUNTS = [3, 5]


def permuted(loras: LoRASet, order: tuple[int, ...]) -> LoRASet:
    return replace(loras, concepts=tuple(loras.concepts[place] for place in order))


def differences(a: Coefficients, b: Coefficients) -> float:
    return max(float((m - b[c][n]).abs().max()) for c, of in a.by_concept.items() for n, m in of.items())


@pytest.mark.parametrize("solver", SOLVERS)
def test_one_lora_is_returned_as_it_is(solver):
    joined, references = JoinedSet(toy_set(1), dtype=torch.float64), references_of(NAMES[:1])
    ones = Coefficients.ones(joined.loras)
    settings = Settings(solver=solver, steps=4)
    result = solve(joined, ToyPredictor(), references, settings)
    assert differences(result.coefficients, ones) == 0 and result.history == []
    learned = optimize(joined, ToyPredictor(), references, replace(settings, objective=PAPER))
    assert differences(learned.coefficients, ones) < 1e-6
    assert all(step.losses.total < 1e-6 and step.losses.overlap == 0 for step in learned.history)
    solved = layerwise.merge(joined, ToyPredictor(), references, 0)
    assert differences(solved, ones) < 1e-5
    (lost,) = measure_retention(joined, ToyPredictor(), references, [ones], seed=0)
    assert lost == {"content": pytest.approx(0, abs=1e-12)}
    assert (
        ones.overlap() == 0 and ones.ownership_by_layer() == {} and analysis.column_alignment(joined.loras, ones) == {}
    )
    assert torch.equal(shares.merge(joined.loras)["content"]["conv"], torch.ones(3))


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("solver", ["layerwise, then gradient", "gradient", "columns by activity", "shared columns"])
def test_loras_in_another_order_are_the_same_merge(solver, count):
    """The noise of a concept's references is its own, wherever it stands."""
    loras, settings = toy_set(count), Settings(solver=SOLVERS[0], steps=3, batch_size=2, seed=4)

    def merged(of: LoRASet) -> Coefficients:
        if solver == "shared columns":
            return shares.merge(of)
        given = JoinedSet(of, dtype=torch.float64), ToyPredictor(), references_of(of.concepts)
        if solver == "columns by activity":
            return layerwise.merge(*given, settings.seed)
        return solve(*given, replace(settings, solver=solver)).coefficients

    first = merged(loras)
    assert differences(first, Coefficients.ones(loras)) > 1e-2
    for order in list(itertools.permutations(range(count)))[:: 2 if count == 3 else 41]:
        again = merged(permuted(loras, order))
        assert tuple(again.by_concept) == permuted(loras, order).concepts
        assert differences(first, again) < (1e-4 if "gradient" in solver else 1e-5), order


@pytest.mark.parametrize("objective", [PAPER, BALANCED])
@pytest.mark.parametrize("joins", [True, False])
@pytest.mark.parametrize("count", COUNTS)
def test_the_gradient_is_autograds_over_dense_weights(count, joins, objective):
    loras, predictor = toy_set(count), ToyPredictor(joins)
    joined, references = JoinedSet(loras, dtype=torch.float64), references_of(loras.concepts)
    settings = Settings(similarity_lambda=0.3, batch_size=2, objective=objective)
    batches = next(training_batches(references, predictor, settings))
    assert len(batches) == (1 if joins else count)
    flat = torch.randn(loras.coefficient_count, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    flat.requires_grad_()
    weights = {concept: 1.0 + place for place, concept in enumerate(loras.concepts)}
    losses = accumulate_gradient(joined, predictor, flat, batches, settings, weights)

    other = flat.detach().clone().requires_grad_()
    m = joined.split(other)
    total, kept = torch.zeros((), dtype=torch.float64), dict.fromkeys(loras.concepts, 0.0)
    for batch in batches:
        for place, x in zip(batch.concept_index.tolist(), predictor.noisy(batch), strict=True):
            concept = loras.concepts[place]
            own = dense_forward(predictor, x[None], dense_updates(loras, only=concept))
            off = dense_forward(predictor, x[None], dense_updates(loras, m)) - own
            loss = weights[concept] * off.norm() / settings.batch_size
            kept[concept] += loss.item()
            total = total + loss
    overlap = torch.zeros((), dtype=torch.float64)
    for a, b in itertools.combinations(loras.concepts, 2):
        both = [m[a][n] * m[b][n] for n, layer in loras.layers.items() if a in layer and b in layer]
        overlap = overlap + (
            sum(p.sum().abs() for p in both) if objective is PAPER else 100 * torch.cat(both).abs().mean()
        )
    (total + settings.similarity_lambda * overlap).backward()
    assert losses.retention == pytest.approx(kept, rel=1e-9)
    assert losses.overlap == pytest.approx(float(overlap), rel=1e-9)
    assert losses.total == pytest.approx(float(total + settings.similarity_lambda * overlap), rel=1e-9)
    torch.testing.assert_close(flat.grad, other.grad, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("count", [1, 3, 5, 8])
def test_a_step_takes_two_passes_of_as_many_rows_as_there_are_loras(count):
    """Time and memory grow with the number of LoRAs and no faster."""
    loras, rows = toy_set(count), []

    class Counted(ToyPredictor):
        def __call__(self, batch, branch):
            rows.append(len(batch.latents))
            return super().__call__(batch, branch)

    joined = JoinedSet(loras, dtype=torch.float64)
    optimize(joined, Counted(), references_of(loras.concepts), Settings(steps=3, objective=PAPER))
    assert rows == [count] * 6
    assert sum(layer.down.shape[0] for layer in joined.layers.values()) == sum(
        f.rank for layer in loras.layers.values() for f in layer.values()
    )


def test_the_merge_of_five_is_the_dense_sum_and_dials_are_by_name():
    loras = toy_set(5)
    joined = JoinedSet(loras, dtype=torch.float64)
    g = torch.Generator().manual_seed(0)
    m = joined.unflatten(torch.randn(loras.coefficient_count, generator=g))
    dials = {"style": 0.25, "other 2": 0.0}
    turned = m.scaled(**dials)
    for name, layer in loras.layers.items():
        up, down = merged_factors(layer, turned.of_layer(name))
        expected = 0
        for concept, f in layer.items():
            delta = f.scale * torch.einsum("or,ri...->oi...", f.up, f.down)
            columns = m[concept][name].double().reshape(1, -1, *[1] * (delta.ndim - 2))
            expected = expected + dials.get(concept, 1.0) * delta * columns
        torch.testing.assert_close(torch.einsum("or,ri...->oi...", up, down), expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="no concept 'hat'; there are: content, style, other"):
        m.scaled(hat=0.5)


def test_owners_and_overlap_of_three_column_by_column():
    loras = toy_set(3)
    m = JoinedSet(loras).unflatten(torch.randn(loras.coefficient_count, generator=torch.Generator().manual_seed(1)))
    counts, products = dict.fromkeys(owners(loras.concepts), 0), []
    assert list(counts) == ["content", "style", "other", "several", "neither"]
    for name, layer in loras.layers.items():
        if len(layer) < 2:
            continue
        for numbers in zip(*(m[c][name].tolist() for c in layer), strict=True):
            mine = [c for c, number in zip(layer, numbers, strict=True) if abs(number) >= 0.5]
            counts[mine[0] if len(mine) == 1 else "several" if mine else "neither"] += 1
            products += [abs(a * b) for a, b in itertools.combinations(numbers, 2)]
    total = sum(counts.values())
    assert m.ownership() == pytest.approx({owner: n / total for owner, n in counts.items()})
    assert m.overlap() == pytest.approx(sum(products) / len(products))
    assert Coefficients.ones(loras).overlap() == 1


@pytest.mark.parametrize("method", direct.METHODS)
@pytest.mark.parametrize("count", [1, 3])
def test_methods_for_a_pair_refuse_other_numbers_in_a_sentence(method, count):
    loras = toy_set(count)
    if direct.METHODS[method].for_a_pair:
        with pytest.raises(ValueError, match=f"{method} merges one content and one style LoRA; found {count}: content"):
            direct.METHODS[method].check(loras.concepts)
        with pytest.raises(ValueError, match="found"):
            direct.METHODS[method](loras)
    else:
        direct.METHODS[method].check(loras.concepts)
        merged, m = direct.METHODS[method](loras)
        assert tuple(m.by_concept) == merged.concepts == loras.concepts and list(merged.layers) == list(loras.layers)
        assert (merged is loras) == (count == 1 or method in ("sum", "shared columns"))
        if count == 1:
            assert direct.prepared(loras, method, direct.METHODS[method].settings) is loras


def test_a_file_of_three_is_read_as_it_was_written_and_one_of_two_has_the_first_format(tmp_path):
    for loras, form in ((toy_set(3), "ziplora 2"), (toy_pair(), "ziplora 1"), (toy_set(1), "ziplora 2")):
        joined = JoinedSet(loras)
        m = joined.unflatten(torch.randn(loras.coefficient_count, generator=torch.Generator().manual_seed(2)))
        about = saved.SavedZip(
            {c: saved.SavedLoRA(f"{c}.safetensors", "ab", place, 0.5) for place, c in enumerate(loras.concepts)},
            {c: 0.25 * place for place, c in enumerate(loras.concepts)}, "zipped", {"steps": 3}, {"pack": "1"}, "said",
        )  # fmt: skip
        path = saved.write(tmp_path / "z.safetensors", m, about)
        assert f'"format": "{form}"' in files.read_metadata(path)["ziplora"]
        found, _, said = saved.read(path)
        assert said == saved.read_about(path) == about and list(said.sources) == list(loras.concepts)
        assert differences(found, m) == 0 and tuple(found.by_concept) == loras.concepts
        saved.check_fits("z", found, loras)
    with pytest.raises(ValueError, match="expected dials"):
        replace(about, dials={"style": 1.0})


def test_prompts_of_three_are_measured_without_guessing_whose_is_whose():
    loras = toy_set(3)
    predictor = ToyPredictor()
    predictor.target = lambda batch: predictor.noisy(batch).mean((2, 3))
    effects = prompts.measure(JoinedSet(loras, dtype=torch.float64), predictor, references_of(loras.concepts), 0)
    assert tuple(effects) == loras.concepts and not any(effect.fires for effect in effects.values())
    assert all(set(effect.gain) == {"own", "empty"} for effect in effects.values())
    assert predictor.calls == 4 * prompts.DRAWS


def test_sets_are_refused_where_names_or_layers_are_wrong():
    layer = toy_pair().layers["first"]
    for concepts, layers, says in (
        (("a", "a"), {}, "names of their own"),
        (("content",), {"first": layer}, "layer 'first' needs a LoRA of the set .*; found content, style"),
        (("content", "style"), {"first": {}}, "found neither"),
    ):
        with pytest.raises(ValueError, match=says):
            LoRASet(concepts, layers)
    assert list(LoRASet(("style", "content"), {"first": layer}).layers["first"]) == ["style", "content"]
    assert toy_set(3).layer_counts() == {"all": 1, "some": 4, "content only": 0, "style only": 0, "other only": 0}
    assert of_two(1, 2) == {"content": 1, "style": 2}
