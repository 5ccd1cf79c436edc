"""A penalty at a constant share of the reconstruction's gradient, and its placebo."""

from dataclasses import replace

import pytest
import torch
from small_models import masked_vit, prepared
from torch import Tensor

from mimir_fast.data.batch import Batch
from mimir_fast.layers.borrowing import FrozenFlag
from mimir_fast.methods.mimir import Mimir, MimirConfig
from mimir_fast.methods.mutual_information import MutualInformationConfig, derangement, mutual_information
from mimir_fast.models.masked_model import MaskedModel

ESTIMATORS = ["hsic", "nhsic", "renyi"]


@pytest.fixture
def model() -> MaskedModel:
    torch.manual_seed(0)
    return masked_vit(16, 4, 3, 32, 2, 2, 16, 2, 2)


def batch_of(step: int, size: int = 8) -> Batch:
    generator = torch.Generator().manual_seed(step)
    images = torch.randint(0, 256, (size, 3, 16, 16), dtype=torch.uint8, generator=generator)
    return Batch(images, *[torch.arange(size) + size * step] * 3)


def method_of(**options: object) -> Mimir:
    return Mimir(MimirConfig(mi=MutualInformationConfig(**options)))


def share_at_latent(method: Mimir, model: MaskedModel, batch: Batch, number: int) -> float:
    """At λ = 1, by two backward passes through one graph, with none of the controller's means."""
    step = prepared(method, model, batch, number)
    method.forward(step)
    image, keep = method.image_side(step), step.mask.keep
    penalty = mutual_information(method.config.mi, image, step.bare.visible(step.latent, keep), 1)
    loss = method.error(step, step.prediction, batch.images, 4)
    ours, theirs = (torch.autograd.grad(v, step.latent, retain_graph=True)[0].norm() for v in (penalty, loss))
    return float(ours / theirs)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_the_share_is_held_while_training(model: MaskedModel, estimator: str) -> None:
    """Of a tenth, on average, though the scale of the penalty changes; and what is logged is what it was."""
    method, optimizer = method_of(estimator=estimator, share=0.1), torch.optim.Adam(model.parameters(), 2e-4)
    logged: list[float] = []
    expected = 0.0
    for number in range(30):
        batch = batch_of(number)
        unit = share_at_latent(method, model, batch, number) if number == 20 else 0.0
        out = method(model, batch, seed=0, step=number)
        expected += unit * out["mi_weight"].item()
        # The loop weighs micro-batches: a share does not know of it.
        (0.5 * out["loss"]).backward()
        optimizer.step()
        optimizer.zero_grad()
        logged.append(out["mi_share"].item())
    assert logged[:2] == [0, 0], "nothing is known before the first backward pass"
    assert sum(logged[5:]) / len(logged[5:]) == pytest.approx(0.1, rel=0.1)
    assert logged[21] == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("options", [{}, {"accumulated": True}, {"pairing": "permuted"}])
def test_at_a_known_ratio_it_is_a_penalty_of_that_weight(model: MaskedModel, options: dict[str, object]) -> None:
    def gradients(method: Mimir) -> dict[str, Tensor]:
        model.zero_grad()
        batches = [batch_of(1, 3), batch_of(2, 5)]
        for run, batch in zip(method.passes(model, batches, seed=0, step=4), batches, strict=True):
            (run()["loss"] * len(batch.images) / 8).backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    held = method_of(share=0.2, **options)
    held.restore_state({"ratio": 0.01, "realised": 0.0}, torch.device("cpu"))
    torch.testing.assert_close(gradients(held), gradients(method_of(weight=20.0, **options)), rtol=1e-4, atol=1e-6)
    state = held.saved_state()
    copy = method_of(share=0.2, **options)
    copy.restore_state(state, torch.device("cpu"))
    assert copy.saved_state() == state and state["ratio"] != 0.01


def test_a_step_that_is_not_finite_leaves_the_average(model: MaskedModel) -> None:
    method = method_of(share=0.1)
    for number, factor in enumerate((torch.nan, 1.0, torch.inf, torch.nan)):
        (factor * method(model, batch_of(number), seed=0, step=number)["loss"]).backward()
        if number == 0:
            assert method.saved_state() == {}
        if number == 1:
            known = method.saved_state()["ratio"]
    assert known > 0 and method.saved_state()["ratio"] == known


def test_a_model_compiled_as_a_whole_is_refused(model: MaskedModel) -> None:
    """Its backward pass is one function: no gradient is seen at the latent, and λ would stay 0."""
    model.register_forward_pre_hook(FrozenFlag())
    with pytest.raises(ValueError, match="leave out --compile"):
        method_of(share=0.1)(model, batch_of(0), seed=0, step=0)


def test_without_gradients_there_is_a_value_and_frozen_encoders_are_refused(model: MaskedModel) -> None:
    method = method_of(share=0.1)
    with torch.no_grad():
        assert method(model, batch_of(0), seed=0, step=0)["mi"].isfinite() and method.saved_state() == {}
    model.encoder.requires_grad_(False)
    with pytest.raises(ValueError, match="leave out --freeze"):
        method.config.check_model(model)


@pytest.mark.parametrize("size", [2, 3, 9])
def test_a_derangement_leaves_nothing_in_place(size: int) -> None:
    samples, places = torch.arange(size) + 50, torch.arange(size)
    drawn = [derangement(samples, seed=1, step=step) for step in range(20)]
    for order in drawn:
        assert torch.equal(order.sort().values, places) and bool((order != places).all())
    assert len({tuple(order.tolist()) for order in drawn}) > (1 if size > 2 else 0)
    assert torch.equal(drawn[3], derangement(samples, seed=1, step=3))


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_the_placebo_is_the_penalty_of_exchanged_images(model: MaskedModel, estimator: str) -> None:
    """Its value is that of the permuted pairs, and its gradient as large as the penalty's, within a factor of two."""
    batch = batch_of(0, 32)
    own = method_of(estimator=estimator)
    placebo = Mimir(replace(own.config, mi=replace(own.config.mi, pairing="permuted")))
    found = {}
    for method in (own, placebo):
        step = prepared(method, model, batch, number=7)
        method.forward(step)
        value = method.losses(step)["mi"][1]
        found[method] = value, torch.autograd.grad(value, step.latent, retain_graph=True)[0].norm()
        image = method.image_side(step)[derangement(batch.samples, seed=0, step=7)]
        expected = mutual_information(own.config.mi, image, step.latent, 1)
    torch.testing.assert_close(found[placebo][0], expected)
    assert found[placebo][0] != found[own][0]
    assert 0.5 < found[placebo][1] / found[own][1] < 2


def test_exchanging_takes_two_images_of_a_rank() -> None:
    config = MimirConfig(mi=MutualInformationConfig(scope="global", pairing="permuted"))
    with pytest.raises(ValueError, match="exchanges images of a rank"):
        config.check_batches(1, 1, 4)
    assert config.check_batches(2, 1, 4).endswith("estimated on 8 images that are permuted")
    held = MutualInformationConfig(share=0.1, weight=0.0)
    assert MimirConfig(mi=held).check_batches(4, 1, 1).startswith("penalty: mi at 0.1 of the reconstruction's gradient")
