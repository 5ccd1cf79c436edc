"""What is known before anything is measured: the sections of a report plan their measurements from this."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from mimir_fast.evaluation.config import EvaluateConfig, radius_text
from mimir_fast.evaluation.measure import Measurement, Records


@dataclass(frozen=True)
class Setup:
    """The question and what the model and the images are like.

    Attributes:
        num_images: judged ones.
        classes: their names, one a class.
        has_features: the model shows its features (`forward_features`).
        has_weights: the model's weights can be moved (no exported program, no plain function).
    """

    config: EvaluateConfig
    num_images: int
    classes: tuple[str, ...]
    has_features: bool = False
    has_weights: bool = True

    @property
    def num_classes(self) -> int:
        """How many classes there are."""
        return len(self.classes)

    @property
    def few(self) -> str:
        """The set of images of the checks."""
        return f"few:{min(self.config.settings.check_images, self.num_images)}"

    def keep(self, name: str) -> Path | None:
        """Where attacked images of a measurement go, if they are wanted."""
        return self.config.folder / "adversarial" / name if self.config.save_adversarial else None

    def curve_radii(self) -> list[float]:
        """Radii of the ε–accuracy curve, ascending: around the asked one, and on to where no model can stand."""
        config, suite = self.config, self.config.settings
        if suite.check_images == 0:
            return []
        whole = self.largest_radius()
        radii = [config.eps, *(factor * config.eps for factor in suite.near), *(part * whole for part in suite.far)]
        # Told apart by what people read: 12/255 and 1.5 · 8/255 may differ in the last bit.
        distinct = {radius_text(radius, config.norm): radius for radius in radii if radius <= whole * (1 + 1e-9)}
        return sorted(distinct.values())

    def largest_radius(self) -> float:
        """From one corner of [0, 1]^D to the other: nothing is out of reach."""
        data, norm = self.config.data, self.config.norm
        size = data.channels * data.image_size**2
        return {"linf": 1.0, "l2": size**0.5, "l1": float(size)}[norm]


class Section(Protocol):
    """A part of the report; one file each.

    `measurements` says what must be known of which images; `summarize` turns the finished records into numbers that
    JSON can hold (None where the part does not apply); `render` turns these numbers, and nothing else, into HTML.
    """

    NAME: str
    TITLE: str

    def measurements(self, setup: Setup) -> list[Measurement]:
        """The passes through the model this part needs."""

    def summarize(self, setup: Setup, records: Records) -> dict[str, Any] | None:
        """Numbers from finished records."""

    def render(self, numbers: dict[str, Any]) -> str:
        """HTML of the numbers."""
