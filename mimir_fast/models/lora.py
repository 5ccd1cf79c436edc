"""LoRA (arXiv 2106.09685) by PEFT: the encoder's weights stay, updates of low rank B·A beside its linear layers train.

PEFT's modules live in the model; in checkpoints the weights keep their names, and updates lie beside them as
`….lora_A.weight` and `….lora_B.weight`. Whoever reads a checkpoint to use it gets W + (alpha/rank)·B·A under W's name,
so that evaluation, export and --init know nothing of LoRA and need no PEFT.
Shapes: W (N, K), A (rank, K), B (N, rank).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from mimir_fast.models.encoder import Encoder
from mimir_fast.models.freezing import freeze_statistics
from mimir_fast.validation import check_number, without
from mimir_fast.versions import install_command

_A, _B = ".lora_A.weight", ".lora_B.weight"


@dataclass
class LoraConfig:
    """Updates of low rank in place of the encoder's own weights; needs PEFT."""

    rank: int = 0
    """Rank of the updates; the encoder is frozen, the head trains. 0 trains the weights themselves."""
    alpha: int | None = None
    """An update is multiplied by alpha/rank; None is the rank, a factor of 1."""
    targets: tuple[str, ...] = ()
    """Linear layers of the encoder's layers that get one, such as qkv,proj,fc1,fc2; none named: all."""

    def __post_init__(self) -> None:
        self.targets = tuple(name for text in self.targets for name in text.split(",") if name)
        check_number("lora.rank", self.rank, at_least=0)
        if self.alpha is not None:
            check_number("lora.alpha", self.alpha, above=0)

    def idle(self) -> dict[str, str]:
        """Options that do nothing as the others are."""
        return without(self.rank, "--{}rank is 0", "alpha", "targets")


def add_lora(model: nn.Module, encoder: Encoder, config: LoraConfig) -> None:
    """Freeze the encoder and put trainable updates beside its linear layers, drawn from torch's global generator.

    At first they are zero (B is), so the model computes what it did.

    Args:
        model: the classifier.
        encoder: the model's.
    Raises:
        ImportError: PEFT is not installed.
        ValueError: targets that the encoder does not have.
    """
    names = _targets(encoder, config)
    try:
        import peft
    except ImportError as error:
        raise ImportError(f"--lora.rank needs PEFT ({error}): {install_command('lora')}") from error
    # PEFT freezes what it is given, but for its own.
    peft.inject_adapter_in_model(
        peft.LoraConfig(r=config.rank, lora_alpha=config.alpha or config.rank, target_modules=names), encoder
    )
    freeze_statistics(model)


def merge_lora(tensors: Mapping[str, Tensor], config: Mapping[str, Any] | None) -> dict[str, Tensor]:
    """The tensors of a checkpoint with the updates added to the weights; without any they are as they were.

    Args:
        config: of the run, which knows alpha.
    """
    alpha = ((config or {}).get("lora") or {}).get("alpha")
    merged = {name: t for name, t in tensors.items() if not name.endswith((_A, _B))}
    for name, a in tensors.items():
        if name.endswith(_A):
            stem = name.removesuffix(_A)
            weight, update = tensors[f"{stem}.weight"], tensors[stem + _B].float() @ a.float()
            scale = 1.0 if alpha is None else alpha / len(a)
            merged[f"{stem}.weight"] = (weight.float() + scale * update).to(weight.dtype)
    return merged


def _targets(encoder: Encoder, config: LoraConfig) -> list[str]:
    layers = {id(module) for layer in encoder.layers() for module in layer.modules()}
    linear = {n: m for n, m in encoder.named_modules() if isinstance(m, nn.Linear) and id(m) in layers}
    known = sorted({name.rpartition(".")[2] for name in linear})
    if unknown := [target for target in config.targets if target not in known]:
        raise ValueError(f"--lora.targets {','.join(unknown)}: the linear layers here are {', '.join(known)}")
    if config.targets:
        return [name for name in linear if name.rpartition(".")[2] in config.targets]
    # An update of full rank, of talking heads say, saves nothing.
    return [name for name, layer in linear.items() if min(layer.weight.shape) > config.rank]
