"""Fine-tuning as a task of the loop: configuration, assembly, the probe of every epoch, pictures."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import tyro
from torch import Tensor, nn

from mimir_fast.attacks.pgd import predicted
from mimir_fast.data import Batch, DataConfig, build_loader, build_source
from mimir_fast.data.loaders import Loader
from mimir_fast.data.sources.base import hold_out
from mimir_fast.data.sources.edm import open_npz
from mimir_fast.extensions import Imports, RegisteredName
from mimir_fast.layers.borrowing import borrowed
from mimir_fast.methods.classification import ClassificationConfig, ClassificationMethod
from mimir_fast.methods.probe import ProbeConfig, probe
from mimir_fast.methods.registry import DEFAULT, Pass, all_methods, convert, find_method, passes_of
from mimir_fast.models.classifier import ClassifierConfig, build_classifier
from mimir_fast.models.facts import Asked
from mimir_fast.models.families import find_family, mask_unit_of
from mimir_fast.models.freezing import check_freeze, freeze, frozen_part
from mimir_fast.models.loading import LoadReport, initialize
from mimir_fast.models.lora import LoraConfig, add_lora
from mimir_fast.models.weight_files import WeightsChoice
from mimir_fast.sizes import Size, as_size, shown
from mimir_fast.training.distributed import World
from mimir_fast.training.loop import RunConfig
from mimir_fast.training.optimizer import OptimizerConfig
from mimir_fast.training.pictures import grid
from mimir_fast.training.session import run_session
from mimir_fast.validation import without


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
    method: Annotated[str, RegisteredName(lambda: all_methods("finetune"))] = DEFAULT["finetune"]
    """How it is trained; the method's own options follow below."""
    init: str = ""
    """A pre-training run, checkpoint, .safetensors or .pth file, or timm:NAME; empty trains from scratch. Where no
    --recipe is named, a run brings its images and its encoder, and the result goes to RUN-METHOD."""
    init_weights: WeightsChoice = "auto"
    """Of a checkpoint or file: its trained weights, their moving average, or the average where there is one."""
    init_part: str = ""
    """Of a file with several encoders, the name of the one to take, such as teacher."""
    init_image_size: Size | None = None
    """Of the images that a file's weights were trained on, in pixels, or height and width; asked for where it does not
    say it and its tensors fit several."""
    freeze: str = ""
    """`encoder`, or a number of layers from the input on: what lies in front of them and they themselves do not train,
    0 the embedding alone. Batch norms in there keep their running statistics."""
    lora: LoraConfig = field(default_factory=LoraConfig)
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
        self.init_image_size = None if self.init_image_size is None else as_size(self.init_image_size)
        check_freeze(self.freeze)
        if self.lora.rank and self.freeze:
            raise ValueError(f"freeze={self.freeze} with lora.rank={self.lora.rank}: LoRA freezes the encoder already")
        if self.lora.rank and not self.init:
            raise ValueError("lora.rank without --init: the encoder's weights, which are frozen, would stay random")
        # What the probe looks at is not trained on: the best checkpoint is chosen without a test image.
        self.data = replace(self.data, hold_out=self.probe.num_images)
        entry = find_method("finetune", self.method)
        self.objective = convert(self.objective, entry.config)
        mask_unit_of(self.model.architecture(self.data.image_size, self.data.channels))
        entry.build(self.objective)  # options that do not go together are refused here, before anything starts

    def idle(self) -> dict[str, str]:
        """Options that do nothing as the others are."""
        return without(self.init, "--init is empty", "init_weights", "init_part", "init_image_size") | {
            **find_method("finetune", self.method).idle,
            "data.hold_out": "fine-tuning holds out --probe.num_images",
        }

    @property
    def folder(self) -> Path:
        """The run's folder: `--output_dir`, or runs/RECIPE."""
        return Path(self.run.output_dir or f"runs/{self.recipe}")

    @property
    def exact(self) -> bool:
        """False: no preset promises the authors' numbers of a fine-tuning."""
        return False

    @property
    def frozen(self) -> bool:
        """A part of the model does not train that usually does."""
        return bool(self.freeze or self.lora.rank)


class Finetuning:
    """The task: a classifier, one of the methods, and the probe.

    Args:
        resumed: the run's own checkpoint will be loaded, so `init` is not.
    Raises:
        ValueError: labels missing in the data, or other numbers of classes in its two splits.
        WeightsError: `init` cannot be used; the message says why.
    """

    kind = "finetune"
    curves: tuple[str, ...] = ("loss", "natural", "pgd", "lr")

    def __init__(self, config: FinetuneConfig, world: World, *, resumed: bool = False) -> None:
        self.config = config
        self.method = build_method(config)
        self.replays = self.method.replays
        self.probe_loader, num_classes = probe_data(config, world)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.run.seed)
            model = build_classifier(config.model, config.data.image_size, num_classes, config.data.channels)
            self.init_report: LoadReport | None = None
            # A run that goes on has its weights in its own checkpoint.
            if config.init and not resumed:
                asked = Asked(image_size=config.init_image_size)
                self.init_report = initialize(model, config.init, config.init_weights, config.init_part, asked)
            freeze(model, model.encoder, config.freeze)
            if config.lora.rank:
                add_lora(model, model.encoder, config.lora)
        self.model: nn.Module = model
        self.architecture: dict[str, Any] = {
            "kind": "classifier",
            "image_size": config.data.image_size,
            "channels": config.data.channels,
            "num_classes": num_classes,
            **asdict(config.model),
        }
        self._alarm: str | None = None

    def passes(self, model: nn.Module, batches: Sequence[Batch], *, seed: int, step: int) -> list[Pass]:
        """The method's training passes of a step, one for each micro-batch."""
        return passes_of(self.method, model, batches, seed=seed, step=step)

    def evaluate(self, model: nn.Module, *, step: int) -> dict[str, float]:
        """The probe's accuracies in [0, 1]; `score` is that under PGD, the natural one without an adversary."""
        if self.probe_loader is None:
            return {}
        settings = self.config.probe
        result = probe(
            model, self.probe_loader, self.config.objective.attack, num_steps=settings.num_steps,
            seed=self.config.run.seed,
        )  # fmt: skip
        # Only adversarial training can overfit to its single step.
        self._alarm = result.alarm if self.method.adversarial else None
        score = result.pgd if self.method.adversarial else result.natural
        return {"natural": result.natural, "fgsm": result.fgsm, "pgd": result.pgd, "score": score}

    def alarm(self) -> str | None:
        """Catastrophic overfitting in the last probe."""
        return self._alarm

    def pictures(self, model: nn.Module, batch: Batch, *, seed: int, step: int) -> dict[str, np.ndarray]:
        """Images, what the training attack makes of them, and the difference; the predicted class under each."""
        rows = self.method.preview(model, batch.first(8), seed=seed, step=step)
        shown = [name for name in ("input", "adversarial") if name in rows]
        return {"attack": grid(rows, {name: _predictions(model, rows[name], batch.labels) for name in shown})}

    def describe(self, num_samples: int) -> str:
        """What is trained on what, and what the weights came from."""
        config = self.config
        head = (
            f"{config.method} on {config.data.source} ({num_samples:,} images, {shown(config.data.image_size)}): "
            f"{find_family(config.model.family).title}-{config.model.encoder}/{config.model.patch_size}"
        )
        if adversary := self.method.adversary():
            head += f", {adversary}"
        if config.freeze:
            head += f", {frozen_part(config.freeze)}"
        elif config.lora.rank:
            head += f", LoRA of rank {config.lora.rank}"
        if config.probe.num_images and self.probe_loader is None:
            head += "\nWARNING: no probe and no best checkpoint: the training split is too small to hold images out"
        if self.init_report is not None:
            return f"{head}\n{self.init_report}"
        return head + ("" if config.init else ", from scratch (no --init)")


def build_method(config: FinetuneConfig) -> ClassificationMethod:
    """The method of a configuration.

    Raises:
        TypeError: it was registered for fine-tuning and is no ClassificationMethod.
    """
    method = find_method("finetune", config.method).build(config.objective)
    if not isinstance(method, ClassificationMethod):
        raise TypeError(f"method {config.method}: wanted a ClassificationMethod, got {type(method).__name__}")
    return method


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
    generated = config.data.generated
    if generated and (open_npz(generated, train.num_classes).labels < 0).any():
        raise ValueError(f"{generated} has no `label`: fine-tuning needs labelled images")
    # The same number of images on every rank, or a sharded model would wait for a rank that is done.
    whole = build_source(replace(config.data, limit=None, hold_out=0), "train")
    count = len(hold_out(whole.labels, config.data.hold_out)[1]) // world.size * world.size
    if count == 0:
        return None, train.num_classes
    loader = build_loader(
        replace(config.data, limit=count, generated=None), split="held_out", batch_size=config.probe.batch_size,
        device=world.device, rank=world.rank, world_size=world.size,
    )  # fmt: skip
    return loader, train.num_classes


def finetune(config: FinetuneConfig, then: Sequence[str] = ()) -> Path:
    """Run fine-tuning to its end (or to a signal) and return the run's folder.

    Args:
        then: as of `pretrain`.
    """
    config = replace(config, model=config.model.resolved())  # the run remembers what `auto` was

    def build(world: World, checkpoint: Path | None) -> Finetuning:
        return Finetuning(config, world, resumed=checkpoint is not None)

    return run_session(config, build, then)


def _predictions(model: nn.Module, images: Tensor, labels: Tensor) -> list[str]:
    """The class that is seen in each image (B, C, H, W); behind it, where that is wrong, the right one."""
    with torch.no_grad(), borrowed(model, "eval") as module:
        found = predicted(module(images)).tolist()
    pairs = zip(found, labels[: len(found)].tolist(), strict=True)
    return [f"{seen}" if seen == label else f"{seen}, not {label}" for seen, label in pairs]
