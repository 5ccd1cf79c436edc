"""AutoAttack's authors' package, `pyautoattack`: its attacks as objects, on its batches, single ones as attacks
of ours, and its checks of the model.

Shapes: B images, C channels, H × W pixels.
"""

import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from mimir_fast.attacks.lp import size_of
from mimir_fast.evaluation.images import EvaluationImages
from mimir_fast.evaluation.measure import Attack
from mimir_fast.evaluation.options import NORM_NAMES, CommonOptions, Norm


def require_package() -> None:
    """Refuse to begin without pyautoattack (ImportError)."""
    try:
        import pyautoattack  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "AutoAttack needs its authors' package: pip install 'pyautoattack<0.3' (the name `autoattack` is not "
            "theirs), or leave it out with --autoattack no"
        ) from error


def package_of(
    module: nn.Module, eps: float, device: torch.device, seed: int, version: str, norm: Norm, warnings: list[str]
) -> Any:
    """The package's AutoAttack object; its warnings go to the list."""
    require_package()
    from pyautoattack import AutoAttack

    attack = AutoAttack(module, eps=eps, norm=NORM_NAMES[norm], version=version, device=device, seed=seed)
    logger = listening(warnings)
    attack.logger = attack.apgd.logger = attack.apgd_targeted.logger = logger
    return attack


def listening(warnings: list[str]) -> logging.Logger:
    """A logger of our own that collects the package's warnings: they belong into the report."""
    logger = logging.Logger("pyautoattack", logging.WARNING)
    handler = logging.Handler()
    handler.emit = lambda record: warnings.append(record.getMessage())  # type: ignore[method-assign]
    logger.addHandler(handler)
    return logger


def check_model(attack: Any, x: Tensor, y: Tensor) -> None:
    """The package's own checks of the model; what they find goes to the log."""
    from pyautoattack import checks

    checks.check_range_output(attack.get_logits, x, logger=attack.logger)
    if attack.version != "rand":
        checks.check_randomized(attack.get_logits, x, y, bs=len(x), logger=attack.logger)
    checks.check_dynamic(attack.model, x, False, logger=attack.logger)


def prepared(attack: Any, name: str) -> Callable[[Tensor, Tensor], Tensor]:
    """The package's attack object behind a name, set as its own loop sets it."""
    if name in ("apgd-ce", "apgd-dlr"):
        attack.apgd.loss = name.removeprefix("apgd-")
        chosen = attack.apgd
    elif name == "apgd-t":
        chosen = attack.apgd_targeted
    elif name in ("fab", "fab-t"):
        attack.fab.targeted = name == "fab-t"
        if attack.fab.targeted:
            attack.fab.n_restarts = 1
        chosen = attack.fab
    else:
        chosen = attack.square
    chosen.seed = attack.get_seed()
    return chosen.perturb


def batches(
    perturb: Callable[[Tensor, Tensor], Tensor], shard: EvaluationImages, entered: list[int], batch_size: int,
    device: torch.device, first: int,
) -> Iterator[tuple[int, Tensor, Tensor]]:  # fmt: skip
    """The package's attack on its batches from `first` on: (batches that are done, positions, where they are)."""
    for number in range(first, -(-len(entered) // batch_size)):
        rows = torch.tensor(entered[number * batch_size : (number + 1) * batch_size])
        x = shard.images[rows].to(device).float() / 255
        # A copy goes in: the package reshapes a lone label in place.
        yield number + 1, rows, perturb(x, shard.labels[rows].to(device).clone())


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
            raise ImportError(
                f"the {name} attack comes with AutoAttack's package: pip install 'pyautoattack<0.3'"
            ) from error
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
