"""Any model as a frozen encoder: images in [0, 1] to tokens, and to one vector an image.

Our checkpoints, pre-trained or fine-tuned, and any model that `evaluate` takes and that shows its features (shown.py).
Shapes: B images, C channels, S × S pixels, T tokens, D width.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor, nn

from mimir_fast.data.config import DataConfig
from mimir_fast.evaluation.adapters import is_program, load_model
from mimir_fast.evaluation.wrappers import unwrapped
from mimir_fast.layers.outputs import layers_of
from mimir_fast.models.classifier import Classifier, ClassifierConfig
from mimir_fast.models.facts import Asked
from mimir_fast.models.families import fields_of
from mimir_fast.models.identify import infer_architecture, pool_of
from mimir_fast.models.load_report import LoadReport
from mimir_fast.models.loading import initialize
from mimir_fast.models.normalization import Statistics, choice_note, words
from mimir_fast.models.normalization import fields_of as statistics_fields
from mimir_fast.models.weight_files import Weights, WeightsChoice, read_weights
from mimir_fast.probing.shown import Pool, shown_by
from mimir_fast.sizes import height_width, said, typed


class FrozenEncoder(nn.Module):
    """Takes no gradients to its weights, only to its images.

    Args:
        model: owner of the weights, put into eval mode.
        tokens: images → (B, T, D), rows of a prefix first.
        num_prefix: rows that are no patch's, the cls token first; 0 is none.
        pool: `cls`, the `mean` of the patches, `both` one behind the other (DINOv2's), or `auto`: cls if there is one.
        norm: of the pooled vector, where the model has one.
        width: D.
        layers: parts of the model in the order in which they are called, by name.
        report: what became of a file of weights that we read.
    Raises:
        ValueError: cls is asked for and there is none.
    """

    def __init__(
        self, model: nn.Module, tokens: Callable[[Tensor], Tensor], num_prefix: int, pool: Pool = "auto",
        norm: nn.Module | None = None, width: int = 0, layers: Mapping[str, nn.Module] = MappingProxyType({}),
        report: LoadReport | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        if pool in ("cls", "both") and not num_prefix:
            raise ValueError(f"--pool {pool}: this encoder has no cls token: take mean")
        self.model = model.eval()
        for parameter in model.parameters():  # TorchScript has no requires_grad_ for all
            parameter.requires_grad_(False)
        self._tokens, self.num_prefix, self.norm = (tokens,), num_prefix, norm or nn.Identity()
        self.token_width, self.layers, self.report = width, dict(layers), report
        self.pool = ("cls" if num_prefix else "mean") if pool == "auto" else pool

    def tokens(self, images: Tensor) -> Tensor:
        """(B, T, D)."""
        return self._tokens[0](images)

    def forward(self, images: Tensor) -> Tensor:
        """(B, D), or (B, 2·D) with both pools."""
        tokens = self.tokens(images)
        cls, mean = tokens[:, 0], tokens[:, self.num_prefix :].mean(dim=1)
        return self.norm({"cls": cls, "mean": mean}.get(self.pool, torch.cat([cls, mean], dim=1)))


def open_encoder(
    source: str, data: DataConfig, weights: WeightsChoice = "auto", pool: Pool = "auto", *, part: str = "",
    statistics: Statistics | None = None, asked: Asked | None = None, attacked: bool = True,
) -> tuple[FrozenEncoder, list[str]]:  # fmt: skip
    """The encoder of a checkpoint or of any model with features, and what a reader of its numbers must know.

    Args:
        part: which of several encoders in a file.
        statistics: (mean, std) to normalise by, in place of what the file or model says.
        asked: what the user says of a file.
        attacked: the images will be; False takes a model without gradients too.
    Raises:
        ValueError: the model shows no features.
        WeightsError: the file cannot be read, or holds no encoder of ours.
    """
    if Path(source).exists() and not is_program(Path(source)):
        return _ours(read_weights(source, weights, part, asked), pool, data, statistics)
    judged = load_model(
        source, num_classes=None, device=torch.device("cpu"), channels=data.channels, image_size=data.image_size,
        mean=None if statistics is None else statistics[0], std=None if statistics is None else statistics[1],
        part=part, told=asked, attacked=attacked,
    )  # fmt: skip
    bare, prepare = unwrapped(judged.module)
    shown = shown_by(bare, source, judged.kind)
    width, prefix = shown.measured(torch.zeros(1, data.channels, *height_width(data.image_size)), source)
    encoder = FrozenEncoder(
        judged.module, lambda images: shown.tokens(prepare(images)), prefix, shown.pool if pool == "auto" else pool,
        shown.norm, width, layers_of(shown.owner),
    )  # fmt: skip
    return encoder, judged.notes


def _ours(weights: Weights, pool: Pool, data: DataConfig, asked: Statistics | None) -> tuple[FrozenEncoder, list[str]]:
    architecture, classes = infer_architecture(weights, image_size=data.image_size)
    wanted, given = (architecture.image_size, architecture.channels), (data.image_size, data.channels)
    if wanted != given:
        made, come = (f"{said(size)} pixels with {channels} channels" for size, channels in (wanted, given))
        raise ValueError(
            f"{weights.origin} is made for images of {made}, those of the data have {come}: give --data.image_size "
            f"{typed(wanted[0])} --data.channels {wanted[1]}"
        )
    normed_late, pooled = "fc_norm.weight" in weights.tensors, pool_of(weights, architecture)
    if pooled not in ("avg", "cls") and pool == "auto":
        raise ValueError(f"{weights.origin} pools its tokens by {pooled}, which no probe does: give --pool mean or cls")
    averaged = pooled != "cls"
    normalization = statistics_fields(weights.statistics(architecture.channels, asked))
    config = ClassifierConfig(global_pool="avg" if averaged else "cls", **fields_of(architecture), **normalization)
    with torch.random.fork_rng([]):
        model = Classifier(config, architecture.image_size, classes or 2, architecture.channels, not normed_late)
    report = initialize(model, weights)
    if pool == "auto":
        pool = "mean" if averaged else "auto"
    norm = model.fc_norm if pool == "mean" else None
    layers = {str(number): layer for number, layer in enumerate(model.encoder.layers(), 1)}
    encoder = FrozenEncoder(
        model, model.forward_features, model.encoder.num_prefix, pool, norm, model.encoder.width, layers, report
    )
    note = choice_note(weights.normalization, asked) or (f"{words(asked)}, as asked" if asked else None)
    return encoder, [str(report), *([note] if note else [])]
