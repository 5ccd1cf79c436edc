"""Classification by nearest neighbours: what features mean without anything trained on them.

Similarity is the cosine. `softmax` votes weigh a neighbour by exp(similarity / T), T = 0.07 (Wu et al., arXiv
1805.01978; DINO, arXiv 2104.14294); `uniform` votes count each neighbour once, as scikit-learn's
KNeighborsClassifier does.
Exact: every query meets every training image, a block of queries at a time.
Shapes: N training images, Q queries, D numbers a feature, k neighbours, K classes.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mimir_fast.validation import check_number

Votes = Literal["softmax", "uniform"]
TEMPERATURE = 0.07
LARGEST_BLOCK = 2**24
"""Similarities computed at once."""


def nearest(queries_QD: Tensor, train_ND: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(similarities (Q, k) descending, positions (Q, k) int64) of the k most similar training images.

    Raises:
        ValueError: fewer than k of them.
    """
    return _nearest(queries_QD, F.normalize(train_ND.float(), dim=1), k)


def _nearest(queries_QD: Tensor, unit_ND: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Among rows of length 1, so that an attack normalises those of the training images once."""
    check_number("k", k, at_least=1, at_most=len(unit_ND), hint="no more neighbours than training images")
    found = [
        (F.normalize(block.float(), dim=1) @ unit_ND.T).topk(k, dim=1)
        for block in queries_QD.split(max(1, LARGEST_BLOCK // len(unit_ND)))
    ]
    return torch.cat([values for values, _ in found]), torch.cat([index for _, index in found])


class NeighbourHead(nn.Module):
    """Features (Q, D) to (Q, K), the logarithm of each class's share of the votes: differentiable with softmax votes.

    Args:
        train_ND: features of the training images.
        labels_N: their classes, int64.
        k: neighbours that vote.
    """

    def __init__(
        self, train_ND: Tensor, labels_N: Tensor, num_classes: int, k: int = 20, votes: Votes = "softmax"
    ) -> None:
        super().__init__()
        self.register_buffer("train_features", F.normalize(train_ND.float(), dim=1))
        self.register_buffer("labels", labels_N)
        self.train_features: Tensor
        self.labels: Tensor
        self.num_classes, self.k, self.votes = num_classes, k, votes

    def forward(self, features_QD: Tensor) -> Tensor:
        """(Q, K); a class without a vote has the logarithm of the smallest number."""
        similarities, index = _nearest(features_QD, self.train_features, self.k)
        weights = torch.ones_like(similarities)
        if self.votes == "softmax":
            weights = (similarities / TEMPERATURE).softmax(dim=1)
        scores = weights.new_zeros(len(weights), self.num_classes).scatter_add(1, self.labels[index], weights)
        return scores.clamp_min(torch.finfo(scores.dtype).tiny).log()
