"""L2 and L1 balls: projections against their definition, attacks that stay inside and climb."""

import pytest
import torch
from small_classifier import EPS
from torch import Tensor, nn

from mimir_fast.attacks.apgd import apgd
from mimir_fast.attacks.lp import LpThreat, attack_classifier, project, random_in_ball, size_of, steepest
from mimir_fast.attacks.pgd import cross_entropy, is_correct, pgd
from mimir_fast.attacks.threat_model import LinfThreat
from mimir_fast.data import DataConfig, build_loader
from mimir_fast.evaluation.attacks import make_threat
from mimir_fast.evaluation.images import EvaluationImages, load_images
from mimir_fast.models.classifier import ClassifierConfig, build_classifier

RADII = {"l2": 0.8, "l1": 4.0}


@pytest.fixture(scope="module")
def digits(digits_images: EvaluationImages) -> tuple[Tensor, Tensor]:
    part = digits_images.evenly(40)
    return part.images.float() / 255, part.labels


@pytest.mark.parametrize("norm", RADII)
def test_projection_lands_inside_and_moves_nothing_that_is_inside(digits, norm) -> None:
    images, _ = digits
    far = images + torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    found = project(far, images, RADII[norm], norm)
    assert size_of(found - images, norm).max() <= RADII[norm] and found.min() >= 0 and found.max() <= 1
    assert size_of(found - images, norm).min() > 0.5 * RADII[norm], "the ball is used, not only respected"
    inside = project(found, images, RADII[norm], norm)
    torch.testing.assert_close(inside, found, rtol=0, atol=2e-6)


def test_the_l1_projection_is_the_nearest_point(digits) -> None:
    """Against a convex solver: no feasible point that gradient steps find lies nearer."""
    images = digits[0][:6]
    far = images + torch.randn(images.shape, generator=torch.Generator().manual_seed(1))
    found = project(far, images, 2.0, "l1")
    distance = (found - far).flatten(1).norm(dim=1)
    for seed in range(200):
        other = images + 0.3 * torch.randn(images.shape, generator=torch.Generator().manual_seed(seed))
        mixed = found + 0.1 * (project(other, images, 2.0, "l1") - found)  # the set is convex: this is inside
        assert ((mixed - far).flatten(1).norm(dim=1) >= distance - 1e-5).all()


@pytest.mark.parametrize("norm", RADII)
def test_random_points_fill_the_ball_and_depend_on_the_sample_only(digits, norm) -> None:
    images = torch.full_like(digits[0], 0.5)
    samples = torch.arange(40)
    whole = random_in_ball(images, 0.3, norm, samples=samples, surface=True)
    torch.testing.assert_close(size_of(whole - images, norm), torch.full((40,), 0.3), rtol=1e-4, atol=0)
    part = random_in_ball(images[7:9], 0.3, norm, samples=samples[7:9], surface=True)
    torch.testing.assert_close(part, whole[7:9])


@pytest.mark.parametrize("norm", RADII)
def test_steps_have_the_asked_length_and_climb(digits, norm) -> None:
    images, _ = digits
    grad = torch.randn(images.shape, generator=torch.Generator().manual_seed(2))
    step = steepest(grad, images, 0.25, norm)
    torch.testing.assert_close(size_of(step, norm), torch.full((40,), 0.25), rtol=1e-4, atol=0)
    assert ((step * grad).flatten(1).sum(dim=1) > 0).all()
    if norm == "l1":
        assert not ((images <= 0) & (step < 0)).any() and not ((images >= 1) & (step > 0)).any()


@pytest.mark.parametrize("norm", RADII)
def test_pgd_beats_noise_and_stays_in_the_ball(small_model, digits, norm) -> None:
    images, labels = digits
    threat = LpThreat(norm, RADII[norm], RADII[norm] / 4, 20)
    x = attack_classifier(small_model, images, labels, threat)
    assert size_of(x - images, norm).max() <= RADII[norm] and x.min() >= 0 and x.max() <= 1
    with torch.no_grad():
        noise = random_in_ball(images, RADII[norm], norm, surface=True)
        losses = [cross_entropy(small_model(v), labels).mean() for v in (images, noise, x)]
    assert losses[2] > 5 * losses[1] > 0
    assert all(p.grad is None for p in small_model.parameters())


def test_linf_threats_are_pgds_own(small_model, digits) -> None:
    threat = LinfThreat(EPS, EPS / 4, 5)
    assert torch.equal(
        attack_classifier(small_model, *digits, threat, seed=3), pgd(small_model, *digits, threat, seed=3, mode="eval")
    )


def test_apgd_l2_against_the_authors_package(small_model, digits) -> None:
    """The same ball, losses of one size: starts differ, so values agree on average only."""
    package = pytest.importorskip("pyautoattack.autopgd_base")
    images, labels = digits
    ours = apgd(small_model, images, labels, 0.8, 50, random_start=True, keep="adversarial", norm="l2")
    assert size_of(ours - images, "l2").max() <= 0.8
    theirs = package.APGDAttack(small_model, norm="L2", eps=0.8, n_iter=50, n_restarts=1, seed=0, device="cpu")
    x = theirs.perturb(images.clone(), labels.clone())
    with torch.no_grad():
        broken = [(small_model(v).argmax(1) != labels).sum() for v in (ours, x)]
    assert broken[0] > 0 and abs(int(broken[0]) - int(broken[1])) <= 2


def left(model: nn.Module, x: Tensor, labels: Tensor) -> int:
    """How many are classified correctly."""
    with torch.no_grad():
        return int(is_correct(model(x), labels).sum())


def test_sparse_l1_steps_are_about_as_strong_as_apgd_l1(small_model, digits_images: EvaluationImages) -> None:
    """20 steps against the package's 50; and steps that have nothing to adapt to, such as one, still break some."""
    package = pytest.importorskip("pyautoattack.autopgd_base")
    part, eps = digits_images.evenly(80), 1.5
    images, labels = part.images.float() / 255, part.labels
    with torch.random.fork_rng([]):
        theirs = package.APGDAttack(
            small_model, norm="L1", eps=eps, n_iter=50, n_restarts=1, seed=0, device="cpu", use_largereps=True
        ).perturb(images.clone(), labels.clone())
    counts = [
        left(small_model, attack_classifier(small_model, images, labels, make_threat("l1", eps, k)), labels)
        for k in (1, 5, 20)
    ]
    wanted = left(small_model, theirs, labels)
    assert 20 < wanted < 60, "the test needs a robust accuracy in between"
    assert counts[2] <= wanted + 4 and counts[2] < counts[1] < counts[0] < 80
    # A short first step is no weaker attack: the others adapt.
    short = attack_classifier(small_model, images, labels, make_threat("l1", eps, 20, eps / 20))
    assert left(small_model, short, labels) <= counts[2] + 4


def nets() -> dict[str, tuple[nn.Module, int, float]]:
    """Three kinds, each with the side of its images and an L1 radius; trained for seconds against small attacks."""
    convolutions = nn.Sequential(
        nn.Conv2d(1, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.BatchNorm2d(32),
        nn.ReLU(), nn.Flatten(), nn.Linear(1568, 10),
    )  # fmt: skip
    layers = nn.Sequential(nn.Flatten(), nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 10))
    transformer = build_classifier(ClassifierConfig(encoder="nano", patch_size=7), 28, 10, channels=1)
    return {"cnn": (convolutions, 28, 6.0), "mlp": (layers, 28, 10.0), "vit": (transformer, 28, 6.0)}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cnn", "mlp", "vit"])
def test_l1_pgd_against_other_libraries(name: str) -> None:
    """foolbox's SparseL1Descent, ART's L1 PGD and the package's APGD-L1, all of them with as many steps or more."""
    foolbox = pytest.importorskip("foolbox")
    art = pytest.importorskip("art.attacks.evasion")
    from art.estimators.classification import PyTorchClassifier

    package = pytest.importorskip("pyautoattack.autopgd_base")
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model, side, eps = nets()[name]
        data = DataConfig(source="digits", image_size=side, channels=1, augment="none", flip=False)
        batches = iter(build_loader(data, split="train", batch_size=128, seed=0))
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        for step in range(150):
            batch = next(batches)
            x = batch.images.float() / 255
            x = pgd(model, x, batch.labels, LinfThreat(0.05, 0.04, 2), samples=batch.samples, step=step, mode="eval")
            optimizer.zero_grad()
            cross_entropy(model(x), batch.labels).mean().backward()
            optimizer.step()
        model.eval()
        part = load_images(data).evenly(200)
        images, labels = part.images.float() / 255, part.labels
        bounds = foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu")
        attack = foolbox.attacks.SparseL1DescentAttack(steps=20)
        _, sparse, _ = attack(bounds, images, labels, epsilons=eps)
        classifier = PyTorchClassifier(model, nn.CrossEntropyLoss(), (1, side, side), 10, clip_values=(0, 1))
        plain = art.ProjectedGradientDescent(classifier, norm=1, eps=eps, eps_step=eps / 4, max_iter=20, verbose=False)
        dense = torch.from_numpy(plain.generate(images.numpy(), labels.numpy()))
        apgd_l1 = package.APGDAttack(
            model, norm="L1", eps=eps, n_iter=100, n_restarts=1, seed=0, device="cpu", use_largereps=True
        ).perturb(images.clone(), labels.clone())
    ours = attack_classifier(model, images, labels, make_threat("l1", eps, 20))
    assert size_of(ours - images, "l1").max() <= eps
    counts = {k: left(model, x, labels) for k, x in
              {"ours": ours, "foolbox": sparse, "ART": dense, "APGD-L1": apgd_l1}.items()}  # fmt: skip
    print(name, counts)
    assert counts["ours"] <= counts["foolbox"] + 8 and counts["ours"] <= counts["ART"], counts
    assert counts["ours"] <= counts["APGD-L1"] + 0.08 * len(labels), counts


def test_bad_norms_and_radii_are_explained() -> None:
    with pytest.raises(ValueError, match="LinfThreat"):
        LpThreat("linf")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="negative"):
        LpThreat("l2", -1.0)
    with pytest.raises(ValueError, match="pyautoattack"):
        apgd(torch.nn.Identity(), torch.rand(1, 1, 2, 2), torch.zeros(1).long(), 1.0, 1, norm="l1")  # type: ignore[arg-type]


class SteepAtBlack(nn.Module):
    """Infinite slopes at black pixels, and slopes that are no numbers: 0 times infinity."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(64, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        pixels = images.flatten(1)
        logits: torch.Tensor = self.head(pixels.sqrt() * (pixels > 0.5))
        return logits


@pytest.mark.parametrize("norm", RADII)
def test_a_slope_that_is_no_number_ends_in_no_image_that_is_none(norm) -> None:
    images = torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    images[:2, :, :4] = 0
    threat = LpThreat(norm, RADII[norm], RADII[norm] / 4, 5, random_start=False)
    x = attack_classifier(SteepAtBlack(), images, torch.arange(6), threat)
    assert x.isfinite().all() and x.min() >= 0 and x.max() <= 1
    assert (size_of(x - images, norm) > 0).all(), "it moves along the other pixels"


def test_a_slope_that_is_not_finite_moves_nothing() -> None:
    slope = torch.tensor([[1.5, -torch.inf, torch.nan, 2.0], [3.0, torch.nan, 4.0, 0.0]]).view(2, 1, 2, 2)
    step = steepest(slope, torch.full_like(slope, 0.5), 1.0, "l2").flatten(1)
    torch.testing.assert_close(step, torch.tensor([[0.6, 0.0, 0.0, 0.8], [0.6, 0.0, 0.8, 0.0]]))
