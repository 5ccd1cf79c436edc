"""Pre-training as a task of the loop: configuration, assembly, pictures."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import tyro
from torch import Tensor, nn

from mimir_fast.data import Batch, DataConfig, build_source
from mimir_fast.extensions import Imports, RegisteredName
from mimir_fast.methods.registry import (
    DEFAULT,
    PRESETS,
    Objective,
    Pass,
    all_methods,
    convert,
    find_method,
    passes_of,
)
from mimir_fast.models.facts import Asked
from mimir_fast.models.families import find_family, mask_unit_of
from mimir_fast.models.freezing import check_freeze, freeze, frozen_part
from mimir_fast.models.loading import LoadReport
from mimir_fast.models.masked_init import initialize_masked
from mimir_fast.models.masked_model import ModelConfig, build_masked_model
from mimir_fast.models.weight_files import WeightsChoice
from mimir_fast.sizes import Size, as_size, shown
from mimir_fast.training.loop import RunConfig
from mimir_fast.training.optimizer import OptimizerConfig
from mimir_fast.training.pictures import grid
from mimir_fast.training.session import run_session
from mimir_fast.validation import without


def default_objective() -> Objective:
    """The options of the default method."""
    options: Objective = find_method("pretrain", DEFAULT["pretrain"]).config()
    return options


@dataclass
class PretrainConfig:
    """Pre-train a robust masked autoencoder."""

    recipe: str = "digits/mimir_vit_nano"
    """Named starting point of all options below; `python -m mimir_fast.recipes` lists them."""
    preset: Annotated[str, RegisteredName(lambda: ["", *PRESETS.all()])] = ""
    """Set every point in which paper and authors' code differ; empty leaves them as the recipe has them."""
    method: Annotated[str, RegisteredName(lambda: all_methods("pretrain"))] = DEFAULT["pretrain"]
    """How it is trained; the method's own options follow below."""
    init: str = ""
    """A run, checkpoint, .safetensors or .pth file, or timm:NAME to go on from; its decoder too where it is the same
    as the model's. Empty starts from scratch."""
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
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    objective: Annotated[Objective, tyro.conf.arg(name="")] = field(default_factory=default_objective)
    optim: Annotated[OptimizerConfig, tyro.conf.arg(name="")] = field(default_factory=OptimizerConfig)
    run: Annotated[RunConfig, tyro.conf.arg(name="")] = field(default_factory=RunConfig)
    imports: Imports = ()
    """Module that registers methods, families or data sources of your own, looked for in the working folder and
    PYTHONPATH; the run remembers it. Modules of the run behind --init are imported unasked."""

    def __post_init__(self) -> None:
        self.imports = tuple(dict.fromkeys(self.imports))
        self.init_image_size = None if self.init_image_size is None else as_size(self.init_image_size)
        check_freeze(self.freeze)
        entry = find_method("pretrain", self.method)
        self.objective = convert(self.objective, entry.config)
        if entry.adapters:
            self.model = replace(self.model, adapters=True)
        elif self.model.adapters:
            raise ValueError(
                f"method {self.method} trains no adapters, and they would stay as they are initialised: "
                "leave --model.adapters out, or take --method aemim"
            )
        unit = mask_unit_of(self.model.architecture(self.data.image_size, self.data.channels))
        if entry.decoder and self.model.decoder != entry.decoder:
            raise ValueError(
                f"method {self.method} needs --model.decoder {entry.decoder}, not {self.model.decoder}: "
                "its mask tokens go through the encoder"
            )
        self.objective.check_images(self.data.image_size, unit)

    def idle(self) -> dict[str, str]:
        """Options that do nothing as the others are."""
        return without(self.init, "--init is empty", "init_weights", "init_part", "init_image_size")

    @property
    def folder(self) -> Path:
        """The run's folder: `--output_dir`, or runs/RECIPE."""
        return Path(self.run.output_dir or f"runs/{self.recipe}")

    @property
    def exact(self) -> bool:
        """The preset promises the authors' numbers."""
        return bool(self.preset) and PRESETS.find(self.preset).exact

    @property
    def frozen(self) -> bool:
        """A part of the model does not train that usually does."""
        return bool(self.freeze)


def with_method(config: PretrainConfig, method: str) -> PretrainConfig:
    """`config` for another method: its options converted and fitted to the images, and the model that it needs.

    What the method before asked of the model goes: its adapters, and a decoder that it alone works with. A preset of
    the recipe holds for the other method too, where that has its points.
    """
    entry, before = find_method("pretrain", method), find_method("pretrain", config.method)
    objective = convert(config.objective, entry.config).fit(config.data.image_size)
    decoder: Any = entry.decoder or (ModelConfig.decoder if before.decoder else config.model.decoder)
    model = replace(config.model, decoder=decoder, adapters=entry.adapters)
    changed = replace(config, method=method, objective=objective, model=model)
    if not config.preset or method == config.method:
        return changed
    has_points = isinstance(objective, PRESETS.find(config.preset).options)
    return with_preset(changed, config.preset) if has_points else replace(changed, preset="")


def with_preset(config: PretrainConfig, name: str) -> PretrainConfig:
    """`config` with every point in which paper and authors' code differ as the preset has it.

    Raises:
        ValueError: there is no such preset, or neither method nor model has such a point.
    """
    preset, model, objective = PRESETS.find(name), config.model, config.objective
    on_a_grid = find_family(model.family).kept_on_a_grid
    if isinstance(objective, preset.options) or not on_a_grid:
        objective = preset.apply(objective)
    if on_a_grid:
        model = replace(model, positions=preset.positions)
    micro_batch = preset.micro_batch(objective, config.data.source) or config.run.micro_batch
    run = replace(config.run, micro_batch=micro_batch)
    return replace(config, preset=name, objective=objective, model=model, run=run)


class Pretraining:
    """The task: a masked model and one of the methods.

    Args:
        resumed: the run's own checkpoint will be loaded, so `init` is not.
    Raises:
        ValueError: the method classifies and the data has no labels.
        WeightsError: `init` cannot be used; the message says why.
    """

    kind = "pretrain"
    replays = 1
    curves: tuple[str, ...] = ("loss", "lr")

    def __init__(self, config: PretrainConfig, *, resumed: bool = False) -> None:
        self.config = config
        entry = find_method("pretrain", config.method)
        self.method = entry.build(config.objective)
        num_classes = count_classes(config) if entry.labels else 0
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.run.seed)
            model = build_masked_model(config.model, config.data.image_size, config.data.channels, num_classes)
        self.init_report: LoadReport | None = None
        if config.init and not resumed:
            asked = Asked(image_size=config.init_image_size)
            self.init_report = initialize_masked(model, config.init, config.init_weights, config.init_part, asked)
        freeze(model, model.encoder, config.freeze)
        self.model: nn.Module = model
        config.objective.check_model(self.model)
        self.architecture: dict[str, Any] = {
            "kind": "masked_autoencoder",
            "image_size": config.data.image_size,
            "channels": config.data.channels,
            "num_classes": num_classes,
            **asdict(config.model),
        }

    def passes(self, model: nn.Module, batches: Sequence[Batch], *, seed: int, step: int) -> list[Pass]:
        """The method's training passes of a step, one for each micro-batch."""
        return [partial(self._noted, run) for run in passes_of(self.method, model, batches, seed=seed, step=step)]

    def _noted(self, run: Pass) -> dict[str, Tensor]:
        out = run()
        self.curves = (*out, "lr")
        return out

    def evaluate(self, model: nn.Module, *, step: int) -> dict[str, float]:
        """Nothing: reconstruction loss is logged anyway, and robustness is fine-tuning's to measure."""
        return {}

    def alarm(self) -> str | None:
        """None always: pre-training evaluates nothing that could raise one."""
        return None

    def pictures(self, model: nn.Module, batch: Batch, *, seed: int, step: int) -> dict[str, np.ndarray]:
        """One grid: input, adversarial image, what the encoder sees of it, and the reconstruction."""
        return {"reconstruction": grid(self.method.preview(model, batch.first(8), seed=seed, step=step))}

    def describe(self, num_samples: int) -> str:
        """Method, data, images and model in one line, for the head of the output."""
        config, model = self.config, self.config.model
        head = (
            f"{config.method} on {config.data.source} ({num_samples:,} images, {shown(config.data.image_size)}): "
            f"{find_family(model.family).title}-{model.encoder}/{model.patch_size}, {model.decoder} decoder"
        )
        head += f", {frozen_part(config.freeze)}" if config.freeze else ""
        return head if self.init_report is None else f"{head}\n{self.init_report}"


def count_classes(config: PretrainConfig) -> int:
    """Classes of the training split.

    Raises:
        ValueError: it has no labels.
    """
    source = build_source(config.data, "train")
    if source.num_classes < 2 or (source.labels < 0).any():
        raise ValueError(f"method {config.method} classifies, but {source.name} has samples without labels")
    return source.num_classes


def pretrain(config: PretrainConfig, then: Sequence[str] = ()) -> Path:
    """Run pre-training to its end (or to a signal) and return the run's folder.

    Args:
        then: the words after `python -m` of the command that the run proposes in the end; none for no proposal.
    """
    return run_session(config, lambda world, checkpoint: Pretraining(config, resumed=checkpoint is not None), then)
