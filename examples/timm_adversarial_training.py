"""Adversarial training of any timm model: PGD with linf_step, in a plain loop.

    python examples/timm_adversarial_training.py

Madry et al., "Towards deep learning models resistant to adversarial attacks" (arXiv 1706.06083). Of this package only
`linf_step` is used: sign, step, projection onto the ε-ball and clamp in one pass. Real digits from scikit-learn.
"""

import timm
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from mimir_fast import linf_step

EPS = 0.1
"""Radius of the ball, of pixels in [0, 1]."""


def pgd(model: nn.Module, images: Tensor, labels: Tensor, num_steps: int) -> Tensor:
    """Adversarial images (B, C, H, W) within EPS of `images`, with a random start; parameters get no gradient."""
    alpha = 2.5 * EPS / num_steps
    x = (images + torch.empty_like(images).uniform_(-EPS, EPS)).clamp(0, 1)
    for _ in range(num_steps):
        x.requires_grad_()
        loss = F.cross_entropy(model(x), labels, reduction="sum")
        (grad,) = torch.autograd.grad(loss, x)
        x = linf_step(x.detach(), grad, images, alpha=alpha, eps=EPS)
    return x


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of images that are classified correctly."""
    with torch.no_grad():
        return float((model(images).argmax(dim=1) == labels).float().mean())


def main(num_steps: int = 150, batch_size: int = 64, adversarial: bool = True) -> dict[str, float]:
    """Train and evaluate; natural accuracy, and that under PGD-20."""
    torch.manual_seed(0)
    digits = load_digits()
    images, labels = torch.tensor(digits.images / 16).float()[:, None], torch.tensor(digits.target)
    train, test = (images[:1500], labels[:1500]), (images[1500:], labels[1500:])

    # Any name of timm will do; this one is made narrow for 8 × 8 pixels and one core.
    model = timm.create_model("resnet10t", in_chans=1, num_classes=10, channels=(16, 32, 64, 128))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=num_steps)
    for step in range(num_steps):
        chosen = torch.randperm(len(train[0]))[:batch_size]
        x, y = train[0][chosen], train[1][chosen]
        if adversarial:
            x = pgd(model, x, y, num_steps=2)
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 25 == 0:
            print(f"step {step:4}  loss {float(loss.detach()):.3f}")

    model.eval()
    found = {"natural": accuracy(model, *test), "robust": accuracy(model, pgd(model, *test, num_steps=20), test[1])}
    print(f"natural {100 * found['natural']:.1f} %, under PGD-20 (ε = {EPS}) {100 * found['robust']:.1f} %")
    return found


if __name__ == "__main__":
    main()
