"""What an evaluation is asked to do."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from mimir_fast.data.config import DataConfig
from mimir_fast.extensions import Imports
from mimir_fast.validation import check_finite, check_number

SuiteName = Literal["quick", "paper", "full", "table"]
Norm = Literal["linf", "l2", "l1"]
MiEstimator = Literal["nhsic", "hsic", "renyi"]
NORM_WORDS = {"linf": "L∞", "l2": "L2", "l1": "L1"}
USUAL_EPS = {"linf": "8/255", "l2": "0.5", "l1": "12"}
"""Radii of RobustBench's CIFAR-10 (L∞, L2) and of Croce & Hein, arXiv 2103.01208 (L1)."""


@dataclass(frozen=True)
class Suite:
    """How much a suite does.

    Attributes:
        limit: images evaluated when no limit is given; None for the whole test split.
        steps: of the PGD attacks.
        adaptive_steps: of PGD-MI and PGD-fea; 0 leaves them out.
        autoattack: run it.
        check_images: on how many images the masking checks and the ε curve are made; 0 leaves both out.
        check_steps: of PGD, for "the loss rises with the steps".
        curve_steps: of PGD, along the ε curve.
        near: radii of the ε curve as multiples of ε.
        far: radii on to where no model can stand, as parts of the largest radius there is.
        square_queries: of the black-box attack in the checks.
        surface_points: side of the loss surfaces' grids; 0 leaves them out.
        mi: estimate I(x+δ, z) and its bounds.
        unforeseen: attacks of other kinds than the one the model was trained against.
    """

    limit: int | None
    steps: tuple[int, ...]
    adaptive_steps: int = 0
    autoattack: bool = False
    check_images: int = 0
    check_steps: tuple[int, ...] = ()
    curve_steps: int = 0
    near: tuple[float, ...] = ()
    far: tuple[float, ...] = ()
    square_queries: int = 0
    surface_points: int = 0
    mi: bool = False
    unforeseen: bool = False


FAR = tuple(levels / 255 for levels in (8, 16, 32, 64, 128, 255))
NEAR = (0.25, 0.5, 1.0, 1.5, 2.0)

SUITES: dict[str, Suite] = {
    "quick": Suite(
        limit=256, steps=(20,), check_images=64, check_steps=(1, 2, 5, 10, 20), curve_steps=10, near=(0.5, 1.0, 2.0),
        far=FAR[3:], square_queries=300,
    ),
    "paper": Suite(
        limit=None, steps=(20, 100), adaptive_steps=100, autoattack=True, check_images=200,
        check_steps=(1, 2, 5, 10, 20, 50), curve_steps=20, near=NEAR, far=FAR, square_queries=1000,
    ),
    "full": Suite(
        limit=None, steps=(20, 100), adaptive_steps=100, autoattack=True, check_images=500,
        check_steps=(1, 2, 5, 10, 20, 50, 100), curve_steps=20, near=NEAR, far=FAR, square_queries=5000,
        surface_points=15, mi=True, unforeseen=True,
    ),
    # The numbers of a table and nothing beside them: an ablation evaluates dozens of models.
    "table": Suite(limit=None, steps=(20,), autoattack=True),
}  # fmt: skip


@dataclass
class EvaluateConfig:
    """Evaluate the robustness of any classifier and write one report."""

    checkpoint: str
    """Run folder, .safetensors or .pth file, timm:NAME, hf-hub:ORG/NAME, robustbench:DATA/NORM/NAME, .pt2 or
    TorchScript file, or module:function. The .pt2 file and module:function run code: only from those you trust."""
    suite: SuiteName = "quick"
    """quick: minutes on a laptop; paper: the papers' attacks and AutoAttack; full: all there is; table: natural, FGSM,
    PGD-20 and AutoAttack only."""
    data: DataConfig = field(default_factory=DataConfig)
    weights: Literal["auto", "last", "best", "ema"] = "auto"
    """Of a run folder: its last checkpoint, the best one by its probe, the last one's moving average; auto takes the
    best where it was kept, else the last, and of either the moving average where there is one."""
    norm: Norm = "linf"
    """Shape of the ball: linf, l2 or l1."""
    eps: float = 8 / 255
    """Radius of the ball in units of images in [0, 1]: 8/255, not 8. L2 and L1 balls have radii such as 0.5 and 12."""
    alpha: float | None = None
    """Step size of PGD; left out: ε/4 (2/255 at 8/255, as the papers have it)."""
    restarts: int = 1
    """Random starts of each PGD; an image counts as correct if none of them breaks it."""
    targets: int = 0
    """Aim PGD at that many of the likeliest wrong classes, one after the other; 0 leaves targeted attacks out."""
    limit: int | None = None
    """Evaluate that many test images, evenly spaced; left out: what the suite says."""
    index_file: str | None = None
    """Positions or file names of the images to evaluate, a file with one per line; `robustbench` for its 5000 ImageNet
    images."""
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
    brings, else 0.875."""
    autoattack: Literal["suite", "yes", "no"] = "suite"
    """Run AutoAttack as the suite says, or not."""
    autoattack_version: Literal["standard", "plus", "rand"] = "standard"
    """`rand` for models that are not deterministic."""
    autoattack_images: int | None = None
    """Run AutoAttack on that many of the images, evenly spaced; left out: on all."""
    autoattack_attacks: tuple[str, ...] = ()
    """Only these of its attacks, such as apgd-ce apgd-t; the result is then not called AutoAttack."""
    mi_estimator: MiEstimator = "nhsic"
    """Estimator of I(x+δ, z) in PGD-MI: nhsic as the authors' code has it (σ = 5), hsic or renyi."""
    mi_weight: float = 1e-5
    """λ of PGD-MI."""
    mi_balanced: bool = False
    """PGD-MI with λ chosen batch by batch so that both terms have gradients of one size; mi_weight is not used."""
    corruptions: str | None = None
    """Folder of CIFAR-10-C or ImageNet-C, or `generated` to make them with corrupt-tta."""
    unforeseen: Literal["suite", "yes", "no"] = "suite"
    """Attacks of other kinds: other norms, elastic deformation, rotation and shift, changes of JPEG coefficients."""
    shifts: tuple[str, ...] = ()
    """Folders of class folders to evaluate without attack, such as ImageNet-A, ImageNet-R or ImageNet-V2; where a
    folder has some of the classes only, the others' logits are left out."""
    transfer_from: tuple[str, ...] = ()
    """Other models, named as for checkpoint: PGD-20 images made on them are shown to this model."""
    pretrained: str | None = None
    """Pre-training run or file of the masked autoencoder behind the classifier: its reconstruction is attacked too, and
    the bounds of Propositions 3.2 and 3.3 can be drawn."""
    surface_biases: Literal["still", "copied"] = "still"
    """Loss surface: biases and norm weights stay (Li et al.'s `biasbn`, their published figures), or move along
    themselves (their code's default)."""
    save_adversarial: bool = False
    """Keep the attacked images: adversarial/ATTACK/*.safetensors in output_dir."""
    imports: Imports = ()
    """Module that registers families, data sources or report topics of your own, looked for in the working folder and
    PYTHONPATH. Modules that the evaluated run was trained with are imported unasked."""

    def __post_init__(self) -> None:
        check_finite(self)
        self.imports = tuple(dict.fromkeys(self.imports))
        check_number("seed", self.seed, at_least=0, below=2**63)
        if self.norm == "linf" and not 0 < self.eps <= 1:
            raise ValueError(
                f"--eps {self.eps:g}: images live in [0, 1] and ε with them, wanted 0 < eps <= 1. "
                f"If you meant {self.eps:g} grey levels, type --eps {self.eps:g}/255"
            )
        if self.norm != "linf" and (self.eps <= 0 or abs(self.eps - 8 / 255) < 1e-9):
            raise ValueError(
                f"--norm {self.norm} needs a radius of its own: say --eps, such as {USUAL_EPS[self.norm]} on CIFAR-10"
            )
        if self.alpha is not None and not 0 < self.alpha <= 2 * self.eps:
            raise ValueError(f"--alpha {self.alpha:g}: wanted a step size above 0 and at most 2ε = {2 * self.eps:g}")
        for name in ("batch_size", "restarts"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} {getattr(self, name)}, wanted at least 1")
        if self.targets < 0:
            raise ValueError(f"--targets {self.targets}, wanted 0 (none) or more")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"--limit {self.limit} leaves no image to evaluate; give at least 1, or leave it out")
        if self.autoattack_images is not None and self.autoattack_images < 1:
            raise ValueError(f"--autoattack_images {self.autoattack_images}: give at least 1, or --autoattack no")
        if self.crop is not None and not 0 < self.crop <= 1:
            raise ValueError(f"--crop {self.crop:g}: wanted a part of the short side, 0 < crop <= 1, such as 0.875")
        if (self.mean is None) != (self.std is None):
            raise ValueError("give --mean and --std together, one number a channel each")
        if self.mean is not None and self.std is not None:
            channels = self.data.channels
            if len(self.mean) != channels or len(self.std) != channels or min(self.std) <= 0:
                raise ValueError(
                    f"--mean {self.mean} --std {self.std}: wanted {channels} numbers each, deviations above 0"
                )

    @property
    def settings(self) -> Suite:
        """How much the suite does."""
        return SUITES[self.suite]

    @property
    def folder(self) -> Path:
        """Where the results go."""
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
        """ε as people write it."""
        return radius_text(self.eps, self.norm)

    @property
    def wants_autoattack(self) -> bool:
        """Whether AutoAttack runs."""
        return self.settings.autoattack if self.autoattack == "suite" else self.autoattack == "yes"

    @property
    def wants_unforeseen(self) -> bool:
        """Whether attacks of other kinds run."""
        return self.settings.unforeseen if self.unforeseen == "suite" else self.unforeseen == "yes"


def radius_text(radius: float, norm: Norm) -> str:
    """A radius as people write it: 8/255 for L∞, 0.5 for the others."""
    levels = radius * 255
    grain = 1 if levels > 16 else 4  # 0.5/255 is a radius people use, 76.5/255 is 0.3
    if norm == "linf" and abs(grain * levels - round(grain * levels)) < 1e-6:
        return f"{round(grain * levels) / grain:g}/255"
    return f"{radius:.4g}"
