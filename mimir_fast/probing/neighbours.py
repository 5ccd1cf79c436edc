"""Classification by nearest neighbours: what features mean without anything trained on them.

Similarity is the cosine. `softmax` votes weigh a neighbour by exp(similarity / T), T = 0.07 (Wu et al., arXiv
1805.01978; DINO, arXiv 2104.14294); `uniform` votes count each neighbour once, as scikit-learn's
KNeighborsClassifier does.
Exact: every query meets every training image, a block of queries at a time. Features of one encoder are often nearly
parallel (a ViT's cls tokens: cosines of 0.9999), and fp32 cosines then cannot tell neighbours apart. So unit vectors
are made in fp64, and their mean is taken out before they are rounded: u·v = 1 − ‖(u − m) − (v − m)‖²/2.
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
FP64_ROWS = 2**16
"""Features that are in memory in fp64 at once."""


def nearest(queries_QD: Tensor, train_ND: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(similarities (Q, k) descending, positions (Q, k) int64) of the k most similar training images.

    Raises:
        ValueError: fewer than k of them.
    """
    mean_D = _mean_direction(train_ND)
    return _nearest(queries_QD, _centred(train_ND, mean_D), mean_D, k)


def _mean_direction(features_ND: Tensor) -> Tensor:
    """(D,) fp64: the mean of unit vectors."""
    blocks = features_ND.split(FP64_ROWS)
    return torch.stack([F.normalize(block.double(), dim=1).sum(dim=0) for block in blocks]).sum(dim=0) / len(
        features_ND
    )


def _centred(features_ND: Tensor, mean_D: Tensor) -> Tensor:
    """Unit vectors less their mean, fp32."""
    blocks = features_ND.split(FP64_ROWS)
    return torch.cat([(F.normalize(block.double(), dim=1) - mean_D).float() for block in blocks])


def _nearest(queries_QD: Tensor, centred_ND: Tensor, mean_D: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Among training images that are centred, so that an attack does it once."""
    check_number("k", k, at_least=1, at_most=len(centred_ND), hint="no more neighbours than training images")
    halves_N, similarities, places = centred_ND.square().sum(dim=1) / 2, [], []
    for block in queries_QD.split(max(1, LARGEST_BLOCK // len(centred_ND))):
        queries = _centred(block, mean_D)
        order, index = (queries @ centred_ND.T - halves_N).topk(k, dim=1)
        similarities.append(1 - queries.square().sum(dim=1, keepdim=True) / 2 + order)
        places.append(index)
    return torch.cat(similarities), torch.cat(places)


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
        mean_D = _mean_direction(train_ND)
        self.register_buffer("mean", mean_D)
        self.register_buffer("centred", _centred(train_ND, mean_D))
        self.register_buffer("labels", labels_N)
        self.mean: Tensor
        self.centred: Tensor
        self.labels: Tensor
        self.num_classes, self.k, self.votes = num_classes, k, votes

    def forward(self, features_QD: Tensor) -> Tensor:
        """(Q, K); a class without a vote has the logarithm of the smallest number."""
        similarities, index = _nearest(features_QD, self.centred, self.mean, self.k)
        weights = torch.ones_like(similarities)
        if self.votes == "softmax":
            weights = (similarities / TEMPERATURE).softmax(dim=1)
        scores = weights.new_zeros(len(weights), self.num_classes).scatter_add(1, self.labels[index], weights)
        return scores.clamp_min(torch.finfo(scores.dtype).tiny).log()
