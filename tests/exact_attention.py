"""Attention and its gradients by their formulas, in the precision of what is given."""

import torch
from torch import Tensor


def exact_attention(q: Tensor, k: Tensor, v: Tensor, out: Tensor, grad: Tensor) -> list[Tensor]:
    """The output, and the gradients of q, k and v; all (B, T or S, H, E).

    Args:
        out: the output once more, which enters the gradients of q and k as a kernel has rounded it. With one key they
            are differences of two equal numbers.
        grad: of the output.
    """
    scale = q.shape[-1] ** -0.5
    p = (torch.einsum("bthe,bshe->bhts", q, k) * scale).softmax(dim=-1)
    of_out = (grad * out).sum(-1).transpose(1, 2).unsqueeze(-1)
    ds = p * (torch.einsum("bthe,bshe->bhts", grad, v) - of_out) * scale
    return [
        torch.einsum("bhts,bshe->bthe", p, v),
        torch.einsum("bhts,bshe->bthe", ds, k),
        torch.einsum("bhts,bthe->bshe", ds, q),
        torch.einsum("bhts,bthe->bshe", p, grad),
    ]
