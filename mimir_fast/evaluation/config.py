"""What an evaluation is asked to do."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from mimir_fast.data.config import DataConfig

SuiteName = Literal["quick", "paper", "full"]


@dataclass(frozen=True)
class Suite:
    """How much a suite does.

    Attributes:
        limit: images judged when no limit is given; None for the whole test split.
        steps: of the PGD attacks.
        adaptive_steps: of PGD-MI and PGD-fea; 0 leaves them out.
        autoattack: run it.
        check_images: on how many images the masking checks and the ε curve are made.
        check_steps: of PGD, for "the loss rises with the steps".
        curve_steps: of PGD, along the ε curve.
        near, far: radii of the ε curve, as multiples of ε and, on to where no model can stand, in units of [0, 1].
        square_queries: of the black-box attack in the checks.
        surface_points: side of the loss surface's grid; 0 leaves it out.
        mi: draw the mutual-information bounds.
    """

    limit: int | None
    steps: tuple[int, ...]
    adaptive_steps: int
    autoattack: bool
    check_images: int
    check_steps: tuple[int, ...]
    curve_steps: int
    near: tuple[float, ...]
    far: tuple[float, ...]
    square_queries: int
    surface_points: int
    mi: bool


FAR = tuple(levels / 255 for levels in (8, 16, 32, 64, 128, 255))
NEAR = (0.25, 0.5, 1.0, 1.5, 2.0)

SUITES: dict[str, Suite] = {
    "quick": Suite(
        limit=256, steps=(20,), adaptive_steps=0, autoattack=False, check_images=64, check_steps=(1, 2, 5, 10, 20),
        curve_steps=10, near=(0.5, 1.0, 2.0), far=FAR[3:], square_queries=300, surface_points=0, mi=False,
    ),
    "paper": Suite(
        limit=None, steps=(20, 100), adaptive_steps=100, autoattack=True, check_images=200,
        check_steps=(1, 2, 5, 10, 20, 50), curve_steps=20, near=NEAR, far=FAR, square_queries=1000, surface_points=0,
        mi=False,
    ),
    "full": Suite(
        limit=None, steps=(20, 100), adaptive_steps=100, autoattack=True, check_images=500,
        check_steps=(1, 2, 5, 10, 20, 50, 100), curve_steps=20, near=NEAR, far=FAR, square_queries=5000,
        surface_points=15, mi=True,
    ),
}  # fmt: skip


@dataclass
class EvaluateConfig:
    """Judge the robustness of any classifier and write one report."""

    checkpoint: str
    """Run folder, .safetensors or .pth file, timm:NAME, .pt2 or TorchScript file, or module:function."""
    suite: SuiteName = "quick"
    """quick: minutes on a laptop; paper: the papers' attacks and AutoAttack; full: all there is."""
    data: DataConfig = field(default_factory=DataConfig)
    eps: float = 8 / 255
    """Radius of the L∞ ball in units of images in [0, 1]: 8/255, not 8."""
    limit: int | None = None
    """Judge that many test images, evenly spaced; left out: what the suite says."""
    index_file: str | None = None
    """File of positions or file names to judge, one a line; `robustbench` for its 5000 ImageNet images."""
    batch_size: int = 128
    """Images a forward pass."""
    output_dir: str | None = None
    """Where results.json and report.html go; left out: evaluation/SUITE in the run folder, or runs/evaluation/NAME."""
    overwrite: bool = False
    """Start anew where output_dir holds another evaluation."""
    seed: int = 0
    """Of random starts, AutoAttack, generated corruptions and directions."""
    device: str = "auto"
    """auto, cpu or cuda."""
    outputs: Literal["logits", "probabilities"] = "logits"
    """What the model returns; probabilities are judged by their logarithm."""
    autoattack: Literal["suite", "yes", "no"] = "suite"
    """Run AutoAttack as the suite says, or not."""
    autoattack_version: Literal["standard", "plus", "rand"] = "standard"
    """`rand` for models that are not deterministic."""
    mi_weight: float = 1e-5
    """λ of PGD-MI."""
    corruptions: str | None = None
    """Folder of CIFAR-10-C or ImageNet-C, or `generated` to make them with corrupt-tta."""
    pretrained: str | None = None
    """Pre-training run or file of the masked autoencoder behind the classifier: its reconstruction is attacked too."""

    def __post_init__(self) -> None:
        if not 0 < self.eps <= 1:
            raise ValueError(
                f"--eps {self.eps:g}: images live in [0, 1] and ε with them, wanted 0 < eps <= 1. "
                f"If you meant {self.eps:g} grey levels, type --eps {self.eps:g}/255"
            )
        if self.batch_size < 1:
            raise ValueError(f"--batch_size {self.batch_size}, wanted at least 1")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"--limit {self.limit} leaves no image to judge; give at least 1, or leave it out")

    @property
    def folder(self) -> Path:
        """Where the results go."""
        if self.output_dir is not None:
            return Path(self.output_dir)
        if Path(self.checkpoint).is_dir():
            return Path(self.checkpoint) / "evaluation" / self.suite
        safe = "".join(c if c.isalnum() or c in "-_." else "_" for c in self.checkpoint)
        return Path("runs/evaluation") / f"{safe}-{self.suite}"

    @property
    def eps_text(self) -> str:
        """ε as people write it."""
        levels = self.eps * 255
        return f"{levels:g}/255" if abs(levels - round(levels)) < 1e-6 else f"{self.eps:.4g}"

    @property
    def wants_autoattack(self) -> bool:
        """Whether AutoAttack runs."""
        return SUITES[self.suite].autoattack if self.autoattack == "suite" else self.autoattack == "yes"
