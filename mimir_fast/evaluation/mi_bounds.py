"""The bounds between disagreement and mutual information (MIMIR, arXiv 2312.04960, Propositions 3.2 and 3.3).

    H(F(x+δ)) − H_b(p_e) − p_e·log2(|F| − 1)  ≤  I(x+δ, z)  ≲  H(F(x_re)) − 2·p_e          in bits
    p_e = P( F(x+δ) ≠ F(x_re) )

F is the class the classifier sees, |F| the number of classes, x_re the reconstruction that the masked autoencoder makes
of the attacked image x+δ. The left side is Fano's inequality and holds always. The right side assumes that no
information is lost on the ways x+δ → F(x+δ) and z → x_re; where it lies below the left side, it does not hold there.

The proof of Prop. 3.3 (Eq. 19) arrives at H(F(x+δ)) − 2·p_e, the proposition (Eq. 18) states H(F(x_re)) − 2·p_e: both
are computed.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


def entropy(labels: Tensor, num_classes: int) -> float:
    """Entropy in bits of the empirical distribution of (N,) int64 classes; 0 … log2(num_classes)."""
    p = torch.bincount(labels.long(), minlength=num_classes).double() / len(labels)
    return -float(torch.special.xlogy(p, p).sum()) / math.log(2) + 0.0


def binary_entropy(p: float) -> float:
    """H_b(p) in bits, 0 ≤ p ≤ 1."""
    return -sum(q * math.log2(q) for q in (p, 1 - p) if q > 0) + 0.0


def lower_bound(prediction_entropy: float, p_error: float, num_classes: int) -> float:
    """Bits that z must carry about x+δ if the classes differ with probability p_error; below 0 it says nothing.

    Raises:
        ValueError: p_error outside of [0, 1], or fewer than 2 classes.
    """
    _check(p_error, num_classes)
    rest = p_error * math.log2(num_classes - 1) if num_classes > 2 else 0.0
    return prediction_entropy - binary_entropy(p_error) - rest


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
    """The bounds at one radius, bits.

    Attributes:
        p_error: part of the images whose class differs between the attacked image and its reconstruction.
        lower: Proposition 3.2.
        upper: Proposition 3.3 as stated, with H(F(x_re)).
        upper_of_proof: as its proof ends, with H(F(x+δ)).
    """

    p_error: float
    lower: float
    upper: float
    upper_of_proof: float

    @property
    def crossed(self) -> bool:
        """The approximate upper bound lies below the certain lower one: its assumption fails here."""
        return self.upper < self.lower


def bounds_of(attacked: Tensor, reconstructed: Tensor, num_classes: int) -> Bounds:
    """Both bounds from the classes seen in attacked images and in their reconstructions, (N,) int64 each."""
    p = float((attacked != reconstructed).double().mean())
    h, h_re = entropy(attacked, num_classes), entropy(reconstructed, num_classes)
    return Bounds(p, lower_bound(h, p, num_classes), upper_bound(h_re, p), upper_bound(h, p))
