"""One layer with the pair on it, in every shape that networks have; what is sampled and drawn from factors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from toys import Dense, factors, of_two, toy_pair

from ziplora_core import analysis, direct, export
from ziplora_core.branch import Branch, JoinedSet
from ziplora_core.coefficients import Coefficients
from ziplora_core.lora_set import CONCEPTS, Factors, LoRASet
from ziplora_core.sparse import top_elements

CONVOLUTIONS = {
    "conv1d": ((5, 3, 3), (2, 3, 8), {"stride": 2, "padding": 1}),
    "conv2d": ((5, 3, 3, 2), (2, 3, 9, 7), {"stride": (2, 1), "padding": (1, 0), "dilation": (1, 2)}),
    "conv3d": ((4, 3, 1, 2, 3), (2, 3, 3, 5, 6), {"stride": 1, "padding": (0, 1, 1), "dilation": 2}),
}


def dense(f):
    return f.scale * torch.einsum("or,ri...->oi...", f.up.double(), f.down.double())


class Convolution:
    def __init__(self, weight, **options):
        self.weight, self.options = weight, options
        self.convolve = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}[weight.ndim]

    def forward(self, x):
        return self.convolve(x, self.weight, **self.options)

    def backward(self, grad, shape):
        with torch.enable_grad():
            x = torch.zeros(shape, dtype=grad.dtype, requires_grad=True)
            return torch.autograd.grad(self.forward(x), x, grad)[0]


@pytest.mark.parametrize("ranks", [(2, 2), (2, 3)])
@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_a_convolution_is_the_dense_one_with_its_gradients(kind, ranks):
    shape, x_shape, options = CONVOLUTIONS[kind]
    layer = of_two(factors(shape, ranks[0], 0, 0.7), factors(shape, ranks[1], 1, 1.3))
    joined = JoinedSet(LoRASet(CONCEPTS, {"layer": layer}), dtype=torch.float64)
    g = torch.Generator().manual_seed(2)
    x, weight = (torch.randn(s, generator=g, dtype=torch.float64) for s in (x_shape, shape))
    base = Convolution(weight, **options)
    m = torch.randn(6, generator=g, dtype=torch.float64)
    leaves = [t.clone().requires_grad_() for t in (x, m)]
    y = joined.student(leaves[1]).layer("layer", leaves[0], base, **options)
    plain = [t.clone().requires_grad_() for t in (x, m)]
    columns = [plain[1][part].reshape(1, 3, *[1] * (len(shape) - 2)) for part in (slice(3), slice(3, None))]
    merged = weight + dense(layer["content"]) * columns[0] + dense(layer["style"]) * columns[1]
    expected = Convolution(merged, **options).forward(plain[0])
    torch.testing.assert_close(y, expected)
    probe = torch.randn(y.shape, generator=g, dtype=torch.float64)
    for found, wanted in zip(
        torch.autograd.grad(y, leaves, probe), torch.autograd.grad(expected, plain, probe), strict=True
    ):
        torch.testing.assert_close(found, wanted)
    teacher = joined.teacher(torch.tensor([0, 1])).layer("layer", x, base, **options)
    for row, (_, f) in enumerate(layer.items()):
        alone = Convolution(weight + dense(f), **options).forward(x[row : row + 1])
        torch.testing.assert_close(teacher[row : row + 1], alone)


class Strided(Dense):
    """A layer whose output and whose input's gradient do not lie in one piece, as of a transposed product."""

    def forward(self, x):
        return super().forward(x).mT.contiguous().mT

    def backward(self, grad, shape):
        return super().backward(grad, shape).mT.contiguous().mT


@pytest.mark.parametrize("base", [Dense, Strided])
@pytest.mark.parametrize("ranks", [(2, 2), (2, 3), (1, 4)])
def test_a_linear_layer_with_its_gradients(base, ranks):
    layer = of_two(factors((5, 4), ranks[0], 0, -0.7), factors((5, 4), ranks[1], 1, 1.3))
    joined = JoinedSet(LoRASet(CONCEPTS, {"layer": layer}), dtype=torch.float64)
    g = torch.Generator().manual_seed(2)
    x, weight, m = (torch.randn(s, generator=g, dtype=torch.float64) for s in ((2, 3, 4), (5, 4), (8,)))

    def expected(x, m):
        return x @ (weight + dense(layer["content"]) * m[:4] + dense(layer["style"]) * m[4:]).T

    def found(x, m):
        return joined.student(m).layer("layer", x, base(weight))

    torch.testing.assert_close(found(x, m), expected(x, m))
    got, wanted = (torch.autograd.functional.jacobian(f, (x, m)) for f in (found, expected))
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b)


def test_a_branch_is_a_student_or_a_teacher_and_a_teacher_learns_nothing():
    joined = JoinedSet(toy_pair(), dtype=torch.float64)
    for both in ({}, {"coefficients": {}, "rows": of_two(0, 1)}):
        with pytest.raises(ValueError, match="found both or none"):
            Branch(joined.layers, **both)
    x = torch.ones(2, 5, dtype=torch.float64, requires_grad=True)
    with torch.enable_grad():
        y = joined.teacher(torch.tensor([0, 1])).layer("first", x, Dense(torch.ones(7, 5).double()))
    assert not y.requires_grad


@pytest.mark.parametrize("styles", [0, 1, 3, 4])
def test_a_teachers_rows_need_not_be_halves(styles):
    """Also where a model folds frames into rows."""
    pair = toy_pair()
    joined = JoinedSet(pair, dtype=torch.float64)
    x = torch.randn(8, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    concept = (torch.arange(4) >= 4 - styles).long()
    y = joined.teacher(concept).layer("first", x, Dense(torch.zeros(7, 5, dtype=torch.float64)))
    for row, place in enumerate(concept.repeat_interleave(2).tolist()):
        torch.testing.assert_close(y[row], x[row] @ dense(pair.layers["first"][CONCEPTS[place]]).T)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_coefficients_have_float32s_digits_whatever_is_computed_in(dtype):
    joined = JoinedSet(toy_pair(), dtype=dtype)
    flat = joined.flatten(Coefficients.ones(joined.loras).scaled(content=1 + 2**-20, style=1 / 3))
    assert flat.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    found = joined.unflatten(flat)
    flat.zero_()  # as the next step would: what was returned stays
    assert all((m == 1 + 2**-20).all() for m in found["content"].values())
    assert all(torch.allclose(m, torch.tensor(1 / 3), rtol=1e-7) for m in found["style"].values())


def test_cosines_count_a_column_where_both_coefficients_are_more_than_nothing():
    layer = of_two(factors((6, 4), 2, 1), factors((6, 4), 3, 2))
    content, style = torch.tensor([0.1, -0.1, 1e-9, -2.0]), torch.tensor([0.1, 2.0, 1.0, -1e-9])
    found = analysis.column_cosines(*layer.values(), content, style)
    a, b = dense(layer["content"]), dense(layer["style"])
    cosines = F.cosine_similarity(a, b, dim=0)
    torch.testing.assert_close(found, cosines * torch.tensor([1.0, -1.0, 0.0, 0.0]))
    pair = LoRASet(CONCEPTS, {"a": layer, "only": of_two(layer["content"])})
    m = Coefficients(of_two({"a": content, "only": torch.ones(4)}, {"a": style}))
    assert analysis.column_alignment(pair, m) == pytest.approx({"a": float(cosines[0] - cosines[1]) / 4})
    weights = (content * style).double()
    assert analysis.column_interference(pair, m) == pytest.approx({"a": float((cosines * weights).abs().mean())})


def test_sampled_rows_are_the_seeds():
    whole = dense(toy_pair().layers["first"]["style"])

    def rows(seed):
        pair = LoRASet(CONCEPTS, {"first": toy_pair().layers["first"]})
        found = analysis.sampled_elements(pair, "style", 2, seed).reshape(2, -1)
        return [int((whole - row).abs().sum(1).argmin()) for row in found if (whole - row).abs().sum(1).min() < 1e-4]

    chosen = [rows(seed) for seed in range(8)]
    assert all(len(set(pair)) == 2 for pair in chosen) and len({tuple(pair) for pair in chosen}) > 3


def test_energy_is_that_of_the_largest_by_magnitude_and_of_one_at_least():
    elements = torch.tensor([1.0, -5.0, 2.0, 3.0])
    assert analysis.energy_share(elements, 0.01) == pytest.approx(25 / 39)
    assert analysis.energy_share(elements, 0.5) == pytest.approx(34 / 39)
    f = Factors(torch.eye(2), torch.tensor([[1.0, -5.0], [2.0, 3.0]]), -1.0)
    sparse, held = top_elements(f, 0.01)
    assert sparse.tolist() == [[0.0, 5.0], [0.0, 0.0]] and held == pytest.approx(25 / 39)


def test_np_lora_as_the_menu_names_it():
    """Half the strength that projects all of it away, on every direction of style down to rounding."""
    layer = toy_pair().layers["first"]
    u, _, vh = torch.linalg.svd(dense(layer["style"]))
    values = torch.tensor([1.0, 1e-2, 1e-4], dtype=torch.float64)
    style = Factors(u[:, :3] * values, vh[:3])
    pair, ones = direct.METHODS["NP-LoRA"](LoRASet(CONCEPTS, {"first": of_two(layer["content"], style)}))
    onto = vh[:3].T @ vh[:3]
    expected = dense(layer["content"]) - dense(layer["content"]) @ onto / 3  # mu = 0.5: mu / (1 + mu)
    torch.testing.assert_close(dense(pair.layers["first"]["content"]), expected, rtol=1e-5, atol=1e-6)
    assert all(bool((m == 1).all()) for m in (*ones["content"].values(), *ones["style"].values()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_directions_that_only_rounding_makes_belong_to_no_style(dtype):
    """The same update by more factors than it has rank: as many directions, and the same."""
    style = toy_pair().layers["first"]["style"]
    mixed = torch.randn(3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    longer = Factors((style.up @ mixed).to(dtype), (torch.linalg.pinv(mixed) @ style.down).to(dtype), style.scale)
    few, many = direct.np_lora.row_space(style), direct.np_lora.row_space(longer)
    assert many.shape == few.shape == (5, 3)
    torch.testing.assert_close(many @ many.T, few @ few.T, rtol=1e-5, atol=1e-5)


def test_files_of_a_convolution_and_a_linear_layer():
    """As loaders multiply them: (alpha / rank) · up · down, up as wide as down has axes."""
    layers = {
        "linear": export.ExportLayer(torch.randn(5, 3), torch.randn(3, 4)),
        "conv": export.ExportLayer(torch.randn(5, 2), torch.randn(2, 4, 3, 3)),
    }
    for read, up, down in (
        (export.kohya_tensors(layers), "lora_up.weight", "lora_down.weight"),
        (export.peft_tensors(layers), "lora_B.weight", "lora_A.weight"),
    ):
        for name, layer in layers.items():
            factor = float(read.get(f"{name}.alpha", torch.tensor(float(layer.rank)))) / layer.rank
            b, a = read[f"{name}.{up}"], read[f"{name}.{down}"]
            assert factor == 1.0 and b.ndim == a.ndim == layer.down.ndim
            if a.ndim == 4:
                x = torch.randn(1, 4, 6, 6)
                y, whole = F.conv2d(F.conv2d(x, a), b), torch.einsum("or,rikl->oikl", layer.up, layer.down)
                torch.testing.assert_close(y, F.conv2d(x, whole), rtol=1e-4, atol=1e-4)
            else:
                torch.testing.assert_close(b @ a, layer.up @ layer.down)
        assert len(read) == (6 if "lora_up" in up else 4)


@pytest.mark.parametrize("large", ["up", "down"])
def test_either_factor_may_be_too_large_and_what_is_kept_is_said(large):
    parts = {"up": torch.ones(2, 1), "down": torch.ones(1, 2)}
    fine = export.ExportLayer(**parts, kept=0.75)
    assert export.rounded("here", fine, torch.float16).kept == 0.75
    parts[large] = parts[large] * -1e6
    with pytest.raises(ValueError, match="'here'.*too large"):
        export.rounded("here", export.ExportLayer(**parts), torch.float16)
