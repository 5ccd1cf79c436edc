"""Training a part of a model: the encoder, or its first layers, stay as they are.

A frozen parameter has no gradient, so the optimiser, weight decay, the moving average and DDP do not know it. A batch
norm whose parameters are all frozen normalises by its running statistics, in training and under attack, and leaves
these alone: with the batch's statistics what is frozen would still change with the images around.
"""

from torch import nn

from mimir_fast.layers.norms import BatchNorm
from mimir_fast.models.encoder import Encoder


def check_freeze(what: str) -> None:
    """Refuse what `freeze` does not know.

    Raises:
        ValueError: neither empty, `encoder` nor a number.
    """
    if what not in ("", "encoder") and not what.isdecimal():
        raise ValueError(f"freeze={what!r}, wanted encoder, or a number of layers from the input on, such as 6")


def freeze(model: nn.Module, encoder: Encoder, what: str) -> None:
    """Freeze what `--freeze` names; call it before anything is built on the parameters.

    Args:
        model: a classifier or a masked model.
        encoder: the model's.
        what: `encoder` for all of it; N for the first N layers and what lies in front of them (0: the embedding alone);
            empty for nothing.
    Raises:
        ValueError: more layers than there are.
    """
    if not what:
        return
    if what != "encoder" and int(what) > encoder.num_layers:
        raise ValueError(
            f"--freeze {what}: the encoder has {encoder.num_layers} layers; --freeze encoder is all of it, what comes "
            "after the layers too"
        )
    depth = None if what == "encoder" else int(what)
    # Class attention comes after the layers that are counted.
    late = {id(p) for layer in encoder.layers()[encoder.num_layers :] for p in layer.parameters()}
    for name, parameter in encoder.named_parameters():
        if depth is not None:
            joins_later = name.startswith("cls_token") and encoder.cls_joins >= max(depth, 1)
            if id(parameter) in late or joins_later or encoder.layer_of(name) > depth:
                continue
        parameter.requires_grad_(False)
    freeze_statistics(model)


def frozen_part(what: str) -> str:
    """`encoder frozen`, `first 6 layers frozen` or `embedding frozen`, for a run's headline."""
    if what == "encoder":
        return "encoder frozen"
    return f"first {what} layers frozen" if int(what) else "embedding frozen"


def freeze_statistics(model: nn.Module) -> None:
    """Let batch norms of which nothing trains keep their running statistics."""
    for layer in model.modules():
        if isinstance(layer, BatchNorm) and not any(p.requires_grad for p in layer.parameters()):
            layer.freeze()


def count_parameters(model: nn.Module, *, partly: bool) -> str:
    """`5.4 M parameters`, or `0.0019 of 5.4 M parameters train` of a model that is frozen partly."""
    parameters = list(model.parameters())
    trained = sum(p.numel() for p in parameters if p.requires_grad) / 1e6
    if not partly:
        return f"{trained:.1f} M parameters"
    return f"{trained:.2g} of {sum(p.numel() for p in parameters) / 1e6:.1f} M parameters train"
