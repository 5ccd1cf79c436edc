"""What RobustBench's package knows: its models, how images are prepared for each, and which images it evaluates on."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import nn

from mimir_fast.evaluation.timm_files import made_for_timm
from mimir_fast.models.opening import weights_only

PREPROCESSING: dict[str | None, dict[str, Any]] = {
    None: {},
    "Res256Crop224": {"image_size": 224, "crop": 0.875, "interpolation": "bilinear", "mode": "center"},
    "BicubicRes256Crop224": {"image_size": 224, "crop": 0.875, "interpolation": "bicubic", "mode": "center"},
    "Res224": {"image_size": 224, "crop": 1.0, "interpolation": "bilinear", "mode": "squash"},
    "Crop288": {"image_size": 288, "crop": 1.0, "interpolation": "bilinear", "mode": "cut"},
}
"""robustbench.data.PREPROCESSINGS, its names, as `image_size` and fields of `images.Fitting`."""


def package_folder() -> Path | None:
    """Where RobustBench's own package is; torchattacks brings an old copy of a part of it under the same name."""
    spec = find_spec("robustbench")
    folders = map(Path, (spec.submodule_search_locations or ()) if spec else ())
    return next((folder for folder in folders if (folder / "helper_files").is_dir()), None)


def image_list() -> Path:
    """The list of 5000 ImageNet validation images that RobustBench evaluates on, from the installed package.

    Raises:
        FileNotFoundError: it is not installed.
    """
    if (folder := package_folder()) is not None:
        return folder / "helper_files" / "imagenet_test_image_ids.txt"
    raise FileNotFoundError(
        "RobustBench's list of 5000 images comes with its package: pip install --no-deps robustbench==1.1.1, or give "
        "--index_file the path of helper_files/imagenet_test_image_ids.txt from its repository"
    )


def parsed(spec: str) -> tuple[str, str, str]:
    """Data (cifar10, cifar100 or imagenet), norm (Linf, L2 or corruptions) and name of robustbench:DATA/NORM/NAME.

    Raises:
        ValueError: it is written otherwise.
    """
    match spec.removeprefix("robustbench:").split("/"):
        case [name]:
            return "cifar10", "Linf", name
        case [dataset, threat, name]:
            return dataset, threat, name
    raise ValueError(f"{spec}: wanted robustbench:NAME, or robustbench:DATA/NORM/NAME such as cifar10/Linf/NAME")


def fetch(spec: str) -> tuple[nn.Module, dict[str, Any]]:
    """(a model of its zoo with its weights, how RobustBench prepares images for it: see `PREPROCESSING`).

    Raises:
        ImportError: the package is not there, lacks one of its own, or cannot get the weights.
        ValueError: no such model.
    """
    dataset, threat, name = parsed(spec)
    advice = "it pins old versions of others: install it aside, in an environment of its own"
    if package_folder() is None:
        found = find_spec("robustbench")
        other = f"; {found.origin} is a part of an old one that torchattacks brings" if found else ""
        raise ImportError(f"{spec} needs RobustBench's package, and {advice}{other}")
    try:
        from robustbench.model_zoo import model_dicts
        from robustbench.model_zoo.enums import BenchmarkDataset, ThreatModel
        from robustbench.utils import load_model
        from timm import is_model
    except ImportError as error:
        raise ImportError(f"{spec}: RobustBench's package does not work here ({error}); {advice}") from error
    try:
        entry = model_dicts[BenchmarkDataset(dataset)][ThreatModel(threat)].get(name, {})
        with weights_only():
            module = load_model(model_name=name, dataset=dataset, threat_model=threat)
    except (KeyError, ValueError) as error:
        raise ValueError(f"{spec}: RobustBench has no such model ({error})") from error
    except Exception as error:  # its downloads raise many types
        raise ImportError(f"{spec}: its weights cannot be had ({type(error).__name__}: {error})") from error
    # The package asks timm first.
    registered = is_model(f"{name.lower().replace('-', '_')}_{dataset}_{threat.lower()}")
    return module, prepared_for(module, dataset, None if registered else entry.get("preprocessing"))


def prepared_for(module: nn.Module, dataset: str, preprocessing: str | None) -> dict[str, Any]:
    """What `robustbench.data.get_preprocessing` does; without a name a model registered with timm says it itself."""
    if dataset != "imagenet":
        return {"image_size": 32}
    for inner in (module, getattr(module, "model", None)):
        if preprocessing is None and (settings := getattr(inner, "default_cfg", None)):
            return made_for_timm({**settings, "crop_mode": "center"})
    return PREPROCESSING.get(preprocessing, {})
