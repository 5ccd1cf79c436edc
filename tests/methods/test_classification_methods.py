"""The fine-tuning methods against formulas written here, and what they promise: no trace, no dependence on rank."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mimir_fast.attacks.threat_model import LinfThreat
from mimir_fast.data.batch import Batch
from mimir_fast.methods.apgd import Apgd
from mimir_fast.methods.ard_prm import (
    ArdPrm,
    ArdPrmConfig,
    ArdPrmObjective,
    build,
    draw_gates,
    draw_patch_masks,
    pass_rate,
)
from mimir_fast.methods.augmentation import RandAugmentConfig
from mimir_fast.methods.classification import ClassificationConfig, ClassificationMethod, Inputs
from mimir_fast.methods.fast import Fast
from mimir_fast.methods.free import Free, FreeObjective
from mimir_fast.methods.mart import Mart, MartObjective, mart_loss
from mimir_fast.methods.mixing import MixingConfig
from mimir_fast.methods.natural import Natural
from mimir_fast.methods.pgd import Pgd
from mimir_fast.methods.trades import Trades, TradesConfig, TradesObjective, gaussian_start, trades_loss
from mimir_fast.models.classifier import Classifier, ClassifierConfig, build_classifier

EPS = 8 / 255
METHODS = [Natural, Pgd, Fast, Free, Apgd, Trades, Mart, ArdPrm]
ADVERSARIAL = [Pgd, Fast, Apgd, Trades, ArdPrm]


OBJECTIVES = {Trades: TradesObjective, Mart: MartObjective, ArdPrm: ArdPrmObjective, Free: FreeObjective}


def config(kind: type = Pgd, **options: Any) -> Any:
    threat = LinfThreat(eps=EPS, alpha=2 / 255, num_steps=2, random_start=True)
    return OBJECTIVES.get(kind, ClassificationConfig)(attack=threat, **options)


@pytest.fixture
def model() -> Classifier:
    torch.manual_seed(0)
    model = build_classifier(ClassifierConfig(encoder="tiny", patch_size=16, drop_path=0.2), 32, 10)
    nn.init.normal_(model.head.weight, std=0.2)
    return model.train()


@pytest.fixture
def batch() -> Batch:
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8, generator=generator)
    samples = torch.arange(100, 108)
    return Batch(images, torch.randint(0, 10, (8,), generator=generator), samples, torch.zeros_like(samples))


def part(batch: Batch, start: int, stop: int) -> Batch:
    return Batch(*(t[start:stop] for t in (batch.images, batch.labels, batch.samples, batch.epochs)))


def gradient(loss: Tensor, *tensors: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, tensors, retain_graph=True))


class TestFormulas:
    """Losses and gradients in the formulas' own words, in double precision."""

    @pytest.fixture
    def logits(self) -> tuple[Tensor, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(2)
        natural, adversarial = (3 * torch.randn(16, 10, generator=generator) for _ in range(2))
        return natural.requires_grad_(), adversarial.requires_grad_(), torch.arange(16) % 10

    def test_trades(self, logits: tuple[Tensor, Tensor, Tensor]) -> None:
        natural, adversarial, labels = logits
        p, q = natural.double().exp(), adversarial.double().exp()
        p, q = p / p.sum(1, keepdim=True), q / q.sum(1, keepdim=True)
        kl = (p * (p / q).log()).sum(1)
        wanted = -p[torch.arange(16), labels].log().mean() + 6.0 * kl.sum() / 16
        loss = sum(trades_loss(natural, adversarial, labels, 6.0))
        torch.testing.assert_close(loss.double(), wanted, rtol=1e-5, atol=1e-6)
        for ours, theirs in zip(
            gradient(loss, natural, adversarial), gradient(wanted, natural, adversarial), strict=True
        ):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)

    def test_trades_with_soft_labels(self, logits: tuple[Tensor, Tensor, Tensor]) -> None:
        natural, adversarial, _ = logits
        soft = torch.softmax(torch.randn(16, 10), dim=1)
        wanted = -(soft * F.log_softmax(natural, dim=1)).sum(1).mean()
        torch.testing.assert_close(trades_loss(natural, adversarial, soft, 1.0)[0], wanted)

    def test_mart(self, logits: tuple[Tensor, Tensor, Tensor]) -> None:
        natural, adversarial, labels = logits
        p, q = natural.double().exp(), adversarial.double().exp()
        p, q = p / p.sum(1, keepdim=True), q / q.sum(1, keepdim=True)
        wanted = torch.zeros((), dtype=torch.float64)
        for i, y in enumerate(labels.tolist()):
            others = torch.cat([q[i, :y], q[i, y + 1 :]])
            boosted = -q[i, y].log() - (1.0001 - others.max()).log()
            wanted = wanted + (boosted + 5.0 * (p[i] * (p[i] / q[i]).log()).sum() * (1 - p[i, y])) / 16
        loss = sum(mart_loss(natural, adversarial, labels, 5.0))
        torch.testing.assert_close(loss.double(), wanted, rtol=1e-5, atol=1e-6)
        for ours, theirs in zip(
            gradient(loss, natural, adversarial), gradient(wanted, natural, adversarial), strict=True
        ):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)

    def test_mart_stays_finite_where_a_wrong_class_is_certain(self) -> None:
        logits = torch.tensor([[0.0, 100.0, 0.0]], requires_grad=True)
        loss = sum(mart_loss(logits, logits, torch.tensor([0]), 5.0))
        assert loss.isfinite() and gradient(loss, logits)[0].isfinite().all()


@pytest.mark.parametrize("kind", METHODS)
class TestEveryMethod:
    def test_loss_has_gradients_everywhere(self, kind: Any, model: Classifier, batch: Batch) -> None:
        out = kind(config(kind))(model, batch, seed=0, step=0)
        assert out["loss"].ndim == 0 and 0 <= out["accuracy"] <= 1
        out["loss"].backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        assert not any(value.requires_grad for name, value in out.items() if name != "loss")

    def test_does_not_depend_on_the_rank_count(self, kind: Any, model: Classifier, batch: Batch) -> None:
        method = kind(config(kind))
        whole = method(model, batch, seed=3, step=4)["loss"]
        halves = [method(model, part(batch, *span), seed=3, step=4)["loss"] for span in ((0, 4), (4, 8))]
        torch.testing.assert_close(whole, sum(halves) / 2, rtol=1e-4, atol=1e-5)

    def test_is_a_function_of_seed_and_step(self, kind: Any, model: Classifier, batch: Batch) -> None:
        method = kind(config(kind))
        state = torch.get_rng_state()
        losses = [method(model, batch, seed=0, step=step)["loss"] for step in (0, 0, 1)]
        assert losses[0] == losses[1] and losses[0] != losses[2]
        assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("kind", ADVERSARIAL)
class TestAttacks:
    def inputs(self, method: ClassificationMethod, model: Classifier, batch: Batch) -> Inputs:
        return method.prepare(model, batch, seed=0, step=0)

    def test_stays_in_the_ball_and_raises_the_loss(self, kind: Any, model: Classifier, batch: Batch) -> None:
        method = kind(config(kind))
        inputs = self.inputs(method, model, batch)
        adversarial = method.perturb(model, inputs)
        assert (adversarial.double() - inputs.images.double()).abs().max() <= EPS
        assert adversarial.min() >= 0 and adversarial.max() <= 1
        if kind is Trades:  # attacks the divergence, not the cross entropy
            clean, moved = (model(x).log_softmax(1) for x in (inputs.images, adversarial))
            assert F.kl_div(moved, clean, log_target=True, reduction="batchmean") > 1e-4
        elif kind is not ArdPrm:  # which is held back in its first epochs on purpose
            before, after = (F.cross_entropy(model(x), inputs.targets) for x in (inputs.images, adversarial))
            assert after > before

    def test_the_picture_shows_the_attack_of_training(self, kind: Any, model: Classifier, batch: Batch) -> None:
        method = kind(config(kind))
        rows = method.preview(model, batch, seed=3, step=4)
        images = batch.images.float() / 255
        inputs = Inputs(images, batch.labels, batch.samples, batch.epochs, 3, 4, None)
        assert torch.equal(rows["input"], images)
        assert torch.equal(rows["adversarial"], method.perturb(model, inputs))

    def test_leaves_no_trace(self, kind: Any, model: Classifier, batch: Batch) -> None:
        method = kind(config(kind))
        inputs = self.inputs(method, model, batch)
        model.encoder.blocks[0].eval()
        modes = [m.training for m in model.modules()]
        before = {n: t.clone() for n, t in model.state_dict().items()}
        adversarial = method.perturb(model, inputs)
        assert not adversarial.requires_grad
        assert [m.training for m in model.modules()] == modes
        assert all(p.grad is None and p.requires_grad for p in model.parameters())
        assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())

    def test_takes_mixed_labels(self, kind: Any, model: Classifier, batch: Batch) -> None:
        method = kind(config(kind, mixing=MixingConfig(mixup=0.8, cutmix=1.0), label_smoothing=0.1))
        inputs = self.inputs(method, model, batch)
        assert inputs.targets.shape == (8, 10)
        torch.testing.assert_close(inputs.targets.sum(dim=1), torch.ones(8))
        assert method.losses(model, inputs)["loss"].isfinite()


def test_both_views_go_through_the_same_sub_network(model: Classifier, batch: Batch) -> None:
    method = Trades(config(Trades, trades=TradesConfig(beta=2.0)))
    inputs = method.prepare(model, batch, seed=0, step=0)
    views = [model(x, inputs.branch_scales) for x in (inputs.images, method.perturb(model, inputs))]
    wanted = sum(trades_loss(views[0], views[1], inputs.targets, 2.0))
    torch.testing.assert_close(method.losses(model, inputs)["loss"], wanted, rtol=1e-5, atol=1e-6)


def test_gaussian_start_has_the_papers_width(model: Classifier, batch: Batch) -> None:
    grey = Batch(torch.full_like(batch.images, 128), batch.labels, batch.samples, batch.epochs)
    inputs = Natural(config()).prepare(model, grey, seed=0, step=0)
    noise = gaussian_start(inputs) - inputs.images
    assert abs(noise.std() - 0.001) < 2e-5 and abs(noise.mean()) < 5e-5


def test_without_random_start(model: Classifier, batch: Batch) -> None:
    """MART's attack starts at the image then; TRADES' divergence has no gradient there, so it is refused."""
    threat = LinfThreat(eps=EPS, alpha=2 / 255, num_steps=0, random_start=False)
    images = batch.images.float() / 255
    inputs = Inputs(images, batch.labels, batch.samples, batch.epochs, 0, 0, None)
    assert torch.equal(Mart(MartObjective(attack=threat)).perturb(model, inputs), images)
    with pytest.raises(ValueError, match="leave random_start on"):
        Trades(TradesObjective(attack=threat))


def test_natural_training_has_no_attack_to_show(model: Classifier, batch: Batch) -> None:
    assert set(Natural(config()).preview(model, batch, seed=0, step=0)) == {"input"}


def test_mart_refuses_soft_labels() -> None:
    with pytest.raises(ValueError, match=r"--mixing\.mixup 0"):
        Mart(config(Mart, mixing=MixingConfig(mixup=0.8)))


def test_randaugment_reaches_the_images(model: Classifier, batch: Batch) -> None:
    plain = Natural(config()).prepare(model, batch, seed=0, step=0)
    strong = Natural(config(randaugment=RandAugmentConfig(num_ops=2))).prepare(model, batch, seed=0, step=0)
    assert not torch.equal(plain.images, strong.images)
    assert strong.images.min() >= 0 and strong.images.max() <= 1


class TestArdPrm:
    """Held back during the warm-up, plain PGD afterwards."""

    def test_after_the_warm_up_it_is_pgd(self, model: Classifier, batch: Batch) -> None:
        batch.epochs.fill_(10)
        held_back, plain = ArdPrm(config(ArdPrm, ard_prm=ArdPrmConfig(warmup_epochs=10))), Pgd(config())
        inputs = plain.prepare(model, batch, seed=0, step=0)
        assert torch.equal(held_back.perturb(model, inputs), plain.perturb(model, inputs))

    @pytest.mark.parametrize("part_of", ["drop_gradients", "mask_perturbation"])
    def test_each_half_changes_the_attack(self, part_of: str, model: Classifier, batch: Batch) -> None:
        off = {"drop_gradients": False, "mask_perturbation": False}
        inputs = Pgd(config()).prepare(model, batch, seed=0, step=0)
        changed = ArdPrm(config(ArdPrm, ard_prm=ArdPrmConfig(**(off | {part_of: True})))).perturb(model, inputs)
        assert not torch.equal(changed, Pgd(config()).perturb(model, inputs))
        neither = ArdPrm(config(ArdPrm, ard_prm=ArdPrmConfig(**off))).perturb(model, inputs)
        assert torch.equal(neither, Pgd(config()).perturb(model, inputs))

    def test_rate_rises_to_one(self) -> None:
        rates = pass_rate(torch.tensor([0, 4, 9, 10, 50]), 10)
        torch.testing.assert_close(rates, torch.tensor([0.05, 0.45, 0.95, 1.0, 1.0]))

    def test_frequencies(self, model: Classifier) -> None:
        samples = torch.arange(500)
        inputs = Inputs(torch.empty(0), samples, samples, samples, seed=0, step=0, branch_scales=None)
        rate = torch.full((500,), 0.3)
        gates = draw_gates(rate, inputs, num_layers=12, num_branches=2, num_steps=3)
        assert gates.shape == (3, 500, 12, 2) and abs(gates.float().mean() - 0.3) < 0.01
        masks = draw_patch_masks(rate, inputs, grid=4, num_steps=3)
        assert masks.shape == (3, 500, 1, 4, 4)
        assert ((masks == 0).sum(dim=(2, 3, 4)) == int(16 * 0.7)).all()


class ResNet(nn.Module):
    """A ResNet by timm's convention, with what a method asks of a classifier."""

    config = ClassifierConfig(encoder="tiny", patch_size=16, drop_path=0.0)
    num_layers = 1

    def __init__(self) -> None:
        super().__init__()
        timm = pytest.importorskip("timm")
        self.encoder = SimpleNamespace(num_branches=1)
        self.num_classes = 10
        self.net = timm.models.resnet.ResNet(
            timm.models.resnet.BasicBlock, (1, 1, 1, 1), num_classes=10, channels=(8, 8, 16, 16)
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)


def xcit() -> nn.Module:
    config = ClassifierConfig(family="xcit", encoder="nano", patch_size=8, drop_path=0.0)
    model = build_classifier(config, 32, 10)
    nn.init.normal_(model.head.weight, std=0.2)
    return model


@pytest.mark.parametrize("build", [xcit, ResNet])
class TestBatchNorms:
    """Against the authors' order of passes, written here: attack in eval mode, then a pass for each view."""

    def model(self, build: Any) -> nn.Module:
        torch.manual_seed(0)
        model = build().train()
        with torch.no_grad():
            for _ in range(3):  # running statistics unlike any batch's
                model(torch.rand(8, 3, 32, 32) ** 2)
        return model

    def statistics(self, model: nn.Module) -> dict[str, Tensor]:
        return {name: value.clone() for name, value in model.named_buffers() if "running" in name}

    @pytest.mark.parametrize("kind", [Trades, Mart])
    def test_as_the_authors_code(self, kind: Any, build: Any, batch: Batch) -> None:
        model, reference = self.model(build), self.model(build)
        method = kind(config(kind))
        inputs = method.prepare(model, batch, seed=0, step=0)
        out = method(model, batch, seed=0, step=0)
        out["loss"].backward()

        images, labels = inputs.images, inputs.targets
        reference.eval()
        x = gaussian_start(inputs)
        natural = reference(images).softmax(1).detach()
        for _ in range(2):
            x.requires_grad_()
            logits = reference(x)
            if kind is Trades:
                value = F.kl_div(logits.log_softmax(1), natural, reduction="sum")
            else:
                value = F.cross_entropy(logits, labels)
            x = x.detach() + 2 / 255 * torch.autograd.grad(value, x)[0].sign()
            x = torch.min(torch.max(x, images - EPS), images + EPS).clamp(0, 1)
        reference.train()
        clean, attacked = reference(images), reference(x)
        wanted = sum(
            (trades_loss if kind is Trades else mart_loss)(clean, attacked, labels, 6.0 if kind is Trades else 5.0)
        )
        wanted.backward()
        torch.testing.assert_close(out["loss"], wanted, rtol=1e-4, atol=1e-5)
        for (name, ours), theirs in zip(model.named_parameters(), reference.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-2, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
        torch.testing.assert_close(self.statistics(model), self.statistics(reference), rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("mode", ["auto", "eval", "train"])
    @pytest.mark.parametrize("kind", [Pgd, Fast, Apgd, Trades, Mart])
    def test_the_mode_of_the_attack(self, kind: Any, mode: str, build: Any, batch: Batch) -> None:
        model = self.model(build)
        method = kind(config(kind, attack_mode=mode))
        inputs, seen = method.prepare(model, batch, seed=0, step=0), []
        model.register_forward_pre_hook(lambda module, args: seen.append(module.training))
        before = self.statistics(model)
        method.perturb(model, inputs)
        evaluates = mode == "eval" or (mode == "auto" and kind in (Apgd, Trades, Mart))
        assert set(seen) == {not evaluates} and model.training
        torch.testing.assert_close(self.statistics(model), before, rtol=0, atol=0)


class TestArdPrmOfTradesAndMart:
    """The authors hold those attacks back too (their train_cifar.py)."""

    @pytest.mark.parametrize(("loss", "plain"), [("trades", Trades), ("mart", Mart)])
    def test_after_the_warm_up_it_is_the_plain_method(
        self, loss: Any, plain: Any, model: Classifier, batch: Batch
    ) -> None:
        batch.epochs.fill_(10)
        held_back = build(config(ArdPrm, ard_prm=ArdPrmConfig(loss=loss, warmup_epochs=10)))
        found, wanted = (m(model, batch, seed=0, step=0) for m in (held_back, plain(config(plain))))
        assert found.keys() == wanted.keys()
        assert found["loss"].item() == pytest.approx(wanted["loss"].item(), rel=1e-3)  # gates round otherwise

    @pytest.mark.parametrize("loss", ["trades", "mart"])
    def test_before_that_the_attack_is_weaker(self, loss: Any, model: Classifier, batch: Batch) -> None:
        """At r = 0.05 three of four patches lose their perturbation ahead of each step, and move by one step only."""
        held_back = build(config(ArdPrm, ard_prm=ArdPrmConfig(loss=loss)))
        inputs = held_back.prepare(model, batch, seed=0, step=0)
        moved = (held_back.perturb(model, inputs) - inputs.images).abs()
        assert ((moved > 2.5 / 255).float().mean((1, 2, 3)) < 0.25 + 1e-6).all() and moved.max() > 1.5 / 255

    def test_their_conditions_hold(self) -> None:
        with pytest.raises(ValueError, match=r"--mixing\.mixup 0"):
            build(config(ArdPrm, ard_prm=ArdPrmConfig(loss="mart"), mixing=MixingConfig(mixup=0.8)))
        with pytest.raises(ValueError, match="pgd, trades, mart"):
            ArdPrmConfig(loss="kl")  # type: ignore[arg-type]
