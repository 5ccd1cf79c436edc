"""hsic_test: against its definition, against hyppo, and what a test of independence must have: its level, and power."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mimir_fast import cka, hsic, hsic_test
from mimir_fast.ops.dependence.bandwidth import gamma
from mimir_fast.ops.dependence.low_rank import TOLERANCE, rbf_factor
from mimir_fast.ops.dependence.rbf import rbf_minus_one_reference
from mimir_fast.ops.independence import CentredKernel, hsic_test_reference, permutations

HYPPO = json.loads((Path(__file__).parents[1] / "golden" / "independence" / "hyppo.json").read_text())


def normal(n: int, d: int, seed: int, device: torch.device | str = "cpu") -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed)).to(device)


# (N, D_x, D_y): both kernels thin, one of them, neither; N so small that all are thin; an image.
SHAPES = [(60, 1, 1), (150, 40, 1), (150, 1, 40), (60, 30, 40), (5, 3, 2), (33, 33, 1)]


@pytest.mark.parametrize("estimator", ["biased", "unbiased"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_definition(
    shape: tuple[int, int, int], dtype: torch.dtype, estimator: str, device: torch.device
) -> None:
    n, d_x, d_y = shape
    x = normal(n, d_x, 1, device).to(dtype)
    y = normal(n, d_y, 2, device).to(dtype) + 0.3 * x[:, :1]
    ours = hsic_test(x, y, num_permutations=40, estimator=estimator)  # type: ignore[arg-type]
    defined = hsic_test_reference(x, y, num_permutations=40, estimator=estimator)  # type: ignore[arg-type]
    assert ours.statistic.device.type == device.type and ours.null.shape == (40,)
    scale = defined.null.abs().max()
    tolerance = 6 * TOLERANCE  # of each thin factor, in both sums of a statistic; float32 is finer
    torch.testing.assert_close(ours.null / scale, defined.null / scale, rtol=0, atol=tolerance)
    torch.testing.assert_close(ours.statistic / scale, defined.statistic / scale, rtol=0, atol=tolerance)
    assert ours.p_value == defined.p_value


def test_a_factor_too_thick_for_products_beside_a_matrix() -> None:
    """(600, 2) has rank 60, too high for products with it; and one input of each dtype."""
    x, y = normal(600, 2, 1), normal(600, 60, 2).double()
    for a, b in ((x, y), (y, x)):
        ours, defined = (test(a, b, num_permutations=3) for test in (hsic_test, hsic_test_reference))
        torch.testing.assert_close(ours.null / defined.null, torch.ones(3).double(), rtol=0, atol=1e-5)
    thin, matrix = (CentredKernel(z, gamma(z, 1.0, "median"), torch.float64) for z in (x, y))
    assert thin.factor is not None and thin.factor.shape[1] > 48 and matrix.factor is None


def test_the_statistic_is_hsic_and_may_have_its_options() -> None:
    x, y = normal(50, 3, 1), normal(50, 2, 2)
    options = {"bandwidth": "paper", "sigma": (1.5, 0.7), "normalizer": "(n-1)^2"}
    value = hsic_test(x, y, num_permutations=5, **options).statistic  # type: ignore[arg-type]
    torch.testing.assert_close(value.float(), hsic(x, y, **options), rtol=1e-5, atol=0)  # type: ignore[arg-type]


@pytest.mark.parametrize("estimator", ["biased", "unbiased"])
@pytest.mark.parametrize("case", HYPPO["cases"], ids=lambda case: case["name"])
def test_agrees_with_hyppo(case: dict[str, object], estimator: str) -> None:
    """Its statistic is CKA, or the root of it; its p-value is of other permutations."""
    x, y = (torch.tensor(case[name], dtype=torch.float64) for name in ("x", "y"))
    options = {"bandwidth": "paper", "sigma": case["sigma"], "estimator": estimator}
    theirs = case[estimator]
    power = 2 if estimator == "biased" else 1
    assert float(cka(x, y, **options)) == pytest.approx(theirs["statistic"] ** power, rel=1e-9)  # type: ignore[arg-type,index]
    p_value = float(hsic_test(x, y, num_permutations=10_000, **options).p_value)  # type: ignore[arg-type]
    p = theirs["p_value"]  # type: ignore[index]
    spread = (p * (1 - p) * 2 / HYPPO["reps"]) ** 0.5  # of the difference of two such estimates
    assert abs(p_value - p) < 4 * spread


@pytest.mark.parametrize("kind", ["normal", "labels"])
def test_level(kind: str) -> None:
    """Under independence p-values are uniform: 200 of them, by Kolmogorov and Smirnov, and the share below 0.05."""
    found = []
    for seed in range(200):
        x, y = normal(30, 2, 2 * seed), normal(30, 2, 2 * seed + 1)
        if kind == "labels":
            y = torch.nn.functional.one_hot((y[:, 0] > 0).long()).float()
        found.append(hsic_test(x, y, num_permutations=99, seed=seed).p_value)
    p_values = torch.stack(found).sort().values
    steps = torch.arange(1, 201) / 200
    # p lies on a grid of 1/100, at the upper end of each step of the uniform distribution.
    assert float((steps - p_values).max()) < 1.63 / 200**0.5  # 1 % critical value
    assert float((p_values - 0.01 - (steps - 1 / 200)).max()) < 1.63 / 200**0.5
    assert 2 <= int((p_values <= 0.05).sum()) <= 20  # 10 expected


def circle(seed: int) -> tuple[Tensor, Tensor]:
    """Uncorrelated, and dependent."""
    angle = 2 * torch.pi * torch.rand(200, 1, generator=torch.Generator().manual_seed(seed))
    return angle.cos() + 0.1 * normal(200, 1, seed), angle.sin() + 0.1 * normal(200, 1, seed + 1)


def linear(seed: int) -> tuple[Tensor, Tensor]:
    x = normal(80, 40, seed)
    return x, 0.5 * x @ normal(40, 40, 0) / 40**0.5 + normal(80, 40, seed + 1)


@pytest.mark.parametrize("make", [circle, linear])
def test_power(make: Callable[[int], tuple[Tensor, Tensor]]) -> None:
    assert all(float(hsic_test(*make(seed), num_permutations=99).p_value) <= 0.05 for seed in range(0, 20, 2))


@pytest.mark.parametrize("d", [1, 40])
def test_a_constant_is_independent_of_everything(d: int) -> None:
    x, constant = normal(40, d, 1), torch.full((40, 3), 0.1)
    for pair in ((x, constant), (constant, x), (constant, constant)):
        result = hsic_test(*pair, num_permutations=19)
        assert result.p_value == 1 and abs(float(result.statistic)) < 1e-12


def test_equal_values_are_ties() -> None:
    """Two classes and five samples: many permutations give the same table, whatever the rounding says."""
    x = torch.tensor([0.0, 0.0, 0.3, 0.3, 0.3])[:, None]
    result = hsic_test(x, x, num_permutations=5000)
    assert float(result.p_value) == pytest.approx(0.1, abs=0.015)  # 2!·3! of 5! arrangements leave x as it is


def test_seed() -> None:
    x, y = normal(30, 2, 1), normal(30, 2, 2)
    one, two, other = (hsic_test(x, y, num_permutations=50, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(one.null, two.null) and not torch.equal(one.null, other.null)
    longer = hsic_test(x, y, num_permutations=70, seed=3)
    torch.testing.assert_close(longer.null[:50], one.null, rtol=1e-10, atol=0)


def test_permutations_are_some() -> None:
    (drawn,) = permutations(4, 2400, 0, 5000, torch.device("cpu"))
    assert torch.equal(drawn[0], torch.arange(4))
    assert torch.equal(drawn.sort(dim=1).values, torch.arange(4).expand(2401, 4))
    _, counts = drawn[1:].unique(dim=0, return_counts=True)
    assert len(counts) == 24 and float(((counts - 100.0) ** 2 / 100).sum()) < 49.7  # χ² of 23 degrees, 0.1 %
    batches = torch.cat(list(permutations(4, 2400, 0, 7, torch.device("cpu"))))
    assert torch.equal(batches, drawn)


def test_the_factor_is_the_kernel() -> None:
    x = normal(100, 2, 1) + 1000  # far from the origin
    width = gamma(x, 1.0, "median")
    factor = rbf_factor(x, width, 100)
    assert factor is not None and factor.shape[1] < 100
    kernel = 1 + rbf_minus_one_reference(x.double(), width)
    torch.testing.assert_close(factor @ factor.T, kernel, rtol=0, atol=2 * TOLERANCE)
    assert rbf_factor(x, width, 10) is None


def test_labels_have_the_rank_of_their_classes() -> None:
    labels = torch.nn.functional.one_hot(torch.arange(500) % 7).float()
    factor = CentredKernel(labels, gamma(labels, 1.0, "median"), torch.float32).factor
    assert factor is not None and factor.shape[1] == 7


def test_other_shapes_and_no_gradient() -> None:
    images = torch.rand(20, 3, 4, 4).mT.requires_grad_()
    result = hsic_test(images, torch.rand(20), num_permutations=5)
    assert not result.statistic.requires_grad
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = hsic_test(images, images.flatten(1)[:, ::2], num_permutations=5)
    torch.testing.assert_close(
        inside.null, hsic_test(images, images.flatten(1)[:, ::2], num_permutations=5).null, rtol=0, atol=0
    )


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((torch.rand(4, 2), torch.rand(4, 2)), {}, "at least 5 samples, got N=4"),
        ((torch.rand(9, 2), torch.rand(8, 2)), {}, "same number of samples"),
        ((torch.rand(9, 2), torch.full((9, 2), torch.nan)), {}, "y must be finite, got NaN or Inf"),
        (
            (torch.rand(9, 2), torch.rand(9, 2)),
            {"num_permutations": 0},
            "num_permutations must be > 0 and finite, got 0",
        ),
        ((torch.rand(9, 2), torch.rand(9, 2)), {"bandwidth": "mean"}, "bandwidth must be one of"),
        ((torch.rand(9, 2), torch.rand(9, 2)), {"estimator": "best"}, "estimator must be one of"),
        ((torch.rand(9, 2), torch.rand(9, 2)), {"bandwidth": "paper", "sigma": (5.0, 0.0)}, "sigma must be > 0"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refuses(arguments: tuple[Tensor, Tensor], options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        hsic_test(*arguments, **options)  # type: ignore[arg-type]
