"""Options of the commands that take weights from anywhere and write them for others: `export` and `hub`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mimir_fast.models.facts import Asked
from mimir_fast.models.normalization import Statistics, check_statistics, pair
from mimir_fast.models.weight_files import Weights, WeightsChoice, read_weights
from mimir_fast.sizes import Size, as_size


@dataclass(kw_only=True)
class SourceOptions:
    """Which weights of a source, and what the user says of them."""

    weights: WeightsChoice = "auto"
    """The trained weights (model), their moving average (ema), or the average where there is one (auto)."""
    part: str = ""
    """Of a file with several encoders, the name of the one to take, such as teacher."""
    options: tuple[str, ...] = ()
    """What the file does not say and no tensor shows, as in training (--model.options): heads=12 eps=1e-5 gelu=tanh of
    ViT, tokens_norm=false of XCiT. The report of what was loaded lists what is assumed."""
    global_pool: Literal["auto", "avg", "cls"] = "auto"
    """What the head looks at: the mean of the patch tokens or the cls token; auto: as the file says, else as its norms
    show."""
    image_size: Size | None = None
    """Of the images it was trained on, in pixels, or height and width; left out: as the file says or its tensors
    show."""
    mean: tuple[float, ...] | None = None
    """The mean that the model takes out of images in [0, 1], one number a channel; left out: as the weights say."""
    std: tuple[float, ...] | None = None
    """The deviation."""

    def __post_init__(self) -> None:
        check_statistics(self.mean, self.std, None)
        self.options = tuple(self.options)
        self.image_size = None if self.image_size is None else as_size(self.image_size)

    @property
    def statistics(self) -> Statistics | None:
        """(mean, std) as the user says them."""
        return pair(self.mean, self.std)

    def read(self, source: str | Path) -> Weights:
        """The weights, with what the user says of them.

        Raises:
            WeightsError: the source cannot be read.
        """
        return read_weights(source, self.weights, self.part, Asked(self.options, self.global_pool, self.image_size))
