"""A topic from outside of the package works through the command line; only topics name topics."""

import ast
import os
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from commands import Command
from doc_blocks import ROOT, blocks_of
from small_classifier import train_small

from mimir_fast.evaluation.config import EvaluateConfig, config_type
from mimir_fast.evaluation.results import Results
from mimir_fast.evaluation.topic import Topic, options_of, register

EVALUATION = ROOT / "mimir_fast/evaluation"
FLAGS = [
    "--checkpoint", "small_classifier:small_net", "--data.source", "digits", "--data.image_size", "8",
    "--data.channels", "1", "--eps", "40/255", "--limit", "20", "--suite", "table", "--autoattack", "no",
    "--output_dir", "out",
]  # fmt: skip
ASKED = ["--import", "brightness", "--brightness", "0.1", "0.9"]


def imports_of(path: Path) -> set[str]:
    """Modules of the evaluation that a file imports anywhere, without the room's name."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {n.removeprefix("mimir_fast.evaluation.") for n in found if n.startswith("mimir_fast.evaluation.")}


@pytest.fixture
def outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the topic that docs/extend.md shows; the small model is on the path."""
    (block,) = (b for b in blocks_of(ROOT / "docs/extend.md") if b.title == "brightness.py")
    (tmp_path / "brightness.py").write_text(block.text)
    torch.save(train_small().state_dict(), tmp_path / "weights.pt")
    monkeypatch.setenv("SMALL_NET", str(tmp_path / "weights.pt"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(ROOT / "tests"), os.environ.get("PYTHONPATH")])))
    return tmp_path


def test_a_topic_from_outside_is_measured_reported_resumed_and_compared(outside: Path, command: Command) -> None:
    listing = command("mimir_fast.evaluate", "--import", "brightness", "--help_all")
    assert "--brightness" in listing.stdout and "Added to images in [0, 1]" in listing.stdout

    done = command("mimir_fast.evaluate", *FLAGS, *ASKED)
    assert done.returncode == 0, done.stderr
    results = Results.read(outside / "out/results.json")
    dim, bright = (results.sections["brightness"][f"brightness_{amount}"] for amount in ("0.1", "0.9"))
    assert dim["total"] == 20 and bright["correct"] < dim["correct"] <= results.clean["correct"]
    assert results.choices["brightness"] == [0.1, 0.9] and " --import brightness " in results.command
    page = (outside / "out/report.html").read_text()
    section = page.partition('<section id="brightness"><h2>Brightness</h2>')[2].partition("</section>")[0]
    assert "<svg" in section and '<th scope="row">brightness +0.9</th>' in section
    for row in results.rows.values():
        assert "brightness +0.1" in row and f"{100 * bright['accuracy']:.1f}" in row

    # Stopped after the first of its measurements: only the second is done again.
    first, second = (outside / f"out/progress/brightness_{amount}.0of1.jsonl" for amount in ("0.1", "0.9"))
    second.unlink()
    before = first.stat().st_mtime_ns
    again = command("mimir_fast.evaluate", *FLAGS, *ASKED)
    assert again.returncode == 0, again.stderr
    assert second.exists() and first.stat().st_mtime_ns == before
    assert Results.read(outside / "out/results.json").sections["brightness"] == results.sections["brightness"]

    compared = command("mimir_fast.compare", "out", "out/results.json", "--import", "brightness", "--output", "side")
    assert compared.returncode == 0, compared.stderr
    assert "brightness +0.9" in (outside / "side/comparison.md").read_text()


def test_names_and_options_are_unique() -> None:
    @dataclass
    class Options:
        targets: int = 1

    def none(*given: object) -> list[object]:
        return []

    with pytest.raises(ValueError, match="topic accuracy is registered twice"):
        register(Topic("accuracy", "Accuracy", none, none, str))
    with pytest.raises(ValueError, match="--targets is an option of AccuracyOptions already"):
        register(Topic("mine", "Mine", none, none, str, options=Options))


def test_options_of_a_topic_registered_too_late_are_its_defaults() -> None:
    @dataclass
    class Options:
        mine: int = 7

    assert options_of(EvaluateConfig("a.pth"), Options).mine == 7
    assert config_type() is EvaluateConfig, "nothing is registered from outside"


def test_only_topics_name_topics() -> None:
    for path in EVALUATION.glob("*.py"):
        assert not {name for name in imports_of(path) if name.startswith("topics.")}, path
