"""Loss surfaces around the weights, and around the images.

    L(θ + a·θ₁ + b·θ₂)   two random filter-normalised directions: each filter (row) of a direction has the norm of the
                         same filter of θ, so the picture does not depend on how the weights happen to be scaled. What
                         has one dimension (biases, gains of norms) stays still or moves along itself; see `biases`.
                         Li et al., arXiv 1712.09913, §4, and their code's `--xignore biasbn`.
    L(x + a·g + b·r)     g the signs of the gradient at x, r random signs: a plane every attack in the ball starts in. A
                         surface that is flat along g and rough along r has a gradient that leads nowhere, which the
                         weights' surface cannot show.

The model is never changed: each point is a functional call with other weights. Losses are per image, (B, G, G).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from mimir_fast.attacks.lp import attack_classifier
from mimir_fast.attacks.pgd import cross_entropy
from mimir_fast.evaluation.attacks import make_threat
from mimir_fast.evaluation.charts import heat_map
from mimir_fast.evaluation.html import figure, figures, paragraph
from mimir_fast.evaluation.measure import Measurement, Outcome, Records, Row
from mimir_fast.evaluation.options import CommonOptions, radius_text
from mimir_fast.evaluation.topic import Numbers, Setup, Topic, options_of, register
from mimir_fast.layers.borrowing import borrowed
from mimir_fast.ops.random_uniform import random_uniform
from mimir_fast.philox import Stream, normal
from mimir_fast.validation import counted, without

POINTS = {"full": 15}
"""Side of the grids, by suite."""
IMAGES, STEPS = 128, 10
# Dark blue to yellow; even steps in lightness, so it reads in grey as well.
Weights = dict[str, Tensor]
Biases = Literal["still", "copied"]


@dataclass
class SurfaceOptions:
    """Which weights are moved."""

    surface_biases: Biases = "still"
    """Loss surface: biases and norm weights stay (Li et al.'s `biasbn`, their published figures), or move along
    themselves (their code's default)."""

    def idle(self) -> dict[str, str]:
        """Options that do nothing as the others are."""
        suite = cast(CommonOptions, self).suite  # joined with them in EvaluateConfig
        return without(suite in POINTS, f"suite {suite} draws no loss surface", "surface_biases")


def filter_normalized_direction(model: nn.Module, seed: int, which: int, biases: Biases = "still") -> Weights:
    """A random direction in weight space, fp32, on the parameters' device.

    Args:
        which: number of the direction.
        biases: parameters of one dimension stay still (Li et al.'s `biasbn`, as in their figures), or the direction is
            the parameter itself (their code without that option).
    """
    direction: Weights = {}
    for index, (name, weight) in enumerate(model.named_parameters()):
        if weight.ndim < 2:
            if biases == "copied":
                direction[name] = weight.detach().float()
            continue
        rows = weight.detach().flatten(1).float()
        filters = torch.arange(len(rows), device=weight.device)
        noise = normal(seed, Stream.EVALUATION, 65536 * which + index, filters, rows.shape[1])
        scale = rows.norm(dim=1, keepdim=True) / (noise.norm(dim=1, keepdim=True) + 1e-10)
        direction[name] = (noise * scale).view_as(weight)
    return direction


def grid_steps(radius: float, num_points: int) -> Tensor:
    """(G,) values of a and of b, the middle one zero.

    Raises:
        ValueError: an even or too small grid.
    """
    if num_points < 3 or num_points % 2 == 0:
        raise ValueError(f"num_points={num_points}, wanted at least 3 and odd (such as 11)")
    return torch.linspace(-radius, radius, num_points)


def weight_surface(
    model: nn.Module, images: Tensor, labels: Tensor, *, radius: float = 1.0, num_points: int = 11, seed: int = 0,
    biases: Biases = "still",
) -> Tensor:  # fmt: skip
    """(B, G, G) cross entropy around the model's weights, [:, i, j] at a = steps[i], b = steps[j].

    Args:
        images: (B, C, H, W) float in [0, 1]: clean or adversarial ones, fixed for all points.
        radius: largest |a| and |b|; at 1 a direction is as long as the weights.
        num_points: G, odd so that the weights themselves are on the grid.
    Raises:
        ValueError: an even or too small grid, or a model without weight matrices.
    """
    steps = grid_steps(radius, num_points)
    with borrowed(model, "eval") as module, torch.no_grad():
        first, second = (filter_normalized_direction(module, seed, which, biases) for which in (0, 1))
        weights = {name: p for name, p in module.named_parameters() if name in first}
        if not any(w.ndim > 1 for w in weights.values()):
            raise ValueError(f"{type(module).__name__} has no weight matrices to move: no loss surface of it")

        def loss_at(a: float, b: float) -> Tensor:
            moved = {name: w + (a * first[name] + b * second[name]).to(w.dtype) for name, w in weights.items()}
            return cross_entropy(functional_call(module, moved, (images,)), labels)

        return _on_grid(steps, loss_at)


def input_surface(
    model: nn.Module, images: Tensor, labels: Tensor, samples: Tensor, *, radius: float, num_points: int = 11,
    seed: int = 0,
) -> Tensor:  # fmt: skip
    """(B, G, G) cross entropy around each image, [:, i, j] at a = steps[i] along the gradient's signs, b = steps[j].

    Args:
        radius: largest |a| and |b| in units of images in [0, 1]; images are cut to [0, 1].
        samples: (B,) int64, the coordinates of the random signs.
    """
    steps = grid_steps(radius, num_points)
    with borrowed(model, "eval") as module:
        x = images.detach().clone().requires_grad_()
        with torch.enable_grad():
            (grad,) = torch.autograd.grad(cross_entropy(module(x), labels).sum(), x)
        draws = random_uniform(seed, Stream.EVALUATION, 1 << 24, samples.to(images.device), images[0].numel())
        along, across = grad.sign(), (draws - 0.5).sign().view_as(images)

        def loss_at(a: float, b: float) -> Tensor:
            return cross_entropy(module((images + a * along + b * across).clamp(0, 1)), labels)

        with torch.no_grad():
            return _on_grid(steps, loss_at)


def _on_grid(steps: Tensor, loss_at: Callable[[float, float], Tensor]) -> Tensor:
    """(B, G, G) losses (B,) at every pair of steps."""
    return torch.stack([torch.stack([loss_at(a, b).cpu() for b in steps.tolist()], 1) for a in steps.tolist()], 1)


def measurements(setup: Setup) -> list[Measurement]:
    """Around the weights on clean and on attacked images, and around the images; a grid of losses an image."""
    config, points = setup.config, POINTS.get(setup.config.suite)
    if points is None:
        return []
    biases = options_of(config, SurfaceOptions).surface_biases
    few, cost = setup.subset(IMAGES), float(points**2)
    threat, radius = make_threat(config.norm, config.eps, STEPS, None), _input_radius(config)

    def around_weights(attacked: bool) -> Outcome:
        def outcome(model: nn.Module, images: Tensor, labels: Tensor, samples: Tensor) -> Row:
            x = images
            if attacked:
                x = attack_classifier(model, images, labels, threat, samples=samples, seed=config.seed)
            return {"loss": weight_surface(model, x, labels, num_points=points, seed=config.seed, biases=biases)}

        return outcome

    def around_images(model: nn.Module, images: Tensor, labels: Tensor, samples: Tensor) -> Row:
        surface = input_surface(model, images, labels, samples, radius=radius, num_points=points, seed=config.seed)
        return {"loss": surface}

    settings: dict[str, Any] = {"points": points, "seed": config.seed}
    found = [Measurement("surface_inputs", around_images, settings | {"radius": radius}, few, cost=cost)]
    if setup.has_weights:
        settings |= {"radius": 1.0, "biases": biases}
        found += [
            Measurement("surface_clean", around_weights(False), settings, few, cost=cost),
            Measurement("surface_attacked", around_weights(True), settings | {"eps": config.eps}, few, cost=cost),
        ]
    return found


def _input_radius(config: CommonOptions) -> float:
    return min(1.0, 2 * config.eps) if config.norm == "linf" else 16 / 255


def summarize(setup: Setup, items: Sequence[Measurement], records: Records) -> Numbers | None:
    """Mean losses on each grid."""
    found = {}
    for item in items:
        loss = records.tensor(item, "loss")
        steps = grid_steps(item.parameters["radius"], item.parameters["points"])
        found[item.name] = {
            "steps": steps.tolist(), "loss": loss.mean(dim=0).tolist(), "count": len(loss),
            "parameters": item.parameters,
        }  # fmt: skip
    return found or None


def render(numbers: Numbers) -> str:
    """A heat map of each surface, with what to look for."""
    shown = []
    for name, found in numbers.items():
        grid, steps, count = found["loss"], found["steps"], found["count"]
        middle = grid[len(steps) // 2][len(steps) // 2]
        if name == "surface_inputs":
            steps = [255 * s for s in steps]
            words = (
                f"Mean loss around {counted(count, 'image')}: along the signs of the gradient and along random signs, "
                f"in grey levels (up to {radius_text(found['parameters']['radius'], 'linf')}). {middle:.3g} in the "
                f"middle, {grid[-1][len(steps) // 2]:.3g} at the right edge, {grid[len(steps) // 2][-1]:.3g} at the "
                "upper one."
            )
            labels = ("gradient signs (grey levels)", "random signs (grey levels)")
        else:
            kind = "attacked" if name == "surface_attacked" else "clean"
            words = (
                f"Mean loss of {count} {kind} images around the weights, along two random filter-normalised "
                f"directions; {middle:.3g} at the weights, {max(max(row) for row in grid):.3g} at most."
            )
            labels = ("a", "b")
        names = [f"{step:.3g}" for step in steps]
        chart = heat_map(grid, names, names, words, x_label=labels[0], y_label=labels[1], value_label="loss")
        shown.append(figure(chart, words))
    words = (
        "Without gradient masking, the loss around the images rises along the gradient and hardly across it. The "
        "surface around the weights (Li et al.) is what papers show; it says little about gradient masking."
    )
    return paragraph(words) + figures(*shown)


register(Topic("surface", "Loss surfaces", measurements, summarize, render, 120, SurfaceOptions))
