"""Weights of a live model under the names that files have, and back."""

from collections.abc import Mapping

from torch import Tensor, nn

from mimir_fast.models.file_names import from_files, to_files


def file_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict as a file would have it."""
    return to_files(model, model.state_dict())


def load_file_state(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Strictly."""
    model.load_state_dict(from_files(model, tensors), strict=True)
