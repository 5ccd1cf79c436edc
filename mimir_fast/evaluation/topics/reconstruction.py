"""The masked autoencoder behind a classifier: loading it, what it fills in, and the attack on its reconstruction.

Shapes: B images, C channels, S × S pixels, N patches, K kept, M masked, P numbers a patch.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mimir_fast.attacks.adaptive import attack_reconstruction
from mimir_fast.attacks.threat_model import LinfThreat
from mimir_fast.evaluation.adapters import weights_digest
from mimir_fast.evaluation.attacks import step_size
from mimir_fast.evaluation.html import paragraph, table
from mimir_fast.evaluation.measure import Measurement, Records, Row
from mimir_fast.evaluation.topic import Numbers, Setup, Topic, options_of, register
from mimir_fast.methods.mae import MaeConfig
from mimir_fast.models.facts import Asked
from mimir_fast.models.masked_loading import masked_model_of, objective_of
from mimir_fast.models.masked_model import MaskedModel, View
from mimir_fast.models.normalization import Statistics, check_statistics, choice_note, pair, words
from mimir_fast.models.weight_files import Weights, WeightsError, read_weights
from mimir_fast.ops.patches import gather_patches, patchify, unpatchify
from mimir_fast.sizes import Size
from mimir_fast.validation import counted, without

STEPS, IMAGES = 20, 256
TYPICAL = 0.5, 0.25
"""Mean and deviation of pixels where nothing is known of them."""


@dataclass
class AutoencoderOptions:
    """The masked autoencoder behind the classifier."""

    pretrained: str | None = None
    """Pre-training run or file of the masked autoencoder behind the classifier: its reconstruction is attacked too, and
    the bounds of Propositions 3.2 and 3.3 can be drawn."""
    pretrained_options: tuple[str, ...] = ()
    """What its file does not say and no tensor shows, as --options of the classifier: heads=12 eps=1e-5 gelu=tanh."""
    pretrained_mean: tuple[float, ...] | None = None
    """The mean of images in [0, 1] that the masked autoencoder takes out, one number a channel, as 0.485 0.456 0.406 of
    MAE's public weights; left out: what its file says, else none."""
    pretrained_std: tuple[float, ...] | None = None
    """The deviation."""

    def __post_init__(self) -> None:
        check_statistics(self.pretrained_mean, self.pretrained_std, None, "--pretrained_")

    def idle(self) -> dict[str, str]:
        """Options that do nothing as the others are."""
        names = ("pretrained_mean", "pretrained_std", "pretrained_options")
        return without(self.pretrained, "--pretrained names none", *names)


def load_masked_autoencoder(
    source: str | Path | Weights, statistics: Statistics | None = None, image_size: Size | None = None
) -> tuple[MaskedModel, MaeConfig]:
    """(model in eval mode, the mask and the loss it was trained with).

    From anything `read_weights` reads; a file that does not say how it was trained counts as MAE's.

    Args:
        statistics: (mean, std) that it normalises by, in place of what the file says.
        image_size: of images that are no squares, where the file does not say it.
    Raises:
        ValueError: unreadable, of no encoder of ours, or without a decoder (an exported encoder, or a classifier).
    """
    with _named():
        weights = source if isinstance(source, Weights) else read_weights(source)
        return masked_model_of(weights, statistics=statistics, image_size=image_size)[0], _trained_like(weights)


def _trained_like(weights: Weights) -> MaeConfig:
    # What is predicted: all that is masked, though training may have paid for a share (CrossMAE).
    names, objective = ("mask_ratio", "mask_unit", "norm_pix_loss", "pixel_loss"), objective_of(weights)
    return MaeConfig(**{name: objective[name] for name in names if name in objective})


@torch.no_grad()
def reconstruct(
    model: MaskedModel, trained: MaeConfig, images: Tensor, samples: Tensor, seed: int
) -> tuple[Tensor, Tensor]:
    """(code of the visible patches (B, prefix + K, D), what it is decoded to (B, C, H, W) in [0, 1]).

    The pictures are a function of the code and of the mask, which does not depend on the image: the visible patches are
    predicted too.

    Args:
        trained: how; predictions of normalised patches, whose mean and deviation the code does not hold, get those that
            the model takes out of images, where it takes out any, else TYPICAL.
    """
    keep, _ = trained.draw(model, samples, seed=seed, step=0)
    latent, prediction, _ = model(View(gather_patches(patchify(images, model.patch_size), keep), keep))
    prediction = prediction.float()
    if trained.norm_pix_loss:
        statistics = (
            model.normalizer.statistics if model.normalizer.changes else [(v,) * model.channels for v in TYPICAL]
        )
        # The channels of a pixel are neighbours in a patch.
        mean, deviation = (prediction.new_tensor(v).repeat(model.patch_size**2) for v in statistics)
        prediction = prediction * deviation + mean
    return latent, unpatchify(prediction, model.patch_size, images.shape[2]).clamp(0, 1)


def pretrained_of(setup: Setup) -> str | None:
    """The masked autoencoder that was asked for."""
    return options_of(setup.config, AutoencoderOptions).pretrained


def statistics_of(setup: Setup) -> Statistics | None:
    """The normalisation that was asked for."""
    options = options_of(setup.config, AutoencoderOptions)
    return pair(options.pretrained_mean, options.pretrained_std)


def autoencoder_of(setup: Setup, device: torch.device) -> tuple[MaskedModel, MaeConfig]:
    """The masked autoencoder on the device, loaded once; see `load_masked_autoencoder`."""
    model, trained, _ = _loaded(setup)
    return model.to(device), trained


def _loaded(setup: Setup) -> tuple[MaskedModel, MaeConfig, list[str]]:
    """As `autoencoder_of`, and what was assumed of it or overridden."""
    options, asked = options_of(setup.config, AutoencoderOptions), statistics_of(setup)

    def load() -> tuple[MaskedModel, MaeConfig, list[str]]:
        with _named():
            weights = read_weights(str(pretrained_of(setup)), asked=Asked(tuple(options.pretrained_options)))
            model, report = masked_model_of(weights, statistics=asked, image_size=setup.config.data.image_size)
        note = choice_note(weights.normalization, asked, "--pretrained_")
        assumed = [f"{report.assumption} (--pretrained_options)"] * bool(report.assumed)
        return model, _trained_like(weights), [*report.notes, *([note] if note else []), *assumed]

    return setup.once("autoencoder", load)


@contextmanager
def _named() -> Iterator[None]:
    """What is wrong with the weights, under the name of the option."""
    try:
        yield
    except WeightsError as error:
        raise ValueError(f"--pretrained: {error}") from error


def identity(setup: Setup) -> dict[str, Any]:
    """Which masked autoencoder, by its weights."""
    source = pretrained_of(setup)
    if not source:
        return {"pretrained": source}
    asked, (model, trained, _) = statistics_of(setup), _loaded(setup)
    which = {"pretrained": f"{source} {weights_digest(model, repr((model.encoder.options, trained)))}"}
    options = options_of(setup.config, AutoencoderOptions).pretrained_options
    which |= {"pretrained_options": " ".join(options)} if options else {}
    return which if asked is None else which | {"pretrained_statistics": words(asked)}


def check(setup: Setup) -> None:
    """Load the masked autoencoder and fill in two images before anything is measured."""
    if pretrained_of(setup) is None or setup.trial is None:
        return
    device = torch.device("cpu")
    x, _, samples = next(setup.trial.shard("all", 0).batches(2, device))
    try:
        reconstruct(*autoencoder_of(setup, device), x, samples, setup.config.seed)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"--pretrained {pretrained_of(setup)} does not take images of shape {tuple(x.shape[1:])}: {error}"
        ) from error


def measurements(setup: Setup) -> list[Measurement]:
    """Errors on the masked patches when the visible ones are clean, noisy and attacked."""
    config, pretrained = setup.config, pretrained_of(setup)
    if pretrained is None:
        return []
    eps = config.eps if config.norm == "linf" else 8 / 255  # the pre-training attack is an L∞ one
    threat = LinfThreat(eps=eps, alpha=step_size(eps, STEPS), num_steps=STEPS)

    def outcome(model: nn.Module, images: Tensor, labels: Tensor, samples: Tensor) -> Row:
        autoencoder, trained = autoencoder_of(setup, images.device)
        errors = attack_reconstruction(
            autoencoder, images, threat, norm_pix=trained.norm_pix_loss, kind=trained.pixel_loss, samples=samples,
            mask=trained.draw(autoencoder, samples, seed=config.seed, step=0), seed=config.seed,
        )  # fmt: skip
        return {"clean": errors.clean, "random": errors.random, "attacked": errors.attacked}

    _, trained = autoencoder_of(setup, torch.device("cpu"))
    parameters = {**asdict(threat), "mask_ratio": trained.mask_ratio, "pretrained": pretrained, "seed": config.seed}
    # Only where they differ from MAE's: evaluations that began before these were known go on.
    others = {"mask_unit": trained.mask_unit, "pixel_loss": trained.pixel_loss}
    parameters |= {name: value for name, value in others.items() if value != getattr(MaeConfig, name)}
    return [Measurement("reconstruction", outcome, parameters, setup.subset(IMAGES), cost=3.0 * STEPS)]


def summarize(setup: Setup, items: Sequence[Measurement], records: Records) -> Numbers | None:
    """Mean errors over the images, and how often the attack beats noise."""
    if not items:
        return None
    values = {name: records.tensor(items[0], name) for name in ("clean", "random", "attacked")}
    return {
        **{name: float(value.mean()) for name, value in values.items()},
        "worse_than_noise": float((values["attacked"] > values["random"]).double().mean()),
        "num_images": len(values["clean"]),
        "parameters": items[0].parameters,
        "notes": [f"Masked autoencoder: {note}" for note in _loaded(setup)[2]],
    }


def render(numbers: Numbers) -> str:
    """A table of the errors with clean, noisy and attacked visible patches."""
    rows = [
        [label, f"{numbers[name]:.4f}", f"{numbers[name] / max(numbers['clean'], 1e-12):.2f} ×"]
        for name, label in (("clean", "clean"), ("random", "random noise"), ("attacked", "attacked"))
    ]
    words = (
        f"Error of the masked autoencoder on masked patches of {counted(numbers['num_images'], 'image')}, when "
        f"the visible ones are perturbed within L∞, ε = {255 * numbers['parameters']['eps']:.3g}/255; "
        f"the attack beats noise on {100 * numbers['worse_than_noise']:.0f} % of them."
    )
    kind = "absolute" if numbers["parameters"].get("pixel_loss") == "l1" else "squared"
    return paragraph(words) + table(["visible patches", f"mean {kind} error", "relative"], rows, numbers=(1, 2))


register(Topic(
    "reconstruction", "Reconstruction", measurements, summarize, render, 100, AutoencoderOptions, check, identity
))  # fmt: skip
