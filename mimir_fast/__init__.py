"""mimir_fast: fast adversarial masked pre-training of robust vision transformers.

`import mimir_fast` is cheap and needs only torch; the public names load on first use:

    from mimir_fast import hsic, nhsic, renyi_mi, linf_step

The commands are functions too: `mimir_fast.pretrain(data="digits")`, `finetune`, `evaluate`, `probe` (see api.py), and
`mimir_fast.load("RUN").predict("x.png")`.
"""

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

from mimir_fast.waiting import spare_busy_cores

__version__ = "0.1.0"

_HOME = {
    "hsic": "mimir_fast.ops.hsic",
    "hsic_test": "mimir_fast.ops.independence",
    "nhsic": "mimir_fast.ops.nhsic",
    "renyi_mi": "mimir_fast.ops.renyi_mi",
    "cka": "mimir_fast.ops.cka",
    "MinibatchCKA": "mimir_fast.metrics",
    "gradient_share": "mimir_fast.losses",
    "gather_batch": "mimir_fast.ops.global_batch",
    "global_hsic": "mimir_fast.ops.global_hsic",
    "HSICLoss": "mimir_fast.losses",
    "NHSICLoss": "mimir_fast.losses",
    "CKALoss": "mimir_fast.losses",
    "RenyiMI": "mimir_fast.losses",
    "MutualInformationPenalty": "mimir_fast.losses",
    "PGD": "mimir_fast.attacks.pgd",
    "linf_step": "mimir_fast.ops.linf_step",
    "random_start_linf": "mimir_fast.ops.random_uniform",
    "random_masks": "mimir_fast.ops.random_masks",
    "patchify_gather": "mimir_fast.ops.patches",
    "masked_loss": "mimir_fast.ops.masked_loss",
    "masked_targets": "mimir_fast.ops.patches",
    "gather_patches": "mimir_fast.ops.tokens",
    "scatter_patches": "mimir_fast.ops.tokens",
}
# What needs more than torch: commands, modules that can be called, and what asks a finished run.
_COMMANDS = ("evaluate", "finetune", "pretrain", "probe")
__all__ = ["__version__", *sorted(_HOME)]

if TYPE_CHECKING:
    from mimir_fast.attacks.pgd import PGD as PGD
    from mimir_fast.losses import CKALoss as CKALoss
    from mimir_fast.losses import HSICLoss as HSICLoss
    from mimir_fast.losses import MutualInformationPenalty as MutualInformationPenalty
    from mimir_fast.losses import NHSICLoss as NHSICLoss
    from mimir_fast.losses import RenyiMI as RenyiMI
    from mimir_fast.losses import gradient_share as gradient_share
    from mimir_fast.metrics import MinibatchCKA as MinibatchCKA
    from mimir_fast.ops.cka import cka as cka
    from mimir_fast.ops.global_batch import gather_batch as gather_batch
    from mimir_fast.ops.global_hsic import global_hsic as global_hsic
    from mimir_fast.ops.hsic import hsic as hsic
    from mimir_fast.ops.independence import hsic_test as hsic_test
    from mimir_fast.ops.linf_step import linf_step as linf_step
    from mimir_fast.ops.masked_loss import masked_loss as masked_loss
    from mimir_fast.ops.nhsic import nhsic as nhsic
    from mimir_fast.ops.patches import masked_targets as masked_targets
    from mimir_fast.ops.patches import patchify_gather as patchify_gather
    from mimir_fast.ops.random_masks import random_masks as random_masks
    from mimir_fast.ops.random_uniform import random_start_linf as random_start_linf
    from mimir_fast.ops.renyi_mi import renyi_mi as renyi_mi
    from mimir_fast.ops.tokens import gather_patches as gather_patches
    from mimir_fast.ops.tokens import scatter_patches as scatter_patches
    from mimir_fast.predicting import load as load


if sys.argv[:1] == ["-m"]:  # `python -m mimir_fast.COMMAND` is looking for its module
    spare_busy_cores()


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    if name in _COMMANDS:
        return import_module(f"mimir_fast.{name}")
    if name == "load":
        return import_module("mimir_fast.predicting").load
    raise AttributeError(f"module 'mimir_fast' has no attribute {name!r}; it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    return sorted([*__all__, *_COMMANDS, "load"])
