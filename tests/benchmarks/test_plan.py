"""The plan for many GPUs: its page is what the script prints, and its arithmetic is known at the ends."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.plan import Assumptions, all_reduce_s, num_parameters, parse, plan, table
from benchmarks.training import build_model, masked_flops, some_view
from mimir_fast.models.masked_model import ModelConfig

PAGE = Path(__file__).resolve().parents[2] / "docs" / "scaling.md"
GIVEN = Assumptions()


def test_the_page_holds_the_table_of_today():
    assert table(GIVEN) in PAGE.read_text(), "python -m benchmarks.plan prints the table of docs/scaling.md anew"


def test_flops_of_a_step_are_those_of_the_model():
    """Against torch's own count of a ViT-S forward pass, patches to predictions."""
    model = build_model(ModelConfig(encoder="small"), 224, torch.device("cpu"))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(some_view(model))
    assert masked_flops("small", "light", 224, 16) == pytest.approx(counter.get_total_flops(), rel=0.1)


def test_one_gpu_sends_nothing_and_a_slow_network_counts_between_nodes_only():
    assert all_reduce_s(1e9, 1, GIVEN) == 0
    slow = replace(GIVEN, ib_gbps=1.0)
    assert all_reduce_s(1e9, 8, slow) == all_reduce_s(1e9, 8, GIVEN)
    assert all_reduce_s(1e9, 16, slow) > 5 * all_reduce_s(1e9, 16, GIVEN)
    # Two GPUs of one node exchange half the bytes twice.
    assert all_reduce_s(450e9, 2, GIVEN) == pytest.approx(1.0)


def test_fewer_images_hide_less_and_fsdp_holds_less():
    few, many = plan("base", "light", 512, GIVEN), plan("base", "light", 512, replace(GIVEN, batch=65536))
    assert few["not hidden, ms"] > many["not hidden, ms"] == 0
    assert many["images/s a GPU"][0] > 2 * few["images/s a GPU"][0]
    assert few["GB, FSDP"] < few["GB, DDP"]
    assert num_parameters("base", "light") == pytest.approx(86.2e6, rel=0.01)


def test_every_assumption_is_an_option():
    assert parse(["--batch", "8192", "--ib_gbps", "25"]) == replace(GIVEN, batch=8192, ib_gbps=25.0)
