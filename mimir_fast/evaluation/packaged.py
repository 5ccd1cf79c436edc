"""Single attacks of AutoAttack's package, each as an attack of ours: APGD (for L1), targeted FAB, Square."""

from typing import Any

import torch
from torch import Tensor, nn

from mimir_fast.attacks.lp import size_of
from mimir_fast.evaluation.measure import Attack
from mimir_fast.evaluation.options import NORM_NAMES, CommonOptions


def packaged_attack(config: CommonOptions, name: str, *, targets: int | None = None, **options: Any) -> Attack:
    """pyautoattack's `apgd`, `apgd-t`, `fab-t` or `square`; where the result rounds out of the ball it is pulled back.

    Args:
        targets: of the targeted ones, how many of the likeliest wrong classes; no more than there are.
        options: of the package's class.
    """

    def run(model: nn.Module, x: Tensor, y: Tensor, samples: Tensor) -> Tensor:
        try:
            from pyautoattack.autopgd_base import APGDAttack, APGDAttack_targeted
            from pyautoattack.fab_pt import FABAttack_PT
            from pyautoattack.square import SquareAttack
        except ImportError as error:
            raise ImportError(f"the {name} attack comes with AutoAttack's package: pip install pyautoattack") from error
        kinds = {"square": SquareAttack, "apgd": APGDAttack, "apgd-t": APGDAttack_targeted, "fab-t": FABAttack_PT}
        attack = kinds[name](
            model, norm=NORM_NAMES[config.norm], eps=config.eps, seed=config.seed, device=x.device, verbose=False,
            **({"targeted": True} if name == "fab-t" else {}), **options,
        )  # fmt: skip
        devices = [x.device.index or 0] if x.device.type == "cuda" else []
        with torch.random.fork_rng(devices), torch.no_grad():
            if targets is not None:
                attack.n_target_classes = min(targets, model(x[:1]).shape[1] - 1)
            delta = attack.perturb(x.clone(), y.clone()) - x
        if config.norm == "linf":
            return (x + delta.clamp(-config.eps, config.eps)).clamp(0, 1)
        # A hair inside, as the others' projections are.
        factor = (config.eps * (1 - 1e-6) / size_of(delta, config.norm).clamp_min(1e-12)).clamp(max=1)
        return (x + delta * factor.view(-1, 1, 1, 1)).clamp(0, 1)

    return run
