"""What the pre-training recipes of all data sets share, so that each file says only what is its own."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

from mimir_fast.data import DataConfig
from mimir_fast.methods.mimir import MimirConfig
from mimir_fast.models.masked_autoencoder import EncoderName, ModelConfig
from mimir_fast.recipes import find_recipe, register
from mimir_fast.training.loop import RunConfig
from mimir_fast.training.optimizer import OptimizerConfig
from mimir_fast.training.pretraining import PretrainConfig

PretrainMethod = Literal["mae", "adv_mae", "mimir"]

METHOD_NOTES: dict[PretrainMethod, str] = {
    "mae": "MAE on clean images",
    "adv_mae": "MAE on adversarial images",
    "mimir": "MIMIR, preset paper",
}


def register_pretraining(
    group: str, encoders: tuple[EncoderName, ...], patch_size: int, data: Callable[[], DataConfig],
    run: Callable[[], RunConfig], note: str, blr: float = 1.5e-4,
    expected: dict[tuple[PretrainMethod, EncoderName], str] | None = None,
) -> None:  # fmt: skip
    """GROUP/{mae,adv_mae,mimir}_vit_SIZE for each encoder size.

    Args:
        expected: published natural / robust accuracy after adversarial fine-tuning of these weights.
    """
    for encoder in encoders:
        for method, what in METHOD_NOTES.items():

            def build(encoder: EncoderName = encoder, method: PretrainMethod = method) -> PretrainConfig:
                return PretrainConfig(
                    method=method,
                    model=ModelConfig(encoder=encoder, patch_size=patch_size),
                    data=data(),
                    objective=MimirConfig(),
                    optim=OptimizerConfig(blr=blr),
                    run=replace(run()),
                )

            published = (expected or {}).get((method, encoder), "")
            register(f"{group}/{method}_vit_{encoder}", PretrainConfig, build, f"{what}; {note}", published)


def register_variant(base: str, suffix: str, note: str, expected: str, *, num_steps: int = 1, **mi: Any) -> None:
    """BASE_SUFFIX: a registered pre-training recipe with another number of attack steps or another penalty."""

    def build() -> PretrainConfig:
        config = find_recipe(PretrainConfig, base)
        objective = config.objective
        changed = replace(
            objective, attack=replace(objective.attack, num_steps=num_steps), mi=replace(objective.mi, **mi)
        )
        return replace(config, objective=changed)

    register(f"{base}_{suffix}", PretrainConfig, build, note, expected)
