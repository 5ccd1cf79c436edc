"""From Python: evaluate a model and images in memory, and robust accuracy as a metric; both leave the model alone."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from small_classifier import EPS, SmallNet, train_small
from torch import Tensor, nn

from mimir_fast.attacks.lp import attack_classifier
from mimir_fast.evaluation import RobustAccuracy, evaluate
from mimir_fast.evaluation.attacks import make_threat
from mimir_fast.evaluation.images import EvaluationImages
from mimir_fast.evaluation.measure import Count

QUICK: dict[str, Any] = {"suite": "table", "autoattack": "no", "eps": EPS}


@pytest.fixture
def few(digits_images: EvaluationImages) -> EvaluationImages:
    return digits_images.evenly(30)


def test_a_model_in_memory_is_evaluated_as_a_checkpoint_is(few: EvaluationImages, tmp_path: Path) -> None:
    model = train_small(20).train()
    for parameter in model.head.parameters():
        parameter.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    results = evaluate(model, few.images, few.labels, **QUICK)
    assert model.training and [p.requires_grad for p in model.parameters()] == [True] * 8 + [False] * 2
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert results.images["count"] == 30 and results.images["source"] == "memory" and results.choices["data"]["source"]
    with torch.no_grad():
        right = model.eval()(few.images.float() / 255).argmax(1) == few.labels
        x = attack_classifier(
            model, few.images.float() / 255, few.labels, make_threat("linf", EPS, 20), samples=torch.arange(30)
        )
        stands = right & (model(x).argmax(1) == few.labels)
    attacks = results.sections["accuracy"]["attacks"]
    assert results.clean["correct"] == int(right.sum()) and attacks["pgd20"]["correct"] == int(stands.sum()) < 30
    assert (
        results.command
        == "mimir_fast.evaluation.evaluate(model, images, labels, suite='table', autoattack='no', " + (f"eps={EPS!r})")
    )
    # On disk where it is asked for; floats are the same images; what was measured is not measured again.
    lines: list[str] = []
    for images in (few.images, few.images.float() / 255):
        kept = evaluate(
            model, images, few.labels.tolist(), output_dir=str(tmp_path / "out"), classes=tuple("abcdefghij"),
            log=lines.append, **QUICK,
        )  # fmt: skip
    assert kept.robust == results.robust and (tmp_path / "out" / "report.html").is_file()
    assert json.loads((tmp_path / "out" / "results.json").read_text())["images"]["count"] == 30
    with pytest.raises(ValueError, match="memory"):
        evaluate(model, few.images.flip(0), few.labels.flip(0), output_dir=str(tmp_path / "out"), **QUICK)


def test_one_step_in_an_l2_ball_is_called_fgm(few: EvaluationImages) -> None:
    lines: list[str] = []
    options: dict[str, Any] = {**QUICK, "norm": "l2", "eps": 0.5}
    results = evaluate(train_small(20), few.images, few.labels, limit=4, log=lines.append, **options)
    attacks = results.sections["accuracy"]["attacks"]
    assert attacks["fgm"]["label"] == "FGM" and "fgsm" not in attacks
    assert not any("fgsm" in line.lower() for line in lines) and any("FGM" in line for line in lines)


def test_the_papers_step_at_two_levels(few: EvaluationImages) -> None:
    """At 2/255 the suites that repeat the papers' attacks step by 1/255, the others by ε/4."""
    found = [
        evaluate(train_small(20), few.images, few.labels, limit=2, suite=suite, autoattack="no", eps=2 / 255)
        for suite in ("paper", "table")
    ]  # fmt: skip
    steps = [r.sections["accuracy"]["attacks"]["pgd20"]["parameters"]["alpha"] for r in found]
    assert steps[0] == found[0].sections["accuracy"]["faced"]["PGD-20"]["alpha"]
    assert steps == pytest.approx([1 / 255, 0.5 / 255])


def test_autoattack_without_its_package_is_refused_at_once(
    few: EvaluationImages, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyautoattack", None)
    lines: list[str] = []
    with pytest.raises(ImportError, match=r"pip install 'pyautoattack<0\.3'.*--autoattack no"):
        evaluate(train_small(2), few.images, few.labels, log=lines.append, suite="table", eps=EPS)
    assert not lines


def test_any_callable_and_its_normalisation(few: EvaluationImages) -> None:
    model = train_small(20)
    plain = evaluate(model, few.images, few.labels, limit=10, **QUICK)
    scaled = evaluate(
        lambda x: model(x * 0.5 + 0.2), few.images, few.labels, limit=10, mean=(0.2,), std=(0.5,), **QUICK
    )
    del scaled.sections["accuracy"]["attacks"]["natural"]["mean_loss"]  # equal up to rounding
    for name in ("natural", "fgsm", "pgd20"):
        first, second = (r.sections["accuracy"]["attacks"][name]["correct"] for r in (plain, scaled))
        assert abs(first - second) <= 1 and plain.images["count"] == 10


@pytest.mark.parametrize(
    ("images", "labels", "model", "words"),
    [
        (torch.rand(4, 1, 8, 8), [0, 1, 2, 3], SmallNet(), r"no multiples of 1/255.*round"),
        (torch.full((4, 1, 8, 8), 2.0), [0, 1, 2, 3], SmallNet(), r"from 2 to 2, wanted \[0, 1\].*mean"),
        (torch.full((4, 1, 8, 8), torch.nan), [0, 1, 2, 3], SmallNet(), "images hold NaN"),
        (torch.zeros(4, 8, 8), [0, 1, 2, 3], SmallNet(), r"wanted \(N, 1 or 3, H, W\)"),
        (torch.zeros(4, 1, 8, 8), [0, 1, 2, 10], SmallNet(), "wanted 0 to 9"),
        (torch.zeros(4, 1, 8, 8), [0, 1, 2], SmallNet(), "4 images but 3 labels"),
        (torch.zeros(4, 1, 8, 8), [0, 1, 2, 3], SmallNet().half(), r"float16.*model\.float\(\)"),
        (torch.zeros(4, 1, 9, 9), [0, 1, 2, 3], nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), "does not take images"),
    ],
)
def test_what_does_not_fit_is_explained(images: Tensor, labels: list[int], model: nn.Module, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        evaluate(model, images, labels, **QUICK)


def test_the_metric_counts_what_pgd_leaves(small_model: nn.Module, few: EvaluationImages) -> None:
    images = few.images.float() / 255
    metric, restarted = RobustAccuracy(small_model, eps=EPS), RobustAccuracy(small_model, eps=EPS, restarts=3)
    clean = RobustAccuracy(small_model, eps=0)
    assert metric.compute().isnan()
    for start in range(0, 30, 12):
        for each in (metric, restarted, clean):
            each.update(images[start : start + 12], few.labels[start : start + 12])
    with torch.no_grad():
        assert float(clean.compute()) == pytest.approx(
            float((small_model(images).argmax(1) == few.labels).float().mean())
        )
    assert 0 < float(restarted.compute()) <= float(metric.compute()) < float(clean.compute())
    assert metric.count == Count(round(30 * float(metric.compute())), 30)
    # A start belongs to the image: neither the batch nor the order matters.
    whole, order = RobustAccuracy(small_model, eps=EPS), torch.randperm(30, generator=torch.Generator().manual_seed(1))
    alone = whole(images[order], few.labels[order])
    assert alone == whole.compute() == metric.compute()
    assert 0 <= float(whole(images[:5], few.labels[:5])) <= 1 and whole.count.total == 35
    whole.reset()
    assert whole.count.total == 0


def test_a_collection_of_torchmetrics_keeps_them_apart(small_model: nn.Module, few: EvaluationImages) -> None:
    """It updates one for several whose states are equal after the first batch: here no image is broken at first."""
    torchmetrics = pytest.importorskip("torchmetrics", reason="pip install torchmetrics")
    weak, strong = RobustAccuracy(small_model, eps=1e-4), RobustAccuracy(small_model, eps=EPS)
    collection = torchmetrics.MetricCollection({"weak": weak, "strong": strong})
    images, labels = few.images.float() / 255, few.labels
    with torch.no_grad():
        right = small_model(images).argmax(1) == labels
    easy = attack_classifier(small_model, images, labels, make_threat("linf", EPS, 20))
    with torch.no_grad():
        easy = (small_model(easy).argmax(1) == labels) & right
    collection.update(images[easy], labels[easy])
    collection.update(images[~easy], labels[~easy])
    found = collection.compute()
    assert float(found["strong"]) < float(found["weak"]) and not weak.state_dict(), "the model is no part of it"
    assert float(collection(images, labels)["strong"]) < 1


@pytest.mark.parametrize("wrong", [{"draws": 0}, {"num_steps": 0}, {"restarts": 0}, {"norm": "l2"}], ids=str)
def test_a_metric_that_would_not_attack_is_refused(wrong: dict[str, Any], small_model: nn.Module) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        RobustAccuracy(small_model, **wrong)


@pytest.mark.parametrize(
    ("answers", "said"),
    [
        (lambda logits: logits.softmax(1), "probabilities"),
        (lambda logits: logits.detach(), "no gradient"),
        (lambda logits: logits * torch.nan, "not finite"),
    ],
    ids=["probabilities", "detached", "nan"],
)
def test_a_metric_looks_at_its_model(answers: Any, said: str, small_model: nn.Module) -> None:
    metric = RobustAccuracy(lambda x: answers(small_model(x)), eps=EPS)
    with pytest.raises(ValueError, match=said):
        metric.update(torch.rand(4, 1, 8, 8), torch.zeros(4, dtype=torch.int64))


def test_choices_and_arrays_are_refused_by_name(few: EvaluationImages) -> None:
    """Python looks at no annotation."""
    with pytest.raises(ValueError, match="norm='l3', wanted one of linf, l2, l1"):
        evaluate(SmallNet(), few.images, few.labels, **{**QUICK, "norm": "l3"})
    with pytest.raises(TypeError, match="images must be"):
        evaluate(SmallNet(), few.images.numpy(), few.labels, **QUICK)


def test_classes_that_take_turns_keep_their_shares(few: EvaluationImages) -> None:
    """Every second of images whose two classes alternate would be of one class."""
    images = few.images.repeat(4, 1, 1, 1)
    always_0, alternating = SmallNet(num_classes=2).eval(), torch.arange(len(images)) % 2
    with torch.no_grad():
        always_0.head.bias.copy_(torch.tensor([50.0, 0.0]))
    results = evaluate(always_0, images, alternating, limit=len(images) // 4 * 2, **QUICK)
    assert results.clean["correct"] == len(images) // 4
