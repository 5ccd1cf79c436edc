"""Smallest perturbations in the report: ε₅₀ and its interval, distances that are sizes of verified images."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_classifier import DIGITS, EPS, SmallNet

from mimir_fast.evaluation import evaluate
from mimir_fast.evaluation.images import load_images
from mimir_fast.evaluation.statistics import median_interval
from mimir_fast.evaluation.topics.minimal import compare, in_words


@pytest.mark.parametrize("n", [6, 17, 60, 400])
def test_order_statistics_hold_the_median_as_often_as_said(n: int) -> None:
    stats = pytest.importorskip("scipy.stats")
    low, high = median_interval([float(i) for i in range(1, n + 1)])
    # Both ends are as likely to fail; the next order statistics would fail too often.
    assert low + high == n + 1
    assert stats.binom.cdf(low - 1, n, 0.5) <= 0.025 < stats.binom.cdf(low, n, 0.5)
    assert median_interval([0.1, 0.2, math.inf]) == (0.0, math.inf), "three images say nothing"


@pytest.mark.parametrize(("norm", "eps"), [("linf", EPS), ("l2", 0.7)])
def test_distances_are_those_of_misclassified_images(
    norm: str, eps: float, small_model: SmallNet, tmp_path: Path
) -> None:
    images = load_images(DIGITS, torch.arange(24).numpy())
    results = evaluate(
        small_model, images.images, images.labels, suite="table", autoattack="no", norm=norm, eps=eps, minimal=16,
        save_adversarial=True, output_dir=str(tmp_path),
    )  # fmt: skip
    found = results.sections["minimal"]
    (file,) = (tmp_path / "adversarial/minimal").glob("*.safetensors")
    kept = load_file(file)
    clean = images.images[kept["samples"]].float() / 255
    with torch.no_grad():
        assert (small_model(kept["images"]).argmax(dim=1) != kept["labels"]).all()
    order = torch.inf if norm == "linf" else 2
    sizes = torch.linalg.vector_norm((kept["images"] - clean).flatten(1), order, dim=1)
    distances = torch.tensor([found["distances"][str(int(s))] for s in kept["samples"]])
    torch.testing.assert_close(distances.float(), sizes)

    assert found["unbroken"] == 0 and found["eps50"] == pytest.approx(float(distances.sort().values[7]))
    assert found["eps50_interval"][0] <= found["eps50"] <= found["eps50_interval"][1]
    assert found["accuracy"][0] == found["clean"] / 16 and found["accuracy"][-1] == 0
    assert found["at_eps"]["correct"] == int((distances > eps).sum())
    # It is an attack within the ball, on a part of the images.
    (part,) = results.partial
    assert part["tried"] == ["smallest perturbation"] and part["correct"] <= found["at_eps"]["correct"]
    assert "smallest perturbation (16)" in results.rows["markdown"]
    page = (tmp_path / "report.html").read_text()
    assert "ε₅₀ = " in page and f"correct without one: {found['clean']} were found." in page
    assert in_words(found["eps50"], found["norm"]) in compare([("a", found), ("b", found)])


def test_a_model_that_nothing_breaks_has_no_median(small_model: SmallNet, tmp_path: Path) -> None:
    class Constant(SmallNet):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 0 * super().forward(x) + 3 * torch.eye(10)[0]

    images = load_images(DIGITS, torch.arange(16).numpy()).images
    results = evaluate(
        Constant(), images, torch.zeros(16, dtype=torch.long), suite="table", autoattack="no", eps=EPS, minimal=16,
        output_dir=str(tmp_path),
    )  # fmt: skip
    found = results.sections["minimal"]
    assert found["unbroken"] == 16 and found["eps50"] is None and found["eps50_interval"] == [None, None]
    page = (tmp_path / "report.html").read_text()
    assert "ε₅₀ = not reached (95 % interval not reached to not reached)" in page and "is the gradient masked?" in page
