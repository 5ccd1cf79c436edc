"""Attention chosen by measurement: every candidate is accurate, the choice is stable, the caller undisturbed."""

import json
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from exact_attention import exact_attention
from rounding import BFLOAT16, FLOAT32, assert_as_accurate
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from mimir_fast.layers import attention as seam
from mimir_fast.layers import choice
from mimir_fast.layers.attention import attention, attention_backend, attention_choices
from mimir_fast.layers.choice import fastest, measure, memory_file, prefer
from mimir_fast.layers.kernels import CANDIDATES, Candidate, Situation, sdpa

SHAPES = [(2, 50, 50, 3, 64), (2, 197, 197, 2, 8), (1, 147, 197, 4, 8), (3, 17, 33, 2, 32), (1, 1, 1, 1, 16)]


@pytest.fixture(autouse=True)
def own_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing known of this machine, and nothing pinned."""
    monkeypatch.setenv("MIMIR_FAST_CACHE", str(tmp_path))
    monkeypatch.delenv("MIMIR_FAST_ATTENTION", raising=False)
    monkeypatch.setattr(choice, "_remembered", {})
    monkeypatch.setattr(seam, "_chosen", {})


def inputs(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """q, k, v and the gradient of the output."""
    B, T, S, H, E = shape
    rng = torch.Generator().manual_seed(T)
    sizes = ((B, T, H, E), (B, S, H, E), (B, S, H, E), (B, T, H, E))
    return [torch.randn(size, generator=rng).to(device, dtype) for size in sizes]


def situation(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, *, backward: bool = True) -> Situation:
    return Situation(device, dtype, *shape[1:], backward, False)


def results(kernel, q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> list[Tensor]:  # type: ignore[no-untyped-def]
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    out = kernel(*leaves)
    return [out, *torch.autograd.grad(out, leaves, grad)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("candidate", CANDIDATES, ids=lambda c: c.name)
def test_candidates_are_as_accurate_as_sdpa(
    candidate: Candidate, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> None:
    if not candidate.takes(situation(shape, dtype, device)):
        pytest.skip("not one of its situations")
    given = inputs(shape, dtype, device)
    try:
        ours = results(candidate.run, *given)
    except RuntimeError as error:
        pytest.skip(f"does not run here, so cannot be chosen: {error}")
    assert all(mine.dtype == dtype for mine in ours)
    q, k, v, grad = given
    known = sdpa(q.double(), k.double(), v.double())
    # `plain` rounds its scores to bf16, where fused kernels keep them in fp32.
    by = BFLOAT16 if (candidate.name, dtype) == ("plain", torch.bfloat16) else FLOAT32
    assert_as_accurate(ours, results(sdpa, *given), exact_attention, [q, k, v, known, grad], by)


def test_the_least_seconds_win_by_a_margin_and_order_breaks_ties() -> None:
    assert prefer({"sdpa": 1.0, "plain": 0.95}) == "sdpa"
    assert prefer({"sdpa": 1.0, "plain": 0.85}) == "plain"
    assert prefer({"plain": 1.0, "sdpa": 1.05, "native": 3.0}) == "sdpa"
    assert prefer({}) == "sdpa"


def test_a_second_start_finds_the_answer_of_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Resuming a run must not choose anew: another kernel has other last bits."""
    here = situation((2, 9, 9, 2, 16), torch.float32, torch.device("cpu"))
    name, seconds = fastest(here)
    assert {"sdpa", "plain"} <= seconds.keys() and min(seconds.values()) > 0
    stored = json.loads(memory_file().read_text())
    assert list(stored.values()) == [seconds]

    def measured_again(*_: object) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(choice, "_remembered", {})  # as in a fresh process
    monkeypatch.setattr(choice, "measure", measured_again)
    assert fastest(here) == (name, seconds)
    (key,) = stored
    memory_file().write_text(json.dumps({key: {"sdpa": 2.0, "plain": 1.0}}))  # the file decides, not the clock
    assert fastest(here)[0] == "plain"


@pytest.mark.parametrize("content", ["", "{", "[1]"])
def test_a_torn_file_is_measured_again(content: str) -> None:
    memory_file().parent.mkdir(parents=True, exist_ok=True)
    memory_file().write_text(content)
    assert fastest(situation((1, 4, 4, 1, 16), torch.float32, torch.device("cpu")))[1]
    assert len(json.loads(memory_file().read_text())) == 1


def test_without_a_place_to_write_it_still_chooses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MIMIR_FAST_CACHE", str(tmp_path / "file" / "below"))
    here = situation((1, 4, 4, 1, 16), torch.float32, torch.device("cpu"))
    assert fastest(here) == fastest(here)


def test_a_candidate_that_fails_is_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Tensor) -> Tensor:
        raise RuntimeError("no kernel image")

    monkeypatch.setattr(choice, "CANDIDATES", (Candidate("native", broken, lambda s: True), *CANDIDATES[1:]))
    name, seconds = fastest(situation((1, 4, 4, 1, 16), torch.float32, torch.device("cpu")))
    assert name != "native" and "native" not in seconds


def test_a_candidate_that_is_wrong_is_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.cat([sdpa(q, k, v)[:-1], v[-1:, : q.shape[1]]])  # of the last image only

    monkeypatch.setattr(choice, "CANDIDATES", (Candidate("native", wrong, lambda s: True), *CANDIDATES[1:]))
    with pytest.warns(UserWarning, match="attention by native is wrong here"):
        seconds = fastest(situation((1, 4, 4, 1, 16), torch.float32, torch.device("cpu")))[1]
    assert "native" not in seconds and "sdpa" in seconds


def test_what_stops_the_measurement_is_not_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    here = situation((1, 4, 4, 1, 16), torch.float32, torch.device("cpu"))
    with monkeypatch.context() as patch:
        patch.setattr(choice, "measure", lambda *_: (_ for _ in ()).throw(MemoryError("none left")))
        with pytest.warns(UserWarning, match="none left"):
            assert fastest(here) == ("sdpa", {})
    with monkeypatch.context() as patch:
        patch.setattr(choice, "measure", lambda *_: {})
        assert fastest(here) == ("sdpa", {})
    assert not memory_file().exists()
    assert fastest(here)[1]


def test_of_two_that_measure_at_once_the_first_to_write_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody holds the lock meanwhile: the ranks of a sharded model would wait for each other."""
    here = situation((1, 4, 4, 1, 16), torch.float32, torch.device("cpu"))

    def overtaken(*_: object) -> dict[str, float]:
        monkeypatch.setattr(choice, "measure", lambda *_: {"plain": 1.0, "sdpa": 2.0})
        assert fastest(here)[0] == "plain"
        monkeypatch.setattr(choice, "_remembered", {})  # it was another process
        return {"plain": 2.0, "sdpa": 1.0}

    monkeypatch.setattr(choice, "measure", overtaken)
    assert fastest(here) == ("plain", {"plain": 1.0, "sdpa": 2.0})


def test_a_name_pins_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    q, k, v, _ = inputs((2, 5, 7, 2, 16), torch.float32, cpu)
    assert attention_backend(cpu) == "fastest measured"
    for name in ("plain", "sdpa"):
        monkeypatch.setenv("MIMIR_FAST_ATTENTION", name)
        assert attention_backend(cpu) == name
        torch.testing.assert_close(attention(q, k, v), seam.KERNELS[name](q, k, v), rtol=0, atol=0)
    assert [line.rsplit(" ", 1)[1] for line in attention_choices()] == ["plain", "sdpa"]
    monkeypatch.setenv("MIMIR_FAST_ATTENTION", "cudnn")  # cannot run here: PyTorch's choice does
    assert torch.equal(attention(q, k, v), sdpa(q, k, v))
    monkeypatch.setenv("MIMIR_FAST_ATTENTION", "fastest")
    with pytest.raises(ValueError, match="auto, native, sdpa"):
        attention(q, k, v)


@pytest.mark.skipif(torch.cuda.is_available(), reason="xformers may work there")
def test_a_pinned_xformers_that_does_not_work_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIMIR_FAST_ATTENTION", "xformers")
    with pytest.raises(RuntimeError, match="no attention operator for CPU"):
        attention_backend(torch.device("cpu"))


def test_one_disturbed_call_rules_no_kernel_out() -> None:
    calls = 0

    def disturbed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 2:  # the first that is timed
            time.sleep(0.5)
        return sdpa(q, k, v)

    candidates = [Candidate("sdpa", sdpa, lambda s: True), Candidate("disturbed", disturbed, lambda s: True)]
    seconds = measure(situation((2, 6, 6, 2, 12), torch.float32, torch.device("cpu")), candidates)
    assert seconds["disturbed"] < 0.25


def test_measuring_leaves_the_caller_alone() -> None:
    """Whoever calls first may be counting, checkpointing, evaluating, under autocast; and draws from a generator."""
    q, k, v, _ = inputs((2, 6, 6, 2, 16), torch.float32, torch.device("cpu"))
    torch.manual_seed(3)
    state = torch.get_rng_state()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16), FlopCounterMode(display=False) as counter:
        attention(q, k, v)
    assert counter.get_total_flops() == 2 * 2 * 2 * 6 * 6 * 16 * 2
    assert torch.equal(state, torch.get_rng_state())
    leaf = q.clone().requires_grad_()
    checkpoint(attention, leaf, k, v, use_reentrant=False).sum().backward()  # counts the tensors saved both times
    assert leaf.grad is not None


def test_a_compiled_graph_holds_one_kernel_for_each_length(device: torch.device) -> None:
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    for tokens in (5, 6, 7):  # the third would be symbolic
        q, k, v, grad = inputs((2, tokens, tokens, 2, 16), torch.float32, device)
        for mine, eager in zip(results(compiled, q, k, v, grad), results(attention, q, k, v, grad), strict=True):
            torch.testing.assert_close(mine, eager)
    assert sum("compiled" in line for line in attention_choices()) == 3


def test_plain_products_ignore_autocast() -> None:
    q, k, v, _ = inputs((2, 6, 6, 2, 16), torch.float32, torch.device("cpu"))
    with torch.autocast("cpu", torch.bfloat16):
        out = seam.KERNELS["plain"](q, k, v)
    wanted = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2)
    torch.testing.assert_close(out, wanted)
