"""Estimators and attacks in PyTorch Lightning: they are plain functions, so there is nothing to adapt.

    python examples/lightning_module.py        # with `pip install lightning`, by its Trainer; without, by a bare loop

A classifier trained on FGSM images with a random start (Wong et al., "Fast is better than free", arXiv 2001.03994), and
a penalty on what its features remember of the image (HSIC). Real digits from scikit-learn.
"""

from typing import Any

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from mimir_fast import gradient_share, hsic, linf_step

try:
    from lightning import LightningModule, Trainer, seed_everything
except ImportError:
    LightningModule, Trainer = nn.Module, None

Batch = tuple[Tensor, Tensor]


class RobustDigits(LightningModule):
    """Images (B, 1, 8, 8) in [0, 1] to logits (B, 10)."""

    def __init__(self, eps: float = 0.15, weight: float = 1.0) -> None:
        super().__init__()
        self.eps, self.weight, self.share = eps, weight, 0.0
        self.features = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, stride=2), nn.ReLU(), nn.Flatten()
        )
        self.head = nn.Linear(32 * 9, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images))

    def fgsm(self, images: Tensor, labels: Tensor) -> Tensor:
        """Adversarial images within eps; validation has gradients off, an attack needs them."""
        with torch.enable_grad():
            start = (images + torch.empty_like(images).uniform_(-self.eps, self.eps)).clamp(0, 1).requires_grad_()
            (grad,) = torch.autograd.grad(F.cross_entropy(self(start), labels, reduction="sum"), start)
        return linf_step(start.detach(), grad, images, alpha=1.25 * self.eps, eps=self.eps)

    def training_step(self, batch: Batch, batch_index: int) -> Tensor:
        images, labels = batch
        adversarial = self.fgsm(images, labels)
        features = self.features(adversarial)
        loss = F.cross_entropy(self.head(features), labels)
        penalty = self.weight * hsic(adversarial, features, bandwidth="median")
        if batch_index == 0:  # once an epoch: does the penalty steer at all?
            self.share = float(gradient_share(penalty, loss, self.parameters()))
        return loss + penalty

    def validation_step(self, batch: Batch, batch_index: int) -> dict[str, float]:
        images, labels = batch
        found = {
            name: float((self(x).argmax(dim=1) == labels).float().mean())
            for name, x in (("natural", images), ("robust", self.fgsm(images, labels)))
        }
        if Trainer is not None:
            self.log_dict(found)
        return found

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=2e-3)


def main(num_epochs: int = 8) -> dict[str, float]:
    """Train and validate; natural accuracy, and that under FGSM."""
    torch.manual_seed(0)
    digits = load_digits()
    data = TensorDataset(torch.tensor(digits.images / 16).float()[:, None], torch.tensor(digits.target))
    train = DataLoader(torch.utils.data.Subset(data, range(1500)), batch_size=64, shuffle=True, drop_last=True)
    test = DataLoader(torch.utils.data.Subset(data, range(1500, len(data))), batch_size=len(data))
    model = RobustDigits()
    if Trainer is not None:
        seed_everything(0, verbose=False)
        quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        # Under inference mode, Lightning's default when it validates, no gradient reaches the images.
        trainer = Trainer(
            max_epochs=num_epochs, accelerator="cpu", inference_mode=False, enable_model_summary=False, **quiet
        )
        trainer.fit(model, train)
        (found,) = trainer.validate(model, test, verbose=False)
    else:
        optimizer = model.configure_optimizers()
        for _ in range(num_epochs):
            for index, batch in enumerate(train):
                optimizer.zero_grad()
                model.training_step(batch, index).backward()
                optimizer.step()
        with torch.no_grad():
            found = model.eval().validation_step(next(iter(test)), 0)
    print(f"the penalty's gradient is {model.share:.3f} of the cross-entropy's")
    print(f"natural {100 * found['natural']:.1f} %, under FGSM {100 * found['robust']:.1f} %")
    return dict(found)


if __name__ == "__main__":
    main()
