"""What stands in a file beside an encoder: harmless, a normalisation in front of it, or something nobody knows.

One rule for every file, whatever prefixes its names have. Harmless is what is known by its name to take no part in the
answer. A normalisation is read. Anything else could change what the model computes: who wants that function refuses it.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

from mimir_fast.checkpoints.reading import WeightsError
from mimir_fast.models.normalization import Statistics, typed

# First word of a name → why a tensor is no part of the function.
_HARMLESS = {
    r"decoders?(_.*)?|mask_tokens?|masked_embed": "the decoder",
    r"(momentum|teacher)(_.*)?|target_(encoder|network|model)|(.*_)?ema(_.*)?": "of a teacher or a moving average",
    r"projectors?|proj(ection)?_heads?|predictors?|prototypes?|(dino|ibot|mim|contrastive|ssl)_head|queue(_ptr)?":
        "of a head for self-supervised training",
    r".*optim.*|.*sched.*|((grad|loss|amp)_)?scaler|loss(es|_f.*)?|criterion|.*metrics?(_.*)?": "of the training",
    r"callbacks|loops|history|.*rng.*": "of the training",
}  # fmt: skip
# THOP leaves its counts on every layer.
_COUNTS = re.compile(r"(.*\.)?(total_ops|total_params|n_averaged|num_updates)")
_HEAD = re.compile(r"heads?|head_dist|fc|classifier|(cls|class)_(head|classifier)|linear|last_linear|logits|probe")
_MEAN = re.compile(r"(.*_)?(mean|mu)(s?)")
_DEVIATION = {"mean": "std", "mu": "sigma"}
_STATISTIC = re.compile(r"(.*_)?(mean|mu|std|sigma)s?")
HEAD = "a head"
READ = "read as mean and std of the images"


class Beside(NamedTuple):
    """What is known of tensors beside an encoder.

    Attributes:
        statistics: (mean, std) of the normalisation in front of it, as it stands there; None where there is none.
        reasons: name → why it is no part of the function, or what it was read as.
        unknown: names of those that could change the function.
    """

    statistics: Statistics | None
    reasons: dict[str, str]
    unknown: list[str]


def harmless(name: str) -> str:
    """Why a tensor of this name takes no part in what a model answers; "" where nobody knows."""
    first = name.partition(".")[0].lower()
    reason = next((reason for words, reason in _HARMLESS.items() if re.fullmatch(words, first)), "")
    return reason or ("of the training" if _COUNTS.fullmatch(name) else "")


def is_statistic(name: str, tensor: Tensor) -> bool:
    """Whether it may be a mean or a deviation of images, by its last word and its few numbers."""
    return tensor.numel() <= 4 and bool(_STATISTIC.fullmatch(name.rpartition(".")[2]))


def look_beside(tensors: Mapping[str, Tensor], others: Collection[str], *, has_head: bool) -> Beside:
    """What is known of the tensors beside an encoder.

    Args:
        others: first words of the names of other encoders.
        has_head: the encoder has a classification head, so what looks like another one would come behind it.
    """
    reasons: dict[str, str] = {}
    for name, tensor in tensors.items():
        first = name.partition(".")[0]
        if reason := harmless(name):
            reasons[name] = reason
        elif first in others:
            reasons[name] = "of another encoder"
        elif tensor.ndim == 0 and not tensor.is_floating_point():
            reasons[name] = "a counter"
        elif not has_head and _HEAD.fullmatch(first):
            reasons[name] = f"{HEAD} outside of the encoder"
    pairs = _pairs({name: tensor for name, tensor in tensors.items() if name not in reasons})
    found = list(dict.fromkeys(pairs.values()))
    if len(found) == 1:  # else nobody knows which of them
        reasons |= {name: READ for names in pairs for name in names}
    # Without a deviation beside it, only a mean of zeros is known to change nothing.
    reasons |= {n: READ for n, t in tensors.items() if _MEAN.fullmatch(n.rpartition(".")[2]) and not t.any()}
    unknown = [name for name in tensors if name not in reasons]
    return Beside(found[0] if len(found) == 1 else None, reasons, unknown)


def refuse_unknown(names: Sequence[str], origin: str) -> None:
    """Raises WeightsError, by name, where there is something beside an encoder that may change what it computes."""
    if names:
        more = f" and {len(names) - 1} more stand" if len(names) > 1 else " stands"
        raise WeightsError(
            f"{origin}: {names[0]}{more} beside the encoder and may change what it computes. If not, save the state "
            "dict of the encoder alone; else give evaluate the whole model, as module:function"
        )


def _pairs(tensors: Mapping[str, Tensor]) -> dict[tuple[str, str], Statistics]:
    """(name of a mean, name of its deviation) → their numbers."""
    found = {}
    for name, mean in tensors.items():
        before, dot, word = name.rpartition(".")
        if (match := _MEAN.fullmatch(word)) is None:
            continue
        other = f"{before}{dot}{match[1] or ''}{_DEVIATION[match[2]]}{match[3]}"
        std = tensors.get(other)
        if std is None or not mean.numel() == std.numel() <= 4:
            continue
        if (std > 0).all() and mean.isfinite().all() and std.isfinite().all():
            found[name, other] = typed(mean.flatten().tolist()), typed(std.flatten().tolist())
    return found
