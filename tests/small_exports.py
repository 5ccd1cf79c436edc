"""Small models of the families as runs and as what is exported of them."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from family_checks import Case
from file_state import file_state
from torch import nn

from mimir_fast.checkpoints.saving import save_checkpoint
from mimir_fast.exporting.original import Original
from mimir_fast.models.classifier import Classifier
from mimir_fast.models.facts import Facts
from mimir_fast.models.normalization import from_file
from mimir_fast.models.weight_files import Weights

FAMILIES = ("vit", "convit", "cait", "xcit", "convstem", "swin", "convnext")
CASES = {family: Case(family, "nano", 32, 4 if family in ("swin", "convnext") else 8) for family in FAMILIES}


def classifier(family: str, **choices: Any) -> Classifier:
    """With a normalisation inside, which the export must not lose."""
    return CASES[family].classifier(normalization="half", **choices)


def config_of(model: nn.Module, image_size: int = 32) -> dict[str, Any]:
    """What a run saves beside its weights."""
    own = asdict(model.config) if isinstance(model, Classifier) else {}
    data = {"image_size": image_size, "channels": getattr(model, "channels", 3), "augment": "pad_crop"}
    return {"model": own, "data": data}


def original_of(model: nn.Module, **facts: Any) -> Original:
    """The model as it comes out of a file."""
    config = config_of(model) | facts
    said = from_file(config)
    known = Facts() if said is None else Facts(mean=said[0], std=said[1])
    return Original(Weights(file_state(model), "a test", config=config, facts=known))


def run_of(model: nn.Module, folder: Path) -> Path:
    """A run's folder with one checkpoint."""
    tensors = {f"model/{name}": tensor.detach() for name, tensor in file_state(model).items()}
    save_checkpoint(folder / "checkpoints" / "step-00000001", tensors, {"step": 1, "config": config_of(model)})
    return folder
