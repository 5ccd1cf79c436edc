"""A question from its cases to its records: every size is there, and what fails or is late is a line, not the end."""

import time
from dataclasses import replace
from importlib import import_module
from typing import get_args

import pytest
import torch

from benchmarks import cli, record, runner
from benchmarks.case import Provider, Size
from benchmarks.ceilings import Ceilings
from benchmarks.device_suite import PART_SECONDS
from benchmarks.questions import QUESTIONS
from benchmarks.runner import run_question
from mimir_fast.versions import environment

CPU = torch.device("cpu")
CEILINGS = Ceilings(copy_gbps=1.0, tflops={"fp32": 1.0})


@pytest.mark.parametrize("question", QUESTIONS)
def test_tables_of_sizes_are_complete(question):
    tables = [t for t in vars(import_module(f"benchmarks.{question}")).values() if isinstance(t, dict) and "quick" in t]
    assert all(set(table) == set(get_args(Size)) for table in tables)


@pytest.fixture
def asked(monkeypatch):
    """`asked(cases, …)`: the records of a question that has these cases."""

    def run(cases, **options):
        monkeypatch.setattr(runner, "cases_of", lambda question: lambda device, size: iter(cases()))
        options = {"box_s": 0.0} | options
        return list(run_question("some", CPU, "tiny", CEILINGS, **options))

    return run


def test_what_is_there_is_not_run_again(asked, squares, monkeypatch):
    monkeypatch.setattr(record, "environment_once", lambda: environment() | {"commit": "c0ffee"})
    sized = [squares(params={"n": n}) for n in (1, 2)]
    (first,) = asked(lambda: sized[:1])
    known = record.finished(first, CPU, timed=True)
    assert len(known) == 2
    ((ours, _),) = asked(lambda: sized, known=known)
    assert ours.params == {"n": 2}
    for change in (
        {"dirty": True},
        {"commit": "another"},
        {"status": "failed"},
        {"ms": {}},
        {"ms": {"disturbed": 0.1}},
    ):
        assert not record.finished([replace(r, **change) for r in first], CPU, timed=True)
    assert record.finished([replace(r, ms={}) for r in first], CPU, timed=False) == known


def test_shares_of_a_part_fit_into_it():
    for part in ("kernels", "steps"):
        assert sum(q.suite_s for q in QUESTIONS.values() if q.suite == part) <= PART_SECONDS
    assert all(bool(q.suite) == bool(q.suite_s) for q in QUESTIONS.values())


def test_late_case_is_broken_off_and_later_ones_are_passed_over(asked, squares):
    slow = Provider("mimir_fast slow", lambda x: time.sleep(30))
    (late,), (later,) = asked(lambda: [squares(slow), squares()], seconds=0.3)
    assert late.status == later.status == "skipped"
    assert "not done after 0." in late.note and "no time left" in later.note


def test_case_without_a_definition_does_not_end_the_others(asked, squares):
    def reference(x):
        raise RuntimeError("no definition")

    (failed,), fine = asked(lambda: [squares(reference=reference), squares()])
    assert failed.status == "failed" and "no definition" in failed.note and cli.verdict([[failed]]) == 1
    assert [record.status for record in fine] == ["ok", "ok"]


def test_failing_set_up_is_a_failure_and_a_missing_package_is_not(asked, squares):
    def cases(error):
        yield squares()
        raise error

    _, (failed,) = asked(lambda: cases(RuntimeError("no data")))
    _, (skipped,) = asked(lambda: cases(ModuleNotFoundError("No module named 'sklearn'", name="sklearn")))
    assert (failed.impl, failed.status, cli.verdict([[failed]])) == ("set-up", "failed", 1)
    assert (skipped.status, cli.verdict([[skipped]])) == ("skipped", 0)


def test_only_names_a_case_or_a_parameter(asked, squares):
    both = [squares(), squares(params={"n": 17})]
    assert len(asked(lambda: both)) == len(asked(lambda: both, only="square")) == 2
    ((record, _),) = asked(lambda: both, only="n=17")
    assert record.params == {"n": 17}
