"""How transformers builds a model of ours: the class, its configuration, and the tensors under the names of its Hub.

One file a family, found by itself. The names are those of the public checkpoints, which every version of transformers
reads, whatever its live modules are called.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from mimir_fast.exporting.original import Original
from mimir_fast.models.families import find_family
from mimir_fast.registry import Registry
from mimir_fast.sizes import said

QKV = "QKV"
"""Stands in a new name for query, key and value, which lie one after the other in ours."""
Rules = Mapping[str, str | Callable[[re.Match[str]], str]]
_ACTIVATIONS = {"erf": "gelu", "tanh": "gelu_pytorch_tanh", "quick": "quick_gelu"}


@dataclass(frozen=True)
class Twin:
    """The same model in transformers.

    Attributes:
        class_name: a class of transformers.
        config: of config.json, without what follows from the class.
        tensors: of model.safetensors.
        options: of `from_pretrained`.
        output: of what the class returns, the attribute that is the original's output.
    """

    class_name: str
    config: dict[str, Any]
    tensors: dict[str, Tensor]
    options: Mapping[str, Any]
    output: str


TWINS: Registry[Callable[[Original], Twin]] = Registry("family in transformers", __name__)


def register(family: str, build: Callable[[Original], Twin]) -> None:
    """Add a family: original → twin, which raises ValueError where transformers has none."""
    TWINS.add(family, build)


def find_twin(original: Original) -> Twin:
    """The same model in transformers.

    Raises:
        ValueError: transformers has no such class, or the class has no place for something.
    """
    name = original.architecture.family
    if name not in TWINS.all():
        raise ValueError(
            f"transformers has no {find_family(name).title}: it has {', '.join(TWINS.all())} of our families. "
            "--format onnx, pt2 and torchscript take it"
        )
    return TWINS.find(name)(original)


def renamed(tensors: Mapping[str, Tensor], rules: Rules, class_name: str) -> dict[str, Tensor]:
    """The tensors under the names of transformers.

    Args:
        rules: pattern of a whole name of ours → what it is called there.
    Raises:
        ValueError: a tensor that no rule takes: the class would compute without it.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        match, new = next(((m, new) for old, new in rules.items() if (m := re.fullmatch(old, name))), (None, ""))
        if match is None:
            raise ValueError(
                f"transformers' {class_name} has no place for {name}: --format onnx, pt2 and torchscript take it"
            )
        there = match.expand(new) if isinstance(new, str) else new(match)
        if QKV in there:
            words = ("query", "key", "value")
            found |= {there.replace(QKV, w): t for w, t in zip(words, tensor.chunk(3), strict=True)}
        else:
            found[there] = tensor
    return {name: tensor.float().contiguous() for name, tensor in found.items()}


def block_rules(ours: str, theirs: str, attention: str) -> dict[str, str]:
    """Those of a transformer block.

    Args:
        ours, theirs: what stands in front of a layer's number; `ours` has no groups.
        attention: what transformers calls the module of queries, keys and values.
    """
    parts = {
        "norm1": "layernorm_before", "norm2": "layernorm_after", "attn.qkv": f"attention.{attention}.{QKV}",
        "attn.proj": "attention.output.dense", "mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense",
    }  # fmt: skip
    return {
        rf"{ours}\.([\d.a-z]+)\.{re.escape(old)}\.(weight|bias)": rf"{theirs}.\1.{new}.\2" for old, new in parts.items()
    }


def shared_config(original: Original, model: nn.Module) -> dict[str, Any]:
    """What every configuration holds; raises ValueError where norms have several eps, where the classes have one."""
    eps = {module.eps for module in model.modules() if isinstance(module, nn.LayerNorm)}
    if len(eps) > 1:
        raise ValueError(
            f"this model's norms have eps {', '.join(map(str, sorted(eps)))}: transformers has one for all"
        )
    architecture = original.architecture
    if not isinstance(architecture.image_size, int):
        raise ValueError(
            f"this model is for images of {said(architecture.image_size)} pixels, and the image processors of "
            "transformers cut squares: use another --format, such as timm or onnx"
        )
    config: dict[str, Any] = {
        "image_size": architecture.image_size, "num_channels": architecture.channels,
        "patch_size": architecture.patch_size, "layer_norm_eps": eps.pop(),
        "hidden_act": _ACTIVATIONS[str(architecture.options.get("gelu", "erf"))],
    }  # fmt: skip
    if original.num_classes is not None:
        config["id2label"] = {str(index): f"LABEL_{index}" for index in range(original.num_classes)}
        config["label2id"] = {label: int(index) for index, label in config["id2label"].items()}
    return config
