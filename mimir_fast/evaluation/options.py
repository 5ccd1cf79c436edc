"""Options of every evaluation: which model, which images, which ball. A topic of the report adds its own (topic.py)."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from mimir_fast.data.config import DataConfig
from mimir_fast.extensions import Imports
from mimir_fast.models.normalization import check_statistics
from mimir_fast.validation import check_fields, check_number

SuiteName = Literal["quick", "paper", "full", "table", "corruptions", "strongest"]
Norm = Literal["linf", "l2", "l1"]
NORM_WORDS = {"linf": "L∞", "l2": "L2", "l1": "L1"}
NORM_NAMES = {"linf": "Linf", "l2": "L2", "l1": "L1"}
"""As AutoAttack's package and RobustBench write them."""
USUAL_EPS = {"linf": "8/255", "l2": "0.5", "l1": "12"}
"""Radii of RobustBench's CIFAR-10 (L∞, L2) and of Croce & Hein, arXiv 2103.01208 (L1)."""

SUITE_LIMITS: dict[str, int | None] = {
    "quick": 256, "paper": None, "full": None, "table": None, "corruptions": None, "strongest": None
}  # fmt: skip
"""Images evaluated when no limit is given; None for the whole test split. What else a suite does is in the topics."""


@dataclass
class CommonOptions:
    """What every evaluation is asked; `config.EvaluateConfig` adds the options of the topics."""

    checkpoint: str
    """Run folder, .safetensors or .pth file, timm:NAME, hf-hub:ORG/NAME, robustbench:DATA/NORM/NAME, .pt2 or
    TorchScript file, or module:function. The .pt2 file and module:function run code: only from those you trust."""
    suite: SuiteName = "quick"
    """quick: minutes on a laptop; paper: the papers' attacks and AutoAttack; full: these and all sections; table:
    natural, FGSM, PGD-20 and AutoAttack only; corruptions: --corruptions, and no attack; strongest: the strongest
    attacks, on every image until it is broken."""
    data: DataConfig = field(default_factory=DataConfig)
    weights: Literal["auto", "last", "best", "ema"] = "auto"
    """Of a run folder: its last checkpoint, the best one by its probe, the last one's moving average; auto takes the
    best where it was kept, else the last, and of either the moving average where there is one. Of a file with both:
    ema."""
    part: str = ""
    """Of a file with several encoders, the name of the one to evaluate, such as teacher."""
    options: tuple[str, ...] = ()
    """What a file of weights does not say and no tensor shows, as in training (--model.options): heads=12 eps=1e-5
    gelu=tanh of ViT, tokens_norm=false of XCiT. The report of what was loaded lists what is assumed."""
    global_pool: Literal["auto", "avg", "cls"] = "auto"
    """What the head in a file of weights looks at: the mean of the patch tokens or the cls token; auto: as the file
    says, else as its norms show."""
    norm: Norm = "linf"
    """Shape of the ball: linf, l2 or l1."""
    eps: float = 8 / 255
    """Radius of the ball in units of images in [0, 1]: 8/255, not 8. L2 and L1 balls have radii such as 0.5 and 12."""
    alpha: float | None = None
    """Step size of PGD; left out: ε/4 (2/255 at 8/255, as the papers have it; 1/255 at 2/255 in the suites
    paper and full). L1: of the first step, ε; the others adapt, as in APGD-L1."""
    restarts: int = 1
    """Random starts of each PGD; an image counts as correct if none of them breaks it."""
    eot: int | None = None
    """Draws of a random model that each step of FGSM and PGD averages its gradient over (expectation over
    transformations); left out: 10 where the model is found to be random, else 1."""
    limit: int | None = None
    """Evaluate that many test images, evenly spaced, or, where that would distort the shares of the classes, evenly
    spaced within each class; nothing is random. Left out: what the suite says."""
    index_file: str | None = None
    """Positions or paths, such as CLASS/FILE, of the images to evaluate, a file with one a line; `robustbench` for its
    5000 ImageNet images."""
    batch_size: int = 128
    """Images a forward pass."""
    output_dir: str | None = None
    """Where results.json and report.html go; left out: evaluation/SUITE-NORM-EPS in the run folder, or in
    runs/evaluation/NAME."""
    overwrite: bool = False
    """Start anew where output_dir holds another evaluation."""
    seed: int = 0
    """Of random starts, AutoAttack, generated corruptions and directions."""
    device: str = "auto"
    """auto, cpu or cuda."""
    outputs: Literal["logits", "probabilities"] = "logits"
    """What the model returns; of probabilities the logarithm is taken."""
    mean: tuple[float, ...] | None = None
    """Normalise images by this mean, one number a channel, before the model; left out: what the model brings."""
    std: tuple[float, ...] | None = None
    """Normalise images by this deviation."""
    interpolation: Literal["auto", "bicubic", "bilinear", "nearest"] = "auto"
    """Of the resize of image files; auto: what the model brings, else bicubic."""
    crop: float | None = None
    """Side of the centre crop as a part of the resized short side, 0.875 for 224 of 256; left out: what the model
    brings, else 0.875. 1 for files that were cut to the model's size already."""
    save_adversarial: bool = False
    """Keep the attacked images: adversarial/ATTACK/*.safetensors in output_dir."""
    imports: Imports = ()
    """Module that registers families, data sources or report topics of your own, looked for in the working folder and
    PYTHONPATH. Modules that the evaluated run was trained with are imported unasked."""

    def idle(self) -> dict[str, str]:
        """Options that do nothing as the others are."""
        return self.data.idle_without_training("an evaluation takes the test images as they are")

    def __post_init__(self) -> None:
        check_fields(self)
        self.imports = tuple(dict.fromkeys(self.imports))
        self.options = tuple(self.options)
        check_number("seed", self.seed, at_least=0, below=2**63)
        if self.norm == "linf" and not 0 < self.eps <= 1:
            raise ValueError(
                f"--eps {self.eps:g}: images live in [0, 1] and ε with them, wanted 0 < eps <= 1. "
                f"If you meant {self.eps:g} grey levels, type --eps {self.eps:g}/255"
            )
        if self.norm != "linf" and (self.eps <= 0 or abs(self.eps - 8 / 255) < 1e-9):
            raise ValueError(
                f"--norm {self.norm} needs a radius of its own: give --eps, such as {USUAL_EPS[self.norm]} on CIFAR-10"
            )
        if self.alpha is not None:
            check_number("alpha", self.alpha, above=0, at_most=2 * self.eps, hint="a step size: at most 2ε")
        check_number("batch_size", self.batch_size, at_least=1)
        check_number("restarts", self.restarts, at_least=1)
        if self.eot is not None:
            check_number("eot", self.eot, at_least=1)
        if self.limit is not None:
            check_number("limit", self.limit, at_least=1, hint="else there is no image to evaluate")
        if self.crop is not None:
            check_number("crop", self.crop, above=0, at_most=1, hint="a part of the short side, such as 0.875")
        check_statistics(self.mean, self.std, self.data.channels)

    @property
    def folder(self) -> Path:
        """Folder of the results: `output_dir`, or one named by suite, norm and ε."""
        if self.output_dir is not None:
            return Path(self.output_dir)
        name = f"{self.suite}-{self.norm}-{self.eps_text.replace('/', '_')}"
        name += "" if self.weights == "auto" else f"-{self.weights}"
        if Path(self.checkpoint).is_dir():
            return Path(self.checkpoint) / "evaluation" / name
        safe = "".join(c if c.isalnum() or c in "-_." else "_" for c in self.checkpoint)
        return Path("runs/evaluation") / safe / name

    @property
    def eps_text(self) -> str:
        """ε as papers write it, such as 8/255."""
        return radius_text(self.eps, self.norm)


def radius_text(radius: float, norm: Norm) -> str:
    """A radius as papers write it: 8/255 for L∞, 0.5 for the others."""
    levels = radius * 255
    for grain in (1,) if levels > 16 else (4, 10):  # 0.5/255 and 0.3/255 are radii in use, 76.5/255 is 0.3
        if norm == "linf" and abs(grain * levels - round(grain * levels)) < 1e-6:
            return f"{round(grain * levels) / grain:g}/255"
    return f"{radius:.4g}"
