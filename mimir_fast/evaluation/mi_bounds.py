"""The bounds between robust error and mutual information (MIMIR, arXiv 2312.04960, Prop. 3.2 and 3.3).

    H(F) − H_b(p_e) − p_e·log2(|F| − 1)  ≤  I(x+δ, z)  ≲  H(F(x_re)) − 2·p_e          in bits

F is the label, |F| the number of classes, p_e the probability that the classifier errs on x+δ, F(x_re) the class it
sees in the reconstruction. The left side is Fano's inequality: errors can only be rare if z keeps so much information.
The right side is the paper's approximation, not a theorem for every model.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


def entropy(labels: Tensor, num_classes: int) -> float:
    """Entropy in bits of the empirical distribution of (N,) int64 classes; 0 … log2(num_classes)."""
    p = torch.bincount(labels, minlength=num_classes).double() / len(labels)
    return -float(torch.special.xlogy(p, p).sum()) / torch.log(torch.tensor(2.0, dtype=torch.float64)).item()


def binary_entropy(p: float) -> float:
    """H_b(p) in bits, 0 ≤ p ≤ 1."""
    return entropy_of((p, 1 - p))


def entropy_of(probabilities: tuple[float, ...]) -> float:
    """Entropy in bits of probabilities that sum to 1."""
    p = torch.tensor(probabilities, dtype=torch.float64)
    return abs(float(torch.special.xlogy(p, p).sum() / torch.log(torch.tensor(2.0, dtype=torch.float64))))


def lower_bound(label_entropy: float, p_error: float, num_classes: int) -> float:
    """Bits that z must carry about x+δ if the error is p_error; may be negative, which says nothing.

    Raises:
        ValueError: p_error outside of [0, 1], or fewer than 2 classes.
    """
    _check(p_error, num_classes)
    rest = p_error * float(torch.log2(torch.tensor(float(num_classes - 1)))) if num_classes > 2 else 0.0
    return label_entropy - binary_entropy(p_error) - rest


def upper_bound(reconstruction_entropy: float, p_error: float) -> float:
    """Bits, approximately: H(F(x_re)) − 2·p_e."""
    _check(p_error, 2)
    return reconstruction_entropy - 2 * p_error


def _check(p_error: float, num_classes: int) -> None:
    if not 0 <= p_error <= 1:
        raise ValueError(f"p_error={p_error}, wanted a probability in [0, 1]")
    if num_classes < 2:
        raise ValueError(f"num_classes={num_classes}, wanted at least 2")


@dataclass
class Bounds:
    """The bounds along an ε–accuracy curve; lists of one length, bits.

    Attributes:
        eps: radii.
        p_error: robust error at each.
        lower, upper: `lower_bound`, `upper_bound`; `upper` takes H(F) where there is no reconstruction to look at.
    """

    eps: list[float]
    p_error: list[float]
    lower: list[float]
    upper: list[float]


def along_curve(
    accuracy: dict[float, float], labels: Tensor, num_classes: int, reconstructed: Tensor | None = None
) -> Bounds:
    """Bounds at each ε.

    Args:
        accuracy: ε → robust accuracy.
        labels: (N,) true classes.
        reconstructed: (N,) classes seen in the reconstructions, if a masked autoencoder is at hand.
    """
    h = entropy(labels, num_classes)
    h_re = h if reconstructed is None else entropy(reconstructed, num_classes)
    eps = sorted(accuracy)
    errors = [1 - accuracy[e] for e in eps]
    return Bounds(eps, errors, [lower_bound(h, p, num_classes) for p in errors], [upper_bound(h_re, p) for p in errors])
