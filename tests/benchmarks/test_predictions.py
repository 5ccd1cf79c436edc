"""What is expected of a GPU is written down for every case of the suite before one runs it."""

import pytest
import torch

from benchmarks import predictions, record
from benchmarks.ceilings import Ceilings
from benchmarks.questions import QUESTIONS, cases_of
from benchmarks.runner import run_case
from mimir_fast.versions import environment

CPU = torch.device("cpu")
UNPREDICTED = {"data_wait", "jpeg_decoding"}  # bound by the CPU beside the GPU


@pytest.mark.parametrize("question", [name for name, q in QUESTIONS.items() if q.suite and name != "loader"])
def test_every_case_has_one(question):
    names = {case.name for case in cases_of(question)(CPU, "tiny")}
    assert names <= set(predictions.shares())


def test_shares_are_shares_and_have_a_reason():
    assert all(0 < low < high < 1 for low, high in predictions.shares().values())
    assert not UNPREDICTED & set(predictions.shares())


def test_prediction_stands_beside_the_measurement():
    low, high = predictions.shares()["linf_step"]
    assert predictions.expected_ms("linf_step", 3.0) == (3.0 / high, 3.0 / low)
    assert predictions.expected_ms("unheard", 3.0) is None and predictions.verdict("unheard", 3.0, 1.0) == ""
    for measured, words in (
        (3.0, "faster than predicted"),
        (3.0 / high, "as predicted"),
        (99.0, "slower than predicted"),
    ):
        assert predictions.verdict("linf_step", 3.0, measured).startswith(words)


@pytest.mark.parametrize(("gpu", "said"), [("NVIDIA H200", True), ("NVIDIA A100", False), (None, False)])
def test_only_its_device_is_judged(squares, monkeypatch, gpu, said):
    monkeypatch.setattr(record, "environment_once", lambda: environment() | {"gpu": gpu})
    monkeypatch.setattr("benchmarks.runner.environment_once", record.environment_once)
    monkeypatch.setattr(predictions, "shares", lambda: {"square": (0.5, 0.6)})
    ours, eager = run_case(squares(), CPU, Ceilings(1.0, {"fp32": 1.0}), box_s=0.0)
    assert ("predicted" in ours.note) is said and "predicted" not in eager.note
