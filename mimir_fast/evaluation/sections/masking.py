"""Gradient-masking checks: those of masking_checks.py on a few images, and AutoAttack's own."""

from dataclasses import asdict
from html import escape
from typing import Any

from torch import Tensor, nn

from mimir_fast.evaluation import masking_checks as checks
from mimir_fast.evaluation.attacks import make_apgd, make_fgsm, make_pgd, make_random_noise, make_square
from mimir_fast.evaluation.charts import Line, line_chart
from mimir_fast.evaluation.config import radius_text
from mimir_fast.evaluation.html import figure, figures
from mimir_fast.evaluation.measure import Helpers, Measurement, Records, Row
from mimir_fast.evaluation.plan import Setup
from mimir_fast.evaluation.sections import autoattack
from mimir_fast.evaluation.sections.curve import along

NAME, TITLE = "masking", "Gradient-masking checks"


def _zero_gradient(model: nn.Module, images: Tensor, labels: Tensor, samples: Tensor, helpers: Helpers) -> Row:
    return {"zero_gradient": checks.zero_gradients(model, images, labels)}


def measurements(setup: Setup) -> list[Measurement]:
    """One step, many steps, APGD, a black box, noise, and the gradients themselves, on the same images."""
    config, suite, few = setup.config, setup.config.settings, setup.few
    if not suite.check_images:
        return []
    return [
        make_fgsm(config).on(few, "check_fgsm"),
        make_random_noise(config).on(few, "check_random"),
        Measurement("check_gradients", _zero_gradient, {}, few, cost=2),
        *(make_pgd(config, k, restarts=1).on(few, f"steps_{k}") for k in suite.check_steps),
        make_apgd(config, 50).on(few, "check_apgd50"),
        make_square(config, suite.square_queries).on(few, "check_square"),
    ]


def summarize(setup: Setup, records: Records) -> dict[str, Any] | None:
    """All verdicts."""
    config, suite = setup.config, setup.config.settings
    items = {item.name: item for item in measurements(setup)}
    if not items:
        return None

    def of(name: str, value: str = "correct") -> Tensor:
        return records.tensor(items[name], value)

    strongest = f"steps_{suite.check_steps[-1]}"
    losses = {k: of(f"steps_{k}", "loss") for k in suite.check_steps}
    radii = [radius for radius in setup.curve_radii() if radius >= config.eps]
    verdicts = [
        checks.loss_rises_with_steps(losses),
        checks.iterative_beats_one_step(of("check_fgsm"), of(strongest)),
        checks.black_box_never_beats_white_box(of(strongest) * of("check_apgd50"), of("check_square")),
        checks.unbounded_attack_succeeds(
            {radius: records.tensor(along(setup, radius), "correct") for radius in radii},
            {radius: radius_text(radius, config.norm) for radius in radii},
        ),
        checks.gradient_beats_noise(of("check_fgsm", "loss"), of("check_random", "loss")),
        checks.gradients_exist(of("check_gradients", "zero_gradient")),
    ]
    found = autoattack.summarize(setup, records)
    if found is not None:
        warnings = found["warnings"]
        words = " ".join(warnings) if warnings else "AutoAttack's package gives no warning."
        verdicts.append(checks.Verdict("AutoAttack's own checks", not warnings, words))
    return {
        "checks": [asdict(verdict) for verdict in verdicts],
        "count": len(of("check_fgsm")),
        "mean_loss": {str(k): float(loss.mean()) for k, loss in losses.items()},
    }


def render(numbers: dict[str, Any]) -> str:
    """One row a check, and the loss over the steps."""
    rows = "".join(
        f'<tr><th scope="row" class="{"is-good" if c["passed"] else "is-bad"}">'
        f"{'passed' if c['passed'] else 'FAILED'}</th>"
        f"<td><b>{escape(c['name'])}</b><br>{escape(c['sentence'])}</td></tr>"
        for c in numbers["checks"]
    )
    table = (
        f'<div class="frame" tabindex="0" role="region" aria-label="Gradient-masking checks"><table><caption>On '
        f"{numbers['count']} images; paired tests at 5 %.</caption><thead><tr>"
        f'<th scope="col">result</th><th scope="col">check</th></tr></thead><tbody>{rows}</tbody></table></div>'
    )
    points = [(float(k), v) for k, v in numbers["mean_loss"].items()]
    first, last = points[0], points[-1]
    words = f"Mean loss under PGD-{first[0]:g}: {first[1]:.3g}; under PGD-{last[0]:g}: {last[1]:.3g}."
    chart = line_chart(
        [Line("mean loss", points)], words, x_label="steps of PGD", y_label="mean loss",
        x_ticks=[(k, f"{k:g}") for k, _ in points], x_from=0.0,
    )  # fmt: skip
    return table + figures(figure(chart, words))
