"""RobustBench's claim form: what is known stands in it, what is not is a blank, and what is amiss is said."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from small_classifier import DIGITS, SmallNet

from mimir_fast.compare import CompareConfig, compare, config_from
from mimir_fast.evaluation import evaluate
from mimir_fast.evaluation.claim import architecture_of
from mimir_fast.evaluation.images import load_images

# Of all 236 files in RobustBench's model_info; perturbations have `autoattack_acc` too.
FIELDS = {
    "additional_data", "architecture", "authors", "clean_acc", "dataset", "eps", "link", "name",
    "number_forward_passes", "reported", "venue",
}  # fmt: skip


@pytest.fixture(scope="module")
def evaluated(small_model: SmallNet, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """results.json of a model that AutoAttack breaks at once on most images."""
    pytest.importorskip("pyautoattack")
    images, folder = load_images(DIGITS, torch.arange(5).numpy()), tmp_path_factory.mktemp("claimed")
    evaluate(
        small_model, images.images, images.labels, suite="table", autoattack="yes", eps=0.4, output_dir=str(folder)
    )  # fmt: skip
    found: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return found


def claimed(found: dict[str, Any], folder: Path, changes: dict[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
    """(the issue, the JSON file) of an evaluation, as if it was of CIFAR-10 at 8/255."""
    found = json.loads(json.dumps(found))
    found["images"]["source"] = "cifar10"
    found["sections"]["accuracy"]["eps_text"] = "8/255"
    for path, value in (changes or {}).items():
        *sections, last = path.split(".")
        inner = found
        for name in sections:
            inner = inner[name]
        inner[last] = value
    folder.mkdir(exist_ok=True)
    (folder / "results.json").write_text(json.dumps(found))
    compare(CompareConfig((str(folder),), str(folder / "claim"), "robustbench"))
    (file,) = (folder / "claim/model_info").rglob("*.json")
    assert file.relative_to(folder / "claim") == Path("model_info/cifar10/Linf/SmallNet.json")
    return (folder / "claim/claim.md").read_text(), json.loads(file.read_text())


def test_what_is_known_is_filled_in_and_the_rest_is_blank(evaluated: dict[str, Any], tmp_path: Path) -> None:
    text, info = claimed(evaluated, tmp_path / "whole")
    assert set(info) == FIELDS | {"autoattack_acc"}
    attack = evaluated["sections"]["autoattack"]
    natural = evaluated["sections"]["accuracy"]["attacks"]["natural"]
    assert info["clean_acc"] == f"{100 * natural['accuracy']:.2f}" and info["eps"] == "8/255"
    assert info["autoattack_acc"] == info["reported"] == f"{100 * attack['accuracy']:.2f}"
    blank = {name for name, value in info.items() if str(value).startswith("<")}
    assert blank == {"additional_data", "architecture", "authors", "link", "name", "number_forward_passes", "venue"}
    assert "- **Threat Model**: Linf\n- **eps**: 8/255\n" in text
    assert f"- **Robust accuracy**: {info['autoattack_acc']}\n" in text
    assert "AutoAttack, version standard (pyautoattack" in text and evaluated["choices"]["weights_sha256"] in text
    assert text.index("# Paper Information") < text.index("# Leaderboard Claim(s)") < text.index("# Model Zoo:")
    assert "on 5 images, the leaderboard is of 10000" in text


def test_what_is_amiss_is_a_blank_or_a_note(evaluated: dict[str, Any], tmp_path: Path) -> None:
    text, info = claimed(evaluated, tmp_path / "part", {"sections.autoattack.whole": False})
    assert info["autoattack_acc"].startswith("<") and "evaluate with --autoattack yes" in text
    text, _ = claimed(evaluated, tmp_path / "other", {
        "sections.accuracy.eps_text": "4/255", "verdicts.validity": {"kind": "bad", "large": "", "text": "Masked."},
        "choices.sanity.deterministic": False,
    })  # fmt: skip
    assert "ε is 4/255, that of the leaderboard 8/255." in text and "- Masked." in text and "deterministic" in text
    lower = {"correct": 0, "total": 5, "accuracy": 0.0, "interval": [0.0, 0.4]}
    _, info = claimed(evaluated, tmp_path / "lower", {
        "sections.accuracy.robust": lower, "sections.accuracy.tried": ["PGD-20", "AutoAttack"],
        "sections.autoattack.accuracy": 0.4,
    })  # fmt: skip
    assert info["autoattack_acc"] == "40.00" and info["external"] == "0.00" and "PGD-20" in info["footnote"]


def test_what_has_no_leaderboard_is_refused(evaluated: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text(json.dumps(evaluated))
    with pytest.raises(ValueError, match="no leaderboard for memory, Linf"):
        compare(config_from([str(tmp_path), "--format", "robustbench", "--output", str(tmp_path / "claim")]))
    with pytest.raises(ValueError, match="would be one file"):
        claimed(evaluated, tmp_path)
        compare(CompareConfig((str(tmp_path), str(tmp_path)), str(tmp_path / "two"), "robustbench"))


def test_architectures_are_those_that_something_says(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model": {"family": "vit", "encoder": "base", "patch_size": 16}}')
    said = {
        "timm:resnet50@robust.pth": "resnet50", "robustbench:imagenet/Linf/Xu2024MIMIR_Swin-B": "Swin-B",
        str(tmp_path): "ViT-base/16", "weights.pth": "<architecture>",
    }  # fmt: skip
    assert {spec: architecture_of({"checkpoint": spec}) for spec in said} == said
