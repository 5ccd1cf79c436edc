"""What does our AutoAttack (resumable, progress on disk) cost beside a direct call of its authors' package?

On small models of four kinds, where anything around the attacks weighs the most. Of `--autoattack_exact` the gate
demands the same verdict on every image; of the faster way, whose random numbers are others, as many broken images at
least, and verdicts that differ on one image in a hundred at most.
"""

import tempfile
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.case import Case, Outputs, Provider, Size
from mimir_fast.attacks.pgd import pgd
from mimir_fast.attacks.threat_model import LinfThreat
from mimir_fast.evaluation.images import EvaluationImages
from mimir_fast.evaluation.measure import UNBROKEN
from mimir_fast.evaluation.topics.autoattack import run_autoattack
from mimir_fast.models.classifier import ClassifierConfig, build_classifier

EPS, BATCH = 24, 64
"""Radius in grey levels, images of a batch."""
NUM_IMAGES: dict[Size, int] = {"tiny": 4, "quick": 32, "full": 200, "gpu": 200}


def mlp() -> nn.Module:
    """One hidden layer."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))


def cnn() -> nn.Module:
    """Two convolutions with BatchNorm."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2), nn.BatchNorm2d(32), nn.ReLU(), nn.Flatten(), nn.Linear(32 * 9, 10),
    )  # fmt: skip


def our_vit() -> nn.Module:
    """Four blocks of width 96 on sixteen patches."""
    config = ClassifierConfig(encoder="nano", patch_size=2, drop_path=0.0, head_std=0.02)
    return build_classifier(config, image_size=8, num_classes=10, channels=1)


def timm_vit() -> nn.Module:
    """The same size from timm."""
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(8, 2, in_chans=1, num_classes=10, embed_dim=96, depth=4, num_heads=3, global_pool="avg")


MODELS: dict[str, tuple[Callable[[], nn.Module], float]] = {
    "MLP": (mlp, 3e-3), "CNN": (cnn, 3e-3), "ViT-nano/2": (our_vit, 1e-3), "timm ViT-nano/2": (timm_vit, 1e-3),
}  # fmt: skip
"""What is attacked, and the rate at which it learns."""
TIMED: dict[Size, tuple[str, ...]] = {
    "tiny": tuple(MODELS), "quick": ("MLP",), "full": tuple(MODELS), "gpu": tuple(MODELS)
}  # fmt: skip


def cases(device: torch.device, size: Size) -> Iterator[Case]:
    """AutoAttack *standard* on scikit-learn's digits, a case for each model."""
    images, labels = digits(device)
    for name in TIMED[size]:
        if size == "tiny":  # nothing stands for long
            yield case(name, images, labels, NUM_IMAGES[size], num_steps=5, eps=160)
        else:
            yield case(name, images, labels, NUM_IMAGES[size], num_steps=300)


def case(name: str, images: Tensor, labels: Tensor, count: int, num_steps: int, eps: int = EPS) -> Case:
    """That of a model, trained on the first images and attacked on the last ones."""
    device = images.device

    @cache
    def model() -> nn.Module:
        return trained(*MODELS[name], images, labels, num_steps)

    levels, truth = (images[-count:] * 255).round().to(torch.uint8), labels[-count:]
    shard = EvaluationImages(
        levels.cpu(), truth.cpu(), torch.arange(count), tuple(map(str, range(10))), "digits", {}
    )  # fmt: skip

    def ours(_: object, exact: bool = False) -> Outputs:
        with tempfile.TemporaryDirectory() as folder:
            progress = run_autoattack(
                model(), shard, eps / 255, batch_size=BATCH, device=device, state=Path(folder) / "state.json",
                exact=exact,
            )  # fmt: skip
        return (torch.tensor([name == UNBROKEN for name in progress.broken_by], device=device),)

    def law(_: object, outputs: Outputs) -> str:
        stands, theirs = outputs[0], truly(None)[0]
        differing, more = int((stands != theirs).sum()), int(stands.sum()) - int(theirs.sum())
        if more > 0 or differing > max(1, count // 100):
            return f"{differing} verdicts differ, {more} more images stand"
        return ""

    def direct(_: object) -> Outputs:
        from pyautoattack import AutoAttack

        attack = AutoAttack(model(), eps=eps / 255, norm="Linf", version="standard", device=device, seed=0)
        x, y = levels.float() / 255, truth.clone()
        adversarial, _ = attack.run_standard_evaluation(x, y, batch_size=BATCH)
        with torch.no_grad():
            return (model()(adversarial).argmax(1) == truth,)

    truly = cache(direct)
    return Case(
        "autoattack",
        {"images": count, "version": "standard", "eps": f"{eps}/255", "model": name, "data": "digits 8x8"},
        [
            Provider("mimir_fast", ours, law=law, report=lambda: {"images that stand": float(truly(None)[0].sum())}),
            Provider("mimir_fast, exact", partial(ours, exact=True)),
            Provider("pyautoattack, directly", direct),
        ],
        baseline="pyautoattack, directly",
        reference=truly,
        items=count,
        memory=False,
        ratios={
            "ours / direct": ("mimir_fast", "pyautoattack, directly"),
            "exact / direct": ("mimir_fast, exact", "pyautoattack, directly"),
        },
    )


def digits(device: torch.device) -> tuple[Tensor, Tensor]:
    """(N, 1, 8, 8) float in [0, 1] and (N,) labels."""
    from sklearn.datasets import load_digits

    data = load_digits()
    return torch.tensor(data.images / 16, dtype=torch.float32, device=device)[:, None], torch.tensor(
        data.target, device=device
    )


def trained(
    build: Callable[[], nn.Module], rate: float, images: Tensor, labels: Tensor, num_steps: int
) -> nn.Module:  # fmt: skip
    """A model trained against PGD, so that images survive and the long attacks have work."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build().to(images.device)
    optimizer = torch.optim.Adam(model.parameters(), rate)
    threat = LinfThreat(eps=EPS / 255, alpha=EPS / 510, num_steps=3, random_start=False)
    for step in range(num_steps):
        rows = (torch.arange(128, device=images.device) + 128 * step) % 1400
        x_adv = pgd(model, images[rows], labels[rows], threat)
        F.cross_entropy(model(x_adv), labels[rows]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()
