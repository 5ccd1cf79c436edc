"""Self-supervised learning with HSICLoss, in a loop as lightly's tutorials have it: two views, backbone, head, loss.

    python examples/ssl_hsic.py

SSL-HSIC (Li et al., "Self-supervised learning with kernel dependence maximization", NeurIPS 2021): make the embedding
of a view dependent on which image it is of, and no larger than that takes:

    loss = −HSIC(z, identity) + γ·√HSIC(z, z)

Real digits from scikit-learn; judged on shifted and noisy ones by a nearest-neighbour classifier of frozen features.
"""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from mimir_fast import HSICLoss


def augment(images: Tensor) -> Tensor:
    """A random shift by up to a pixel, contrast, and noise; (B, 1, 8, 8) in [0, 1]."""
    padded = F.pad(images, (1, 1, 1, 1))
    rows, columns = torch.randint(0, 3, (2, len(images), 1, 1))
    grid = torch.arange(8)
    index = torch.arange(len(images))[:, None, None]
    shifted = padded[index, 0, (rows + grid[:, None]), (columns + grid[None, :])][:, None]
    contrast = 0.6 + 0.8 * torch.rand(len(images), 1, 1, 1)
    return (contrast * shifted + 0.15 * torch.randn_like(shifted)).clamp(0, 1)


def nearest_neighbour_accuracy(backbone: nn.Module, train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]) -> float:
    """Each test image gets the label of the most similar training image."""
    backbone.eval()
    with torch.no_grad():
        train_z, test_z = (F.normalize(backbone(images), dim=1) for images in (train[0], test[0]))
    nearest = (test_z @ train_z.T).argmax(dim=1)
    return float((train[1][nearest] == test[1]).float().mean())


def main(num_steps: int = 300, batch_size: int = 128, gamma: float = 0.1) -> dict[str, float]:
    """Train; the accuracy of the backbone before and after."""
    torch.manual_seed(0)
    digits = load_digits()
    images, labels = torch.tensor(digits.images / 16).float()[:, None], torch.tensor(digits.target)
    train, test = (images[:1300], labels[:1300]), (augment(images[1300:]), labels[1300:])

    backbone = nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, stride=2), nn.ReLU(), nn.Flatten(),
        nn.Linear(32 * 9, 64),
    )  # fmt: skip
    head = nn.Sequential(nn.ReLU(), nn.Linear(64, 32))
    before = nearest_neighbour_accuracy(backbone, train, test)
    optimizer = torch.optim.AdamW([*backbone.parameters(), *head.parameters()], lr=2e-3)
    # On the unit sphere squared distances are at most 4; the identity is one-hot, so its kernel has two values.
    dependence = HSICLoss(bandwidth="paper", sigma=0.5, estimator="unbiased")
    size = HSICLoss(bandwidth="paper", sigma=0.5, estimator="biased")
    identity = torch.eye(batch_size).repeat(2, 1)

    backbone.train()
    for step in range(num_steps):
        batch = train[0][torch.randperm(len(train[0]))[:batch_size]]
        z = F.normalize(head(backbone(torch.cat([augment(batch), augment(batch)]))), dim=1)
        # The dependence on N identities is of order 1/N; times N, both terms are of one size.
        loss = -batch_size * dependence(z, identity) + gamma * size(z, z).clamp_min(1e-12).sqrt()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 0:
            print(f"step {step:4}  loss {float(loss.detach()):.4f}")
    after = nearest_neighbour_accuracy(backbone, train, test)
    print(f"nearest-neighbour accuracy: {100 * before:.1f} % untrained, {100 * after:.1f} % trained without labels")
    return {"before": before, "after": after}


if __name__ == "__main__":
    main()
