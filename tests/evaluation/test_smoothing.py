"""Randomised smoothing: the bound against SciPy, radii against a linear model's, and the topic from end to end."""

import json
from pathlib import Path

import pytest
import torch
from small_classifier import DIGITS, EPS, SmallNet
from torch import Tensor, nn

from mimir_fast.evaluation import evaluate
from mimir_fast.evaluation.config import EvaluateConfig
from mimir_fast.evaluation.images import load_images
from mimir_fast.evaluation.results import Results
from mimir_fast.evaluation.smoothing import certified_radius, gaussian_noise, lower_bound, smoothed_answer
from mimir_fast.evaluation.topic import Setup
from mimir_fast.evaluation.topics import smoothing

stats = pytest.importorskip("scipy.stats")
SIGMA, ALPHA = 0.25, 0.001


def reference_bound(hits: int, draws: int, alpha: float) -> float:
    """The p at which `hits` or more have probability α, by bisection of the exact binomial tail."""
    low, high = 0.0, hits / draws
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if stats.binom.sf(hits - 1, draws, middle) < alpha else (low, middle)
    return low


def reference_radius(hits: int, draws: int, sigma: float, alpha: float) -> float | None:
    p = reference_bound(hits, draws, alpha)
    return sigma * stats.norm.ppf(p) if p > 0.5 else None


@pytest.mark.parametrize(
    ("hits", "draws"), [(1, 10), (60, 100), (51, 100), (99, 100), (100, 100), (8123, 10_000), (99_990, 100_000)]
)
def test_bound_and_radius_are_those_of_the_exact_tail(hits: int, draws: int) -> None:
    for alpha in (0.001, 0.05):
        assert lower_bound(hits, draws, alpha) == pytest.approx(reference_bound(hits, draws, alpha), rel=1e-9)
        wanted = reference_radius(hits, draws, SIGMA, alpha)
        assert certified_radius(hits, draws, SIGMA, alpha) == (wanted and pytest.approx(wanted, rel=1e-7))
    library = stats.binomtest(hits, draws, alternative="greater").proportion_ci(0.999, method="exact").low
    assert lower_bound(hits, draws, 0.001) == pytest.approx(library, rel=1e-9)
    assert lower_bound(0, draws, 0.001) == 0 and certified_radius(draws // 2, draws, SIGMA, 0.001) is None
    assert lower_bound(draws, draws, 0.001) == pytest.approx(0.001 ** (1 / draws))


def test_noise_is_normal_and_a_function_of_sample_and_draw() -> None:
    draws = torch.arange(300)
    noise = gaussian_noise(7, draws, 5, 33)
    assert noise.shape == (300, 33) and stats.kstest(noise.flatten().numpy(), "norm").pvalue > 0.01
    assert abs(torch.corrcoef(noise.T).fill_diagonal_(0)).max() < 0.3  # cosines and sines of one radius too
    torch.testing.assert_close(gaussian_noise(7, draws[17:18], 5, 33)[0], noise[17])
    for other in (
        gaussian_noise(8, draws, 5, 33),
        gaussian_noise(7, draws, 6, 33),
        gaussian_noise(7, draws + 1, 5, 33),
    ):
        assert abs(torch.corrcoef(torch.stack([other.flatten(), noise.flatten()]))[0, 1]) < 0.05


class Border(nn.Module):
    """Class 1 where the first direction's coordinate is above 1/2: an L2 margin that is known."""

    def forward(self, x: Tensor) -> Tensor:
        along = x.flatten(1).sum(dim=1) / x[0].numel() ** 0.5
        return torch.stack([torch.zeros_like(along), along - 0.5 * x[0].numel() ** 0.5], dim=1)


def test_radii_of_a_linear_model_stay_below_its_margins_and_approach_them() -> None:
    margins, size = (0.1, 0.2, 0.3, 0.4), 1 * 6 * 7
    radii: dict[int, list[float]] = {}
    for draws in (300, 30_000):
        radii[draws] = []
        for sample, margin in enumerate(margins):
            image = torch.full((1, 6, 7), 0.5 + margin / size**0.5)
            guess, hits = smoothed_answer(
                Border(), image, SIGMA, select=50, draws=draws, sample=sample, seed=0, batch_size=1000
            )
            assert guess == 1
            radius = certified_radius(hits, draws, SIGMA, ALPHA)
            assert radius is None or radius < margin
            radii[draws].append(radius or 0.0)
    gaps = {draws: [m - r for m, r in zip(margins, found, strict=True)] for draws, found in radii.items()}
    assert max(gaps[30_000]) < 0.02 and all(b < a for a, b in zip(gaps[300], gaps[30_000], strict=True))


def test_counts_do_not_depend_on_the_batch(small_model: SmallNet) -> None:
    image = load_images(DIGITS, torch.tensor([3]).numpy()).images[0].float() / 255
    answers = [
        smoothed_answer(small_model, image, 0.4, select=20, draws=200, sample=3, seed=1, batch_size=size)
        for size in (7, 220)
    ]
    assert answers[0][0] == answers[1][0] and abs(answers[0][1] - answers[1][1]) <= 1  # rounding may turn one answer
    assert 0 < answers[0][1] < 200, "noise that changes nothing, or everything, would test nothing"


def test_what_is_not_finite_is_no_class() -> None:
    class Broken(Border):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * torch.nan

    answer = smoothed_answer(Broken(), torch.rand(1, 4, 4), SIGMA, select=5, draws=10, sample=0, seed=0, batch_size=4)
    assert answer == (-1, 0)


def test_the_topic_certifies_resumes_and_says_what_is_certified(small_model: SmallNet, tmp_path: Path) -> None:
    images = load_images(DIGITS, torch.arange(12).numpy())
    asked = {
        "suite": "table", "autoattack": "no", "eps": EPS, "output_dir": str(tmp_path), "smoothing": (0.1, 0.3),
        "smoothing_images": 6, "smoothing_select": 20, "smoothing_draws": 100,
    }  # fmt: skip

    def run(**more: object) -> Results:
        return evaluate(small_model, images.images, images.labels, **{**asked, **more})

    found = run().sections["smoothing"]
    assert list(found) == ["0.1", "0.3"]
    for numbers in found.values():
        accuracies = [e["accuracy"] for e in numbers["certified"]]
        assert accuracies == sorted(accuracies, reverse=True) and numbers["total"] == 6
        assert numbers["curve"][0]["accuracy"] == accuracies[0] and len(numbers["answers"]) == 6
        assert numbers["certified"][0]["radius"] == 0 and numbers["certified"][-1]["radius"] <= numbers["largest"]
        kept = [r for guess, r in numbers["answers"].values() if r is not None]
        assert len(kept) + numbers["abstained"] == 6 and max(kept) <= numbers["largest"]
    page = (tmp_path / "report.html").read_text()
    assert "is not the model itself but the smoothed classifier" in page

    # Stopped after the second image: the first two rows stay, and the rest is as it was.
    journal = tmp_path / "progress/smoothing_0.1@few-6.0of1.jsonl"
    lines = journal.read_text().splitlines(keepends=True)
    assert len(lines) == 7, "saved image by image"
    journal.write_text("".join(lines[:3]) + lines[3][:10])
    again = run(smoothing_alpha=0.01, smoothing_radii=(0.05,)).sections["smoothing"]
    rows = [json.loads(line) for line in journal.read_text().splitlines()]
    assert [row["start"] for row in rows[1:]] == list(range(6))
    assert [e["radius"] for e in again["0.1"]["certified"]] == [0.05]
    assert again["0.1"]["largest"] > found["0.1"]["largest"], "less sure, so farther; nothing is drawn again for that"
    for sample, (guess, radius) in again["0.1"]["answers"].items():
        assert guess == found["0.1"]["answers"][sample][0] and (radius or 0) >= (
            found["0.1"]["answers"][sample][1] or 0
        )

    rows = [[column.key, column.total] for column in smoothing.columns(again)]
    assert rows == [["smoothing 0.1 100 0.01 0.05", 6], ["smoothing 0.3 100 0.01 0.05", 6]]
    shown = smoothing.compare([("first", found), ("other", again)])
    assert "other, σ = 0.3 (6 images)" in shown and "not of the models themselves" in shown


def test_noises_that_are_nearly_equal_have_files_of_their_own(small_model: SmallNet) -> None:
    config = EvaluateConfig("m", "table", DIGITS, eps=EPS, autoattack="no", smoothing=(0.25, 0.2500000001))
    setup = Setup(config, 9, tuple("0123456789"), False, True, lambda spec: small_model)
    first, second = smoothing.measurements(setup)
    assert first.file != second.file and first.label != second.label


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"smoothing": (0.0,)}, "smoothing=0, wanted more than 0"),
        ({"smoothing": (0.25,), "smoothing_draws": 9}, "certify nothing"),
        ({"smoothing": (0.25,), "smoothing_alpha": 0.5}, "smoothing_alpha=0.5, wanted more than 0 and less than 0.5"),
        ({"smoothing": (0.25,), "smoothing_radii": (-1.0,)}, "smoothing_radii=-1"),
    ],
)
def test_what_cannot_be_certified_is_refused(options: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        EvaluateConfig("a model", **options)
