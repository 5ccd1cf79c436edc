"""The suite `strongest` against four libraries together: whatever image one of them breaks, the suite breaks.

pytest -m slow tests/evaluation/test_never_weaker.py -s        # some minutes each; prints who broke what, and the time
"""

import time
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mimir_fast.attacks.pgd import is_correct, pgd
from mimir_fast.attacks.threat_model import LinfThreat
from mimir_fast.data import DataConfig, build_loader
from mimir_fast.evaluation import evaluate
from mimir_fast.evaluation.images import load_images
from mimir_fast.models.classifier import ClassifierConfig, build_classifier

pytestmark = pytest.mark.slow
SIDES = {"digits": 8, "fashion_mnist": 28}
RADII = {
    ("digits", "linf"): 40 / 255,
    ("digits", "l2"): 0.5,
    ("fashion_mnist", "linf"): 24 / 255,
    ("fashion_mnist", "l2"): 1.0,
}
"""At which some images stand and some do not."""
COUNT, BATCH = 100, 100


def convolutions(side: int) -> nn.Module:
    """Two layers with BatchNorm."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2),
        nn.BatchNorm2d(32), nn.ReLU(), nn.Flatten(), nn.Linear(32 * ((side - 1) // 2) ** 2, 10),
    )  # fmt: skip


def perceptron(side: int) -> nn.Module:
    """Two hidden layers."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(side**2, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10)
    )


def transformer(side: int) -> nn.Module:
    """Four blocks on sixteen patches."""
    config = ClassifierConfig(encoder="nano", patch_size=side // 4, drop_path=0.0, head_std=0.02)
    return build_classifier(config, image_size=side, num_classes=10, channels=1)


def trained(build: Callable[[int], nn.Module], data: DataConfig, eps: float) -> nn.Module:
    """A model trained for seconds against PGD-3."""
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model = build(data.image_size)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3 if build is transformer else 3e-3)
    batches = iter(build_loader(data, split="train", batch_size=128, seed=0))
    for step in range(300):
        batch = next(batches)
        x = batch.images.float() / 255
        x = pgd(model, x, batch.labels, LinfThreat(eps, eps / 2, 3), samples=batch.samples, step=step)
        optimizer.zero_grad()
        F.cross_entropy(model(x), batch.labels).backward()
        optimizer.step()
    return model.eval()


def torchattacks_rivals(model: nn.Module, norm: str, eps: float) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """Its strongest of each norm."""
    t = pytest.importorskip("torchattacks")
    if norm == "l2":
        return {
            "torchattacks PGDL2": t.PGDL2(model, eps=eps, alpha=eps / 5, steps=100),
            "torchattacks APGDT": t.APGDT(model, norm="L2", eps=eps, n_classes=10),
        }
    return {
        "torchattacks PGD": t.PGD(model, eps=eps, alpha=eps / 4, steps=100),
        "torchattacks MI-FGSM": t.MIFGSM(model, eps=eps),
        "torchattacks Jitter": t.Jitter(model, eps=eps, alpha=eps / 4, steps=100),
        "torchattacks APGDT": t.APGDT(model, eps=eps, n_classes=10),
    }


def foolbox_rivals(model: nn.Module, norm: str, eps: float) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """Its PGD, and for L2 its two minimal-norm attacks that are known to be strong."""
    f = pytest.importorskip("foolbox")
    bounds = f.PyTorchModel(model, bounds=(0, 1), device="cpu")
    attacks = {
        "linf": {"foolbox PGD": f.attacks.LinfPGD(steps=100)},
        "l2": {"foolbox PGD": f.attacks.L2PGD(steps=100), "foolbox DDN": f.attacks.DDNAttack(steps=100),
               "foolbox C&W": f.attacks.L2CarliniWagnerAttack(binary_search_steps=5, steps=200)},
    }[norm]  # fmt: skip
    return {name: lambda x, y, a=attack: a(bounds, x, y, epsilons=eps)[1] for name, attack in attacks.items()}


def art_rivals(model: nn.Module, norm: str, eps: float, side: int) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """Its PGD and its AutoPGD."""
    a = pytest.importorskip("art.attacks.evasion")
    from art.estimators.classification import PyTorchClassifier

    classifier = PyTorchClassifier(model, nn.CrossEntropyLoss(), (1, side, side), 10, clip_values=(0, 1))
    given = {"norm": 2 if norm == "l2" else "inf", "eps": eps, "eps_step": eps / 4, "batch_size": BATCH}
    attacks = {
        "ART PGD": a.ProjectedGradientDescent(classifier, max_iter=100, verbose=False, **given),
        "ART AutoPGD": a.AutoProjectedGradientDescent(classifier, max_iter=100, verbose=False, **given),
    }
    return {
        name: lambda x, y, attack=attack: torch.from_numpy(attack.generate(x.numpy(), F.one_hot(y, 10).numpy()))
        for name, attack in attacks.items()
    }


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("source", SIDES)
@pytest.mark.parametrize("build", [convolutions, perceptron, transformer])
def test_no_image_that_only_another_library_breaks(build: Callable[[int], nn.Module], source: str, norm: str) -> None:
    """And the processor time, of which AutoAttack's own is the measure, is printed."""
    package = pytest.importorskip("pyautoattack")
    side, eps = SIDES[source], RADII[source, norm]
    data = DataConfig(source=source, image_size=side, channels=1, augment="none", flip=False)
    model, part = trained(build, data, RADII[source, "linf"] / 2), load_images(data).evenly(COUNT)
    x, y = part.images.float() / 255, part.labels
    start = time.process_time()
    results = evaluate(
        model, part.images, y, suite="table", autoattack="no", strongest="yes", norm=norm, eps=eps, batch_size=BATCH
    )
    ours = time.process_time() - start
    stands = torch.tensor([name == "none" for name in results.sections["accuracy"]["broken_by"].values()])

    def autoattack(x: Tensor, y: Tensor) -> Tensor:
        name = {"linf": "Linf", "l2": "L2"}[norm]
        attack = package.AutoAttack(model, eps=eps, norm=name, version="standard", device="cpu", seed=0)
        return attack.run_standard_evaluation(x, y, batch_size=BATCH)[0]

    rivals: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "AutoAttack": autoattack, **torchattacks_rivals(model, norm, eps), **foolbox_rivals(model, norm, eps),
        **art_rivals(model, norm, eps, side),
    }  # fmt: skip
    left, seconds = {}, {}
    for name, attack in rivals.items():
        start = time.process_time()
        x_adv = attack(x.clone(), y.clone())
        seconds[name] = time.process_time() - start
        delta = (x_adv - x).flatten(1)
        size = delta.norm(dim=1) if norm == "l2" else delta.abs().amax(dim=1)
        with torch.no_grad():
            left[name] = is_correct(model(x_adv), y) | (is_correct(model(x), y) & (size > eps * (1 + 1e-4)))
    theirs = torch.stack(list(left.values())).all(dim=0)
    print(f"{source} {build.__name__} {norm}: {int(stands.sum())} stand, after the others {int(theirs.sum())}:")
    print("    " + ", ".join(f"{name} {int(kept.sum())}" for name, kept in left.items()))
    print(f"    {ours / seconds['AutoAttack']:.2f} of AutoAttack's {seconds['AutoAttack']:.0f} s of processor time")
    assert 5 < int(stands.sum()) < COUNT - 10, "the test needs a robust accuracy in between"
    assert not (stands & ~theirs).any(), f"{int((stands & ~theirs).sum())} images that only others break"
