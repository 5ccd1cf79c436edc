"""The other estimators: nHSIC (the authors' penalty) and Rényi's information of order 2.

nHSIC's authors move both Gram matrices to the host and invert non-symmetric matrices there at every step; ours is two
Cholesky factorisations on the device. Rényi's order 2 by definition needs three spectra; ours is one pass over pairs.
Floors: the Gram matrices as for HSIC, plus N³/3 + 2N³/3 for each factorisation and inverse and 4 N³ for the gradients.
Shapes: N samples, D features.
"""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from benchmarks.case import Case, Provider, Size, finite, in_double
from benchmarks.hsic import both_gradients, gram_on_host, image_like
from mimir_fast.ops.nhsic import nhsic, nhsic_reference
from mimir_fast.ops.renyi_mi import renyi_mi, renyi_mi_reference

EPS = 1e-5
SIZES: dict[Size, tuple[int, int, int]] = {
    "tiny": (24, 40, 16),
    "quick": (256, 3072, 768),
    "full": (512, 3072, 768),
    "gpu": (512, 150528, 38400),
}


def cases(device: torch.device, size: Size) -> Iterator[Case]:
    """Both, at a training batch."""
    n, d_x, d_y = SIZES[size]
    params = {"N": n, "Dx": d_x, "Dy": d_y, "dtype": "fp32"}
    gram, make_inputs = 3.0 * n * n * (d_x + d_y), partial(image_like, n, d_x, d_y)

    yield Case(
        "nhsic_fwd_bwd",
        params,
        [
            Provider("mimir_fast", both_gradients(nhsic)),
            Provider("definition", both_gradients(nhsic_reference), tolerance=1e-3, note="general solves in fp32"),
            Provider(
                "authors' formula", both_gradients(authors), tolerance=(0.1, 3.0, 3.0),
                note="one-sided centring and inverses in fp32: its error, 160 % of a gradient, is the formula's own",
            ),
        ],
        baseline="authors' formula",
        make_inputs=make_inputs,
        reference=in_double(both_gradients(nhsic_reference)),
        tolerance=(1e-4, 1e-3, 1e-3),
        flops=gram + 6.0 * n**3,
        bytes=8.0 * n * (d_x + d_y),
        items=n,
    )  # fmt: skip
    yield Case(
        "renyi_order_2_fwd_bwd",
        params,
        [
            Provider("mimir_fast", both_gradients(renyi_mi)),
            Provider("eigenvalues", both_gradients(renyi_mi_reference), tolerance=1e-3, note="fp32 spectra"),
            Provider(
                "mimir_fast, order 1.01",
                both_gradients(partial(renyi_mi, alpha=1.01)),
                law=finite,
                note="the authors' order needs eigenvalues",
            ),
        ],
        baseline="eigenvalues",
        make_inputs=make_inputs,
        reference=in_double(both_gradients(renyi_mi_reference)),
        tolerance=(1e-5, 1e-4, 1e-4),
        flops=gram,
        bytes=8.0 * n * (d_x + d_y),
        items=n,
    )


def authors(x_ND: Tensor, y_ND: Tensor) -> Tensor:
    """R = K H (K H + ε N I)⁻¹ for each side on the host; Σ R_x ∘ R_yᵀ."""
    n = len(x_ND)
    identity = torch.eye(n)
    ratios = []
    for z in (x_ND, y_ND):
        centred = gram_on_host(z) @ (identity - 1 / n)
        ratios.append(centred @ torch.linalg.inv(centred + EPS * n * identity))
    return (ratios[0] * ratios[1].mT).sum()
