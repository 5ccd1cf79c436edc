"""What is wrong is not timed: wrong values, NaN, elements left unwritten, wrong shapes."""

from collections import Counter

import pytest
import torch

from benchmarks.case import Case, Provider
from benchmarks.ceilings import Ceilings
from benchmarks.gate import judge, relative_errors
from benchmarks.products import Products
from benchmarks.runner import run_case

CPU = torch.device("cpu")
CEILINGS = Ceilings(copy_gbps=1.0, tflops={"fp32": 1.0})


def forgets_the_last(x):
    """Allocates and writes all but one element."""
    out = torch.empty_like(x)
    out[:-1] = x[:-1].square()
    return (out,)


WRONG = {
    "one element off": lambda x: (x * x + 1e-3 * torch.eye(1, len(x))[0],),
    "NaN": lambda x: ((x * x).index_fill(0, torch.tensor([3]), float("nan")),),
    "infinite": lambda x: (x * x / 0,),
}


@pytest.mark.parametrize("run", WRONG.values(), ids=WRONG)
def test_wrong_provider_is_refused(squares, run):
    case = squares(Provider("rival", run))
    inputs = case.make_inputs()
    _, reason = judge(case, case.providers[2], inputs, case.reference(inputs))
    assert "output 0" in reason


def test_unwritten_element_shows_because_the_memory_is_poisoned(squares):
    # The allocator gives the block just freed to the next request of its size.
    case = squares(Provider("rival", forgets_the_last), make_inputs=lambda: torch.rand(1024) + 1)
    inputs = case.make_inputs()
    _, reason = judge(case, case.providers[2], inputs, case.reference(inputs))
    assert reason


def test_refused_provider_has_no_time_and_no_speedup(squares):
    records = run_case(squares(Provider("rival", WRONG["NaN"])), CPU, CEILINGS, box_s=0.0)
    ours, eager, rival = records
    assert (ours.status, eager.status, rival.status) == ("ok", "ok", "failed")
    assert ours.speedup and ours.err["rel_fro"] < 1e-6 and ours.err["deterministic_bits"]
    assert not rival.ms and rival.speedup is None and "not the definition" in rival.note


def test_wrong_baseline_leaves_no_speedup(squares):
    case = squares()
    broken = Case(**{**vars(case), "providers": [case.providers[0], Provider("eager", WRONG["infinite"])]})
    ours, _ = run_case(broken, CPU, CEILINGS, box_s=0.0)
    assert ours.ms and ours.speedup is None


def test_failure_and_absence_of_a_provider_are_said(squares):
    def raises(error):
        def run(x):
            raise error

        return run

    no_kernel, no_package = RuntimeError("no such kernel"), ImportError("install it", name="rival")
    broken = ImportError("cannot import name", name="mimir_fast.ops")
    errors = {"breaks": no_kernel, "absent": no_package, "our own import": broken}
    case = squares(*(Provider(name, raises(error)) for name, error in errors.items()), Provider("no", str, skip="why"))
    *_, breaks, absent, ours, skipped = run_case(case, CPU, CEILINGS, box_s=0.0)
    assert breaks.status == "failed" and "no such kernel" in breaks.note and "test_gate.py" in breaks.note
    assert (absent.status, absent.note) == ("skipped", "install it") and ours.status == "failed"
    assert (skipped.status, skipped.note) == ("skipped", "why")


def test_inexact_formula_passes_with_its_own_tolerance(squares):
    rough = Provider("rough", lambda x: (x * x * 1.01,), tolerance=0.1, note="inexact by construction")
    *_, record = run_case(squares(rough), CPU, CEILINGS, box_s=0.0)
    assert record.status == "ok" and 5e-3 < record.err["rel_fro"] < 2e-2


def test_law_stands_in_for_the_definition(squares):
    draws = torch.Generator().manual_seed(0)
    rival = Provider("random", lambda x: (torch.rand(16, generator=draws),), law=lambda x, out: "" if x.shape else "?")
    *_, record = run_case(squares(rival), CPU, CEILINGS, box_s=0.0)
    assert record.status == "ok" and record.err == {
        "ref": "law", "rel_fro": None, "max_rel": None, "deterministic_bits": False,
    }  # fmt: skip


def test_gates_alone_judge_ours_and_time_nothing(squares):
    (record,) = run_case(squares(), CPU, CEILINGS, box_s=0.0, gates_only=True)
    assert record.impl == "mimir_fast" and record.status == "ok" and not record.ms


def test_errors_are_relative():
    assert relative_errors(torch.tensor([3.0, 4.1]), torch.tensor([3.0, 4.0])) == pytest.approx((0.02, 0.025), rel=1e-4)
    assert relative_errors(torch.tensor([0.5]), torch.zeros(1)) == (0.5, 0.5)
    with pytest.raises(ValueError, match=r"\(2,\).*\(1,\)"):
        relative_errors(torch.zeros(1), torch.zeros(2))


def test_baseline_must_be_a_provider(squares):
    case = squares()
    with pytest.raises(ValueError, match="baseline 'keops'"):
        Case(**{**vars(case), "baseline": "keops"})


def test_record_says_the_rate_of_the_products_of_the_case(squares):
    case = squares(flops=100.0, products=Products(Counter({(2, 5, 5): 1}), (1, 0, 0)))
    ours, _ = run_case(case, CPU, CEILINGS, box_s=0.0)
    assert ours.extra["% of that rate"] == pytest.approx(100 * ours.tflops / ours.extra["TFLOP/s of its products"])
