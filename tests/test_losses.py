"""The loss modules in somebody's own training loop."""

import re

import pytest
import torch
from doc_blocks import ROOT, blocks_of
from torch import nn

from mimir_fast import (
    CKALoss,
    HSICLoss,
    MutualInformationPenalty,
    NHSICLoss,
    RenyiMI,
    cka,
    gradient_share,
    hsic,
    nhsic,
    renyi_mi,
)


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return torch.rand(32, 3, 4, 4, generator=g), torch.rand(32, 10, generator=g)


def test_a_penalty_removes_a_dependence() -> None:
    """Train features to predict `label` while forgetting `nuisance`: ten lines of an ordinary loop."""
    torch.manual_seed(0)
    nuisance, label = torch.randn(128, 1), torch.randn(128, 1)
    inputs = torch.cat([label + nuisance, label - nuisance, nuisance], dim=1)
    dependence = {}
    for weight in (0.0, 30.0):
        torch.manual_seed(1)
        encoder, head = nn.Linear(3, 4), nn.Linear(4, 1)
        penalty = HSICLoss(bandwidth="median", estimator="unbiased")
        optimizer = torch.optim.Adam([*encoder.parameters(), *head.parameters()], lr=0.03)
        for _ in range(60):
            features = encoder(inputs)
            loss = nn.functional.mse_loss(head(features), label) + weight * penalty(features, nuisance)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        dependence[weight] = float(penalty(encoder(inputs).detach(), nuisance))
    assert dependence[30.0] < 0.2 * dependence[0.0]


def test_hsic_loss_is_hsic(batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    options = {"sigma": (1.0, 2.0), "bandwidth": "paper", "normalizer": "(n-1)^2"}
    assert torch.equal(HSICLoss(**options)(*batch), hsic(*batch, **options))
    # Without torch.distributed the global batch is this batch.
    assert torch.equal(HSICLoss(global_batch=True)(*batch), hsic(*batch))


@pytest.mark.parametrize("global_batch", [False, True])
def test_a_module_is_its_function(batch: tuple[torch.Tensor, torch.Tensor], global_batch: bool) -> None:
    sigma = (1.0, 2.0)
    cases = [
        (NHSICLoss, nhsic, {"sigma": sigma, "eps": 1e-3}),
        (CKALoss, cka, {"sigma": sigma, "bandwidth": "paper", "estimator": "unbiased"}),
        (CKALoss, cka, {"kernel": "linear"}),
        (RenyiMI, renyi_mi, {"alpha": 3.0, "sigma": sigma, "bandwidth": "reference"}),
    ]
    for module, function, options in cases:
        built = module(**options, global_batch=global_batch)
        assert torch.equal(built(*batch), function(*batch, **options))
        assert torch.equal(module()(*batch), function(*batch)), "their defaults are the same"
        assert f"global_batch={global_batch}" in repr(built) and not built.state_dict()


@pytest.mark.parametrize(
    ("module", "options", "message"),
    [
        (HSICLoss, {"sigma": (1.0, 2.0, 3.0)}, "sigma must be a number, or one for x and one for y"),
        (CKALoss, {"kernel": "cosine"}, "kernel must be one of"),
        (CKALoss, {"sigma": (1.0, -1.0)}, "sigma must be > 0"),
        (NHSICLoss, {"eps": 0.0}, "eps must be > 0"),
        (RenyiMI, {"alpha": -2.0}, "alpha must be > 0"),
        (RenyiMI, {"alpha": float("inf")}, "alpha must be > 0 and finite"),
        (HSICLoss, {"sigma": float("inf")}, "sigma must be > 0 and finite"),
        (CKALoss, {"sigma": (1.0, "5")}, "sigma must be > 0 and finite, got '5'"),
        (NHSICLoss, {"eps": float("nan")}, "eps must be > 0 and finite"),
        (RenyiMI, {"bandwidth": "mean"}, "bandwidth must be one of"),
    ],
    ids=str,
)
def test_modules_refuse_bad_options_when_built(module: type, options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        module(**options)


@pytest.mark.parametrize("global_batch", [False, True])
def test_penalty_is_weighted_information(batch: tuple[torch.Tensor, torch.Tensor], global_batch: bool) -> None:
    expected = {"hsic": hsic(*batch), "nhsic": nhsic(*batch), "renyi": renyi_mi(*batch)}
    for estimator, value in expected.items():
        penalty = MutualInformationPenalty(estimator=estimator, weight=0.5, global_batch=global_batch)
        assert torch.equal(penalty(*batch), 0.5 * value)


def test_modules_are_stateless_and_say_what_they_are() -> None:
    penalty = MutualInformationPenalty(estimator="renyi")
    assert not penalty.state_dict()
    assert "estimator='renyi'" in repr(penalty)
    assert "bandwidth='median'" in repr(penalty)
    assert "estimator='unbiased'" in repr(HSICLoss(estimator="unbiased"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"estimator": "mine"}, "estimator must be one of 'hsic', 'nhsic', 'renyi', got 'mine'"),
        ({"weight": -1.0}, "weight must be >= 0"),
        ({"weight": float("inf")}, "weight must be >= 0 and finite"),
        ({"weight": float("nan")}, "weight must be >= 0 and finite"),
        ({"sigma": 0.0}, "sigma must be > 0"),
        ({"alpha": 0.0}, "alpha must be > 0"),
        ({"estimator": "nhsic", "bandwidth": "median"}, "nhsic is defined with bandwidth='reference'"),
    ],
    ids=str,
)
def test_refuses_bad_options_when_built(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MutualInformationPenalty(**options)


def test_gradient_share_is_a_ratio_of_norms() -> None:
    w, frozen, unused = (torch.tensor(v, requires_grad=g) for v, g in (([3.0, 4.0], True), (2.0, False), (1.0, True)))
    loss, penalty = (w * torch.tensor([3.0, 4.0])).sum() * frozen, 0.5 * (w * torch.tensor([0.6, 0.8])).sum()
    assert float(gradient_share(penalty, loss, iter([w, frozen, unused]))) == pytest.approx(0.5 / 10)
    assert float(gradient_share(penalty, loss, w)) == pytest.approx(0.5 / 10), "one tensor is not its rows"
    assert float(gradient_share(penalty, unused, [w])) == torch.inf
    for nothing in ([frozen], w * 2, []):
        with pytest.raises(ValueError, match="neither penalty nor loss depends on any"):
            gradient_share(penalty, loss, nothing)
    (loss + penalty).backward()  # the graph is still there
    assert w.grad is not None and unused.grad is None


@pytest.mark.parametrize("page", ["README.md", "docs/borrow.md"])
def test_the_penalty_of_the_first_example_acts(page: str, capsys: pytest.CaptureFixture[str]) -> None:
    """It had 1.3e-8 of the cross-entropy's gradient, that is, none."""
    torch.manual_seed(0)
    exec(next(block.text for block in blocks_of(ROOT / page) if block.language == "python"), {})
    share = float(re.findall(r"gradient is ([\d.e-]+)", capsys.readouterr().out)[0])
    assert 0.03 < share < 1
