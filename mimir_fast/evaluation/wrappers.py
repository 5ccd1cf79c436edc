"""What stands around a model that is evaluated, so that it takes images in [0, 1] and returns logits in fp32.

Shapes: B images, C channels, H × W pixels, K classes.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mimir_fast.models.normalization import Normalizer


class Around(nn.Module):
    """A model with something done to its images and to its logits; it has features where the model has them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def prepare(self, images: Tensor) -> Tensor:
        """What the model is given."""
        return images

    def finish(self, output: Any) -> Any:
        """What becomes of its answer."""
        return output

    def forward(self, images: Tensor) -> Any:
        """(B, K) logits of images (B, C, H, W) in [0, 1]."""
        return self.finish(self.model(self.prepare(images)))

    @property
    def forward_features(self) -> Callable[[Tensor], Tensor]:
        """The model's features of images; AttributeError where it shows none."""
        inner = self.model.forward_features
        return lambda images: inner(self.prepare(images))  # type: ignore[operator]

    @property
    def forward_head(self) -> Callable[[Tensor], Tensor]:
        """The model's logits from its features; AttributeError where it shows none."""
        inner = self.model.forward_head
        return lambda features: self.finish(inner(features))  # type: ignore[operator]


class Normalized(Around):
    """A model with its normalisation in front, so that attacks work on images in [0, 1].

    Args:
        model: takes (x − mean) / std.
        mean, std: one number a channel, of images in [0, 1].
    """

    def __init__(self, model: nn.Module, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__(model)
        self.normalizer = Normalizer((tuple(mean), tuple(std)))

    def prepare(self, images: Tensor) -> Tensor:
        """The images, normalised."""
        normalised: Tensor = self.normalizer(images)
        return normalised


class AsLogits(Around):
    """A model whose answer is a tuple, a dict or a `ModelOutput`, or comes in half precision; see `logits_of`."""

    def finish(self, output: Any) -> Tensor:
        """(B, K) fp32."""
        logits: Tensor = logits_of(output)[0]
        return logits.float()


class FromProbabilities(nn.Module):
    """Logits of a model that returns probabilities: their logarithm has the same softmax, and useful gradients."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        """(B, K) log-probabilities, which attacks take for logits."""
        return self.model(images).clamp_min(torch.finfo(torch.float32).tiny).log()


class Opaque(nn.Module):
    """A callable whose train and eval modes are not ours to switch: an exported program, or a plain function.

    Args:
        least, most: images that it takes at once, where it was compiled for some numbers only; smaller batches are
            filled up with copies of their last image, larger ones are cut.
        dtype: of the images that it takes.
    """

    def __init__(
        self, function: Callable[[Tensor], Any], *, least: int = 1, most: int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        # In a tuple, so that it is no submodule: an exported program refuses train() and eval().
        self._function = (function,)
        self.least, self.most, self.dtype = least, most, dtype

    def forward(self, images: Tensor) -> Any:
        """Whatever the function returns; logits where its batches were cut or filled up."""
        images = images if self.dtype is None else images.to(self.dtype)
        if self.least <= len(images) <= (self.most or len(images)):
            return self._function[0](images)
        return torch.cat([self._filled_up(part) for part in images.split(self.most or len(images))])

    def _filled_up(self, images: Tensor) -> Tensor:
        missing = max(0, self.least - len(images))
        last = images[-1:].detach().expand(missing, *images.shape[1:])
        logits: Tensor = logits_of(self._function[0](torch.cat([images, last])))[0]
        return logits[: len(images)]

    @property
    def weights(self) -> dict[str, Any]:
        """What the program's state dict holds; empty for a plain function."""
        inner = self._function[0]
        return dict(inner.state_dict()) if isinstance(inner, nn.Module) else {}


def unwrapped(model: nn.Module) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    """(the model that is inside, from images in [0, 1] to what it is given)."""
    around: list[Around] = []
    while isinstance(model, Around):
        around.append(model)
        model = model.model

    def prepare(images: Tensor) -> Tensor:
        for wrapper in around:
            images = wrapper.prepare(images)
        return images

    return model, prepare


def logits_of(output: Any) -> tuple[Any, str]:
    """(the logits in what a model returned, where they were in words); a tensor is what it is, with no words.

    Attribute or key `logits` as in transformers' outputs, else the first tensor of a dict, tuple or list. Without any
    tensor the output itself.
    """
    if isinstance(output, Tensor):
        return output, ""
    kind = type(output).__name__
    found = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    if isinstance(found, Tensor):
        return found, f"`logits` of the {kind} that the model returns"
    values = output.values() if isinstance(output, Mapping) else output if isinstance(output, (tuple, list)) else ()
    first = next((value for value in values if isinstance(value, Tensor)), None)
    return (output, "") if first is None else (first, f"the first tensor of the {kind} that the model returns")
