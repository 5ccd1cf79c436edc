"""Models whose arithmetic breaks, and sections that do: what is not finite is never right, and a report is written."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from small_classifier import DIGITS, EPS, SmallNet, train_small
from torch import Tensor, nn

from mimir_fast.attacks.lp import LpThreat, attack_classifier, size_of
from mimir_fast.attacks.pgd import NO_CLASS, is_correct, predicted
from mimir_fast.attacks.threat_model import LinfThreat
from mimir_fast.data.batch import Batch
from mimir_fast.evaluation import comparison
from mimir_fast.evaluation.attacks import natural
from mimir_fast.evaluation.config import EvaluateConfig
from mimir_fast.evaluation.measure import Measurement, Records, score
from mimir_fast.evaluation.report import render
from mimir_fast.evaluation.results import Results
from mimir_fast.evaluation.run import evaluate
from mimir_fast.evaluation.topic import TOPICS, Numbers, Setup, Topic, register
from mimir_fast.evaluation.topics import accuracy as accuracy_topic
from mimir_fast.methods.classification import accuracy
from mimir_fast.methods.probe import probe
from mimir_fast.probing.features import Features
from mimir_fast.probing.heads import Heads


class Overflowing(nn.Module):
    """Right on images of whole grey levels, NaN on all others: what an attack makes of an overflow."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, images: Tensor) -> Tensor:
        levels = 255 * images.detach()
        off = (levels - levels.round()).abs().amax(dim=(1, 2, 3)) > 1e-3
        return self.net(images) + torch.where(off, torch.nan, 0.0)[:, None]


def small_model() -> nn.Module:
    """For `--checkpoint`; set by the fixture."""
    return Overflowing(train_small(30)).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished quick evaluation of the overflowing model."""
    folder = tmp_path_factory.mktemp("overflow")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parent))
        config = EvaluateConfig(
            "test_not_finite:small_model", data=DIGITS, eps=EPS, limit=16, output_dir=str(folder / "out")
        )  # fmt: skip
        evaluate(config, log=lambda line: None)
    return folder / "out"


def test_a_model_that_is_nan_under_attack_is_not_robust(folder: Path) -> None:
    results = Results.read(folder / "results.json")
    assert results.clean["accuracy"] > 0.5
    pgd = results.sections["accuracy"]["attacks"]["pgd20"]
    assert pgd["correct"] == 0 == results.robust["correct"] and pgd["mean_loss"] is None
    (note,) = (note for note in results.notes if "NaN or infinite" in note)
    assert f"PGD-20: {pgd['total']} of {pgd['total']} images" in note and "no attack" not in note
    assert any(seen == "not finite" for _, seen, _ in results.sections["classes"]["confusions"])
    assert any(image["after"] == "not finite" for image in results.sections["examples"]["images"])
    page = (folder / "report.html").read_text()
    assert page == render(results) and note.replace("'", "&#x27;") in page


def test_results_are_json_of_the_standard(folder: Path) -> None:
    def refuse(token: str) -> None:
        raise AssertionError(f"{token} is no JSON")

    json.loads((folder / "results.json").read_text(), parse_constant=refuse)
    page = (folder / "report.html").read_text()
    embedded = re.search(r'<script type="application/json" id="results">(.*?)</script>', page, re.S)
    assert embedded
    json.loads(embedded.group(1), parse_constant=refuse)


def test_the_argmax_of_what_is_not_finite_is_no_class() -> None:
    logits = torch.eye(4)
    logits[0, 3], logits[1, 1], logits[2, 0] = torch.nan, torch.inf, -torch.inf
    labels = torch.arange(4)
    assert predicted(logits).tolist() == [NO_CLASS] * 3 + [3]
    assert is_correct(logits, labels).tolist() == [False] * 3 + [True]
    assert accuracy(logits, labels) == 0.25
    row = score(lambda x: logits, torch.rand(4, 1, 2, 2), torch.rand(4, 1, 2, 2), labels)  # type: ignore[arg-type]
    assert row["correct"].tolist() == [0, 0, 0, 1] and row["prediction"].tolist() == [-1, -1, -1, 3]
    assert row["margin"].isfinite().all() and (row["margin"][:3] < 0).all()


def test_heads_and_the_probe_of_training_count_it_as_wrong() -> None:
    features = Features(torch.ones(6, 3), torch.zeros(6, dtype=torch.long), torch.arange(6))
    heads = Heads(torch.full((1, 2, 3), torch.nan), torch.zeros(1, 2), (0.1,))
    assert heads.accuracies(features) == [0.0]
    net = SmallNet()
    nn.init.constant_(net.head.weight, torch.nan)
    batch = Batch(torch.rand(4, 1, 8, 8), torch.zeros(4, dtype=torch.long), torch.arange(4), torch.zeros(4))
    found = probe(net.eval(), [batch], LinfThreat(eps=0.1, alpha=0.05, num_steps=1), num_steps=1)
    assert (found.natural, found.fgsm, found.pgd) == (0, 0, 0)


class Rooted(nn.Module):
    """Takes the root of the pixels: its slope is infinite where they are black."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images.sqrt())


@pytest.mark.parametrize(("norm", "eps"), [("l2", 0.5), ("l1", 3.0)])
def test_an_infinite_slope_moves_nothing_and_the_others_do(norm: Any, eps: float) -> None:
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model, images = Rooted(SmallNet()).eval(), torch.rand(6, 1, 8, 8)
    images[:, :, :4] = 0
    x = attack_classifier(
        model, images, torch.zeros(6, dtype=torch.long), LpThreat(norm, eps, eps / 2, 2, random_start=False)
    )  # fmt: skip
    assert x.isfinite().all() and (size_of(x - images, norm) <= eps * (1 + 1e-5)).all()
    assert torch.equal(x[:, :, :4], images[:, :, :4])
    assert (size_of(x - images, norm) > eps / 4).all(), "what has a slope is followed"


def measured(setup: Setup) -> list[Measurement]:
    return [natural().on("all", "mine")]


def counted(setup: Setup, items: Sequence[Measurement], records: Records) -> Numbers:
    return {"count": records.count(items[0]).as_dict()}


def broken(*given: Any) -> Any:
    raise ZeroDivisionError("of my own")


def stop(*given: Any) -> Any:
    raise StopIteration


FAULTS = {
    "measurements": Topic("mine", "Mine", lambda setup: [Measurement("mine", broken, label="no attack")], counted, str),
    "summary": Topic("mine", "Mine", measured, stop, str),
    "numbers": Topic("mine", "Mine", measured, lambda *given: {"tensor": torch.ones(1)}, str),
    "columns": Topic("mine", "Mine", measured, counted, str, columns=broken),
    "page": Topic("mine", "Mine", measured, counted, broken),
}


def judge(folder: Path) -> Results:
    """Four images and an untrained network."""
    if not (folder / "m.ts").exists():
        torch.jit.script(SmallNet().eval()).save(str(folder / "m.ts"))
    config = EvaluateConfig(
        str(folder / "m.ts"), "table", DIGITS, eps=EPS, limit=4, autoattack="no", output_dir=str(folder / "out")
    )  # fmt: skip
    return evaluate(config, log=lambda line: None)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_section_that_fails_says_so_and_spoils_no_other(
    fault: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with TOPICS.restored():
        register(FAULTS[fault])
        results = judge(tmp_path)
    page = (tmp_path / "out/report.html").read_text()
    assert results.sections["accuracy"]["attacks"]["pgd20"]["total"] == 4 and '<section id="accuracy">' in page
    words = {"summary": "StopIteration", "numbers": "TypeError"}.get(fault, "ZeroDivisionError: of my own")
    assert words in page and words in capsys.readouterr().err
    assert ("mine" in results.sections) == (fault == "page")
    with TOPICS.restored():  # mended, it goes on
        register(Topic("mine", "Mine", measured, counted, lambda numbers: "<p>mended</p>"))
        again = judge(tmp_path)
    assert again.sections["mine"]["count"]["total"] == 4 and not any("failed" in note for note in again.notes)
    assert "<p>mended</p>" in (tmp_path / "out/report.html").read_text()


def test_without_accuracies_there_is_a_page_that_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accuracy_topic, "near_chance", broken)
    results = judge(tmp_path)
    words = "ZeroDivisionError: of my own"
    assert results.verdicts["robustness"] == {"kind": "bad", "large": "No result", "text": words}
    assert "No result" in (tmp_path / "out/report.html").read_text()
    with pytest.raises(ValueError, match="holds no accuracies"):
        comparison.load([str(tmp_path / "out")])
