"""Models side by side: paired differences against counting by hand, and the command."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from commands import Command
from small_classifier import DIGITS, EPS
from torch import nn

from mimir_fast.attacks.lp import Sparsity, attack_classifier
from mimir_fast.attacks.momentum import momentum_ensemble
from mimir_fast.compare import CompareConfig, compare, config_from
from mimir_fast.evaluation import comparison
from mimir_fast.evaluation import evaluate as evaluate_model
from mimir_fast.evaluation.attacks import make_threat, parameters_of
from mimir_fast.evaluation.config import EvaluateConfig
from mimir_fast.evaluation.images import EvaluationImages
from mimir_fast.evaluation.results import Results
from mimir_fast.evaluation.run import evaluate
from mimir_fast.evaluation.topics.autoattack import columns
from mimir_fast.models.load_report import LoadReport


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two networks of unequal training, evaluations on the same digits; one of them at another ε as well."""
    import torch
    from small_classifier import train_small

    folder = tmp_path_factory.mktemp("compared")
    for steps, name in ((120, "long"), (40, "short")):
        torch.jit.script(train_small(steps)).save(str(folder / f"{name}.ts"))
    asked: dict[str, tuple[str, dict[str, Any]]] = {
        "long": ("long", {}), "short": ("short", {}), "easy": ("short", {"eps": EPS / 4}),
        "other step": ("long", {"alpha": EPS / 20}), "fewer": ("short", {"limit": 20}),
    }  # fmt: skip
    for name, (model, options) in asked.items():
        settings = {"eps": EPS, "limit": 60, "autoattack": "no", **options}
        config = EvaluateConfig(
            str(folder / f"{model}.ts"), "table", DIGITS, output_dir=str(folder / name), **settings
        )  # fmt: skip
        evaluate(config, log=lambda line: None)
    return {name: folder / name for name in asked}


def test_differences_are_counted_image_by_image(folders: dict[str, Path]) -> None:
    evaluations = comparison.load([str(folders["long"]), str(folders["short"])])
    first, other = (one.results.sections["accuracy"]["broken_by"] for one in evaluations)
    only_first = sum(first[s] == "none" != other[s] for s in first)
    only_other = sum(other[s] == "none" != first[s] for s in first)
    found = {d.measure: d for d in comparison.differences(evaluations)}["worst case"]
    assert (found.only_first, found.only_other, found.total) == (only_first, only_other, 60)
    value, low, high = found.interval
    accuracies = [one.results.robust["accuracy"] for one in evaluations]
    assert value == pytest.approx(accuracies[1] - accuracies[0]) and low < value < high
    assert only_first != only_other, "two equal models would test nothing"
    assert not comparison.warnings(evaluations)


def test_other_radii_are_not_compared_in_pairs(folders: dict[str, Path]) -> None:
    evaluations = comparison.load([str(folders["long"]), str(folders["easy"])])
    assert [d.measure for d in comparison.differences(evaluations)] == ["no attack"]
    assert any("not comparable" in warning for warning in comparison.warnings(evaluations))


def both(folders: dict[str, Path], first: str, other: str) -> list[comparison.Evaluation]:
    """Two finished evaluations, by name."""
    return comparison.load([str(folders[first]), str(folders[other])])


def measures(evaluations: list[comparison.Evaluation]) -> set[str]:
    """What is tested; all that the reader is told is in the text that everybody sees."""
    shown = comparison.markdown(evaluations)
    assert all(warning in shown for warning in comparison.warnings(evaluations))
    return {d.measure for d in comparison.differences(evaluations)}


def test_models_on_other_images_are_compared_on_those_they_share(folders: dict[str, Path]) -> None:
    evaluations = both(folders, "long", "fewer")
    assert measures(evaluations) == {"no attack", "worst case"}
    assert {d.total for d in comparison.differences(evaluations)} == {20}
    assert any("share 20 images" in warning for warning in comparison.warnings(evaluations))


def test_images_are_the_same_by_what_they_hold(folders: dict[str, Path]) -> None:
    """Not by their positions in data of some name: those of other data are not, renamed data's are."""
    evaluations = both(folders, "long", "short")
    images = evaluations[1].results.images
    images["source"] = "the same by another name"
    assert measures(evaluations) == {"no attack", "worst case"}
    images |= {"source": "digits", "digests": {sample: f"other {sample}" for sample in images["digests"]}}
    assert measures(evaluations) == set()
    assert "no image in common" in comparison.warnings(evaluations)[0]
    del images["digests"]
    assert measures(evaluations) == set()


def test_equal_images_are_counted_each(folders: dict[str, Path]) -> None:
    evaluations = both(folders, "long", "short")
    for one in evaluations:
        one.results.images["digests"] = dict.fromkeys(one.results.images["digests"], "all alike")
    assert {d.total for d in comparison.differences(evaluations)} == {60}


def test_one_model_attacked_by_other_steps_is_shown_and_not_tested(folders: dict[str, Path]) -> None:
    evaluations = both(folders, "long", "other step")
    assert measures(evaluations) == {"no attack"}
    (clean,) = comparison.differences(evaluations)
    assert clean.only_first == clean.only_other == 0
    (warning,) = comparison.warnings(evaluations)
    assert f"PGD-20: alpha {EPS / 20} and {EPS / 4}" in warning and "not tested" in warning


def test_l1_attacks_are_equal_where_their_whole_schedule_is(
    digits_images: EvaluationImages, small_model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The usual first step, asked for or not, is one attack; another one, or another rule for the rest, is another."""
    few = digits_images.evenly(12)

    def evaluated(name: str, **options: Any) -> str:
        evaluate_model(
            small_model, few.images, few.labels, suite="table", autoattack="no", norm="l1", eps=2.0,
            output_dir=str(tmp_path / name), **options,
        )  # fmt: skip
        return str(tmp_path / name)

    usual, asked, shorter = evaluated("usual"), evaluated("asked", alpha=2.0), evaluated("shorter", alpha=1.0)
    with monkeypatch.context() as patch:
        patch.setattr(Sparsity, "FIRST_PART", 0.3)
        other = evaluated("other")
    assert measures(comparison.load([usual, asked])) == {"no attack", "worst case"}
    for differing, word in ((shorter, "alpha 1.0 and 2.0"), (other, "'first': 0.3")):
        evaluations = comparison.load([usual, differing])
        assert measures(evaluations) == {"no attack"}
        assert word in comparison.warnings(evaluations)[0]


def test_l1_attacks_are_recorded_as_they_run(digits_images: EvaluationImages, small_model: nn.Module) -> None:
    """PGD's sparsity adapts; momentum moves a fixed part of the pixels by α in each step, PGD of one step does, too."""
    few = digits_images.evenly(12)
    x, y = few.images.float() / 255, few.labels
    one = replace(make_threat("l1", 2.0, 1, 1.0), random_start=False)
    several = make_threat("l1", 2.0, 9)
    recorded = [parameters_of(one), parameters_of(one, adaptive=False), parameters_of(several, adaptive=False)]
    assert [each["sparsity"] for each in recorded] == [{"pixels": 0.05}] * 3
    moved = int(0.05 * x[0].numel())
    for attacked in (attack_classifier(small_model, x, y, one), momentum_ensemble([small_model], x, y, one)):
        assert ((attacked != x).flatten(1).sum(1) <= moved).all() and (attacked != x).any()
    adaptive = parameters_of(several)["sparsity"]
    assert json.loads(json.dumps(adaptive)) == adaptive and "pixels" not in adaptive
    assert adaptive["longest_step"] == 2.0 and adaptive["shortest_step"] == 0.2 and adaptive["every"] == 1


def test_attacks_that_one_did_not_face_are_named_and_seeds_make_no_attack(folders: dict[str, Path]) -> None:
    evaluations = both(folders, "long", "short")
    faced = evaluations[1].results.sections["accuracy"]["faced"]
    faced["PGD-20"]["seed"] = 7
    assert measures(evaluations) == {"no attack", "worst case"}
    faced["AutoAttack"] = {"version": "rand"}
    assert measures(evaluations) == {"no attack"}
    assert "only one of them AutoAttack" in comparison.warnings(evaluations)[0]


def test_versions_of_autoattack_and_parts_of_the_images_are_kept_apart() -> None:
    counts = {"total": 60, "images": 60, "accuracy": 0.5, "whole": True}
    standard, rand = (
        columns({**counts, "title": "AutoAttack", "version": version})[0].key for version in ("standard", "rand")
    )
    assert standard == "autoattack" and rand == "autoattack rand"


def test_the_command_writes_both_files(folders: dict[str, Path], command: Command, tmp_path: Path) -> None:
    done = command("mimir_fast.compare", str(folders["long"]), str(folders["short"]), "--output", "side")
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "side" / "comparison.md").read_text()
    assert "PGD-20" in text and "compared with" in text and done.stdout.startswith(text)
    page = (tmp_path / "side" / "comparison.html").read_text()
    assert "long.ts" in page and "Bonett" in page and "src=" not in page


def test_what_became_of_files_of_weights_is_printed_and_kept(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(folders["long"], tmp_path / "long")
    report = LoadReport("w.pth", "timm", ["a"], {"b": "the decoder"}, assumed=["3 heads"])
    report.save(tmp_path / "long")
    found = compare(CompareConfig((str(tmp_path / "long"), str(folders["short"])), str(tmp_path / "side")))
    kept = json.loads((found.parent / "weights.json").read_text())
    assert [(Path(name).name, one) for name, one in kept.items()] == [("long.ts", report.as_dict())]
    assert "long.ts: initialised from w.pth" in capsys.readouterr().out


def test_curves_are_overlaid_and_a_run_folder_is_found(folders: dict[str, Path], tmp_path: Path) -> None:
    runs = []
    for name in ("long", "short"):
        results = Results.read(folders[name] / "results.json")
        results.sections["curve"] = {
            "norm": "linf", "judged": EPS, "eps": [0.0, EPS], "accuracy": [0.9, 0.3], "count": 40, "num_steps": 10,
            "interval": [[0.8, 0.95], [0.2, 0.4]],
        }  # fmt: skip
        folder = tmp_path / name / "evaluation" / "quick-linf-40_255"
        folder.mkdir(parents=True)
        results.write(folder / "results.json")
        runs.append(str(tmp_path / name))
    page = compare(CompareConfig(tuple(runs), str(tmp_path / "side"))).read_text()
    assert page.count("<svg") == 1 and page.count("PGD-10)</text>") == 2


def test_published_rows_are_of_the_same_data_norm_and_radius(folders: dict[str, Path]) -> None:
    results = Results.read(folders["long"] / "results.json")
    assert comparison.published_rows(results) == [], "RobustBench has no digits"
    results.images["source"] = "cifar10"
    results.sections["accuracy"] |= {"norm": "linf", "eps_text": "8/255"}
    rows = comparison.published_rows(results)
    autoattack, best = ([float(row[column].removesuffix(" %")) for row in rows] for column in (3, 4))
    assert len(rows) == 10 and best == sorted(best, reverse=True) and best[0] > 70
    # On RobustBench's page an attack made for this model breaks more than AutoAttack does.
    assert ["75.28 %", "73.10 %"] in [row[3:] for row in rows if row[0] == "Amini2024MeanSparse_S-WRN-94-16"]
    assert autoattack != sorted(autoattack, reverse=True) and all(a >= b for a, b in zip(autoattack, best, strict=True))
    results.sections["accuracy"] |= {"norm": "l2", "eps_text": "0.5"}
    assert comparison.published_rows(results) and comparison.published_rows(results) != rows


def test_what_is_missing_is_explained(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="evaluate it first"):
        comparison.load([str(tmp_path)])
    (tmp_path / "results.json").write_text('{"format": "mimir_fast.evaluation", "version": 1}')
    with pytest.raises(ValueError, match="evaluate the model again"):
        comparison.load([str(tmp_path)])
    assert config_from(["a", "b", "--output", "c"]) == CompareConfig(("a", "b"), "c")
