"""Any model can be judged: it only has to take images in [0, 1] and return logits.

    runs/my_finetune, model.safetensors, robust.pth     ours and the authors' (mimir_fast.models.classifier)
    timm:resnet18    timm:resnet18@random    timm:resnet18@weights.safetensors
    model.pt2        a torch.export program
    model.ts         a TorchScript file (told from others by its content, any suffix)
    package.module:function    function() returns a module or any callable

Shapes: B images, C channels, H × W pixels, K classes.
"""

import importlib
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

KINDS = (
    "a run folder, a .safetensors or .pth file, timm:NAME, a .pt2 (torch.export) or TorchScript file, module:function"
)


@dataclass
class JudgedModel:
    """A model ready to be attacked: on its device, fp32, in eval mode, parameters frozen.

    Attributes:
        module: images (B, C, H, W) in [0, 1] → logits (B, K).
        name: what the user typed.
        kind: which of the ways above.
        notes: what a reader of the numbers must know, such as "weights are random".
        preprocessing: the normalisation inside, in words.
    """

    module: nn.Module
    name: str
    kind: str
    preprocessing: str = "inside the model"
    notes: list[str] = field(default_factory=list)


class Normalized(nn.Module):
    """A model with its normalisation in front, so that attacks work on images in [0, 1].

    Args:
        model: takes (x − mean) / std.
        mean, std: one number a channel, of images in [0, 1].
    """

    def __init__(self, model: nn.Module, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)
        self.mean: Tensor
        self.std: Tensor

    def forward(self, images: Tensor) -> Tensor:
        """(B, K) logits of images (B, C, H, W) in [0, 1]."""
        return self.model((images - self.mean) / self.std)

    def forward_features(self, images: Tensor) -> Tensor:
        """The inner model's features."""
        return self.model.forward_features((images - self.mean) / self.std)  # type: ignore[operator]

    def forward_head(self, features: Tensor) -> Tensor:
        """The inner model's logits from its features."""
        return self.model.forward_head(features)  # type: ignore[operator]


class Opaque(nn.Module):
    """A callable whose train and eval modes are not ours to switch: an exported program, or a plain function."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        # In a tuple, so that it is no submodule: an exported program refuses train() and eval().
        self._function = (function,)

    def forward(self, images: Tensor) -> Tensor:
        """Whatever the function returns."""
        return self._function[0](images)

    @property
    def weights(self) -> dict[str, Tensor]:
        """Named tensors of the program; empty for a plain function."""
        inner = self._function[0]
        return dict(inner.state_dict()) if isinstance(inner, nn.Module) else {}


class FromProbabilities(nn.Module):
    """Logits of a model that returns probabilities: their logarithm has the same softmax, and honest gradients."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        """(B, K) log-probabilities."""
        return self.model(images).clamp_min(torch.finfo(torch.float32).tiny).log()


def load_model(spec: str, *, num_classes: int | None, device: torch.device, channels: int = 3) -> JudgedModel:
    """The model `spec` names.

    Args:
        num_classes: of the data: sizes a timm model with random weights, and is checked by a checkpoint with a head.
        channels: of the data: sizes a timm model with random weights.
    Raises:
        FileNotFoundError: it looks like a path and there is none.
        ValueError: none of the kinds, or a checkpoint without a classification head.
        ImportError: the module or the package it needs cannot be imported.
    """
    judged = _find(spec, num_classes, channels, device)
    judged.module = judged.module.to(device).float().eval()
    for parameter in judged.module.parameters():
        parameter.requires_grad_(False)
    return judged


def _find(spec: str, num_classes: int | None, channels: int, device: torch.device) -> JudgedModel:
    path = Path(spec)
    if spec.startswith("timm:"):
        return _timm(spec, num_classes, channels)
    if path.suffix == ".pt2" and path.is_file():
        from torch.export.passes import move_to_device_pass

        program = move_to_device_pass(torch.export.load(spec), device)
        return JudgedModel(Opaque(program.module()), spec, "torch.export")
    if path.is_file() and _is_torchscript(path):
        return JudgedModel(torch.jit.load(spec, map_location="cpu"), spec, "TorchScript")
    if path.exists():
        from mimir_fast.models.classifier import load_classifier

        module = load_classifier(spec, num_classes=num_classes)
        return JudgedModel(module, spec, "mimir_fast", _our_preprocessing(module))
    if ":" in spec and "/" not in spec:
        return _function(spec)
    raise FileNotFoundError(f"--checkpoint {spec}: there is no such file or folder; a model is given as {KINDS}")


def _timm(spec: str, num_classes: int | None, channels: int) -> JudgedModel:
    import timm

    name, _, weights = spec.removeprefix("timm:").partition("@")
    if not timm.is_model(name.split(".")[0]):
        near = ", ".join(timm.list_models(f"*{name.split('_')[0]}*")[:5])
        raise ValueError(f"timm has no model {name!r}; near it: {near or 'none, see timm.list_models()'}")
    notes: list[str] = []
    sizes: dict[str, Any] = {"num_classes": num_classes, "in_chans": channels}
    if weights and weights != "random":
        if not Path(weights).is_file():
            raise FileNotFoundError(
                f"{spec}: there is no file {weights}; timm:{name}@FILE wants a weights file of timm's"
            )
        model = timm.create_model(name, checkpoint_path=weights, **sizes)
    elif weights == "random":
        model, notes = timm.create_model(name, **sizes), ["the weights are random: nothing was trained"]
    else:
        try:
            model = timm.create_model(name, pretrained=True)
        except Exception as error:  # whatever the download runs into: no network, no such file, a refused connection
            reason = f"{type(error).__name__}: {error}".splitlines()[0][:160]
            notes = [f"the weights are RANDOM: timm could not download the pre-trained ones ({reason})"]
            model = timm.create_model(name, **sizes)
    settings: dict[str, Any] = dict(model.pretrained_cfg)  # type: ignore[arg-type]
    mean, std = settings.get("mean"), settings.get("std")
    if mean is None or std is None or len(mean) != channels:
        return JudgedModel(model, spec, "timm", "none", notes)
    return JudgedModel(Normalized(model, mean, std), spec, "timm", f"mean {mean}, std {std}, inside the model", notes)


def _function(spec: str) -> JudgedModel:
    module_name, _, function_name = spec.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise ImportError(
            f"--checkpoint {spec}: cannot import {module_name} ({error}); run from its folder or set PYTHONPATH"
        ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise ValueError(f"--checkpoint {spec}: {module_name} has no function {function_name!r} that returns a model")
    model = function()
    if not callable(model):
        raise ValueError(f"--checkpoint {spec}: {function_name}() returned {type(model).__name__}, wanted a module")
    return JudgedModel(model if isinstance(model, nn.Module) else Opaque(model), spec, "module:function")


def _is_torchscript(path: Path) -> bool:
    """A TorchScript archive holds code; torch.save's files do not."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any("/code/" in name for name in archive.namelist())


def _our_preprocessing(module: nn.Module) -> str:
    name = getattr(getattr(module, "config", None), "normalization", None)
    return f"normalization={name}, inside the model" if name else "inside the model"
