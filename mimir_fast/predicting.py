"""A finished run on images of one's own: classes, margins, what an attack makes of them, and features.

    model = mimir_fast.load("runs/digits/pgd_vit_nano")
    model.predict("x.png")                # Prediction(name='3', index=3, probability=0.98, margin=4.1, runner_up='8')
    model.attack("x.png", eps=8 / 255)    # the attacked image, and the predictions before and after
    model.embed("x.png")                  # (1, D) features of the frozen encoder

Shapes: B images, C channels, H × W pixels, K classes, D width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

from mimir_fast.attacks.pgd import pgd
from mimir_fast.attacks.threat_model import LinfThreat
from mimir_fast.data.config import DataConfig
from mimir_fast.data.decode import decode, pixels_of
from mimir_fast.data.loaders.base import to_channels
from mimir_fast.data.sources import MissingDataError, build_source
from mimir_fast.evaluate import data_of
from mimir_fast.evaluation.adapters import Choice, JudgedModel, checkpoint_and_kind, load_model
from mimir_fast.evaluation.door import at_the_door
from mimir_fast.evaluation.images import fitting_for
from mimir_fast.plain_errors import in_python
from mimir_fast.probing.encoder import FrozenEncoder, open_encoder
from mimir_fast.sizes import height_width, said
from mimir_fast.validation import check_choice, number_of

Image = str | Path | bytes | np.ndarray | Tensor | Any
"""A file, its bytes, an image of PIL; or pixels: (H, W) or (H, W, C) uint8 arrays, (C, H, W) tensors of the model's
size, uint8 or float in [0, 1], which are not rounded."""


@dataclass(frozen=True)
class Prediction:
    """What a classifier says of an image.

    Attributes:
        name: of the class; its number where the data set, which has the names, is not there.
        index: number of the class.
        probability: softmax of its logit.
        margin: its logit minus the second largest.
        runner_up: the class of the latter.
    """

    name: str
    index: int
    probability: float
    margin: float
    runner_up: str


class Attacked(NamedTuple):
    """An image before and after an attack, (C, H, W) float in [0, 1], with the predictions.

    Attributes:
        clean, adversarial: the images.
        before, after: the predictions.
    """

    clean: Tensor
    adversarial: Tensor
    before: Prediction
    after: Prediction


class LoadedModel:
    """A model to ask single images; see `load`.

    Attributes:
        data: what the model was trained on.
    """

    def __init__(self, checkpoint: str, data: DataConfig, weights: Choice, device: torch.device) -> None:
        self.checkpoint, self.data, self.weights, self.device = checkpoint, data, weights, device

    def predict(self, image: Image) -> Prediction:
        """The class of an image.

        Raises:
            ValueError: the model has no head, or this is no image.
        """
        with torch.inference_mode(False):
            return self._predict(self._batch(image))

    def attack(self, image: Image, *, eps: float | str = 8 / 255, num_steps: int = 20, seed: int = 0) -> Attacked:
        """The image that PGD finds within ε (L∞) when it pushes the prediction away, and what is said of it.

        Args:
            eps: radius in units of images in [0, 1], or the text of a fraction, "8/255".
            num_steps: of PGD, each of ε/4, from a random start.
            seed: of that.
        Raises:
            ValueError: as `predict`, or ε is no radius.
        """
        eps = number_of("eps", eps)
        threat = LinfThreat(eps=eps, alpha=eps / 4, num_steps=num_steps)
        with torch.inference_mode(False):
            clean = self._batch(image)
            before = self._predict(clean)
            at_the_door(self._judged.module, clean)  # which refuses models without gradients
            label = torch.tensor([before.index], device=self.device)
            x = pgd(self._judged.module, clean, label, threat, seed=seed, mode="eval")
            return Attacked(clean[0].cpu(), x[0].cpu(), before, self._predict(x))

    def embed(self, *images: Image) -> Tensor:
        """(B, D) features of B images, as the model itself pools its tokens."""
        if not images:
            raise ValueError("embed(image, …) wants at least one image")
        with torch.inference_mode(False), torch.no_grad():
            features: Tensor = self._encoder(torch.cat([self._batch(image) for image in images]))
        return features.cpu()

    @cached_property
    def _judged(self) -> JudgedModel:
        with in_python():
            return load_model(
                self.checkpoint, num_classes=None, device=self.device, channels=self.data.channels,
                image_size=self.data.image_size, weights=self.weights, attacked=False,
            )  # fmt: skip

    @cached_property
    def _encoder(self) -> FrozenEncoder:
        path, kind, _ = checkpoint_and_kind(Path(self.checkpoint), self.weights)
        with in_python():
            return open_encoder(str(path), self.data, kind, attacked=False)[0].to(self.device)

    @cached_property
    def _names(self) -> Sequence[str]:
        try:
            return build_source(self.data, "test").classes
        except (MissingDataError, ImportError, OSError):
            return []

    def _predict(self, x: Tensor) -> Prediction:
        with torch.no_grad():
            logits = self._judged.module(x)[0].float()
        if not logits.isfinite().all():
            raise ValueError(f"{self.checkpoint}: the logits of this image are NaN or infinite")
        (best, second), (index, other) = (found.tolist() for found in logits.topk(2))
        names = self._names if len(self._names) == len(logits) else [str(number) for number in range(len(logits))]
        return Prediction(names[index], index, float(logits.softmax(0)[index]), best - second, names[other])

    def _batch(self, image: Image) -> Tensor:
        """(1, C, H, W) float in [0, 1], of the model's size and channels."""
        if isinstance(image, Tensor):
            return self._of_tensor(image)
        pixels = _pixels_of(image)
        if pixels.ndim == 2:
            pixels = pixels[:, :, None]
        if pixels.ndim != 3 or pixels.dtype != np.uint8 or pixels.shape[2] not in (1, 3):
            raise ValueError(f"an image is (H, W), (H, W, 1) or (H, W, 3) uint8, got {pixels.dtype} {pixels.shape}")
        fit = fitting_for(self._made_for, self.data.image_size, None, "auto")
        return torch.from_numpy(fit(pixels, self.data))[None].to(self.device).float() / 255

    def _of_tensor(self, image: Tensor) -> Tensor:
        wanted = height_width(self.data.image_size)
        if image.ndim != 3 or image.shape[0] not in (1, 3) or tuple(image.shape[1:]) != tuple(wanted):
            raise ValueError(f"an image as a tensor is (1 or 3, {wanted[0]}, {wanted[1]}), got {tuple(image.shape)}")
        if image.dtype != torch.uint8:
            if not image.is_floating_point():
                raise ValueError(f"an image as a tensor is uint8 or float in [0, 1], got {image.dtype}")
            if not 0 <= float(image.min()) <= float(image.max()) <= 1:
                found = f"{float(image.min()):g} to {float(image.max()):g}"
                raise ValueError(f"an image as a tensor of floats lies in [0, 1], got numbers from {found}")
            return to_channels(image[None].to(self.device, torch.float32, copy=True), self.data.channels)
        return to_channels(image[None], self.data.channels).to(self.device).float() / 255

    @cached_property
    def _made_for(self) -> dict[str, Any]:
        return {} if Path(self.checkpoint).exists() else self._judged.made_for

    def __repr__(self) -> str:
        return f"<{self.checkpoint}, images {said(self.data.image_size)}, {self.data.channels} channels>"


def _pixels_of(image: Image) -> np.ndarray:
    """(H, W, C) uint8 of a file, bytes or an image of PIL; arrays as they are."""
    from PIL import Image as pil

    if isinstance(image, np.ndarray):
        return image
    if isinstance(image, pil.Image):
        return pixels_of(image)
    if isinstance(image, bytes):
        return decode(image, f"{len(image)} bytes")
    if not isinstance(image, (str, Path)):
        raise TypeError(f"an image is a file, its bytes, a PIL image, an array or a tensor, got {type(image).__name__}")
    if not str(image) or not Path(image).is_file():
        raise FileNotFoundError(f"{str(image)!r} is no file, wanted an image")
    return decode(Path(image).read_bytes(), str(image))


def load(checkpoint: str | Path, *, weights: Choice = "auto", device: str = "cpu") -> LoadedModel:
    """A model to ask single images.

    Args:
        checkpoint: what `evaluate --checkpoint` takes; for `embed` also a pre-training run.
        weights: of a run's folder: best, last or ema; auto as in an evaluation.
        device: where it computes.
    Raises:
        TypeError, ValueError: this names no model, no weights or no device.
        FileNotFoundError, ValueError: when it is first asked something, if there is no such model.
    """
    if not isinstance(checkpoint, (str, Path)):
        raise TypeError(
            f"load takes the folder of a run, a file of weights or a model's name, got {type(checkpoint).__name__}: "
            "load(RUN).predict(IMAGE)"
        )
    if not str(checkpoint):
        raise ValueError("load('') names no model, wanted the folder of a run, a file of weights or a model's name")
    check_choice("weights", weights, get_args(Choice))
    try:
        usable = torch.empty(0, device=device).device.type != "meta"
    except (RuntimeError, TypeError, AssertionError):
        usable = False
    if not usable:
        here = "" if torch.cuda.is_available() else "; torch sees no CUDA GPU here"
        raise ValueError(f"device={device!r}, wanted cpu, cuda or cuda:NUMBER{here}")
    return LoadedModel(str(checkpoint), data_of(str(checkpoint)), weights, torch.device(device))
