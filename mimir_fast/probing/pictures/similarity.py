"""Which layers of two models say the same: linear CKA of every layer of one with every layer of the other.

CKA = Σ_b HSIC(A_b, B_b) / √(Σ_b HSIC(A_b, A_b) · Σ_b HSIC(B_b, B_b)) with the unbiased estimator of each batch b, so
that the size of the batches does not matter (Nguyen et al., arXiv 2010.15327, §3). Of a batch only the n × n matrices
of inner products are needed, of all batches only the sums: no features are kept.
Shapes: n images of a batch, A and B layers.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from mimir_fast.evaluation.charts import heat_map
from mimir_fast.evaluation.html import figure, paragraph
from mimir_fast.layers.outputs import outputs_of
from mimir_fast.ops.hsic import check_estimator, hsic_from_sums
from mimir_fast.probing.encoder import FrozenEncoder
from mimir_fast.probing.picture import PICTURES, Numbers, Picture, View

AT_ONCE = 128


class StreamedCka:
    """Linear CKA between all layers of two models, a batch at a time: in one batch `cka(estimator="unbiased")`."""

    def __init__(self) -> None:
        self.sums: tuple[Tensor, Tensor, Tensor] | None = None

    def update(self, first: Sequence[Tensor], second: Sequence[Tensor]) -> None:
        """Add a batch: `products` (n, n) of each layer, of the same n images; batches of fewer than 4 are left out."""
        if len(first[0]) < check_estimator("unbiased"):
            return
        found = (
            torch.stack([torch.stack([_hsic(x, y) for y in second]) for x in first]),
            torch.stack([_hsic(x, x) for x in first]),
            torch.stack([_hsic(y, y) for y in second]),
        )
        self.sums = found if self.sums is None else tuple(s + f for s, f in zip(self.sums, found, strict=True))  # type: ignore[assignment]

    def value(self) -> Tensor:
        """(A, B) float64, about 0 … 1.

        Raises:
            ValueError: there was no batch of 4 images.
        """
        if self.sums is None:
            raise ValueError("CKA of fewer than 4 images: give more test images (--limit)")
        both, own_a, own_b = self.sums
        smallest = torch.finfo(torch.float64).tiny
        return both / (own_a[:, None].clamp_min(smallest).sqrt() * own_b.clamp_min(smallest).sqrt())


def products(features: Tensor) -> Tensor:
    """Inner products (n, n) float64 of centred features (n, …), without the diagonal."""
    x = features.flatten(1).float()
    x = x - x.mean(dim=0)
    return (x @ x.mT).double().fill_diagonal_(0)


def _hsic(k: Tensor, m: Tensor) -> Tensor:
    return hsic_from_sums((k * m).sum(), k.sum(dim=1), m.sum(dim=1), "unbiased").cpu()


def look(view: View) -> tuple[Numbers, str] | None:
    """A map of both models' layers; None without another model."""
    if view.against is None:
        return None
    if len(view.more) < check_estimator("unbiased"):
        words = f"CKA needs 4 images, there are {len(view.more)}: give more (--limit)."
        return {"reason": words}, paragraph(words)
    models, stream = (view.encoder, view.against), StreamedCka()
    names: list[list[str]] = [[], []]
    with torch.no_grad():
        for images, _, _ in view.more.batches(AT_ONCE, view.device):
            found = [_products(model, images) for model in models]
            stream.update(*(list(outputs.values()) for outputs in found))
            names = [list(outputs) for outputs in found]
    values = stream.value().tolist()
    words = (
        f"Linear CKA of clean images ({len(view.more)}): 1 where two layers tell images apart in the same way, up to "
        "rotation and scale, 0 where they have nothing in common."
    )
    chart = heat_map(
        values, names[0], names[1], words, x_label=f"layers of {view.name}", y_label=f"layers of {view.against_name}",
        value_label="CKA", span=(0.0, 1.0),
    )  # fmt: skip
    numbers: Numbers = {
        "against": view.against_name, "layers": names[0], "layers_against": names[1], "cka": values,
        "images": len(view.more),
    }  # fmt: skip
    return numbers, paragraph(words, "soft") + figure(chart, f"{view.name} and {view.against_name}")


def _products(model: FrozenEncoder, images: Tensor) -> dict[str, Tensor]:
    with outputs_of(model.layers, products) as outputs:
        pooled = model(images)
    return {**outputs, "pooled": products(pooled)}


PICTURES.add("similarity", Picture("similarity", "Layers of two models", look, order=40))
