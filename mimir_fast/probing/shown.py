"""What a model of somebody shows of its features: timm's `forward_features`, or transformers' `last_hidden_state`.

A TorchScript program shows the former if it was scripted (`torch.jit.script`), and nothing if it was traced.
Shapes: B images, C channels, H × W pixels, T tokens, D width.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

Pool = Literal["auto", "cls", "mean", "both"]
# Parameters of transformers' models that stand in front of the patches, as rows (…, rows, D), or as one row (D).
_PREFIX = ("cls_token", "class_embedding", "distillation_token", "register_tokens")


@dataclass(frozen=True)
class Shown:
    """The features of a model.

    Attributes:
        features: images (B, C, H, W), as the model takes them, → (B, D), (B, T, D), (B, D, H, W) or (B, H, W, D).
        owner: the part of the model that computes them.
        num_prefix: tokens in front of the patches', the cls token first.
        pool: as the model itself pools; `auto` where it does not say.
        norm: of the pooled vector; None for none.
    """

    features: Callable[[Tensor], Any]
    owner: nn.Module
    num_prefix: int
    pool: Pool
    norm: nn.Module | None

    def tokens(self, images: Tensor) -> Tensor:
        """(B, T, D), also of maps and of single vectors."""
        found: Tensor = self.features(images)
        if found.ndim == 4:
            found = found.flatten(1, 2) if self._channels_last(found) else found.flatten(2).transpose(1, 2)
        return found[:, None] if found.ndim == 2 else found

    def measured(self, images: Tensor, source: str) -> tuple[int, int]:
        """(D, rows of the prefix among the tokens; a map has none).

        Raises:
            ValueError: the features are no tensor of one of these shapes.
        """
        with torch.no_grad():
            found = self.features(images)
        if isinstance(found, Tensor) and 2 <= found.ndim <= 4:
            width = found.shape[1 if found.ndim == 4 and not self._channels_last(found) else -1]
            return width, self.num_prefix if found.ndim == 3 else 0
        what = f"{tuple(found.shape)}" if isinstance(found, Tensor) else f"a {type(found).__name__}"
        raise ValueError(
            f"forward_features of {source} returns {what}, wanted a tensor (B, D), (B, T, D) or (B, D, H, W)"
        )

    def _channels_last(self, found: Tensor) -> bool:
        """(B, H, W, D), as timm's Swin gives it."""
        return found.shape[1] != getattr(self.owner, "num_features", found.shape[1])


def shown_by(model: nn.Module, source: str, kind: str) -> Shown:
    """The features of a model.

    Args:
        source, kind: what the user typed and which kind of model that is, for messages.
    Raises:
        ValueError: it shows none, or those of random patches.
    """
    if hasattr(model, "forward_features"):
        named: Any = getattr(model, "global_pool", "")
        pool: Pool = {"token": "cls", "avg": "mean"}.get(named, "auto") if isinstance(named, str) else "auto"  # type: ignore[assignment]
        prefix = int(getattr(model, "num_prefix_tokens", 0))
        return Shown(model.forward_features, model, prefix, pool, getattr(model, "fc_norm", None))  # type: ignore[arg-type]
    transformers = sys.modules.get("transformers")
    if transformers is not None and isinstance(model, transformers.PreTrainedModel):
        return _of_transformers(model, source)
    raise ValueError(
        f"{source} ({kind}) shows no features: it has no forward_features(images), as models of timm have and what "
        "torch.jit.script makes of them; give the weights that it was made of"
    )


def _of_transformers(model: Any, source: str) -> Shown:
    """Of the model without its head."""
    base = model.base_model
    if hasattr(model.config, "mask_ratio"):
        raise ValueError(
            f"{source} ({type(model).__name__}) hides patches at random, so its features are those of what is left: "
            "give the folder that its save_pretrained writes, whose weights are read without that"
        )

    def features(images: Tensor) -> Any:
        return getattr(base(images, return_dict=True), "last_hidden_state", None)

    rows = [p.shape[-2] if p.ndim > 1 else 1 for n, p in base.named_parameters() if n.rpartition(".")[2] in _PREFIX]
    late = getattr(getattr(base, "pooler", None), "layernorm", None)  # of BEiT, for the mean of the patches
    if late is not None:
        return Shown(features, base, sum(rows), "mean", late)
    # ConvNeXt's is of the mean of the map, the others' of the tokens.
    norm = base.layernorm if type(base).__name__.startswith("ConvNext") else None
    return Shown(features, base, sum(rows), "auto", norm)
