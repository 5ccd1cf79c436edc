"""Any model can be evaluated: it only has to take images in [0, 1] and return logits.

    runs/my_finetune, model.safetensors, robust.pth     ours and the authors' (mimir_fast.models.classifier)
    timm:resnet18    timm:resnet18@random    timm:resnet18@weights.safetensors
    hf-hub:ORG/NAME  a timm model on the Hugging Face hub
    robustbench:cifar10/Linf/NAME      a model of RobustBench's zoo, where that package is installed
    model.pt2        a torch.export program; runs code of whoever made it, for torch unpickles it
    model.ts         a TorchScript file (told from others by its content, any suffix)
    package.module:function    function() returns a module or any callable; runs its code

Shapes: B images, C channels, H × W pixels, K classes.
"""

import hashlib
import importlib
import inspect
import logging
import os
import pickle
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from mimir_fast.evaluation.door import at_the_door
from mimir_fast.evaluation.robustbench_zoo import fetch
from mimir_fast.evaluation.timm_files import fill, made_for_timm
from mimir_fast.evaluation.wrappers import FromProbabilities, Normalized, Opaque
from mimir_fast.extensions import search_working_folder
from mimir_fast.models.facts import Asked
from mimir_fast.models.load_report import LoadReport
from mimir_fast.models.normalization import Statistics, choice_note, name_of, pair
from mimir_fast.models.opening import weights_only
from mimir_fast.models.timm_names import check_timm_name
from mimir_fast.sizes import Size, height_width, shown

if TYPE_CHECKING:
    from mimir_fast.models.weight_files import WeightsChoice

KINDS = (
    "a run folder, a .safetensors or .pth file, timm:NAME, hf-hub:ORG/NAME, robustbench:DATA/NORM/NAME, a .pt2 "
    "(torch.export) or TorchScript file, module:function"
)
Choice = Literal["auto", "last", "best", "ema"]
_LOG = logging.getLogger(__name__)


@dataclass
class JudgedModel:
    """A model ready to be attacked: on its device, fp32, in eval mode, parameters frozen.

    Attributes:
        module: images (B, C, H, W) in [0, 1] → logits (B, K).
        name: what the user typed.
        kind: which of the ways above.
        preprocessing: the normalisation inside, in words.
        notes: what a reader of the numbers must know, such as "weights are random".
        weights: which weights of a run were loaded, in words.
        made_for: how images were prepared for it where it says so: `image_size`, and fields of `images.Fitting`.
        code: digest of the code behind it, where that is part of what is judged.
        report: what became of a file of weights that we read.
    """

    module: nn.Module
    name: str
    kind: str
    preprocessing: str = "inside the model"
    notes: list[str] = field(default_factory=list)
    weights: str = ""
    made_for: dict[str, Any] = field(default_factory=dict)
    code: str = ""
    report: LoadReport | None = None

    @property
    def opaque(self) -> bool:
        """Its weights cannot be moved: an exported program, a TorchScript file, or a plain function."""
        return any(isinstance(part, (Opaque, torch.jit.ScriptModule)) for part in self.module.modules())

    def digest(self) -> str:
        """SHA-256 over names and bytes of the weights, and the code of functions."""
        return weights_digest(self.module, self.code)


def weights_digest(module: nn.Module, code: str = "") -> str:
    """SHA-256, shortened, over names and bytes of a model's weights, and over what no weight shows."""
    from mimir_fast.models.file_names import to_files

    digest = hashlib.sha256(code.encode())
    # torch.compile wraps and names anew what stays the same.
    module = getattr(module, "_orig_mod", module)
    # Under the names of files, as digests always were.
    named = list(to_files(module, module.state_dict()).items())
    for part in module.modules():
        named += part.weights.items() if isinstance(part, Opaque) else ()
    plain = [(name.replace("_orig_mod.", ""), value) for name, value in named]
    for name, value in sorted(plain, key=lambda pair: pair[0]):
        digest.update(name.encode())
        digest.update(_bytes_of(value))
    return digest.hexdigest()[:16]


def _bytes_of(value: Any) -> bytes:
    """The content of an entry of a state dict: a tensor, or whatever else modules keep there."""
    if isinstance(value, Tensor):
        if value.is_quantized:
            return _bytes_of([value.int_repr(), value.dequantize()])
        dense = value if value.layout == torch.strided else value.to_dense()
        return dense.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    if isinstance(value, Mapping):
        return b"".join(str(key).encode() + _bytes_of(inner) for key, inner in value.items())
    if isinstance(value, (tuple, list)):
        return b"".join(map(_bytes_of, value))
    if value is None or isinstance(value, (str, int, float, bytes, torch.dtype)):
        return repr(value).encode()
    try:
        return pickle.dumps(value)
    except Exception:  # whatever an object of somebody's raises when it is pickled
        return type(value).__qualname__.encode()


def load_model(
    spec: str, *, num_classes: int | None, device: torch.device, channels: int = 3, weights: Choice = "auto",
    image_size: Size | None = None, mean: tuple[float, ...] | None = None, std: tuple[float, ...] | None = None,
    probabilities: bool = False, part: str = "", told: Asked | None = None, attacked: bool = True,
) -> JudgedModel:  # fmt: skip
    """The model `spec` names.

    Args:
        num_classes: of the data: sizes a timm model with random weights, and is checked by a checkpoint with a head.
        channels, image_size: of the data: size a timm model.
        weights: of a run folder, which checkpoint; of a file, its moving average (`ema`) or what is there (`auto`).
        part: of a file with several encoders, which.
        mean, std: normalise by these, in place of what the model brings.
        probabilities: the model returns probabilities; their logarithm is evaluated.
        told: what the user says of weights that become a model of ours.
        attacked: it will be; False asks for no gradients.
    Raises:
        FileNotFoundError: it looks like a path and there is none.
        ValueError: none of the kinds, or a checkpoint without a classification head.
        ImportError: the module or the package it needs cannot be imported, or weights cannot be downloaded.
    """
    asked = pair(mean, std)
    judged = _find(spec, num_classes, channels, device, weights, image_size, asked, part, told or Asked())
    if judged.kind != "mimir_fast" and told not in (None, Asked()):
        raise ValueError(
            f"--checkpoint {spec} brings a whole model ({judged.kind}): leave --options and --global_pool out, they "
            "say what weights do not"
        )
    if judged.kind not in ("mimir_fast", "timm") and part:
        raise ValueError(f"--checkpoint {spec} is one model ({judged.kind}): leave --part out")
    if asked is not None:
        if judged.kind != "mimir_fast":  # ours has its own inside
            inner = judged.module
            said = inner.normalizer.statistics if isinstance(inner, Normalized) else None
            judged.notes += [note] if (note := choice_note(said, asked)) else []
            judged.module = Normalized(inner.model if isinstance(inner, Normalized) else inner, *asked)
        judged.preprocessing = f"mean {asked[0]}, std {asked[1]}, as asked"
    judged.module = judged.module.to(device).float().eval()
    for parameter in judged.module.parameters():
        parameter.requires_grad_(False)
    return _looked_at(judged, device, channels, image_size, probabilities, attacked)


def given_model(
    model: nn.Module | Callable[[Tensor], Any], *, device: torch.device, channels: int, image_size: Size,
    mean: tuple[float, ...] | None = None, std: tuple[float, ...] | None = None, probabilities: bool = False,
) -> JudgedModel:  # fmt: skip
    """A model that is there already, and is not changed: borrow it (`layers.borrowing`) while it is judged.

    Args:
        model: a module in fp32 on `device`, or any callable.
        channels, image_size: of the images it will see.
        mean, std, probabilities: as for `load_model`.
    Raises:
        ValueError: weights of another type or elsewhere, or no classifier of such images.
    """
    module = model if isinstance(model, nn.Module) else Opaque(model)
    weights = [value for value in module.state_dict().values() if isinstance(value, Tensor)]
    if other := [v for v in weights if v.device != device or (v.is_floating_point() and v.dtype != torch.float32)]:
        raise ValueError(
            f"the model has weights in {other[0].dtype} on {other[0].device}; attacks need float32, all on {device}: "
            "give model.float().to(device)"
        )
    kind = type(model) if isinstance(model, nn.Module) else model
    judged = JudgedModel(module, getattr(kind, "__qualname__", "model"), "Python object", code=_code_of(None, model))
    if (asked := pair(mean, std)) is not None:
        judged.module = Normalized(module, *asked).to(device).eval()
        judged.preprocessing = f"mean {asked[0]}, std {asked[1]}, as asked"
    return _looked_at(judged, device, channels, image_size, probabilities)


def _looked_at(
    judged: JudgedModel, device: torch.device, channels: int, image_size: Size | None, probabilities: bool,
    attacked: bool = True,
) -> JudgedModel:  # fmt: skip
    if image_size is not None:
        images = torch.rand(2, channels, *height_width(image_size)).to(device)
        judged.module, notes = at_the_door(judged.module, images, attacked)
        judged.notes += notes
    if probabilities:
        judged.module = FromProbabilities(judged.module).eval()
    return judged


def _find(
    spec: str, num_classes: int | None, channels: int, device: torch.device, weights: Choice, image_size: Size | None,
    asked: Statistics | None, part: str, told: Asked,
) -> JudgedModel:  # fmt: skip
    path = Path(spec)
    if weights != "auto" and not path.is_dir() and not (weights == "ema" and path.is_file()):
        raise ValueError(f"--weights {weights} chooses among the checkpoints of a run folder; {spec} is none")
    if part and not (path.exists() or "@" in spec):
        raise ValueError(f"--part {part} chooses among the encoders in a file; {spec} is none")
    if spec.startswith(("timm:", "hf-hub:")):
        return _timm(spec, num_classes, channels, image_size, part)
    if spec.startswith("robustbench:"):
        return _robustbench(spec, image_size)
    if path.suffix == ".pt2" and path.is_file():
        return _exported(spec, channels, device, image_size)
    if path.is_file() and _is_torchscript(path):
        try:
            module = torch.jit.load(spec, map_location="cpu")
        except RuntimeError as error:
            raise ValueError(f"--checkpoint {spec}: this TorchScript file cannot be loaded ({_line(error)})") from error
        return JudgedModel(module, spec, "TorchScript", code=file_digest(path))
    if path.suffix == ".onnx" and path.is_file():
        raise ValueError(
            f"--checkpoint {spec}: an ONNX file has no gradients, which attacks need: give the .pt2 of the same model "
            "(python -m mimir_fast.export … --format pt2)"
        )
    if path.exists():
        return _ours(spec, num_classes, weights, asked, part, image_size, told)
    if ":" in spec and "/" not in spec:
        return _function(spec)
    raise FileNotFoundError(f"--checkpoint {spec}: there is no such file or folder; a model is given as {KINDS}")


def _exported(spec: str, channels: int, device: torch.device, image_size: Size | None) -> JudgedModel:
    from torch.export.passes import move_to_device_pass

    _runs_code(spec, "torch.export unpickles what is in the file")
    try:
        program = move_to_device_pass(torch.export.load(spec), device)
    except Exception as error:  # damaged or foreign bytes raise many types
        raise ValueError(
            f"--checkpoint {spec} is no torch.export program that can be loaded ({_line(error)})"
        ) from error
    inputs = [s.arg.name for s in program.graph_signature.input_specs if s.kind.name == "USER_INPUT"]
    wanted = {node.name: node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder"}
    if len(inputs) != 1 or not isinstance(image := wanted.get(inputs[0]), Tensor) or image.ndim != 4:
        raise ValueError(
            f"--checkpoint {spec} takes {', '.join(inputs) or 'nothing'}; wanted images (B, C, H, W) alone"
        )
    given, sides = (channels, *height_width(image_size or 1)), dict.fromkeys(map(str, image.shape[2:]))
    if image_size and any(isinstance(n, int) and n != m for n, m in zip(image.shape[1:], given, strict=True)):
        raise ValueError(
            f"--checkpoint {spec} was exported for images of shape {tuple(image.shape[1:])}, the data has {given}: "
            f"give --data.image_size {' '.join(sides)} --data.channels {image.shape[1]}"
        )
    notes, least, most = list[str](), 1, None
    if isinstance(size := image.shape[0], int):
        least = most = size
        notes.append(
            f"The program was exported for batches of {size} images: it runs in these, the last one filled up."
        )
    elif (limits := program.range_constraints.get(size.node.expr)) is not None:
        least = max(1, int(limits.lower))
        most = int(limits.upper) if limits.upper < 2**31 else None
    module = Opaque(program.module(), least=least, most=most, dtype=image.dtype)
    return JudgedModel(module, spec, "torch.export", notes=notes, code=file_digest(Path(spec)))


def checkpoint_and_kind(path: Path, weights: Choice) -> tuple[Path, "WeightsChoice", str]:
    """The checkpoint that is meant of a run's folder (any other path as it is), which weights of it, and both in words.

    Raises:
        WeightsError: the folder has no such checkpoint.
    """
    from mimir_fast.checkpoints.reading import resolve_checkpoint
    from mimir_fast.models.opening import find_file

    kinds: dict[Choice, WeightsChoice] = {"auto": "auto", "best": "auto", "last": "model", "ema": "ema"}
    kind = kinds[weights]
    if not path.is_dir() or not ((path / "meta.json").exists() or find_file(path) is None):
        return path, kind, ""
    path = resolve_checkpoint(path, "last" if weights == "ema" else weights)
    words = f"{path.name} checkpoint" + {"model": ", trained weights", "ema": ", moving average"}.get(kind, "")
    return path, kind, words


def _ours(
    spec: str, num_classes: int | None, weights: Choice, asked: Statistics | None, part: str, image_size: Size | None,
    told: Asked,
) -> JudgedModel:  # fmt: skip
    from mimir_fast.checkpoints.reading import WeightsError
    from mimir_fast.models.classifier import classifier_of, unseen_of
    from mimir_fast.models.weight_files import read_weights

    path, kind, words = checkpoint_and_kind(Path(spec), weights)
    try:
        read = read_weights(path, kind, part, told)
    except WeightsError as error:
        if path.is_file() and "holds no vision transformer" in str(error):
            hint = f"Weights of any other model of timm's are given with its name, as timm:NAME@{spec}"
            raise WeightsError(f"{error}. {hint}") from error
        raise
    module, report = classifier_of(read, num_classes=num_classes, statistics=asked, image_size=image_size)
    notes = [*report.notes, *([note] if (note := choice_note(read.normalization, asked)) else [])]
    inside = _inside(module.normalizer.statistics)
    # The same tensors compute something else with other heads.
    code = " ".join(unseen_of(read, module))
    return JudgedModel(module, spec, "mimir_fast", inside, notes, words, code=code, report=report)


def timm_settings(spec: str) -> dict[str, Any]:
    """What a timm model says of its preprocessing, as `JudgedModel.made_for`; empty for an unknown one."""
    try:
        import timm

        name, _, _ = spec.removeprefix("timm:").partition("@")
        found = timm.get_pretrained_cfg(name) if spec.startswith("timm:") else _hub_settings(spec)
    except Exception:  # no timm, no such model, no network: said when the model itself is loaded
        return {}
    return made_for_timm(found.to_dict()) if found is not None else {}


def _hub_settings(spec: str) -> Any:
    from timm.models import PretrainedCfg, load_model_config_from_hf

    return PretrainedCfg(**load_model_config_from_hf(spec.removeprefix("hf-hub:"))[0])


def _timm(spec: str, num_classes: int | None, channels: int, image_size: Size | None, part: str) -> JudgedModel:

    name, _, weights = spec.removeprefix("timm:").partition("@")
    if spec.startswith("timm:"):
        check_timm_name(name)
    if part and weights in ("", "random"):
        raise ValueError(f"--part {part} chooses among the encoders of a file: leave it out with {spec}")
    said: Statistics | None = None
    sizes: dict[str, Any] = {"num_classes": num_classes, "in_chans": channels}
    made_for = timm_settings(spec)
    notes = _other_size(image_size, made_for)
    if weights and weights != "random":
        if not Path(weights).is_file():
            raise FileNotFoundError(
                f"{spec}: there is no file {weights}; timm:{name}@FILE wants a weights file of timm's"
            )
        model = _create(name, image_size, made_for, **sizes)
        said, found = fill(model, Path(weights), name, part)
        notes += found
    elif weights == "random":
        model, random = _create(name, image_size, made_for, **sizes), "the weights are random: nothing was trained"
        notes.append(random)
    else:
        try:
            with weights_only():
                model = _create(name, image_size, made_for, pretrained=True)
        except Exception as error:  # whatever the download runs into: no network, no such file, a refused connection
            reason = f"{type(error).__name__}: {error}".splitlines()[0][:160]
            raise ImportError(
                f"{spec}: its weights cannot be downloaded ({reason}). Give a downloaded file as timm:NAME@FILE, or "
                "timm:NAME@random if you mean to evaluate an untrained network"
            ) from error
    settings: dict[str, Any] = dict(model.pretrained_cfg)
    mean, std = said or (settings.get("mean"), settings.get("std"))
    if mean is None or std is None or len(mean) != channels:
        return JudgedModel(model, spec, "timm", "none", notes, made_for=made_for)
    words = f"mean {mean}, std {std}, inside the model"
    return JudgedModel(Normalized(model, tuple(mean), tuple(std)), spec, "timm", words, notes, made_for=made_for)


def _create(name: str, image_size: Size | None, made_for: dict[str, Any], **options: Any) -> Any:
    """A timm model, told of the image size where it is not its own and it must know (vision transformers)."""
    import timm

    if image_size and image_size != made_for.get("image_size", image_size):
        try:
            return timm.create_model(name, img_size=image_size, **options)
        except TypeError:  # a network that takes any size
            pass
    return timm.create_model(name, **options)


def _robustbench(spec: str, image_size: Size | None) -> JudgedModel:
    module, made_for = fetch(spec)
    notes = _other_size(image_size, made_for)
    if not made_for:
        notes.append("RobustBench does not say how images are prepared for this model: as for a model of ours, then")
    return JudgedModel(module, spec, "RobustBench", notes=notes, made_for=made_for)


def _other_size(image_size: Size | None, made_for: dict[str, Any]) -> list[str]:
    """A note where images have another size than the model was made for."""
    if not image_size or image_size == made_for.get("image_size", image_size):
        return []
    return [f"evaluated at {shown(image_size)}, made for {shown(made_for['image_size'])}"]


def _function(spec: str) -> JudgedModel:
    module_name, _, function_name = spec.partition(":")
    _runs_code(spec, f"{module_name} is imported and {function_name}() called")
    search_working_folder()
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise ImportError(
            f"--checkpoint {spec}: cannot import {module_name} ({error}); looked for in {os.getcwd()}, PYTHONPATH and "
            "the installed packages"
        ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise ValueError(f"--checkpoint {spec}: {module_name} has no function {function_name!r} that returns a model")
    try:
        inspect.signature(function).bind()
    except TypeError as error:
        raise ValueError(
            f"--checkpoint {spec}: {function_name}() is called without arguments ({error}): name a function that needs "
            f"none, such as def build(): return {function_name}(…)"
        ) from error
    except ValueError:  # made in C, whose arguments nobody knows
        pass
    model = function()
    if not callable(model):
        raise ValueError(f"--checkpoint {spec}: {function_name}() returned {type(model).__name__}, wanted a module")
    return JudgedModel(
        model if isinstance(model, nn.Module) else Opaque(model), spec, "module:function", code=_code_of(module, model)
    )


def _runs_code(spec: str, how: str) -> None:
    """Said before it happens: all other kinds of models are tensors, a name, or a program without system calls."""
    _LOG.warning("--checkpoint %s runs code with your rights (%s): judge only what you trust", spec, how)


def _code_of(module: Any, model: Any) -> str:
    """The files that say what a function computes: its module's, if any, and those of the classes it is made of."""
    parts = model.modules() if isinstance(model, nn.Module) else [model]
    found = {inspect.getsourcefile(module)} if module else set()
    for part in parts:
        kind = part if inspect.isfunction(part) else type(part)
        if kind.__module__.split(".")[0] not in ("torch", "builtins", "timm", "functools"):
            try:
                found.add(inspect.getsourcefile(kind))
            except (TypeError, OSError):  # made in C, at run time, or typed into a notebook
                continue
    return " ".join(sorted(file_digest(Path(name)) for name in found if name))


def file_digest(path: Path) -> str:
    """SHA-256 of a file, shortened."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def is_program(path: Path) -> bool:
    """A file that brings its own model, and not the weights of one."""
    return path.is_file() and (path.suffix in (".pt2", ".onnx") or _is_torchscript(path))


def _is_torchscript(path: Path) -> bool:
    """A TorchScript archive holds code; torch.save's files do not."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any("/code/" in name for name in archive.namelist())


def _inside(statistics: Statistics) -> str:
    name = name_of(statistics)
    how = f"normalization={name}" if name else f"mean {statistics[0]}, std {statistics[1]}"
    return f"{how}, inside the model"


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:160]
