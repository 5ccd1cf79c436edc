"""Ask a classifier for single images, clean and under attack.

python -m mimir_fast.predict runs/digits/pgd_vit_nano image.png
python -m mimir_fast.predict runs/digits/pgd_vit_nano a.png b.png --attack --eps 16/255 --output attacked.png
python -m mimir_fast.predict --help
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from mimir_fast._tyro import tyro
from mimir_fast.attacks.threat_model import check_radius
from mimir_fast.cli import parse, run
from mimir_fast.extensions import Imports, load_extensions
from mimir_fast.predicting import Attacked, Prediction, load
from mimir_fast.validation import check_number, without

MAGNIFIED = 0.4  # of the grey levels to either side, by the largest difference


@dataclass
class PredictConfig:
    """The class of each image, and by how much; with --attack also of what PGD makes of it."""

    checkpoint: Annotated[str, tyro.conf.Positional]
    """What evaluate's --checkpoint takes."""
    images: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Files of images, of any size."""
    attack: bool = False
    """Attack each image, say both predictions, and write a picture of them."""
    eps: float = 8 / 255
    """Radius of the L∞ ball, images in [0, 1]."""
    num_steps: int = 20
    """Steps of PGD, each of ε/4."""
    seed: int = 0
    """Of its random start."""
    output: str = "prediction.png"
    """The picture: image, attacked image, and their difference, magnified."""
    weights: Literal["auto", "last", "best", "ema"] = "auto"
    """Of a run's folder, as in an evaluation."""
    device: str = "cpu"
    """cpu or cuda."""
    imports: Imports = ()
    """Module that registers families of your own; those of a run are imported unasked."""

    def __post_init__(self) -> None:
        if not self.images:
            raise ValueError("name a model and an image: python -m mimir_fast.predict RUN image.png")
        check_radius("eps", self.eps)
        check_number("num_steps", self.num_steps, at_least=1)

    def idle(self) -> dict[str, str]:
        """Options that do nothing as the others are."""
        return without(self.attack, "--attack is not given", "eps", "num_steps", "seed", "output")


def predict(config: PredictConfig) -> list[Prediction | Attacked]:
    """Print what the model says of each image, and draw what the attack did; the same, image by image."""
    model = load(config.checkpoint, weights=config.weights, device=config.device)
    found: list[Prediction | Attacked] = []
    for image in config.images:
        if not config.attack:
            found.append(said := model.predict(image))
            print(f"{image}: {words(said)}")
            continue
        both = model.attack(image, eps=config.eps, num_steps=config.num_steps, seed=config.seed)
        found.append(both)
        print(f"{image}: {words(both.before)}\n{' ' * len(image)}  under PGD-{config.num_steps}, L∞, "
              f"ε = {255 * config.eps:.4g}/255: {words(both.after)}")  # fmt: skip
    attacked = [pair for pair in found if isinstance(pair, Attacked)]
    if attacked:
        draw(Path(config.output), attacked)
        print(f"picture: {config.output}")
    return found


def words(said: Prediction) -> str:
    """A prediction in a line."""
    return f"{said.name} ({100 * said.probability:.1f} %), by a margin of {said.margin:.2f} over {said.runner_up}"


def draw(path: Path, pairs: Sequence[Attacked]) -> None:
    """One column an image: the image and what is said of it, the same attacked, and the magnified difference."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2.2 * len(pairs) + 0.4, 7.2), dpi=130, layout="constrained")
    for axes, pair in zip(figure.subplots(3, len(pairs), squeeze=False).T, pairs, strict=True):
        difference = pair.adversarial - pair.clean
        largest = float(difference.abs().max())
        times = MAGNIFIED / largest if largest else 1.0
        shown = (
            (pair.clean, f"image\n{pair.before.name} ({100 * pair.before.probability:.0f} %)"),
            (pair.adversarial, f"adversarial image\n{pair.after.name} ({100 * pair.after.probability:.0f} %)"),
            (0.5 + times * difference, f"difference, {times:.0f} ×"),
        )
        for axis, (image, title) in zip(axes, shown, strict=True):
            axis.imshow(image.permute(1, 2, 0).expand(-1, -1, 3).numpy(), interpolation="nearest")
            axis.set_title(title, fontsize=9)
            axis.set_axis_off()
    figure.savefig(path)


def main() -> None:
    """The command: predict what the line names."""
    load_extensions(sys.argv[1:])
    predict(parse(PredictConfig, prog="python -m mimir_fast.predict"))


if __name__ == "__main__":
    run(main)
