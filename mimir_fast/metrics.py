"""Dependence over a whole data set, a batch at a time: `update`, `compute` and `reset`, as torchmetrics has them.

Shapes: N samples of a batch; x (N, …), y (N, …).
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mimir_fast.ops._checks import check_choice
from mimir_fast.ops.cka import KERNELS, Kernel, hsics, ratio
from mimir_fast.ops.dependence.bandwidth import Sigma, widths
from mimir_fast.ops.global_batch import group_size


class MinibatchCKA(nn.Module):
    r"""CKA of two representations of a data set that does not fit into memory at once.

    $$\mathrm{CKA}_{\mathrm{minibatch}} = \frac{\sum_i \mathrm{HSIC}_u(x_i, y_i)}
    {\sqrt{\sum_i \mathrm{HSIC}_u(x_i, x_i) \sum_i \mathrm{HSIC}_u(y_i, y_i)}}$$

    over batches i, with the unbiased estimator of Song et al. 2012, so that the size of the batches does not shift the
    value (Nguyen et al. 2021, arXiv 2010.15327, Eq. 2 to 5). Batches of different sizes count alike, as there: leave a
    short last one out, or shuffle.

    Args:
        kernel: `linear`, or `rbf` exp(−d²/(2σ²D)).
        sigma: width of `rbf`, > 0, or (σ of x, σ of y). There is no median rule: it would be another kernel in each
            batch.

    Example:
        >>> metric = MinibatchCKA()
        >>> for images in loader:
        ...     metric.update(teacher(images), student(images))
        >>> metric.compute()
    """

    sums: Tensor
    batches: Tensor

    def __init__(self, *, kernel: Kernel = "linear", sigma: Sigma = 5.0):
        super().__init__()
        check_choice("kernel", kernel, KERNELS)
        widths(sigma)
        self.kernel, self.sigma = kernel, sigma
        self.register_buffer("sums", torch.zeros(3, dtype=torch.float64), persistent=False)
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64), persistent=False)

    @torch.no_grad()
    def update(self, x: Tensor, y: Tensor) -> None:
        """Count a batch: x (N, …) and y (N, …), N ≥ 4, on the device of this object or another.

        Raises:
            TypeError, ValueError: as `cka`.
        """
        found = hsics(x, y, kernel=self.kernel, sigma=self.sigma, bandwidth="reference", estimator="unbiased")
        self.sums += torch.stack(found).to(self.sums.device)
        self.batches += 1

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Count a batch; CKA of all that were counted on this rank."""
        self.update(x, y)
        return self._of(self.sums)

    def compute(self) -> Tensor:
        """CKA of all batches of all ranks, float64 scalar; 0 where one side was constant. All ranks have to ask.

        Raises:
            RuntimeError: no batch was counted on this rank.
        """
        if not self.batches:
            raise RuntimeError("no batch yet: call update(x, y) before compute()")
        sums = self.sums.clone()
        if group_size() > 1:
            dist.all_reduce(sums)
        return self._of(sums)

    def reset(self) -> None:
        """Forget all batches."""
        self.sums.zero_()
        self.batches.zero_()

    def _of(self, sums: Tensor) -> Tensor:
        xy, xx, yy = sums
        return ratio(xy, xx, yy, (xx <= 0) | (yy <= 0))

    def extra_repr(self) -> str:
        return f"kernel={self.kernel!r}, sigma={self.sigma}"
