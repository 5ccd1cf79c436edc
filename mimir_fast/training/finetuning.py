"""Fine-tuning as a task of the loop: configuration, assembly, the probe of every epoch, pictures."""

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import tyro
from torch import Tensor, nn

from mimir_fast.checkpoints.reading import checkpoints_of
from mimir_fast.data import Batch, DataConfig, build_loader, build_source
from mimir_fast.data.loaders import Loader
from mimir_fast.data.sources.held_out import hold_out
from mimir_fast.extensions import Imports
from mimir_fast.methods.classification import ClassificationConfig
from mimir_fast.methods.probe import ProbeConfig, probe
from mimir_fast.methods.registry import convert, find_method
from mimir_fast.models.classifier import ClassifierConfig, build_classifier
from mimir_fast.models.families import check_method, find_family
from mimir_fast.models.loading import LoadReport, initialize
from mimir_fast.models.weight_files import WeightsChoice
from mimir_fast.training.distributed import World
from mimir_fast.training.loop import RunConfig
from mimir_fast.training.optimizer import OptimizerConfig
from mimir_fast.training.pictures import grid
from mimir_fast.training.session import run_session


def finetune_run() -> RunConfig:
    """The papers' 100 epochs with 10 of warm-up."""
    return RunConfig(epochs=100, warmup_epochs=10, batch_size=128)


def finetune_optim() -> OptimizerConfig:
    """The papers' AdamW with layer-wise decay."""
    return OptimizerConfig(blr=1e-3, weight_decay=0.05, betas=(0.9, 0.999), layer_decay=0.65)


@dataclass
class FinetuneConfig:
    """Fine-tune a classifier, adversarially or not."""

    recipe: str = "digits/pgd_vit_nano"
    """Named starting point of all options below; `python -m mimir_fast.recipes` lists them."""
    method: str = "pgd"
    """natural, pgd, fast, apgd, trades, mart or ard_prm; its own options follow below."""
    init: str = ""
    """A pre-training run, checkpoint, .safetensors or .pth file, or timm:NAME; empty trains from scratch."""
    init_weights: WeightsChoice = "auto"
    """Of a run's checkpoint: its trained weights, their moving average, or the average where there is one."""
    model: ClassifierConfig = field(default_factory=ClassifierConfig)
    data: DataConfig = field(default_factory=DataConfig)
    objective: Annotated[ClassificationConfig, tyro.conf.arg(name="")] = field(default_factory=ClassificationConfig)
    probe: ProbeConfig = field(default_factory=ProbeConfig)
    optim: Annotated[OptimizerConfig, tyro.conf.arg(name="")] = field(default_factory=finetune_optim)
    run: Annotated[RunConfig, tyro.conf.arg(name="")] = field(default_factory=finetune_run)
    imports: Imports = ()
    """Module that registers methods, families or data sources of your own, looked for in the working folder and
    PYTHONPATH; the run remembers it. Modules of the run behind --init are imported unasked."""

    def __post_init__(self) -> None:
        self.imports = tuple(dict.fromkeys(self.imports))
        # What the probe looks at is not trained on: the best checkpoint is chosen without a test image.
        self.data = replace(self.data, hold_out=self.probe.num_images)
        entry = find_method("finetune", self.method)
        self.objective = convert(self.objective, entry.config)
        check_method(self.model.architecture(self.data.image_size, self.data.channels), self.method)
        entry.build(self.objective)  # options that do not go together are refused here, before anything starts

    @property
    def folder(self) -> Path:
        """Where the run lives."""
        return Path(self.run.output_dir or f"runs/{self.recipe}")


class Finetuning:
    """The task: a classifier, one of the methods, and the probe.

    Raises:
        ValueError: labels missing in the data, or other numbers of classes in its two splits.
        WeightsError: `init` cannot be used; the message says why.
    """

    kind = "finetune"
    curves: tuple[str, ...] = ("loss", "natural", "pgd", "lr")

    def __init__(self, config: FinetuneConfig, world: World) -> None:
        self.config = config
        self.method = find_method("finetune", config.method).build(config.objective)
        self.probe_loader, num_classes = probe_data(config, world)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.run.seed)
            self.model: nn.Module = build_classifier(
                config.model, config.data.image_size, num_classes, config.data.channels
            )
        self.init_report: LoadReport | None = None
        # A run that goes on has its weights in its own checkpoint.
        if config.init and not checkpoints_of(config.folder):
            self.init_report = initialize(self.model, config.init, config.init_weights)
        self.architecture: dict[str, Any] = {
            "kind": "classifier",
            "image_size": config.data.image_size,
            "channels": config.data.channels,
            "num_classes": num_classes,
            **asdict(config.model),
        }
        self._alarm: str | None = None

    def losses(self, model: nn.Module, batch: Batch, *, seed: int, step: int) -> dict[str, Tensor]:
        """The method's."""
        return self.method(model, batch, seed=seed, step=step)

    def evaluate(self, model: nn.Module, *, step: int) -> dict[str, float]:
        """The probe; the best checkpoint is the one of highest PGD accuracy (natural, for `natural`)."""
        if self.probe_loader is None:
            return {}
        settings = self.config.probe
        result = probe(
            model, self.probe_loader, self.config.objective.attack, num_steps=settings.num_steps,
            seed=self.config.run.seed,
        )  # fmt: skip
        # Only adversarial training can overfit to its single step.
        self._alarm = None if self.config.method == "natural" else result.alarm
        score = result.natural if self.config.method == "natural" else result.pgd
        return {"natural": result.natural, "fgsm": result.fgsm, "pgd": result.pgd, "score": score}

    def alarm(self) -> str | None:
        """Catastrophic overfitting in the last probe."""
        return self._alarm

    def pictures(self, model: nn.Module, batch: Batch, *, seed: int, step: int) -> dict[str, np.ndarray]:
        """Clean images, what the training attack makes of them, and the difference, magnified to full range."""
        return {"attack": grid(self.method.preview(model, batch.first(8), seed=seed, step=step))}

    def describe(self, num_samples: int) -> str:
        """What is trained on what, and what the weights came from."""
        config, attack = self.config, self.config.objective.attack
        head = (
            f"{config.method} on {config.data.source} ({num_samples:,} images, {config.data.image_size}²): "
            f"{find_family(config.model.family).title}-{config.model.encoder}/{config.model.patch_size}"
        )
        if config.method != "natural":
            head += f", eps {255 * attack.eps:.3g}/255"
        if config.method in ("pgd", "trades", "mart", "ard_prm"):
            head += f", {attack.num_steps} steps of {255 * attack.alpha:.3g}/255"
        if self.init_report is not None:
            return f"{head}\n{self.init_report}"
        return head + ("" if config.init else ", from scratch (no --init)")

    def next_command(self, run: Path) -> str:
        """The evaluation, against the adversary of training."""
        eps = f"{255 * self.config.objective.attack.eps:.4g}/255"
        return f"mimir_fast.evaluate --checkpoint {run} --suite quick --eps {eps}"


def probe_data(config: FinetuneConfig, world: World) -> tuple[Loader | None, int]:
    """This rank's share of the probe's images, which are held out of the training split (None when the probe is off or
    the split is too small to spare any), and the number of classes.

    Raises:
        ValueError: missing labels, or the splits differ in their classes.
    """
    train = build_source(replace(config.data, limit=None), "train")
    test = build_source(replace(config.data, limit=None, generated=None), "test")
    if train.num_classes != test.num_classes:
        raise ValueError(
            f"{train.name} has {train.num_classes} classes in its training split and {test.num_classes} in its test "
            "split: give both the same class folders"
        )
    if (train.labels < 0).any():
        raise ValueError(f"{train.name} has samples without labels: fine-tuning needs a labelled data set")
    # The same number of images on every rank, or a sharded model would wait for a rank that is done.
    whole = build_source(replace(config.data, limit=None, hold_out=0), "train")
    count = len(hold_out(len(whole), config.data.hold_out)[1]) // world.size * world.size
    if count == 0:
        return None, train.num_classes
    loader = build_loader(
        replace(config.data, limit=count, generated=None), split="held_out", batch_size=config.probe.batch_size,
        device=world.device, rank=world.rank, world_size=world.size,
    )  # fmt: skip
    return loader, train.num_classes


def finetune(config: FinetuneConfig) -> Path:
    """Run fine-tuning to its end (or to a signal) and return the run's folder."""
    return run_session(config, lambda world: Finetuning(config, world))
