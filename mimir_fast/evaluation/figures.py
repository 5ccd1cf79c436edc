"""The report's figures, drawn with matplotlib into PNG bytes; each function takes numbers and returns one picture.

Drawn at 6 inches with large type, so that they read on a phone as they do on a desk.
"""

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from mimir_fast.evaluation.loss_surface import LossSurface
from mimir_fast.evaluation.mi_bounds import Bounds

BLUE, RED, GREY = "#1f5fa8", "#b3372f", "#777777"


def _figure(width: float = 6.0, height: float = 3.8, **keywords: Any) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=130, layout="constrained")
    axes = figure.subplots(**keywords)
    return figure, axes


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def accuracy_curve(accuracy: dict[float, float], noise: dict[float, float], eps: float, num_images: int) -> bytes:
    """Accuracy against ε, with two standard errors, and against random noise of the same size."""
    figure, axes = _figure()
    radii = sorted(accuracy)
    places = np.arange(len(radii))  # evenly spaced: the radii range over two orders of magnitude
    y = np.array([accuracy[r] for r in radii])
    margin = 2 * np.sqrt(y * (1 - y) / num_images)
    axes.fill_between(places, 100 * (y - margin), 100 * (y + margin), color=BLUE, alpha=0.18, linewidth=0)
    axes.plot(places, 100 * y, "o-", color=BLUE, label="under PGD")
    axes.plot(places, [100 * noise[r] for r in radii], "s--", color=GREY, label="under random noise")
    if eps in accuracy:
        axes.axvline(radii.index(eps), color=RED, linewidth=1, linestyle=":", label=f"ε = {255 * eps:.3g}/255")
    axes.set_xticks(places, [f"{255 * r:.3g}" for r in radii])
    axes.set(xlabel="ε · 255", ylabel="accuracy (%)", ylim=(-2, 102))
    axes.legend(frameon=False)
    return _png(figure)


def loss_against_steps(losses: dict[int, float]) -> bytes:
    """Mean loss at the end of PGD against its steps."""
    figure, axes = _figure(height=3.2)
    steps = sorted(losses)
    axes.plot(range(len(steps)), [losses[s] for s in steps], "o-", color=BLUE)
    axes.set_xticks(range(len(steps)), [str(s) for s in steps])
    axes.set(xlabel="steps of PGD", ylabel="mean loss")
    return _png(figure)


def surface(surface_: LossSurface, title: str) -> bytes:
    """Level lines of the loss around the weights."""
    figure, axes = _figure(5.0, 4.2)
    grid = surface_.loss.clamp(max=float(surface_.loss.median()) * 8 + 1e-6).numpy()
    steps = surface_.steps.numpy()
    filled = axes.contourf(steps, steps, grid.T, levels=18, cmap="viridis")
    axes.plot([0], [0], "+", color="white", markersize=12)
    figure.colorbar(filled, ax=axes, label="mean loss")
    axes.set(xlabel="a", ylabel="b", title=title)
    return _png(figure)


def bounds(b: Bounds, estimate: dict[float, float] | None = None) -> bytes:
    """Lower and upper bound of I(x+δ, z) along ε, in bits."""
    figure, axes = _figure()
    x = np.array(b.eps) * 255
    axes.plot(x, b.lower, "o-", color=BLUE, label="lower (Fano)")
    axes.plot(x, b.upper, "s-", color=RED, label="upper, approximately")
    axes.fill_between(x, b.lower, np.maximum(b.upper, b.lower), color=GREY, alpha=0.12, linewidth=0)
    if estimate:
        radii = sorted(estimate)
        axes.plot(
            np.array(radii) * 255, [estimate[r] for r in radii], "^--", color=GREY, label="Rényi estimate, one batch"
        )
    axes.set(xlabel="ε · 255", ylabel="bits")
    axes.legend(frameon=False)
    return _png(figure)


def corruption_bars(accuracy: dict[str, float]) -> bytes:
    """Accuracy of each corruption, averaged over severities."""
    figure, axes = _figure(6.0, 0.3 * len(accuracy) + 1.0)
    names = list(accuracy)[::-1]
    axes.barh(names, [100 * accuracy[name] for name in names], color=BLUE)
    axes.set(xlabel="accuracy (%)", xlim=(0, 100))
    return _png(figure)


def attack_examples(clean: Tensor, attacked: Tensor, titles: Sequence[tuple[str, str]], magnify: float) -> bytes:
    """Rows of clean image, magnified perturbation, adversarial image.

    Args:
        clean, attacked: (B, C, H, W) in [0, 1].
        titles: (what the model saw before, what after) of each.
        magnify: factor of the perturbation, drawn around mid-grey.
    """
    figure, axes = _figure(5.2, 1.9 * len(clean), nrows=len(clean), ncols=3, squeeze=False)
    perturbation = ((attacked - clean) * magnify + 0.5).clamp(0, 1)
    columns = (clean, perturbation, attacked)
    for row, (before, after) in enumerate(titles):
        for column, (images, title) in enumerate(zip(columns, (before, f"δ × {magnify:.0f}", after), strict=True)):
            pixels = images[row].permute(1, 2, 0).numpy()
            axes[row, column].imshow(pixels.squeeze(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            axes[row, column].set_title(title, fontsize=10)
            axes[row, column].set_axis_off()
    return _png(figure)
