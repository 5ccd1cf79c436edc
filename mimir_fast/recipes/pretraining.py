"""What the pre-training recipes of all data sets share, so that each file says only what is its own."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from mimir_fast.data import DataConfig
from mimir_fast.methods.registry import find_method
from mimir_fast.models.masked_model import ModelConfig
from mimir_fast.recipes import find_recipe, register
from mimir_fast.training.loop import RunConfig
from mimir_fast.training.optimizer import OptimizerConfig
from mimir_fast.training.pretraining import PretrainConfig, with_method

METHODS = ("mae", "adv_mae", "mimir")


def register_pretraining(
    group: str, encoders: tuple[str, ...], patch_size: int, data: Callable[[], DataConfig],
    run: Callable[[], RunConfig], note: str, blr: float = 1.5e-4, *, methods: tuple[str, ...] = METHODS,
    family: str = "vit", expected: dict[tuple[str, str], str] | None = None, **model: Any,
) -> None:  # fmt: skip
    """GROUP/METHOD_FAMILY_SIZE for each method and encoder size.

    Args:
        expected: (method, size) → published natural / robust accuracy after adversarial fine-tuning of these weights.
        model: further options of the model.
    """
    for encoder in encoders:
        for method in methods:

            def build(encoder: str = encoder, method: str = method) -> PretrainConfig:
                config = PretrainConfig(
                    model=ModelConfig(family=family, encoder=encoder, patch_size=patch_size, **model),
                    data=data(),
                    optim=OptimizerConfig(blr=blr),
                    run=replace(run()),
                )
                return with_method(config, method)

            published = (expected or {}).get((method, encoder), "")
            what = find_method("pretrain", method).note
            register(f"{group}/{method}_{family}_{encoder}", PretrainConfig, build, f"{what}; {note}", published)


def register_variant(base: str, suffix: str, note: str, expected: str, *, num_steps: int = 1, **mi: Any) -> None:
    """BASE_SUFFIX: a registered pre-training recipe with another number of attack steps or another penalty."""

    def build() -> PretrainConfig:
        config = find_recipe(PretrainConfig, base)
        objective: Any = config.objective
        objective = replace(objective, attack=replace(objective.attack, num_steps=num_steps))
        if mi:
            objective = replace(objective, mi=replace(objective.mi, **mi))
        return replace(config, objective=objective)

    register(f"{base}_{suffix}", PretrainConfig, build, note, expected)
