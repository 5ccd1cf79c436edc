"""Options of `python -m mimir_fast.probe`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from mimir_fast.attacks.threat_model import check_radius
from mimir_fast.data.config import DataConfig
from mimir_fast.extensions import Imports
from mimir_fast.models.normalization import check_statistics
from mimir_fast.models.weight_files import WeightsChoice
from mimir_fast.probing.encoder import Pool
from mimir_fast.validation import check_fields, check_number, without

ProbeName = Literal["knn", "linear", "logistic", "attentive"]


@dataclass
class ProbingConfig:
    """Measure what a frozen encoder knows: nearest neighbours, linear and attentive probes, clean and under attack."""

    checkpoint: str
    """Pre-training or fine-tuning run, .safetensors or .pth file, or any model that evaluate takes and that shows its
    features."""
    data: DataConfig = field(default_factory=DataConfig)
    probes: tuple[ProbeName, ...] = ("knn", "linear")
    """knn: nearest neighbours by cosine; linear: SGD at 13 learning rates, the best on held-out training images;
    logistic: the optimum of logistic regression; attentive: a learned query over all tokens."""
    label_fractions: tuple[float, ...] = (1.0,)
    """Shares of the training labels that are used, each for itself, evenly of every class: 0.01 and 0.1 are usual."""
    weights: WeightsChoice = "auto"
    """Of our checkpoints: the trained weights (model), their moving average (ema), or the average where there is one
    (auto)."""
    part: str = ""
    """Of a file with several encoders, the name of the one to take, such as teacher."""
    options: tuple[str, ...] = ()
    """What a file of weights does not say and no tensor shows, as in training (--model.options): heads=12 eps=1e-5
    gelu=tanh of ViT, tokens_norm=false of XCiT. The report of what was loaded lists what is assumed."""
    mean: tuple[float, ...] | None = None
    """The mean that the encoder takes out of images in [0, 1], one number a channel, as 0.485 0.456 0.406 of MAE's
    public weights; left out: as the file says, else none."""
    std: tuple[float, ...] | None = None
    """The deviation."""
    pool: Pool = "auto"
    """One vector an image: the cls token, the mean of the patches, both, or auto: as the model itself pools."""
    neighbours: int = 20
    """That vote in knn."""
    epochs: int = 50
    """Of the linear probe over the features."""
    attentive_epochs: int = 20
    """Of the attentive probe, each with a pass of the encoder."""
    limit: int | None = None
    """Test that many images, evenly spaced; left out: all."""
    attack_images: int = 256
    """Test images that PGD attacks, through encoder and probe; 0 attacks none."""
    eps: float = 8 / 255
    """Radius of the L∞ ball of the attack."""
    attack_steps: int = 20
    """Steps of PGD, each of eps/4."""
    batch_size: int = 256
    """Images a pass of the encoder, and features a step of the linear probe."""
    pictures: bool = True
    """Attention maps, patch tokens in colour and distances layer by layer in the report."""
    against: str | None = None
    """Another model, named as for --checkpoint: the report shows how similar (CKA) its layers are to this one's, on the
    same images; its weights, part, pool, mean and std are as its own file says."""
    seed: int = 0
    """Of sample order, held-out images and random starts."""
    device: str = "auto"
    """auto, cpu or cuda."""
    output_dir: str | None = None
    """Where results.json, report.html and the features go; left out: probing in the run folder, or in
    runs/probing/NAME."""
    imports: Imports = ()
    """Module that registers families or data sources of your own."""

    def __post_init__(self) -> None:
        check_fields(self)
        check_radius("eps", self.eps)
        check_statistics(self.mean, self.std, self.data.channels)
        self.imports = tuple(dict.fromkeys(self.imports))
        self.probes = tuple(dict.fromkeys(self.probes))
        self.label_fractions = tuple(dict.fromkeys(self.label_fractions))
        self.options = tuple(self.options)
        for name in ("neighbours", "epochs", "attentive_epochs", "attack_steps", "batch_size"):
            check_number(name, getattr(self, name), at_least=1)
        check_number("attack_images", self.attack_images, at_least=0)
        check_number("seed", self.seed, at_least=0)
        if self.limit is not None:
            check_number("limit", self.limit, at_least=1)
        if not self.probes or not self.label_fractions:
            raise ValueError("nothing to do: name at least one of --probes and of --label_fractions")
        for fraction in self.label_fractions:
            check_number("label_fractions", fraction, above=0, at_most=1, hint="a share of the training labels")

    def idle(self) -> dict[str, str]:
        """Options that do nothing as the others are."""
        return {
            **without("knn" in self.probes, "knn is none of the --probes", "neighbours"),
            **without("linear" in self.probes, "linear is none of the --probes", "epochs"),
            **without("attentive" in self.probes, "attentive is none of the --probes", "attentive_epochs"),
            **without(self.eps, "--eps is 0", "attack_steps"),
            **without(self.attack_images, "--attack_images is 0", "eps", "attack_steps"),
            **without(self.pictures, "there are no pictures", "against"),
            **self.data.idle_without_training("a probe takes the images as they are"),
        }

    @property
    def folder(self) -> Path:
        """Folder of the results."""
        if self.output_dir is not None:
            return Path(self.output_dir)
        if Path(self.checkpoint).is_dir():
            return Path(self.checkpoint) / "probing"
        return Path("runs/probing") / "".join(c if c.isalnum() or c in "-_." else "_" for c in self.checkpoint)
