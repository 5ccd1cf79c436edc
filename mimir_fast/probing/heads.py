"""Linear classifiers on frozen features: many learning rates in one pass, and the optimum of logistic regression.

`train_heads` trains one head for each learning rate, all on the same batches (DINOv2, arXiv 2304.07193, §A): one matrix
product serves all of them. Which one counts is decided on images that were held out of the training ones.
Features are standardised with the training images' mean and deviation first, as the batch norm without parameters in
front of MAE's linear probe does; the heads that come back contain that.
Shapes: N images, D numbers a feature, K classes, R learning rates.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mimir_fast.attacks.pgd import is_correct
from mimir_fast.probing.features import Features

RATES = tuple(base * 10.0**power for power in range(-4, 1) for base in (1, 2, 5))[:-2]
"""13 learning rates, 1e-4 … 1, for a batch of 256."""


@dataclass
class Heads:
    """Trained heads on features as the encoder gives them, and the rates they were trained with.

    Attributes:
        weight: (R, K, D).
        bias: (R, K).
        rates: R learning rates.
    """

    weight: Tensor
    bias: Tensor
    rates: tuple[float, ...]

    def logits(self, features_ND: Tensor) -> Tensor:
        """(R, N, K)."""
        return torch.einsum("nd,rkd->rnk", features_ND, self.weight) + self.bias[:, None]

    def accuracies(self, features: Features) -> list[float]:
        """Of each head, 0 … 1."""
        correct = torch.zeros(len(self.rates))
        for values, labels in zip(features.values.split(4096), features.labels.split(4096), strict=True):
            correct += is_correct(self.logits(values), labels).sum(dim=1)
        return [float(c) / len(features) for c in correct]

    def linear(self, index: int) -> nn.Linear:
        """One head as a module."""
        head = nn.Linear(self.weight.shape[2], self.weight.shape[1])
        with torch.no_grad():
            head.weight.copy_(self.weight[index])
            head.bias.copy_(self.bias[index])
        return head


def standardisation(values_ND: Tensor) -> tuple[Tensor, Tensor]:
    """(mean (D,), deviation (D,)) of features; the deviation of a constant one is 1."""
    total, squares = torch.zeros(2, values_ND.shape[1], dtype=torch.float64)
    for block in values_ND.split(4096):
        total += block.double().sum(dim=0)
        squares += block.double().square().sum(dim=0)
    mean = total / len(values_ND)
    deviation = (squares / len(values_ND) - mean.square()).clamp_min(0).sqrt()
    deviation = torch.where(deviation > 1e-6 * mean.abs() + 1e-12, deviation, torch.ones_like(deviation))
    return mean.float(), deviation.float()


def unstandardised(weight_RKD: Tensor, bias_RK: Tensor, mean: Tensor, deviation: Tensor) -> tuple[Tensor, Tensor]:
    """The same classifiers on features that are not standardised."""
    weight = weight_RKD / deviation
    return weight, bias_RK - weight @ mean


def train_heads(
    features: Features, num_classes: int, *, rates: Sequence[float] = RATES, epochs: int = 50, batch_size: int = 256,
    seed: int = 0, device: torch.device | None = None,
) -> Heads:  # fmt: skip
    """Heads by SGD with momentum 0.9, no weight decay, and a cosine schedule to zero; they start at zero.

    Args:
        rates: R learning rates for a batch of 256; they are scaled with the batch.
    """
    device = device or torch.device("cpu")
    mean, deviation = standardisation(features.values)
    R, K, D = len(rates), num_classes, features.values.shape[1]
    # Class by class, all rates of a class together, images last: the softmax then runs along contiguous numbers.
    weight, bias = torch.zeros(K * R, D, device=device), torch.zeros(K * R, 1, device=device)
    velocity, bias_velocity = torch.zeros_like(weight), torch.zeros_like(bias)
    batch_size = min(batch_size, len(features))
    steps = epochs * (len(features) // batch_size)
    step_sizes = (torch.tensor(rates, device=device).repeat(K) * batch_size / 256)[:, None]
    generator = torch.Generator().manual_seed(seed)
    step = 0
    for _ in range(epochs):
        order = torch.randperm(len(features), generator=generator)
        for chosen in order.split(batch_size)[: len(features) // batch_size]:
            x = ((features.values[chosen] - mean) / deviation).to(device)
            logits = torch.addmm(bias, weight, x.T).view(K, R, len(x))
            targets = F.one_hot(features.labels[chosen].to(device), K).T
            grad = ((logits.softmax(dim=0) - targets[:, None]) / len(x)).view(K * R, len(x))
            velocity.mul_(0.9).addmm_(grad, x)
            bias_velocity.mul_(0.9).add_(grad.sum(dim=1, keepdim=True))
            size = step_sizes * (0.5 * (1 + math.cos(math.pi * step / steps)))
            weight -= size * velocity
            bias -= size * bias_velocity
            step += 1
    weight, bias = weight.cpu().view(K, R, D).transpose(0, 1), bias.cpu().view(K, R).T
    return Heads(*unstandardised(weight, bias, mean, deviation), tuple(rates))


def logistic_regression(features: Features, num_classes: int, *, penalty: float = 1.0, steps: int = 1000) -> Heads:
    """The head of least Σ cross entropy + penalty/2·‖W‖² on standardised features, by L-BFGS.

    scikit-learn's LogisticRegression(C=1/penalty) has the same optimum; the bias is not penalised.
    """
    mean, deviation = standardisation(features.values)
    x = ((features.values - mean) / deviation).double()
    weight = torch.zeros(num_classes, x.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(num_classes, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=steps, history_size=20, tolerance_grad=1e-7, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        fit = F.cross_entropy(F.linear(x, weight, bias), features.labels, reduction="sum")
        loss: Tensor = (fit + penalty / 2 * weight.square().sum()) / len(x)
        loss.backward()
        return loss

    optimizer.step(closure)
    found = unstandardised(weight.detach().float()[None], bias.detach().float()[None], mean, deviation)
    return Heads(*found, (penalty,))
