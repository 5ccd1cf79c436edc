"""Loss surfaces around the weights and around the images (evaluation/loss_surface.py)."""

from typing import Any

from torch import Tensor, nn

from mimir_fast.attacks.lp import attack_classifier
from mimir_fast.evaluation.attacks import make_threat
from mimir_fast.evaluation.charts import heat_map
from mimir_fast.evaluation.config import radius_text
from mimir_fast.evaluation.html import figure, figures, paragraph
from mimir_fast.evaluation.loss_surface import grid_steps, input_surface, weight_surface
from mimir_fast.evaluation.measure import Helpers, Measurement, Records, Row
from mimir_fast.evaluation.plan import Setup

NAME, TITLE = "surface", "Loss surfaces"
IMAGES, STEPS = 128, 10


def measurements(setup: Setup) -> list[Measurement]:
    """Around the weights on clean and on attacked images, and around the images; a grid of losses an image."""
    config, points = setup.config, setup.config.settings.surface_points
    if not points:
        return []
    few, cost = f"few:{min(IMAGES, setup.num_images)}", float(points**2)
    threat = make_threat(config.norm, config.eps, STEPS, None)

    def around_weights(attacked: bool) -> Any:
        def outcome(model: nn.Module, images: Tensor, labels: Tensor, samples: Tensor, helpers: Helpers) -> Row:
            x = images
            if attacked:
                x = attack_classifier(model, images, labels, threat, samples=samples, seed=config.seed)
            return {"loss": weight_surface(
                model, x, labels, num_points=points, seed=config.seed, biases=config.surface_biases
            )}  # fmt: skip

        return outcome

    def around_images(model: nn.Module, images: Tensor, labels: Tensor, samples: Tensor, helpers: Helpers) -> Row:
        return {"loss": input_surface(
            model, images, labels, samples, radius=_input_radius(setup), num_points=points, seed=config.seed
        )}  # fmt: skip

    settings: dict[str, Any] = {"points": points, "seed": config.seed}
    found = [Measurement("surface_inputs", around_images, settings | {"radius": _input_radius(setup)}, few, cost=cost)]
    if setup.has_weights:
        settings |= {"radius": 1.0, "biases": config.surface_biases}
        found += [
            Measurement("surface_clean", around_weights(False), settings, few, cost=cost),
            Measurement("surface_attacked", around_weights(True), settings | {"eps": config.eps}, few, cost=cost),
        ]
    return found


def _input_radius(setup: Setup) -> float:
    return min(1.0, 2 * setup.config.eps) if setup.config.norm == "linf" else 16 / 255


def summarize(setup: Setup, records: Records) -> dict[str, Any] | None:
    """Mean losses on each grid."""
    found = {}
    for item in measurements(setup):
        loss = records.tensor(item, "loss")
        steps = grid_steps(item.parameters["radius"], setup.config.settings.surface_points)
        found[item.name] = {
            "steps": steps.tolist(), "loss": loss.mean(dim=0).tolist(), "count": len(loss),
            "parameters": item.parameters,
        }  # fmt: skip
    return found or None


def render(numbers: dict[str, Any]) -> str:
    """A heat map each."""
    shown = []
    for name, found in numbers.items():
        grid, steps, count = found["loss"], found["steps"], found["count"]
        middle = grid[len(steps) // 2][len(steps) // 2]
        if name == "surface_inputs":
            steps = [255 * s for s in steps]
            words = (
                f"Mean loss around {count} images: along the signs of the gradient and along random signs, in grey "
                f"levels (up to {radius_text(found['parameters']['radius'], 'linf')}). {middle:.3g} in the middle, "
                f"{grid[-1][len(steps) // 2]:.3g} at the right edge, {grid[len(steps) // 2][-1]:.3g} at the upper one."
            )
            labels = ("gradient signs (grey levels)", "random signs (grey levels)")
        else:
            kind = "attacked" if name == "surface_attacked" else "clean"
            words = (
                f"Mean loss of {count} {kind} images around the weights, along two random filter-normalised "
                f"directions; {middle:.3g} at the weights, {max(max(row) for row in grid):.3g} at most."
            )
            labels = ("a", "b")
        chart = heat_map(grid, steps, words, x_label=labels[0], y_label=labels[1], value_label="loss")
        shown.append(figure(chart, words))
    words = (
        "Without gradient masking, the loss around the images rises along the gradient and hardly across it. The "
        "surface around the weights (Li et al.) is what papers show; it says little about gradient masking."
    )
    return paragraph(words) + figures(*shown)
