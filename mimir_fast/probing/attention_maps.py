"""What tokens look at: the attention of the last layer that has one between tokens, read while the model runs.

Our attention modules show theirs (`attention_map`); of others every call of `scaled_dot_product_attention` is seen,
which is how timm's models attend unless their fused attention is switched off.
Shapes: B images, H heads, Q queries, S keys, N patches, E numbers a head.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mimir_fast.probing.encoder import FrozenEncoder


@dataclass
class Looks:
    """Weights of the patches, the mean over heads; each image's need not sum to 1, the prefix gets the rest.

    Attributes:
        cls: (B, N), what the cls token takes from each patch; None where there is no such token.
        patches: (B, N), what patches take from each patch, the mean over them; None where they do not attend.
    """

    cls: Tensor | None
    patches: Tensor | None

    def __bool__(self) -> bool:
        return self.cls is not None or self.patches is not None


@torch.no_grad()
def looks_of(encoder: FrozenEncoder, images: Tensor) -> Looks:
    """Of images (B, C, H, W) in [0, 1]: of the last attention among all tokens or all patches. Windows are no such."""
    seen: dict[tuple[int, int], Tensor] = {}

    def note(weights_BHQS: Tensor) -> None:
        if weights_BHQS.ndim == 4 and len(weights_BHQS) == len(images):
            seen.pop(shape := (weights_BHQS.shape[2], weights_BHQS.shape[3]), None)
            seen[shape] = weights_BHQS.float().mean(dim=1)

    with _seen(encoder.model, note):
        num_tokens = encoder.tokens(images).shape[1]
    prefix = encoder.num_prefix
    looks = Looks(None, None)
    for (queries, keys), weights_BQS in seen.items():  # the last one counts
        if prefix and keys == num_tokens and queries in (1, num_tokens):
            looks.cls = weights_BQS[:, 0, prefix:]
        if queries == keys and keys in (num_tokens, num_tokens - prefix):
            first = keys - (num_tokens - prefix)
            looks.patches = weights_BQS[:, first:, first:].mean(dim=1)
    return looks


@contextmanager
def _seen(model: nn.Module, note: Callable[[Tensor], None]) -> Iterator[None]:
    def hook(module: Any, args: tuple[Any, ...], output: Any) -> None:
        note(module.attention_map(*(arg for arg in args if arg is not None)))

    handles = [m.register_forward_hook(hook) for m in model.modules() if hasattr(m, "attention_map")]
    try:
        # Layers call their hooks after they ran, so what a module shows replaces what was seen inside of it.
        with _Calls(note):
            yield
    finally:
        for handle in handles:
            handle.remove()


class _Calls(TorchFunctionMode):
    """Sees the calls of PyTorch's attention."""

    def __init__(self, note: Callable[[Tensor], None]) -> None:
        super().__init__()
        self.note = note

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and not kwargs.get("is_causal") and not kwargs.get("enable_gqa"):
            self.note(weights_of(*args, **kwargs))
        return func(*args, **kwargs)


def weights_of(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, **rest: Any,
) -> Tensor:  # fmt: skip
    """(B, H, Q, S) of the arguments (B, H, …, E) of `scaled_dot_product_attention`, dropout not looked at."""
    scores = (query.float() @ key.float().mT) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -torch.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
    return scores.softmax(dim=-1)
