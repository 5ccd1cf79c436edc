"""The measurements of a suite: which attack on which images, under which name.

Every measurement gives one number an image and is saved batch by batch (journal.py); a report reads them all.
"""

from dataclasses import dataclass
from typing import Literal

from mimir_fast.evaluation.config import SUITES, EvaluateConfig
from mimir_fast.evaluation.named_attacks import (
    NamedAttack,
    make_apgd,
    make_fgsm,
    make_pgd,
    make_pgd_features,
    make_pgd_mi,
    make_random_noise,
    make_square,
    natural,
)


@dataclass(frozen=True)
class Measurement:
    """One attack on one set of images.

    Attributes:
        name: of the measurement.
        attack: what is done.
        images: `all` of the judged ones, or the few for the `checks`.
        file: of its journals; suites check on different numbers of images and may share a folder.
    """

    name: str
    attack: NamedAttack
    images: Literal["all", "checks"]
    file: str


def curve_radii(config: EvaluateConfig) -> list[float]:
    """Radii of the ε–accuracy curve: around the asked one, and on to where no model can stand."""
    suite, eps = SUITES[config.suite], config.eps
    radii = sorted({*(factor * eps for factor in suite.near), *suite.far})
    # Told apart by what is written in file names: 12/255 and 1.5 · 8/255 may differ in the last bit.
    distinct = {radius_key(radius): radius for radius in [*radii, eps] if radius <= 1}
    return sorted(distinct.values())


def radius_key(radius: float) -> str:
    """A radius in file names: in grey levels."""
    return f"{radius * 255:.4g}"


def main_attacks(config: EvaluateConfig, has_features: bool) -> list[NamedAttack]:
    """The attacks of the report's first table."""
    suite, eps, seed = SUITES[config.suite], config.eps, config.seed
    attacks = [natural(), make_fgsm(eps), *(make_pgd(eps, k, seed) for k in suite.steps)]
    if suite.adaptive_steps and has_features:
        attacks.append(make_pgd_mi(eps, suite.adaptive_steps, seed, config.mi_weight))
        attacks.append(make_pgd_features(eps, suite.adaptive_steps, seed))
    return attacks


def plan(config: EvaluateConfig, has_features: bool) -> list[Measurement]:
    """All per-image measurements, cheap ones first."""
    suite, eps, seed = SUITES[config.suite], config.eps, config.seed
    on_few = [(f"check_{a.name}", a) for a in (natural(), make_fgsm(eps), make_random_noise(eps, seed))]
    on_few.append(("check_apgd50", make_apgd(eps, 50, seed)))
    on_few += [(f"steps_{k}", make_pgd(eps, k, seed)) for k in suite.check_steps]
    for radius in curve_radii(config):
        on_few.append((f"curve_{radius_key(radius)}", make_pgd(radius, suite.curve_steps, seed)))
        on_few.append((f"noise_{radius_key(radius)}", make_random_noise(radius, seed)))
    on_few.append(("check_square", make_square(eps, suite.square_queries, seed)))
    return [
        *(Measurement(a.name, a, "all", a.name) for a in main_attacks(config, has_features)),
        *(Measurement(name, a, "checks", f"{name}@{suite.check_images}") for name, a in on_few),
    ]
