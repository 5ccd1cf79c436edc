"""The clock, the ceilings and the memory gauge."""

import gc
import time

import pytest
import torch

from benchmarks.ceilings import Ceilings, measure
from benchmarks.memory import extra_peak_mb
from benchmarks.timing import bytes_of, num_sets, summary, time_providers
from benchmarks.training import random_batch

CPU = torch.device("cpu")


def test_statistics_of_two_series():
    assert summary([1.0, 2.0, 3.0], [2.0, 3.0, 4.0]) == {
        "median": 2.5, "p20": 2.0, "p80": 3.0, "n": 6, "first_median": 2.0, "repeat_median": 3.0, "noise": 1 / 2.5,
    }  # fmt: skip
    assert summary([0.0], [10.0])["p20"] == 2.0  # between the samples


def test_slow_is_slower_and_providers_take_turns():
    order = []

    def run(name, seconds):
        def call(x):
            order.append(name)
            time.sleep(seconds)

        return call

    times = time_providers({"A": run("A", 0.01), "B": run("B", 0.1)}, [None], box_s=0.3)
    assert times["B"]["median"] > 1.5 * times["A"]["median"]
    # One or two calls of each to find out how many a sample takes, then A B B A as often as the box has room for.
    assert "".join(order).endswith("ABBA" * (times["A"]["n"] // 2))


def test_collector_waits_until_the_sample_is_taken():
    seen = []
    time_providers({"A": lambda x: seen.append(gc.isenabled())}, [None], box_s=0.0)
    assert set(seen) == {False} and gc.isenabled()


def test_short_calls_are_timed_many_at_once():
    calls = []
    times = time_providers({"A": calls.append}, [0, 1, 2], box_s=0.0)
    assert times["A"]["median"] < 0.1 and len(calls) > 20  # 2 + 2 without
    assert {0, 1, 2} == set(calls)


def test_sets_of_inputs_exceed_the_cache_of_a_gpu():
    inputs = torch.empty(8 * 2**20, dtype=torch.uint8)
    cuda = torch.device("cuda")
    assert num_sets(inputs, cuda) * bytes_of(inputs) > 3 * 50 * 2**20 / 2
    assert num_sets(inputs, CPU) == 3


def test_tensors_are_found_in_any_inputs():
    batch = random_batch(2, 32)
    assert bytes_of(batch) == 2 * 3 * 32 * 32 + 3 * 2 * 8
    assert bytes_of({"a": (torch.zeros(1), [torch.zeros(2)]), "b": 3}) == 12


def test_roofline_is_the_larger_of_two_floors():
    ceilings = Ceilings(copy_gbps=100.0, tflops={"fp32": 1.0, "bf16": 4.0})
    assert ceilings.floor_ms(flops=2e9, bytes_=1e6, precision="fp32") == pytest.approx(2.0)
    assert ceilings.floor_ms(flops=2e9, bytes_=1e6, precision="bf16") == pytest.approx(0.5)
    assert ceilings.floor_ms(flops=0, bytes_=1e9, precision="fp32") == pytest.approx(10.0)


def test_measured_ceilings_are_plausible():
    ceilings = measure(CPU, tiny=True)
    assert ceilings.copy_gbps > 0 and set(ceilings.tflops) == {"fp32", "bf16", "fp64"}
    assert all(rate > 0 for rate in ceilings.tflops.values())


def test_extra_memory_is_seen_and_inputs_are_not_counted(device):
    x = torch.ones(4 * 2**20, device=device)  # 16 MiB
    one = extra_peak_mb(lambda: x + 1, device)
    three = extra_peak_mb(lambda: (x + 1) * (x + 2), device)
    if one is None:
        pytest.skip("this system does not say what memory a process has used at most")
    assert 15 < one < 22
    assert 46 < three < 54
