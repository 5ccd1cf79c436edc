"""Mask, noise and attack recorded once and replayed: the bits of the same work done anew, on a GPU as a CUDA graph."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from small_models import masked_vit, prepared

from mimir_fast.attacks.replay import Replay
from mimir_fast.data.batch import Batch
from mimir_fast.layers.borrowing import borrowed
from mimir_fast.methods.adv_mae import AdvMae, AdvMaeConfig
from mimir_fast.methods.mimir import Mimir, MimirConfig, apply_preset
from mimir_fast.methods.mutual_information import MutualInformationConfig
from mimir_fast.methods.step import MaskedStep
from mimir_fast.ops.noisy_patches import noisy_patches
from mimir_fast.ops.random_masks import random_masks


def batch_on(device: torch.device, first: int = 100, count: int = 6) -> Batch:
    generator = torch.Generator().manual_seed(first)
    images = torch.randint(0, 256, (count, 3, 16, 16), dtype=torch.uint8, generator=generator)
    zeros = torch.zeros(count, dtype=torch.int64)
    return Batch(*(t.to(device) for t in (images, zeros, torch.arange(first, first + count), zeros)))


def eager_and_recorded(preset: str, **attack: object) -> tuple[AdvMae, AdvMae]:
    """The method as ever, and with a recorded attack."""
    config = apply_preset(AdvMaeConfig(decode_ratio=0.5), preset)
    config = replace(config, attack=replace(config.attack, num_steps=2, **attack))
    return AdvMae(config), AdvMae(replace(config, attack=replace(config.attack, cuda_graph=True)))


@pytest.mark.parametrize("preset", ["paper", "official"])
def test_a_step_number_on_the_device_draws_the_same(preset: str, device: torch.device) -> None:
    """All that is drawn, to the bit: a recorded graph reads its step from memory."""
    model, batch, (method, _) = masked_vit().to(device), batch_on(device), eager_and_recorded(preset)
    for number in (0, 7, 2**31):
        steps = [
            MaskedStep(model, batch, 2**63 - 1, n)
            for n in (number, torch.full((), number, dtype=torch.int64, device=device))
        ]
        for step in steps:
            method.prepare(step)
        host, there = steps
        assert all(
            torch.equal(a, b) for a, b in zip((*host.mask, host.visible), (*there.mask, there.visible), strict=True)
        )


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("preset", ["paper", "official"])
def test_replays_are_the_steps_they_stand_for(preset: str, bf16: bool, device: torch.device) -> None:
    """New masks in each, weights followed as an optimiser moves them, gradients kept from step to step."""
    torch.manual_seed(0)
    model, (eager, recorded) = masked_vit().to(device), eager_and_recorded(preset, every=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(6):
        batch = batch_on(device, first=10 * step)
        results = []
        for method in (eager, recorded):
            optimizer.zero_grad()
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                loss = method(model, batch, seed=1, step=step)["loss"]
            loss.backward()
            results.append([loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
        for wanted, found in zip(*results, strict=True):
            if device.type == "cpu":
                assert torch.equal(wanted, found)
            else:  # products may add up in another order
                torch.testing.assert_close(found, wanted, rtol=5e-2 if bf16 else 1e-3, atol=2e-3 if bf16 else 1e-5)
        optimizer.step()
    assert len(recorded.recorded.replays) == 1


def test_results_are_not_overwritten_by_the_next_replay(device: torch.device) -> None:
    replay = Replay(lambda x: [2 * x], [torch.zeros(3, device=device)])
    first = replay(torch.ones(3, device=device))[0]
    replay(torch.full((3,), 5.0, device=device))
    assert torch.equal(first, torch.full((3,), 2.0, device=device))


def test_a_short_batch_is_recorded_for_itself(device: torch.device) -> None:
    model, (eager, recorded) = masked_vit().to(device), eager_and_recorded("paper")
    for count in (6, 4, 6):
        batch = batch_on(device, count=count)
        losses = [method(model, batch, seed=0, step=count)["loss"].detach() for method in (eager, recorded)]
        torch.testing.assert_close(*losses, rtol=1e-5, atol=0)
    assert len(recorded.recorded.replays) == 2


def test_a_recorded_attack_leaves_no_trace(device: torch.device) -> None:
    model, (_, recorded) = masked_vit().to(device), eager_and_recorded("paper")
    before = {name: t.clone() for name, t in model.state_dict().items()}
    state = torch.get_rng_state()
    prepared(recorded, model, batch_on(device))
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters()) and torch.equal(torch.get_rng_state(), state)


def test_draws_by_a_device_step_can_be_compiled() -> None:
    """The ops that draw take the step as data: one graph serves all steps."""

    images = torch.randint(0, 256, (5, 3, 16, 16), dtype=torch.uint8)

    def draw(samples: torch.Tensor, step: torch.Tensor) -> tuple[torch.Tensor, ...]:
        keep, masked = random_masks(samples, 16, 4, seed=3, step=step)
        return keep, masked, *noisy_patches(images, keep, 4, samples, seed=3, step=step, eps=8 / 255)

    torch._dynamo.reset()
    compiled = torch.compile(draw, backend="aot_eager", fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for number in (1, 2, 9):
            results = [f(torch.arange(5), torch.tensor(number)) for f in (draw, compiled)]
            assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@contextmanager
def no_waiting() -> Iterator[None]:
    """Any wait of the host for the GPU is an error."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.cuda
@pytest.mark.parametrize("cuda_graph", [False, True])
@pytest.mark.parametrize("estimator", ["hsic", "nhsic", "renyi"])
def test_the_host_waits_for_nothing_inside_a_step(estimator: str, cuda_graph: bool) -> None:
    """Attack, forward, penalty, backward and optimiser, after two steps in which kernels were made and chosen."""
    device = torch.device("cuda")
    model, batch = masked_vit().to(device), batch_on(device, count=16)
    config = MimirConfig(mi=MutualInformationConfig(estimator=estimator))
    method = Mimir(replace(config, attack=replace(config.attack, cuda_graph=cuda_graph)))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)

    def train(step: int) -> None:
        with torch.autocast("cuda", torch.bfloat16):
            loss = method(model, batch, seed=0, step=step)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    for step in (0, 1):
        train(step)
    torch.cuda.synchronize()
    with no_waiting():
        train(2)


@pytest.mark.cuda
def test_borrowing_while_a_graph_is_recorded() -> None:
    """The GPU's random state cannot be asked for then; outside it is kept as ever."""
    model = masked_vit().to("cuda")
    graph, x = torch.cuda.CUDAGraph(), torch.zeros(2, device="cuda")
    with torch.cuda.graph(graph), borrowed(model):
        x += 1
    graph.replay()
    assert x.tolist() == [1, 1]
