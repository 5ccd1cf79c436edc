"""What does our AutoAttack (resumable, progress on disk) cost beside a direct call of its authors' package?

On a small model, where anything around the attacks weighs the most. Of `--autoattack_exact` the gate demands the same
verdict on every image; of the faster way, whose random numbers are others, as many broken images at least, and verdicts
that differ on one image in a hundred at most.
"""

import tempfile
from collections.abc import Iterator
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

EPS, BATCH = 24 / 255, 64
NUM_IMAGES: dict[Size, int] = {"tiny": 4, "quick": 32, "full": 128, "gpu": 128}


def cases(device: torch.device, size: Size) -> Iterator[Case]:
    """AutoAttack *standard* on scikit-learn's digits."""
    images, labels = digits(device)
    model = trained(images, labels, num_steps=5 if size == "tiny" else 300)
    count = NUM_IMAGES[size]
    # The last images: the model was trained on the first ones.
    levels, truth = (images[-count:] * 255).round().to(torch.uint8), labels[-count:]
    shard = EvaluationImages(
        levels.cpu(), truth.cpu(), torch.arange(count), tuple(map(str, range(10))), "digits", {}
    )  # fmt: skip

    def ours(_: object, exact: bool = False) -> Outputs:
        with tempfile.TemporaryDirectory() as folder:
            progress = run_autoattack(
                model, shard, EPS, batch_size=BATCH, device=device, state=Path(folder) / "state.json", exact=exact
            )  # fmt: skip
        return (torch.tensor([name == UNBROKEN for name in progress.broken_by], device=device),)

    def law(_: object, outputs: Outputs) -> str:
        stands, theirs = outputs[0], truly()
        differing, more = int((stands != theirs).sum()), int(stands.sum()) - int(theirs.sum())
        if more > 0 or differing > max(1, count // 100):
            return f"{differing} verdicts differ, {more} more images stand"
        return ""

    @cache
    def truly() -> Tensor:
        return direct(None)[0]

    def direct(_: object) -> Outputs:
        from pyautoattack import AutoAttack

        attack = AutoAttack(model, eps=EPS, norm="Linf", version="standard", device=device, seed=0)
        x, y = levels.float() / 255, truth.clone()
        adversarial, _ = attack.run_standard_evaluation(x, y, batch_size=BATCH)
        with torch.no_grad():
            return (model(adversarial).argmax(1) == truth,)

    yield Case(
        "autoattack",
        {"images": count, "version": "standard", "eps": "24/255", "model": "two-layer network on 8x8 digits"},
        [
            Provider("mimir_fast", ours, law=law),
            Provider("mimir_fast, exact", partial(ours, exact=True)),
            Provider("pyautoattack, directly", direct),
        ],
        baseline="pyautoattack, directly",
        reference=direct,
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


def trained(images: Tensor, labels: Tensor, num_steps: int) -> nn.Module:
    """A small network trained against PGD, so that images survive and the long attacks have work."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10)).to(images.device)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    threat = LinfThreat(eps=EPS, alpha=EPS / 2, num_steps=3, random_start=False)
    for step in range(num_steps):
        rows = (torch.arange(128, device=images.device) + 128 * step) % 1400
        x_adv = pgd(model, images[rows], labels[rows], threat)
        F.cross_entropy(model(x_adv), labels[rows]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()
